"""Storage tiers for page records."""
