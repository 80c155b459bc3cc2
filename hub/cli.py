"""The parts that the programs share: their parser, the one line of a mistake, and calls of one another."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from timm_paf.files import is_of_machine
from timm_paf.training.config import Config, plain_flags
from timm_paf.training.option import flag_of, is_flag, negated, options_of
from timm_paf.weights.server_fault import is_of_server, server_fault
from timm_paf.wording import causes, did_you_mean, reason_of


def user_path(text: str) -> Path:
    """Returns a path with ``~`` as the home directory, also where the shell left it: ``--output=~/runs``."""
    return Path(os.path.expanduser(text))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that names the nearest option for one that it does not know, and takes ``--flag true`` too.

    Options are not abbreviated, as in train_robust.py.

    Args:
        takes_train: whether the program takes options of train behind ``--``.
    """

    def __init__(self, *args: Any, takes_train: bool = False, **kwargs: Any) -> None:
        self.takes_train = takes_train
        super().__init__(*args, **{'allow_abbrev': False, **kwargs})

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        flags = [action.option_strings[0][2:] for action in self._actions
                 if isinstance(action, argparse.BooleanOptionalAction) and action.option_strings]
        return super().parse_args(plain_flags(sys.argv[1:] if args is None else args, flags))

    def error(self, message: str) -> NoReturn:
        if wrong := re.match(r'unrecognized arguments: (--[\w-]+)', message):
            of_train = {flag for name, (kind, _) in options_of(Config).items() for flag in (
                flag_of(name), *([negated(flag_of(name))] if is_flag(kind) else ()))}
            if self.takes_train and wrong[1] in of_train:
                message += '; an option of train goes behind --'
            else:
                message += did_you_mean(wrong[1], [s for action in self._actions for s in action.option_strings
                                                   if not isinstance(action, argparse._HelpAction)])
        sys.exit(f'{self.prog}: {message}; see --help')


def split_options(args: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Returns a program's own arguments, and those behind ``--`` that are for train."""
    words = list(sys.argv[1:] if args is None else args)
    at = words.index('--') if '--' in words else len(words)
    return words[:at], words[at + 1:]


class _Retries(logging.Filter):
    """Lets huggingface_hub say that it tries again, but nothing of what a server sent: see `weights.server_fault`."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        status = re.match(r'HTTP Error \d{3}\b', text)
        record.msg, record.args = f'{status[0] if status else "a broken connection"}: huggingface_hub tries again', ()
        record.exc_info = None
        return status is not None or 'thrown while requesting' in text or 'Error while downloading' in text


_RETRIES = _Retries()


def _trace(error: BaseException) -> str:
    """Returns the tracebacks of an exception and its causes; of those that a server may have words in, the type."""
    chain = list(causes(error))
    own = [not is_of_server(error), *[not any(map(is_of_server, chain))] * (len(chain) - 1)]
    return '\n'.join(f'Traceback (most recent call last):\n{"".join(traceback.format_tb(each.__traceback__))}'
                     f'{type(each).__name__}: {each if is_own else ""}' for each, is_own in zip(chain[::-1], own[::-1]))


def _nobody_reads() -> bool:
    """Returns whether who read this program's output has ended, as ``head`` does."""
    output = select.poll()
    with contextlib.suppress(io.UnsupportedOperation, AttributeError):  # what is no file, or closed
        output.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


@contextlib.contextmanager
def one_line(prog: str, extra: str = 'train', errors: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Ends the program with one line where a user made a mistake; TIMM_PAF_DEBUG=1 shows the traceback as well.

    Args:
        prog: name of the program.
        extra: the extra of timm-paf that installs a missing optional package.
        errors: further exceptions that are no fault of the program, beside ValueError, OSError and a lack of memory.
    """
    for handler in logging.getLogger('huggingface_hub').handlers:
        handler.addFilter(_RETRIES)
    shown: tuple[type[Exception], ...] = (ModuleNotFoundError, ValueError, OSError, *errors)
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where it is known what to do if nobody reads it
    except KeyboardInterrupt:
        sys.exit(f'{prog}: stopped; the same command resumes')
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is printed at the end
            sys.exit(1)
        if not (isinstance(error, shown) or is_of_machine(error)):
            raise
        if os.environ.get('TIMM_PAF_DEBUG'):
            print(_trace(error), file=sys.stderr)
        fix = f"; pip install 'timm-paf[{extra}]'" if isinstance(error, ModuleNotFoundError) and error.name else ''
        text = server_fault(error) if is_of_server(error) else reason_of(error, None)
        sys.exit(f'{prog}: {text}{"" if fix.strip("; ") in text else fix}')


def call(*command: object) -> None:
    """Runs a program of timm_paf as a user would type it, ``call('train', '--epochs', 1)``; ends where it fails."""
    words = [str(word) for word in command]
    print(f'\n$ {shlex.join(("timm-paf", *words))}', flush=True)
    # The process has a group of its own: Ctrl-C or SIGTERM reaches this program alone, which tells the other to end
    # (one that trains saves first) and does not leave it behind at work.
    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        process = subprocess.Popen([sys.executable, '-W', 'ignore', '-m', 'timm_paf', *words], process_group=0)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if status:
        sys.exit(status)
