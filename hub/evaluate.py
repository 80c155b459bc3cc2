"""Measure the robustness of a run, a bundle or a named model, and write it to evaluation.json.

    python -m hub.evaluate RUN|BUNDLE|MODEL-NAME --data-dir data --n 1000 --attacks clean,pgd-50,autoattack
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from tqdm import tqdm

from timm_paf.attacks import ThreatModel, frozen_view, parse_fraction
from timm_paf.data import DATASETS, ImageSet, load_dataset, to_float
from timm_paf.evaluation import check_attacks, evaluate
from timm_paf.files import environment, sha256, write_json
from timm_paf.folders import open_folder
from timm_paf.robustbench import load_bundle, read_bundle
from timm_paf.speed import AnyBatch, forward_flops, keep_memory, pays_to_compile

from .runs import load_run, read_run


def load(source: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model in eval mode, and what its files say: architecture, dataset, threat, sha256 (None where unknown).

    Raises:
        ValueError, FileNotFoundError: if it is no run, bundle or model with weights, or is damaged.
    """
    path = Path(source)
    if (path / 'config.json').is_file():
        config, model = read_bundle(path), load_bundle(path)
        about = {'architecture': config['architecture'], 'dataset': config['timm_paf']['dataset'],
                 'threat': config['timm_paf']['threat_model']}
    elif (path / 'run.json').is_file():  # a bundle holds one too
        run, model = read_run(path), load_run(path)
        about = {'architecture': run['architecture'], 'dataset': run['data']['name'], 'threat': run['recipe']['threat'],
                 'image_size': run['recipe'].get('image_size')}
    elif timm.is_model(source):
        if not timm.models.is_model_pretrained(source):
            raise ValueError(f'{source} has no weights; expected a run, a bundle, or a name of timm.list_pretrained()')
        model = timm.create_model(source, pretrained=True).eval()
        return model, {'architecture': source, 'dataset': None, 'threat': {}, 'sha256': None}
    else:
        raise FileNotFoundError(f'{source} is no run (run.json), no bundle (config.json) and no model of timm')
    return model, {**about, 'sha256': sha256(path / 'model.safetensors')}


def passes(attack: str) -> int:
    """Through the network, forward or back, about and per image; AutoAttack's depends on how robust it is."""
    return {'clean': 1, 'autoattack': 3000}.get(attack) or 2 * int(attack.removeprefix('pgd-'))


