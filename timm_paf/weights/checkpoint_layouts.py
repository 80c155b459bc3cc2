"""Names that published networks give to their weights, and the weights of theirs that never run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from ..wording import shown

__all__ = ['MEAN_NAMES', 'STD_NAMES', 'drop_dead', 'rename', 'rename_deepmind']

# The names that files have for a normalisation of the input.
MEAN_NAMES = ('mean', 'mu', 'new_mean')
STD_NAMES = ('std', 'sigma', 'new_std')

_Rule = tuple[str, str | Callable[[re.Match[str]], str]]
# Names in the ResNets of RobustBench and DM-Improves-AT, and of robust_paf's one activation.
_OTHER_RESNETS: tuple[_Rule, ...] = (
    (r'\.shortcut\.', '.downsample.'), (r'^linear\.', 'fc.'), (r'(^|\.)activation\.(?=\w+$)', r'\1act1.'))
_DEEPMIND: tuple[_Rule, ...] = (
    (r'^(init_conv|conv_2d)\.', 'conv1.'), (r'^logits\.', 'fc.'),
    (r'^layer\.(\d)\.block\.', lambda found: f'block{int(found[1]) + 1}.layer.'),
    (r'^layer_(\d)\.', lambda found: f'layer{int(found[1]) + 1}.'),
    (r'\.(batchnorm|conv|conv_2d)_(\d)\.', lambda found: (
        f'.{"bn" if found[1] == "batchnorm" else "conv"}{int(found[2]) + (found[1] != "conv_2d")}.')))
# (the network, weights that tell its files, rules of its own)
_DEEPMIND_NETWORKS: tuple[tuple[str, set[str], tuple[_Rule, ...]], ...] = (
    ("DeepMind's WideResNet", {'init_conv.weight', 'logits.weight'}, (
        (r'^batchnorm\.', 'bn1.'), (r'\.shortcut\.', '.convShortcut.'))),
    ("DeepMind's PreActResNet", {'conv_2d.weight', 'logits.weight'}, (
        (r'^batchnorm\.', 'bn.'), (r'\.shortcut\.', '.downsample.0.'))))


def _renamed(state: dict[str, Tensor], rules: tuple[_Rule, ...]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        for pattern, name in rules:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return renamed


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights with the names of our ResNets, where they have those of another project's."""
    return _renamed(state, _OTHER_RESNETS)


def rename_deepmind(state: dict[str, Tensor], model: nn.Module, path: Path) -> tuple[dict[str, Tensor], str]:
    """Returns the weights of DeepMind's networks with our names, and whose they were; others as they are, with ''.

    Raises:
        ValueError: if they are DeepMind's and the model does not compute what DeepMind's does.
    """
    for whose, sign, rules in _DEEPMIND_NETWORKS:
        if sign <= state.keys() and not sign <= model.state_dict().keys():
            if getattr(model, 'pad_type', '') != 'same' or getattr(model, 'normalize', None) is None:
                raise ValueError(
                    f"{path} is of {whose}, which pads one side alone and normalises its input; expected a network "
                    "created with pad_type='same' and normalize=(mean, std) of its training images, or by its name in "
                    'timm_paf.list_weights()')
            return _renamed(state, (*_DEEPMIND, *rules)), whose
    return state, ''


def drop_dead(state: dict[str, Tensor], names: set[str], path: Path, changes: list[str]) -> dict[str, Tensor]:
    """Returns the weights without those that their network registers and never runs.

    The WideResNet of TRADES (models/wideresnet.py) makes a second ``block1`` under the name ``sub_block1``, which its
    ``forward`` skips: a weight for each of ``block1``, of the same shape.

    Raises:
        ValueError: if ``sub_block1`` is something else.
    """
    dead = {key for key in state if key.startswith('sub_block1.') and key not in names}
    if not dead:
        return state
    twins = {key.removeprefix('sub_') for key in dead}
    block = {key for key in state if key.startswith('block1.')}
    if twins != block or any(state[key].shape != state[key.removeprefix('sub_')].shape for key in dead):
        wrong = min(twins ^ block, default=next(iter(sorted(twins))))
        raise ValueError(f"{path} has a sub_block1 that is not TRADES' unused copy of block1 (see {shown(wrong)}); "
                         'expected the weights of a WideResNet')
    changes.append(f'{len(dead)} weights of sub_block1 left out, which TRADES\' network makes and never runs')
    return {key: value for key, value in state.items() if key not in dead}
