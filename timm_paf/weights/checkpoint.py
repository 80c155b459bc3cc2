"""Reads checkpoints as people have them: the layout of a file, and its weights under the names of our networks.

Nothing in a file is run (``weights_only=True``, or safetensors), nothing is loaded in part, and an entry that is left
out is checked first: copies must be equal, a normalisation of the input must be the identity.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..sharing import merge_aliases
from ..wording import shown
from .checkpoint_entries import find_entry
from .checkpoint_files import read_file
from .checkpoint_layouts import MEAN_NAMES, STD_NAMES, drop_dead, rename, rename_deepmind

__all__ = ['Checkpoint', 'check_finite', 'fit', 'load_checkpoint', 'read_checkpoint']


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


# Modules that only hold the network, in torch's parallel and compiled models and averages, RobustBench and MadryLab.
_WRAPPERS = {'module', '_orig_mod', 'model', 'net', 'network', '0', '1'}
# Values of a normalisation that leave the input as it is, under the names that files have for them.
_NEUTRAL = {**dict.fromkeys(MEAN_NAMES, 0.0), **dict.fromkeys(STD_NAMES, 1.0)}
# Where our networks keep the normalisation of their input.
_NORMALIZE = {**dict.fromkeys(MEAN_NAMES, 'normalize.mean'), **dict.fromkeys(STD_NAMES, 'normalize.std')}
# What thop counts while a network runs, and leaves in it.
_COUNTERS = {'total_ops', 'total_params'}


def read_checkpoint(
        path: str | Path, model: nn.Module, adapt: Iterable[str] = (),
        convert: Callable[..., dict[str, Tensor]] | None = None, entry: str = '', known: bool = False,
) -> Checkpoint:
    """Reads the weights of a file under the names of a model, all of them and no others.

    Known are the files of robust_paf, RobustBench, DM-Improves-AT, MadryLab's robustness and timm, and state dicts
    with a prefix or in a dict; of torch.save or safetensors. Where a file has an average of the weights beside the
    last ones, the average is taken.

    Args:
        path: the file.
        model: the model that has the names and shapes; it is not changed.
        adapt: modules that may have weights of another shape, or weights without a place in the model: timm adapts
            them (``pretrained_cfg['first_conv']`` and ``['classifier']``).
        convert: (state_dict, model) -> state_dict, for weights of another network that the model can start from.
        entry: the key of the weights that are meant, where the file has several; '' for the likeliest.
        known: whether it is known that the model does with its input what the weights' network did. Otherwise a
            warning says it where files of both kinds look alike.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, needs code to be read, normalises its input where the model does not, holds
            two values of one weight or one that is not finite, or does not have the names and shapes of the model.
    """
    path, adapt = Path(path), tuple(adapt)
    content = read_file(path)
    if not isinstance(content, dict):
        raise ValueError(f'{path} holds a {shown(type(content).__name__.strip("_"))}; expected a state dict, or a dict '
                         'with one')
    if entry in content:
        content = {entry: content[entry]}
    whose, found = find_entry(content, path, {key.rpartition('.')[2] for key in model.state_dict()})
    changes: list[str] = []
    state, wrapped, average = _unwrap(found.state, model, path, changes)
    layout = wrapped or whose
    state, deepmind = rename_deepmind(state, model, path)
    layout = deepmind or layout
    state = drop_dead(state, set(model.state_dict()), path, changes)
    _fill_own(state, model, adapt, changes)
    check_finite(state, path)
    if convert:
        state = convert(state, model)
    ours, others = (_fit(names, model, path, adapt) for names in (state, rename(state)))
    merged, wrong = others if len(others[1]) < len(ours[1]) else ours
    if wrong:
        more = f' and {len(wrong) - 4} more' if len(wrong) > 4 else ''
        raise ValueError(
            f'{path} ({layout}) does not fit {type(model).__name__}: {"; ".join(wrong[:4])}{more}; expected its keys')
    check_finite(merged, path, model)
    if merged is others[0]:
        changes.append('names of another ResNet')
    if copies := len(state) - len(merged):
        layout = "RobustBench's PAF network" if layout.startswith('a ') else layout
        changes.append(f"{copies} copies of the activation's values, equal, merged")
    if untracked := _untracked(merged, model):
        merged.update((key, torch.zeros((), dtype=torch.long)) for key in untracked)
        changes.append(f'num_batches_tracked of {len(untracked)} norms, missing, set to 0')
    if not known and path.suffix != '.safetensors' and _may_normalise(state, model):
        warnings.warn(
            f'{path}: nothing in it says whether its network normalises its input; of the published networks with '
            f'these names some do (Rice2020Overfitting), and {type(model).__name__} here does not: compare the '
            'accuracy, or create the network with normalize=(mean, std)', stacklevel=2)
    return Checkpoint(merged, layout, found.place, found.averaged or average, tuple(changes))


def check_finite(state: dict[str, Tensor], path: Path, model: nn.Module | None = None) -> None:
    """Refuses weights that are NaN or infinite, also those that become so in the type that the model has.

    Raises:
        ValueError: if there are such weights.
    """
    types = {key: value.dtype for key, value in model.state_dict().items()} if model is not None else {}
    for key, value in state.items():
        if not value.is_floating_point():
            continue
        wide = value if value.dtype.itemsize > 1 else value.float()  # torch can't tell for types of a byte
        kind = types.get(key, wide.dtype)
        if count := int((~wide.to(kind if kind.is_floating_point else wide.dtype).isfinite()).sum()):
            raise ValueError(f'{path}: {shown(key)} has {count:,} values that are not finite; expected finite weights: '
                             'the training diverged, take an earlier checkpoint')


def load_checkpoint(model: nn.Module, path: str | Path) -> Checkpoint:
    """Loads a file into a model, strictly.

    Args:
        model: the model, which is changed in place; any network with the names and shapes of the weights.
        path: a file of torch.save or safetensors, in one of the layouts that `read_checkpoint` knows, or of timm's own
            network where the model has ``weights_from_timm``.

    Returns:
        The weights and the layout of their file; ``print`` shows all but the weights in a line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if `read_checkpoint` refuses the file; the model is unchanged then.
    """
    checkpoint = read_checkpoint(path, model, convert=getattr(model, 'weights_from_timm', None))
    model.load_state_dict(checkpoint.state_dict, strict=True)
    return checkpoint


def fit(state: dict[str, Tensor], model: nn.Module, path: Path, adapt: Iterable[str] = ()) -> dict[str, Tensor]:
    """Returns weights with the names and shapes of a model, each value of a PAF once.

    Args:
        state: the weights.
        model, adapt: as `read_checkpoint`.
        path: what the weights are, for messages.

    Raises:
        ValueError: if they are not those of the model, or not finite.
    """
    check_finite(state, path)
    merged, wrong = _fit(state, model, path, tuple(adapt))
    if wrong:
        raise ValueError(f'{path} does not fit {type(model).__name__}: {"; ".join(wrong[:4])}; expected its keys')
    return merged


def _unwrap(
        found: dict[str, Tensor], model: nn.Module, path: Path, changes: list[str],
) -> tuple[dict[str, Tensor], str, bool]:
    """Removes wrappers around the network; returns the weights, whose wrapper was known, and whether it averages."""
    state, names = dict(found), set(model.state_dict())
    normalised, averaged, whose, prefix = False, False, '', ''
    read: dict[str, Tensor] = {}
    while True:
        if 'n_averaged' in state:  # torch.optim.swa_utils.AveragedModel
            averaged = bool(state.pop('n_averaged').numel())
            changes.append('an AveragedModel')
        if counters := [key for key, value in state.items() if key not in names and value.numel() == 1
                        and key.rpartition('.')[2] in _COUNTERS]:
            state = {key: value for key, value in state.items() if key not in counters}
            changes.append(f'{len(counters)} counters of thop left out')
        if attacker := [key for key in state if key.startswith('attacker.')]:
            whose = "MadryLab's robustness"
            for key in attacker:
                twin = key.removeprefix('attacker.').replace('normalize.', 'normalizer.', 1)
                if twin not in state or not torch.equal(state[twin], state.pop(key)):
                    raise ValueError(f'{path}: {shown(prefix + key)} is no copy of {shown(prefix + twin)}; expected '
                                     'one network in it')
            changes.append("the attacker's copy, equal, left out")
        unknown = _common_prefix(state, names)
        for key in [key for key in state if key.rpartition('.')[2] in _NEUTRAL
                    and key.removeprefix(unknown) not in names]:
            value, neutral = state.pop(key), _NEUTRAL[key.rpartition('.')[2]]
            if 'normalize.mean' in names:
                read[_NORMALIZE[key.rpartition('.')[2]]] = value.flatten().view(-1, 1, 1)
                normalised = True
                continue
            if not bool((value == neutral).all()):
                raise ValueError(
                    f'{path} normalises its input ({shown(prefix + key)} is {value.flatten().tolist()[:3]}, expected '
                    f'{neutral:g}), and this network does not; expected one created with normalize=(mean, std)')
            normalised = True
        heads = {key.partition('.')[0] for key in state}
        head = heads.pop() if len(heads) == 1 else ''
        unknown = _common_prefix(state, names)
        if not names.isdisjoint(state) or head in state or not (head in _WRAPPERS or unknown):
            break
        if head.isdecimal() and head != '0' and not normalised and getattr(model, 'normalize', None) is None:
            raise ValueError(
                f'{path}: the network is the second in a Sequential; what comes before it, mostly a normalisation of '
                'the input, is not in the file, and this network has none; expected one created with '
                'normalize=(mean, std)')
        taken = f'{head}.' if head in _WRAPPERS or unknown.startswith(f'{head}.') else unknown
        state = {key.removeprefix(taken): value for key, value in state.items()}
        prefix += taken
    if prefix:
        changes.append(f'without the prefix {shown(prefix)}')
    if read:
        changes.append('with its normalisation of the input')
    elif normalised:
        changes.append('a normalisation by mean 0 and std 1 left out')
    state.update(read)
    return state, whose, averaged


def _fill_own(state: dict[str, Tensor], model: nn.Module, adapt: tuple[str, ...], changes: list[str]) -> None:
    """Adds what our networks save and published ones do not: the normalisation of the input, and marks of a variant."""
    lacking = False
    for key, ours in model.state_dict().items():
        if not key.startswith(('normalize.', 'variant_')):
            continue
        if key not in state or (adapt and state[key].shape != ours.shape):
            state[key], lacking = ours, lacking or key.startswith('normalize.')
    if lacking:
        changes.append("the normalisation of the input, which is not in the file, is the network's own")


def _may_normalise(state: dict[str, Tensor], model: nn.Module) -> bool:
    """Returns whether there are published networks with the names of these weights that normalise, unlike the model.

    All of them have a plain activation, and torch.save wrote their files.
    """
    values = any(key.rpartition('.')[2] in ('alpha', 'beta') for key in state)
    return getattr(model, 'normalize', False) is None and not values


def _common_prefix(state: dict[str, Tensor], names: set[str]) -> str:
    """Returns what stands before every key and leaves names of the model, mostly; '' if there is none."""
    for key in sorted(state, key=len)[:8]:
        found = next((key[:at] for at in range(1, len(key)) if key[at:] in names), '')
        if found and all(other.startswith(found) for other in state):
            return found if 2 * sum(other.removeprefix(found) in names for other in state) > len(state) else ''
    return ''


def _fit(
        names: dict[str, Tensor], model: nn.Module, path: Path, adapt: tuple[str, ...],
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the weights, each value of a PAF once under the name that the model saves; and what does not fit."""
    expected = model.state_dict()
    try:
        state = merge_aliases(model, names)
    except ValueError as error:
        raise ValueError(f'{path}: {shown(error, 400)}') from None
    filled, free = _untracked(state, model), tuple(f'{name}.' for name in adapt)
    missing = [f'missing {key}' for key in expected if not (key in state or key in filled or key.startswith(free))]
    unexpected = [f'unexpected {shown(key)}' for key in state if key not in expected and not key.startswith(free)]
    other = []
    for key, ours in expected.items():
        if key not in state or key.startswith(free):
            continue
        if state[key].shape != ours.shape:
            other.append(f'{key} is {tuple(state[key].shape)} and not {tuple(ours.shape)}')
        elif ours.is_floating_point() and not state[key].is_floating_point():
            other.append(f'{key} is {state[key].dtype} and not {ours.dtype}')
    # What the file has stands beside what it lacks: of the first four problems two are missing keys at most.
    return state, [*missing[:2], *unexpected[:2], *missing[2:], *unexpected[2:], *other]


def _untracked(state: dict[str, Tensor], model: nn.Module) -> list[str]:
    """Returns the counters of batches that a file lacks, beside statistics that it has; torch loads it too."""
    return [key for key in model.state_dict() if key not in state and key.endswith('num_batches_tracked')
            and key.replace('num_batches_tracked', 'running_mean') in state]
