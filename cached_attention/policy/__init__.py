"""Who goes and who comes: functions of the index and the queue, without I/O."""
