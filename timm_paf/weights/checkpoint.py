"""Reads checkpoints as people have them: the layout of a file, and its weights under the names of our networks.

Nothing in a file is run (``weights_only=True``, or safetensors), nothing is loaded in part, and an entry that is left
out is checked first: copies must be equal, a normalisation of the input must be the identity.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..activations import merge_aliases

__all__ = ['Checkpoint', 'check_file', 'load_checkpoint', 'read_checkpoint', 'read_file']


@dataclass(frozen=True)
class Checkpoint:
    """Weights under the names of a model, and the layout of their file.

    Its ``str()`` says all but the weights in one line.
    """

    state_dict: dict[str, Tensor]
    layout: str  # name of the project that writes this layout
    entry: str  # the key of the file under which the weights stood; '' where the file is the state dict itself
    averaged: bool  # whether the weights are an average over training
    changes: tuple[str, ...]  # how the file's names differed from the model's

    def __str__(self) -> str:
        kind = ', an average of the weights' if self.averaged else ''
        entry = f' ({self.entry}{kind})' if self.entry else f' ({kind[2:]})' if kind else ''
        return '; '.join([f'{self.layout}{entry}', *self.changes])


# A layout is (entry with the weights, another entry that tells whose file it is, whose, whether it is an average).
# Averages stand first: where a file has one, it is the result.
_LAYOUTS = (
    ('swadict', 'state_dict', 'robust_paf', True),
    ('state_dict_ema', '', "timm's train.py", True),
    ('model_state_dict', 'unaveraged_model_state_dict', 'DM-Improves-AT', True),
    ('model_ema', '', 'a dict', True),
    ('ema_state_dict', '', 'a dict', True),
    ('ema_model', '', 'a dict', True),
    ('ema', '', 'a dict', True),
    ('state_dict', 'swadict', 'robust_paf', False),
    ('state_dict', '', 'a dict', False),
    ('model_state_dict', '', 'a dict', False),
    ('model', '', 'a dict', False),
    ('net', '', 'a dict', False),
)
# Modules that only hold the network, in torch's parallel and compiled models and averages, RobustBench and MadryLab.
_WRAPPERS = {'module', '_orig_mod', 'model', 'net', 'network', '0', '1'}
# Values of a normalisation that leave the input as it is, under the names that files have for them.
_NEUTRAL = {'mean': 0.0, 'mu': 0.0, 'new_mean': 0.0, 'std': 1.0, 'sigma': 1.0, 'new_std': 1.0}
# Renamed names: those in the ResNets of RobustBench and DM-Improves-AT, and of robust_paf's one activation.
_RENAMED = (
    (re.compile(r'\.shortcut\.'), '.downsample.'), (re.compile(r'^linear\.'), 'fc.'),
    (re.compile(r'(^|\.)activation\.(?=\w+$)'), r'\1act1.'))


def check_file(path: str | Path) -> None:
    """Refuses what is no file of weights, before anything in it is read.

    A zip archive, which `torch.save` writes, is compared with its own checksums: torch itself checks none.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, a web page (of a download that failed), cut off or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path} is no file; expected a checkpoint')
    with open(path, 'rb') as file:
        head = file.read(4096)
    if not head:
        raise ValueError(f'{path} is empty; expected a checkpoint: get it again')
    if head.lstrip()[:14].lower().startswith((b'<!doctype html', b'<html')):
        title = re.search(rb'<title[^>]*>(.*?)</title', head, re.IGNORECASE | re.DOTALL)
        what = ' '.join(title[1].decode(errors='replace').split()) if title else 'without a title'
        raise ValueError(f'{path} is a web page ({what}); expected a checkpoint: remove it and get it again')
    if head.startswith(b'PK\x03\x04'):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
                before = min((info.header_offset for info in archive.infolist()), default=0)
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f'{path} is cut off or damaged ({error}); get it again') from error
        if before:  # a download that resumed in the middle with the beginning of the file
            raise ValueError(f'{path} is damaged: {before:,} other bytes come before the archive; get it again')
        if damaged is not None:
            raise ValueError(f'{path} is damaged: {damaged} has another CRC-32 than the file says; get it again')


