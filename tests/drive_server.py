"""Google Drive on this machine: a proxy that answers for its hosts, over TLS with a certificate of its own.

gdown has Drive's addresses written into it. `requests`, which it uses, takes HTTPS_PROXY and REQUESTS_CA_BUNDLE from
the environment: so the real gdown speaks to this server, and a request to any other host is refused and counted.
"""

from __future__ import annotations

import contextlib
import re
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

HOSTS = ('drive.google.com', 'drive.usercontent.google.com', 'docs.google.com')

CONFIRM = ('<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body><p '
           'class="uc-warning-caption">Google Drive can\'t scan this file for viruses.</p><form id="download-form" '
           'action="https://drive.usercontent.google.com/download" method="get"><input type="submit" value="Download '
           'anyway"/><input type="hidden" name="id" value="{id}"/><input type="hidden" name="export" value="download"/>'
           '<input type="hidden" name="confirm" value="t"/><input type="hidden" name="uuid" value="{uuid}"/></form>'
           '</body></html>')
QUOTA = ('<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>\n<p '
         'class="uc-error-caption">Sorry, you can\'t view or download this file at this time.</p>\n'
         '<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p>\n'
         '</body></html>')
SIGN_IN = '<!DOCTYPE html><html><head><title>Sign in - Google Accounts</title></head><body></body></html>'
IN_THE_MIDDLE = ('ignore-range', 'page-in-the-middle')
UUID = '6c0a2d4e-0f57-4d4e-9f2b-0a1b2c3d4e5f'


class Drive(ThreadingHTTPServer):
    """Serves one file. Each request for it takes the next of ``faults``; without one, all goes well.

    Faults: 'quota', 'sign-in', 'missing' and 'error' are pages; 'refuse' closes the connection; ('cut', n) breaks it
    after n bytes; 'short' is half a file that says it is whole; 'wrong' has one byte flipped; 'page' sends the sign-in
    page as if it were the file. Two wait for a request for the rest of the file: 'ignore-range' sends it whole, and
    'page-in-the-middle' a page. Before gdown asks for the rest it asks for the whole, which is no fault: None.
    """

    daemon_threads = True

    def __init__(self, content: bytes, file_id: str, certificate: Path) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.content, self.file_id = content, file_id
        self.faults: list[str | tuple[str, int] | None] = []
        self.downloads: list[str] = []  # the Range of each, '' for the whole file
        self.elsewhere: list[str] = []  # other hosts that were asked for
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no error here."""


class Handler(BaseHTTPRequestHandler):
    server: Drive
    protocol_version = 'HTTP/1.1'

    def do_CONNECT(self) -> None:
        self.host = self.path.partition(':')[0]
        if self.host not in HOSTS:
            self.server.elsewhere.append(self.path)
            self.send_error(403)
            return
        self.send_response(200)
        self.end_headers()
        self.connection = self.server.context.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile('rb'), self.connection.makefile('wb', 0)
        self.close_connection = False

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        if query.get('id') != self.server.file_id:
            self.page('<html><head><title>Error 404 (Not Found)</title></head></html>', 404)
        elif (self.host, url.path) == ('drive.google.com', '/uc'):
            self.send_response(303)
            self.send_header('Location', f'https://{HOSTS[1]}/download?id={query["id"]}&export=download')
            self.send_header('Content-Type', 'application/binary')
            self.send_header('Content-Length', '0')
            self.end_headers()
        elif (self.host, url.path) != ('drive.usercontent.google.com', '/download'):
            self.page(SIGN_IN)
        elif 'confirm' not in query:
            fault = self.server.faults[0] if self.server.faults else None
            pages = {
                'quota': (QUOTA, 200), 'sign-in': (SIGN_IN, 200), 'error': (SIGN_IN, 500), 'missing': (SIGN_IN, 404)}
            if fault in pages:
                self.server.faults.pop(0)
                self.page(*pages[fault])
            else:
                self.page(CONFIRM.format(id=query['id'], uuid=UUID))
        elif query.get('uuid') != UUID:
            self.page(SIGN_IN, 403)
        else:
            self.file()

    def page(self, text: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header('Content-Type', 'text/html; charset=utf-8')
        self.send_header('Content-Length', str(len(text.encode())))
        self.send_header('Set-Cookie', 'NID=1; domain=.google.com; path=/')
        self.end_headers()
        self.wfile.write(text.encode())

    def file(self) -> None:
        content, asked = self.server.content, self.headers.get('Range', '')
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault in IN_THE_MIDDLE and not asked:
            self.server.faults.insert(0, fault)
            fault = None
        self.server.downloads.append(asked)
        name, limit = fault if isinstance(fault, tuple) else (fault, None)
        if name == 'refuse':
            self.connection.close()
            self.close_connection = True
            return
        if name == 'short':
            content = content[:len(content) // 2]
        elif name == 'wrong':
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]
        elif name in ('page', IN_THE_MIDDLE[1]):
            content = SIGN_IN.encode()
        whole = not asked or name in IN_THE_MIDDLE
        start = 0 if whole else int(re.fullmatch(r'bytes=(\d+)-', asked)[1])
        if start >= len(content):
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(content)}')
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
        self.send_header('Content-Type', 'application/octet-stream')
        self.send_header('Content-Disposition', 'attachment; filename="Dai2021Parameterizing.pt"')
        self.send_header('Content-Length', str(len(content) - start))
        self.send_header('Accept-Ranges', 'bytes')
        self.end_headers()
        if limit is None:
            self.wfile.write(content[start:])
        else:
            self.wfile.write(content[start:start + limit])
            self.connection.close()
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


def make_certificate(directory: Path) -> Path:
    """A key and a certificate for Drive's hosts, which is its own authority."""
    file = directory / 'drive.pem'
    names = ','.join(f'DNS:{host}' for host in HOSTS)
    subprocess.run(
        ['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj', '/CN=a test',
         '-addext', f'subjectAltName={names}', '-keyout', directory / 'key.pem', '-out', directory / 'cert.pem'],
        check=True, capture_output=True)
    file.write_bytes((directory / 'key.pem').read_bytes() + (directory / 'cert.pem').read_bytes())
    return file


@contextlib.contextmanager
def serve(content: bytes, file_id: str, certificate: Path) -> Iterator[Drive]:
    server = Drive(content, file_id, certificate)
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
