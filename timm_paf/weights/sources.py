"""Finds the file that timm's configuration of weights points at, so that one reader reads every file for our networks.

timm loads ``checkpoint_path`` itself, after a network is built, with code that runs pickles. For networks of this
package `read_checkpoint_path` puts our reader there; timm's own networks are loaded as before.
"""

from __future__ import annotations

import hashlib
import importlib
import urllib.error
import weakref
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse

import torch
from huggingface_hub import hf_hub_download
from timm.models import PretrainedCfg
from torch import nn

from ..wording import causes, shown
from .checkpoint import load_checkpoint
from .server_fault import is_of_server, server_fault, without_secrets

__all__ = ['checked_models', 'only_source', 'read_checkpoint_path', 'source_file']

_SOURCES = ('state_dict', 'file', 'hf_hub_id', 'url')
_NAMES = ('model.safetensors', 'pytorch_model.bin')  # of timm and of us on the Hub
_Model = TypeVar('_Model', bound=nn.Module)


class _Models:
    """Keeps which networks are of this package, for as long as they live."""

    def __init__(self) -> None:
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def added(self, model: _Model) -> _Model:
        self._models.add(model)
        return model

    def __contains__(self, model: nn.Module) -> bool:
        return model in self._models


checked_models = _Models()


def only_source(overlay: dict[str, Any] | None) -> dict[str, Any]:
    """Returns an overlay of a configuration, in which the sources it names are the only ones."""
    given = dict(overlay or {})
    if any(given.get(key) for key in _SOURCES):
        for key in (*_SOURCES, 'source'):
            given.setdefault(key, None)
    return given


def source_file(cfg: PretrainedCfg, cache_dir: str | Path | None, directory: Path) -> Path:
    """Returns the file of weights that a configuration names, downloaded where it is elsewhere.

    As in timm the first of ``file``, ``hf_hub_id`` and ``url`` counts, and ``hf_hub_id`` first where the source is
    'hf-hub'.

    Args:
        cfg: timm's configuration of the weights.
        cache_dir: a cache for the Hub in place of the usual one.
        directory: where files of a ``url`` are kept.

    Raises:
        ConnectionError: if it can't be downloaded.
        FileNotFoundError: if it is not there.
    """
    if cfg.file and not (cfg.source == 'hf-hub' and cfg.hf_hub_id):
        path = Path(cfg.file)
        if not path.is_dir():
            return path
        names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else _NAMES
        return next((path / name for name in names if (path / name).is_file()), path / names[0])
    if cfg.hf_hub_id:
        return _of_hub(cfg.hf_hub_id, cfg.hf_hub_filename, cache_dir)
    url, name = cfg.url if isinstance(cfg.url, list | tuple) else (cfg.url, '')
    # Addresses of different files may end alike, so the name has a digest of the address.
    name = f'{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(name or urlparse(url).path).name or "weights"}'
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / name).is_file():
        try:
            torch.hub.download_url_to_file(url, str(directory / name), progress=False)
        except (urllib.error.URLError, ConnectionError, ValueError) as error:
            fault = server_fault(error) if is_of_server(error) else shown(error)
            raise ConnectionError(f'{shown(without_secrets(url))} could not be had: {fault}; check the address, or '
                                  "download the file and give pretrained_cfg_overlay=dict(file='...')") from None
    return directory / name


def _of_hub(name: str, filename: str | None, cache_dir: str | Path | None) -> Path:
    from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import LocalEntryNotFoundError as NotFoundHereError  # type: ignore[attr-defined]

    repo, _, revision = name.partition('@')
    names = [filename] if filename else _NAMES
    try:
        for candidate in names:
            try:
                return Path(hf_hub_download(repo, candidate, revision=revision or None, cache_dir=cache_dir))
            except NotFoundHereError:  # there is no network; it is an EntryNotFoundError too
                raise
            except EntryNotFoundError:
                continue
    except Exception as error:  # HTTP libraries have exceptions of their own
        if not isinstance(error, OSError | ValueError) and not any(map(is_of_server, causes(error))):
            raise
        fault = server_fault(error)
        if isinstance(error, HfHubHTTPError | ValueError) and not isinstance(error, NotFoundHereError):
            raise FileNotFoundError(f'{shown(name)} could not be had from the Hub: {fault}; check its name, and with '
                                    'hf auth login the access to it') from None
    else:
        raise FileNotFoundError(f'{shown(name)} on the Hub has no {" and no ".join(names)}; expected the weights there')
    raise ConnectionError(f'{shown(name)} could not be had from the Hub: {fault}; try again later, or give '
                          "pretrained_cfg_overlay=dict(file='...')")


def read_checkpoint_path() -> None:
    """Lets timm read ``checkpoint_path`` of our networks with our reader; its own networks are loaded as before."""
    factory = importlib.import_module('timm.models._factory')
    theirs = factory.load_checkpoint
    if getattr(theirs, 'of_timm_paf', False):
        return

    def load(model: nn.Module, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        if model in checked_models:
            return load_checkpoint(model, checkpoint_path)
        return theirs(model, checkpoint_path, *args, **kwargs)

    load.of_timm_paf = True  # type: ignore[attr-defined]
    factory.load_checkpoint = load  # type: ignore[attr-defined]
