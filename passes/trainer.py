"""A plain training loop for those who bring none of their own."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn

from shohin.errors import DivergedError, PassError, SpecError
from shohin.ir.sharing import axes_of
from shohin.ir.training import trainable
from shohin.passes.base import Progress
from shohin.passes.checkpoints import EpochFile

Loss: TypeAlias = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, eq=False)
class Trainer:
    """Trains a module in place on batches of inputs and labels; what `train` arguments ask for.

    ::

        train = shohin.Trainer(loader, epochs=10, learning_rate=0.01)
        shohin.optimize(program, "prune{density=0.1 rounds=5}", train=train)

    Works on any module. On that of a captured program, dropout and batch normalisation train as
    in the model it was captured from. Inside of a pass, weights that are pruned stay zero.

    The same module, batches and seed give the same weights: random numbers are drawn from the seed
    while it trains, and a `DataLoader` with a generator of its own has it seeded anew. PyTorch's
    own random state is left as it was.

    Attributes:
        loader: batches ``(input, ..., label)`` that can be read again for every epoch: a
            `DataLoader`, or a list.
        epochs: how often to go through the batches.
        learning_rate: at the start.
        optimizer: ``sgd`` or ``adam``.
        momentum: of ``sgd``; the first beta of ``adam``.
        weight_decay: L2 penalty, as PyTorch's optimisers count it; on weights of two axes or more,
            not on biases and normalisations. Centroids count as the weights that they stand for.
        l1: L1 penalty on the same weights: the loss rises by ``l1 * sum |w|``.
        schedule: ``cosine`` goes down to 0, ``step`` divides by 10 after half and after three
            quarters of the time, ``constant`` stays.
        precision: ``bfloat16`` computes the loss and its gradients in mixed precision
            (`torch.autocast`), about twice as fast on processors that have instructions for it;
            weights and optimiser stay in single precision.
        loss: called as ``loss(output, label)``; a module of several outputs gives a tuple.
        seed: seed of dropout, and of the order of batches where PyTorch draws it.
        progress: called as ``progress(done, total, label)`` after each epoch; passes put their own
            there where there is none.
        workdir: folder for a file with the state after every epoch, or None for none; passes put
            their own there where there is none. What it was trained from and how is part of the
            file's name; data and loss are not, so use another folder when these change.
        resume: go on after the last whole epoch in `workdir`, to the same weights as without the
            interruption.

    Raises:
        SpecError: when a value is out of range, naming it.
    """

    loader: Iterable[Sequence[Any]]
    _: KW_ONLY
    epochs: int = 1
    learning_rate: float = 0.01
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    l1: float = 0.0
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    precision: Literal["float32", "bfloat16"] = "float32"
    loss: Loss = nn.functional.cross_entropy
    seed: int = 0
    progress: Progress | None = None
    workdir: str | PathLike[str] | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.loader, Iterable) or isinstance(self.loader, Iterator):
            problem = f"expected batches to read again and again, got {_kind(self.loader)}"
            raise SpecError("trainer loader", problem, "give a DataLoader, or a list of batches")
        self._check("epochs", self.epochs >= 1, "1 or more")
        self._check("learning_rate", 0 < self.learning_rate < math.inf, "above 0")
        self._check("momentum", 0 <= self.momentum < 1, "from 0 to below 1")
        self._check("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more")
        self._check("l1", 0 <= self.l1 < math.inf, "0 or more")
        self._check("optimizer", self.optimizer in ("sgd", "adam"), "'sgd' or 'adam'")
        known = self.schedule in ("cosine", "step", "constant")
        self._check("schedule", known, "'cosine', 'step' or 'constant'")
        known = self.precision in ("float32", "bfloat16")
        self._check("precision", known, "'float32' or 'bfloat16'")

    def __call__(self, module: nn.Module) -> None:
        """Train a module in place; its mode is afterwards what it was.

        Raises:
            DivergedError: when the loss is NaN or infinite, naming epoch and batch, or what an
                epoch leaves is. Weights and statistics are then those from before that epoch.
            PassError: when no parameter asks for gradients.
            SpecError: when the loader gives no batches, or something else than batches.
            ArtifactError: when the file in `workdir` cannot be written.
        """
        with _training(module, self.seed, self.loader):
            weights, others = _split(module)
            if not weights and not others:
                raise PassError("trainer", "there is nothing to train: every parameter is frozen")
            optimizer = self._make_optimizer(weights, others)
            file = self._epoch_file(module)
            for epoch in range(file.load(optimizer), self.epochs):
                where = f"epoch {epoch + 1}"
                with _last_good(module, epoch):
                    mean = self._run_epoch(module, optimizer, epoch)
                file.save(optimizer, epoch + 1)
                if self.progress is not None:
                    label = f"{where} of {self.epochs}, loss {mean:.4g}"
                    self.progress(epoch + 1, self.epochs, label)

    def _epoch_file(self, module: nn.Module) -> EpochFile:
        folder = None if self.workdir is None else Path(self.workdir)
        left_out = ("loader", "loss", "progress", "workdir", "resume")
        named = (one.name for one in fields(self) if one.name not in left_out)
        options = repr([(name, getattr(self, name)) for name in named] + [_length(self.loader)])
        return EpochFile(folder, self.resume, module, options, _generator_of(self.loader))

    def _check(self, name: str, fine: bool, expected: str) -> None:
        if not fine:
            found = f"expected {expected}, got {getattr(self, name)!r}"
            raise SpecError(f"trainer {name}", found)

    def _make_optimizer(
        self, weights: list[nn.Parameter], others: list[nn.Parameter]
    ) -> torch.optim.Optimizer:
        groups = [
            {"params": weights, "weight_decay": self.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        if self.optimizer == "adam":
            return torch.optim.Adam(groups, lr=self.learning_rate, betas=(self.momentum, 0.999))
        return torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum)

    def _run_epoch(self, module: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> float:
        """Go through the batches once; the mean loss, penalties left out."""
        steps = _length(self.loader)
        total, index = 0.0, -1
        for index, batch in enumerate(self.loader):
            done = (epoch + (min(index, steps - 1) / steps if steps else 0.0)) / self.epochs
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * _decay(self.schedule, done)
            total += self._step(module, optimizer, batch, f"epoch {epoch + 1}, batch {index + 1}")
        if index < 0:
            raise SpecError("trainer loader", "expected at least one batch, got none")
        return total / (index + 1)

    def _mixed(self, inputs: Sequence[Any]) -> torch.autocast:
        devices = {one.device.type for one in inputs if isinstance(one, Tensor)}
        device = devices.pop() if len(devices) == 1 else "cpu"
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16")

    def _step(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: Sequence[Any],
        where: str,
    ) -> float:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            problem = f"{where}: expected (input, label), got {_kind(batch)}"
            raise SpecError("trainer loader", problem)
        *inputs, label = batch
        optimizer.zero_grad(set_to_none=True)
        with self._mixed(inputs):
            loss = self.loss(module(*inputs), label)
        value = float(loss.detach())
        if not math.isfinite(value):
            problem = f"the loss is {value} in {where}"
            raise DivergedError("trainer", problem, "try a lower learning rate")
        torch.autograd.backward(loss)
        if self.l1:
            _add_l1(optimizer.param_groups[0]["params"], self.l1)
        optimizer.step()
        return value


@contextmanager
def _training(module: nn.Module, seed: int, loader: object) -> Iterator[None]:
    """Training mode, gradients and random numbers from a seed, and all as it was afterwards."""
    modes = {part: part.training for part in module.modules()}
    with ExitStack() as stack:
        if isinstance(module, fx.GraphModule):
            stack.enter_context(trainable(module))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(seed)
        generator = _generator_of(loader)
        if generator is not None:
            generator.manual_seed(seed)
        module.train()
        try:
            yield
        finally:
            for part, mode in modes.items():
                part.training = mode


def _generator_of(loader: object) -> torch.Generator | None:
    """The random numbers that a loader draws from, where they are its own."""
    found = getattr(loader, "generator", None)
    return found if isinstance(found, torch.Generator) else None


def _decay(schedule: str, done: float) -> float:
    """What the learning rate is multiplied by after a share of the training."""
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "step":
        return 0.1 ** ((done >= 0.5) + (done >= 0.75))
    return 1.0


def _split(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What is trained: weights of two axes or more, and the others."""
    axes = axes_of(module)
    trained = [one for one in module.parameters() if one.requires_grad]
    weights = [one for one in trained if axes[one] >= 2]
    return weights, [one for one in trained if axes[one] < 2]


