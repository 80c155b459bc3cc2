"""The files of a bundle: their names, config.json, and SHA256SUMS as sha256sum writes and checks it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg

from ..activations import list_pafs
from ..convert import SHARES
from ..files import atomic_write, sha256

__all__ = [
    'CHECKSUMS', 'CONFIG', 'WEIGHTS', 'check_checksums', 'checksums_text', 'read_checksums', 'read_config',
    'write_checksums',
]

CONFIG, WEIGHTS, CHECKSUMS = 'config.json', 'model.safetensors', 'SHA256SUMS'


def read_config(file: Path) -> dict[str, Any]:
    """Returns the content of a bundle's ``config.json``; the architecture need not be registered yet.

    Raises:
        ValueError: if the file is not one of ours.
    """
    fix = 'write the bundle again with timm-paf bundle'
    try:
        config = json.loads(file.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{file} is no JSON ({error}); {fix}') from error
    if not isinstance(config, dict) or not isinstance(config.get('timm_paf'), dict):
        raise ValueError(f'{file} has no timm_paf section; expected a bundle of timm-paf bundle, while '
                         "timm.create_model('local-dir:...') or 'hf-hub:...' loads other timm models")
    config.setdefault('model_args', {})
    for key, kind in (('architecture', str), ('num_classes', int), ('pretrained_cfg', dict), ('model_args', dict),
                      ('timm_paf.dataset', str), ('timm_paf.threat_model', dict), ('timm_paf.threat_model.norm', str)):
        value: Any = config
        for part in key.split('.'):
            value = value.get(part)
        if not isinstance(value, kind):
            raise ValueError(f'{file}: {key} is {value!r}; expected {kind.__name__}; {fix}')
    about = config['timm_paf']
    if 'act' in about:  # only a converted model has it
        for key, known in (('act', list_pafs(plain=True)), ('act_share', SHARES)):
            if about.get(key) not in known:
                raise ValueError(f'{file}: timm_paf.{key} is {about.get(key)!r}; expected one of {", ".join(known)}; '
                                 f'{fix}')
        if not isinstance(about.get('act_kwargs'), dict):
            raise ValueError(f'{file}: timm_paf.act_kwargs is {about.get("act_kwargs")!r}; expected dict; {fix}')
    unknown = set(config['pretrained_cfg']) - {field.name for field in dataclasses.fields(PretrainedCfg)}
    if unknown:
        raise ValueError(f'{file}: pretrained_cfg has {", ".join(sorted(unknown))}; expected fields that timm '
                         f'{timm.__version__} has; pip install --upgrade timm')
    return config


def read_checksums(path: Path) -> dict[str, str]:
    """Returns the sha256 of each file that a bundle's ``SHA256SUMS`` names; {} where there is no such file.

    Raises:
        ValueError: if ``SHA256SUMS`` can't be read, or does not name the weights.
    """
    if not (path / CHECKSUMS).is_file():
        return {}
    expected = {}
    for line in (path / CHECKSUMS).read_text(encoding='utf-8').splitlines():
        match = re.fullmatch(r'([0-9a-f]{64}) [ *](.+)', line)
        if match is None:
            raise ValueError(f'{path / CHECKSUMS} has the line {line!r}; expected "<sha256>  <file>", as sha256sum '
                             'writes')
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
        ValueError: if a file is missing, changed, or not named.
    """
    if not (bundle / CHECKSUMS).is_file():
        raise FileNotFoundError(f'{bundle / CHECKSUMS} is missing; expected a bundle, as timm-paf bundle writes')
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
