"""Where page records live."""
