"""Attention over sorted orders in Triton."""
