"""timm's networks of which RobustBench has robust ImageNet weights, for images in [0, 1]: ``<timm's name>_in``.

They are timm's own, with the normalisation of the input inside, as RobustBench's are (``normalize_model``).
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, get_pretrained_cfg, model_entrypoint
from torch import Tensor, nn

from ..normalize import normalize_input
from ..weights.zoo import build_model, weights_of
from .cifar_net import register_with_weights

__all__ = ['NETWORKS', 'names_of_today']

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    'convnext': ('stem', {'out_indices': (0, 1, 2, 3), 'flatten_sequential': True}),
    'swin': ('patch_embed', {'out_indices': (0, 1, 2, 3), 'feature_cls': 'getter'}),
    'vit': ('patch_embed', {'out_indices': 3, 'feature_cls': 'getter'})}
"""By the begin of a name: the module that takes the images, and how timm makes features of the network.

timm's wrapper that takes a network apart runs its children one by one, of a Sequential such as ``stem`` the parts, and
so the normalisation. A ``patch_embed``, which it takes whole, would do that again: these have the wrapper that runs the
network, so that Swin's features are NCHW here.
"""

NETWORKS = (
    'convnext_base', 'convnext_large', 'swin_base_patch4_window7_224', 'swin_large_patch4_window7_224',
    'vit_base_patch16_224')


def _network(arch: str, normalize: Any = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), **kwargs: Any) -> nn.Module:
    model: nn.Module = timm.create_model(arch, **kwargs)
    normalize_input(model, normalize, FAMILIES[arch.partition('_')[0]][0])
    # weights.initial finds it there, as in ResNetImageNet
    model.weights_from_timm = functools.partial(names_of_today, arch)  # type: ignore[assignment]
    return model


def names_of_today(arch: str, state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Returns weights with the names that this version of timm has for them."""
    module: Any = importlib.import_module(model_entrypoint(arch).__module__)
    own = {key: value for key, value in state_dict.items() if key.startswith('normalize.')}
    try:
        renamed = module.checkpoint_filter_fn({key: state_dict[key] for key in state_dict if key not in own}, model)
    except (LookupError, AttributeError, RuntimeError, TypeError, ValueError):  # of weights that are another network's
        return state_dict
    return {**renamed, **own}


def _entrypoint(arch: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model(functools.partial(_network, arch), f'{arch}_in', pretrained,
                           feature_cfg=dict(FAMILIES[arch.partition('_')[0]][1]),
                           convert=functools.partial(names_of_today, arch), **kwargs)
    return create


def _cfgs(arch: str) -> dict[str, dict[str, Any]]:
    theirs = get_pretrained_cfg(arch)
    cfg = {'url': '', 'num_classes': 1000, 'mean': (0.0, 0.0, 0.0), 'std': (1.0, 1.0, 1.0),
           **{key: getattr(theirs, key) for key in (
               'input_size', 'pool_size', 'crop_pct', 'interpolation', 'first_conv', 'classifier', 'fixed_input_size')}}
    tagged = weights_of(f'{arch}_in')
    found = {weights.name: {**cfg, **weights.cfg()} for weights in tagged} or {f'{arch}_in': cfg}
    return {**found, **{weights.plain_name: found[weights.name] for weights in reversed(tagged)}}


default_cfgs = generate_default_cfgs({name: cfg for arch in NETWORKS for name, cfg in _cfgs(arch).items()})
for _arch in NETWORKS:
    register_with_weights(sys.modules[__name__], f'{_arch}_in', _entrypoint(_arch),
                          f"timm's {_arch} for images in [0, 1].")
