"""Dropout that shrinks with the layer it feeds (Han et al. 2015, section 3.2)."""

from collections.abc import Iterator, Mapping, Sequence
from math import sqrt

from torch import Tensor, fx

from shohin.ir.program import Program
from shohin.ir.training import dropout_probability, is_dropout
from shohin.passes.analyses.operators import weighted_operation
from shohin.passes.pruning.candidates import Candidate
from shohin.passes.pruning.pools import count_left


def scaled_dropout(
    program: Program, candidates: Sequence[Candidate], masks: Mapping[str, Tensor]
) -> dict[str, float]:
    """The probability that each dropout should have while a pruned network is retrained.

    A pruned layer has less capacity to overfit, so ``D_r = D_o sqrt(C_r / C_o)`` with `C_o` the
    connections of the layers that the dropout feeds, and `C_r` those of them that are left. `D_o`
    is the probability in the graph, which stays what it was: pruning further counts from there.

    Args:
        program: the program.
        candidates: its convolution and linear weights.
        masks: what is left of them, by name; those that are not there are whole.

    Returns:
        By name of dropout node; dropouts that feed no convolution or linear map are left out.
    """
    by_weight = {name: candidate for candidate in candidates for name in candidate.names}
    found = {}
    for node in filter(is_dropout, program.graph.nodes):
        fed = {by_weight[name] for name in _fed(node) if name in by_weight}
        connections = sum(candidate.weight.numel() for candidate in fed)
        if connections:
            left = sum(count_left(candidate, masks) for candidate in fed)
            found[node.name] = dropout_probability(node) * sqrt(left / connections)
    return found


def _fed(node: fx.Node) -> Iterator[str]:
    """Names of the weights of the next convolutions and linear maps behind a node."""
    seen, waiting = {node}, [node]
    while waiting:
        for user in waiting.pop().users:
            operation = weighted_operation(user)
            if operation is not None:
                yield str(operation.weight.target)
            elif user not in seen:
                seen.add(user)
                waiting.append(user)
