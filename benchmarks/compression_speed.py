"""How long coding takes, how close it comes to the entropy, and what binaries gain."""

import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from compression_tables import layer_table
from numpy.typing import NDArray
from pruning_speed import HAN_ALEXNET
from tables import Table, save
from torch import nn

import shohin
from shohin import zoo
from shohin.backends.base import WeightForm
from shohin.backends.tvm.binary import Binary
from shohin.ir.codebook import Codebook
from shohin.ir.coding import Coder, coded_bytes, entropy_bits
from shohin.ir.encodings import Encoding, Sparse
from shohin.ir.gaps import gap_codes
from shohin.ir.program import Program, weight_names
from shohin.ir.serialise import ProgramFile
from shohin.passes.sharing.clusters import cluster

_PAPER_MEGABYTES = 6.9
_ENTROPY_WEIGHTS = 10_000
_STARTS = 41
_CREATIONS = 9
_MANY_WEIGHTS = 61_000_000
_FORMS: tuple[WeightForm, ...] = ("plain", "compressed")
_CODERS: tuple[Coder, ...] = ("ans", "huffman")


def measure_clusters() -> None:
    """K-means of as many numbers as AlexNet has weights."""
    numbers = np.random.default_rng(0).standard_normal(_MANY_WEIGHTS, np.float32)
    table = Table("k-means of 61 million numbers", ("clusters", "seconds"))
    rows = []
    for clusters in (16, 32, 256):
        began = time.monotonic()
        cluster(numbers, clusters)
        rows.append({"clusters": clusters, "seconds": time.monotonic() - began})
        table.add(str(clusters), f"{rows[-1]['seconds']:.1f}")
    save("compression_clusters", rows, [table])


def measure_alexnet() -> None:
    """AlexNet with random weights, at the densities and cluster counts of the paper."""
    torch.manual_seed(0)
    model = zoo.build("alexnet")
    program = shohin.capture(model, zoo.example_inputs("alexnet", 2), name="alexnet")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "alexnet.shohin"
        coded, encoded = _timed(lambda: _write_alexnet(program, path))
        with ProgramFile(path) as file:
            names = list(file.sizes)
        decoded = _timed(lambda: _decode(path, names))[1]
        size = path.stat().st_size
        closeness = list(_closeness(path))
        layers = layer_table("AlexNet: what every weight takes", path, "alexnet")
        row = {"bytes": size, "encode_seconds": encoded, "decode_seconds": decoded}
        row |= _measure_creation(coded, folder)
    table = Table(
        "AlexNet, random weights at the paper's densities (84/38/35/37/37/9/9/25 %) and clusters "
        "(256 for convolutions, 32 for the others)",
        ("figure", "found", "paper"),
    )
    table.add("file, MB", f"{size / 1e6:.2f}", str(_PAPER_MEGABYTES))
    table.add("prune, share, code and write, s", f"{encoded:.1f}", "")
    table.add("read and decode in Python, s", f"{decoded:.2f}", "")
    table.add("decode in the binary, 1 thread, s", f"{row['create_seconds'][0]:.3f}", "")
    table.add("decode in the binary, 2 threads, s", f"{row['create_seconds'][1]:.3f}", "")
    table.add("the same, MB of single precision a second", f"{row['megabytes_per_second']:.0f}", "")
    rate = f"{row['dense_megabytes_per_second']:.0f}"
    table.add("4096x4096 weights that share 256 values, not pruned, MB/s, 1 thread", rate, "")
    near = Table(
        "Coded size above the entropy of symbols, weights above 10,000 elements",
        ("weight", "stream", "entropy bytes", "ANS bytes", "above %", "Huffman bytes", "above %"),
    )
    for one in closeness:
        cells = [f"{one['entropy']:,.0f}"]
        for coder in _CODERS:
            above = 100 * (one[coder] / one["entropy"] - 1)
            cells += [f"{one[coder]:,}", f"{above:.2f}"]
        near.add(one["weight"], one["stream"], *cells)
    save("compression_alexnet", [row, *closeness], [table, layers, near])


def measure_executable(path: Path) -> None:
    """A standalone LeNet-5 with plain and with compressed weights.

    Args:
        path: file of the compressed program.
    """
    program = shohin.load(path)
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "x.npy"
        np.save(images, zoo.example_inputs("lenet-5", 1)[0].numpy())
        files = {}
        for form in _FORMS:
            binary = shohin.compile(program, "cpu", weights=form)
            files[form] = binary.save(Path(folder) / f"lenet-5-{form}")
        commands = {form: [str(file), str(images)] for form, file in files.items()}
        starts = _interleaved(commands)
        rows = [
            {"form": form, "bytes": file.stat().st_size, "milliseconds": starts[form]}
            for form, file in files.items()
        ]
    table = Table(
        f"LeNet-5 as an executable of its own, from a file of {path.stat().st_size:,} bytes",
        ("weights", "bytes", "start, one image and end, ms"),
    )
    for row in rows:
        table.add(row["form"], f"{row['bytes']:,}", f"{row['milliseconds']:.2f}")
    save("compression_executable", rows, [table])


