"""Schedules that TVM's MetaSchedule finds by measuring, as ranged kernels.

MetaSchedule proposes, we build and measure: what is measured is the ranged function that a binary
would get, in this process, and what cannot become one is a failed trial.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir import meta_schedule

from shohin.backends.tvm.generic.expressions import (
    INDEX,
    RefusedError,
    Stmt,
    int_of,
    shape_of,
    substitute,
)
from shohin.backends.tvm.generic.quiet import quiet
from shohin.backends.tvm.generic.schedule import RangedFunction, ranged
from shohin.backends.tvm.processor import Processor
from shohin.errors import SpecError
from shohin.ir.encodings import Json

TRIALS_AT_ONCE = 16
"""Trials that are built, measured and learnt from together."""

_PACKAGES = ("xgboost",)
_SEED = 20_011
_POPULATION = 128
_UNMEASURED = 32
_JOBS_PER_THREAD = 64
_LEAST_JOBS_PER_THREAD = 8
_UNROLLED = (0, 16, 64, 256)
_LARGEST_TILE = 64
_SCRATCH_BYTES = 1 << 16
"""Scratch on the stack of a kernel: threads have a few MiB, and it should stay in the cache."""


@dataclass(frozen=True)
class Trial:
    """A schedule that was measured.

    Attributes:
        trace: what makes it out of the unscheduled function, for `replay`.
        milliseconds: its time on one thread.
    """

    trace: Json
    milliseconds: float


Measure = Callable[[Sequence[RangedFunction]], list[float | None]]
"""Gives the milliseconds of each function, None where it cannot be built."""


def check_packages() -> None:
    """Check that what the search needs is installed.

    Raises:
        SpecError: naming what is missing, and how to install it.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SpecError(
            "target cpu",
            f"metaschedule needs packages that are not installed: {', '.join(missing)}",
            "run pip install 'shohin[search]', or leave the option out",
        )


def search(
    workload: Any,
    target: Processor,
    trials: int,
    measure: Measure,
    progress: Callable[[int], None],
) -> list[Trial]:
    """Search schedules of a function.

    Args:
        workload: PrimFunc of blocks.
        target: processor to compile for; it must be one this machine can run.
        trials: how many schedules to measure at most.
        measure: gives the time of candidates.
        progress: called with the number of trials that are done.

    Returns:
        The schedules that became kernels, fastest first.
    """
    with _undisturbed():
        session = _Session(workload, target, trials)
    found: list[Trial] = []
    done = 0
    while True:
        progress(done)
        with _undisturbed():
            candidates = session.propose()
            functions = [_try_ranged(candidate.sch.mod, target) for candidate in candidates]
        if not candidates:
            break
        measured = iter(measure([function for function in functions if function]))
        times = [next(measured) if function else None for function in functions]
        with _undisturbed():
            session.learn(candidates, times)
        found += [
            Trial(_plain(candidate.sch.trace.as_json()), time)
            for candidate, time in zip(candidates, times, strict=True)
            if time is not None
        ]
        done += len(candidates)
    return sorted(found, key=lambda trial: trial.milliseconds)


def replay(workload: Any, trace: Json, target: Processor) -> RangedFunction:
    """Schedule a function as a trial did.

    Args:
        workload: the PrimFunc that was searched.
        trace: what the trial gave.
        target: processor to compile for.

    Raises:
        RefusedError: the trace is not one of this function.
    """
    schedule = s_tir.Schedule(tvm.IRModule({"main": workload}))
    try:
        with quiet():
            s_tir.schedule.Trace.apply_json_to_schedule(trace, schedule)
    # TVM raises TypeError, ValueError, IndexError and its own kinds for what is no trace.
    except Exception as error:
        raise RefusedError("it is not a trace of this function") from error
    return _ranged_of(schedule.mod, target)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Nothing printed, and random numbers that are the same each time, leaving the caller's."""
    state = np.random.get_state()
    np.random.seed(_SEED)
    try:
        with quiet():
            yield
    finally:
        np.random.set_state(state)


