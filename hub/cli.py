"""The parts that the programs share: their parser, the one line of a mistake, and calls of one another."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from timm_paf.training.config import did_you_mean, plain_flags


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that names the nearest option for one that it does not know, and takes ``--flag true`` too."""

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        flags = [action.option_strings[0][2:] for action in self._actions
                 if isinstance(action, argparse.BooleanOptionalAction) and action.option_strings]
        return super().parse_args(plain_flags(sys.argv[1:] if args is None else args, flags))

    def error(self, message: str) -> NoReturn:
        if wrong := re.match(r'unrecognized arguments: (--[\w-]+)', message):
            message += did_you_mean(wrong[1], [s for action in self._actions for s in action.option_strings])
        sys.exit(f'{self.prog}: {message}; see --help')


@contextlib.contextmanager
def one_line(
        prog: str, extra: str = 'train', errors: tuple[type[Exception], ...] = (), show: Callable[[str], str] = str,
) -> Iterator[None]:
    """Ends the program with one line where a user made a mistake; TIMM_PAF_DEBUG=1 shows the traceback as well.

    Args:
        prog: name of the program.
        extra: the extra of timm-paf that installs a missing optional package.
        errors: further exceptions that are a user's mistake, beside ValueError and OSError.
        show: function that changes a text before it is shown.
    """
    shown: tuple[type[Exception], ...] = (ModuleNotFoundError, ValueError, OSError, *errors)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f'{prog}: stopped; the same command resumes')
    except shown as error:
        if os.environ.get('TIMM_PAF_DEBUG'):
            print(show(traceback.format_exc()), file=sys.stderr)
        fix = f"; pip install 'timm-paf[{extra}]'" if isinstance(error, ModuleNotFoundError) and error.name else ''
        text = ' '.join(str(error).split())
        sys.exit(show(f'{prog}: {text}{"" if fix.strip("; ") in text else fix}'))


def call(*command: object) -> None:
    """Runs a program of timm_paf as a user would type it, ``call('train', '--epochs', 1)``; ends where it fails."""
    words = [str(word) for word in command]
    print(f'\n$ {shlex.join(("timm-paf", *words))}', flush=True)
    # The process has a group of its own: Ctrl-C reaches this program alone, which tells one that trains to save.
    process = subprocess.Popen([sys.executable, '-W', 'ignore', '-m', 'timm_paf', *words], process_group=0)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if status:
        sys.exit(status)
