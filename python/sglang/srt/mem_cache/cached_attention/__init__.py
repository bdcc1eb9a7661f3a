"""CachedAttention under SGLang's unified radix cache."""
