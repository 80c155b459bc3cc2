"""Reads model bundles, the directories of ``timm-paf bundle``: weights, timm's configuration and checksums."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from torch import nn

from ..convert import NETWORK_FAULTS, create_converted, normalizes_by_hook
from ..files import is_of_machine, sha256
from ..wording import reason_of, shown
from .bundle_files import CHECKSUMS, CONFIG, WEIGHTS, check_links, read_checksums, read_config
from .checkpoint import check_finite
from .checkpoint_files import read_file
from .server_fault import is_of_server, server_fault
from .size_limit import SizeLimit

__all__ = ['build_bundle', 'bundle_cfg', 'load_bundle', 'locate_bundle', 'read_bundle']


def read_bundle(path: str | Path) -> dict[str, Any]:
    """Returns the configuration of a model bundle, after checking the bundle.

    Args:
        path: a directory with ``config.json``, ``model.safetensors`` and mostly ``SHA256SUMS``, as `hub.bundle` writes.

    Returns:
        The content of ``config.json``: ``architecture`` (a name timm knows), ``num_classes``, ``model_args`` (also
        where the file has none), ``pretrained_cfg``, and ``timm_paf`` with ``dataset`` and ``threat_model``.

    Raises:
        FileNotFoundError: if the directory or one of the two files is missing.
        ValueError: if the configuration is not one of ours, a file does not have its sha256 or is a link to what lies
            outside, or the weights are cut off.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f'{path} is no directory; expected a model bundle (load_bundle and register take a Hub '
                                'id such as org/model too)')
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f'{path} has no {name}; expected a model bundle, as timm-paf bundle writes')
    check_links(path)
    config = read_config(path / CONFIG)
    if not timm.is_model(config['architecture']):
        raise ValueError(f'{path / CONFIG}: architecture is {config["architecture"]!r}; expected a model of this '
                         f'timm_paf or of timm {timm.__version__}; pip install --upgrade timm-paf timm')
    try:
        with safe_open(path / WEIGHTS, framework='pt'):
            pass
    except SafetensorError as error:
        raise ValueError(f'{path / WEIGHTS} is cut off or no safetensors file ({shown(error)}); get it '
                         'again') from error
    expected = read_checksums(path)
    for name in (CONFIG, WEIGHTS):  # only these are loaded; other files, such as the model card, may be edited
        found = sha256(path / name)
        if expected.get(name, found) != found:
            raise ValueError(f'{path / name}: sha256 is {found}; {CHECKSUMS} expects {expected[name]}; '
                             'copy or download the bundle again')
    return config


def load_bundle(path: str | Path) -> nn.Module:
    """Loads the model of a bundle, with its weights, in eval mode.

    Args:
        path: the bundle's directory, see `read_bundle`, or a Hub id ``org/model`` or ``org/model@revision``.

    Returns:
        The network on the CPU: images (batch, channels, height, width) in [0, 1] to logits (batch, classes).

    Raises:
        FileNotFoundError: if the directory, the configuration or the weights are missing.
        ValueError: if `read_bundle` refuses the bundle, or the weights are not those of the architecture.
    """
    path = Path(path) if Path(path).is_dir() else locate_bundle(path)[0]
    config = read_bundle(path)
    try:
        model = build_bundle(
            config, path, pretrained=True, pretrained_cfg=bundle_cfg(config, path), **config['model_args'])
    except NETWORK_FAULTS as error:
        if is_of_machine(error):
            raise
        raise ValueError(f'{path}: {WEIGHTS} or {CONFIG} does not fit {config["architecture"]}: '
                         f'{reason_of(error, 1000)}') from error
    return model.eval()


def locate_bundle(source: str | Path) -> tuple[Path, str]:
    """Returns the directory of a source, downloaded where it is on the Hub, and the text that identifies the source."""
    if Path(source).is_dir() or not re.fullmatch(r'[\w.-]+/[\w.-]+(@[\w./-]+)?', str(source)):
        return Path(source).resolve(), str(Path(source).resolve())
    from huggingface_hub import hf_hub_download

    repo, _, revision = str(source).partition('@')
    try:
        config = Path(hf_hub_download(repo, CONFIG, revision=revision or None))
        # The directory's name is the commit, so both files are of one commit, also where a branch moves in between.
        hf_hub_download(repo, WEIGHTS, revision=config.parent.name)
    except Exception as error:  # HTTP libraries have exceptions of their own
        if not is_of_server(error):
            raise
        raise FileNotFoundError(f'{source} is no directory here, and on the Hub: {server_fault(error)}; check its '
                                'name, and with hf auth login the access to it') from None
    return config.parent, str(source)


def build_bundle(config: dict[str, Any], path: Path, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Returns the network that a bundle's configuration describes, converted as it was for training.

    Args:
        config: the result of `read_bundle`.
        path: the bundle's directory.
        pretrained: whether to load the bundle's weights, strictly.
        **kwargs: arguments of ``timm.create_model``; ``pretrained_cfg`` names the same weights.
    """
    weights = read_file(path / WEIGHTS) if pretrained else {}
    check_finite(weights, path / WEIGHTS)
    about, bound = config['timm_paf'], SizeLimit(path / WEIGHTS) if pretrained else nullcontext()
    if 'act' not in about and not normalizes_by_hook(config['architecture'], kwargs):
        with bound:
            model: nn.Module = timm.create_model(config['architecture'], pretrained=pretrained, **kwargs)
        return model
    kwargs.setdefault('num_classes', config['num_classes'])
    model = create_converted(config['architecture'], about.get('act'), about.get('act_share'), about.get('act_kwargs'),
                             within=bound, **kwargs)
    if pretrained:
        model.load_state_dict(weights)
    return model


def bundle_cfg(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns timm's configuration of the weights, with this bundle's file as their only source."""
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in config['pretrained_cfg'].items()}
    return {
        **given, 'url': None, 'state_dict': None, 'hf_hub_id': None, 'hf_hub_filename': None,
        'source': None, 'custom_load': False, 'architecture': config['architecture'], 'tag': None,
        'num_classes': config['num_classes'], 'file': str(path / WEIGHTS)}


