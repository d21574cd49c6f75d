"""The two-layer feed-forward network, computed in chunks of rows."""