@contextmanager
def _last_good(module: nn.Module, epochs: int) -> Iterator[None]:
    """Bring weights and statistics back when a training diverges, or leaves what is not finite.

    Args:
        module: what is trained.
        epochs: how many have gone well.
    """
    before = {name: one.clone() for name, one in _state(module)}
    try:
        yield
        for name, one in _state(module):
            if _diverged(before[name], one):
                plain = name.replace("parametrizations.", "").removesuffix(".original")
                problem = f"{plain} is NaN or infinite after epoch {epochs + 1}"
                raise DivergedError("trainer", problem, "try a lower learning rate")
    except DivergedError as error:
        for name, one in _state(module):
            one.copy_(before[name])
        error.epochs = epochs
        raise


def _diverged(before: Tensor, after: Tensor) -> bool:
    """Whether an element is not finite any more; some constants have infinite ones."""
    found = torch.isfinite(after)
    return not bool(found.all()) and bool((torch.isfinite(before) & ~found).any())


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights and statistics."""
    named = module.state_dict().items()
    return ((name, one) for name, one in named if isinstance(one, Tensor))


def _add_l1(weights: list[nn.Parameter], factor: float) -> None:
    """Add the gradient of ``factor * sum |w|``."""
    for weight in weights:
        if weight.grad is not None:
            weight.grad.add_(weight.detach().sign(), alpha=factor)


def _length(loader: object) -> int:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return 0


def _kind(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__
