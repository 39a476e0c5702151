"""The losses as Triton kernels, for GPUs where the compiled library is absent, AMD's too; ops.py imports what it runs."""
