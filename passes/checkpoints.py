"""The state after each epoch of a training, in a file, so that an interrupted one can go on."""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from shohin.errors import ArtifactError, ShohinWarning
from shohin.ir.files import atomic_path, make_folder

_RANDOM, _GENERATOR = "random", "generator"
_BROKEN = (SafetensorError, OSError, LookupError, ValueError, TypeError, RuntimeError)


class EpochFile:
    """The file that holds a training as it was after its last whole epoch.

    It holds tensors and text, no pickle, and is written whole or not at all. Its name tells apart
    the weights that the training started from, what is computed with them, and the options; data
    and loss cannot be compared, so use another folder when these change.

    Args:
        folder: where it lies, made where it is missing; None when nothing is kept.
        resume: whether to go on from what is there.
        module: what is trained, before the first epoch.
        options: text that tells trainings of the same module apart.
        generator: of the batches, where they have one of their own.
    """

    def __init__(
        self,
        folder: Path | None,
        resume: bool,
        module: nn.Module,
        options: str,
        generator: torch.Generator | None,
    ) -> None:
        self._module = module
        self._resume = resume
        self._generator = generator
        self._path: Path | None = None
        if folder is not None:
            key = _fingerprint(module, options)
            self._path = folder / f"training-{key[:32]}.safetensors"

    def load(self, optimizer: torch.optim.Optimizer) -> int:
        """Bring module, optimiser and random numbers to what was saved.

        A file that is broken is reported with a `ShohinWarning`, and nothing is changed. The folder
        is made where it is missing, so that one that cannot be is reported before the training.

        Returns:
            The number of epochs that were done.

        Raises:
            ArtifactError: when the folder cannot be made.
        """
        if self._path is None:
            return 0
        make_folder(self._path.parent)
        if not self._resume or not self._path.exists():
            return 0
        wanted = _tensors(self._module)
        try:
            epochs, saved = _read(self._path)
            state = {name: _like(saved[f"module/{name}"], one) for name, one in wanted.items()}
            optimized = _optimizer_state(optimizer, wanted, saved)
            self._check_random(saved)
        except _BROKEN as error:
            text = f"{self._path.name} is not used, and the training starts anew: {error}"
            warnings.warn(text, ShohinWarning, stacklevel=2)
            return 0
        with torch.no_grad():
            for name, one in wanted.items():
                one.copy_(state[name])
        optimizer.load_state_dict({**optimizer.state_dict(), "state": optimized})
        torch.set_rng_state(saved[_RANDOM])
        if self._generator is not None:
            self._generator.set_state(saved[_GENERATOR])
        return epochs

    def save(self, optimizer: torch.optim.Optimizer, epochs: int) -> None:
        """Write the state after so many epochs.

        Raises:
            ArtifactError: when the file cannot be written.
        """
        if self._path is None:
            return
        named = _tensors(self._module)
        saved = {f"module/{name}": one for name, one in named.items()}
        saved |= dict(_optimizer_tensors(optimizer, named))
        saved[_RANDOM] = torch.get_rng_state()
        if self._generator is not None:
            saved[_GENERATOR] = self._generator.get_state()
        # Tied parameters share memory, which the format refuses.
        copies = {name: one.detach().cpu().contiguous().clone() for name, one in saved.items()}
        try:
            with atomic_path(self._path) as temporary:
                save_file(copies, temporary, {"epochs": json.dumps(epochs)})
        except SafetensorError as error:
            raise ArtifactError(str(self._path), f"cannot be written: {error}") from error

    def _check_random(self, saved: Mapping[str, Tensor]) -> None:
        """Refuse what is no state of random numbers, before anything is changed."""
        torch.Generator().set_state(saved[_RANDOM])
        if self._generator is not None:
            torch.Generator(self._generator.device).set_state(saved[_GENERATOR])


def _read(path: Path) -> tuple[int, dict[str, Tensor]]:
    """Number of epochs that were done, and tensors by name."""
    with safe_open(path, "pt") as file:
        epochs = json.loads((file.metadata() or {})["epochs"])
        if not isinstance(epochs, int) or epochs < 0:
            raise ValueError(f"expected a number of epochs, got {epochs!r}")
        return epochs, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _like(found: Tensor, wanted: Tensor) -> Tensor:
    """A tensor of the shape and element type of another."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        raise ValueError("the shapes of its tensors are not those of the module")
    return found


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that the state dictionary leaves out as well, tied ones once.

    Sorted by name, since the order in which a graph module holds them is another in every process.
    """
    named = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    first: dict[Tensor, str] = {}
    for name in sorted(named):
        first.setdefault(named[name], name)
    return {name: one for one, name in first.items()}


def _fingerprint(module: nn.Module, options: str) -> str:
    digest = hashlib.sha256(options.encode())
    digest.update(_structure(module).encode())
    for name, one in _tensors(module).items():
        digest.update(f"{name} {one.dtype} {list(one.shape)} {one.requires_grad}".encode())
        flat = one.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _structure(module: nn.Module) -> str:
    """What a module says of its parts and of its graph: probabilities, thresholds, flags."""
    parts = sorted(module.named_modules(remove_duplicate=False), key=lambda named: named[0])
    said = [f"{name} {type(part).__name__} {part.extra_repr()}" for name, part in parts]
    code = module.code if isinstance(module, fx.GraphModule) else ""
    # Addresses are others in every process.
    return re.sub(r"\b0x[0-9a-f]+", "", "\n".join([*said, code]))


def _optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"optimizer/{key}/{name}", value


def _optimizer_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor], saved: Mapping[str, Tensor]
) -> dict[int, dict[str, Any]]:
    """By number of parameter, what an optimiser keeps of it: tensors of its shape, and counts."""
    parameters = (one for group in optimizer.param_groups for one in group["params"])
    places = {one: index for index, one in enumerate(parameters)}
    states: dict[int, dict[str, Any]] = {}
    for path, one in saved.items():
        if path.startswith("optimizer/"):
            _, key, name = path.split("/", 2)
            if one.dim() and one.shape != named[name].shape:
                raise ValueError("the shapes of its tensors are not those of the optimiser")
            states.setdefault(places[named[name]], {})[key] = one
    return states
