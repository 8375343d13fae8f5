"""Ternary networks on real images: errors against a baseline that was trained as long."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from pruning_data import Distilled, Images, distillation, error, load_images
from tables import Table, save, with_earlier
from torch import nn

import shohin
from shohin import zoo
from shohin.ir.ternary import Ternary
from shohin.passes.ternarising.figures import draw_curves
from shohin.passes.ternarising.history import HISTORY, History

Part: TypeAlias = Literal["baseline", "ternary"]
PARTS: tuple[Part, ...] = ("baseline", "ternary")

WORK = Path(__file__).parent / "trained" / "ternary"
_RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network and its baseline are trained: the same for both.

    Attributes:
        network: in `shohin.zoo`.
        images: the name of the pretrained net that sees the same images.
        pretrained: weights to start from; random ones where there is none.
        epochs: of training; the last one counts.
        learning_rate: at the start; it falls to 0 as a cosine.
        weight_decay: on weights, the authors' script's.
        shift: furthest shift of the training images, pixels.
        mirror: whether training images are mirrored.
        passes: what makes it ternary.
        teacher: whether the ternary net learns from the pretrained one as well.
        baseline: the recipe whose baseline it is compared with, where that is not its own.
        most: points that the ternary net may be worse.
    """

    network: str
    images: str
    pretrained: str | None
    epochs: int
    learning_rate: float
    weight_decay: float = 2e-4
    shift: int = 4
    mirror: bool = True
    passes: str = "ternary{start=fitted}"
    teacher: bool = False
    baseline: str | None = None
    most: float


def _resnet(depth: int, most: float, **others: Any) -> Recipe:
    name = f"resnet-{depth}"
    options = {"epochs": 30, "learning_rate": 0.02, "most": most, **others}
    images = f"{name}-cifar10jpeg"
    return Recipe(network=name, images=images, pretrained=images, **options)


RECIPES = {
    "lenet-5": Recipe(
        network="lenet-5",
        images="lenet-5",
        pretrained=None,
        epochs=20,
        learning_rate=0.02,
        weight_decay=5e-4,
        shift=2,
        mirror=False,
        passes="ternary",
        most=0.1,
    ),
    "resnet-20": _resnet(20, 0.7),
    "resnet-32": _resnet(32, 0.3),
    "resnet-32-teacher": _resnet(32, 0.3, teacher=True, baseline="resnet-32"),
    "resnet-32-sparsity": _resnet(
        32, 0.3, passes="ternary{sparsity=0.4}", learning_rate=0.05, baseline="resnet-32"
    ),
}
"""The last two are other ways to train what `resnet-32` trains: with labels joined by what the
pretrained network says, and with a fixed share of zeros, the article's second way, at a higher rate
since it does not begin with fitted weights. Both are compared with the baseline of `resnet-32`.
What is recorded was trained by the kernels of ``--winograd``, on one thread; that of
`resnet-20` and the last two fused batch normalisation as well, which only rounds otherwise."""
_CALIBRATION = 512
_TAUGHT = {"loss": distillation}


def train(networks: Iterable[str], parts: Iterable[Part]) -> None:
    """Train networks and baselines; what was interrupted goes on after its last epoch.

    Errors on validation images are printed, those on test images only by `summarise`. Recipes were
    not chosen on the former: pretrained networks have seen them, and the less a network trains, the
    better it still knows them.
    """
    for name in networks:
        recipe = RECIPES[name]
        images = load_images(recipe.images, 128, recipe.shift, recipe.mirror)
        for part in parts:
            if part == "baseline" and recipe.baseline is not None:
                continue
            module = _MAKERS[part](name, recipe, images)
            print(name, part, "validation", error(module, *images.validation), flush=True)


