"""Says what to do with a pickle that needs code: by its list of instructions, none of which is carried out."""

from __future__ import annotations

import io
import itertools
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ['advice']

_LIMIT = 1 << 26  # bytes of a pickle that are looked at
_SILENT = {'PROTO', 'FRAME', 'MEMOIZE', 'PUT', 'BINPUT', 'LONG_BINPUT', 'MARK'}
_ENTRIES = ('swadict', 'state_dict_ema', 'model_ema', 'ema', 'state_dict', 'model_state_dict', 'model', 'net', 'params')
_LEGACY_MAGIC = 0x1950a86a20f9469cfc6c  # before it torch wrote nothing else than the pickle itself


def advice(path: Path, code: str) -> str:
    """Finds what a message says of a file that needs code to be read.

    Args:
        path: a file of torch.save or a pickle.
        code: the name that torch's reader refused, as 'module.name'; '' for none, where it refused an instruction.

    Returns:
        What follows the path of the file; '' where the file has no such name and so is damaged.
    """
    steps, protocol, whole = _steps(path)
    names = [name for kind, name in steps if kind == 'global']
    if not code and not names:
        return ''
    if not code and protocol > 2 and all(name.startswith(('torch.', 'collections.')) for name in names):
        return (f'is written in protocol {protocol} of pickle; expected protocol 2, the default of torch.save: save it '
                'again without pickle_protocol')
    # torch names what is in builtins without its module; the first name that is not torch's is as good as any.
    known = next((name for name in names if name == code or name.rpartition('.')[2] == code), '')
    if code and not known and not whole:
        return ''  # the file is cut off within the name
    code = known or code or next((name for name in names if not name.startswith(('torch.', 'collections.'))), 'unknown')
    name = ''.join(c for c in code[:120] if c.isprintable())
    trusted = 'torch.load(PATH, weights_only=False)'
    texts = [name for kind, name in steps if kind == 'text']
    owner = next(_keys_before(steps, code), None)
    if steps and steps[0] == ('global', code):
        what, weights = 'holds a whole pickled object', f'{trusted}.state_dict()'
    else:
        entry = next((entry for entry in _ENTRIES if entry in texts), None)
        what = 'holds objects beside the weights'
        weights = f"{trusted}['{entry}']" if entry else trusted
        if entry is not None and entry == owner:
            weights += '.state_dict()'
    return (f'needs code to be read ({name}): it {what}, and no code of a file is run; where you trust it, save its '
            f'weights alone: torch.save({weights}, NEW)')


def _keys_before(steps: list[tuple[str, str]], code: str) -> Iterator[str]:
    """Yields the text that stands right before each use of a name: the key of a dict that it is the value of."""
    for (kind, text), (_, name) in itertools.pairwise(steps):
        if name == code and kind == 'text':
            yield text


def _steps(path: Path) -> tuple[list[tuple[str, str]], int, bool]:
    """Returns the names, texts and other instructions of the pickle in a file, its protocol, and whether it ends."""
    steps: list[tuple[str, str]] = []
    protocol = 0
    try:
        for kind, text in _instructions(path):
            if kind == 'proto':
                protocol = int(text)
                continue
            if kind == 'stack':  # newer protocols write a name as two texts before
                for _ in range(2):
                    if steps and steps[-1][0] == 'text':
                        steps.pop()
            if text != 'module':  # with which torch's old format marks classes of modules
                steps.append(('global' if kind == 'stack' else kind, text))
    except (ValueError, EOFError, LookupError, TypeError, OSError, zipfile.BadZipFile, pickle.UnpicklingError,
            OverflowError, MemoryError):
        return steps, protocol, False  # of a damaged file what came before the damage
    return steps, protocol, True


def _instructions(path: Path) -> Iterator[tuple[str, str]]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            name = next((name for name in archive.namelist() if name.rpartition('/')[2] == 'data.pkl'), '')
            with archive.open(name) as file:
                stream = io.BytesIO(file.read(_LIMIT))
        yield from _of_one(stream)
        return
    with open(path, 'rb') as raw:
        stream = io.BytesIO(raw.read(_LIMIT))
    legacy = any(argument == _LEGACY_MAGIC for _, argument, _ in itertools.islice(pickletools.genops(stream), 3))
    stream.seek(0)
    if legacy:
        for _ in range(3):  # the magic number, the version, and the sizes of numbers
            for _ in pickletools.genops(stream):
                pass
    yield from _of_one(stream)


def _of_one(stream: Any) -> Iterator[tuple[str, str]]:
    recent: list[str] = []
    memo: dict[int, str | None] = {}
    text: str | None = None
    for op, argument, _ in pickletools.genops(stream):
        if op.name == 'MEMOIZE':
            memo[len(memo)] = text
        elif op.name in ('PUT', 'BINPUT', 'LONG_BINPUT'):
            memo[int(argument or 0)] = text
        text = memo.get(int(argument or 0)) if op.name in ('GET', 'BINGET', 'LONG_BINGET') else str(
            argument) if 'UNICODE' in op.name or op.name in ('STRING', 'BINSTRING', 'SHORT_BINSTRING') else None
        if op.name == 'PROTO':
            yield 'proto', str(argument)
        elif op.name in ('GLOBAL', 'INST'):
            yield 'global', str(argument).replace(' ', '.')
        elif op.name == 'STACK_GLOBAL':
            yield 'stack', '.'.join(recent[-2:])
        elif text is not None:
            recent.append(text)
            yield 'text', text
        elif op.name not in _SILENT:
            yield 'other', op.name
