"""Checks a bundle's config.json: what becomes an argument of a network is listed here, with its type and bounds."""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg

from ..activations import list_pafs
from ..convert import SHARES

__all__ = ['FIX', 'check_act_kwargs', 'check_config', 'check_model_args']

FIX = 'write the bundle again with timm-paf bundle'
MAX_CLASSES = 100_000
_repr = reprlib.Repr()
_repr.maxstring, _repr.maxother, _repr.maxlevel = 120, 120, 3


def _short(value: Any) -> str:
    return _repr.repr(value)


def _is_number(value: Any, low: float = -1e6, high: float = 1e6) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high \
        and math.isfinite(value)


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_text(value: Any, length: int = 10_000) -> bool:
    return isinstance(value, str) and len(value) <= length


def _is_list(value: Any, each: Callable[[Any], bool], *lengths: int) -> bool:
    return isinstance(value, list) and len(value) in lengths and all(map(each, value))


def _is_size(value: Any) -> bool:
    return _is_list(value, lambda n: _is_int(n, 1, 4096), 3) and value[0] <= 1024


def _is_pool(value: Any) -> bool:
    return _is_list(value, lambda n: _is_int(n, 1, 4096), 1, 2)


def _is_side(value: Any) -> bool:
    return _is_pool(value if isinstance(value, list) else [value])


def _are_ints(most: int, *lengths: int) -> Callable[[Any], bool]:
    return lambda value: _is_list(
        value if isinstance(value, list) else [value], lambda n: _is_int(n, 1, most), 1, *lengths)


def _is_statistic(value: Any) -> bool:
    return _is_list(value, _is_number, *range(1, 1025))


def _is_word(value: Any) -> bool:
    return _is_text(value, 100) and re.fullmatch(r'[\w -]*', value) is not None


def _is_module(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return len(names) <= 8 and all(_is_text(name, 200) and re.fullmatch(r'[\w.]*', name) for name in names)


def _is_texts(value: Any) -> bool:
    return _is_text(value) or _is_list(value, _is_text, *range(MAX_CLASSES + 1))


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_classes(value: Any) -> bool:
    return _is_int(value, 0, MAX_CLASSES)


def _is_normalize(value: Any) -> bool:
    return value is None or value == 'image' or (
        _is_list(value, _is_statistic, 2) and len(value[0]) == len(value[1]) and all(std > 0 for std in value[1]))


def _is_channels(value: Any) -> bool:
    return _is_int(value, 1, 1024)


def _is_crop(value: Any) -> bool:
    return _is_number(value, 0, 2)


# Fields of timm's PretrainedCfg that describe a network and its images, with what each may be.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(('input_size', 'test_input_size', 'min_input_size'), (
        _is_size, 'three integers, at most 1024 channels of 4096 x 4096')),
    **dict.fromkeys(('pool_size', 'test_pool_size'), (_is_pool, 'one or two integers of at most 4096')),
    **dict.fromkeys(('mean', 'std'), (_is_statistic, 'finite numbers')),
    **dict.fromkeys(('crop_pct', 'test_crop_pct'), (_is_crop, 'a number from 0 to 2')),
    **dict.fromkeys(('interpolation', 'crop_mode'), (_is_word, 'a word')),
    **dict.fromkeys(('first_conv', 'classifier'), (_is_module, 'names of modules')),
    **dict.fromkeys(('label_names', 'paper_ids', 'notes'), (_is_texts, 'a text or a list of them')),
    **dict.fromkeys(('license', 'description', 'origin_url', 'paper_name'), (_is_text, 'a text')),
    **dict.fromkeys(('num_classes', 'label_offset'), (_is_classes, f'an integer from 0 to {MAX_CLASSES}')),
    'fixed_input_size': (_is_flag, 'true or false'), 'label_descriptions': (_is_table, 'texts by name')}
# Fields that say where weights come from. A bundle's weights are its own, so none of these is taken from its file.
_SOURCES = {'url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'architecture', 'tag', 'custom_load'}


def _is_rate(value: Any) -> bool:
    return _is_number(value, 0, 1) and value < 1


# Arguments of a network: those that timm 1.0.31 writes into config.json by itself, and those of --model-kwargs.
_ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    'num_classes': (_is_classes, f'an integer from 0 to {MAX_CLASSES}'),
    'in_chans': (_is_channels, 'an integer from 1 to 1024'),
    'global_pool': (_is_word, 'a word'), 'img_size': (_is_side, 'one or two integers of at most 4096'),
    **dict.fromkeys(('patch_size', 'window_size'), (_are_ints(64, 2), 'one or two integers from 1 to 64')),
    **dict.fromkeys(('depth', 'depths', 'num_heads'), (
        _are_ints(64, 2, 3, 4, 5), 'one to five integers from 1 to 64')),
    'embed_dim': (_are_ints(2048, 2, 3, 4, 5), 'one to five integers from 1 to 2048'),
    **dict.fromkeys(('pad_type', 'shortcut'), (_is_word, 'a word')), 'final_norm': (_is_flag, 'true or false'),
    **dict.fromkeys(('drop_rate', 'drop_path_rate'), (_is_rate, 'a number from 0 to below 1')),
    'normalize': (_is_normalize, "null, 'image', or mean and std, two lists of as many numbers")}


