"""Steps of residual streams, in floating point and in fixed point."""
