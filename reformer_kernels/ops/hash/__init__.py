"""Hashing query-keys to buckets by angle."""
