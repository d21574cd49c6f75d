"""One folder an operation, each with a readable reference beside its fast kernels."""
