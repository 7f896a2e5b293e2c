"""What lies on disk: whole or not there at all, and checked when it is read."""