def read_checkpoint(path: str | Path, model: nn.Module, adapt: Iterable[str] = ()) -> Checkpoint:
    """Reads the weights of a file under the names of a model, all of them and no others.

    Known are the files of robust_paf, RobustBench, DM-Improves-AT, MadryLab's robustness and timm, and state dicts
    with a prefix or under the usual names in a dict; of torch.save or safetensors. Where a file has an average of the
    weights beside the last ones, the average is taken.

    Args:
        path: the file.
        model: the model that has the names and shapes; it is not changed.
        adapt: modules that may have weights of another shape, or weights without a place in the model: timm adapts
            them (``pretrained_cfg['first_conv']`` and ``['classifier']``).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, needs code to be read, normalises its input otherwise than by mean 0 and
            std 1, holds two values of one weight, or does not have the names and shapes of the model.
    """
    path = Path(path)
    content = read_file(path)
    if not isinstance(content, dict):
        raise ValueError(f'{path} holds a {type(content).__name__}; expected a state dict, or a dict with one')
    layout, entry, averaged, found = _weights(content, path)
    changes: list[str] = []
    state, wrapped, average = _unwrap(found, model, path, changes)
    if wrapped:
        layout = wrapped
    if {'init_conv.weight', 'logits.weight'} <= state.keys():
        raise ValueError(f"{path} is of DeepMind's WideResNet, which pads one side alone and normalises its input; no "
                         'network here computes that: load it with robustbench.utils.load_model')
    renamed = _rename(state)
    ours, others = (_fit(names, model, path, tuple(adapt)) for names in (state, renamed))
    merged, wrong = others if len(others[1]) < len(ours[1]) else ours
    if wrong:
        more = f' and {len(wrong) - 4} more' if len(wrong) > 4 else ''
        raise ValueError(
            f'{path} ({layout}) does not fit {type(model).__name__}: {"; ".join(wrong[:4])}{more}; expected its keys')
    if merged is others[0]:
        changes.append('names of another ResNet')
    if copies := len(state) - len(merged):
        layout = "RobustBench's PAF network" if layout.startswith('a ') else layout
        changes.append(f"{copies} copies of the activation's values, equal, merged")
    return Checkpoint(merged, layout, entry, averaged or average, tuple(changes))


def load_checkpoint(model: nn.Module, path: str | Path) -> Checkpoint:
    """Loads a file into a model, strictly.

    Args:
        model: the model, which is changed in place; any network with the names and shapes of the weights.
        path: a file of torch.save or safetensors, in one of the layouts that `read_checkpoint` knows.

    Returns:
        The weights and the layout of their file; ``print`` shows all but the weights in a line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if `read_checkpoint` refuses the file; the model is unchanged then.
    """
    checkpoint = read_checkpoint(path, model)
    model.load_state_dict(checkpoint.state_dict, strict=True)
    return checkpoint


def read_file(path: Path) -> Any:
    """Returns the content of a file of torch.save or safetensors, after `check_file`; nothing in it is run.

    Raises:
        FileNotFoundError, ValueError: as `check_file`, or if the file needs code or is of another kind.
    """
    check_file(path)
    if path.suffix == '.safetensors':
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f'{path} is cut off or no safetensors file ({error}); get it again') from error
    try:
        # timm's files have their arguments in a Namespace, a record that is filled and not called.
        with torch.serialization.safe_globals([argparse.Namespace]), open(path, 'rb') as file:
            archive = zipfile.is_zipfile(file)
            file.seek(0)
            content = torch.load(file, map_location='cpu', weights_only=True)
            if not archive and file.read(1):  # the old format has no checksums
                raise ValueError('more bytes than one checkpoint')
            return content
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError,
            ArithmeticError) as error:
        if code := re.search(r'GLOBAL (\w+(?:\.\w+)+)', str(error)):
            raise ValueError(
                f'{path} needs code to be read ({code[1]}), and no code of a file is run; where you trust it, save its '
                "weights alone: torch.save(torch.load(PATH, weights_only=False)['state_dict'], NEW)") from None
        reason = str(error).strip().split('\n')[0].split('. ')[0]
        raise ValueError(f'{path} is cut off or no checkpoint ({reason}); expected a file of torch.save or '
                         'safetensors') from error


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _weights(content: dict[str, Any], path: Path) -> tuple[str, str, bool, dict[str, Tensor]]:
    """Returns whose file it is, the entry with the weights, whether they are an average, and the weights."""
    if _is_state(content):
        return 'a state dict', '', False, content
    for entry, sign, whose, averaged in _LAYOUTS:
        if _is_state(content.get(entry)) and (not sign or sign in content):
            return whose, entry, averaged, content[entry]
    raise ValueError(f'{path} is a dict of {", ".join(map(str, list(content)[:8]))}; expected the weights under one of '
                     f'{", ".join(dict.fromkeys(layout[0] for layout in _LAYOUTS))}')


