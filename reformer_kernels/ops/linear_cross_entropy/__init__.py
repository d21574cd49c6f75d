"""Projection to the vocabulary, log-softmax and loss, computed in chunks of rows."""
