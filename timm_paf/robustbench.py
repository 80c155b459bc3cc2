"""What makes ``robustbench.utils.load_model`` and ``robustbench.benchmark`` work with our models.

Two things. Importing this module lets RobustBench find AutoAttack: the release on PyPI depends on ``pyautoattack`` but
imports ``autoattack``, which only exists on GitHub. And `register` gives a model bundle a name that RobustBench loads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg, generate_default_cfgs, model_entrypoint, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

__all__ = ['load_bundle', 'read_bundle', 'register']

default_cfgs: dict[str, Any] = {}  # timm reads the weights' source of a registered name here

# What RobustBench can be asked for, and the number of classes it passes to timm.
_NUM_CLASSES = {'cifar10': 10, 'cifar100': 100, 'imagenet': 1000}
_THREATS = ('Linf', 'L2', 'corruptions')  # it looks for 'corruptions_3d' under 'corruptions'

_CONFIG, _WEIGHTS, _SUMS = 'config.json', 'model.safetensors', 'SHA256SUMS'


class _AutoAttackFinder(MetaPathFinder, Loader):
    """Finds ``autoattack`` where nothing else did: it stands last in ``sys.meta_path``."""

    origin = __name__  # a string, so that a reloaded module knows the finder and the modules of its predecessor

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, submodule = fullname.partition('.')
        if package != 'autoattack':
            return None
        if submodule and getattr(getattr(sys.modules.get(package), '__spec__', None), 'origin', None) != self.origin:
            return None  # the package is the real one and has no such submodule
        if importlib.util.find_spec(f'py{fullname}') is None:
            # An import statement is told the mend, while importlib.util.find_spec, which only asks, gets its None.
            if not submodule and sys._getframe(2).f_code.co_name == '_find_and_load_unlocked':
                raise ModuleNotFoundError(
                    "No module named 'autoattack', nor pyautoattack to stand in for it; install it with "
                    "pip install 'timm-paf[robustbench]'", name=fullname)
            return None
        return ModuleSpec(fullname, self, origin=self.origin, is_package=not submodule)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        if name == 'autoattack':
            module.__doc__ = 'The interface of autoattack, computed by pyautoattack.'
            module.AutoAttack = _original_autoattack()  # type: ignore[attr-defined]
        elif name == 'autoattack.autoattack':
            module.AutoAttack = sys.modules['autoattack'].AutoAttack  # type: ignore[attr-defined]
        else:
            # The same module under a second name, so that its classes are the same too.
            sys.modules[name] = importlib.import_module(f'py{name}')


if not any(getattr(finder, 'origin', None) == __name__ for finder in sys.meta_path):
    sys.meta_path.append(_AutoAttackFinder())


class _Log:
    """What AutoAttack logs: printed, and appended to a file; its warnings also where it is not verbose."""

    def __init__(self, attack: Any, log_path: str | Path | None) -> None:
        self.attack = attack
        self.log_path = log_path

    def log(self, line: str) -> None:
        print(line)
        if self.log_path is not None:
            with open(self.log_path, 'a') as file:
                file.write(f'{line}\n')

    def warning(self, line: str) -> None:
        self.log(f'Warning: {line}')

    def debug(self, line: str) -> None:
        if self.attack.verbose:
            self.log(line)

    info = debug


def _original_autoattack() -> type:
    """pyautoattack's AutoAttack with the arguments, results and log of the original."""
    import pyautoattack

    versions = ('standard', 'plus', 'rand')

    class AutoAttack(pyautoattack.AutoAttack):  # type: ignore[misc]
        """An ensemble of parameter-free attacks, see https://github.com/fra31/auto-attack.

        Raises:
            AssertionError: if the norm is not Linf, L2 or L1.
            NotImplementedError: if the model is one of TensorFlow.
            ValueError: if attacks are given with a version that has its own, or an unknown version without attacks.
        """

        attacks_to_run: list[str]

        def __init__(
                self, model: Any, norm: str = 'Linf', eps: float = 0.3, seed: int | None = None, verbose: bool = True,
                attacks_to_run: Sequence[str] = (), version: str = 'standard', is_tf_model: bool = False,
                device: torch.device | str = 'cuda', log_path: str | Path | None = None) -> None:
            if is_tf_model:
                raise NotImplementedError('pyautoattack attacks PyTorch models alone; for a TensorFlow model install '
                                          'the original: pip install git+https://github.com/fra31/auto-attack')
            if version in versions and attacks_to_run:
                raise ValueError(f'attacks_to_run is {list(attacks_to_run)}, but version {version!r} has its own; '
                                 "expected version='custom' with it")
            if version not in (*versions, 'custom') and not attacks_to_run:
                # The original would run no attack and report the clean accuracy as the robust one.
                raise ValueError(f"version is {version!r}; expected one of {', '.join(versions)}, or 'custom'")
            # 'custom' postpones what a version sets until the log is the one asked for.
            super().__init__(model, norm=norm, eps=eps, seed=seed, device=device, attacks=list(attacks_to_run),
                             version='custom')
            self.verbose, self.version, self.is_tf_model = verbose, version, is_tf_model
            self.logger = self.apgd.logger = self.apgd_targeted.logger = _Log(self, log_path)
            if version in versions:
                self.set_version(version)

        def set_version(self, version: str = 'standard') -> None:
            self._set_version(version)

        def run_standard_evaluation(
                self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False,
                state_path: Path | None = None) -> Any:
            x_adv, y_adv = super().run_standard_evaluation(x_orig, y_orig, batch_size=bs, state_path=state_path)
            return (x_adv, y_adv) if return_labels else x_adv

        def run_standard_evaluation_individual(
                self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False) -> dict[str, Any]:
            attacks, results = list(self.attacks_to_run), {}
            try:
                for attack in attacks:
                    self.attacks_to_run = [attack]
                    results[attack] = self.run_standard_evaluation(x_orig, y_orig, bs, return_labels)
            finally:
                self.attacks_to_run = attacks
            return results

    AutoAttack.__module__, AutoAttack.__qualname__ = 'autoattack', 'AutoAttack'
    return AutoAttack


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
    for name in (_CONFIG, _WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f'{path} has no {name}; expected a model bundle, as python -m hub.bundle writes')
    config = _read_config(path / _CONFIG)
    try:
        with safe_open(path / _WEIGHTS, framework='pt'):
            pass
    except SafetensorError as error:
        raise ValueError(f'{path / _WEIGHTS} is cut off or no safetensors file ({error}); get it again') from error
    if (path / _SUMS).is_file():
        _check_sums(path)
    return config


