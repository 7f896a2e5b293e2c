"""A user's files to validated tasks: rows, splits, columns, and every problem said at once."""
