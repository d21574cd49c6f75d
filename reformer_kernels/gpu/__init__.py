"""What the Triton kernels of all operations share: tiles, launching, machine code and a cost model."""