def _unwrap(
        found: dict[str, Tensor], model: nn.Module, path: Path, changes: list[str],
) -> tuple[dict[str, Tensor], str, bool]:
    """Removes wrappers around the network; returns the weights, whose wrapper was known, and whether it averages."""
    state, names = dict(found), set(model.state_dict())
    normalised, averaged, whose, prefix = False, False, '', ''
    while True:
        if 'n_averaged' in state:  # torch.optim.swa_utils.AveragedModel
            averaged = bool(state.pop('n_averaged').numel())
            changes.append('an AveragedModel')
        if attacker := [key for key in state if key.startswith('attacker.')]:
            whose = "MadryLab's robustness"
            for key in attacker:
                twin = key.removeprefix('attacker.').replace('normalize.', 'normalizer.', 1)
                if twin not in state or not torch.equal(state[twin], state.pop(key)):
                    raise ValueError(f'{path}: {prefix}{key} is no copy of {prefix}{twin}; expected one network in it')
            changes.append("the attacker's copy, equal, left out")
        for key in [key for key in state if key.rpartition('.')[2] in _NEUTRAL and key not in names]:
            value, neutral = state.pop(key), _NEUTRAL[key.rpartition('.')[2]]
            if not bool((value == neutral).all()):
                raise ValueError(
                    f'{path} normalises its input ({prefix}{key} is {value.flatten().tolist()[:3]}, expected '
                    f'{neutral:g}); the networks here take images in [0, 1] as they are, so that eps means the same')
            normalised = True
        heads = {key.partition('.')[0] for key in state}
        head = heads.pop() if len(heads) == 1 else ''
        if head not in _WRAPPERS or not names.isdisjoint(state) or head in state:
            break
        if head == '1' and not normalised:
            raise ValueError(
                f'{path}: the network is the second in a Sequential; what comes before it, mostly a normalisation of '
                'the input, is not in the file, and the networks here have none')
        state = {key.partition('.')[2]: value for key, value in state.items()}
        prefix += f'{head}.'
    if prefix:
        changes.append(f'without the prefix {prefix}')
    if normalised:
        changes.append('a normalisation by mean 0 and std 1 left out')
    return state, whose, averaged


def _rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        for pattern, name in _RENAMED:
            key = pattern.sub(name, key)
        renamed[key] = value
    return renamed


def _fit(
        names: dict[str, Tensor], model: nn.Module, path: Path, adapt: tuple[str, ...],
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the weights, each value of a PAF once under the name that the model saves; and what does not fit."""
    expected = {k: v.shape for k, v in model.state_dict().items()}
    try:
        state = merge_aliases(model, names)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    free = tuple(f'{name}.' for name in adapt)
    return state, [problem for problem, key in (
        *((f'missing {key}', key) for key in expected if key not in state),
        *((f'unexpected {key}', key) for key in state if key not in expected),
        *((f'{key} is {tuple(state[key].shape)} and not {tuple(shape)}', key) for key, shape in expected.items()
          if key in state and state[key].shape != shape)) if not key.startswith(free)]
