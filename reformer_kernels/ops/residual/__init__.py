"""Residual steps: updates of the streams of reversible layers, in floating point and in fixed point."""
