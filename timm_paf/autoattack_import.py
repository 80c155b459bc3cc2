"""Lets ``import autoattack`` find pyautoattack where the original is not installed.

RobustBench's release on PyPI depends on ``pyautoattack`` but imports ``autoattack``, which exists on GitHub alone.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class _AutoAttackFinder(MetaPathFinder, Loader):
    """A finder that stands last in ``sys.meta_path``: it finds ``autoattack`` where nothing else did."""

    origin = __name__  # a string, so that a reloaded module knows the finder and the modules of its predecessor
    stand_in = 'pyautoattack'  # files.imported_version asks for it

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, submodule = fullname.partition('.')
        if package != 'autoattack':
            return None
        if submodule and getattr(getattr(sys.modules.get(package), '__spec__', None), 'origin', None) != self.origin:
            return None  # the package is the real one and has no such submodule
        if importlib.util.find_spec(f'py{fullname}') is None:
            # An import statement gets an error that says the fix; importlib.util.find_spec, which only asks, gets None.
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
    """The log of AutoAttack: it is printed and appended to a file, warnings also where AutoAttack is not verbose."""

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
    """Returns pyautoattack's AutoAttack with the arguments, results and log of the original."""
    import pyautoattack

    versions = ('standard', 'plus', 'rand')

    class AutoAttack(pyautoattack.AutoAttack):  # type: ignore[misc]
        """An ensemble of parameter-free attacks, see https://github.com/fra31/auto-attack.

        Raises:
            AssertionError: if the norm is not Linf, L2 or L1.
            NotImplementedError: if the model is one of TensorFlow.
            ValueError: if attacks are given with a version that has its own, or a version is unknown and no attacks
                are given.
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
            # With 'custom' the attacks of a version are set only after the log is the one asked for.
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