def load_bundle(path: str | Path) -> nn.Module:
    """The model of a bundle, with its weights, in eval mode.

    Raises:
        FileNotFoundError, ValueError: as `read_bundle`, or if the weights are not those of the architecture.
    """
    config = read_bundle(path)
    try:
        model: nn.Module = timm.create_model(
            config['architecture'], pretrained=True, pretrained_cfg=_pretrained_cfg(config, Path(path)),
            **config['model_args'])
    except RuntimeError as error:
        raise ValueError(f'{path}: {_WEIGHTS} does not fit {config["architecture"]}: '
                         f'{" ".join(str(error).split())}') from error
    return model.eval()


def register(source: str | Path, name: str) -> str:
    """Make ``robustbench.utils.load_model(name, dataset, threat_model)`` load a bundle.

    The dataset and the threat model are those that the bundle names. `timm.create_model` knows the model too, under
    the name returned; with ``pretrained=True`` it checks the bundle again and loads its weights strictly, with another
    number of classes than the bundle's it raises ValueError.

    Args:
        source: the bundle's directory, or a Hub id ``org/model`` or ``org/model@revision``.
        name: what to call it; letters, digits, ``_`` and ``-``. It goes before a RobustBench model of that name.

    Returns:
        The name in timm, ``<name>_<dataset>_<threat model>`` in lower case with ``_`` for ``-``.

    Raises:
        FileNotFoundError: if the source or a file of it is missing.
        ValueError: if `read_bundle` refuses the bundle, RobustBench does not know its dataset or threat model, or the
            name belongs to another source or to another timm model.
    """
    if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9_-]*', name):
        raise ValueError(f'name is {name!r}; expected letters, digits, _ and -')  # what follows a dot is a tag to timm
    path, origin = _locate(source)
    config = read_bundle(path)
    dataset, norm = config['timm_paf']['dataset'], config['timm_paf']['threat_model']['norm']
    instead = 'load it with timm_paf.robustbench.load_bundle instead'
    for what, found, known in (('dataset', dataset, _NUM_CLASSES), ('threat model', norm, _THREATS)):
        if found not in known:
            raise ValueError(f'{source}: {what} is {found!r}; RobustBench knows {", ".join(known)}; {instead}')
    if config['num_classes'] != _NUM_CLASSES[dataset]:
        raise ValueError(f'{source}: num_classes is {config["num_classes"]}; RobustBench expects '
                         f'{_NUM_CLASSES[dataset]} for {dataset}; {instead}')

    full_name = f'{name}_{dataset}_{norm}'.lower().replace('-', '_')
    if timm.is_model(full_name):
        registered = getattr(model_entrypoint(full_name), 'bundle_origin', None)
        if registered is None:
            raise ValueError(f'{full_name} is another timm model; register {source} under another name than {name}')
        if registered != origin:
            raise ValueError(f'{full_name} is registered for {registered}; register {origin} under another name')
        return full_name

    def create(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
        num_classes = kwargs.get('num_classes', config['num_classes'])
        if num_classes != config['num_classes']:
            raise ValueError(f'{full_name}: num_classes is {num_classes}; expected {config["num_classes"]}, or '
                             f'timm.create_model({config["architecture"]!r}) for another head')
        if pretrained:
            read_bundle(path)  # the files may have changed since
        cfg = resolve_pretrained_cfg(full_name, pretrained_cfg).to_dict()
        cfg['architecture'] = config['architecture']  # what the model is saved as, readable where nothing is registered
        model: nn.Module = model_entrypoint(config['architecture'])(
            pretrained=pretrained, pretrained_cfg=cfg, **{**config['model_args'], **kwargs})
        return model

    create.__name__ = create.__qualname__ = full_name
    create.__doc__ = f'{config["architecture"]} with the weights of {origin}.'
    create.bundle_origin = origin  # type: ignore[attr-defined]  # kept in timm's registry, which outlives a reload
    default_cfgs.update(generate_default_cfgs({full_name: _pretrained_cfg(config, path)}))
    setattr(sys.modules[__name__], full_name, create)
    register_model(create)
    return full_name


def _locate(source: str | Path) -> tuple[Path, str]:
    """The directory of a source, downloaded where it is on the Hub, and what identifies the source."""
    if Path(source).is_dir() or not re.fullmatch(r'[\w.-]+/[\w.-]+(@[\w./-]+)?', str(source)):
        return Path(source).resolve(), str(Path(source).resolve())
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError  # type: ignore[attr-defined]

    repo, _, revision = str(source).partition('@')
    try:
        config = Path(hf_hub_download(repo, _CONFIG, revision=revision or None))
        # The directory's name is the commit: both files of one commit, also where a branch moves in between.
        hf_hub_download(repo, _WEIGHTS, revision=config.parent.name)
    except (EntryNotFoundError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f'{source} is no directory here, and on the Hub: {reason}; check its name, and with '
                                'hf auth login the access to it') from error
    return config.parent, str(source)


def _read_config(file: Path) -> dict[str, Any]:
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
    if not timm.is_model(config['architecture']):
        raise ValueError(f'{file}: architecture is {config["architecture"]!r}; expected a model of this timm_paf or of '
                         f'timm {timm.__version__}; pip install --upgrade timm-paf timm')
    unknown = set(config['pretrained_cfg']) - {field.name for field in dataclasses.fields(PretrainedCfg)}
    if unknown:
        raise ValueError(f'{file}: pretrained_cfg has {", ".join(sorted(unknown))}; expected fields that timm '
                         f'{timm.__version__} has; pip install --upgrade timm')
    return config


def _pretrained_cfg(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """timm's configuration of the weights, with this bundle's file as their only source."""
    return {
        **config['pretrained_cfg'], 'url': None, 'state_dict': None, 'hf_hub_id': None, 'hf_hub_filename': None,
        'source': None, 'custom_load': False, 'architecture': config['architecture'], 'tag': None,
        'num_classes': config['num_classes'], 'file': str(path / _WEIGHTS)}


def _check_sums(path: Path) -> None:
    """Compare the files that are loaded with ``SHA256SUMS``; others, such as the model card, may be edited."""
    expected = {}
    for line in (path / _SUMS).read_text(encoding='utf-8').splitlines():
        match = re.fullmatch(r'([0-9a-f]{64}) [ *](.+)', line)
        if match is None:
            raise ValueError(f'{path / _SUMS} has the line {line!r}; expected "<sha256>  <file>", as sha256sum writes')
        expected[match[2].removeprefix('./')] = match[1]
    if _WEIGHTS not in expected:
        raise ValueError(f'{path / _SUMS} names no {_WEIGHTS}; expected its sha256, write the bundle again')
    for name in (_CONFIG, _WEIGHTS):
        digest = hashlib.sha256()
        with open(path / name, 'rb') as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if expected.get(name, digest.hexdigest()) != digest.hexdigest():
            raise ValueError(f'{path / name}: sha256 is {digest.hexdigest()}; {_SUMS} expects {expected[name]}; '
                             'copy or download the bundle again')
