import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shohin.passes.pruning import selection
from shohin.passes.pruning.selection import (
    Scores,
    count_to_keep,
    keep_largest,
    keep_largest_of_each,
)


def scores_of(values, size=3):
    wide = values.dtype == torch.float64
    return Scores(values.numel(), lambda: iter(values.split(size)), wide)


def expected(values, count):
    """The first of the largest, by a stable sort; negative ones never."""
    order = torch.argsort(values, descending=True, stable=True)[:count]
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[order] = True
    return mask & (values >= 0)


values_with_ties = st.lists(
    st.one_of(
        st.sampled_from([0.0, -1.0, 1.0, 1e-42, 2.0**127]),
        st.floats(0, 2.0**100, width=32),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(values=values_with_ties, count=st.integers(0, 45), wide=st.booleans())
def test_exactly_the_largest_are_kept(values, count, wide):
    tensor = torch.tensor(values, dtype=torch.float64 if wide else torch.float32)
    (found,) = keep_largest([scores_of(tensor)], count)
    assert torch.equal(found, expected(tensor, count))


@settings(max_examples=60, deadline=None)
@given(values=values_with_ties, cut=st.integers(0, 40), count=st.integers(0, 45))
def test_a_pool_is_like_one_weight(values, cut, count):
    tensor = torch.tensor(values)
    parts = tensor.split([min(cut, len(values)), max(0, len(values) - cut)])
    found = keep_largest([scores_of(part) for part in parts if part.numel()], count)
    assert torch.equal(torch.cat(found), expected(tensor, count))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), members=st.integers(1, 5), count=st.integers(0, 30))
def test_of_each_member_the_largest_is_kept(seed, members, count):
    torch.manual_seed(seed)
    parts = [torch.rand(4 + i) * 10.0 ** (2 * i) for i in range(members)]
    found = keep_largest_of_each([scores_of(part) for part in parts], count)
    total = sum(part.numel() for part in parts)
    assert sum(int(mask.sum()) for mask in found) == min(total, max(count, members))
    rest, dropped = [], []
    for part, mask in zip(parts, found, strict=True):
        assert mask[part.argmax()]
        others = torch.arange(part.numel()) != part.argmax()
        rest += part[mask & others].tolist()
        dropped += part[~mask].tolist()
    assert min(rest, default=1e30) >= max(dropped, default=0.0)


def test_a_member_of_which_nothing_is_left_is_passed_over():
    found = keep_largest_of_each([scores_of(-torch.ones(3)), scores_of(torch.rand(5))], 2)
    assert [int(mask.sum()) for mask in found] == [0, 2]


@pytest.mark.parametrize(
    ("density", "count", "kept"), [(0.1, 4, 1), (0.5, 4, 2), (0.3, 10, 3), (0.0, 3, 1), (1, 0, 0)]
)
def test_at_least_one_is_kept(density, count, kept):
    assert count_to_keep(density, count) == kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    tensor = torch.rand(500).to(dtype)
    (found,) = keep_largest([scores_of(tensor, 64)], 100)
    assert torch.equal(found, expected(tensor, 100))


def test_weights_of_different_precision_compete():
    narrow, wide = torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.3 + 1e-12], dtype=torch.float64)
    found = keep_largest([scores_of(narrow), scores_of(wide)], 2)
    # float32 holds 0.3 as a little more than float64 holds the other.
    assert [part.tolist() for part in found] == [[False, True], [False, True]]


def test_no_copy_of_all_scores_is_made(monkeypatch):
    seen = []
    original = selection._keys

    def keys(scores, wide):
        for piece in original(scores, wide):
            seen.append(piece.numel())
            yield piece

    monkeypatch.setattr(selection, "_keys", keys)
    keep_largest([scores_of(torch.rand(1000), 100)], 10)
    assert set(seen) == {100}
