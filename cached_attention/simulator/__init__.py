"""Compares policies: runs the engine's own page index, eviction order, look-ahead, fetch and write-behind in
virtual time, on a trace or generated conversations. No torch, no I/O except reading a trace."""
