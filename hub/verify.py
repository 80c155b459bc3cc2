"""Check what an evaluation says, without an attack and without trust in who measured it.

    timm-paf verify BUNDLE|ORG/NAME|MODEL --data-dir data
    timm-paf verify MODEL --evaluation DIR --data-dir data    (the files that timm-paf evaluate MODEL wrote there)

Classifies the clean images and those of evidence.npz once. That every adversarial image is inside eps and [0, 1] is
checked exactly. The exit status is 0 where all is confirmed and 1 where something is not.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from timm_paf.attacks import ThreatModel, parse_fraction
from timm_paf.data import to_float
from timm_paf.evaluation.evidence import Evidence, check_evidence, load_evidence
from timm_paf.files import sha256
from timm_paf.processes import default_device
from timm_paf.weights import find_weights
from timm_paf.weights.bundle_files import CHECKSUMS, CONFIG, check_checksums, read_checksums

from .chosen_images import in_words, option_of
from .cli import Parser, one_line, user_path
from .evidence import EVIDENCE
from .imagenet import PREPROCESSINGS
from .record_check import read_evaluation
from .sources import add_data_options, choose_data, find_name, load, to_device
from .wording import plural

FEW = 5
"""Images that a line names."""


def open_source(source: str) -> tuple[str, Path | None]:
    """Returns what `sources.load` takes, and the directory with the records; None for a name without a bundle.

    A bundle of the Hub is downloaded, and the files of every bundle have their checksums.

    Raises:
        FileNotFoundError, ValueError: if a file of the bundle is missing or is not what its checksum says.
    """
    path = Path(source)
    if not path.is_dir() and re.fullmatch(r'[\w.-]+/[\w.-]+(@[\w./-]+)?', source):
        repo, _, revision = source.partition('@')
        first = Path(hf_hub_download(repo, CHECKSUMS, revision=revision or None))
        path = first.parent  # its name is the commit, so that all files are of one
        for name in read_checksums(path):
            hf_hub_download(repo, name, revision=path.name)
    elif not path.is_dir():
        named = find_weights(source)
        if named is None or named.bundle is None:
            return source, None
        path = named.bundle
    if (path / 'config.json').is_file():
        # A cache has files of the repository that are not the bundle's, and an installed package not all of a bundle.
        here, named_there = {file.relative_to(path).as_posix() for file in path.rglob('*')}, read_checksums(path).keys()
        apart = () if Path(source).is_dir() else (here ^ named_there) - {CONFIG, 'evaluation.json', EVIDENCE}
        found = check_checksums(path, besides=tuple(apart))
        print(f'{source}: {plural(len(found), "file has its", "files have their")} sha256')
    return str(path), path


def open_record(folder: Path, weights: str) -> dict[str, Any]:
    """Returns the content of a complete evaluation.json, of these weights, whose evidence is the one that it names.

    Raises:
        FileNotFoundError: if there is no evaluation.
        ValueError: if it is not of these weights, has numbers that do not fit its verdicts, or no evidence.
    """
    file = folder / 'evaluation.json'
    record = read_evaluation(file)
    if record['weights_sha256'] != weights:
        raise ValueError(f'{file} is of weights with sha256 {record["weights_sha256"]}; these have {weights}')
    if not record.get('evidence') or record.get('complete') is False:
        raise ValueError(f'{file} has no evidence; expected that of timm-paf evaluate, which keeps it where images are '
                         'small, or with --evidence')
    if not all('worst_case' in part for part in (record, *record.get('norms', {}).values())):
        raise ValueError(f'{file} has no worst_case in every norm; expected clean or an attack within eps')
    if (folder / EVIDENCE).is_file() and (found := sha256(folder / EVIDENCE)) != record['evidence']['sha256']:
        raise ValueError(f'{folder / EVIDENCE} has sha256 {found}; evaluation.json expects '
                         f'{record["evidence"]["sha256"]}; get both again')
    return record


def check_names(evidence: dict[str, dict[str, Evidence]], record: dict[str, Any], parts: dict[str, Any],
                file: Path) -> None:
    """Checks that evidence is of attacks that fooled its image by evaluation.json, and of as many images as that says.

    Raises:
        ValueError: if it is not.
    """
    for norm, kinds in evidence.items():
        for rows in kinds.values():
            for i, attack in zip(rows.which.tolist(), rows.attack, strict=True):
                attacks = parts.get(norm, {}).get('attacks', {})
                if attack not in attacks or (attacks[attack].get('verdicts') or '1' * record['n'])[i] != '0':
                    raise ValueError(f'{file}: image {i} is of the attack {attack!r:.60} in {norm}, which did not fool '
                                     'it by evaluation.json; get both again')
    counts = {norm: {kind: count for kind, count in part.items() if kind != 'missing' and count}
              for norm, part in record['evidence'].get('norms', {}).items()}
    found = {norm: {kind: len(rows.attack) for kind, rows in evidence.get(norm, {}).items()} for norm in counts}
    if counts != found:
        raise ValueError(f'{file} is of {found} images; evaluation.json says {counts}; get both again')


def some(images: Sequence[int]) -> str:
    """Returns the number of images, and the first of them."""
    more = ', ...' if len(images) > FEW else ''
    return plural(len(images), 'image') + (f' ({", ".join(map(str, images[:FEW]))}{more})' if images else '')


def run(args: argparse.Namespace) -> bool:
    """Prints what is confirmed; returns whether all is."""
    started = time.monotonic()
    source, path = open_source(args.source)
    folder = args.evaluation or path
    if folder is None:
        find_name(source)
        raise ValueError(f'{args.source} comes without an evaluation; expected --evaluation DIR with the '
                         f'evaluation.json and {EVIDENCE} of timm-paf evaluate {args.source}')
    model, about = load(source)
    record = open_record(folder, about['sha256'])
    preprocessing = record.get('preprocessing')
    data, places, made = choose_data(argparse.Namespace(
        source=args.source, dataset=record['dataset'], data_dir=args.data_dir, download=args.download,
        images=option_of(record['images']),
        preprocessing=preprocessing if preprocessing in PREPROCESSINGS else None), about, model)
    if (data.sha256(), made['images']) != (record.get('data_sha256'), record['images']):
        raise ValueError(f'{folder / "evaluation.json"} is of the {in_words(record["images"])} of data with sha256 '
                         f'{record.get("data_sha256")}; found {len(data)} images with {data.sha256()}')
    network = to_device(args.source, model, data, args.device)
    chosen = slice(places.start, places.stop)
    images, labels = to_float(data.images[chosen].to(args.device)), data.labels[chosen].to(args.device)
    parts = {record['threat_model']['norm']: record, **record.get('norms', {})}
    threats = {norm: ThreatModel(norm, parse_fraction(part['threat_model']['eps'])) for norm, part in parts.items()}
    evidence = load_evidence(folder / EVIDENCE, record['n'], tuple(images.shape[1:]))
    check_names(evidence, record, parts, folder / EVIDENCE)
    found = check_evidence(network, images, labels, threats, evidence, args.batch_size)

    n, confirmed = record['n'], True
    if 'clean' in record['attacks']:
        claimed = torch.tensor([verdict == '1' for verdict in record['attacks']['clean']['verdicts']])
        other = (claimed != found.clean).nonzero().squeeze(1).tolist()
        confirmed &= not other
        said = 'as evaluation.json says' if not other else (
            f'evaluation.json says {record["attacks"]["clean"]["accuracy"]:.2%}, and otherwise of {some(other)}')
        which = f'[{record["images"]}]' if places.start else ''
        print(f'clean accuracy {found.clean.double().mean():.2%}: {int(found.clean.sum())} of {n} images of '
              f'{data.name}{which} are right, {said}')
    union = found.clean
    for norm, part in parts.items():
        fooled, failed = found.fooled.get(norm, torch.zeros(n, dtype=torch.bool)), found.failed.get(norm, {})
        right = found.clean & ~fooled
        union = union & right
        claimed = torch.tensor([verdict == '1' for verdict in part['worst_case']['verdicts']])
        without = [i for i in (~claimed & right).nonzero().squeeze(1).tolist() if i not in failed]
        beyond = (claimed & ~right).nonzero().squeeze(1).tolist()
        confirmed &= torch.equal(claimed, right) and not failed
        said = ', as evaluation.json says' if torch.equal(claimed, right) else ''
        count = plural(int((found.clean & fooled).sum()), 'image')
        print(f'robust accuracy at most {right.double().mean():.2%}, {norm} eps {threats[norm].eps}{said}\n'
              f'  evidence inside eps and [0, 1] that fools the network: {count}\n'
              f'  evidence that fails: {some(sorted(failed))}' + ''.join(
                  f'\n    {i}: {failed[i]}' for i in sorted(failed)[:FEW]))
        if without:
            print(f'  fooled as evaluation.json says, without evidence: {some(without)}')
        if beyond:
            print(f'  right as evaluation.json says, and not so here: {some(beyond)}')
        for attack, result in part['attacks'].items():
            if attack != 'clean':
                print(f'  {attack} alone, by evaluation.json, not checked: {result["accuracy"]:.2%}')
    if len(parts) > 1:
        print(f'{" and ".join(parts)} together: at most {union.double().mean():.2%}')
    if unchecked := [name for name in ('masking', 'corruptions') if record.get(name)]:
        print(f'not checked: {" and ".join(unchecked)}')
    print(f'{"confirmed as upper bounds" if confirmed else "NOT confirmed"} in {time.monotonic() - started:.1f} s, '
          'without an attack')
    return confirmed


def main(args: Sequence[str] | None = None, prog: str = 'hub.verify') -> None:
    parser = Parser(prog=prog, description=(__doc__ or '').split('\n')[0],
                    epilog=f'example: {prog} wrn10_1_pssilu --data-dir data')
    parser.add_argument('source', metavar='BUNDLE|ORG/NAME|MODEL',
                        help='a directory, a repository of the Hub (@REVISION), or a name of timm or RobustBench')
    parser.add_argument('--evaluation', type=user_path, metavar='DIR',
                        help=f'with evaluation.json and {EVIDENCE}; default: the bundle')
    add_data_options(parser)
    parser.add_argument('--batch-size', type=int, default=250, help='images classified together (default: 250)')
    parser.add_argument('--device', default=default_device())
    with one_line(prog, 'robustbench'):
        confirmed = run(parser.parse_args(args))
    if not confirmed:
        sys.exit(1)


if __name__ == '__main__':
    main()
