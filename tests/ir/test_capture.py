import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shohin
from shohin.errors import CaptureError, ShohinWarning
from shohin.ir import Fact, InputSpec, Origin, annotation, capture, is_in_place, verify

IMAGE = torch.ones(2, 3, 8, 8)


class Call(nn.Module):
    """A module around a function, with a linear layer for the function to use."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class TwoInputs(nn.Module):
    def forward(self, left: Tensor, right: Tensor, unused: Tensor) -> dict[str, Any]:
        return {"sum": left + right, "pair": (left * right, left.shape[0] * right)}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4, bias=False)
        self.decoder = nn.Linear(4, 4, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x).relu_())


def test_outputs_equal_the_model_at_any_batch_size(residual):
    program = capture(residual, IMAGE)
    verify(program)
    residual.eval()
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 8, 8)
        assert torch.equal(program.module(images), residual(images))


def test_describes_inputs_facts_and_name(residual):
    program = capture(residual, IMAGE)
    assert program.inputs == (InputSpec("image", ("N", 3, 8, 8), torch.float32),)
    assert program.facts == {Fact.FUNCTIONAL}
    assert program.name == "residual"
    assert not any(is_in_place(node) for node in program.graph.nodes)


def test_nodes_know_their_source_module(residual):
    program = capture(residual, IMAGE)
    origins = {node.name: annotation(node, Origin) for node in program.graph.nodes}
    assert origins["conv2d_1"] == Origin("conv2", "Conv2d")
    assert origins["add"] == Origin("", "Residual")


def test_an_example_batch_of_one_is_symbolic_too(residual):
    program = capture(residual, IMAGE[:1])
    assert program.inputs[0].shape == ("N", 3, 8, 8)


def test_a_fixed_batch_on_request(residual):
    program = capture(residual, IMAGE, dynamic_batch=False)
    assert program.inputs[0].shape == (2, 3, 8, 8)


def test_the_model_is_left_as_it_was(residual):
    residual.train()
    residual.bn1.eval()
    before = {name: value.clone() for name, value in residual.state_dict().items()}
    program = capture(residual, IMAGE)
    with torch.no_grad():
        for weight in program.module.parameters():
            weight.add_(1)
    assert residual.training
    assert not residual.bn1.training
    assert all(torch.equal(value, before[name]) for name, value in residual.state_dict().items())


def test_weights_keep_their_names_and_unused_ones_go(residual):
    names = {name for name, _ in capture(residual, IMAGE).module.named_parameters()}
    assert names == {name for name, _ in residual.named_parameters()}
    buffers = {name for name, _ in capture(residual, IMAGE).module.named_buffers()}
    assert buffers == {f"bn{i}.running_{kind}" for i in (1, 2) for kind in ("mean", "var")}


def test_several_inputs_and_outputs_are_flat():
    model, inputs = TwoInputs(), (torch.randn(3, 4), torch.randn(3, 4), torch.randn(3))
    program = capture(model, inputs)
    assert [spec.name for spec in program.inputs] == ["left", "right", "unused"]
    assert program.outputs == ("sum", "pair_0", "pair_1")
    assert shohin.compile(program, "reference").info.outputs[1].name == "pair_0"
    fed = (torch.randn(5, 4), torch.randn(5, 4), torch.randn(5))
    total, product, scaled = program.module(*fed)
    expected = model(*fed)
    assert torch.equal(total, expected["sum"])
    assert torch.equal(product, expected["pair"][0])
    assert torch.equal(scaled, expected["pair"][1])


def test_only_inputs_of_the_first_ones_size_share_the_batch():
    inputs = (torch.randn(3, 4), torch.randn(1, 4), torch.randn(3))
    program = capture(TwoInputs(), inputs)
    assert [spec.shape for spec in program.inputs] == [("N", 4), (1, 4), ("N",)]


def test_variable_arguments():
    class Sum(nn.Module):
        def forward(self, first: Tensor, *rest: Tensor) -> Tensor:
            return first + sum(rest)

    program = capture(Sum(), (torch.ones(2, 3),) * 3)
    assert torch.equal(program.module(*(torch.ones(4, 3),) * 3), torch.full((4, 3), 3.0))


def test_a_tied_weight_is_one_parameter():
    model = Tied()
    program = capture(model, torch.randn(2, 4))
    assert [name for name, _ in program.module.named_parameters()] == ["encoder.weight"]
    x = torch.randn(3, 4)
    assert torch.equal(program.module(x), model(x))


def test_gradients_reach_the_weights(residual):
    program = capture(residual, IMAGE)
    program.module(IMAGE).sum().backward()
    assert all(weight.grad is not None for weight in program.module.parameters())


def test_a_model_that_fixes_its_batch_is_captured_with_a_warning():
    model = Call(lambda self, x: self.fc(x.reshape(2, 2, 4)))
    with pytest.warns(ShohinWarning, match=r"fixed batch size of 4: .*constant \(4\)"):
        program = capture(model, torch.randn(4, 4))
    assert program.inputs[0].shape == (4, 4)


def test_weights_that_are_not_finite_are_reported(residual):
    residual.fc.weight.data[0, 0] = float("nan")
    with pytest.warns(ShohinWarning, match=r"NaN or infinite are kept as they are: fc\.weight$"):
        capture(residual, IMAGE)


class Masked(nn.Module):
    def forward(self, x: Tensor, *, mask: Tensor, scale: Tensor | None = None) -> Tensor:
        return x * mask if scale is None else x * mask * scale


def test_inputs_given_by_name():
    named = {"scale": torch.full((1,), 3.0), "mask": torch.ones(1, 4)}
    program = capture(Masked(), (torch.ones(1, 4),), kwargs={"mask": named["mask"]})
    assert [spec.describe() for spec in program.inputs] == ["float32[N,4]"] * 2
    assert [spec.name for spec in program.inputs] == ["x", "mask"]
    x, mask = torch.randn(5, 4), torch.randn(5, 4)
    assert torch.equal(program.module(x, mask), x * mask)
    program = capture(Masked(), torch.ones(2, 4), kwargs=named, dynamic_batch=False)
    assert [spec.name for spec in program.inputs] == ["x", "mask", "scale"]
    program = capture(Masked(), kwargs={**named, "x": torch.ones(2, 4)})
    assert [spec.name for spec in program.inputs] == ["x", "mask", "scale"]


def test_variable_arguments_by_name():
    class Scaled(nn.Module):
        def forward(self, x: Tensor, **others: Tensor) -> Tensor:
            return x * others["mask"]

    with pytest.warns(ShohinWarning, match="captured with a fixed batch size of 2"):
        program = capture(Scaled(), torch.ones(2, 4), kwargs={"mask": torch.ones(2, 4)})
    assert [spec.name for spec in program.inputs] == ["x", "mask"]


@pytest.mark.parametrize(
    ("named", "text"),
    [
        ({"mask": 3}, "example input 'mask': expected a tensor, got int"),
        ({"msk": IMAGE}, "missing a required"),
    ],
)
def test_named_inputs_that_do_not_fit(named, text):
    with pytest.raises(CaptureError, match=text):
        capture(Masked(), IMAGE, kwargs=named)


def test_inputs_are_not_written_to():
    text = "^writes to its input 'x'; the compiled model leaves it as it is$"
    with pytest.warns(ShohinWarning, match=text):
        program = capture(Call(lambda self, x: x.add_(1) * 2), torch.ones(2, 4))
    x = torch.ones(2, 4)
    assert torch.equal(program.module(x), torch.full((2, 4), 4.0))
    assert torch.equal(x, torch.ones(2, 4))


def test_an_exported_program_and_its_file(residual, tmp_path: Path):
    dim = torch.export.Dim("items", min=1)
    exported = torch.export.export(residual.eval(), (IMAGE,), dynamic_shapes=({0: dim},))
    torch.export.save(exported, tmp_path / "net.pt2")
    image = torch.randn(5, 3, 8, 8)
    for source, name in ((exported, "model"), (tmp_path / "net.pt2", "net")):
        program = capture(source)
        assert (program.name, program.inputs[0].shape) == (name, ("N", 3, 8, 8))
        assert torch.equal(program.module(image), residual(image))


def test_files_that_are_no_exported_program(tmp_path: Path, residual):
    exported = torch.export.export(residual.eval(), (IMAGE,))
    torch.export.save(exported, tmp_path / "cut.pt2")
    (tmp_path / "cut.pt2").write_bytes((tmp_path / "cut.pt2").read_bytes()[:3000])
    (tmp_path / "text.pt2").write_text("no model")
    for name in ("cut.pt2", "text.pt2"):
        with pytest.raises(CaptureError, match=r"truncated or foreign; write it again"):
            capture(tmp_path / name)
    with pytest.raises(CaptureError, match=r"there is no such file; give the path"):
        capture(tmp_path / "none.pt2")


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (None, "example inputs are missing; call capture(model, (tensor, ...))"),
        ((), "expected a tensor or a tuple of at least one tensor, got an empty tuple"),
        ({"x": 1}, "expected a tensor or a tuple of at least one tensor, got dict"),
        (([1.0],), "example input 0: expected a tensor, got list"),
        ((IMAGE, IMAGE), "2 example inputs do not fit forward(image: torch.Tensor)"),
    ],
)
def test_inputs_that_do_not_fit(residual, inputs, text):
    with pytest.raises(CaptureError) as error:
        capture(residual, inputs)
    assert text in str(error.value)


def test_something_that_is_no_model():
    with pytest.raises(CaptureError, match="expected an nn"):
        capture(3)


def _branch(self: Call, x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x
    return -x


def test_control_flow_on_data_names_the_line(capfd):
    with pytest.raises(CaptureError) as error:
        capture(Call(_branch), torch.ones(2, 4))
    text = str(error.value)
    assert "in _branch: if x.sum() > 0:" in text
    assert "torch.where or torch.cond" in text
    assert len(text.splitlines()) <= 6
    assert capfd.readouterr().err == ""


def test_wrong_shapes_name_the_line():
    with pytest.raises(CaptureError) as error:
        capture(Call(lambda self, x: self.fc(x[:, :2])), torch.ones(2, 4))
    assert "self.fc(x[:, :2])" in str(error.value)
    assert str(error.value).endswith("check the shapes of the example inputs")


def test_outputs_must_be_tensors():
    with pytest.raises(CaptureError, match="output 1: expected a tensor, got int"):
        capture(Call(lambda self, x: (x, 3)), torch.ones(2, 4))


def test_a_symbolic_size_beyond_the_batch_is_refused(residual):
    sizes = {2: torch.export.Dim("height", min=4), 3: torch.export.Dim("width", min=4)}
    exported = torch.export.export(residual.eval(), (IMAGE,), dynamic_shapes=(sizes,))
    with pytest.raises(CaptureError, match=r"input 'image': .* symbolic size on axis 2"):
        capture(exported)


def test_a_model_with_state_is_refused():
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x + self.calls

    with pytest.raises(CaptureError, match=r"add_.* writes to the weight 'calls'"):
        capture(Counter(), torch.ones(2, 4))


def test_a_program_exported_for_training_is_refused(residual):
    exported = torch.export.export(residual.train(), (IMAGE,))
    with pytest.raises(CaptureError, match=r"'bn1\.num_batches_tracked'.*in inference mode"):
        capture(exported)


def test_blocks_without_gradients_are_inlined():
    def function(self: Call, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.fc(x)
            with torch.enable_grad():
                y = y.relu_()
        return y + x

    model, x = Call(function), torch.randn(2, 4)
    for program in (capture(model, x), capture(torch.export.export(model, (x,)))):
        verify(program)
        targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
        assert targets == ["aten.linear.default", "aten.relu.default", "aten.add.Tensor"]
        assert torch.equal(program.module(x), model(x))


def test_an_operator_that_is_not_known_is_kept():
    class Choose(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y * 2, (x,))

    program = capture(Choose(), torch.ones(2, 4))
    verify(program)
    assert torch.equal(program.module(-torch.ones(3, 4)), -2 * torch.ones(3, 4))


def test_attention_stays_in_plain_operators():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShohinWarning)
        program = capture(layer, torch.randn(2, 5, 8))
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("_transformer_encoder_layer_fwd" in target for target in targets)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(program.module(x), layer.eval()(x), rtol=1e-5, atol=1e-6)
