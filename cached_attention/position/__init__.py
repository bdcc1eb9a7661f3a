"""Moving keys to positions other than the one they were computed at."""
