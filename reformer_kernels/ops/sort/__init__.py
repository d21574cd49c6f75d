"""Sorting tokens by bucket."""
