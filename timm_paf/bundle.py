"""Model bundles, directories of ``python -m hub.bundle``: weights, timm's configuration and checksums."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import PretrainedCfg
from torch import nn

from .activations import list_pafs
from .convert import SHARES, create_converted
from .files import sha256

__all__ = [
    'CONFIG', 'WEIGHTS', 'build_bundle', 'bundle_cfg', 'bundle_sums', 'load_bundle', 'read_bundle', 'read_config',
]

CONFIG, WEIGHTS, SUMS = 'config.json', 'model.safetensors', 'SHA256SUMS'


def read_bundle(path: str | Path) -> dict[str, Any]:
    """The configuration of a model bundle, after checking the bundle.

    Args:
        path: a directory with ``config.json``, ``model.safetensors`` and mostly ``SHA256SUMS``, as `hub.bundle` writes.

    Returns:
        The content of ``config.json``: ``architecture`` (a name timm knows), ``num_classes``, ``model_args`` (also
        where the file has none), ``pretrained_cfg``, and ``timm_paf`` with ``dataset`` and ``threat_model``.

    Raises:
        FileNotFoundError: if the directory or one of the two files is missing.
        ValueError: if the configuration is not one of ours, or a file is not the one its sha256 names, or the weights
            are cut off.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f'{path} is no directory; expected a model bundle, or a Hub id such as org/model')
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f'{path} has no {name}; expected a model bundle, as python -m hub.bundle writes')
    config = read_config(path / CONFIG)
    if not timm.is_model(config['architecture']):
        raise ValueError(f'{path / CONFIG}: architecture is {config["architecture"]!r}; expected a model of this '
                         f'timm_paf or of timm {timm.__version__}; pip install --upgrade timm-paf timm')
    try:
        with safe_open(path / WEIGHTS, framework='pt'):
            pass
    except SafetensorError as error:
        raise ValueError(f'{path / WEIGHTS} is cut off or no safetensors file ({error}); get it again') from error
    expected = bundle_sums(path)
    for name in (CONFIG, WEIGHTS):  # what is loaded; other files, such as the model card, may be edited
        found = sha256(path / name)
        if expected.get(name, found) != found:
            raise ValueError(f'{path / name}: sha256 is {found}; {SUMS} expects {expected[name]}; '
                             'copy or download the bundle again')
    return config


def load_bundle(path: str | Path) -> nn.Module:
    """The model of a bundle, with its weights, in eval mode.

    Raises:
        FileNotFoundError, ValueError: as `read_bundle`, or if the weights are not those of the architecture.
    """
    config = read_bundle(path)
    try:
        model = build_bundle(
            config, Path(path), pretrained=True, pretrained_cfg=bundle_cfg(config, Path(path)), **config['model_args'])
    except RuntimeError as error:
        raise ValueError(f'{path}: {WEIGHTS} does not fit {config["architecture"]}: '
                         f'{" ".join(str(error).split())}') from error
    return model.eval()


def build_bundle(config: dict[str, Any], path: Path, pretrained: bool, **kwargs: Any) -> nn.Module:
    """The network that a bundle's configuration describes: timm's, or that one converted as it was for training.

    Args:
        config: what `read_bundle` gives.
        path: the bundle.
        pretrained: load its weights, strictly.
        **kwargs: of ``timm.create_model``; ``pretrained_cfg`` names the same weights.
    """
    about = config['timm_paf']
    if 'act' not in about:
        model: nn.Module = timm.create_model(config['architecture'], pretrained=pretrained, **kwargs)
        return model
    kwargs.setdefault('num_classes', config['num_classes'])
    model = create_converted(config['architecture'], about['act'], about['act_share'], about['act_kwargs'], **kwargs)
    if pretrained:
        model.load_state_dict(load_file(path / WEIGHTS))
    return model


def read_config(file: Path) -> dict[str, Any]:
    """The content of a bundle's ``config.json``; the architecture need not be registered yet.

    Raises:
        ValueError: if it is not one of ours.
    """
    mend = 'write the bundle again with python -m hub.bundle'
    try:
        config = json.loads(file.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{file} is no JSON ({error}); {mend}') from error
    if not isinstance(config, dict) or not isinstance(config.get('timm_paf'), dict):
        raise ValueError(f'{file} has no timm_paf section; expected a bundle of python -m hub.bundle, while '
                         "timm.create_model('local-dir:...') or 'hf-hub:...' loads other timm models")
    config.setdefault('model_args', {})
    for key, kind in (('architecture', str), ('num_classes', int), ('pretrained_cfg', dict), ('model_args', dict),
                      ('timm_paf.dataset', str), ('timm_paf.threat_model', dict), ('timm_paf.threat_model.norm', str)):
        value: Any = config
        for part in key.split('.'):
            value = value.get(part)
        if not isinstance(value, kind):
            raise ValueError(f'{file}: {key} is {value!r}; expected {kind.__name__}; {mend}')
    about = config['timm_paf']
    if 'act' in about:  # of a converted model
        for key, known in (('act', list_pafs(plain=True)), ('act_share', SHARES)):
            if about.get(key) not in known:
                raise ValueError(f'{file}: timm_paf.{key} is {about.get(key)!r}; expected one of {", ".join(known)}; '
                                 f'{mend}')
        if not isinstance(about.get('act_kwargs'), dict):
            raise ValueError(f'{file}: timm_paf.act_kwargs is {about.get("act_kwargs")!r}; expected dict; {mend}')
    unknown = set(config['pretrained_cfg']) - {field.name for field in dataclasses.fields(PretrainedCfg)}
    if unknown:
        raise ValueError(f'{file}: pretrained_cfg has {", ".join(sorted(unknown))}; expected fields that timm '
                         f'{timm.__version__} has; pip install --upgrade timm')
    return config


def bundle_cfg(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """timm's configuration of the weights, with this bundle's file as their only source."""
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in config['pretrained_cfg'].items()}
    return {
        **given, 'url': None, 'state_dict': None, 'hf_hub_id': None, 'hf_hub_filename': None,
        'source': None, 'custom_load': False, 'architecture': config['architecture'], 'tag': None,
        'num_classes': config['num_classes'], 'file': str(path / WEIGHTS)}


def bundle_sums(path: Path) -> dict[str, str]:
    """The sha256 of each file of a bundle that ``SHA256SUMS`` names; {} where there is no such file.

    Raises:
        ValueError: if it can't be read, or does not name the weights.
    """
    if not (path / SUMS).is_file():
        return {}
    expected = {}
    for line in (path / SUMS).read_text(encoding='utf-8').splitlines():
        match = re.fullmatch(r'([0-9a-f]{64}) [ *](.+)', line)
        if match is None:
            raise ValueError(f'{path / SUMS} has the line {line!r}; expected "<sha256>  <file>", as sha256sum writes')
        expected[match[2].removeprefix('./')] = match[1]
    if WEIGHTS not in expected:
        raise ValueError(f'{path / SUMS} names no {WEIGHTS}; expected its sha256, write the bundle again')
    return expected