def run(args: argparse.Namespace) -> None:
    attacks = args.attacks.split(',')
    check_attacks(attacks)
    if args.n < 1 or args.batch_size < 1:
        raise ValueError(f'--n is {args.n} and --batch-size {args.batch_size}; expected at least 1')
    model, about = load(args.source)
    dataset = args.dataset or about['dataset']
    if dataset is None:
        raise ValueError(f'{args.source} does not say its data set; expected --dataset {"|".join(DATASETS)}')
    trained = about['threat']
    norm = args.norm or trained.get('norm', 'Linf')
    eps = args.eps
    if eps is None and norm == trained.get('norm') and trained.get('eps') != '0':
        eps = trained['eps']
    if eps is None and norm == 'Linf':
        eps = '8/255'
    if eps is None:
        raise ValueError(f'{args.source} says no eps for {norm}; expected --eps, such as 0.5')
    step = None if args.attack_step is None else parse_fraction(args.attack_step)
    threat = ThreatModel(norm, parse_fraction(eps), step)
    # a bundle stays as its checksums have it
    is_run = Path(args.source, 'run.json').is_file() and not Path(args.source, 'config.json').is_file()
    output = Path(args.output or (args.source if is_run else '.')) / 'evaluation.json'
    if output.exists() and not args.overwrite:
        raise FileExistsError(f'{output} exists; give another --output DIR, or --overwrite')
    if dataset == 'folder':
        folder = open_folder(args.data_dir or '.', train=False).spread(args.n)
        size = about.get('image_size') or 224
        data = ImageSet('folder', folder.centres(size), folder.labels, folder.num_classes)
    else:
        data = load_dataset(dataset, args.data_dir, train=False)
    n = min(args.n, len(data))
    if getattr(model, 'num_classes', data.num_classes) != data.num_classes:
        raise ValueError(f'{args.source} has {model.num_classes} classes; expected the {data.num_classes} of {dataset}')
    try:
        model = model.to(args.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'--device {args.device} is not to be had here: {str(error).splitlines()[0]}') from error
    device = torch.device(args.device)
    output.parent.mkdir(parents=True, exist_ok=True)
    # full float32: the numbers are those of the weights, not of a faster format
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    images, labels = to_float(data.images[:n].to(device)), data.labels[:n].to(device)
    which = f'{n} evenly spaced' if dataset == 'folder' else f'first {n}'
    keep_memory()
    model = frozen_view(model)
    compiled = args.compile
    if compiled is None:
        compiled = pays_to_compile(forward_flops(model, images[:1]) * n * sum(map(passes, attacks)), device)
    if compiled:
        model = AnyBatch(model)
    print(f'{n} images of {dataset}, {threat.norm} eps {threat.eps}, on {device}, '
          f'{"compiled (--no-compile for the other)" if compiled else "not compiled (--compile for the other)"}')

    bar = tqdm(total=n * len(attacks), unit='image', mininterval=1 if sys.stderr.isatty() else 30, dynamic_ncols=True)
    finished = 0

    def progress(attack: str, done: int, robust: int, total: int) -> None:
        nonlocal finished
        bar.set_postfix_str(f'{attack}: {robust} right, {done} of {total} done', refresh=False)
        bar.update(finished + done - bar.n)
        if done == total:
            finished += total

    started, made_by = time.monotonic(), environment()
    results: dict[str, Any] = {}
    for attack in attacks:  # what is done is written, whatever becomes of the next
        results |= evaluate(model, images, labels, threat, [attack], args.batch_size, args.seed, progress)
        write_json(output, {
            'architecture': about['architecture'], 'weights_sha256': about['sha256'], 'dataset': dataset,
            'split': 'test', 'images': which, 'n': n, 'data_sha256': data.sha256(),
            'threat_model': threat.record(), 'attacks': results, 'batch_size': args.batch_size, 'seed': args.seed,
            'device': device.type, 'compiled': compiled, 'seconds': round(time.monotonic() - started, 2), **made_by})
    bar.close()
    for attack, result in results.items():
        counts = f'{result["correct"]} of {result["n"]}, {result["seconds"]:.0f} s'
        print(f'{attack:12s} {result["accuracy"]:7.2%}  ({counts})')
        for flag in result.get('flags', ()):
            print(f'  AutoAttack warns: {flag}')
    print(f'{threat.norm} eps {threat.eps}; {output}')


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog='hub.evaluate', description=(__doc__ or '').split('\n')[0])
    parser.add_argument('source', metavar='RUN|BUNDLE|MODEL-NAME')
    parser.add_argument('--data-dir', help='directory with the data set')
    parser.add_argument('--dataset', help='default: the one that it was trained on')
    parser.add_argument('--n', type=int, default=1000, help='the first n test images (default: 1000)')
    parser.add_argument('--attacks', default='clean,pgd-50,autoattack', help='default: clean,pgd-50,autoattack')
    parser.add_argument('--norm', help='default: the one that it was trained for')
    parser.add_argument('--eps', help='exact, such as 8/255; default: that of the training, 8/255 after plain training')
    parser.add_argument('--attack-step', help='of PGD; default: a quarter of eps')
    parser.add_argument('--batch-size', type=int, default=250, help='images attacked together (default: 250)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--compile', action=argparse.BooleanOptionalAction,
                        help='torch.compile the network; default: where that pays')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', help='directory for evaluation.json; default: the run, else here')
    parser.add_argument('--overwrite', action='store_true', help='replace an evaluation.json that is there')
    try:
        run(parser.parse_args(args))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get('TIMM_PAF_DEBUG'):
            raise
        sys.exit(f'hub.evaluate: {error}')


if __name__ == '__main__':
    main()