class _Context(meta_schedule.TuneContext):  # type: ignore[misc]
    """TuneContext as its own constructor makes it, without two habits of that.

    It imports the tensor instructions of every GPU, which takes longer than a short search, and
    it logs.
    """

    def __init__(self, module: Any, target: Any, space: Any, strategy: Any) -> None:
        api = meta_schedule._ffi_api
        self.__init_handle_by_constructor__(
            api.TuneContext, module, target, space, strategy, "main", 1, _SEED, _drop_message
        )
        api.TuneContextInitialize(self)


def _drop_message(level: int, file: str, line: int, message: str) -> None:
    """Where MetaSchedule's log goes."""


class _Session:
    """One search: MetaSchedule's strategy, its cost model and the trials they know."""

    def __init__(self, workload: Any, target: Processor, trials: int) -> None:
        module = tvm.IRModule({"main": workload})
        self.target = tvm.target.Target(target.tvm_description())
        strategy = meta_schedule.search_strategy.EvolutionarySearch(
            population_size=_POPULATION, init_min_unmeasured=_UNMEASURED
        )
        self.context = _Context(module, self.target, _space(), strategy)
        self.database = meta_schedule.database.MemoryDatabase()
        self.workload = self.database.commit_workload(module)
        self.model = _cost_model()
        spaces = self.context.generate_design_space()
        at_once = min(TRIALS_AT_ONCE, trials)
        self.context.pre_tuning(trials, at_once, spaces, self.database, self.model)

    def propose(self) -> list[Any]:
        """The next candidates, none when the search is over."""
        return list(self.context.generate_measure_candidates() or ())

    def learn(self, candidates: Sequence[Any], times: Sequence[float | None]) -> None:
        """Take note of how long candidates took, None for those that failed."""
        results = [
            meta_schedule.runner.RunnerResult([time / 1e3], None)
            if time is not None
            else meta_schedule.runner.RunnerResult(None, "refused")
            for time in times
        ]
        for candidate, result in zip(candidates, results, strict=True):
            if result.run_secs:
                record = meta_schedule.database.TuningRecord(
                    candidate.sch.trace, self.workload, result.run_secs, self.target,
                    candidate.args_info,
                )  # fmt: skip
                self.database.commit_tuning_record(record)
        self.context.notify_runner_results(candidates, results)
        self.model.update(self.context, candidates, results)


def _cost_model() -> Any:
    """Trees over features of loops, trained after every batch; one thread makes them repeatable."""
    config = meta_schedule.cost_model.xgb_model.XGBConfig(nthread=1, seed=_SEED, tree_method="hist")
    return meta_schedule.cost_model.XGBModel(
        config=config, num_warmup_samples=TRIALS_AT_ONCE, verbose_eval=0
    )


def _space() -> Any:
    """The schedules to choose from: TVM's for processors, where sums stay in a local tile.

    The epilogue goes into the loops that store the tile, so that one loop nest remains.
    """
    rules, mutators = meta_schedule.schedule_rule, meta_schedule.mutator
    postprocessors = meta_schedule.postproc
    return meta_schedule.space_generator.PostOrderApply(
        sch_rules=[
            rules.MultiLevelTiling(
                "SSRSRS",
                max_innermost_factor=_LARGEST_TILE,
                reuse_write=rules.ReuseType("must", [1, 2], "global"),
            ),
            rules.AutoInline(
                into_producer=True,
                into_consumer=True,
                inline_const_tensor=True,
                disallow_if_then_else=False,
                require_injective=False,
                require_ordered=False,
            ),
            rules.ParallelizeVectorizeUnroll(
                max_jobs_per_core=_JOBS_PER_THREAD,
                max_vectorize_extent=_LARGEST_TILE,
                unroll_max_steps=list(_UNROLLED),
                unroll_explicit=True,
            ),
        ],
        postprocs=[
            postprocessors.DisallowDynamicLoop(),
            postprocessors.RewriteParallelVectorizeUnroll(),
            postprocessors.RewriteReductionBlock(),
        ],
        mutator_probs={
            mutators.MutateTileSize(): 0.9,
            mutators.MutateUnroll(): 0.06,
            mutators.MutateParallel(_JOBS_PER_THREAD): 0.04,
        },
    )


