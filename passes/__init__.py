"""Passes over programs: the contract, the manager, pipeline text, rewriting rules.

The passes themselves are found by name through `pass_class`; see `pass_names`.
"""

from shohin.passes.analysis import AnalysisCache
from shohin.passes.base import Batch, Context, Evaluate, Pass, PassResult, Train
from shohin.passes.bisect import BisectResult, accuracy_check, bisect, output_check
from shohin.passes.instruments.base import Instrument
from shohin.passes.manager import PassManager, check_passes
from shohin.passes.patterns import (
    Change,
    Match,
    NoMatch,
    Rewriter,
    Rule,
    apply_rules,
    argument,
)
from shohin.passes.pipeline import format_pass, format_pipeline, parse_pipeline
from shohin.passes.registry import PassDescription, describe, pass_class, pass_names
from shohin.passes.remarks import NodeCost, Outcome, Reason, Remark
from shohin.passes.trainer import Trainer

__all__ = [
    "AnalysisCache",
    "Batch",
    "BisectResult",
    "Change",
    "Context",
    "Evaluate",
    "Instrument",
    "Match",
    "NoMatch",
    "NodeCost",
    "Outcome",
    "Pass",
    "PassDescription",
    "PassManager",
    "PassResult",
    "Reason",
    "Remark",
    "Rewriter",
    "Rule",
    "Train",
    "Trainer",
    "accuracy_check",
    "apply_rules",
    "argument",
    "bisect",
    "check_passes",
    "describe",
    "format_pass",
    "format_pipeline",
    "output_check",
    "parse_pipeline",
    "pass_class",
    "pass_names",
]
