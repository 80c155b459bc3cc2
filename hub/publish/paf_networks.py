"""Residual networks with one parametric activation function (PAF) shared by the whole network.

Dai, Mahloujifar, Mittal, "Parameterizing Activation Functions for Adversarial Robustness",
https://arxiv.org/abs/2110.05626. Images are in [0, 1], without mean and std. This file imports torch alone, so that it
can stand in another code base: `hub.bundle` gives it to RobustBench, which loads weights of timm_paf with it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PAFS: dict[str, tuple[Callable[..., Tensor], dict[str, float]]] = {  # formula, and initial values of its parameters
    'prelu': (lambda x, alpha: torch.where(x > 0, x, alpha * x), {'alpha': 0.0}),
    'prelu_plus': (lambda x, alpha: alpha * F.relu(x), {'alpha': 1.0}),
    'pelu': (lambda x, alpha: torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0))), {'alpha': 1.0}),
    # x^2 / (sqrt(x^2 + 1) + 1) is sqrt(x^2 + 1) - 1 without its cancellation near 0.
    'reblu': (lambda x, alpha: F.relu(x) + alpha * (F.relu(x)**2 / ((x * x + 1).sqrt() + 1)), {'alpha': 0.0}),
    'psoftplus': (lambda x, alpha: F.softplus(alpha * x, threshold=40.0) / alpha, {'alpha': 1.0}),
    'psilu': (lambda x, alpha: x * torch.sigmoid(alpha.abs() * x), {'alpha': 1.0}),
    'ssilu': (lambda x, beta: x * ((torch.sigmoid(x) - beta) / (1 - beta)), {'beta': 0.3}),
    'pssilu': (lambda x, alpha, beta: x * ((torch.sigmoid(alpha.abs() * x) - beta.abs()) / (1 - beta.abs())),
               {'alpha': 1.0, 'beta': 1e-8}),
}


class PAF(nn.Module):
    """A parametric activation by its name: prelu, prelu_plus, pelu, reblu, psoftplus, psilu, ssilu or pssilu."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        for key, value in _PAFS[name][1].items():
            self.register_parameter(key, nn.Parameter(torch.tensor([value])))

    def forward(self, x: Tensor) -> Tensor:
        formula, start = _PAFS[self.name]
        return formula(x, *(getattr(self, key) for key in start))


class _WideBlock(nn.Module):
    def __init__(self, activation: nn.Module, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.activation = activation
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False) if in_planes != planes else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(x))
        if self.convShortcut is not None:
            x = self.convShortcut(out)
        return x + self.conv2(self.activation(self.bn2(self.conv1(out))))


class PAFWideResNet(nn.Module):
    """A WRN-``depth``-``widen_factor``, where ``activation`` is a `PAF` or any other module."""

    block1: nn.Module
    block2: nn.Module
    block3: nn.Module

    def __init__(self, activation: nn.Module, depth: int = 28, widen_factor: int = 10, num_classes: int = 10):
        super().__init__()
        planes = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = nn.Conv2d(3, planes[0], 3, 1, 1, bias=False)
        for i, stride in ((1, 1), (2, 2), (3, 2)):
            blocks = [_WideBlock(activation, planes[i - 1], planes[i], stride)]
            blocks += [_WideBlock(activation, planes[i], planes[i], 1) for _ in range((depth - 4) // 6 - 1)]
            self.add_module(f'block{i}', nn.Sequential(OrderedDict(layer=nn.Sequential(*blocks))))
        self.bn1 = nn.BatchNorm2d(planes[3])
        self.activation = activation
        self.fc = nn.Linear(planes[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(self.activation(self.bn1(x)), 1).flatten(1))


class _Block(nn.Module):
    def __init__(self, activation: nn.Module, in_planes: int, planes: int, stride: int, bottleneck: bool):
        super().__init__()
        out_planes = 4 * planes if bottleneck else planes
        kernels, widths = ((1, 3, 1), (in_planes, planes, planes, out_planes)) if bottleneck else \
            ((3, 3), (in_planes, planes, planes))
        self.n = len(kernels)
        for i, size in enumerate(kernels):
            step = stride if i == (1 if bottleneck else 0) else 1
            self.add_module(f'conv{i + 1}', nn.Conv2d(widths[i], widths[i + 1], size, step, size // 2, bias=False))
            self.add_module(f'bn{i + 1}', nn.BatchNorm2d(widths[i + 1]))
        self.activation = activation
        self.downsample = nn.Identity() if stride == 1 and in_planes == out_planes else nn.Sequential(
            nn.Conv2d(in_planes, out_planes, 1, stride, bias=False), nn.BatchNorm2d(out_planes))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i in range(1, self.n + 1):
            out = getattr(self, f'bn{i}')(getattr(self, f'conv{i}')(out))
            out = self.activation(out if i < self.n else out + self.downsample(x))
        return out


class PAFResNet(nn.Module):
    """A ResNet with a stem for small images, where ``activation`` is a `PAF` or any other module.

    The first stage has ``base_width`` channels, each later one twice as many as the one before.
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self, activation: nn.Module, layers: tuple[int, int, int, int] = (2, 2, 2, 2),
                 bottleneck: bool = False, num_classes: int = 10, base_width: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, base_width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(base_width)
        self.activation = activation
        in_planes = base_width
        for i, n in enumerate(layers):
            blocks, planes = [], base_width * 2**i
            for j in range(n):
                blocks.append(_Block(activation, in_planes, planes, 2 if i > 0 and j == 0 else 1, bottleneck))
                in_planes = planes * (4 if bottleneck else 1)
            self.add_module(f'layer{i + 1}', nn.Sequential(*blocks))
        self.fc = nn.Linear(in_planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
