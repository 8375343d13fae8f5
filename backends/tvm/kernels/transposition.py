"""Sixteen vectors of sixteen, turned over in registers."""

from tvm import tirx

from shohin.backends.tvm.kernels.emit import LANES, Expr, held


def transposed(vectors: list[Expr], dtype: str = "float32") -> list[Expr]:
    """Sixteen vectors as the columns of what they are the rows of: four stages of exchanges."""
    result = [held(vector, LANES, dtype) for vector in vectors]
    for step in (8, 4, 2, 1):
        for first in (index for index in range(LANES) if not index & step):
            pair = [result[first], result[first + step]]
            low = [lane if not lane & step else lane - step + LANES for lane in range(LANES)]
            high = [lane + step if not lane & step else lane + LANES for lane in range(LANES)]
            result[first] = held(tirx.Shuffle(pair, low), LANES, dtype)
            result[first + step] = held(tirx.Shuffle(pair, high), LANES, dtype)
    return result
