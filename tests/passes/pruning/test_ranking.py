"""What the pass asks of the optimal brain surgeon."""

import pytest
import torch
from torch import Tensor, nn

from shohin.ir.capture import capture
from shohin.ir.program import Program, tensor_of, weight_names
from shohin.passes.base import Context
from shohin.passes.manager import PassManager
from shohin.passes.prune import Prune
from shohin.passes.pruning.obs import prune_layers

_NAMES = ("0.weight", "2.weight", "4.weight", "6.weight")


def _program() -> tuple[Program, Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(12, 16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )
    data = torch.randn(80, 12)
    return capture(module, (data[:2],)), data


@pytest.mark.parametrize("own", [("0.weight",), ("6.weight",), ("2.weight", "6.weight"), ()])
def test_weights_with_densities_of_their_own_are_corrected_with_the_others(
    own: tuple[str, ...],
) -> None:
    program, data = _program()
    batches = [(data,)]
    chosen = Prune(method="obs", scope="global", density=0.4, densities=dict.fromkeys(own, 0.5))
    context = Context(calibration=batches)
    found = PassManager([chosen]).run(program, context)
    masks = {name: found.encodings[name].mask for name in _NAMES}
    pooled = [name for name in _NAMES if name not in own]
    assert all(masks[name].double().mean() == 0.5 for name in own)
    kept = sum(int(masks[name].sum()) for name in pooled)
    assert kept == round(0.4 * sum(masks[name].numel() for name in pooled))
    # All corrections are for the responses of the original network: one call does the same.
    expected = program.copy()
    densities = {name: float(masks[name].double().mean()) for name in _NAMES}
    prune_layers(expected, densities, batches, seed=context.seed)
    for name in weight_names(program):
        assert torch.equal(tensor_of(found.module, name), tensor_of(expected.module, name)), name
