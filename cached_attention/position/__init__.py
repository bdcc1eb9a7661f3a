"""Keys at other positions than the one they were computed at."""
