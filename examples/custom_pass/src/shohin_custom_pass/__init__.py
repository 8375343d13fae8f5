"""A pass for shohin from a package of its own."""