def check_config(config: Any, file: Path) -> dict[str, Any]:
    """Returns the content of a ``config.json``, without fields of ``pretrained_cfg`` that name a source of weights.

    Raises:
        ValueError: if it is not what ``hub.bundle`` writes.
    """
    if not isinstance(config, dict) or not isinstance(config.get('timm_paf'), dict):
        raise ValueError(f'{file} has no timm_paf section; expected a bundle of timm-paf bundle, while '
                         "timm.create_model('local-dir:...') or 'hf-hub:...' loads other timm models")
    config.setdefault('model_args', {})
    for key, kind in (('architecture', str), ('num_classes', int), ('pretrained_cfg', dict), ('model_args', dict),
                      ('timm_paf.dataset', str), ('timm_paf.threat_model', dict), ('timm_paf.threat_model.norm', str)):
        value: Any = config
        for part in key.split('.'):
            value = value.get(part)
        if not isinstance(value, kind):
            raise ValueError(f'{file}: {key} is {_short(value)}; expected {kind.__name__}; {FIX}')
    about = config['timm_paf']
    if not re.fullmatch(r'\w[\w.]{0,199}', config['architecture'], re.ASCII):
        raise ValueError(f'{file}: architecture is {_short(config["architecture"])}; expected a name of '
                         f'timm.list_models, of letters, digits, _ and .; {FIX}')
    if not _is_int(config['num_classes'], 1, MAX_CLASSES):
        raise ValueError(f'{file}: num_classes is {_short(config["num_classes"])}; expected 1 to {MAX_CLASSES}; {FIX}')
    for key, value in (('dataset', about['dataset']), ('threat_model.norm', about['threat_model']['norm']),
                       ('threat_model.eps', about['threat_model'].get('eps', ''))):
        if not _is_text(value, 200) or not value.isprintable():
            raise ValueError(f'{file}: timm_paf.{key} is {_short(value)}; expected a text of one line; {FIX}')
    check_model_args(config['model_args'], f'{file}: model_args', f'; {FIX}', has_act_kwargs=True)
    if 'act' in about:  # only a converted model has it
        for key, known in (('act', list_pafs(plain=True)), ('act_share', SHARES)):
            if about.get(key) not in known:
                raise ValueError(f'{file}: timm_paf.{key} is {_short(about.get(key))}; expected one of '
                                 f'{", ".join(known)}; {FIX}')
        check_act_kwargs(about.get('act_kwargs'), f'{file}: timm_paf.act_kwargs', f'; {FIX}')
    config['pretrained_cfg'] = _checked_cfg(config['pretrained_cfg'], file)
    return config


def check_model_args(given: Any, where: str, fix: str = '', has_act_kwargs: bool = False,
                     but: Collection[str] = ()) -> dict[str, Any]:
    """Returns arguments of a network that a file or a user names, checked.

    Args:
        given: the arguments.
        where: what they are, for messages.
        fix: what to do, for messages.
        has_act_kwargs: whether ``act_kwargs`` may be among them.
        but: arguments that messages do not offer, because another check refuses them.

    Raises:
        ValueError: if one is not listed here, or not what it has to be.
    """
    if not isinstance(given, dict):
        raise ValueError(f'{where} is {_short(given)}; expected dict{fix}')
    for key, value in given.items():
        if key == 'act_kwargs' and has_act_kwargs:
            check_act_kwargs(value, f'{where}.act_kwargs', fix)
        elif key not in _ARGUMENTS:
            raise ValueError(f'{where} has {_short(key)}; expected {"act_kwargs, " if has_act_kwargs else ""}'
                             f'{", ".join(name for name in _ARGUMENTS if name not in but)}: a bundle names no other '
                             f'argument of a network{fix}')
        elif not _ARGUMENTS[key][0](value):
            raise ValueError(f'{where}.{key} is {_short(value)}; expected {_ARGUMENTS[key][1]}{fix}')
    return given


def check_act_kwargs(given: Any, where: str, fix: str = '') -> None:
    """Checks the arguments of an activation that a file or a user names.

    Args:
        given: the arguments.
        where: what they are, for messages.
        fix: what to do, for messages.

    Raises:
        ValueError: if there is another one than numbers alpha, beta and curvature, and ``frozen`` with names of values.
    """
    if not isinstance(given, dict):
        raise ValueError(f'{where} is {_short(given)}; expected dict{fix}')
    for key, value in given.items():
        names = value if isinstance(value, list) else [value]
        good = _is_number(value) if key in ('alpha', 'beta', 'curvature') else \
            key == 'frozen' and (_is_flag(value) or (
                len(names) <= 2 and all(name in ('alpha', 'beta') for name in names)))
        if not good:
            raise ValueError(f'{where}.{_short(key)[1:-1]} is {_short(value)}; expected alpha, beta and curvature as '
                             f'numbers within 1e6, or frozen with names of values or true{fix}')


def _checked_cfg(given: dict[str, Any], file: Path) -> dict[str, Any]:
    if unknown := set(given) - {field.name for field in dataclasses.fields(PretrainedCfg)}:
        names = _short(sorted(unknown))[1:-1].replace("'", '')
        raise ValueError(f'{file}: pretrained_cfg has {names}; expected fields that timm '
                         f'{timm.__version__} has; pip install --upgrade timm')
    taken = {key: value for key, value in given.items() if key not in _SOURCES}
    for key, value in taken.items():
        if key not in _FIELDS:
            raise ValueError(f'{file}: pretrained_cfg has {key}, which no bundle has; {FIX}')
        check, expected = _FIELDS[key]
        if value is not None and not check(value):
            raise ValueError(f'{file}: pretrained_cfg.{key} is {_short(value)}; expected {expected}; {FIX}')
    return taken
