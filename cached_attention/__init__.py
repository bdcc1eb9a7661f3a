"""CachedAttention: a KV cache hierarchy for multi-turn conversations. Knows torch, never imports an engine."""
