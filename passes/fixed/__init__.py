"""Fixed point: which operators compute in integers, in which formats."""
