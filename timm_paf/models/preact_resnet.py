"""Pre-activation ResNets with a CIFAR stem, with one activation shared by the network.

He et al., "Identity Mappings in Deep Residual Networks", https://arxiv.org/abs/1603.05027. Names of the weights are
torchvision's (``layer1.0.conv1``, ``downsample.0``, ``fc``) and ``bn`` for the last norm. The networks that RobustBench
has under this name differ in their shortcuts and in whether there is a last norm; arguments tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..sharing import SharedActivation
from .cifar_net import CifarNet, checkpointed, conv3x3, register_variants

__all__ = ['PreActResNet']


class PreActBlock(nn.Module):
    """A block of norm, activation and conv, twice; (batch, in_chs, h, w) -> (batch, out_chs, h/stride, w/stride)."""

    def __init__(
            self, in_chs: int, out_chs: int, stride: int, pad_type: str, shortcut: str,
            site: Callable[[], SharedActivation], dd: dict[str, Any]):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs, **dd)
        self.act1 = site()
        self.conv1 = conv3x3(in_chs, out_chs, stride, pad_type, dd)
        self.bn2 = nn.BatchNorm2d(out_chs, **dd)
        self.act2 = site()
        self.conv2 = conv3x3(out_chs, out_chs, 1, pad_type, dd)
        self.shortcut_of_preact = shortcut == 'preact'
        self.downsample: nn.Module | None = None
        if stride != 1 or in_chs != out_chs:
            self.downsample = nn.Sequential(
                conv3x3(in_chs, out_chs, stride, pad_type, dd) if shortcut == 'conv3x3'
                else nn.Conv2d(in_chs, out_chs, 1, stride, bias=False, **dd))

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(x))
        if self.downsample is not None:
            x = self.downsample(out if self.shortcut_of_preact else x)
        return self.conv2(self.act2(self.bn2(self.conv1(out)))) + x


class PreActResNet(CifarNet):
    """A pre-activation ResNet for small images; see `CifarNet` for the other arguments.

    Args:
        layers: number of blocks in each of the four stages.
        base_width: channels of the stem and the first stage; the published networks have 64.
        shortcut: where the shape changes, a 1 x 1 convolution of the activated input ('preact'), of the input itself
            ('input'), or a 3 x 3 convolution of the input itself ('conv3x3', as in DeepMind's).
        final_norm: whether a norm and an activation come before the pooling.
        pad_type: as in `timm_paf.models.wide_resnet.WideResNet`.

    Raises:
        ValueError: for another ``shortcut`` or ``pad_type``.
    """

    stages = ('layer1', 'layer2', 'layer3', 'layer4')
    if TYPE_CHECKING:  # TorchScript would take the annotations for its own
        layer1: nn.Sequential
        layer2: nn.Sequential
        layer3: nn.Sequential
        layer4: nn.Sequential

    def __init__(
            self,
            layers: tuple[int, int, int, int] = (2, 2, 2, 2),
            base_width: int = 64,
            shortcut: str = 'preact',
            final_norm: bool = True,
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.0,
            act_layer: str = 'relu',
            act_kwargs: dict[str, Any] | None = None,
            normalize: Any = None,
            pad_type: str = '',
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ):
        if shortcut not in ('preact', 'input', 'conv3x3'):
            raise ValueError(f"shortcut is {shortcut!r}; expected 'preact', 'input' or 'conv3x3'")
        super().__init__(
            num_features=8 * base_width, num_classes=num_classes, in_chans=in_chans, drop_rate=drop_rate,
            act_layer=act_layer, act_kwargs=act_kwargs, normalize=normalize, device=device, dtype=dtype)
        self.pad_type = pad_type
        if pad_type == 'same':
            self._mark('pad_type_same', device, dtype)
        if shortcut == 'input':
            self._mark('shortcut_input', device, dtype)
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.conv1 = nn.Conv2d(in_chans, base_width, 3, 1, 1, bias=False, **dd)
        in_chs, reduction = base_width, 1
        for i, (name, depth) in enumerate(zip(self.stages, layers)):
            out_chs, stride, blocks = base_width * 2 ** i, 1 if i == 0 else 2, []
            for j in range(depth):
                blocks.append(
                    PreActBlock(in_chs, out_chs, stride if j == 0 else 1, pad_type, shortcut, self._site, dd))
                in_chs = out_chs
            self.add_module(name, nn.Sequential(*blocks))
            reduction *= stride
            self.feature_info.append({'num_chs': in_chs, 'reduction': reduction, 'module': name})
        self.bn: nn.Module = nn.BatchNorm2d(in_chs, **dd) if final_norm else nn.Identity()
        self.act2: nn.Module = self._site() if final_norm else nn.Identity()
        self._finish(global_pool, device, dtype)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            'stem': r'^conv1',
            'blocks': r'^layer(\d+)' if coarse else [(r'^layer(\d+)\.(\d+)', None), (r'^bn', (99999,))]}

    def _prune_norm(self) -> None:
        self.bn, self.act2 = nn.Identity(), nn.Identity()

    def forward_norm(self, x: Tensor) -> Tensor:
        return self.act2(self.bn(x))

    def forward_stages(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return checkpointed([*self.layer1, *self.layer2, *self.layer3, *self.layer4], x)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


register_variants(__name__, PreActResNet, {'preact_resnet18': {}, 'preact_resnet34': {'layers': (3, 4, 6, 3)}},
                  {'pool_size': (4, 4)})
