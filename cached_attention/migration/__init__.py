"""Between host memory and the tiers below it: prefetching for the queue, and write-behind."""
