"""hub.upload with the real huggingface_hub against a Hub in memory, each run in a process of its own."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from conftest import ROOT, Program, assert_one_line
from hub_server import LFS_SUFFIXES, File, Handler, Hub, answer, cut
from networks import randomise
from safetensors.torch import load, save, save_file
from torch import nn

from hub import bundle as hub_bundle
from hub import card
from hub.upload import load_images
from hub.upload import main as upload_main
from timm_paf.activations import paf_parameters
from timm_paf.convert import create_converted
from timm_paf.data import load_dataset, to_float
from timm_paf.files import read_record, write_record
from timm_paf.robustbench import load_bundle
from timm_paf.weights.bundle_files import write_checksums

PSSILU = ROOT / 'hub' / 'models' / 'wrn10_1_pssilu'
WEIGHTS = 'model.safetensors'
# Imports cost seconds, so every run is a fork of a process that has made them and done nothing else.
WORKER = '''
import gc, json, os, sys
from hub import upload
gc.freeze()
for line in sys.stdin:
    run = json.loads(line)
    if (pid := os.fork()) == 0:
        os.environ.update(run['env'])
        for name, descriptor in (('out', 1), ('err', 2)):
            os.dup2(os.open(run[name], os.O_WRONLY | os.O_CREAT), descriptor)
        status = 0
        try:
            upload.main(run['args'])
        except SystemExit as error:
            print(error, file=sys.stderr)
            status = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # without what Python does at its end, which takes longer than all of this
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
'''


def forms(token: str) -> list[str]:
    """A token as it is, in base64 of each alignment, in hex, percent-encoded and backwards."""
    aligned = [f'{start}{token}'.encode() for start in ('', 'x', 'Bearer ', 'user:', ':')]
    return [token, token[::-1], token.encode().hex(), ''.join(f'%{ord(c):02X}' for c in token), quote(token, safe=''),
            *(encode(text).decode() for text in aligned for encode in (base64.b64encode, base64.urlsafe_b64encode))]


def pieces(token: str) -> set[str]:
    """Every 8 characters in a row of every form of a token."""
    return {form[i:i + 8] for form in forms(token) for i in range(len(form) - 7)}


class Upload:
    """Runs hub.upload; no run may show a piece of the token, nor the signature of a storage address."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub, self.folder, self.runs, self.pid = hub, folder, 0, 0
        (folder / 'home').mkdir()
        (folder / 'home' / 'token').write_text('hf_writer')  # where hf auth login puts it
        kept = {k: v for k, v in os.environ.items() if not k.startswith('HF_')}
        self.env = {**kept, 'HF_ENDPOINT': hub.url, 'HF_HOME': str(folder / 'home'), 'HF_HUB_DISABLE_XET': '1',
                    'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join([str(ROOT), kept.get('PYTHONPATH', '')])}
        self.worker = subprocess.Popen(
            [sys.executable, '-c', WORKER], cwd=ROOT, env=self.env, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def __call__(self, *args: object, token: str = 'hf_writer', **env: str) -> subprocess.CompletedProcess[str]:
        assert self.worker.stdin is not None
        assert self.worker.stdout is not None
        out, err = (self.folder / f'{self.runs}.{name}' for name in ('out', 'err'))
        self.runs += 1
        if token != 'hf_writer':
            env['HF_TOKEN'] = token
        order = {'args': [str(arg) for arg in args], 'env': env, 'out': str(out), 'err': str(err)}
        self.worker.stdin.write(json.dumps(order) + '\n')
        self.worker.stdin.flush()
        self.pid = int(self.worker.stdout.readline())
        status = int(self.worker.stdout.readline())
        done = subprocess.CompletedProcess(order['args'], status, out.read_text(), err.read_text())
        for secret in (*pieces(token), 'secret-signature'):
            assert secret not in done.stdout + done.stderr
        return done

    def close(self) -> None:
        assert self.worker.stdin is not None
        self.worker.stdin.close()
        assert self.worker.wait(60) == 0
        assert not list((self.folder / 'home').rglob(WEIGHTS)), 'what was in a cache already proves nothing'
        for path in self.folder.rglob('*'):
            assert path.name == 'token' or not path.is_file() or b'hf_writer' not in path.read_bytes(), path


@pytest.fixture(scope='module')
def upload(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upload]:
    with Hub() as hub:
        upload = Upload(hub, tmp_path_factory.mktemp('upload'))
        yield upload
        upload.close()


@pytest.fixture
def hub(upload: Upload) -> Hub:
    upload.hub.reset()
    return upload.hub


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PSSILU, tmp_path / 'bundle'))


