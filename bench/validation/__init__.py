"""The steps of `bench/validate_gpu.py`: each yields rows, plain dictionaries, as it gets them."""
