"""What symbols need at least."""

import numpy as np
from numpy.typing import NDArray


def entropy_bits(counts: NDArray[np.integer]) -> float:
    """Bits that symbols of given frequencies need at least, all together."""
    used = counts[counts > 0].astype(np.float64)
    total = float(used.sum())
    return float(-(used * np.log2(used / total)).sum()) if total else 0.0
