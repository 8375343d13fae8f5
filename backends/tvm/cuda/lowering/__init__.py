"""From operations to launches of CUDA kernels."""
