"""NVIDIA GPUs: kernels, planning, device code, and the C that launches them."""
