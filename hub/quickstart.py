"""The whole way in a few minutes, offline, on two CPU cores: train, attack, look, pack, load back.

    python -m hub.quickstart [--output runs/quickstart]

A small PSSiLU network learns scikit-learn's digits once plainly and once adversarially. Where CIFAR-10 is found, the
network that timm_paf brings along is attacked on it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from timm_paf.activations import create_paf
from timm_paf.data import find_root, load_dataset, to_float
from timm_paf.files import read_json
from timm_paf.plots import plot_activations
from timm_paf.weights import find_weights, load_bundle

from .cli import Parser, call, one_line, user_path
from .sources import load_run

EPS = '16/255'
COMMON = ['--model', 'wrn10_1_pssilu', '--dataset', 'digits', '--epochs', '6', '--batch-size', '64']
RUNS = {'plain': ['--eps', '0'], 'adversarial': ['--eps', EPS, '--attack-step', '8/255', '--attack-steps', '3']}
IMAGES = 20
"""Number of test images attacked; AutoAttack takes seconds for each that stays right."""
EMBEDDED = 'resnet18_w16_pssilu'


def attack_embedded(output: Path, data_dir: Path) -> None:
    """Evaluates the network that comes along, clean and under PGD; a record in ``output`` is for its weights alone."""
    found = output / 'evaluation.json'
    weights = find_weights(EMBEDDED)
    assert weights is not None
    record = read_json(found) if found.exists() else {}
    if not record.get('complete') or (record['weights_sha256'], record['images']) != (weights.sha256, 'first 100'):
        call('evaluate', EMBEDDED, '--data-dir', data_dir, '--n', 100, '--attacks', 'clean,pgd-20',
             '--output', output, '--overwrite')
        record = read_json(found)
    accuracies = ', '.join(f'{attack} {result["accuracy"]:.1%}' for attack, result in record['attacks'].items())
    print(f'\n{EMBEDDED}, which comes along, on the first 100 test images of CIFAR-10, Linf eps 8/255: {accuracies}')


def run(output: Path) -> None:
    data_dir, started = find_root('cifar10'), time.monotonic()
    for name, options in RUNS.items():
        call('train', *COMMON, *options, '--output', output / name)
        found = output / name / 'evaluation.json'
        if not (found.exists() and read_json(found).get('complete', True)):
            attacks = ['--n', IMAGES, '--eps', EPS, '--attacks', 'clean,pgd-20,autoattack']
            call('evaluate', output / name, *attacks)
    bundle = output / 'bundle'
    if not bundle.exists():
        call('bundle', output / 'adversarial', '--out', bundle, '--name', 'digits_pssilu')

    # The bundle must answer as the run does, on real images.
    data = load_dataset('digits', train=False)
    images = to_float(data.images)
    with torch.no_grad():
        logits, expected = load_bundle(bundle)(images), load_run(output / 'adversarial')(images)
    if not torch.equal(logits, expected):
        raise ValueError(f'{bundle} answers otherwise than {output / "adversarial"}; remove {output}, run this again')
    learned = {f'PSSiLU, {name} training': load_run(output / name).get_submodule('act') for name in RUNS}
    plot_activations({'PSSiLU as it starts': create_paf('pssilu'), **learned}, output / 'activation.png')

    attacks = list(read_json(output / 'plain' / 'evaluation.json')['attacks'])
    print(f'\nAccuracy on {IMAGES} test images, Linf eps {EPS}\n')
    print(f'{"training":14s}' + ''.join(f'{attack:>12s}' for attack in attacks))
    for name in RUNS:
        results = read_json(output / name / 'evaluation.json')['attacks']
        print(f'{name:14s}' + ''.join(f'{results[attack]["accuracy"]:12.1%}' for attack in attacks))
    print(f'\nlearned activation: {output / "activation.png"}')
    print(f'bundle: {bundle} (loaded back: same logits for all {len(data)} test images)')
    if data_dir is None:
        print(f'no CIFAR-10 found, so {EMBEDDED} was not attacked on it: CIFAR10_ROOT=DIR names the directory that has '
              'cifar-10-batches-py')
    else:
        attack_embedded(output / EMBEDDED, data_dir)
    print(f'{time.monotonic() - started:.0f} s')


def main(args: Sequence[str] | None = None, prog: str = 'hub.quickstart') -> None:
    parser = Parser(prog=prog, description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--output', type=user_path, default=Path('runs/quickstart'), help='directory for what it makes')
    with one_line(prog, 'all'):
        run(parser.parse_args(args).output)


if __name__ == '__main__':
    main()
