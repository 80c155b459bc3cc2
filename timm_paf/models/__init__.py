"""The networks, and their names in timm: importing this registers them."""

from . import preact_resnet, resnet_cifar, resnet_imagenet, timm_imagenet, wide_resnet  # noqa: F401
