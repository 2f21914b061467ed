"""Integers on disk -> batches: the shard format, the order of samples, the loader."""
