"""The index of a shard: made in one pass, checked, and read."""
