"""How each network of the pruning benchmark is trained and pruned; chosen on validation images."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training of `shohin.Trainer`, with stochastic gradient descent and a cosine schedule.

    Attributes:
        epochs: how often it goes through the images.
        learning_rate: at the start.
        weight_decay: of weights.
        teacher: pretrained net that the network learns from as well; none where it is empty.
        ask: what the teacher is asked about: ``always`` every image as the network sees it,
            ``once`` every image and its mirror image, not shifted, which takes less time.
    """

    epochs: int
    learning_rate: float
    weight_decay: float = 5e-4
    teacher: str = ""
    ask: Literal["always", "once"] = "always"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A pruned network.

    Attributes:
        passes: the pipeline.
        retraining: of every round.
        least: times fewer parameters, biases and normalisations included.
        most: percent of test images that may be wrong; where `relative`, above the baseline's, or
            the teacher's where there is one and it is better.
        calibration: training images, as they are, that the pipeline may look at.
    """

    passes: str
    retraining: Training
    least: float
    most: float
    relative: bool = False
    calibration: int = 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A network, its baseline and its goals.

    Attributes:
        name: of the recipe.
        network: in `shohin.zoo`.
        images: the name of the pretrained net that sees the same images.
        pretrained: weights to start from; random ones where there is none.
        goals: by name.
        baseline: how the baseline is trained from the start.
        from_baseline: whether pruning starts from the baseline or from where the baseline did.
        batch: images in a batch.
        shift: furthest shift of the training images, pixels.
        mirror: whether training images are mirrored.
        precision: of the arithmetic while training.
    """

    name: str
    network: str
    images: str
    goals: Mapping[str, Goal]
    baseline: Training
    pretrained: str | None = None
    from_baseline: bool = True
    batch: int = 128
    shift: int = 2
    mirror: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"


def _prune(rounds: int, **layers: float) -> str:
    kept = ", ".join(f"{name}.weight: {density:g}" for name, density in layers.items())
    return f"prune{{densities={{{kept}}} rounds={rounds}}}, remove-dead"


_LENET_300_100 = Recipe(
    name="lenet-300-100",
    network="lenet-300-100",
    images="lenet-300-100",
    baseline=Training(epochs=40, learning_rate=0.05),
    shift=1,
    goals={
        "12x": Goal(
            passes=_prune(3, ip1=0.08, ip2=0.09, ip3=0.26),
            retraining=Training(epochs=10, learning_rate=0.02, weight_decay=1e-4),
            least=12,
            most=1.64,
        ),
        "53x": Goal(
            passes=_prune(8, ip1=0.0122, ip2=0.045, ip3=0.3),
            retraining=Training(epochs=10, learning_rate=0.02, weight_decay=5e-5),
            least=53,
            most=1.99,
        ),
    },
)
_LENET_5 = Recipe(
    name="lenet-5",
    network="lenet-5",
    images="lenet-5",
    baseline=Training(epochs=15, learning_rate=0.02),
    precision="bfloat16",
    goals={
        "12x": Goal(
            passes=_prune(2, conv1=0.66, conv2=0.12, ip1=0.08, ip2=0.19),
            retraining=Training(epochs=8, learning_rate=0.02, weight_decay=1e-4),
            least=12,
            most=0.80,
        ),
        "30x": Goal(
            passes=_prune(4, conv1=0.6, conv2=0.09, ip1=0.024, ip2=0.12),
            retraining=Training(epochs=7, learning_rate=0.02, weight_decay=1e-4),
            least=30,
            most=0.80,
        ),
        "100x": Goal(
            passes=_prune(6, conv1=0.4, conv2=0.055, ip1=0.005, ip2=0.08),
            retraining=Training(epochs=7, learning_rate=0.02, weight_decay=5e-5),
            least=100,
            most=0.91,
        ),
        "130x": Goal(
            passes=(
                "prune{granularity=channel densities={conv1.weight: 0.5, conv2.weight: 0.4, "
                "ip1.weight: 0.15} rounds=3}, remove-dead, "
                + _prune(4, conv1=0.5, conv2=0.16, ip1=0.08, ip2=0.4)
            ),
            retraining=Training(epochs=7, learning_rate=0.02, weight_decay=5e-5),
            least=130,
            most=1.0,
        ),
    },
)
_RESNET_20 = Recipe(
    name="resnet-20",
    network="resnet-20",
    images="resnet-20-cifar10jpeg",
    pretrained="resnet-20-cifar10jpeg",
    from_baseline=False,
    baseline=Training(epochs=8, learning_rate=0.01, weight_decay=1e-4),
    precision="bfloat16",
    shift=4,
    mirror=True,
    goals={
        "5x": Goal(
            passes="prune{method=obs density=0.195 scope=global}, remove-dead",
            retraining=Training(
                epochs=8, learning_rate=0.02, weight_decay=1e-4, teacher="resnet-20-cifar10jpeg"
            ),
            least=5,
            most=0.5,
            relative=True,
            calibration=1024,
        ),
    },
)
_VGG_9 = Recipe(
    name="vgg-9",
    network="vgg-9",
    images="vgg-9",
    pretrained="vgg-9",
    from_baseline=False,
    baseline=Training(epochs=4, learning_rate=0.01),
    precision="bfloat16",
    shift=4,
    mirror=True,
    goals={
        "5x": Goal(
            passes="prune{density=0.15 scope=global rounds=2}, remove-dead",
            retraining=Training(epochs=2, learning_rate=0.01),
            least=5,
            most=0.5,
            relative=True,
        ),
    },
)
_TEACHER = "resnet-32-cifar10jpeg"


def taught(epochs: int, learning_rate: float, weight_decay: float) -> Training:
    """A training of CIFAR-10 networks that learn from a larger one."""
    return Training(
        epochs=epochs,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        teacher=_TEACHER,
        ask="once",
    )


_RESNET_20_TAUGHT = replace(
    _RESNET_20,
    name="resnet-20 taught",
    baseline=taught(18, 0.02, 1e-4),
    goals={
        "3x": Goal(
            passes="prune{method=obs density=0.35 scope=global}, remove-dead",
            retraining=taught(12, 0.02, 1e-4),
            least=2.5,
            most=0.3,
            relative=True,
            calibration=1024,
        ),
    },
)
_VGG_9_TAUGHT = replace(
    _VGG_9,
    name="vgg-9 taught",
    baseline=taught(6, 0.02, 5e-4),
    goals={
        "10x": Goal(
            passes=(
                "prune{density=0.25 scope=global densities={classifier.2.weight: 0.03} rounds=2}, "
                "remove-dead"
            ),
            retraining=taught(2, 0.02, 5e-4),
            least=9,
            most=0.3,
            relative=True,
        ),
    },
)
_EVERY = (_LENET_300_100, _LENET_5, _VGG_9, _RESNET_20, _VGG_9_TAUGHT, _RESNET_20_TAUGHT)
RECIPES = {one.name: one for one in _EVERY}
