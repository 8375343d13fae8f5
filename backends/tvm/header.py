"""The header that comes with a saved library: the public interface and this model's arrays."""

from pathlib import Path

from shohin.backends.base import ArtifactInfo
from shohin.backends.tvm.link import RUNTIME
from shohin.ir.files import atomic_path
from shohin.ir.program import InputSpec


def write_header(path: Path, info: ArtifactInfo, prefix: str) -> None:
    """Write a self-contained header for a model.

    Args:
        path: file to write.
        info: what the model takes and gives.
        prefix: prefix of its symbols.
    """
    public = (RUNTIME / "shohin.h").read_text()
    lines = [
        "/*",
        f" * {info.name}: compiled for {info.target}.",
        *(f" * input  {i}: {_describe(spec)}" for i, spec in enumerate(info.inputs)),
        *(f" * output {i}: {_describe(spec)}" for i, spec in enumerate(info.outputs)),
        " *",
        f" * Functions: {prefix}_info, {prefix}_create, {prefix}_run, {prefix}_run_sized,",
        f" * {prefix}_profile, {prefix}_step_label, {prefix}_destroy, {prefix}_status_text,",
        f" * {prefix}_last_error; see below.",
        " * Link with -pthread -lm.",
        " */",
    ]
    guard = f"SHOHIN_MODEL_{prefix.upper()}_H"
    text = "\n".join(
        [
            *lines,
            f"#ifndef {guard}",
            f"#define {guard}",
            "",
            public,
            f"SHOHIN_DECLARE_MODEL({prefix});",
            "",
            f"#endif /* {guard} */",
            "",
        ]
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def _describe(spec: InputSpec) -> str:
    return f"{spec.name}, {spec.describe()}, row-major"
