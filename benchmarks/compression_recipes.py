"""What is made of the pruned networks of `pruning_recipes`; chosen on validation images."""

from dataclasses import dataclass

from pruning_recipes import Training, taught


@dataclass(frozen=True, kw_only=True)
class Compression:
    """A compressed network.

    Attributes:
        recipe: how the pruned network that it is made from was trained.
        pruned: the goal of that recipe; None to start where the recipe itself starts.
        passes: the pipeline.
        tuning: of what is shared; None for none.
        most_bytes: of the file; None where `least` counts.
        least: times smaller than the weights in float32.
        most_error: percent of test images that may be wrong; above the baseline's where `relative`.
        relative: see `most_error`.
        paper: what Deep Compression reports.
        calibration: training images, as they are, that the pipeline may look at.
    """

    recipe: str
    pruned: str | None
    passes: str
    most_error: float
    tuning: Training | None = None
    most_bytes: int | None = None
    least: float = 0.0
    relative: bool = False
    paper: str = ""
    calibration: int = 512


_TUNING = Training(epochs=2, learning_rate=0.05, weight_decay=0.0)

COMPRESSIONS = {
    "lenet-300-100": Compression(
        recipe="lenet-300-100",
        pruned="53x",
        passes="share-weights{bits=4 biases=4}, entropy-code",
        tuning=_TUNING,
        most_bytes=8_500,
        most_error=1.64,
        paper="27 KB, 1.58 %",
    ),
    "lenet-5": Compression(
        recipe="lenet-5",
        pruned="30x",
        passes="share-weights{bits=4 biases=4}, entropy-code",
        tuning=_TUNING,
        most_bytes=25_000,
        most_error=0.80,
        paper="44 KB, 0.74 %",
    ),
    "lenet-5 smallest": Compression(
        recipe="lenet-5",
        pruned="130x",
        passes="share-weights{bits=3 biases=4 compensate=true}, entropy-code",
        most_bytes=4_000,
        most_error=1.0,
        paper="44 KB, 0.74 %",
        calibration=1024,
    ),
    "vgg-9": Compression(
        recipe="vgg-9 taught",
        pruned=None,
        passes=(
            "prune{density=0.3 scope=global densities={classifier.2.weight: 0.04} retrain=none}, "
            "remove-dead, share-weights{bits=4 assignments=trained}, entropy-code"
        ),
        tuning=taught(6, 0.02, 5e-4),
        least=30,
        most_error=0.3,
        relative=True,
    ),
    "resnet-20": Compression(
        recipe="resnet-20 taught",
        pruned="3x",
        passes="fold-bn, share-weights{bits=4 compensate=true}, entropy-code",
        tuning=taught(2, 0.003, 0.0),
        least=12,
        most_error=0.3,
        relative=True,
    ),
}
