"""What to evict, and whether to wait for a fetch: functions of the index and the queue, without I/O."""
