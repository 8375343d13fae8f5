"""How much an error of each weight matters."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, fx

from shohin.errors import InputError
from shohin.ir.program import Program
from shohin.passes.base import Context
from shohin.passes.pruning.candidates import Candidate
from shohin.passes.pruning.obd import diagonal_hessian, unsupported_weights
from shohin.passes.pruning.unfolding import can_unfold, unfolding_of

Importance: TypeAlias = Literal["none", "hessian", "activations"]


def importance_of(
    program: Program, candidates: Sequence[Candidate], kind: Importance, context: Context
) -> dict[str, Tensor]:
    """Importances by weight name, of the weights' shapes; none at all for ``none``.

    ``hessian`` is the diagonal of the loss' Hessian (LeCun et al. 1989), ``activations`` the mean
    square of the input that each weight multiplies, which is that of its layer's squared error.
    Weights for which there is no rule have none; notes say so.

    Raises:
        InputError: when there are no calibration batches.
    """
    if kind == "hessian":
        return _second_derivatives(program, [one.name for one in candidates], context)
    if kind == "activations":
        return _mean_squares(program, candidates, context)
    return {}


def _second_derivatives(
    program: Program, names: Sequence[str], context: Context
) -> dict[str, Tensor]:
    unsupported = unsupported_weights(program, names, context.calibration)
    for name, error in unsupported.items():
        _note(context, name, str(error))
    known = [name for name in names if name not in unsupported]
    return diagonal_hessian(program, known, context.calibration, context.progress) if known else {}


def _mean_squares(
    program: Program, candidates: Sequence[Candidate], context: Context
) -> dict[str, Tensor]:
    known = []
    for one in candidates:
        strange = next((op.node for op in one.operations if not can_unfold(op)), None)
        if strange is None:
            known.append(one)
        else:
            detail = f"it is read by {strange.target}, expected conv2d or linear"
            _note(context, one.name, detail)
    if not known:
        return {}
    recorder = _Recorder(program.module, known)
    for batch in context.calibration:
        with torch.inference_mode():
            recorder.run(*batch)
    if not recorder.columns:
        raise InputError("calibration", "expected at least one batch, got none")
    return {one.name: recorder.spread(one) for one in known}


def _note(context: Context, name: str, problem: str) -> None:
    context.noted("importance", f"all errors of {name} count alike: {problem}")


class _Recorder(fx.Interpreter):
    """Runs a module and sums the squares of the inputs of its convolutions and linear maps."""

    def __init__(self, module: fx.GraphModule, candidates: Sequence[Candidate]) -> None:
        super().__init__(module)
        self.sums: dict[str, Tensor] = {}
        self.columns: dict[str, int] = {}
        self._wanted = {
            operation.node: (candidate, operation)
            for candidate in candidates
            for operation in candidate.operations
        }

    def run_node(self, n: fx.Node) -> object:
        if n in self._wanted:
            candidate, operation = self._wanted[n]
            unfolding = unfolding_of(operation, candidate.weight)
            data = self.env[operation.data]
            columns = unfolding.columns(unfolding.images(data).square())
            total = columns.sum((0, 2), dtype=torch.float64)
            self.sums[candidate.name] = self.sums.get(candidate.name, 0) + total
            count = columns.shape[0] * columns.shape[2]
            self.columns[candidate.name] = self.columns.get(candidate.name, 0) + count
        return super().run_node(n)

    def spread(self, candidate: Candidate) -> Tensor:
        """The mean squares at every weight that multiplies them."""
        mean = self.sums[candidate.name] / self.columns[candidate.name]
        weight = candidate.weight
        groups = candidate.operations[0].groups
        rows = mean.reshape(groups, 1, -1).float()
        spread = rows.expand(groups, weight.shape[0] // groups, rows.shape[2])
        return spread.reshape(weight.shape)
