"""What makes ``robustbench.utils.load_model`` and ``robustbench.benchmark`` work with our models.

Two things. Importing this module lets RobustBench find AutoAttack: the release on PyPI depends on ``pyautoattack`` but
imports ``autoattack``, which only exists on GitHub. And `register` gives a model bundle a name that RobustBench loads.
"""

from __future__ import annotations

import importlib.util
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
from timm.models import generate_default_cfgs, model_entrypoint, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from .bundle import CONFIG, WEIGHTS, build_bundle, bundle_cfg, load_bundle, read_bundle
from .files import sha256

__all__ = ['load_bundle', 'read_bundle', 'register']

default_cfgs: dict[str, Any] = {}  # timm reads the weights' source of a registered name here

# What RobustBench can be asked for, and the number of classes it passes to timm.
_NUM_CLASSES = {'cifar10': 10, 'cifar100': 100, 'imagenet': 1000}
_THREATS = ('Linf', 'L2', 'corruptions')  # it looks for 'corruptions_3d' under 'corruptions'


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
        same = getattr(model_entrypoint(full_name), 'weights_sha256', None) == sha256(path / WEIGHTS)  # of the zoo
        if registered != origin and not same:
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
        return build_bundle(config, path, pretrained, pretrained_cfg=cfg, **{**config['model_args'], **kwargs})

    create.__name__ = create.__qualname__ = full_name
    create.__doc__ = f'{config["architecture"]} with the weights of {origin}.'
    create.bundle_origin = origin  # type: ignore[attr-defined]  # kept in timm's registry, which outlives a reload
    default_cfgs.update(generate_default_cfgs({full_name: bundle_cfg(config, path)}))
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
        config = Path(hf_hub_download(repo, CONFIG, revision=revision or None))
        # The directory's name is the commit: both files of one commit, also where a branch moves in between.
        hf_hub_download(repo, WEIGHTS, revision=config.parent.name)
    except (EntryNotFoundError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f'{source} is no directory here, and on the Hub: {reason}; check its name, and with '
                                'hf auth login the access to it') from error
    return config.parent, str(source)
