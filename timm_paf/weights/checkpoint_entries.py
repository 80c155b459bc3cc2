"""Finds the weights in a dict of a training, under whatever name they stand; an average goes before the last ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..wording import shown
from .checkpoint_files import check_tensors

__all__ = ['Entry', 'find_entry']


@dataclass(frozen=True)
class Entry:
    """A state dict in a file: its place, as 'ema.module', and whether it is an average over training."""

    place: str
    averaged: bool
    state: dict[str, Tensor]


# (place of the weights, another entry that tells whose file it is, whose)
_OWNERS = (
    ('swadict', 'state_dict', 'robust_paf'),
    ('state_dict_ema', '', "timm's train.py"),
    ('model_state_dict', 'unaveraged_model_state_dict', 'DM-Improves-AT'),
    ('state_dict', 'swadict', 'robust_paf'),
)
# Usual places of the weights, the likeliest first; one of any other name is taken where it is the only one.
_USUAL = (
    'state_dict', 'model_state_dict', 'model', 'net', 'params', 'net_state_dict', 'model_state', 'network', 'weights')
# 'ema', 'model_ema', 'swa_state_dict', 'params_avg', 'averaged', 'netEMA', 'swadict', but not 'avgpool'
_AVERAGE = re.compile(
    r'(?:^|_)(?:(?:model|net|network|params?|state|dict|weights?)?(?:ema|swa|avg|polyak|averaged?|shadow)'
    r'(?:model|net|network|params?|state|dict|weights?)?)\d*(?:$|_)')
_DEPTH = 3


def find_entry(content: dict[str, Any], path: Path, leaves: set[str]) -> tuple[str, Entry]:
    """Returns whose file it is, and its weights.

    Args:
        content: the dict in the file.
        path: the file, for messages.
        leaves: last parts of the names of weights, such as 'weight', by which weights are told from other tensors.

    Raises:
        ValueError: if there are no weights, an average that has no names, or several of which none is the usual one.
    """
    if _is_state(content):
        check_tensors(content, path)
        return 'a state dict', Entry('', 'n_averaged' in content, content)
    entries = list(_entries(content, leaves))
    for entry in entries:
        check_tensors(entry.state, path)
    # DM-Improves-AT marks the last weights, and the average has the usual name.
    twins = {entry.place.removeprefix('unaveraged_') for entry in entries if entry.place.startswith('unaveraged_')}
    averages = [Entry(e.place, True, e.state) for e in entries if e.averaged or e.place in twins]
    last = [e for e in entries if not e.averaged and e.place not in twins]
    if not averages and (nameless := next(_nameless(content), None)):
        raise ValueError(f'{path} has an average of the weights under {shown(nameless)}, without their names; expected '
                         'a state dict: load it with the code that made it and save the state_dict() of its network')
    usual = [entry for name in _USUAL for entry in last if name == entry.place]
    chosen = averages or usual[:1] or last
    if not chosen:
        raise ValueError(f'{path} is a dict of {shown(", ".join(map(str, list(content)[:8])))}; expected weights '
                         f'under one of {", ".join(_USUAL)}, or ema before or after it')
    if any(not _equal(chosen[0].state, other.state) for other in chosen[1:]):
        raise ValueError(f'{path} has different weights under {shown(", ".join(entry.place for entry in chosen))}; '
                         'expected one of them: save the one that you mean alone')
    found = chosen[0]
    whose = next((whose for place, sign, whose in _OWNERS
                  if place == found.place and (not sign or sign in content)), 'a dict')
    return whose, found


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _is_average(name: str) -> bool:
    words = re.sub(r'(?<=[a-z])(?=[A-Z])', '_', name)
    return _AVERAGE.search(re.sub(r'[^a-z0-9]+', '_', words.lower())) is not None


def _entries(content: dict[Any, Any], leaves: set[str], place: str = '', averaged: bool = False) -> Iterator[Entry]:
    """Yields the state dicts in a dict, also those of a {decay, module} in it."""
    averaged = averaged or ('decay' in content and 'module' in content)
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, dict) or not value:
            continue
        here = f'{place}.{key}' if place else key
        average = averaged or _is_average(key)
        if _is_state(value):
            if any(name.rpartition('.')[2] in leaves for name in value):
                yield Entry(here, average or 'n_averaged' in value, value)
        elif here.count('.') < _DEPTH - 1:
            yield from _entries(value, leaves, here, average)


def _nameless(content: dict[Any, Any]) -> Iterator[str]:
    """Yields the places of averages that are lists of tensors, as of torch_ema's shadow_params."""
    for key, value in content.items():
        if isinstance(key, str) and _is_average(key):
            inner = value.items() if isinstance(value, dict) else [('', value)]
            for name, part in inner:
                if isinstance(part, list | tuple) and len(part) > 1 and all(isinstance(v, Tensor) for v in part):
                    yield f'{key}.{name}' if name else key


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].shape == other[key].shape and torch.equal(one[key], other[key]) for key in one)
