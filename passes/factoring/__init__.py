"""Parts of the pass ``low-rank``: layers as products of smaller ones."""
