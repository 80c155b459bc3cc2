"""The parts that the CIFAR networks share: one activation, head, features, and their registration with timm."""

# No `from __future__ import annotations`: FX copies annotations of forward() into its code, and TorchScript reads no
# strings.

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices  # it is public only in newer timm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..activations import create_paf, list_pafs
from ..normalize import create_normalize
from ..sharing import SharedActivation, share_pafs
from ..weights.zoo import Weights, build_model, weights_of

__all__ = ['VARIANTS', 'CifarNet', 'Variant', 'checkpointed', 'conv3x3', 'register_variants', 'register_with_weights']


class Variant(NamedTuple):
    """What a registered name stands for."""

    model_cls: Callable[..., nn.Module]
    act: str
    args: dict[str, Any]
    """The arguments of the class beside the activation."""


VARIANTS: dict[str, Variant] = {}
"""The networks of `register_variants` by name, the one table of their classes and sizes."""


def checkpointed(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Runs blocks one after another, and keeps for the backward pass what goes into each alone.

    An older timm's checkpoint_seq does it with reentrant checkpoints, through which an attack can't have the gradient
    of the images alone.
    """
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return x


class _PaddedConv2d(nn.Conv2d):
    """A 3 x 3 convolution of stride 2 that pads an odd side at both ends, an even one below or to the right alone."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2] % 2, x.shape[3] % 2
        return self._conv_forward(F.pad(x, (width, 1, height, 1)), self.weight, self.bias)


def conv3x3(in_chs: int, out_chs: int, stride: int, pad_type: str, dd: dict[str, Any]) -> nn.Conv2d:
    """Returns a 3 x 3 convolution without bias; ``pad_type`` 'same' pads one of stride 2 as TensorFlow does.

    Raises:
        ValueError: for another ``pad_type`` than '' and 'same'.
    """
    if pad_type not in ('', 'same'):
        raise ValueError(f"pad_type is {pad_type!r}; expected '' or 'same'")
    if pad_type and stride == 2:
        return _PaddedConv2d(in_chs, out_chs, 3, stride, 0, bias=False, **dd)
    return nn.Conv2d(in_chs, out_chs, 3, stride, 1, bias=False, **dd)


class CifarNet(nn.Module):
    """Stem, stages, pooled linear head, and one activation that every site of the network shares.

    Input is (batch, in_chans, height, width) in [0, 1], of any size, whatever ``normalize`` is; output is logits
    (batch, num_classes). A subclass builds ``conv1``, the stages named in `stages`, and may override
    `forward_stem` and `forward_norm`.

    Args:
        num_features: channels of the last stage.
        num_classes: number of logits; 0 for features alone.
        in_chans: channels of the images.
        drop_rate: dropout before the classifier.
        act_layer: name of the activation, one of ``timm_paf.list_pafs(plain=True)``.
        act_kwargs: arguments for `timm_paf.create_paf`, such as ``dict(beta=0.3, frozen=('beta',))``.
        normalize: what the network does with its input first: None for nothing, (mean, std) by channel, or 'image' to
            standardise each image by itself. Attacks see images in [0, 1] all the same.
        device, dtype: where the parameters are created, and their type.
    """

    stages: tuple[str, ...]
    if TYPE_CHECKING:  # TorchScript would take the annotation for its own
        conv1: nn.Conv2d

    def __init__(
            self,
            *,
            num_features: int,
            num_classes: int,
            in_chans: int,
            drop_rate: float,
            act_layer: str,
            act_kwargs: dict[str, Any] | None,
            normalize: Any,
            device: torch.device | str | None,
            dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = num_features
        self.grad_checkpointing = False
        self.feature_info: list[dict[str, Any]] = []
        # Registered first, so that `act.alpha` is the name under which its values are saved.
        self.act = create_paf(act_layer, **(act_kwargs or {}), device=device, dtype=dtype)
        self.act_layer = act_layer
        self.normalize = create_normalize(normalize, in_chans, device, dtype)
        if normalize == 'image':
            self._mark('normalize_image', device, dtype)
        share_pafs(self)

    def _mark(self, what: str, device: Any, dtype: Any) -> None:
        """Leaves a trace in the weights of an argument that none of them would show: they are of another network."""
        self.register_buffer(f'variant_{what}', torch.ones(1, device=device, dtype=dtype))

    def _site(self) -> SharedActivation:
        return SharedActivation(self.act)

    def _finish(self, global_pool: str, device: Any, dtype: Any) -> None:
        """Adds the head, then draws weights as in He et al. 2015 (fan out), as the published networks do."""
        if not global_pool and self.num_classes > 0:
            raise _no_pool(self.num_classes)
        self._set_head(global_pool, device, dtype)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            elif isinstance(module, nn.Linear) and not module.weight.is_meta:
                nn.init.zeros_(module.bias)

    def _set_head(self, pool_type: str, device: Any, dtype: Any) -> None:
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.fc = nn.Linear(self.head_hidden_size, self.num_classes, device=device, dtype=dtype) \
            if self.num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        raise AssertionError('each architecture defines its groups')

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()  # the paper decays every parameter, alpha and beta too

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head; ``global_pool`` None keeps the pooling, '' removes it.

        A classifier after a removed pooling has 'avg' again.
        """
        if global_pool == '' and num_classes > 0:
            raise _no_pool(num_classes)
        self.num_classes = num_classes
        weight, training = self.conv1.weight, self.fc.training
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        pool = pool or ('avg' if num_classes > 0 else '')
        self._set_head(pool, weight.device, weight.dtype)
        self.global_pool.train(training)
        self.fc.train(training)

    def forward_intermediates(
            self,
            x: Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Returns the final features and the features after each stage.

        Args:
            x: images (batch, in_chans, height, width).
            indices: the last n stages if an int, all stages if None, else the stages with these numbers.
            norm: whether to apply the final norm and activation to the features of the last stage (in networks that
                normalise before a block).
            stop_early: whether to stop after the last stage that is wanted.
            output_fmt: 'NCHW'.
            intermediates_only: whether to return the list of features after the stages alone.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt is {output_fmt!r}; expected 'NCHW'")
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.forward_stem(self.forward_input(x))
        for index, name in enumerate(self.stages[:last + 1] if stop_early else self.stages):
            x = getattr(self, name)(x)
            if index in take:
                is_final = index == len(self.stages) - 1
                intermediates.append(self.forward_norm(x) if norm and is_final else x)
        if intermediates_only:
            return intermediates
        return (x if stop_early and last < len(self.stages) - 1 else self.forward_norm(x)), intermediates

    def prune_intermediate_layers(
            self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Removes the stages that these intermediates do not need; returns the indices taken.

        If a stage is removed, so are the final norm and the head, which have the last stage's width.
        """
        take, last = feature_take_indices(len(self.stages), indices)
        ends_early = last < len(self.stages) - 1
        for name in self.stages[last + 1:]:
            setattr(self, name, self._empty_stage())  # no Identity, because gradient checkpointing takes stages apart
        if prune_norm or ends_early:
            self._prune_norm()
        if ends_early:
            self.num_features = self.feature_info[last]['num_chs']
        if prune_head or ends_early:
            self.reset_classifier(0, '')
        return take

    def _empty_stage(self) -> nn.Module:
        return nn.Sequential()

    def _prune_norm(self) -> None:
        """Removes the final norm, in networks that have one."""

    def forward_input(self, x: Tensor) -> Tensor:
        return x if self.normalize is None else self.normalize(x)

    def forward_stem(self, x: Tensor) -> Tensor:
        return self.conv1(x)

    def forward_norm(self, x: Tensor) -> Tensor:
        return x

    def forward_stages(self, x: Tensor) -> Tensor:
        raise AssertionError('each architecture runs its stages')

    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the features (batch, num_features, height', width') of images (batch, in_chans, height, width)."""
        return self.forward_norm(self.forward_stages(self.forward_stem(self.forward_input(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Returns the logits (batch, num_classes) of features, or the classifier's input with ``pre_logits``."""
        x = self.global_pool(x)
        if self.drop_rate > 0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _no_pool(num_classes: int) -> ValueError:
    return ValueError(f"global_pool '' leaves a feature map; expected num_classes=0 with it, got {num_classes}")


def register_variants(
        module_name: str, model_cls: Callable[..., nn.Module], archs: dict[str, dict[str, Any]], cfg: dict[str, Any],
        filter_fn: Callable[..., dict[str, Tensor]] | None = None) -> None:
    """Registers ``<arch>_<activation>`` with timm for every arch of a table and every activation.

    Args:
        module_name: ``__name__`` of the model file; the entrypoints and its ``default_cfgs`` are set there, where timm
            looks for them.
        model_cls: class of the network; ``features_only`` can return the features of its ``stages``.
        archs: arch name -> arguments of ``model_cls``.
        cfg: entries of ``pretrained_cfg`` that differ from the CIFAR default.
        filter_fn: (state_dict, model) -> state_dict, for pretrained files in another layout.
    """
    module = sys.modules[module_name]
    default_cfg = {
        'url': '', 'num_classes': 10, 'input_size': (3, 32, 32), 'crop_pct': 1.0, 'interpolation': 'bicubic',
        'mean': (0.0, 0.0, 0.0), 'std': (1.0, 1.0, 1.0), 'first_conv': 'conv1', 'classifier': 'fc', **cfg}
    names = {f'{arch}_{act}': (arch, act) for arch in archs for act in list_pafs(plain=True)}
    cfgs: dict[str, dict[str, Any]] = {}
    for name in names:
        tagged = weights_of(name)
        cfgs |= {weights.name: {**default_cfg, **weights.cfg()} for weights in tagged} or {name: dict(default_cfg)}
        # RobustBench asks timm for one name for each data set and threat model; the first of its weights has that name.
        for weights in reversed(tagged):
            cfgs[weights.plain_name] = cfgs[weights.name]
    module.default_cfgs = generate_default_cfgs(cfgs)  # type: ignore[attr-defined]
    for name, (arch, act) in names.items():
        VARIANTS[name] = Variant(model_cls, act, archs[arch])
        register_with_weights(module, name, _entrypoint(name, model_cls, act, archs[arch], filter_fn),
                              f'{arch} with {act} shared by the whole network.')


def register_with_weights(module: Any, name: str, entrypoint: Callable[..., nn.Module], doc: str) -> None:
    """Registers a model with timm, and the names that RobustBench has for its weights."""
    _register(module, name, entrypoint, doc)
    for weights in {weights.plain_name: weights for weights in reversed(weights_of(name))}.values():
        _register(module, weights.plain_name, _with_weights(entrypoint, weights), f'{name} with its {weights.tag}.')


def _register(module: Any, name: str, entrypoint: Callable[..., nn.Module], doc: str) -> None:
    entrypoint.__module__, entrypoint.__name__, entrypoint.__qualname__ = module.__name__, name, name
    entrypoint.__doc__ = doc
    setattr(module, name, entrypoint)
    register_model(entrypoint)


def _entrypoint(
        name: str, model_cls: Any, act: str, arch: dict[str, Any], filter_fn: Any) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model(
            model_cls, name, pretrained, convert=filter_fn,
            # The getter keeps the state dict hooks on the network; timm's other wrappers take the network apart.
            feature_cfg={'out_indices': tuple(range(len(model_cls.stages))), 'feature_cls': 'getter'},
            **{'act_layer': act, **arch, **kwargs})
    return create


def _with_weights(entrypoint: Callable[..., nn.Module], weights: Weights) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
        return entrypoint(pretrained, pretrained_cfg=pretrained_cfg or weights.tag, **kwargs)
    create.bundle_origin = str(weights.bundle or weights.location)  # type: ignore[attr-defined]
    create.weights_sha256 = weights.sha256  # type: ignore[attr-defined]
    return create
