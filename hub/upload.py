"""Put a bundle on the Hugging Face Hub in one commit, download it anew and compare.

    python -m hub.upload BUNDLE ORG/NAME [--private] [--revision BRANCH] [--data-dir DIR] [--dry-run]

The files are those of timm's `push_to_hf_hub` (config.json, model.safetensors, a card with library_name: timm) and the
records of how they came about. The token is huggingface_hub's: `hf auth login`, or HF_TOKEN.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download

# HTTPError is httpx's or httpx2's, whichever this huggingface_hub uses. The names below are exported without __all__.
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import disable_progress_bars, validate_repo_id  # type: ignore[attr-defined]
from torch import Tensor, nn

from timm_paf.data import DATASETS, load_dataset, to_float
from timm_paf.files import read_json, sha256
from timm_paf.weights import load_bundle, read_bundle
from timm_paf.weights.bundle_files import CHECKSUMS, check_checksums, checksums_text
from timm_paf.weights.server_fault import http_answer, is_of_server, server_fault
from timm_paf.wording import causes, reason_of, shown

from .card import REPO
from .chosen_images import in_words, option_of, parse_images, record_text
from .cli import Parser, one_line, user_path
from .paths import paths_in
from .record_check import read_evaluation
from .wording import plural

ERRORS = (ValueError, OSError, HTTPError)
FIXES = {
    401: 'the Hub knows no such token: hf auth login with one that may write to {repo}',
    403: 'this token may not do that: hf auth login with one that may write to {repo}',
    404: 'check the name, and that this token may see it',
    409: 'something else changed {repo} meanwhile: look at it, and run this again',
    412: 'something else changed {repo} meanwhile: look at it, and run this again',
    429: 'too many requests: wait{wait}, and run this again'}
AGAIN = 'run this again later: what the Hub has by then is not sent twice'
Images = tuple[Tensor, Tensor, str, str]
"""Test images, labels, the clean verdicts of evaluation.json, and in words which images these are."""


def prepare(bundle: Path, repo: str) -> tuple[dict[str, Path | bytes], dict[str, str]]:
    """Returns the contents and digests by path of the files to send, after checking them.

    They are the bundle's files, but the card calls the repository by its name, and the checksums have the new card's
    digest.

    Raises:
        FileNotFoundError, ValueError: if the bundle is not whole.
    """
    checksums = check_checksums(bundle)
    read_bundle(bundle)
    if 'README.md' not in checksums:
        raise FileNotFoundError(f'{bundle} has no README.md; timm-paf card {bundle} writes it')
    files: dict[str, Path | bytes] = {name: bundle / name for name in checksums}
    readme = (bundle / 'README.md').read_bytes().replace(REPO.encode(), repo.encode())
    files['README.md'], checksums['README.md'] = readme, hashlib.sha256(readme).hexdigest()
    text = checksums_text(checksums).encode()
    files[CHECKSUMS], checksums[CHECKSUMS] = text, hashlib.sha256(text).hexdigest()
    return dict(sorted(files.items())), checksums


def load_images(bundle: Path, data_dir: str) -> Images:
    """Loads the images that the bundle's evaluation.json is of, at most the first 1,000 of these.

    Raises:
        FileNotFoundError, ValueError: if there is no such evaluation, or the data is other data.
    """
    found = read_evaluation(bundle / 'evaluation.json')
    verdicts = found['attacks'].get('clean', {}).get('verdicts', '')[:1000]
    if found['dataset'] not in DATASETS:
        raise ValueError(f'{bundle}/evaluation.json is of {found["dataset"]!r:.100}; expected images of '
                         f'{", ".join(DATASETS)}, which alone are compared: leave --data-dir out')
    data = load_dataset(found['dataset'], data_dir, train=False)
    asked = parse_images(option_of(found['images']), f'{bundle}/evaluation.json: images')
    places = range(len(data))[asked][:len(verdicts)]
    if not verdicts or len(places) < len(verdicts) or data.sha256() != found.get('data_sha256'):
        raise ValueError(f'{bundle}/evaluation.json has no clean verdicts of the images in {data_dir}; expected data '
                         f'with sha256 {found.get("data_sha256")}, found {data.sha256()}: leave --data-dir out')
    chosen = slice(places.start, places.stop)
    return to_float(data.images[chosen]), data.labels[chosen], verdicts, in_words(record_text(places))


def commit_message(bundle: Path) -> str:
    """Returns the message of the commit: architecture, data set, threat model and digest of the weights."""
    config = read_json(bundle / 'config.json')
    threat = config['timm_paf']['threat_model']
    return (f'{config["architecture"]}, {config["timm_paf"]["dataset"]}, {threat["norm"]} {threat["eps"]}, '
            f'weights {sha256(bundle / "model.safetensors")[:12]}')


def describe(files: dict[str, Path | bytes], checksums: dict[str, str]) -> Iterator[str]:
    """Yields a line for each file. The Hub decides what it stores as LFS; so far all that is large or not text."""
    for name, content in files.items():
        info = CommitOperationAdd(name, content).upload_info
        lfs = info.size > 10_000_000 or b'\0' in info.sample
        yield f'{"lfs" if lfs else "regular":8s}{info.size:>12,}  {checksums[name]}  {name}'


def send(files: dict[str, Path | bytes], message: str, repo: str, branch: str, private: bool) -> tuple[str, bool]:
    """Makes the repository and the branch where they lack, then the commit, which comes last and takes every file.

    Returns:
        The commit that has the files, and whether it is new.

    Raises:
        ValueError: if the repository is public and ``private`` is asked for, or the Hub does not take the card.
        HTTPError, OSError, RuntimeError: if huggingface_hub fails.
    """
    api = HfApi()
    api.create_repo(repo, private=private or None, exist_ok=True)
    before = api.model_info(repo)
    if private and not before.private:
        raise ValueError('it is public; expected a private one: change that in its settings on the Hub, or leave '
                         '--private out')
    if branch != 'main':
        api.create_branch(repo, branch=branch, exist_ok=True)
        before = api.model_info(repo, revision=branch)
    others = {sibling.rfilename for sibling in before.siblings or ()} - files.keys() - {'.gitattributes'}
    if others:
        print(f'{repo} has {plural(len(others), "other file")}, and keeps what it has')
    # With parent_commit nothing is overwritten that somebody else puts there meanwhile.
    done = api.create_commit(
        repo, [CommitOperationAdd(name, content) for name, content in files.items()], commit_message=message,
        revision=branch, parent_commit=before.sha)
    if not re.fullmatch('[0-9a-f]{40}|[0-9a-f]{64}', done.oid):
        raise ValueError(f'the Hub took the files, but names no commit; {AGAIN}')
    return done.oid, done.oid != before.sha


@contextmanager
def fresh_cache() -> Iterator[Path]:
    """Yields an empty cache for what huggingface_hub downloads; timm before 1.0.13 has no argument to choose one."""
    usual = constants.HF_HUB_CACHE
    with tempfile.TemporaryDirectory() as folder:
        constants.HF_HUB_CACHE = folder
        try:
            yield Path(folder)
        finally:
            constants.HF_HUB_CACHE = usual


@torch.no_grad()
def check(local: Any, checksums: dict[str, str], repo: str, commit: str, images: Images | None) -> str:
    """Downloads a commit anew and compares digests, logits and verdicts with the local ones; returns what is equal.

    Raises:
        ValueError: if something differs.
        HTTPError, OSError: if huggingface_hub fails.
    """
    disable_progress_bars()
    with fresh_cache() as cache:
        for name, expected in checksums.items():
            file = hf_hub_download(repo, name, revision=commit, cache_dir=cache, force_download=True)
            found = sha256(file)
            if name == 'config.json':
                folder = Path(file).parent
            if found != expected:
                raise ValueError(f'{name} comes back with sha256 {found}; expected {expected}: use nothing of this '
                                 'commit, delete the file on the Hub, and run this again')
        converted = 'act' in read_bundle(folder)['timm_paf']  # timm alone does not make a converted network
        model: nn.Module = (
            load_bundle(folder) if converted else timm.create_model(f'hf-hub:{repo}@{commit}', pretrained=True).eval())
    x = torch.rand(8, *local.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    report = f'{len(checksums)} files come back as they were sent, logits are the same bit for bit'
    batches = [x] if images is None else [x, *torch.split(images[0], 250)]
    logits = [model(batch) for batch in batches]
    if not all(torch.equal(ours, local(batch)) for ours, batch in zip(logits, batches, strict=True)):
        raise ValueError('the model that timm makes of it gives other logits than the bundle; report this as a bug')
    if images is not None:
        _, labels, verdicts, which = images
        right = torch.cat(logits[1:]).argmax(1) == labels
        differing = sum(a != b for a, b in zip(verdicts, ''.join(str(int(v)) for v in right), strict=True))
        if differing:
            raise ValueError(f'{differing} of {len(labels)} clean verdicts are other ones than in evaluation.json; '
                             'evaluate and pack the weights again')
        report += f', {int(right.sum())} of the {which} right, as evaluation.json says'
    return report


def explain(error: BaseException, repo: str) -> str:
    """Returns one line on what went wrong, and what to do; it has nothing that a server sent."""
    text, fixes = reason_of(error, None), FIXES
    if not any(map(is_of_server, causes(error))):
        return f'{text}; {AGAIN}' if isinstance(error, OSError) else text
    if text.startswith('Invalid metadata in README.md'):
        return ('the Hub does not take the metadata in README.md, most often for the licence; timm-paf card writes the '
                'card anew, with another --licence, an id of https://huggingface.co/docs/hub/repositories-licenses')
    what = ''
    if file := re.match(r"Error while uploading '([\w./-]{1,200})'", text):  # the storage failed, and knows no token
        what, fixes = f'{file[1]} could not be sent: ', {}
    status, headers = http_answer(error)
    seconds = re.fullmatch(r'\d{1,5}', headers.get('Retry-After', '')) or re.search(
        r'(?<=\bt=)\d{1,5}\b', headers.get('RateLimit', ''))  # the Hub's own header for the wait
    fix = AGAIN if status is None else fixes.get(status, AGAIN).format(
        repo=repo, wait=f' {seconds[0]} s' if seconds else '')
    return f'{what}{server_fault(error)}; {fix}'


@contextmanager
def told(where: str, repo: str) -> Iterator[None]:
    """Raises ValueError with a line of ours where the block fails; huggingface_hub may raise anything."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, ERRORS) and not any(map(is_of_server, causes(error))):
            raise
        raise ValueError(f'{where}: {explain(error, repo)}') from error


