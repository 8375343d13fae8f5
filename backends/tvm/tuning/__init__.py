"""Choosing tile shapes: by a cost model, or by measuring a few on this machine."""
