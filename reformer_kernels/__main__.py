"""`python -m reformer_kernels`: the command line without the installed script."""

from reformer_kernels.cli import main

if __name__ == "__main__":
    main()
