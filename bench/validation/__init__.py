"""The steps of `bench/validate_gpu.py`. Each yields rows, which are plain dictionaries, as it gets them."""
