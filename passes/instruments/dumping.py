"""Writes the program and the remarks after every pass into a folder."""

import json
from pathlib import Path

from shohin.ir.printer import format_program
from shohin.passes.instruments.base import Instrument, PassEnd, PassFailure, PipelineEvent
from shohin.passes.remarks import remarks_to_json


class Dumping(Instrument):
    """Writes ``00-captured.txt``, ``01-fold-bn.txt``, ``01-fold-bn.remarks.json``, and so on.

    The first file is named after the stage of the program that the pipeline is given. When a pass
    fails, ``02-prune.error.txt`` says how.

    Args:
        folder: where the files go; made when it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def before_pipeline(self, event: PipelineEvent) -> None:
        """Write the program that the pipeline is given."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write(f"00-{event.program.stage.value}.txt", format_program(event.program))

    def after_pass(self, event: PassEnd) -> None:
        """Write what a pass made and remarked."""
        stem = f"{event.index + 1:02d}-{event.current.name}"
        self._write(f"{stem}.txt", format_program(event.result))
        remarks = json.dumps(remarks_to_json(event.remarks), indent=1)
        self._write(f"{stem}.remarks.json", remarks)

    def on_error(self, event: PassFailure) -> None:
        """Write how a pass failed."""
        stem = f"{event.index + 1:02d}-{event.current.name}"
        self._write(f"{stem}.error.txt", f"{type(event.error).__name__}: {event.error}")

    def _write(self, name: str, text: str) -> None:
        (self._folder / name).write_text(text.rstrip("\n") + "\n", encoding="utf-8")
