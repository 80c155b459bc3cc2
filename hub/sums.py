"""SHA256SUMS of a bundle, as sha256sum writes and checks it."""

from __future__ import annotations

import re
from pathlib import Path

from timm_paf.files import sha256, whole_file

SUMS = 'SHA256SUMS'


def sums_text(sums: dict[str, str]) -> str:
    return ''.join(f'{digest}  {name}\n' for name, digest in sorted(sums.items()))


def write_sums(bundle: Path) -> None:
    """Write the sums of every file that is there."""
    files = {path.relative_to(bundle).as_posix(): path for path in bundle.rglob('*') if path.is_file()}
    files.pop(SUMS, None)
    with whole_file(bundle / SUMS) as part:
        part.write_text(sums_text({name: sha256(path) for name, path in files.items()}))


def check_sums(bundle: Path, besides: tuple[str, ...] = ()) -> dict[str, str]:
    """Check that a bundle has the files of its sums, as they were, and no others.

    Args:
        bundle: the directory.
        besides: names that are not looked at.

    Returns:
        The digest of each file by its path in the bundle, without those of ``besides``.

    Raises:
        FileNotFoundError: if there are no sums.
        ValueError: if a file is missing, another one, or not named.
    """
    if not (bundle / SUMS).is_file():
        raise FileNotFoundError(f'{bundle / SUMS} is missing; expected a bundle, as python -m hub.bundle writes')
    expected: dict[str, str] = {}
    for line in (bundle / SUMS).read_text(encoding='utf-8').splitlines():
        match = re.fullmatch(r'([0-9a-f]{64}) [ *](.+)', line)
        if match is None:
            raise ValueError(f'{bundle / SUMS} has the line {line!r}; expected "<sha256>  <file>", as sha256sum writes')
        expected[match[2]] = match[1]
    found = {path.relative_to(bundle).as_posix(): path for path in sorted(bundle.rglob('*')) if path.is_file()}
    for name in (SUMS, *besides):
        expected.pop(name, None)
        found.pop(name, None)
    for name in sorted(expected.keys() | found.keys()):
        if name not in expected:
            raise ValueError(f'{bundle / name} is not in {SUMS}; move it elsewhere, a bundle holds what its sums name')
        if name not in found:
            raise ValueError(f'{bundle / name} is missing and stands in {SUMS}; copy or write the bundle again')
        digest = sha256(found[name])
        if digest != expected[name]:
            mend = 'python -m hub.card writes the card anew, and sha256sum the sum of one that you edited' \
                if name == 'README.md' else 'copy or write the bundle again'
            raise ValueError(f'{bundle / name}: sha256 is {digest}; {SUMS} expects {expected[name]}; {mend}')
    return expected
