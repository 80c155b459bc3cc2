"""timm's residual networks with the ImageNet stem (7 x 7, stride 2, pooling), one activation shared by the network.

He et al., "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385. Blocks and names of the
weights are timm's, whose published ReLU weights can be a start: `weights_from_timm`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from ..activations import create_paf, values_given
from ..normalize import Normalize, create_normalize
from ..sharing import SharedActivation, share_pafs
from ..starts import STARTS
from .cifar_net import register_variants

__all__ = ['CenteredConv2d', 'ResNetImageNet', 'weights_from_timm']


class CenteredConv2d(nn.Conv2d):
    """A convolution of what differs from the mean image, so that its zero padding is padding with the mean.

    Networks trained on normalised images pad with zeros after the normalisation; no weight and bias of a convolution of
    images in [0, 1] do the same at the border. The standard deviations are in the weight. The mean is saved with it: a
    weight without its mean is another network.
    """

    if TYPE_CHECKING:  # TorchScript would take the annotation for its own
        mean: Tensor

    def __init__(self, conv: nn.Conv2d):
        super().__init__(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,  # type: ignore[arg-type]
            bias=False, device='meta')
        self.weight = conv.weight
        self.register_buffer('mean', self.mean_image(IMAGENET_DEFAULT_MEAN))

    def mean_image(self, mean: tuple[float, ...]) -> Tensor:
        """Returns the mean as (in_channels, 1, 1); images without three channels have the mean of the means in each."""
        if self.in_channels != len(mean):
            mean = (sum(mean) / len(mean),) * self.in_channels
        return torch.tensor(mean, device=self.weight.device, dtype=self.weight.dtype).view(-1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x - self.mean, self.weight, self.bias)


class ResNetImageNet(ResNet):  # type: ignore[misc]  # timm has no types
    """timm's ResNet for images in [0, 1], without mean and std.

    Args:
        block: timm's `BasicBlock` or `Bottleneck`.
        layers: number of blocks in each of the four stages.
        channels: channels of each stage, before the expansion of a `Bottleneck`.
        base_width: channels of the 3 x 3 convolutions of a `Bottleneck` in the first stage; 128 is a Wide ResNet-50-2.
        act_layer: name of the activation, one of ``timm_paf.list_pafs(plain=True)``.
        act_kwargs: arguments for `timm_paf.create_paf`.
        normalize: (mean, std) by channel of the normalisation, which goes into ``conv1``: that of the weights of timm
            that it starts from, see `weights_from_timm`. None is ImageNet's mean, with a standard deviation of 1 before
            there are such weights.
        num_classes, in_chans, global_pool, output_stride, drop_rate, drop_path_rate: as in timm's ResNet.
        device, dtype: where the parameters are created, and their type, also with a timm that lacks these arguments.
    """

    stages = ('act1', 'layer1', 'layer2', 'layer3', 'layer4')
    if TYPE_CHECKING:  # TorchScript would take the annotations for its own
        conv1: CenteredConv2d
        weights_from_timm: Any
        _modules: dict[str, nn.Module | None]

    def __init__(
            self,
            block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
            layers: tuple[int, int, int, int] = (2, 2, 2, 2),
            channels: tuple[int, int, int, int] = (64, 128, 256, 512),
            base_width: int = 64,
            num_classes: int = 1000,
            in_chans: int = 3,
            global_pool: str = 'avg',
            output_stride: int = 32,
            drop_rate: float = 0.0,
            drop_path_rate: float = 0.0,
            act_layer: str = 'relu',
            act_kwargs: dict[str, Any] | None = None,
            normalize: Any = None,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
    ):
        with torch.device(device) if device is not None else nullcontext():
            act = create_paf(act_layer, **(act_kwargs or {}))
            super().__init__(
                block, layers, num_classes=num_classes, in_chans=in_chans, output_stride=output_stride,
                global_pool=global_pool, channels=channels, base_width=base_width, drop_rate=drop_rate,
                drop_path_rate=drop_path_rate, act_layer=lambda inplace: SharedActivation(act))
        self.conv1 = CenteredConv2d(self.conv1)
        self.start_normalize: Any = (None, None)
        if normalize == 'image':
            raise ValueError("normalize is 'image'; expected None, or (mean, std) by channel, for an ImageNet network")
        module = create_normalize(normalize, in_chans, self.conv1.weight.device, None)
        if isinstance(module, Normalize):
            self.start_normalize = tuple(tuple(values) for values in normalize)
            self.conv1.mean = module.mean
            with torch.no_grad():
                self.conv1.weight.div_(module.std)
        # The activation comes first, so that its values are saved as `act.alpha`; timm's constructor starts afresh.
        self._modules = {'act': act, **self._modules}
        share_pafs(self)
        self.act_layer = self.built_with = act_layer
        given = values_given(act_layer, act_kwargs or {})
        self.relu_start = {name: value for name, value in STARTS['relu'].get(act_layer, {}).items()
                           if name not in given} | (act_kwargs or {})
        self.to(dtype=dtype)


def weights_from_timm(
        state_dict: dict[str, Tensor], model: ResNetImageNet, mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None) -> dict[str, Tensor]:
    """Converts weights of timm's ResNet to a start: the same function of images in [0, 1], but for the activation.

    timm's networks see normalised images. The activation takes the values that make it ReLU, or bring it close, unless
    ``act_kwargs`` gave others; after `convert_activations` its values are left out. Weights of `ResNetImageNet` pass as
    they are.

    Args:
        state_dict: weights of timm's ``resnet18``, ``resnet34``, ``resnet50`` or of ours.
        model: the network that will load the weights.
        mean, std: mean and standard deviation of the normalisation, by channel. The default is the network's
            ``normalize``, that of timm's table if the ``hf_hub_id`` in the model's ``pretrained_cfg`` is one of timm's,
            and for another file ImageNet's, as nearly all of timm's files have it.

    Raises:
        RuntimeError: if the ``hf_hub_id`` is ``timm/...`` and none that timm knows; timm raises it.
    """
    state = dict(state_dict)
    if 'conv1.mean' not in state and 'conv1.weight' in state:
        mean, std = mean or model.start_normalize[0], std or model.start_normalize[1]
        source = getattr(model, 'pretrained_cfg', {}).get('hf_hub_id') or ''
        cfg = get_pretrained_cfg(source.removeprefix('timm/')) if source.startswith('timm/') else None
        mean = mean or (cfg.mean if cfg else IMAGENET_DEFAULT_MEAN)
        std = std or (cfg.std if cfg else IMAGENET_DEFAULT_STD)
        state['conv1.weight'] = state['conv1.weight'] / state['conv1.weight'].new_tensor(std).view(-1, 1, 1)
        state['conv1.mean'] = model.conv1.mean_image(mean)
        if model.act_layer == model.built_with:  # of another, by convert_activations, the values are not these
            for name, value in model.act.state_dict().items():
                state[f'act.{name}'] = torch.full_like(value, model.relu_start.get(name, value.item()))
    elif 'conv1.mean' in state and len(state['conv1.mean']) != model.conv1.in_channels:  # timm adapts the weight
        state['conv1.mean'] = model.conv1.mean_image(tuple(state['conv1.mean'].flatten().tolist()))
    return state


ResNetImageNet.weights_from_timm = staticmethod(weights_from_timm)  # where weights.initial finds it
register_variants(__name__, ResNetImageNet, {
    'resnet18_in': {'block': BasicBlock, 'layers': (2, 2, 2, 2)},
    'resnet34_in': {'block': BasicBlock, 'layers': (3, 4, 6, 3)},
    'resnet50_in': {'block': Bottleneck, 'layers': (3, 4, 6, 3)},
    'wide_resnet50_2_in': {'block': Bottleneck, 'layers': (3, 4, 6, 3), 'base_width': 128},
}, {'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7), 'crop_pct': 0.875},
    filter_fn=weights_from_timm)
