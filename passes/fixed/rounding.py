"""Weights and biases of fixed-point layers: rounded when their layer is reached."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shohin.ir.encodings import Encoding
from shohin.ir.fixed_point import FRACTIONS, quantize
from shohin.ir.program import encoding_of, tensor_of, tied_names
from shohin.ir.ternary import Ternary
from shohin.passes.fixed.forms import Average, Weighted
from shohin.passes.fixed.fractions import channel_fractions, fitting_fraction, weight_fraction
from shohin.passes.fixed.graph import FixedGraph, Site
from shohin.passes.fixed.ratios import Ratio
from shohin.passes.fixed.stored import encoded, rounded_weight
from shohin.passes.fixed.sums import format_of
from shohin.passes.patterns import argument, weight_name

BIAS_BITS = 52
"""Most bits of a bias: sums that it makes too large for 32 bits have 64."""

_FITTING_BIAS_BITS = 30
"""Bits of a bias for which a weight's radix is chosen: beside a bias that needs more, weights count
for next to nothing, and sums should have 32 bits."""


@dataclass(frozen=True)
class WeightFormat:
    """How the integers of a weight are read.

    Attributes:
        bits: their width.
        fractions: fractional lengths, one for all or one for each output.
        wanted: the width that was asked for.
    """

    bits: int
    fractions: tuple[int, ...]
    wanted: int


@dataclass(eq=False)
class Rounder:
    """Rounds the weights of one layer after the other, in place.

    Attributes:
        graph: the fixed-point network.
        bits: width of the integers of a weight, by its name.
        by_channel: whether each output has a fractional length of its own.
        common: one fractional length for all weights of so many bits, by width; empty for one each.
        by_ratio: whether the values of ternary weights become small integers times factors.
    """

    graph: FixedGraph
    bits: Callable[[str], int]
    by_channel: bool
    common: Mapping[int, int]
    by_ratio: bool = False
    formats: dict[str, WeightFormat] = field(default_factory=dict)
    limits: dict[str, list[int]] = field(default_factory=dict)
    readers: dict[str, Site] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    encodings: dict[str, Encoding] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)

    def prepare(self, site: Site) -> None:
        """Round the weight and bias of a site's layer; say what windows are divided by.

        The format of what the layer reads has to be there.
        """
        if isinstance(site.form, Average):
            data = format_of(argument(site.node, "input"))
            multiplier, shift = site.form.scale(data.bits)
            self._set(site, "multiplier", multiplier)
            self._set(site, "shift", shift)
        if isinstance(site.form, Weighted):
            self._round_weight(site)
            self._round_bias(site, 0.0)

    def correct(self, site: Site, lack: Tensor) -> None:
        """Add to the bias of a layer, and round it again.

        Args:
            site: of a convolution or linear map with a bias.
            lack: `[outputs]`, what its results lack on the mean.
        """
        self._round_bias(site, lack)

    def has_ratio(self, site: Site) -> bool:
        """Whether the values of the weight of a site's layer have become small integers."""
        name = weight_name(argument(site.node, "weight"))
        return name is not None and self._names(name)[0] in self.ratios

    def round_again(self, name: str, bits: int, free: Tensor) -> None:
        """Round a weight to another width, and the biases of its layers to the radix that it gives.

        Args:
            name: of the weight, the first one that it has.
            bits: width of the integers.
            free: the weight before it was rounded.
        """
        program = self.graph.program
        with torch.no_grad():
            tensor_of(program.module, name).copy_(free)
        self.formats[name] = self._choose(name, bits, self.limits[name])
        for site in self.graph.sites:
            if isinstance(site.form, Weighted):
                used = weight_name(argument(site.node, "weight"))
                if used in self._names(name):
                    self._round_weight(site)
                    self._round_bias(site, 0.0)
        program.module.recompile()

    def _round_weight(self, site: Site) -> None:
        name = weight_name(argument(site.node, "weight"))
        if name is None:
            raise AssertionError("weights of fixed-point operators are constants")
        first = self._names(name)[0]
        if first not in self.formats:
            self.limits[first] = self._most(site)
            self.readers[first] = site
            self.formats[first] = self._choose(first, self.bits(first), self.limits[first])
        found = self.formats[first]
        self._set(site, "weight_fractions", [*found.fractions])
        self._set(site, "input_fraction", format_of(argument(site.node, "input")).fraction)

    def _most(self, site: Site) -> list[int]:
        """The largest fractional length of each output's weights for which its bias fits."""
        weight, name = argument(site.node, "weight"), weight_name(argument(site.node, "bias"))
        outputs = len(tensor_of(self.graph.program.module, str(weight_name(weight))))
        if name is None:
            return [FRACTIONS[-1]] * outputs
        data = format_of(argument(site.node, "input")).fraction
        biases = tensor_of(self.graph.program.module, name).detach().double().abs()
        return [
            fitting_fraction(one, _FITTING_BIAS_BITS) - data if one else FRACTIONS[-1]
            for one in biases.tolist()
        ]

    def _choose(self, name: str, wanted: int, most: Sequence[int]) -> WeightFormat:
        program = self.graph.program
        weight, stored = tensor_of(program.module, name), encoding_of(program, name)
        bits = wanted
        if (ratio := self._ratio(name, stored)) is not None:
            data = format_of(argument(self.readers[name].node, "input"))
            bits, self.ratios[name] = ratio.bits(wanted, data.bits), ratio
        for by_channel in dict.fromkeys((self.by_channel, False)):
            fractions = self._fractions(weight, bits, by_channel, most)
            encoding = (
                encoded(stored, rounded_weight(weight, bits, fractions), bits, fractions)
                if ratio is None
                else ratio.rounded(bits, fractions)
            )
            if encoding is not None:
                break
        else:
            raise AssertionError("weights in other encodings are left out before")
        with torch.no_grad():
            weight.copy_(encoding.materialise())
        self.encodings |= dict.fromkeys(self._names(name), encoding)
        return WeightFormat(bits, fractions, wanted)

    def _ratio(self, name: str, stored: Encoding) -> Ratio | None:
        """What a weight is made of, if that is wanted and a bias can make up for the change."""
        biased = weight_name(argument(self.readers[name].node, "bias")) is not None
        usable = self.by_ratio and biased
        return Ratio.of(stored) if usable and isinstance(stored, Ternary) else None

    def _fractions(
        self, weight: Tensor, bits: int, by_channel: bool, most: Sequence[int]
    ) -> tuple[int, ...]:
        if self.common:
            return (self.common[bits],)
        if by_channel:
            return channel_fractions(weight, bits, most)
        return (weight_fraction(weight, bits, min(most, default=FRACTIONS[-1])),)

    def _round_bias(self, site: Site, lack: Tensor | float) -> None:
        name = weight_name(argument(site.node, "bias"))
        if name is None:
            return
        program = self.graph.program
        tensor = tensor_of(program.module, name)
        self.biases[name] = self.biases.get(name, tensor.detach().double()) + lack
        exact = self.biases[name]
        fractions = argument(site.node, "weight_fractions")
        radix = torch.tensor(fractions).double() + argument(site.node, "input_fraction")
        scaled = exact * 2.0**radix
        rounded = (quantize(scaled, BIAS_BITS, 0) * 2.0**-radix).to(tensor.dtype)
        with torch.no_grad():
            tensor.copy_(rounded)

    @staticmethod
    def _set(site: Site, name: str, value: Any) -> None:
        schema = site.node.target._schema  # type: ignore[union-attr]
        place = next(i for i, one in enumerate(schema.arguments) if one.name == name)
        site.node.update_arg(place, value)

    def _names(self, name: str) -> list[str]:
        """All names of a weight, the first one first."""
        return next(tied for tied in tied_names(self.graph.program) if name in tied)
