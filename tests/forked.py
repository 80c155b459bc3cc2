"""Programs in forks of a process that has imported what they are built on, which takes most of the time of a start.

``python train_robust.py`` takes 5 seconds until its first line, of which 4 are for torch, torchvision, timm and
accelerate. What a fork has of them depends on no argument or directory, and on the variables of `READ_AT_IMPORT` alone.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ['Forked', 'can_fork']

READ_AT_IMPORT = ('PYTHON', 'LD_', 'OMP_', 'MKL_', 'KMP_', 'TORCH', 'PYTORCH', 'CUDA', 'NVIDIA', 'TIMM', 'HF_',
                  'HUGGINGFACE', 'XDG_', 'HOME')
"""How the names of environment variables begin that Python and these packages read when they start."""
_CONTEXT = multiprocessing.get_context('forkserver')
_CONTEXT.set_forkserver_preload(['torch', 'torchvision', 'timm', 'accelerate'])


def can_fork(args: Sequence[str], env: Mapping[str, str]) -> bool:
    """Returns whether a fork does the same as ``python ARGS`` with these variables changed."""
    return (args[0] in ('-m', '-c') or args[0].endswith('.py')) and not any(
        name.startswith(READ_AT_IMPORT) and os.environ.get(name) != value for name, value in env.items())


class Forked:
    """``python ARGS`` in a fork, with what a `subprocess.Popen` of it would have; output is text.

    Args:
        args: a file, or ``-m`` and a module, or ``-c`` and code, with arguments.
        cwd: the directory that it runs in.
        env: all its variables.
    """

    def __init__(self, args: Sequence[str], cwd: Path, env: Mapping[str, str]) -> None:
        self.args = list(args)
        self._directory = tempfile.TemporaryDirectory()
        self._files = [Path(self._directory.name, name) for name in ('stdout', 'stderr')]
        self._process = _CONTEXT.Process(
            target=_main, args=(self.args, str(cwd), dict(env), list(map(str, self._files))))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        stdout, stderr = (file.read_text() if file.exists() else '' for file in self._files)
        return stdout, stderr

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _main(args: list[str], cwd: str, env: dict[str, str], files: list[str]) -> None:
    for stream, file in zip((sys.stdout, sys.stderr), files):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
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
