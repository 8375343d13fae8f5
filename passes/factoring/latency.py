"""A table of milliseconds: layers as they are and as chains, compiled and measured on a target."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from shohin.errors import ArtifactError
from shohin.ir.annotations import Origin, annotation
from shohin.ir.capture import capture
from shohin.ir.files import atomic_path
from shohin.ir.program import Program
from shohin.passes.analyses.shapes import Shapes
from shohin.passes.base import Profile
from shohin.passes.factoring.factors import Ranks, Step
from shohin.passes.factoring.layers import Layer

_GROUP = 24  # branches compiled together


@dataclass
class LatencyTable:
    """Measures layers of a program in forms of all ranks, each form once.

    Attributes:
        profile: measures a program, by module.
        target: text of the target.
        layouts: shapes of the program's values.
        path: file that keeps what was measured; None for none.
        known: milliseconds by form.
        scale: by layer, what its times count in the network, over what they are alone.
    """

    profile: Profile
    target: str
    layouts: Shapes
    path: Path | None = None
    known: dict[str, float] = field(default_factory=dict)
    scale: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, profile: Profile, target: str, layouts: Shapes, folder: Path | None, resume: bool
    ) -> "LatencyTable":
        """The table of a run, with what an interrupted one has measured.

        Raises:
            ArtifactError: when its file cannot be read.
        """
        key = hashlib.sha256(target.encode()).hexdigest()[:16]
        path = None if folder is None else folder / f"low-rank-latency-{key}.json"
        table = cls(profile, target, layouts, path)
        if path is not None and resume and path.exists():
            table.known = _read(path)
        return table

    def milliseconds(self, layer: Layer, ranks: Ranks) -> float:
        """The time of a layer in a form that `measure` was asked for."""
        return self.known[self._key(layer, ranks)] * self.scale.get(layer.name, 1.0)

    def fit(self, program: Program, layers: Sequence[Layer]) -> float:
        """Bring the times of layers to those that they have in the network.

        Returns:
            Milliseconds of the whole network, by the same clock.
        """
        whole = self.profile(program, self.target)
        self.measure([(layer, Ranks()) for layer in layers])
        for layer in layers:
            origin = annotation(layer.node, Origin)
            name = origin.module if origin and origin.module else layer.node.name
            alone = self.known[self._key(layer, Ranks())]
            if name in whole and alone > 0:
                self.scale[layer.name] = whole[name] / alone
        return sum(whole.values())

    def measure(self, forms: Iterable[tuple[Layer, Ranks]]) -> None:
        """Measure what is not known yet; layers of equal sizes are measured once."""
        missing = {key: form for form in forms if (key := self._key(*form)) not in self.known}
        items = [*missing.items()]
        for start in range(0, len(items), _GROUP):
            self.known |= self._measure(dict(items[start : start + _GROUP]))
            self._write()

    def _measure(self, forms: Mapping[str, tuple[Layer, Ranks]]) -> dict[str, float]:
        shapes = {key: self._input_shape(layer) for key, (layer, _) in forms.items()}
        distinct = [*dict.fromkeys(shapes.values())]
        places = [distinct.index(shapes[key]) for key in forms]
        model = _Branches([branch(layer, ranks) for layer, ranks in forms.values()], places)
        inputs = tuple(torch.zeros(shape) for shape in distinct)
        program = capture(model.eval(), inputs, name="forms", dynamic_batch=False)
        found = self.profile(program, self.target)
        return {key: _sum(found, f"form{index}") for index, key in enumerate(forms)}

    def _input_shape(self, layer: Layer) -> tuple[int, ...]:
        return self.layouts.of(layer.operation.data).shape

    def _key(self, layer: Layer, ranks: Ranks) -> str:
        sizes = [self._input_shape(layer), [*layer.candidate.weight.shape]]
        unfolding = layer.unfolding
        places = [unfolding.stride, unfolding.dilation, unfolding.margins]
        return json.dumps(
            [sizes, places, layer.rectified, ranks.channel, ranks.spatial, ranks.inner]
        )

    def _write(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.path) as temporary:
                temporary.write_text(json.dumps(self.known, indent=1))


class _Branches(nn.Module):
    """Layers beside each other, each with its output."""

    def __init__(self, branches: Sequence[nn.Module], places: Sequence[int]) -> None:
        super().__init__()
        self._places = [*places]
        for index, one in enumerate(branches):
            self.add_module(f"form{index}", one)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = (inputs[place] for place in self._places)
        return tuple(getattr(self, f"form{index}")(data) for index, data in enumerate(given))


def branch(layer: Layer, ranks: Ranks) -> nn.Module:
    """A layer in a form, its weights zero, with the ReLU that follows."""
    steps, last = layer.shape.steps(ranks), [nn.ReLU()] if layer.rectified else []
    if layer.linear:
        return _zeroed(nn.Sequential(*(nn.Linear(s.inputs, s.outputs) for s in steps), *last))
    left, right, top, bottom = layer.unfolding.margins
    pads = [nn.ZeroPad2d((left, right, top, bottom))] if (left, top) != (right, bottom) else []
    padding = (0, 0) if pads else (top, left)
    convolutions = (_convolution(layer, step, padding) for step in steps)
    return _zeroed(nn.Sequential(*pads, *convolutions, *last))


def _convolution(layer: Layer, step: Step, padding: tuple[int, int]) -> nn.Module:
    """A part of a chain; it moves and pads as the layer where it has its taps."""
    takes, unfolding = (step.rows, step.columns), layer.unfolding

    def pick(own: tuple[int, int], other: int) -> tuple[int, int]:
        return (own[0] if takes[0] else other, own[1] if takes[1] else other)

    return nn.Conv2d(
        step.inputs,
        step.outputs,
        step.kernel(layer.shape.kernel),
        pick(unfolding.stride, 1),
        pick(padding, 0),
        pick(unfolding.dilation, 1),
    )


def _zeroed(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _sum(times: Mapping[str, float], name: str) -> float:
    return sum(time for module, time in times.items() if module.split(".")[0] == name)


def _read(path: Path) -> dict[str, float]:
    try:
        return {str(key): float(value) for key, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(str(path), f"cannot be read: {error}", "delete it") from error
