"""VGG-9 at four times fewer operations, trained after the split as long as its baseline is."""

import json
from dataclasses import replace
from typing import Any

from pruning_accuracy import WORK, baseline, trainer, training_images
from pruning_data import error
from pruning_recipes import RECIPES, taught
from tables import Table, save

import shohin
from shohin import zoo

RECIPE = RECIPES["vgg-9 taught"]
EPOCHS, LEARNING_RATE, WEIGHT_DECAY = 6, 3e-4, 1e-4
PASSES = "fold-bn, low-rank{speedup=4 scheme=3d exclude=[features.0.weight] compare=macs}"
_IMAGES = 3000


def measure_tuning() -> None:
    """Errors before and after training, on validation and on test images.

    The baseline is the network as it was, trained for as many epochs with the same teacher.
    """
    images = training_images(RECIPE)
    path = WORK.parent / "low_rank" / "vgg-9.shohin"
    if not path.exists():
        result, known = _train(images)
        path.parent.mkdir(parents=True, exist_ok=True)
        result.save(path)
        path.with_suffix(".json").write_text(json.dumps(known))
    row: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    evaluation = zoo.evaluation_set(RECIPE.images)
    modules = {
        "pretrained": zoo.pretrained("vgg-9"),
        "baseline": baseline(RECIPE, images, 0).eval(),
        "trained": shohin.load(path).module,
    }
    for key, module in modules.items():
        row[f"{key} validation"] = error(module, *images.validation)
        row[f"{key} test"] = error(module, *evaluation)
    print(row, flush=True)
    table = Table(
        f"VGG-9 split at 4x (3d, asymmetric) and trained for {EPOCHS} epochs; errors, %",
        ("images", "pretrained", "baseline trained as long", "split", "split and trained"),
    )
    for part in ("validation", "test"):
        keys = ("pretrained", "baseline", "split", "trained")
        table.add(
            part, *(f"{row[f'{key} {part}']:.2f}" if f"{key} {part}" in row else "" for key in keys)
        )
    save("low_rank_tune", [row], [table])


def _train(images: Any) -> tuple[shohin.Result, dict[str, float]]:
    """The network split and trained, and figures of before."""
    program = shohin.capture(zoo.pretrained("vgg-9"), zoo.example_inputs("vgg-9", 2), name="vgg-9")
    calibration = images.calibration(_IMAGES, 0)
    split = shohin.optimize(program, PASSES, calibration=calibration, drift=False)
    recipe = trainer(RECIPE, taught(EPOCHS, LEARNING_RATE, WEIGHT_DECAY), images, 0)
    train = replace(recipe, optimizer="adam")
    result = shohin.optimize(program, PASSES, calibration=calibration, train=train, drift=False)
    return result, {
        "speedup": result.report.before.macs / result.report.after.macs,
        "split validation": error(split.program.module, *images.validation),
    }
