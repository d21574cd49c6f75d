"""The two-layer feed-forward in chunks of rows."""
