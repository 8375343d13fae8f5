import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shohin.ir.capture import capture
from shohin.ir.program import is_tensor_name
from shohin.passes.drop_identity import DropIdentity
from shohin.passes.eliminate_dead import EliminateDead
from shohin.passes.fold_bn import FoldBatchNorm
from shohin.passes.fold_constants import FoldConstants
from shohin.passes.prune import Prune

aten = torch.ops.aten


class TwoHeads(nn.Module):
    """Two linear maps of which only one is used, and an unused second input."""

    def __init__(self):
        super().__init__()
        self.fc, self.aux = nn.Linear(6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor, unused: Tensor) -> Tensor:
        self.aux(x).relu()
        return self.fc(x)


def two_heads():
    return capture(TwoHeads(), (torch.ones(2, 6), torch.ones(2, 1)), name="heads")


def test_golden(apply, golden):
    program = two_heads()
    golden("eliminate_dead", program, apply(EliminateDead(), program).program)


def test_chains_go_with_their_weights_and_inputs_stay(apply):
    program = two_heads()
    after = apply(EliminateDead(), program)
    assert after.modified
    targets = [node.target for node in after.program.graph.nodes if node.op == "call_function"]
    assert targets == [aten.linear.default]
    held = {name for name, _ in after.program.module.named_parameters()}
    assert held == {"fc.weight", "fc.bias"}
    assert len(after.program.graph.find_nodes(op="placeholder")) == 2
    x, other = torch.randn(3, 6), torch.ones(3, 1)
    assert torch.equal(program.module(x, other), after.program.module(x, other))


def test_encodings_of_freed_weights_go(apply):
    pruned = apply(Prune(density=0.5), two_heads()).program
    assert set(pruned.encodings) == {"fc.weight", "aux.weight"}
    assert set(apply(EliminateDead(), pruned).program.encodings) == {"fc.weight"}


def test_unused_parameters_are_freed_without_dead_nodes(apply):
    program = capture(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval(), torch.ones(2, 3))
    folded = apply(FoldBatchNorm(), program).program
    assert is_tensor_name(folded.module, "1.running_mean")
    after = apply(EliminateDead(), folded)
    assert after.modified
    assert not is_tensor_name(after.program.module, "1.running_mean")
    assert is_tensor_name(after.program.module, "0.weight")
    assert after.reason("1.running_mean") == "freed"
    assert sum(remark.before.stored_bytes for remark in after.remarks) == 4 * 3 * 4
    kept = apply(EliminateDead(), folded, allows=lambda site: site != "1.bias").program
    assert is_tensor_name(kept.module, "1.bias")


def test_operators_with_an_effect_stay(apply):
    program = two_heads()
    first = program.graph.find_nodes(op="placeholder")[0]
    linear = program.graph.find_nodes(op="call_function", target=aten.linear.default)[0]
    with program.graph.inserting_before(linear):
        program.graph.create_node("call_function", aten.bernoulli.default, (first,), name="draw")
        program.graph.create_node(
            "call_function", aten.dropout.default, (first, 0.5, False), name="still"
        )
    after = apply(EliminateDead(), program)
    names = {node.name for node in after.program.graph.nodes}
    assert after.reason("draw") == "not-applicable"
    assert "draw" in names
    assert "still" not in names


def test_sites_that_are_not_allowed_stay(apply):
    after = apply(EliminateDead(), two_heads(), allows=lambda site: site != "relu")
    assert after.reason("relu") == "excluded-by-option"
    assert not after.modified


def test_a_model_without_dead_parts_is_left_alone(apply):
    program = capture(nn.Linear(3, 3), torch.ones(2, 3))
    assert not apply(EliminateDead(), program).modified


def test_twice_is_once(apply):
    once = apply(EliminateDead(), two_heads()).program
    assert not apply(EliminateDead(), once).modified


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_random_networks_stay_bit_equal(apply, random_network, seed):
    program = capture(random_network(seed), (torch.ones(2, 4, 6, 6),))
    for chosen in (DropIdentity(), FoldBatchNorm(), FoldConstants()):
        program = apply(chosen, program).program
    after = apply(EliminateDead(), program).program
    read = {str(node.target) for node in after.graph.find_nodes(op="get_attr")}
    held = {*dict(after.module.named_parameters()), *dict(after.module.named_buffers())}
    x = torch.randn(3, 4, 6, 6)
    with torch.no_grad():
        assert torch.equal(program.module(x), after.module(x))
    assert held == read
    owners = {name.rpartition(".")[0] for name in held}
    for path, _ in after.module.named_modules():
        assert any(owner == path or owner.startswith(f"{path}.") or not path for owner in owners)
