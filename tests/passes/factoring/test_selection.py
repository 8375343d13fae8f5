import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shohin.passes.factoring.factors import Ranks
from shohin.passes.factoring.selection import Choice, lower_hull, select, select_evenly


def layer(energies, cost, each):
    """The layer as it was, and ranks whose cost is proportional, losses those of the energies."""
    total, options = sum(energies), [Choice(Ranks(), cost, 0.0)]
    for rank in range(1, len(energies)):
        if rank * each < cost:
            loss = -math.log(sum(energies[:rank]) / total)
            options.append(Choice(Ranks(rank), rank * each, loss))
    return options


def spent(found):
    return sum(choice.cost for choice in found.values())


def lost(found):
    return sum(choice.loss for choice in found.values())


def best_of_all(choices, budget):
    every = itertools.product(*choices.values())
    return min(lost(dict(enumerate(one))) for one in every if sum(c.cost for c in one) <= budget)


LAYERS = {
    "a": layer([50, 20, 10, 8, 5, 4, 2, 1], 90.0, 10.0),
    "b": layer([30, 25, 20, 10, 8, 5, 1, 1], 50.0, 6.0),
    "c": layer([90, 5, 2, 1, 1, 0.5, 0.3, 0.2], 200.0, 30.0),
}


@pytest.mark.parametrize("budget", [340, 300, 200, 150, 100, 80])
def test_the_budget_is_kept_at_nearly_the_least_loss(budget):
    found = select(LAYERS, budget)
    assert found is not None
    assert spent(found) <= budget
    # A greedy choice is at most one step of one layer worse than the best there is.
    step = max(
        after.loss - before.loss
        for options in LAYERS.values()
        for before, after in itertools.pairwise(lower_hull(options))
    )
    assert lost(found) <= best_of_all(LAYERS, budget) + step


def test_with_room_for_all_nothing_is_split():
    found = select(LAYERS, 1000)
    assert found is not None
    assert not any(choice.ranks.split for choice in found.values())


@pytest.mark.parametrize("choose", [select, select_evenly])
def test_what_cannot_be_met_is_none(choose):
    assert choose(LAYERS, 20) is None


def test_the_order_of_the_steps_is_that_of_the_paper():
    """Between two chains the eigenvalue that loses least of the energy for its cost goes first."""
    energies = {"a": [40, 30, 20, 10], "b": [60, 25, 10, 5]}
    choices = {
        "a": [Choice(Ranks(4), 40.0, 0.0), *layer(energies["a"], 1e9, 10.0)[:0:-1]],
        "b": [Choice(Ranks(4), 80.0, 0.0), *layer(energies["b"], 1e9, 20.0)[:0:-1]],
    }
    kept = {"a": 4, "b": 4}
    each = {"a": 10.0, "b": 20.0}
    for _ in range(5):

        def price(name):
            parts = energies[name][: kept[name]]
            return math.log(sum(parts) / sum(parts[:-1])) / each[name]

        name = min((n for n in kept if kept[n] > 1), key=price)
        kept[name] -= 1
        budget = sum(each[n] * kept[n] for n in kept)
        found = select(choices, budget)
        assert {n: choice.ranks.channel for n, choice in found.items()} == kept


def test_even_shares_are_about_even():
    found = select_evenly(LAYERS, 170)
    assert spent(found) <= 170
    shares = [found[name].cost / options[0].cost for name, options in LAYERS.items()]
    # No more than one rank of the coarsest layer, a sixth of it, apart.
    assert max(shares) - min(shares) <= 2 / 6


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.floats(0.01, 100), min_size=2, max_size=7), st.floats(0.5, 20)),
        min_size=1,
        max_size=3,
    ),
    st.floats(0.05, 1.2),
)
def test_never_above_the_budget_and_none_only_where_nothing_fits(sizes, share):
    choices = {}
    for index, (energies, each) in enumerate(sizes):
        ordered = sorted(energies, reverse=True)
        choices[str(index)] = layer(ordered, each * len(ordered), each)
    budget = share * sum(options[0].cost for options in choices.values())
    least = sum(min(one.cost for one in options) for options in choices.values())
    for choose in (select, select_evenly):
        found = choose(choices, budget)
        assert (found is None) == (least > budget)
        if found is not None:
            assert spent(found) <= budget * (1 + 1e-9)


def test_hulls_bend_one_way():
    options = layer([20, 1, 15, 1, 1, 30], 100.0, 12.0)
    hull = lower_hull(options)
    slopes = [(b.loss - a.loss) / (a.cost - b.cost) for a, b in itertools.pairwise(hull)]
    assert hull[0] is options[0]
    assert slopes == sorted(slopes)
