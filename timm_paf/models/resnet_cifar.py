"""Residual networks with a CIFAR stem (3 x 3, stride 1, no pooling), with one activation shared by the network.

He et al., "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385; the stem as in the networks
of the adversarial robustness literature. Names of the weights are torchvision's (``layer1.0.conv1``, ``downsample.0``,
``fc``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..sharing import SharedActivation
from .cifar_net import CifarNet, checkpointed, register_variants

__all__ = ['ResNetCifar']


def _downsample(in_chs: int, out_chs: int, stride: int, dd: dict[str, Any]) -> nn.Module:
    if stride == 1 and in_chs == out_chs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_chs, out_chs, 1, stride, bias=False, **dd), nn.BatchNorm2d(out_chs, **dd))


class BasicBlock(nn.Module):
    """A block of two 3 x 3 convolutions; (batch, in_chs, h, w) -> (batch, planes, h / stride, w / stride)."""

    expansion = 1

    def __init__(self, in_chs: int, planes: int, stride: int, site: Callable[[], SharedActivation], dd: dict[str, Any]):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, planes, 3, stride, 1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(planes, **dd)
        self.act1 = site()
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(planes, **dd)
        self.downsample = _downsample(in_chs, planes, stride, dd)
        self.act2 = site()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(nn.Module):
    """A block of 1 x 1, 3 x 3, 1 x 1 convolutions; (batch, in_chs, h, w) -> (batch, 4 planes, h/stride, w/stride)."""

    expansion = 4

    def __init__(self, in_chs: int, planes: int, stride: int, site: Callable[[], SharedActivation], dd: dict[str, Any]):
        super().__init__()
        out_chs = planes * self.expansion
        self.conv1 = nn.Conv2d(in_chs, planes, 1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(planes, **dd)
        self.act1 = site()
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(planes, **dd)
        self.act2 = site()
        self.conv3 = nn.Conv2d(planes, out_chs, 1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(out_chs, **dd)
        self.downsample = _downsample(in_chs, out_chs, stride, dd)
        self.act3 = site()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        return self.act3(self.bn3(self.conv3(out)) + self.downsample(x))


class ResNetCifar(CifarNet):
    """A ResNet for small images; see `CifarNet` for the other arguments.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: number of blocks in each of the four stages.
        base_width: channels of the stem and the first stage; the published networks have 64.
    """

    stages = ('layer1', 'layer2', 'layer3', 'layer4')
    if TYPE_CHECKING:  # TorchScript would take the annotations for its own
        layer1: nn.Sequential
        layer2: nn.Sequential
        layer3: nn.Sequential
        layer4: nn.Sequential

    def __init__(
            self,
            block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
            layers: tuple[int, int, int, int] = (2, 2, 2, 2),
            base_width: int = 64,
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.0,
            act_layer: str = 'relu',
            act_kwargs: dict[str, Any] | None = None,
            normalize: Any = None,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ):
        super().__init__(
            num_features=8 * base_width * block.expansion, num_classes=num_classes, in_chans=in_chans,
            drop_rate=drop_rate, act_layer=act_layer, act_kwargs=act_kwargs, normalize=normalize, device=device,
            dtype=dtype)
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.conv1 = nn.Conv2d(in_chans, base_width, 3, 1, 1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(base_width, **dd)
        self.act1 = self._site()
        in_chs, reduction = base_width, 1
        for i, (name, depth) in enumerate(zip(self.stages, layers)):
            planes, stride, blocks = base_width * 2 ** i, 1 if i == 0 else 2, []
            for j in range(depth):
                blocks.append(block(in_chs, planes, stride if j == 0 else 1, self._site, dd))
                in_chs = planes * block.expansion
            self.add_module(name, nn.Sequential(*blocks))
            reduction *= stride
            self.feature_info.append({'num_chs': in_chs, 'reduction': reduction, 'module': name})
        self._finish(global_pool, device, dtype)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {'stem': r'^conv1|^bn1', 'blocks': r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)'}

    def forward_stem(self, x: Tensor) -> Tensor:
        return self.act1(self.bn1(self.conv1(x)))

    def forward_stages(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return checkpointed([*self.layer1, *self.layer2, *self.layer3, *self.layer4], x)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


register_variants(__name__, ResNetCifar, {
    'resnet18_w8': {'block': BasicBlock, 'layers': (2, 2, 2, 2), 'base_width': 8},
    'resnet18_w16': {'block': BasicBlock, 'layers': (2, 2, 2, 2), 'base_width': 16},
    'resnet18_w32': {'block': BasicBlock, 'layers': (2, 2, 2, 2), 'base_width': 32},
    'resnet18': {'block': BasicBlock, 'layers': (2, 2, 2, 2)},
    'resnet34': {'block': BasicBlock, 'layers': (3, 4, 6, 3)},
    'resnet50': {'block': Bottleneck, 'layers': (3, 4, 6, 3)},
}, {'pool_size': (4, 4)})
