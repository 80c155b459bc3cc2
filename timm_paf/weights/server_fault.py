"""Says in words of ours why something could not be had from a server.

What a server sends, in a body, a header or an address, may repeat a token: whole, cut short or encoded. So none of it
is shown, and of exceptions of HTTP libraries, whose messages quote it, only the status or the kind.
"""

from __future__ import annotations

import os
import re
import socket
import traceback
from collections.abc import Mapping
from http import HTTPStatus

from ..wording import causes, reason_of

__all__ = ['http_answer', 'is_of_server', 'server_fault', 'without_secrets']

_LIBRARIES = {'httpx', 'httpx2', 'httpcore', 'huggingface_hub', 'requests', 'urllib', 'urllib3', 'http', 'gdown'}


def http_answer(error: BaseException) -> tuple[int | None, Mapping[str, str]]:
    """Returns status and headers of the answer that an exception is about, None and {} where there was no answer."""
    for each in causes(error):
        answer = getattr(each, 'response', None)
        status = getattr(answer, 'status_code', getattr(each, 'code', None) if is_of_server(each) else None)
        if isinstance(status, int) and 100 <= status <= 999:
            return status, getattr(answer, 'headers', {})
    return None, {}


def is_of_server(error: BaseException) -> bool:
    """Returns whether an exception is an HTTP library's, or was raised in a call of one; its causes do not count."""
    if isinstance(error, ImportError):
        return False
    frames = (frame.f_globals.get('__name__', '') for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.partition('.')[0] in _LIBRARIES for name in (type(error).__module__, *frames))


def server_fault(error: BaseException) -> str:
    """Returns what went wrong with a server: '403 Forbidden', 'Connection refused', 'no usable answer (KIND)'."""
    chain = list(causes(error))
    if type(error).__name__ == 'HFValidationError':  # huggingface_hub's words on a name that was given here
        return reason_of(error)
    if type(error).__name__ == 'OfflineModeIsEnabled':
        return 'huggingface_hub is told to stay offline (HF_HUB_OFFLINE=1)'
    if (status := http_answer(error)[0]) is not None:
        return f'{status} {HTTPStatus(status).phrase}' if status in list(HTTPStatus) else str(status)
    for each in reversed(chain):  # the system's own words without its file names, which may come from a server too
        if isinstance(each, socket.gaierror):
            return 'no server of that name, or no network'
        if isinstance(each, OSError) and each.errno is not None and each.errno > 0:
            return os.strerror(each.errno)
    return f'no usable answer ({type(error).__name__})'


def without_secrets(address: str) -> str:
    """Returns an address without name and password, query and fragment, which may hold a key."""
    return re.sub(r'^([\w+.-]+://)[^/?#]*@', r'\1', re.split(r'[?#]', address, maxsplit=1)[0])
