"""Attention over ranges of the sorted order."""
