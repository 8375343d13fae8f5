"""Small networks for tests of low rank, and how they are split."""

from dataclasses import replace

import torch
from torch import nn

import shohin
from shohin.ir.program import Fact
from shohin.passes.base import Context
from shohin.passes.low_rank import LowRank
from shohin.passes.remarks import Outcome

COMPARE = "compare=macs"


def small(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(4, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))
    program = shohin.capture(model, torch.ones(2, 4, 10, 10), name="small")
    return replace(program, facts=program.facts | {Fact.BN_FOLDED})


def images(count=200, seed=3):
    return torch.randn(count, 4, 10, 10, generator=torch.Generator().manual_seed(seed))


def batches(count=200):
    return [(part,) for part in images(count).split(40)]


def split(program, options, *, text=COMPARE, **arguments):
    arguments.setdefault("calibration", batches())
    pipeline = f"low-rank{{{text} {options}}}"
    return shohin.optimize(program, pipeline, drift=False, **arguments)


def outputs(program, count=100):
    with torch.inference_mode():
        return program.module(images(count, seed=9))


def lack(program, other):
    wanted = outputs(program)
    return float((outputs(other) - wanted).square().sum() / wanted.square().sum())


def changed(result):
    return {r.node: r for r in result.report.remarks if r.outcome is Outcome.CHANGED}


def skipped(result):
    found = [r for r in result.report.remarks if r.outcome is Outcome.SKIPPED]
    return {remark.node: remark for remark in found}


def weights(program):
    return {name: tuple(one.shape) for name, one in program.module.named_parameters()}


def fake_profile(times):
    """Milliseconds of a branch by its number of weights, and the programs that were measured."""
    asked = []

    def profile(program, target):
        asked.append(program)
        found = {}
        for name, one in program.module.named_parameters():
            form = name.split(".")[0]
            found[form] = found.get(form, 0) + times(one)
        return found

    profile.asked = asked
    return profile


def run(options, **context):
    chosen = LowRank(**options)
    made = Context(calibration=batches(), **context)
    return chosen.run(small(), made), made
