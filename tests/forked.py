"""Programs in forks of a process that has imported what they are built on, which takes most of the time of a start.

``python train_robust.py`` takes 5 seconds until its first line, of which 4 are for torch, torchvision, timm and
accelerate. A fork is not wholly a process of its own: its strings have the hashes of the others, an exception ends it
with a line of multiprocessing's before the traceback, and with exit status 1 also where that is KeyboardInterrupt. So
programs that are killed or interrupted start by themselves in tests.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
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
    process = _CONTEXT.Process(target=_main, args=(list(args), str(cwd), dict(env), [end for _, end in pipes]))
    process.start()
    killer = threading.Timer(timeout, process.kill)
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
        process.kill()
    if timed_out:
        raise subprocess.TimeoutExpired(list(args), timeout, out, err)
    assert process.exitcode is not None
    return subprocess.CompletedProcess(list(args), process.exitcode, out, err)


def _read(end: Connection) -> str:
    with os.fdopen(os.dup(end.fileno()), errors='replace') as file:
        end.close()
        return file.read()


def _main(args: list[str], cwd: str, env: dict[str, str], ends: list[Connection]) -> None:
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
            exec(compile(args[1], '<string>', 'exec'), {'__name__': '__main__'})
        else:
            sys.argv = args
            runpy.run_path(args[0], run_name='__main__')
    finally:
        atexit._run_exitfuncs()
