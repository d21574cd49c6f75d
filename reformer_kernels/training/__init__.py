"""Training of a small byte-level language model: what `reformer-kernels train` runs."""
