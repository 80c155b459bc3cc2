"""Gives a bundle a name that ``robustbench.utils.load_model`` and ``robustbench.benchmark`` load.

Importing this module lets RobustBench find AutoAttack too: see `timm_paf.autoattack_import`.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import timm
from timm.models import generate_default_cfgs, model_entrypoint, register_model, resolve_pretrained_cfg
from torch import nn

from . import autoattack_import  # noqa: F401  lets RobustBench find AutoAttack
from .files import is_of_machine, sha256
from .weights.bundle import build_bundle, bundle_cfg, load_bundle, locate_bundle, read_bundle
from .weights.bundle_files import WEIGHTS
from .wording import reason_of

__all__ = ['load_bundle', 'read_bundle', 'register', 'zoo_entries']

default_cfgs: dict[str, Any] = {}  # timm reads the weights' source of a registered name here

# The data sets of RobustBench, with the number of classes that it passes to timm, and its threat models.
_NUM_CLASSES = {'cifar10': 10, 'cifar100': 100, 'imagenet': 1000}
_THREATS = ('Linf', 'L2', 'corruptions')  # RobustBench looks for 'corruptions_3d' under 'corruptions'


def register(source: str | Path, name: str) -> str:
    """Makes ``robustbench.utils.load_model(name, dataset, threat_model)`` load a bundle.

    The dataset and the threat model are those that the bundle names. `timm.create_model` knows the model too, under
    the name returned; with ``pretrained=True`` it checks the bundle again and loads its weights strictly, with another
    number of classes than the bundle's it raises ValueError.

    Args:
        source: the bundle's directory, or a Hub id ``org/model`` or ``org/model@revision``.
        name: name for RobustBench, of letters, digits, ``_`` and ``-``. It is preferred to a RobustBench model of that
            name, which is a warning.

    Returns:
        The name in timm, ``<name>_<dataset>_<threat model>`` in lower case with ``_`` for ``-``.

    Raises:
        FileNotFoundError: if the source or a file of it is missing.
        ValueError: if `read_bundle` refuses the bundle, RobustBench does not know its dataset or threat model, or the
            name belongs to another source or to another timm model.
    """
    if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9_-]*', name):
        raise ValueError(f'name is {name!r}; expected letters, digits, _ and -')  # timm splits tags off at a dot
    path, origin = locate_bundle(source)
    config = read_bundle(path)
    dataset, norm = config['timm_paf']['dataset'], config['timm_paf']['threat_model']['norm']
    instead = 'load it with timm_paf.robustbench.load_bundle instead'
    for what, found, known in (('dataset', dataset, _NUM_CLASSES), ('threat model', norm, _THREATS)):
        if found not in known:
            raise ValueError(f'{source}: {what} is {found!r}; RobustBench knows {", ".join(known)}; {instead}')
    if config['num_classes'] != _NUM_CLASSES[dataset]:
        raise ValueError(f'{source}: num_classes is {config["num_classes"]}; RobustBench expects '
                         f'{_NUM_CLASSES[dataset]} for {dataset}; {instead}')

    full_name = _full_name(name, dataset, norm)
    if timm.is_model(full_name):
        registered = getattr(model_entrypoint(full_name), 'bundle_origin', None)
        if registered is None:
            raise ValueError(f'{full_name} is another timm model; register {source} under another name than {name}')
        same = getattr(model_entrypoint(full_name), 'weights_sha256', None) == sha256(path / WEIGHTS)  # the zoo has it
        if registered != origin and not same:
            raise ValueError(f'{full_name} is registered for {registered}; register {origin} under another name')
        return full_name
    if _is_published(full_name):
        warnings.warn(f'{name} is a model of RobustBench too; load_model({name!r}, dataset={dataset!r}, '
                      f'threat_model={norm!r}) gives {origin} from now on', stacklevel=2)

    def create(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
        num_classes = kwargs.get('num_classes', config['num_classes'])
        if num_classes != config['num_classes']:
            raise ValueError(f'{full_name}: num_classes is {num_classes}; expected {config["num_classes"]}, or '
                             f'timm.create_model({config["architecture"]!r}) for another head')
        if pretrained:
            read_bundle(path)  # the files may have changed since
        cfg = resolve_pretrained_cfg(full_name, pretrained_cfg).to_dict()
        cfg['architecture'] = config['architecture']  # saved with the model, readable where nothing is registered
        return build_bundle(config, path, pretrained, pretrained_cfg=cfg, **{**config['model_args'], **kwargs})

    create.__name__ = create.__qualname__ = full_name
    create.__doc__ = f'{config["architecture"]} with the weights of {origin}.'
    create.bundle_origin = origin  # type: ignore[attr-defined]  # kept in timm's registry, which outlives a reload
    default_cfgs.update(generate_default_cfgs({full_name: bundle_cfg(config, path)}))
    setattr(sys.modules[__name__], full_name, create)
    register_model(create)
    return full_name


def zoo_entries() -> list[tuple[str, str, dict[str, Any]]] | None:
    """Returns the entries of the installed RobustBench by name, with their data set and threat model; None without it.

    Raises:
        ImportError: if RobustBench is there and does not start: a package is missing, or of another version.
    """
    with warnings.catch_warnings():  # of what its packages import
        warnings.filterwarnings('ignore', 'pkg_resources is deprecated', UserWarning)
        try:
            zoo = importlib.import_module('robustbench.model_zoo.models')
        except ImportError as error:
            if isinstance(error, ModuleNotFoundError) and (error.name or '').partition('.')[0] == 'robustbench':
                return None
            raise  # it is there, and something that it needs is not
        except Exception as error:  # of the many packages that it imports
            if is_of_machine(error):
                raise
            raise ImportError(f'{type(error).__name__}: {reason_of(error)}') from error
    return [(dataset.value, threat.value, entries) for dataset, boards in zoo.model_dicts.items()
            for threat, entries in boards.items()]


def _is_published(full_name: str) -> bool:
    """Returns whether RobustBench has a model that it would ask timm for by this name."""
    try:
        entries = zoo_entries() or ()
    except ImportError:  # load_model, which needs it, says so
        return False
    return any(_full_name(name, dataset, norm) == full_name for dataset, norm, found in entries for name in found)


def _full_name(name: str, dataset: str, norm: str) -> str:
    """Returns the name under which RobustBench looks for a model in timm (`load_model` in robustbench/utils.py)."""
    return f'{name}_{dataset}_{norm}'.lower().replace('-', '_')
