"""Kernel templates for NVIDIA GPUs, all on plain (row-major) arrays."""