@pytest.fixture(scope='module')
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that hub.bundle makes of a run with a converted network, here without the training."""
    run = tmp_path_factory.mktemp('converted') / 'run'
    run.mkdir()
    about: dict[str, Any] = {'act': 'pssilu', 'act_share': 'layer', 'act_kwargs': {'alpha': 2.0}}
    torch.manual_seed(0)
    model = randomise(create_converted('test_efficientnet', *about.values(), num_classes=10))
    for value in paf_parameters(model).values():
        nn.init.uniform_(value, 0.1, 0.3)
    save_file(model.state_dict(), run / WEIGHTS)
    record = json.loads((PSSILU / 'run.json').read_text())
    record['architecture'] = 'test_efficientnet'
    record['recipe'] |= {'model': 'test_efficientnet', **about}
    (run / 'run.json').write_text(json.dumps(record))
    hub_bundle.main([str(run), '--out', str(run.parent / 'bundle')])
    return run.parent / 'bundle'


def content(bundle: Path) -> dict[str, bytes]:
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in bundle.rglob('*') if path.is_file()}


def large(bundle: Path) -> list[str]:
    """The files that the Hub stores as LFS: it names their suffix, or they are no text."""
    return [name for name in content(bundle) if name.endswith((*LFS_SUFFIXES, '.png'))]


def bundle_commits(hub: Hub) -> list[str]:
    return [message for message in hub.repos['org/name'].messages if message.startswith('wrn10_1_pssilu')]


def succeeded(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# --- what arrives ---


def test_a_new_repository(upload: Upload, hub: Hub, bundle: Path, tmp_path: Path) -> None:
    """Published, found equal, and used as the card says and as the last line says."""
    before = content(bundle)
    lines = succeeded(upload(bundle, 'org/name'))
    assert content(bundle) == before
    repo = hub.repos['org/name']
    commit = repo.branches['main']
    assert 'logits are the same bit for bit' in lines[1]
    assert lines[0].startswith(f'org/name@{commit}: published')
    assert (len(repo.commits), len(bundle_commits(hub)), repo.private) == (2, 1, False)
    there = {name: data for name, data in repo.head().items() if name != '.gitattributes'}
    differing = {name for name in before.keys() | there.keys() if there.get(name) != before.get(name)}
    assert differing == {'README.md', 'SHA256SUMS'}
    assert there['README.md'] == before['README.md'].replace(b'ORG/NAME', b'org/name') != before['README.md']
    for name, data in there.items():
        (tmp_path / 'copy' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'copy' / name).write_bytes(data)
    checked = subprocess.run(['sha256sum', '-c', 'SHA256SUMS'], cwd=tmp_path / 'copy', capture_output=True, text=True)
    assert checked.returncode == 0
    assert len(checked.stdout.splitlines()) == len(there) - 1

    blocks = re.findall(r'```python\n(.*?)```', there['README.md'].decode(), re.DOTALL)
    assert len(blocks) == 3
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    torch.save(images, tmp_path / 'images.pt')
    code = 'import torch\nimages, found = torch.load("images.pt"), []\n'
    code += ''.join(f'{block}\nfound.append(model(images).detach())\n' for block in (*blocks, lines[-1]))
    code = code.replace('pretrained=True)\nfound', 'pretrained=True).eval()\nfound') + 'torch.save(found, "logits.pt")'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=tmp_path, text=True, capture_output=True,
                          env={**upload.env, 'HF_HOME': str(tmp_path / 'home')}, timeout=300)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = load_bundle(bundle)(images)
    found = torch.load(tmp_path / 'logits.pt')
    assert len(found) == 4
    assert all(torch.equal(logits, expected) for logits in found)


def test_a_converted_network(upload: Upload, hub: Hub, converted: Path, tmp_path: Path) -> None:
    """timm alone makes another network of its name, so it is compared and used as a directory."""
    lines = succeeded(upload(converted, 'org/name'))
    repo = hub.repos['org/name']
    assert lines[0] == f'org/name@{repo.branches["main"]}: published as {repo.messages[-1]}'
    assert repo.messages[-1].startswith('test_efficientnet, cifar10, Linf 8/255')
    assert f'{len(content(converted))} files come back as they were sent, logits are the same bit for bit' in lines[1]
    assert lines[2] == (
        "import timm_paf; model = timm_paf.load_bundle('org/name')")
    for name in ('config.json', WEIGHTS):  # compared as they came back, not as they lay there
        assert hub.asked(f'GET .*/{name}')
    for name, data in repo.head().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    model = load_bundle(tmp_path)
    assert len(paf_parameters(model)) > 10
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(model(x), load_bundle(converted)(x))


def test_a_converted_network_that_comes_back_with_other_weights(upload: Upload, hub: Hub, converted: Path) -> None:
    """One value of one activation is another; the file is whole and has the digest of the right one."""
    state = load((converted / WEIGHTS).read_bytes())
    key = next(key for key in state if key.endswith('.alpha'))
    other = save({**state, key: state[key] + 1e-3}, {'format': 'pt'})
    assert len(other) == (converted / WEIGHTS).stat().st_size
    serve(hub, WEIGHTS, other)
    done = upload(converted, 'org/name')
    assert_one_line(done, f'org/name@{hub.repos["org/name"].branches["main"]} is on the Hub, but the check failed: ',
                    f'{WEIGHTS} comes back with sha256 {File(other, True).oid}', 'use nothing of this commit')
    assert 'load_bundle' not in done.stdout
    assert 'logits are the same' in succeeded(upload(converted, 'org/name'))[1]


def test_dry_run_says_what_is_sent_and_contacts_nobody(
        upload: Upload, hub: Hub, bundle: Path, program: Program) -> None:
    args = ['--private', '--revision', 'v1']
    lines = succeeded(program('-m', 'hub.upload', bundle, 'org/name', '--dry-run', *args, env=upload.env))
    assert not hub.requests
    assert lines[0].startswith('would send to private org/name, branch v1, in one commit: wrn10_1_pssilu, cifar10')
    succeeded(upload(bundle, 'org/name', *args))
    repo = hub.repos['org/name']
    files = repo.commits[repo.branches['v1']]
    expected = [(('lfs' if file.lfs else 'regular'), f'{len(file.content):,}', File(file.content, True).oid, name)
                for name, file in sorted(files.items()) if name != '.gitattributes']
    assert [tuple(line.split()) for line in lines[1:-1]] == expected
    assert repo.messages[-1] == lines[0].partition('one commit: ')[2]
    assert lines[-1] == f'{len(expected)} files; nothing was sent'


def test_nothing_new_makes_no_commit_and_a_change_makes_one(upload: Upload, hub: Hub, bundle: Path) -> None:
    upload(bundle, 'org/name')
    hub.requests.clear()
    lines = succeeded(upload(bundle, 'org/name'))
    assert 'has these files already: no new commit' in lines[0]
    assert 'come back as they were sent' in lines[1]
    assert not hub.asked('PUT|POST .*/commit/')
    hub.repos['org/name'].commits[hub.repos['org/name'].branches['main']]['notes.txt'] = File(b'mine', False)
    card.main([str(bundle), '--licence', 'mit'])
    lines = succeeded(upload(bundle, 'org/name'))
    assert lines[0] == 'org/name has 1 other file, and keeps what it has'
    assert len(bundle_commits(hub)) == 2
    assert b'license: mit' in hub.repos['org/name'].head()['README.md']
    assert hub.repos['org/name'].head()['notes.txt'] == b'mine'
    assert not hub.asked('PUT')


def test_private_and_a_branch(upload: Upload, hub: Hub, bundle: Path) -> None:
    lines = succeeded(upload(bundle, 'org/name', '--private', '--revision', 'v/1'))
    repo = hub.repos['org/name']
    assert repo.private
    assert list(repo.head()) == ['.gitattributes']
    assert WEIGHTS in repo.head('v/1')
    assert lines[-1].endswith("timm.create_model('hf-hub:org/name@v/1', pretrained=True)")
    repo.private = False
    card.main([str(bundle), '--licence', 'mit'])
    done = upload(bundle, 'org/name', '--private', '--revision', 'v2')
    assert_one_line(done, 'hub.upload: org/name: it is public; expected a private one')
    assert len(bundle_commits(hub)) == 1
    assert sorted(repo.branches) == ['main', 'v/1']


def test_the_images_of_a_range_are_compared(bundle: Path, tmp_path: Path) -> None:
    data = load_dataset('digits', train=False)
    record = read_record(bundle / 'evaluation.json')
    found = {'dataset': 'digits', 'data_sha256': data.sha256(), 'n': 4, 'attacks': {
        'clean': {'n': 4, 'correct': 3, 'accuracy': 0.75, 'verdicts': '1011'}}}

    def loaded(images: str) -> Any:
        kept = {key: value for key, value in record.items() if key not in ('worst_case', 'evidence')}
        write_record(tmp_path / 'evaluation.json', {**kept, **found, 'images': images})
        return load_images(tmp_path, '')

    for text, first, words in (('first 4', 0, 'first 4 test images'),
                               ('9:13', 9, 'test images 9 to 12 (counted from 0)')):
        images, labels, verdicts, which = loaded(text)
        assert torch.equal(images, to_float(data.images[first:first + 4]))
        assert torch.equal(labels, data.labels[first:first + 4])
        assert (verdicts, which) == ('1011', words)
    with pytest.raises(ValueError, match=r'has no clean verdicts of the images in'):
        loaded('357:361')
    with pytest.raises(ValueError, match=r"evaluation\.json: images is 'x\\ny'; expected first N"):
        loaded('x\ny')


def test_real_images_are_classified_as_the_evaluation_says(
        upload: Upload, hub: Hub, bundle: Path, cifar10_root: Path) -> None:
    lines = succeeded(upload(bundle, 'org/name', '--data-dir', cifar10_root))
    evaluation = read_record(bundle / 'evaluation.json')
    correct = evaluation['attacks']['clean']['correct']
    assert f'{correct} of the first 1000 test images right, as evaluation.json says' in lines[1]
    verdicts = evaluation['attacks']['clean']['verdicts']
    first, later = verdicts.index('0'), verdicts.index('1')  # a forger keeps the count
    forged = [*verdicts]
    forged[first], forged[later] = '1', '0'
    evaluation['attacks']['clean']['verdicts'] = ''.join(forged)
    del evaluation['worst_case']
    write_record(bundle / 'evaluation.json', evaluation)
    write_checksums(bundle)
    done = upload(bundle, 'org/name', '--data-dir', cifar10_root)
    assert_one_line(done, 'is on the Hub, but the check failed: 2 of 1000 clean verdicts are other ones')
    evaluation['data_sha256'] = '0' * 64
    write_record(bundle / 'evaluation.json', evaluation)
    write_checksums(bundle)
    hub.requests.clear()
    assert_one_line(upload(bundle, 'org/name', '--data-dir', cifar10_root), 'expected data with sha256 000000')
    assert not hub.requests


# --- faults ---


def echo(status: int, **headers: str) -> Callable[[Handler], None]:
    """An error that repeats the token, as a careless proxy may."""
    return lambda handler: answer(status, {'error': f'for {handler.token()} no'}, X_HF_Warning=f'a; {handler.token()}',
                                  **headers)(handler)


def somebody_else(handler: Handler) -> bool:
    repo = handler.hub.repos['org/name']
    repo.commit('main', {**repo.commits[repo.branches['main']], 'theirs.txt': File(b'theirs', False)}, 'theirs')
    return False


def page(handler: Handler) -> None:
    answer(502, b'<html>Bad Gateway</html>', Content_Type='text/html')(handler)


COMMIT = 'POST .*/commit/'
FAULTS: dict[str, tuple[str, Callable[[Handler], Any], list[str]]] = {
    '401 at the commit': (COMMIT, echo(401), ['401', 'hf auth login']),
    '403 at the commit': (COMMIT, echo(403), ['403', 'hf auth login with one that may write to org/name']),
    '403 of the storage': ('PUT', echo(403), ['could not be sent: 403', 'run this again later']),
    '404 of the branch': ('POST .*/branch/', echo(404, X_Error_Code='RepoNotFound'), ['404', 'check the name']),
    '409 at the commit': (COMMIT, echo(409), ['409', 'something else changed org/name meanwhile']),
    '412 after another commit': (COMMIT, somebody_else, ['412 Precondition Failed', 'look at it']),
    '429 at the start': ('POST /api/repos', echo(429, Retry_After='7'), ['429', 'wait 7 s']),
    '429 at the commit': (COMMIT, echo(429, Retry_After='9'), ['429', 'wait 9 s']),
    '429 in words of the Hub': (COMMIT, echo(429, RateLimit='"api";r=0;t=55'), ['429', 'wait 55 s']),
    '500 at the commit': (COMMIT, echo(500), ['500', 'run this again later']),
    '503 at the start': ('POST /api/repos', echo(503), ['503', 'run this again later']),
    '502 as a page': ('POST /api/validate-yaml', page, ['no usable answer (JSONDecodeError)', 'run this again later']),
    'cut at the start': ('POST /api/repos', cut, ['run this again later']),
    'cut at the commit': (COMMIT, cut, ['run this again later'])}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_is_told_in_one_line_and_publishes_nothing(
        upload: Upload, hub: Hub, bundle: Path, fault: str) -> None:
    pattern, act, words = FAULTS[fault]
    args = ['--revision', 'v1'] if 'branch' in pattern else []
    hub.fault(pattern, act)
    done = upload(bundle, 'org/name', *args)
    assert done.returncode == 1
    assert_one_line(done, 'hub.upload: org/name: ', *words)
    assert not done.stdout
    assert hub.faults[0].times == 0
    if 'org/name' in hub.repos:
        assert not bundle_commits(hub)
        assert not {WEIGHTS, 'README.md'} & hub.repos['org/name'].head().keys()
    succeeded(upload(bundle, 'org/name', *args))
    assert len(bundle_commits(hub)) == 1


@pytest.mark.parametrize(('token', 'words'), [
    ('hf_unknown', ['401 Unauthorized', 'hf auth login']), ('hf_reader', ['403 Forbidden', 'hf auth login'])])
def test_a_token_that_may_not(upload: Upload, hub: Hub, bundle: Path, token: str, words: list[str]) -> None:
    assert_one_line(upload(bundle, 'org/name', token=token), 'hub.upload: org/name: ', *words)
    assert not hub.repos


TOKEN = 'hf_QzR7mWx2LtV9bKd4NsYp8GhJc3FvTe6Ua1'


def repeats(handler: Handler) -> str:
    """The token in every form, each whole and cut."""
    return ' '.join(text for form in forms(handler.token()) for text in (form, form[:-3], form[5:20], form[:8]))


def raw(status: int, reason: str = '', body: Any = None, **headers: str) -> Callable[[Handler], None]:
    """An answer with the token in its reason, headers and body, where they say TOKEN."""
    def act(handler: Handler) -> None:
        handler.body()
        text = repeats(handler)
        content = json.dumps(body).replace('TOKEN', text).encode()
        handler.send_response(status, reason.replace('TOKEN', text))
        for name, value in {'Content-Length': str(len(content)), **headers}.items():
            handler.send_header(name.replace('_', '-'), value.replace('TOKEN', text).replace('PIECE', handler.token()))
        handler.end_headers()
        if handler.command != 'HEAD':
            handler.wfile.write(content)
    return act


SAID = {'error': 'TOKEN', 'errors': [{'message': 'TOKEN'}], 'message': 'TOKEN'}
ECHOES: dict[str, tuple[str, Callable[[Handler], Any]]] = {
    'body': ('POST /api/repos', raw(403, 'TOKEN', SAID)),
    'a page': ('POST /api/repos', raw(500, 'TOKEN', '<html><title>TOKEN</title>TOKEN', Content_Type='text/html')),
    'headers': ('POST /api/repos', raw(401, '', {}, X_Error_Message='TOKEN', X_Error_Code='TOKEN',
                                       X_HF_Warning='a; TOKEN', WWW_Authenticate='TOKEN',
                                       Location='http://PIECE/TOKEN', Retry_After='TOKEN')),
    'a redirect': ('GET /api/models', raw(302, 'TOKEN', SAID, Location='http://PIECE.invalid/?t=PIECE')),
    'a redirect to no address': ('GET /api/models', raw(302, 'TOKEN', SAID, Location='PIECE://PIECE:PIECE@/')),
    'a redirect without end': ('GET /api/models', raw(302, 'TOKEN', SAID, Location='?PIECE')),
    'metadata': ('POST /api/validate-yaml', raw(400, '', {**SAID, 'warnings': [{'message': 'TOKEN'}]})),
    'metadata of another form': ('POST /api/validate-yaml', raw(200, '', {'errors': 'TOKEN', 'warnings': 'TOKEN'})),
    'a repository': ('POST /api/repos', raw(200, '', {'url': 'TOKEN', 'name': 'TOKEN'})),
    'facts of a repository': ('GET /api/models', raw(200, '', {'id': 'TOKEN', 'sha': 'TOKEN', 'siblings': 'TOKEN'})),
    'the storage': ('POST .*/objects/batch', raw(200, '', {'objects': [
        {'oid': 'TOKEN', 'size': 1, 'error': {'code': 404, 'message': 'TOKEN'}}]})),
    'modes': ('POST .*/preupload', raw(200, '', {'files': [{'path': 'TOKEN', 'uploadMode': 'TOKEN'}]})),
    'a retry': ('POST .*/preupload', raw(429, 'TOKEN', SAID, Retry_After='0', RateLimit='"api";r=0;t=PIECE')),
    'a commit': (COMMIT, raw(200, '', {'success': True, 'commitOid': 'TOKEN', 'commitUrl': 'TOKEN'})),
    'a download': ('HEAD .*/README.md', raw(200, 'TOKEN', '', ETag='"TOKEN"', X_Repo_Commit='PIECE/PIECE',
                                            X_Linked_Size='PIECE', Location='PIECE')),
    'a download that is refused': ('HEAD .*/README.md', raw(404, 'TOKEN', '', X_Error_Code='EntryNotFound',
                                                            X_Error_Message='TOKEN', X_HF_Warning='TOKEN; TOKEN'))}


@pytest.mark.parametrize('debug', ['', '1'])
@pytest.mark.parametrize('place', ECHOES)
def test_no_piece_of_the_token_comes_back_from_a_server(
        upload: Upload, hub: Hub, bundle: Path, place: str, debug: str) -> None:
    """Not in the message, nor in a traceback or what huggingface_hub logs; `Upload` looks for every piece."""
    hub.tokens[TOKEN] = True
    pattern, act = ECHOES[place]
    hub.fault(pattern, act, times=30)
    done = upload(bundle, 'org/name', token=TOKEN, **({'TIMM_PAF_DEBUG': '1', 'HF_DEBUG': '1'} if debug else {}))
    assert hub.faults[0].times < 30
    assert ('Traceback (most' in done.stderr) == (debug == '1' and done.returncode == 1)
    if done.returncode:
        assert re.match(r'hub\.upload: org/name[^\n]*; [^\n]*$', done.stderr.splitlines()[-1])


def test_the_client_waits_and_tries_again(upload: Upload, hub: Hub, bundle: Path) -> None:
    """Of 429 with Retry-After, 503 and a cut connection, nothing is left but warnings."""
    hub.fault('POST .*/preupload/', echo(429, Retry_After='0'))
    hub.fault('POST .*/objects/batch', echo(503))
    hub.fault('PUT', cut)
    done = upload(bundle, 'org/name')
    assert 'bit for bit' in succeeded(done)[1]
    assert [fault.times for fault in hub.faults] == [0, 0, 0]
    assert 'HTTP Error 429: huggingface_hub tries again\n' in done.stderr
    assert 'a broken connection: huggingface_hub tries again\n' in done.stderr
    assert len(hub.asked('PUT')) == 1 + len(large(bundle))
    assert len(hub.asked(COMMIT)) == len(bundle_commits(hub)) == 1


def test_killed_while_it_sends_it_sends_the_rest_the_next_time(upload: Upload, hub: Hub, bundle: Path) -> None:
    reached, ended = threading.Event(), threading.Event()

    def hold(handler: Handler) -> None:
        handler.rfile.read(1000)
        reached.set()
        ended.wait(60)
        handler.unread, handler.close_connection = 0, True

    weights = File((bundle / WEIGHTS).read_bytes(), True).oid
    hub.fault(f'PUT /lfs/{weights}', hold)

    def kill() -> None:
        assert reached.wait(60)
        while len(hub.blobs) < len(large(bundle)) - 1:  # the other files are whole
            assert not ended.wait(0.01)
        os.kill(upload.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    done = upload(bundle, 'org/name')
    killer.join()
    ended.set()
    assert done.returncode == -signal.SIGKILL
    assert list(hub.repos['org/name'].head()) == ['.gitattributes']
    hub.requests.clear()
    assert 'published' in succeeded(upload(bundle, 'org/name'))[0]
    assert [request.split('?')[0] for request in hub.asked('PUT')] == [f'PUT /lfs/{weights}']
    assert len(bundle_commits(hub)) == 1


def serve(hub: Hub, name: str, data: bytes) -> None:
    """Answer one download of a file with other bytes, under the digest of those that were sent."""
    def other(handler: Handler) -> None:
        repo = hub.repos['org/name']
        etag = repo.commits[repo.branches['main']][name].oid
        answer(200, data, X_Repo_Commit=repo.branches['main'], ETag=f'"{etag}"')(handler)

    hub.fault(f'GET .*/{name}', other, times=1)


@pytest.mark.parametrize('name', [WEIGHTS, 'config.json'])
def test_other_bytes_than_were_sent_are_found(upload: Upload, hub: Hub, bundle: Path, name: str) -> None:
    """As long as they were, and under the digest of those: only a comparison finds them."""
    data = bytearray((bundle / name).read_bytes())
    data[-5] ^= 1
    serve(hub, name, bytes(data))
    done = upload(bundle, 'org/name')
    digest = File(bytes(data), True).oid
    assert_one_line(done, 'is on the Hub, but the check failed: ', f'{name} comes back with sha256 {digest}',
                    'use nothing of this commit')
    assert 'create_model' not in done.stdout


def test_a_check_that_is_cut_off_is_made_up_for(upload: Upload, hub: Hub, bundle: Path) -> None:
    hub.fault('HEAD .*/config.json', echo(404, X_Error_Code='EntryNotFound'))
    done = upload(bundle, 'org/name')
    assert_one_line(done, f'org/name@{hub.repos["org/name"].branches["main"]} is on the Hub, but the check failed: 404')
    assert 'no new commit' in succeeded(upload(bundle, 'org/name'))[0]


def test_the_hub_may_refuse_the_card(upload: Upload, hub: Hub, bundle: Path) -> None:
    card.main([str(bundle), '--licence', 'nonsense'])
    assert_one_line(upload(bundle, 'org/name'), 'does not take the metadata in README.md, most often for the licence',
                    'timm-paf card writes the card anew')
    assert not hub.asked('PUT')
    assert not bundle_commits(hub)


def edit(name: str, text: str) -> Callable[[Path], object]:
    return lambda bundle: (bundle / name).write_text(text)


@pytest.mark.parametrize(('change', 'words'), [
    (edit('secrets.txt', 'x'), 'secrets.txt is not in SHA256SUMS'),
    (edit('README.md', 'x'), 'timm-paf card writes the card anew'),
    (edit('run.json', '{}'), 'run.json: sha256 is'),
    (edit('SHA256SUMS', 'x'), "has the line 'x'"),
    (lambda bundle: (bundle / 'run.json').unlink(), 'run.json is missing'),
    (lambda bundle: (bundle / 'SHA256SUMS').unlink(), 'SHA256SUMS is missing'),
    (lambda bundle: ((bundle / 'README.md').unlink(), write_checksums(bundle)), 'has no README.md'),
    (lambda bundle: (edit('config.json', '{}')(bundle), write_checksums(bundle)), 'has no timm_paf section')])
def test_a_bundle_that_is_not_whole_is_not_sent(bundle: Path, change: Callable[[Path], object], words: str) -> None:
    change(bundle)
    refuses(words, bundle)


def test_names_and_weights_are_checked_before_anything_is_sent(bundle: Path) -> None:
    refuses("the repository is 'name'; expected ORG/NAME", bundle, 'name')
    refuses("'org/na me'", bundle, 'org/na me')
    refuses('is missing', bundle / 'nowhere')
    config = json.loads((bundle / 'config.json').read_text())
    (bundle / 'config.json').write_text(json.dumps({**config, 'architecture': 'wrn10_2_pssilu'}))
    write_checksums(bundle)
    refuses('does not fit', bundle)


def refuses(words: str, bundle: Path, repo: str = 'org/name') -> None:
    """A dry run, which checks all that a real one checks and here needs no server."""
    with pytest.raises(SystemExit) as exit_info:
        upload_main([str(bundle), repo, '--dry-run'])
    message = exit_info.value.code
    assert isinstance(message, str)
    assert message.startswith('hub.upload: ')
    assert '\n' not in message
    assert words in message
