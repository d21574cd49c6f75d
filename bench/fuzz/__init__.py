"""The fuzzer: `python -m bench.fuzz --help`."""
