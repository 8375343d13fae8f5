"""Weights of a binary in a coded form, as its own decoder reads them."""
