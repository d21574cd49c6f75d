"""Projection to the vocabulary, log-softmax and loss in chunks of rows."""
