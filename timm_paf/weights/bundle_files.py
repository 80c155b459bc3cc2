"""The files of a bundle: their names, config.json, and SHA256SUMS as sha256sum writes and checks it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..files import atomic_write, sha256
from .bundle_config import FIX, check_config

__all__ = [
    'CHECKSUMS', 'CONFIG', 'WEIGHTS', 'check_checksums', 'check_links', 'checksums_text', 'read_checksums',
    'read_config', 'write_checksums',
]

CONFIG, WEIGHTS, CHECKSUMS = 'config.json', 'model.safetensors', 'SHA256SUMS'
MAX_CONFIG = 1 << 20  # bytes; label names of 20,000 classes are less

def read_config(file: Path) -> dict[str, Any]:
    """Returns the content of a bundle's ``config.json``; the architecture need not be registered yet.

    What becomes an argument of a network is checked against a list of what ``hub.bundle`` writes: see `check_config`.

    Raises:
        ValueError: if the file is not one of ours.
    """
    if file.stat().st_size > MAX_CONFIG:
        raise ValueError(f'{file} has {file.stat().st_size:,} bytes; expected at most {MAX_CONFIG:,}; {FIX}')
    try:
        config = json.loads(file.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{file} is no JSON ({error}); {FIX}') from None
    return check_config(config, file)


def check_links(bundle: Path) -> None:
    """Refuses a bundle that has links to what lies outside of it.

    In the cache of huggingface_hub every file of a snapshot is a link to a blob of the same repository; these pass.

    Raises:
        ValueError: if there is such a link.
    """
    root = bundle.resolve()
    cache = root.parents[1] / 'blobs' if len(root.parents) > 1 and root.parent.name == 'snapshots' \
        and root.parents[1].name.startswith('models--') else root
    for path in sorted(root.rglob('*')):
        try:
            target = path.resolve() if path.is_symlink() else root
        except (OSError, RuntimeError):  # a loop
            target = Path('nowhere')
        if not (target.is_relative_to(root) or target.is_relative_to(cache)):
            raise ValueError(f'{bundle / path.relative_to(root)} is a link to {target}, outside of the bundle; '
                             'expected the file itself: get the bundle again from somebody you trust')


def read_checksums(path: Path) -> dict[str, str]:
    """Returns the sha256 of each file that a bundle's ``SHA256SUMS`` names; {} where there is no such file.

    Raises:
        ValueError: if ``SHA256SUMS`` can't be read, or does not name the weights.
    """
    if not (path / CHECKSUMS).is_file():
        return {}
    expected = {}
    try:
        if (path / CHECKSUMS).stat().st_size > MAX_CONFIG:
            raise ValueError(f'more than {MAX_CONFIG:,} bytes')
        lines = (path / CHECKSUMS).read_text(encoding='utf-8').splitlines()
    except ValueError as error:
        raise ValueError(f'{path / CHECKSUMS} is no list of checksums ({error}); write the bundle again') from None
    for line in lines:
        match = re.fullmatch(r'([0-9a-f]{64}) [ *](.+)', line)
        if match is None:
            raise ValueError(f'{path / CHECKSUMS} has the line {line[:200]!r}; expected "<sha256>  <file>", as '
                             'sha256sum writes')
        expected[match[2].removeprefix('./')] = match[1]
    if WEIGHTS not in expected:
        raise ValueError(f'{path / CHECKSUMS} names no {WEIGHTS}; expected its sha256, write the bundle again')
    return expected


def checksums_text(checksums: dict[str, str]) -> str:
    """Returns digests by path in the format of sha256sum."""
    return ''.join(f'{digest}  {name}\n' for name, digest in sorted(checksums.items()))


def write_checksums(bundle: Path) -> None:
    """Writes ``SHA256SUMS`` with every file of a bundle."""
    files = {path.relative_to(bundle).as_posix(): path for path in bundle.rglob('*') if path.is_file()}
    files.pop(CHECKSUMS, None)
    with atomic_write(bundle / CHECKSUMS) as part:
        part.write_text(checksums_text({name: sha256(path) for name, path in files.items()}))


def check_checksums(bundle: Path, besides: tuple[str, ...] = ()) -> dict[str, str]:
    """Checks that a bundle has the files of its checksums, unchanged, and no others.

    Args:
        bundle: the bundle's directory.
        besides: names of files that are not checked.

    Returns:
        The digest of each file by its path in the bundle, without those of ``besides``.

    Raises:
        FileNotFoundError: if there are no checksums.
        ValueError: if a file is missing, changed, not named, or a link to what lies outside.
    """
    if not (bundle / CHECKSUMS).is_file():
        raise FileNotFoundError(f'{bundle / CHECKSUMS} is missing; expected a bundle, as timm-paf bundle writes')
    check_links(bundle)
    expected = read_checksums(bundle)
    found = {path.relative_to(bundle).as_posix(): path for path in sorted(bundle.rglob('*')) if path.is_file()}
    for name in (CHECKSUMS, *besides):
        expected.pop(name, None)
        found.pop(name, None)
    for name in sorted(expected.keys() | found.keys()):
        if name not in expected:
            raise ValueError(f'{bundle / name} is not in {CHECKSUMS}; move it elsewhere, a bundle holds what it names')
        if name not in found:
            raise ValueError(f'{bundle / name} is missing and stands in {CHECKSUMS}; copy or write the bundle again')
        digest = sha256(found[name])
        if digest != expected[name]:
            fix = 'timm-paf card writes the card anew, and sha256sum the sum of one that you edited' \
                if name == 'README.md' else 'copy or write the bundle again'
            raise ValueError(f'{bundle / name}: sha256 is {digest}; {CHECKSUMS} expects {expected[name]}; {fix}')
    return expected
