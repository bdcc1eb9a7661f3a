"""What a policy is worth: the engine's own page index, eviction order, look-ahead, fetch and write-behind, driven
in virtual time by a trace or by generated conversations. No torch, no I/O but reading a trace."""
