"""Wide residual networks for 32 x 32 images, with one activation shared by the network.

Zagoruyko, Komodakis, "Wide Residual Networks", https://arxiv.org/abs/1605.07146. Names and layout of the weights are
those of the networks on RobustBench (``block1.layer.0.bn1``, ``.convShortcut``, ...), whose checkpoints load as they
are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..sharing import SharedActivation
from .cifar_net import CifarNet, checkpointed, conv3x3, register_variants

__all__ = ['WideResNet']


class WideBlock(nn.Module):
    """A block of norm, activation and conv, twice; (batch, in_chs, h, w) -> (batch, out_chs, h/stride, w/stride)."""

    def __init__(
            self, in_chs: int, out_chs: int, stride: int, pad_type: str, site: Callable[[], SharedActivation],
            dd: dict[str, Any]):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs, **dd)
        self.activation1 = site()
        self.conv1 = conv3x3(in_chs, out_chs, stride, pad_type, dd)
        self.bn2 = nn.BatchNorm2d(out_chs, **dd)
        self.activation = site()
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, 1, 1, bias=False, **dd)
        # As in the published networks, the shortcut exists only where the shape changes, and sees the activated input.
        self.convShortcut = nn.Conv2d(in_chs, out_chs, 1, stride, bias=False, **dd) if in_chs != out_chs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation1(self.bn1(x))
        if self.convShortcut is not None:
            x = self.convShortcut(out)
        out = self.activation(self.bn2(self.conv1(out)))
        return x + self.conv2(out)


class WideStage(nn.Module):
    """The blocks of one width. They are in a module because the published keys say ``block1.layer.0``."""

    def __init__(self, blocks: list[WideBlock]):
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(CifarNet):
    """WRN-``depth``-``width``; see `CifarNet` for the other arguments.

    Args:
        depth: number of layers, 6 n + 4.
        width: widening factor k; the stages have 16 k, 32 k and 64 k channels.
        pad_type: padding of the convolutions of stride 2: '' for one pixel on each side, 'same' as TensorFlow and JAX
            pad, an even side below or to the right alone, which DeepMind's networks have.

    Raises:
        ValueError: if depth is not 6 n + 4, or for another ``pad_type``.
    """

    stages = ('block1', 'block2', 'block3')
    if TYPE_CHECKING:  # TorchScript would take the annotations for its own
        block1: WideStage
        block2: WideStage
        block3: WideStage

    def __init__(
            self,
            depth: int = 28,
            width: int = 10,
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
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f'depth is {depth}; expected 6 n + 4, such as 16, 22, 28')
        widths = [16 * width, 32 * width, 64 * width]
        super().__init__(
            num_features=widths[-1], num_classes=num_classes, in_chans=in_chans,
            drop_rate=drop_rate, act_layer=act_layer, act_kwargs=act_kwargs, normalize=normalize, device=device,
            dtype=dtype)
        self.pad_type = pad_type
        if pad_type == 'same':
            self._mark('pad_type_same', device, dtype)
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False, **dd)
        in_chs, reduction = 16, 1
        for name, out_chs, stride in zip(self.stages, widths, (1, 2, 2)):
            blocks = [
                WideBlock(in_chs if i == 0 else out_chs, out_chs, stride if i == 0 else 1, pad_type, self._site, dd)
                for i in range((depth - 4) // 6)]
            self.add_module(name, WideStage(blocks))
            in_chs, reduction = out_chs, reduction * stride
            self.feature_info.append({'num_chs': out_chs, 'reduction': reduction, 'module': name})
        self.bn1: nn.Module = nn.BatchNorm2d(in_chs, **dd)
        self.activation: nn.Module = self._site()
        self._finish(global_pool, device, dtype)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            'stem': r'^conv1',
            'blocks': r'^block(\d+)' if coarse else [(r'^block(\d+)\.layer\.(\d+)', None), (r'^bn1', (99999,))]}

    def _empty_stage(self) -> nn.Module:
        return WideStage([])

    def _prune_norm(self) -> None:
        self.bn1, self.activation = nn.Identity(), nn.Identity()

    def forward_norm(self, x: Tensor) -> Tensor:
        return self.activation(self.bn1(x))

    def forward_stages(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return checkpointed([*self.block1.layer, *self.block2.layer, *self.block3.layer], x)
        return self.block3(self.block2(self.block1(x)))


register_variants(__name__, WideResNet, {
    f'wrn{depth}_{width}': {'depth': depth, 'width': width}
    for depth, width in (
        (10, 1), (10, 2), (16, 1), (16, 2), (16, 4), (28, 4), (28, 10), (34, 10), (34, 15), (34, 20), (40, 2), (70, 16),
        (82, 8), (94, 16), (106, 16))
}, {'pool_size': (8, 8)})
