"""What a server sends is not shown where weights are fetched: it may repeat the token, in any form."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Program
from hub_server import Handler, Hub

from timm_paf.weights.server_fault import server_fault, without_secrets

TOKEN = 'hf_QzR7mWx2LtV9bKd4NsYp8GhJc3FvTe6Ua1'
ECHO = ' '.join([TOKEN, TOKEN[:20], TOKEN[9:], *(base64.b64encode(f'{start}{TOKEN}'.encode()).decode()
                                                  for start in ('', 'x', 'xy'))])
SHOW = '''
import sys, traceback
from timm import create_model
from timm_paf.robustbench import register
def create(**overlay):
    create_model('wrn10_1_pssilu', pretrained=True, pretrained_cfg_overlay=overlay)
for i in range(int(sys.argv[1])):
    for fetch in (lambda: register(f'org/fault{i}', 'a'), lambda: create(hf_hub_id=f'org/fault{i}'),
                  lambda: create(url=f'{sys.argv[2]}/fault{i}/a.pt?key=secret')):
        try:
            fetch()
            print('no error')
        except (OSError, ValueError) as error:
            traceback.print_exc()
            print(' '.join(str(error).split()))
'''


def answer(status: int, reason: str, body: bytes = b'', **headers: str) -> Callable[[Handler], None]:
    def act(handler: Handler) -> None:
        handler.body()
        handler.send_response(status, reason)
        for name, value in {'Content-Length': str(len(body)), **headers}.items():
            handler.send_header(name.replace('_', '-'), value)
        handler.end_headers()
        if handler.command != 'HEAD':
            handler.wfile.write(body)
    return act


FAULTS = [
    answer(403, ECHO, ECHO.encode(), X_Error_Message=ECHO, X_Error_Code=ECHO),
    answer(404, ECHO, ECHO.encode(), X_Error_Message=ECHO, X_Error_Code='RepoNotFound'),
    answer(404, ECHO, ECHO.encode(), X_Error_Message=ECHO, X_Error_Code='EntryNotFound', X_Repo_Commit=TOKEN),
    answer(302, ECHO, ECHO.encode(), Location=f'http://{TOKEN}.invalid/{TOKEN}'),
    answer(302, ECHO, ECHO.encode(), Location=f'{TOKEN}://{TOKEN}'),
    answer(200, ECHO, b'', ETag=f'"{ECHO}"', X_Repo_Commit=TOKEN, X_Linked_Size=TOKEN)]


def test_weights_that_a_server_refuses(tmp_path: Path, program: Program) -> None:
    with Hub() as hub:
        for i, act in enumerate(FAULTS):
            hub.fault(f'.*/fault{i}', act, times=99)
        done = program('-c', SHOW, len(FAULTS), f'http://user:{TOKEN}@{hub.url[7:]}', env={
            'HF_ENDPOINT': hub.url, 'HF_HOME': str(tmp_path), 'HF_TOKEN': TOKEN, 'HF_HUB_DISABLE_XET': '1',
            'TORCH_HOME': str(tmp_path / 'torch'), 'PYTHONPATH': str(ROOT), 'NO_PROXY': '*'})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 * len(FAULTS)
    for i in range(len(FAULTS)):
        assert lines[3 * i].startswith(f'org/fault{i} is no directory here, and on the Hub: ')
        assert lines[3 * i + 1].startswith(f'org/fault{i} ')
        assert lines[3 * i + 2].startswith(f'{hub.url}/fault{i}/a.pt could not be had: ')
    for secret in {ECHO[i:i + 8] for i in range(len(ECHO) - 7) if ' ' not in ECHO[i:i + 8]}:
        assert secret not in done.stdout + done.stderr, (secret, done.stdout, done.stderr)


@pytest.mark.parametrize(('address', 'expected'), [
    ('https://example.org/a.pt', 'https://example.org/a.pt'), ('a.pt', 'a.pt'), ('file:///a@b', 'file:///a@b'),
    ('https://me:secret@example.org/a.pt?key=secret#secret', 'https://example.org/a.pt')])
def test_addresses_without_secrets(address: str, expected: str) -> None:
    assert without_secrets(address) == expected


def test_the_systems_words_have_no_name_of_a_file(tmp_path: Path) -> None:
    for cause, expected in ((FileNotFoundError(2, 'no', 'secret'), 'No such file or directory'),
                            (ConnectionRefusedError(111, 'secret'), 'Connection refused'),
                            (KeyError('secret'), 'no usable answer (RuntimeError)')):
        error = RuntimeError('secret')
        error.__cause__ = cause
        assert server_fault(error) == expected
