"""The networks, and their names in timm: importing this registers them."""

from . import resnet_cifar, resnet_imagenet, wide_resnet  # noqa: F401
