"""The paper's experiments (arXiv 2001.04451), each as one command: see `python -m bench.paper --help`."""
