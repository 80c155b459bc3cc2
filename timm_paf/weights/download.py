"""Downloads a file so that it is whole or not there."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from .server_fault import is_of_server, server_fault

__all__ = ['download']

_logger = logging.getLogger(__name__)
ATTEMPTS = 20
_REFUSALS = (
    'Too many users have viewed or downloaded this file recently', 'Cannot retrieve the public link of the file')


def download(url: str, path: Path, check: Callable[[Path], None], instead: str) -> None:
    """Downloads a file, also one of Google Drive, with gdown.

    If a connection breaks, the bytes so far are kept in a directory beside ``path``. The download resumes from them at
    once while bytes come, and else at the next call. A file that ``check`` refuses is removed.

    Args:
        url: address of the file; ``https://drive.google.com/uc?id=...`` goes through Drive's pages of confirmation.
        path: where the file will be; one process at a time may download it.
        check: raises ValueError if a file is not the one that was asked for.
        instead: what else to do where the file can't be had, for messages.

    Raises:
        ConnectionError: if the file can't be had from there, or not now.
        ModuleNotFoundError: if gdown is not installed.
        OSError: if the file can't be written.
        ValueError: if ``check`` raises it.
    """
    try:
        import gdown
        from requests.exceptions import RequestException  # gdown needs it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path.name} has to be downloaded, and there is no {error.name}; pip install 'timm-paf[robustbench]', or "
            f'{instead}', name=error.name) from error
    # gdown 6 has one exception for every refusal; gdown 5 has one for Drive's pages.
    refused = getattr(gdown.exceptions, 'DownloadError', gdown.exceptions.FileURLRetrievalError)

    parts = path.with_name(f'.{path.name}.parts')  # gdown takes any file in there for a part of this one
    for attempt in range(ATTEMPTS):
        parts.mkdir(parents=True, exist_ok=True)
        before, fault = _received(parts), None
        try:
            gdown.download(url, str(parts / path.name), quiet=not sys.stderr.isatty(), resume=True)
            check(parts / path.name)
        except (RequestException, refused, ValueError) as error:
            fault = error.with_traceback(None)  # the frames would keep gdown's file open, and in part unwritten
        if fault is None:
            (parts / path.name).replace(path)
            shutil.rmtree(parts)
            return
        arrived = _received(parts)
        page = isinstance(fault, gdown.exceptions.FileURLRetrievalError)
        last = attempt == ATTEMPTS - 1
        useless = isinstance(fault, ValueError) or (arrived <= before and isinstance(fault, refused) and not page)
        if useless:
            shutil.rmtree(parts)
        if before and useless and not last:  # the server can't resume from the break, or sent a page in the middle
            _logger.warning('%s could not be gone on from where it broke; starting anew', path.name)
        elif not useless and arrived > before and not last:
            _logger.warning('%s: the connection broke after %s bytes; going on', path.name, f'{arrived:,}')
        else:
            what = _reason(fault, parts / path.name)
            kept = f'; {arrived:,} bytes are kept and gone on from next time' if arrived and not useless else ''
            kind = ValueError if isinstance(fault, ValueError) else ConnectionError
            raise kind(f'{path.name} could not be had from {url}: {what}{kept}; try again later, or '
                       f'{instead}') from None


def _reason(fault: Exception, came: Path) -> str:
    """Returns what went wrong with the file ``came``; of the words of a page only that it has some of `_REFUSALS`."""
    text = ' '.join(str(fault).split()).replace(str(came), 'what came')
    said = [words for words in _REFUSALS if words in text]
    if is_of_server(fault):
        return said[0] if said else server_fault(fault)
    return text.partition('; ')[0][:300]  # of a check; the fix that follows is for a file that is kept


def _received(parts: Path) -> int:
    """Returns the bytes of the one partial file; several, which different versions of gdown leave, are of no use."""
    files = list(parts.iterdir())
    if len(files) > 1:
        for file in files:
            file.unlink()
        return 0
    return sum(file.stat().st_size for file in files)
