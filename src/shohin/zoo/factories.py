"""One factory per model, for use as `shohin.zoo:resnet20` on the command line.

Each returns the model in evaluation mode with random weights of the given seed.
"""

from torch import nn

from shohin.zoo.registry import build


def lenet_300_100(seed: int = 0) -> nn.Module:
    """LeNet-300-100: input `[batch, 784]`."""
    return build("lenet-300-100", seed)


def lenet5(seed: int = 0) -> nn.Module:
    """LeNet-5 in Caffe's form: input `[batch, 1, 28, 28]`."""
    return build("lenet-5", seed)


def resnet20(seed: int = 0) -> nn.Module:
    """CIFAR ResNet-20: input `[batch, 3, 32, 32]`."""
    return build("resnet-20", seed)


def resnet32(seed: int = 0) -> nn.Module:
    """CIFAR ResNet-32: input `[batch, 3, 32, 32]`."""
    return build("resnet-32", seed)


def resnet44(seed: int = 0) -> nn.Module:
    """CIFAR ResNet-44: input `[batch, 3, 32, 32]`."""
    return build("resnet-44", seed)


def resnet56(seed: int = 0) -> nn.Module:
    """CIFAR ResNet-56: input `[batch, 3, 32, 32]`."""
    return build("resnet-56", seed)


def vgg9(seed: int = 0) -> nn.Module:
    """VGG-9: input `[batch, 3, 32, 32]`."""
    return build("vgg-9", seed)


def vgg16(seed: int = 0) -> nn.Module:
    """VGG-16: input `[batch, 3, 224, 224]`."""
    return build("vgg-16", seed)


def alexnet(seed: int = 0) -> nn.Module:
    """AlexNet in torchvision's form: input `[batch, 3, 224, 224]`."""
    return build("alexnet", seed)


def alexnet_lrn(seed: int = 0) -> nn.Module:
    """AlexNet in its original form: input `[batch, 3, 227, 227]`."""
    return build("alexnet-lrn", seed)


def squeezenet1_0(seed: int = 0) -> nn.Module:
    """SqueezeNet 1.0: input `[batch, 3, 227, 227]`."""
    return build("squeezenet-1.0", seed)


def squeezenet1_1(seed: int = 0) -> nn.Module:
    """SqueezeNet 1.1: input `[batch, 3, 227, 227]`."""
    return build("squeezenet-1.1", seed)


def resnet18(seed: int = 0) -> nn.Module:
    """ResNet-18: input `[batch, 3, 224, 224]`."""
    return build("resnet-18", seed)


def resnet50(seed: int = 0) -> nn.Module:
    """ResNet-50: input `[batch, 3, 224, 224]`."""
    return build("resnet-50", seed)


def mobilenet_v2(seed: int = 0) -> nn.Module:
    """MobileNetV2: input `[batch, 3, 224, 224]`."""
    return build("mobilenet-v2", seed)


def vit_tiny(seed: int = 0) -> nn.Module:
    """Small vision transformer: input `[batch, 3, 32, 32]`."""
    return build("vit-tiny", seed)


def encoder_tiny(seed: int = 0) -> nn.Module:
    """Small transformer encoder: int64 token ids `[batch, 64]`."""
    return build("encoder-tiny", seed)
