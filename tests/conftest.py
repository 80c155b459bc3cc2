"""What tests share: where CIFAR-10 is, and programs run as a user runs them."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import can_fork, run_forked
from hypothesis import settings

settings.register_profile('any machine', deadline=None)  # no test depends on how busy a machine is
settings.load_profile('any machine')

ROOT = Path(__file__).resolve().parent.parent

Program = Callable[..., 'subprocess.CompletedProcess[str]']


LONGEST = ('training', 'hub', 'evaluation')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the directories first whose files take longest, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: item.path.parent.name not in LONGEST)


@pytest.fixture(scope='session')
def cifar10_root() -> Path:
    """Directory with the real CIFAR-10; tests without it skip."""
    root = os.environ.get('CIFAR10_ROOT')
    if not root:
        pytest.skip('CIFAR10_ROOT is not set; it names the directory that holds cifar-10-batches-py')
    return Path(root)


@pytest.fixture(scope='session')
def robustbench_checkout() -> Path:
    """A clone of RobustBench, whose form and records no package has; tests without it skip."""
    root = os.environ.get('ROBUSTBENCH_CHECKOUT')
    if not root:
        pytest.skip('ROBUSTBENCH_CHECKOUT is not set; it names a clone of github.com/RobustBench/robustbench')
    return Path(root)


@contextlib.contextmanager
def memory_left(size: int) -> Iterator[None]:
    """Lets this process have so many bytes more than it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    has = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope='session')
def program() -> Program:
    """Run ``python ARGS`` in the repository, quietly; the finished process with its output as text."""
    def run(*args: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        texts = [*map(str, args)]
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', **kwargs.pop('env', {})}
        if not kwargs and can_fork(texts, env):
            return run_forked(texts, ROOT, env, timeout=300)
        return subprocess.run([sys.executable, *texts], cwd=ROOT, env=env, text=True, capture_output=True, timeout=300,
                              **kwargs)
    return run


def assert_one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The program failed with one line that has these words, and without a traceback."""
    assert done.returncode not in (0, None)
    lines = [line for line in done.stderr.splitlines() if line.strip() and '%|' not in line]
    assert 'Traceback' not in done.stderr, done.stderr
    assert lines, done.stderr
    for word in words:
        assert word in lines[-1], (word, done.stderr)


def unlike_its_verdicts(evaluation: dict[str, Any], n: int) -> dict[str, Any]:
    """The record of an evaluation with the same accuracies of ``n`` images, without what is of each image."""
    for result in evaluation['attacks'].values():
        result.pop('verdicts', None)
        result.update(n=n, correct=round(result['accuracy'] * n))
        result['accuracy'] = result['correct'] / n
    return {**{key: value for key, value in evaluation.items() if key not in ('worst_case', 'evidence')},
            'images': f'first {n}', 'n': n}