def _write_alexnet(program: Program, path: Path) -> Program:
    names = [name for name in weight_names(program) if name.endswith("weight")]
    kept = ", ".join(f"{n}: {d:g}" for n, d in zip(names, HAN_ALEXNET, strict=True))
    passes = f"prune{{densities={{{kept}}}}}, share-weights{{conv=8 linear=5}}, entropy-code"
    result = shohin.optimize(program, passes, drift=False)
    result.save(path)
    return result.program


def _decode(path: Path, names: Sequence[str]) -> None:
    with ProgramFile(path) as file:
        file.check()
        for name in names:
            file.encoding(name).materialise()


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.monotonic()
    return work(), time.monotonic() - began


def _measure_creation(program: Program, folder: str) -> dict[str, Any]:
    """Seconds that the first instance of a binary takes beyond one of a plain binary."""
    seconds, sizes = [], []
    for threads in (1, 2):
        files = {
            form: shohin.compile(program, f"cpu{{threads={threads}}}", weights=form).save(
                Path(folder) / f"alexnet-{form}-{threads}.so"
            )
            for form in _FORMS
        }
        seconds.append(_decode_seconds(files))
        sizes += [file.stat().st_size for file in files.values()]
    single = 4 * sum(p.numel() for p in program.module.parameters())
    return {
        "create_seconds": seconds,
        "binary_bytes": sizes,
        "megabytes_per_second": single / 1e6 / seconds[0],
        "dense_megabytes_per_second": _dense_rate(folder),
    }


def _dense_rate(folder: str) -> float:
    """Decoded MB of single precision a second, of a layer whose weights are shared, not pruned."""
    torch.manual_seed(0)
    program = shohin.capture(nn.Linear(4096, 4096).eval(), torch.randn(1, 4096), name="dense")
    passes = "share-weights{bits=8}, entropy-code"
    coded = shohin.optimize(program, passes, drift=False).program
    files = {
        form: shohin.compile(coded, "cpu", weights=form).save(Path(folder) / f"dense-{form}.so")
        for form in _FORMS
    }
    return 4 * 4096**2 / 1e6 / _decode_seconds(files)


def _decode_seconds(files: Mapping[str, Path]) -> float:
    """What decoding adds to the first instance: the median of differences, taken in turns."""
    pairs = [
        [_creation(files[form]) for form in ("compressed", "plain")] for _ in range(_CREATIONS)
    ]
    return median(coded - plain for coded, plain in pairs)


def _creation(file: Path) -> float:
    """Seconds until an instance is there; none is left over from before."""
    binary = Binary.load(file)
    began = time.perf_counter()
    instance = binary._instance()
    seconds = time.perf_counter() - began
    del instance
    return seconds


def _closeness(path: Path) -> Iterator[dict[str, Any]]:
    """Bytes of each stream in both coders, tables included, and its entropy."""
    with ProgramFile(path) as file:
        for name in file.sizes:
            encoding = file.encoding(name)
            if encoding.parameters() > _ENTROPY_WEIGHTS:
                for stream, options in _streams(encoding):
                    yield {"weight": name, "stream": stream, **_coded(options)}


def _streams(encoding: Encoding) -> Iterator[tuple[str, list[tuple[NDArray[np.uint8], int]]]]:
    """Gaps and indices of a weight, in every width there is, each with its alphabet."""
    if isinstance(encoding, Sparse):
        widths = range(1, 9)
        codes = [(gap_codes(encoding.mask, w).astype(np.uint8), 1 << w) for w in widths]
        yield "gaps", codes
        encoding = encoding.values
    if isinstance(encoding, Codebook):
        yield "indices", [(encoding.indices.reshape(-1).numpy(), encoding.centroids.numel())]


def _coded(options: Sequence[tuple[NDArray[np.uint8], int]]) -> dict[str, float]:
    """The least entropy, and what each coder takes at its best, in bytes."""
    found: dict[str, float] = {"entropy": min(entropy_bits(np.bincount(s)) / 8 for s, _ in options)}
    for coder in _CODERS:
        found[coder] = min(coded_bytes(symbols, alphabet, coder) for symbols, alphabet in options)
    return found


def _interleaved(commands: dict[str, list[str]]) -> dict[str, float]:
    """Median milliseconds of processes, started in turns."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(_STARTS):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: median(found) for name, found in times.items()}
