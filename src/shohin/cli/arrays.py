"""Arrays in files, and what runs on them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shohin.api import compile, load, load_binary  # noqa: A004 - the public name
from shohin.backends.base import Artifact, ArtifactInfo
from shohin.backends.inputs import Array, numpy_dtype
from shohin.errors import InputError
from shohin.ir.files import atomic_path
from shohin.ir.program import InputSpec


@dataclass(frozen=True)
class Arrays:
    """Arrays that a user gave.

    Attributes:
        by_name: those of a ``.npz`` file.
        in_order: those of ``.npy`` files.
    """

    by_name: Mapping[str, Array]
    in_order: tuple[Array, ...]

    def ordered(self, specs: Sequence[InputSpec]) -> list[Array]:
        """The arrays in the order of a model's inputs.

        Raises:
            InputError: when a named one is missing or is no input.
        """
        if not self.by_name:
            return list(self.in_order)
        names = [spec.name for spec in specs]
        if set(names) != set(self.by_name):
            problem = f"expected arrays {', '.join(names)}, got {', '.join(self.by_name)}"
            raise InputError("inputs", problem)
        return [self.by_name[name] for name in names]

    def batch(self) -> int:
        """Size of axis 0 of the first array; 1 where it has none."""
        first = next(iter([*self.by_name.values(), *self.in_order]), None)
        return int(first.shape[0]) if first is not None and first.ndim else 1


def load_artifact(file: str, arrays: Arrays) -> Artifact:
    """What to run: a compiled model, or a program in PyTorch at the arrays' batch size.

    Raises:
        ArtifactError: when the file is missing, foreign or broken.
    """
    if not file.endswith(".shohin"):
        return load_binary(file)
    return compile(load(file), "reference", batch=max(1, arrays.batch()))


def read_arrays(paths: Sequence[Path]) -> Arrays:
    """The arrays of ``.npy`` files, or of one ``.npz`` file.

    Raises:
        InputError: when a file is missing, or holds anything but numbers.
    """
    archives = [path for path in paths if path.suffix == ".npz"]
    if archives and len(paths) > 1:
        raise InputError(str(archives[0]), "expected one .npz file alone, or .npy files")
    if archives:
        with _reading(archives[0]), np.load(archives[0], allow_pickle=False) as archive:
            return Arrays({name: archive[name] for name in archive.files}, ())
    return Arrays({}, tuple(_read(path) for path in paths))


def is_in_batches(info: ArtifactInfo, arrays: Sequence[Array]) -> bool:
    """Whether arrays fit a model but for the size of their batch."""
    return (
        info.batch > 0
        and len(arrays) == len(info.inputs)
        and all(
            array.ndim
            and array.shape[0] != info.batch
            and array.shape[1:] == spec.shape[1:]
            and array.dtype == numpy_dtype(spec)
            for array, spec in zip(arrays, info.inputs, strict=True)
        )
    )


def check_output_form(path: Path | None, count: int) -> None:
    """Refuse a name that cannot hold a number of results.

    Raises:
        InputError: when it ends in neither ``.npy`` nor ``.npz``, or in ``.npy`` for several.
    """
    if path is None or path.suffix == ".npz" or (path.suffix == ".npy" and count == 1):
        return
    forms = ".npy or .npz" if count == 1 else f".npz, as there are {count} results"
    raise InputError(str(path), f"expected a name that ends in {forms}, got '{path.suffix}'")


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write one array as ``.npy``, or any number as ``.npz``, whole or not at all.

    Raises:
        ArtifactError: when the file cannot be written.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        if path.suffix == ".npy":
            np.save(file, next(iter(arrays.values())))
        else:
            np.savez(file, **arrays)  # type: ignore[arg-type]


def _read(path: Path) -> Array:
    with _reading(path), path.open("rb") as file:
        array: Array = np.lib.format.read_array(file, allow_pickle=False)
    return array


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(str(path), "there is no such file") from error
    except (OSError, ValueError, EOFError, KeyError) as error:
        problem = f"expected a .npy or .npz file of numbers: {error}"
        raise InputError(str(path), problem, "write it with numpy.save") from error