def run(args: argparse.Namespace) -> None:
    bundle, repo = args.bundle, args.repo
    validate_repo_id(repo)
    if '/' not in repo:
        raise ValueError(f'the repository is {repo!r}; expected ORG/NAME')
    files, checksums = prepare(bundle, repo)
    local = load_bundle(bundle)
    images = None if args.data_dir is None else load_images(bundle, args.data_dir)
    message = commit_message(bundle)
    named = {name: found for name in files if (found := paths_in(bundle / name))}
    for name, found in named.items():
        print(f'{name} names {shown(found)}')
    if named:
        raise ValueError(f'{plural(len(named), "file")} would publish paths of a machine; timm-paf card {bundle} '
                         'writes records and card without them, other files have to be made anew')
    if args.dry_run:
        print(f'would send to {"private " if args.private else ""}{repo}, branch {args.revision}, in one commit: '
              f'{message}', *describe(files, checksums), f'{len(files)} files; nothing was sent', sep='\n')
        return
    with told(repo, repo):
        commit, new = send(files, message, repo, args.revision, args.private)
    name = f'{repo}@{commit}'
    print(f'{name}: published as {message}' if new else f'{name} has these files already: no new commit', flush=True)
    with told(f'{name} is on the Hub, but the check failed', repo):
        print(f'{name}: {check(local, checksums, repo, commit, images)}')
    at = '' if args.revision == 'main' else f'@{args.revision}'
    if 'act' in read_bundle(args.bundle)['timm_paf']:
        print(f"import timm_paf; model = timm_paf.load_bundle('{repo}{at}')")
    else:
        print(f"import timm, timm_paf; model = timm.create_model('hf-hub:{repo}{at}', pretrained=True)")


def main(args: Sequence[str] | None = None, prog: str = 'hub.upload') -> None:
    parser = Parser(prog=prog, description=(__doc__ or '').split('\n')[0],
                    epilog=f'example: {prog} bundles/mine ORG/NAME --dry-run')
    parser.add_argument('bundle', type=user_path, metavar='BUNDLE', help='a directory that timm-paf bundle wrote')
    parser.add_argument('repo', metavar='ORG/NAME', help='made where it does not exist')
    parser.add_argument('--private', action='store_true', help='make it private; a public one that exists is refused')
    parser.add_argument('--revision', default='main', metavar='BRANCH', help='made from main where it does not exist')
    parser.add_argument('--data-dir', metavar='DIR', help='compare the clean verdicts too, on the data set there')
    parser.add_argument('--dry-run', action='store_true', help='print what would be sent; nobody is contacted')
    found = parser.parse_args(args)
    warnings.simplefilter('ignore')  # huggingface_hub's may have words of the server
    with one_line(prog, errors=ERRORS):
        run(found)


if __name__ == '__main__':
    main()
