"""What is made of the pruned networks of `pruning_recipes`; chosen on validation images."""

from dataclasses import dataclass

from pruning_recipes import Training


@dataclass(frozen=True, kw_only=True)
class Compression:
    """A compressed network.

    Attributes:
        network: in `shohin.zoo`.
        pruned: name of the pruned network that it is made from.
        passes: the pipeline.
        tuning: of the centroids.
        most_bytes: of the file; None where `least` counts.
        least: times smaller than the weights in float32.
        most_error: percent of test images that may be wrong; above the baseline's where `relative`.
        relative: see `most_error`.
        paper: what Deep Compression reports.
    """

    network: str
    pruned: str
    passes: str
    tuning: Training
    most_error: float
    most_bytes: int | None = None
    least: float = 0.0
    relative: bool = False
    paper: str = ""


_TUNING = Training(epochs=2, learning_rate=0.05, weight_decay=0.0)

COMPRESSIONS = {
    "lenet-300-100": Compression(
        network="lenet-300-100",
        pruned="53x",
        passes="share-weights{bits=4 biases=4}, entropy-code",
        tuning=_TUNING,
        most_bytes=8_500,
        most_error=1.64,
        paper="27 KB, 1.58 %",
    ),
    "lenet-5": Compression(
        network="lenet-5",
        pruned="30x",
        passes="share-weights{bits=4 biases=4}, entropy-code",
        tuning=_TUNING,
        most_bytes=25_000,
        most_error=0.80,
        paper="44 KB, 0.74 %",
    ),
    "lenet-5 smallest": Compression(
        network="lenet-5",
        pruned="100x",
        passes="share-weights{bits=3 biases=4}, entropy-code",
        tuning=_TUNING,
        most_bytes=4_000,
        most_error=1.0,
        paper="44 KB, 0.74 %",
    ),
    "vgg-9": Compression(
        network="vgg-9",
        pruned="5x",
        passes="share-weights{target_bytes=424000}, entropy-code",
        tuning=Training(epochs=1, learning_rate=0.01, weight_decay=0.0),
        least=30,
        most_error=0.3,
        relative=True,
    ),
    "resnet-20": Compression(
        network="resnet-20",
        pruned="5x",
        passes="share-weights{bits=5}, entropy-code",
        tuning=Training(epochs=1, learning_rate=0.01, weight_decay=0.0),
        least=12,
        most_error=0.3,
        relative=True,
    ),
}