def summarise() -> None:
    """Print and save test errors and zeros of what was trained here, and draw the curves.

    Networks that were not trained here keep the rows and curves of an earlier run.
    """
    rows = [_row(name, recipe) for name, recipe in RECIPES.items() if _is_done(name)]
    for row in rows:
        history = History(_folder(row["network"], "ternary"))
        history.load()
        draw_curves(_RESULTS / f"ternary_curves_{row['network']}.png", history.points)
    rows = with_earlier("ternary_accuracy", rows, RECIPES)
    table = Table(
        "Ternary networks, test errors after the last epoch, %",
        ("network", "epochs", "before", "baseline", "ternary", "points", "goal", "zeros %"),
    )
    for row in rows:
        table.add(
            row["network"],
            str(row["epochs"]),
            "" if row["start"] is None else f"{row['start']:.2f}",
            f"{row['baseline']:.2f}",
            f"{row['ternary']:.2f}",
            f"{row['ternary'] - row['baseline']:+.2f}",
            f"{row['goal']:+.1f}",
            f"{row['zeros']:.1f}",
        )
    save("ternary_accuracy", rows, [table])


def program_path(name: str) -> Path:
    """Where a ternary network is kept."""
    return WORK / name / "ternary.shohin"


def _row(name: str, recipe: Recipe) -> dict[str, Any]:
    evaluation = zoo.evaluation_set(recipe.images)
    program = shohin.load(program_path(name))
    encodings = [one for one in program.encodings.values() if isinstance(one, Ternary)]
    count = sum(one.parameters() for one in encodings)
    zeros = count - sum(one.nonzeros() for one in encodings)
    start = error(zoo.pretrained(recipe.pretrained), *evaluation) if recipe.pretrained else None
    history: list[dict[str, Any]] = json.loads((_folder(name, "ternary") / HISTORY).read_text())
    return {
        "network": name,
        "epochs": recipe.epochs,
        "learning_rate": recipe.learning_rate,
        "start": start,
        "baseline": error(_trained_baseline(recipe.baseline or name, recipe), *evaluation),
        "ternary": error(program.module, *evaluation),
        "goal": recipe.most,
        "zeros": 100 * zeros / count,
        "history": history,
    }


def _is_done(name: str) -> bool:
    baseline = _baseline_path(RECIPES[name].baseline or name)
    return program_path(name).exists() and baseline.exists()


def _make_baseline(name: str, recipe: Recipe, images: Images) -> nn.Module:
    path = _baseline_path(name)
    if not path.exists():
        model = _start(recipe)
        _trainer(name, "baseline", recipe, images)(model)
        torch.save(model.state_dict(), path)
    return _trained_baseline(name, recipe)


def _make_ternary(name: str, recipe: Recipe, images: Images) -> nn.Module:
    path = program_path(name)
    if not path.exists():
        inputs = zoo.example_inputs(recipe.network, 2)
        program = shohin.capture(_start(recipe).eval(), inputs, name=recipe.network)
        folder = _folder(name, "ternary")
        result = shohin.optimize(
            program,
            recipe.passes,
            calibration=images.calibration(_CALIBRATION, 0),
            train=_trainer(name, "ternary", recipe, images),
            workdir=folder,
            resume=True,
            drift=False,
        )
        result.save(path)
    return shohin.load(path).module


_MAKERS = {"baseline": _make_baseline, "ternary": _make_ternary}


def _trained_baseline(name: str, recipe: Recipe) -> nn.Module:
    model = _start(recipe)
    model.load_state_dict(torch.load(_baseline_path(name), weights_only=True))
    return model.eval()


def _start(recipe: Recipe) -> nn.Module:
    """The network before any training here, in the memory format that trains fastest."""
    if recipe.pretrained:
        model = zoo.pretrained(recipe.pretrained)
    else:
        torch.manual_seed(0)
        model = zoo.entry(recipe.network).build()
    return model.to(memory_format=torch.channels_last)


def _trainer(name: str, part: Part, recipe: Recipe, images: Images) -> shohin.Trainer:
    def progress(done: int, total: int, label: str) -> None:
        print(f"{name} {part}: {label}", flush=True)

    batches: Any = images.training
    others: dict[str, Any] = {}
    if recipe.teacher and part == "ternary":
        batches, others = Distilled(batches, _start(recipe).eval(), "float32"), _TAUGHT
    return shohin.Trainer(
        batches,
        epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        progress=progress,
        workdir=_folder(name, part),
        resume=True,
        **others,
    )


def _baseline_path(name: str) -> Path:
    return WORK / name / "baseline.pt"


def _folder(name: str, part: Part) -> Path:
    folder = WORK / name / part
    folder.mkdir(parents=True, exist_ok=True)
    return folder
