"""One file a command that is more than a call."""
