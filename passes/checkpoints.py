"""The state after each epoch of a training, in a file, so that an interrupted one can go on."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shohin.errors import ArtifactError, ShohinWarning
from shohin.ir.files import atomic_path

_RANDOM, _GENERATOR = "random", "generator"


class EpochFile:
    """The file that holds a training as it was after its last whole epoch.

    It holds tensors and text, no pickle, and is written whole or not at all. Its name tells the
    weights that the training started from and its options apart; data and loss cannot be compared,
    so use another folder when these change.

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

        A file that is broken is reported with a `ShohinWarning`, and nothing is changed.

        Returns:
            The number of epochs that were done.
        """
        if self._path is None or not self._resume or not self._path.exists():
            return 0
        try:
            with safe_open(self._path, "pt") as file:
                epochs = int(json.loads(file.metadata()["epochs"]))
                saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            wanted = dict(_tensors(self._module))
            state = {name: saved[f"module/{name}"] for name in wanted}
            if any(state[name].shape != one.shape for name, one in wanted.items()):
                raise ValueError("the shapes of its tensors are not those of the module")
            random = saved[_RANDOM]
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            text = f"{self._path.name} is not used, and the training starts anew: {error}"
            warnings.warn(text, ShohinWarning, stacklevel=2)
            return 0
        with torch.no_grad():
            for name, one in wanted.items():
                one.copy_(state[name])
        _load_optimizer(optimizer, saved)
        torch.set_rng_state(random)
        if self._generator is not None and _GENERATOR in saved:
            self._generator.set_state(saved[_GENERATOR])
        return epochs

    def save(self, optimizer: torch.optim.Optimizer, epochs: int) -> None:
        """Write the state after so many epochs.

        Raises:
            ArtifactError: when the file cannot be written.
        """
        if self._path is None:
            return
        saved = {f"module/{name}": one for name, one in _tensors(self._module)}
        saved |= dict(_optimizer_tensors(optimizer))
        saved[_RANDOM] = torch.get_rng_state()
        if self._generator is not None:
            saved[_GENERATOR] = self._generator.get_state()
        # Tied parameters share memory, which the format refuses.
        copies = {name: one.detach().cpu().contiguous().clone() for name, one in saved.items()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(str(self._path.parent), f"cannot be made: {error}") from error
        with atomic_path(self._path) as temporary:
            save_file(copies, temporary, {"epochs": json.dumps(epochs)})


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers; those that the state dictionary leaves out as well."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _fingerprint(module: nn.Module, options: str) -> str:
    digest = hashlib.sha256(options.encode())
    for name, one in _tensors(module):
        digest.update(f"{name} {one.dtype} {list(one.shape)}".encode())
        flat = one.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield f"optimizer/{index}/{key}", value


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    states: dict[int, dict[str, Any]] = {}
    for name, one in saved.items():
        kind, *place = name.split("/")
        if kind == "optimizer":
            states.setdefault(int(place[0]), {})[place[1]] = one
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
