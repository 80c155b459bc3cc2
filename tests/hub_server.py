"""A Hugging Face Hub in memory, with the part of its HTTP protocol that up- and downloads of a model use.

Written from what `huggingface_hub` 1.33 and 2.4 send and read. Faults are asked for by request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = ('.safetensors', '.pt', '.bin', '.npz')  # what a new model repository's .gitattributes names
LICENCES = ('apache-2.0', 'mit', 'cc-by-4.0', 'other')


@dataclass
class File:
    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b'blob %d\0' % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        oid = hashlib.sha1(f'{len(self.commits)} {message}'.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)

    def head(self, branch: str = 'main') -> dict[str, bytes]:
        return {name: file.content for name, file in self.commits[self.branches[branch]].items()}


@dataclass
class Fault:
    """What becomes of a request whose 'METHOD path' the pattern matches, so many times.

    ``act`` gets the handler and answers, or returns False to have the request answered as usual after it.
    """

    pattern: str
    act: Callable[[Handler], Any]
    times: int = 1


def answer(status: int, body: Any = None, **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.reply(status, body, **{k.replace('_', '-'): v for k, v in headers.items()})


def cut(handler: Handler) -> None:
    """Read a part of what is sent, then hang up."""
    handler.rfile.read(min(1000, int(handler.headers.get('Content-Length', 0))))
    handler.unread = 0
    handler.close_connection = True


class Hub:
    """The server, as a context manager; ``url`` is its HF_ENDPOINT."""

    def __init__(self) -> None:
        self.tokens = {'hf_writer': True, 'hf_reader': False}  # may write?
        self.reset()
        handler = type('BoundHandler', (Handler,), {'hub': self})
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        self.storage = f'http://localhost:{self.server.server_port}'  # another host to a client, as the Hub's is

    def reset(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []

    def __enter__(self) -> Hub:
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def add(self, name: str, bundle: Path, branches: Iterable[str] = ('main',)) -> Repo:
        """A repository with the files of a directory at the one commit of its branches."""
        repo = self.repos[name] = Repo()
        files = {path.relative_to(bundle).as_posix(): File(path.read_bytes(), path.suffix in LFS_SUFFIXES)
                 for path in bundle.rglob('*') if path.is_file()}
        repo.branches = dict.fromkeys(branches, repo.commit('main', files, 'first'))
        return repo

    def fault(self, pattern: str, act: Callable[[Handler], Any], times: int = 1) -> None:
        self.faults.append(Fault(pattern, act, times))

    def asked(self, pattern: str) -> list[str]:
        """The requests that match, from their beginning."""
        return [request for request in self.requests if re.match(pattern, request)]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    unread = 0

    def log_message(self, *args: object) -> None:
        pass

    def handle_any(self) -> None:
        self.unread = int(self.headers.get('Content-Length', 0))
        request = f'{self.command} {unquote(self.path)}'
        self.hub.requests.append(request)
        for fault in self.hub.faults:
            if fault.times and re.match(fault.pattern, request):
                fault.times -= 1
                if fault.act(self) is not False:
                    return
        path = urlsplit(self.path).path
        for method, pattern, function in ROUTES:
            if self.command == method and (match := re.fullmatch(pattern, path)):
                function(self, *map(unquote, match.groups()))
                return
        self.reply(404, {'error': f'no such address: {request}'})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def body(self) -> bytes:
        content, self.unread = self.rfile.read(self.unread), 0
        return content

    def reply(self, status: int, body: Any = None, **headers: str) -> None:
        self.body()
        content = body if isinstance(body, bytes) else b'' if body is None else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {'Content-Type': 'application/json', 'Content-Length': str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def token(self) -> str:
        return self.headers.get('Authorization', '').removeprefix('Bearer ')

    def may(self, write: bool) -> bool:
        """Whether the token suffices; where it does not, that is answered."""
        known = self.hub.tokens.get(self.token())
        if self.token() and known is None:
            self.reply(401, {'error': 'Invalid credentials in Authorization header'})
        elif write and known is None:
            self.reply(401, {'error': 'Invalid username or password.'})
        elif write and not known:
            self.reply(403, {'error': 'Forbidden: you must use a write token to upload to a repository.'})
        else:
            return True
        return False

    def repo(self, name: str, write: bool = False) -> Repo | None:
        """The repository, if the token may; else that is answered."""
        if not self.may(write):
            return None
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.token()):
            self.reply(404, {'error': 'Repository not found'}, **{'X-Error-Code': 'RepoNotFound'})
            return None
        return repo

    def revision(self, repo: Repo, revision: str) -> str | None:
        oid = repo.find(revision)
        if oid is None:
            self.reply(404, {'error': f'Invalid rev id: {revision}'}, **{'X-Error-Code': 'RevisionNotFound'})
        return oid


def create(self: Handler) -> None:
    wanted = json.loads(self.body())
    name = f'{wanted["organization"]}/{wanted["name"]}'
    if not self.may(write=True):
        return
    if name in self.hub.repos:
        self.reply(409, {'error': 'You already created this model repo', 'url': f'{self.hub.url}/{name}'})
        return
    repo = self.hub.repos[name] = Repo(private=wanted.get('visibility') == 'private')
    repo.commit('main', {'.gitattributes': File(b'*.safetensors filter=lfs\n', False)}, 'initial commit')
    self.reply(200, {'url': f'{self.hub.url}/{name}', 'name': name})


def info(self: Handler, name: str, revision: str = 'main') -> None:
    if (repo := self.repo(name)) and (oid := self.revision(repo, revision)):
        self.reply(200, {'id': name, 'sha': oid, 'private': repo.private,
                         'siblings': [{'rfilename': path} for path in repo.commits[oid]]})


def branch(self: Handler, name: str, new: str) -> None:
    if repo := self.repo(name, write=True):
        if new in repo.branches:
            self.reply(409, {'error': f'Reference already exists: {new}'})
            return
        repo.branches[new] = repo.branches['main']
        self.reply(201, {})


def validate(self: Handler) -> None:
    """The rules of a card's metadata, from the Hub's model card specification."""
    front = re.match(r'---\r?\n(.*?)\r?\n---\r?\n', json.loads(self.body())['content'], re.DOTALL)
    found = yaml.safe_load(front[1]) if front else {}
    errors = []
    if 'license' in found and found['license'] not in LICENCES:
        errors.append(f'"license" must be one of {", ".join(LICENCES)}')
    for key in ('tags', 'datasets', 'metrics'):
        if not all(isinstance(item, str) for item in found.get(key, [])):
            errors.append(f'"{key}" must be a list of strings')
    for model in found.get('model-index', []):
        if not isinstance(model.get('name'), str) or not model.get('results'):
            errors.append('"model-index[0].name" and "results" are required')
        for result in model.get('results', []):
            required = [result['task'].get('type'), result['dataset'].get('type'), result['dataset'].get('name')]
            required += [metric.get(key) for metric in result['metrics'] for key in ('type', 'value')]
            if any(value is None for value in required):
                errors.append('"model-index[0].results[0]" lacks a required field')
    if errors:
        self.reply(400, {'errors': [{'message': message} for message in errors], 'warnings': []})
    else:
        self.reply(200, {'errors': [], 'warnings': [] if front else [{'message': 'empty or missing yaml metadata'}]})


def preupload(self: Handler, name: str, revision: str) -> None:
    wanted = json.loads(self.body())['files']
    if (repo := self.repo(name, write=True)) and (oid := self.revision(repo, revision)):
        there, answers = repo.commits[oid], []
        for file in wanted:
            binary = b'\0' in base64.b64decode(file['sample'])
            mode = 'lfs' if binary or file['path'].endswith(LFS_SUFFIXES) or file['size'] > 10_000_000 else 'regular'
            old = there.get(file['path'])
            answers.append({'path': file['path'], 'uploadMode': mode, 'shouldIgnore': False,
                            'oid': old.oid if old is not None else None})
        self.reply(200, {'files': answers})


def batch(self: Handler, name: str) -> None:
    wanted = json.loads(self.body())['objects']
    if self.repo(name, write=True):
        objects: list[dict[str, Any]] = []
        for item in wanted:
            if item['oid'] not in self.hub.blobs:
                address = f'{self.hub.storage}/lfs/{item["oid"]}?signature=secret-signature'
                item['actions'] = {'upload': {'href': address}}
            objects.append(item)
        self.reply(200, {'transfer': 'basic', 'objects': objects})


def put(self: Handler, oid: str) -> None:
    check_storage(self)
    content = self.body()
    if hashlib.sha256(content).hexdigest() != oid:
        self.reply(400, {'error': 'the content has another sha256'})
        return
    self.hub.blobs[oid] = content
    self.reply(200)


def commit(self: Handler, name: str, revision: str) -> None:
    lines = [json.loads(line) for line in self.body().splitlines()]
    if not (repo := self.repo(name, write=True)) or not (parent := self.revision(repo, revision)):
        return
    files, header = dict(repo.commits[parent]), lines[0]['value']
    assert lines[0]['key'] == 'header'
    if header.get('parentCommit', parent) != parent:
        self.reply(412, {'error': 'A commit has happened since. Please refresh and try again.'})
        return
    for line in lines[1:]:
        value = line['value']
        if line['key'] == 'file':
            files[value['path']] = File(base64.b64decode(value['content']), False)
        elif line['key'] == 'lfsFile' and value['oid'] in self.hub.blobs:
            files[value['path']] = File(self.hub.blobs[value['oid']], True)
        else:
            self.reply(400, {'error': f'LFS pointer pointed to a file that does not exist: {value}'})
            return
    oid = repo.commit(revision, files, header['summary'])
    self.reply(200, {'success': True, 'commitOid': oid, 'commitUrl': f'{self.hub.url}/{name}/commit/{oid}',
                     'pullRequestUrl': None})


def resolve(self: Handler, name: str, revision: str, path: str) -> None:
    if not (repo := self.repo(name)) or not (oid := self.revision(repo, revision)):
        return
    if path not in repo.commits[oid]:
        self.reply(404, {'error': 'Entry not found'}, **{'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': oid})
        return
    file = repo.commits[oid][path]
    if file.lfs:
        self.reply(302, **{
            'X-Repo-Commit': oid, 'X-Linked-ETag': f'"{file.oid}"', 'X-Linked-Size': str(len(file.content)),
            'Location': f'{self.hub.storage}/{name}/stored/{oid}/{path}?signature=secret-signature'})
    else:
        self.reply(200, file.content, **{'X-Repo-Commit': oid, 'ETag': f'"{file.oid}"'})


def stored(self: Handler, name: str, oid: str, path: str) -> None:
    check_storage(self)
    self.reply(200, self.hub.repos[name].commits[oid][path].content)


def check_storage(self: Handler) -> None:
    assert parse_qs(urlsplit(self.path).query) == {'signature': ['secret-signature']}
    assert not self.token(), 'the storage is another host: a token must not reach it'


NAME = r'([^/]+/[^/]+)'
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ('POST', '/api/repos/create', create),
    ('POST', '/api/validate-yaml', validate),
    ('GET', f'/api/models/{NAME}', info),
    ('GET', f'/api/models/{NAME}/revision/([^/]+)', info),
    ('POST', f'/api/models/{NAME}/branch/([^/]+)', branch),
    ('POST', f'/api/models/{NAME}/preupload/([^/]+)', preupload),
    ('POST', f'/api/models/{NAME}/commit/([^/]+)', commit),
    ('POST', rf'/{NAME}\.git/info/lfs/objects/batch', batch),
    ('PUT', '/lfs/([0-9a-f]{64})', put),
    ('GET', f'/{NAME}/resolve/([^/]+)/(.+)', resolve),
    ('HEAD', f'/{NAME}/resolve/([^/]+)/(.+)', resolve),
    ('GET', f'/{NAME}/stored/([^/]+)/(.+)', stored),
]