def _plain(value: Any) -> Json:
    """A trace in TVM's JSON objects as Python's."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, tirx.IntImm | tirx.FloatImm):
        return value.value  # type: ignore[no-any-return]
    return [_plain(item) for item in value]


def _try_ranged(module: Any, target: Processor) -> RangedFunction | None:
    try:
        return _ranged_of(module, target)
    except RefusedError:
        return None


def _ranged_of(module: Any, target: Processor) -> RangedFunction:
    """The scheduled function ``main`` in our form.

    Its outermost parallel loop becomes the range; without one it is a single work item. Loops that
    are parallel further inside become ordinary ones.

    Raises:
        RefusedError: it needs too much scratch, or has too few work items for the target's threads.
    """
    function = _lowered(module)["main"]
    loop, pragmas = _outermost(function.body)
    item = tirx.Var("item", "int32")
    body, extent = function.body, 1
    if isinstance(loop, tirx.For) and loop.kind == tirx.ForKind.PARALLEL:
        index = loop.min + tirx.Cast(INDEX, item)
        body, extent = substitute(loop.body, {loop.loop_var: index}), int_of(loop.extent)
        for pragma in reversed(pragmas):
            body = tirx.AttrStmt(tirx.const(0, "int32"), pragma.attr_key, pragma.value, body)
    if target.threads > 1 and extent < _LEAST_JOBS_PER_THREAD * target.threads:
        raise RefusedError("it has too few work items for the threads")
    body = _on_the_stack(_serial(body))
    return RangedFunction(ranged(item, body, list(function.params)), extent)


def _lowered(module: Any) -> Any:
    """Blocks as plain loops, every local array where it is used and no larger than it must be."""
    passes = s_tir.transform
    return tvm.transform.Sequential(
        [
            passes.LowerInitBlock(),
            passes.PlanAndUpdateBufferAllocationLocation(),
            passes.ConvertBlocksToOpaque(),
            passes.CompactBufferAllocation(),
            passes.LowerMatchBuffer(),
            passes.StmtSimplify(),
            passes.LowerOpaqueBlock(),
        ]
    )(module)


def _outermost(body: Stmt) -> tuple[Stmt, list[Any]]:
    """The first statement that is no pragma, and the pragmas around it."""
    pragmas = []
    while isinstance(body, tirx.AttrStmt):
        pragmas.append(body)
        body = body.body
    return body, pragmas


def _serial(body: Stmt) -> Stmt:
    """Parallel loops as ordinary ones."""

    def serial(loop: Any) -> Stmt:
        if loop.kind != tirx.ForKind.PARALLEL:
            return loop
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)

    return tvm_ffi.structural_map(body, (tirx.For, serial), order="post")


def _on_the_stack(body: Stmt) -> Stmt:
    """Local arrays on the stack, so that TVM's runtime is not asked for memory.

    Raises:
        RefusedError: they are too large for that.
    """
    arrays: dict[Any, Any] = {}
    size = 0

    def visit(allocation: Any) -> None:
        nonlocal size
        old = allocation.buffer
        shape, dtype = shape_of(old), str(old.dtype)
        size += math.prod(shape) * np.dtype(dtype).itemsize
        arrays[old] = tirx.decl_buffer(shape, dtype, name=old.name, scope="local")

    tvm_ffi.structural_walk(body, (tirx.AllocBuffer, visit))
    if size > _SCRATCH_BYTES:
        raise RefusedError(f"it needs {size} bytes of scratch")

    def on_stack(allocation: Any) -> Stmt:
        mark = {"disable_lower_builtin": tirx.const(True, "bool")}
        return tirx.AllocBuffer(allocation.buffer, mark)

    body = substitute(body, arrays)
    return tvm_ffi.structural_map(body, (tirx.AllocBuffer, on_stack), order="post")
