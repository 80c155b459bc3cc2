"""Programs in forks of a process that has imported what they are built on, which takes most of the time of a start.

``python train_robust.py`` takes 5 seconds until its first line, of which 4 are for torch, torchvision, timm and
accelerate. A fork is not wholly a process of its own: its strings have the hashes of the others, its limits are the
first one's, an exception ends it with a line of multiprocessing's before the traceback, and with exit status 1 also
where that is KeyboardInterrupt. So programs that are killed or interrupted start by themselves in tests.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

__all__ = ['can_fork', 'run_forked']

READ_LATE = {'PYTEST_CURRENT_TEST', 'CIFAR10_ROOT', 'ACCELERATE_USE_CPU', 'TIMM_PAF_DEBUG', 'PYTHONWARNINGS',
             'TORCHINDUCTOR_CACHE_DIR', 'KMP_INIT_AT_FORK', 'KMP_DUPLICATE_LIB_OK'}
"""Environment variables that no import reads, that torch sets itself, or, as PYTHONWARNINGS, that are as in a fork."""
_CONTEXT = multiprocessing.get_context('forkserver')
_CONTEXT.set_forkserver_preload(['torch', 'torchvision', 'timm', 'accelerate'])
_ENVIRONMENT = dict(os.environ)  # of the process that is forked, which starts with this module's first use


def can_fork(args: Sequence[str], env: Mapping[str, str]) -> bool:
    """Returns whether a fork does the same as ``python ARGS`` with the variables ``env``, and warnings ignored."""
    return (args[0] in ('-m', '-c') or args[0].endswith('.py')) and env.get('PYTHONWARNINGS') == 'ignore' and all(
        _ENVIRONMENT.get(name) == env.get(name) for name in {*_ENVIRONMENT, *env} - READ_LATE)


def run_forked(args: Sequence[str], cwd: Path, env: Mapping[str, str], timeout: float,
               ) -> subprocess.CompletedProcess[str]:
    """Runs ``python ARGS`` as `subprocess.run` does, with its output as text.

    Raises:
        subprocess.TimeoutExpired: if it takes longer than ``timeout`` seconds; it is killed.
    """
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(2)]
    process = _CONTEXT.Process(target=_main, args=(
        list(args), str(cwd), dict(env), _mask(), [end for _, end in pipes]))
    process.start()
    assert process.pid is not None
    killer = threading.Timer(timeout, _kill, (process.pid,))
    killer.start()
    try:
        for _, end in pipes:
            end.close()
        with ThreadPoolExecutor(2) as pool:  # until all processes that it started have closed their ends too
            out, err = pool.map(_read, [end for end, _ in pipes])
        process.join()
    finally:
        timed_out = not killer.is_alive()
        killer.cancel()
        _kill(process.pid)
    if timed_out:
        raise subprocess.TimeoutExpired(list(args), timeout, out, err)
    assert process.exitcode is not None
    return subprocess.CompletedProcess(list(args), process.exitcode, out, err)


def _read(end: Connection) -> str:
    with os.fdopen(os.dup(end.fileno()), errors='replace') as file:
        end.close()
        return file.read()


def _mask() -> int:
    os.umask(mask := os.umask(0o077))
    return mask


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _main(args: list[str], cwd: str, env: dict[str, str], mask: int, ends: list[Connection]) -> None:
    os.setsid()  # with all that it starts it is killed at once
    os.umask(mask)
    multiprocessing.set_start_method('fork', force=True)  # as in a program of Linux
    for stream, end in zip((sys.stdout, sys.stderr), ends):
        os.dup2(end.fileno(), stream.fileno())
        end.close()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    np.random.seed()  # which is that of all forks
    tests = os.path.dirname(__file__)
    sys.path[:] = [path for path in sys.path if path and os.path.commonpath((os.path.abspath(path), tests)) != tests]
    sys.path.insert(0, os.path.dirname(os.path.abspath(args[0])) if args[0].endswith('.py') else cwd)
    warnings.simplefilter('ignore')
    sys.orig_argv = [sys.executable, *args]
    try:
        if args[0] == '-m':
            sys.argv = args[1:]
            runpy.run_module(args[1], run_name='__main__', alter_sys=True)
        elif args[0] == '-c':
            sys.argv = ['-c', *args[2:]]
            sys.modules['__main__'] = module = types.ModuleType('__main__')
            exec(compile(args[1], '<string>', 'exec'), vars(module))
        else:
            sys.argv = args
            runpy.run_path(args[0], run_name='__main__')
    finally:
        atexit._run_exitfuncs()
