"""Ternary networks without training: errors on test images."""

from typing import Any

from pruning_data import error, load_images
from tables import Table, save

import shohin
from shohin import zoo

NETWORKS = ("lenet-5", "resnet-20-cifar10jpeg", "resnet-32-cifar10jpeg", "vgg-9")
FORMS = {
    "layer, compensated": "scales=layer",
    "layer": "scales=layer compensate=false",
    "row, compensated": "scales=row",
    "row": "scales=row compensate=false",
}
"""The options of ``ternary-fit`` that are compared."""

_CALIBRATION = 512


def measure_fits() -> None:
    """Every network and form; nothing is chosen on the test images, each is read once a form."""
    rows = [_measure(name) for name in NETWORKS]
    table = Table(
        f"Wrong predictions, %, without training, {_CALIBRATION} calibration images",
        ("network", "float", *FORMS),
    )
    for row in rows:
        table.add(
            row["network"], f"{row['float']:.2f}", *(f"{row['errors'][form]:.2f}" for form in FORMS)
        )
    save("ternary_fit", rows, [table])


def _measure(name: str) -> dict[str, Any]:
    model = zoo.pretrained(name)
    program = shohin.capture(model, zoo.example_inputs(_architecture(name), 2), name=name)
    folded = shohin.optimize(program, "fold-bn", drift=False).program
    calibration = load_images(name, 128, 0, False).calibration(_CALIBRATION, 0)
    evaluation = zoo.evaluation_set(name)
    errors = {}
    for form, options in FORMS.items():
        text = f"ternary-fit{{{options}}}"
        made = shohin.optimize(folded, text, calibration=calibration, drift=False).program
        errors[form] = error(made.module, *evaluation)
        print(name, form, errors[form], flush=True)
    return {"network": name, "float": error(model, *evaluation), "errors": errors}


def _architecture(name: str) -> str:
    return name.removesuffix("-cifar10jpeg")
