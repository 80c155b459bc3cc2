"""The whole way in five minutes, offline, on two CPU cores: train, attack, look, pack, load back.

    python -m hub.quickstart [--output runs/quickstart]

A small PSSiLU network learns scikit-learn's digits once plainly and once adversarially.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from timm_paf.activations import create_paf
from timm_paf.data import load_dataset, to_float
from timm_paf.files import read_json
from timm_paf.plots import plot_activations
from timm_paf.robustbench import load_bundle

from .runs import load_run

EPS = '16/255'
COMMON = ['--model', 'wrn10_1_pssilu', '--dataset', 'digits', '--epochs', '6', '--batch-size', '64']
RUNS = {'plain': ['--eps', '0'], 'adversarial': ['--eps', EPS, '--attack-step', '8/255', '--attack-steps', '3']}
IMAGES = 20
"""Test images attacked; AutoAttack takes seconds for each that stays right."""


def call(*command: object) -> None:
    """Run a program of this repository as a user would type it."""
    print('\n$ python', *command, flush=True)
    done = subprocess.run([sys.executable, '-W', 'ignore', *map(str, command)])
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(prog='hub.quickstart', description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--output', type=Path, default=Path('runs/quickstart'), help='directory for what it makes')
    output: Path = parser.parse_args().output
    started = time.monotonic()
    for name, options in RUNS.items():
        call('train_robust.py', *COMMON, *options, '--output', output / name)
        found = output / name / 'evaluation.json'
        if not (found.exists() and read_json(found).get('complete', True)):
            attacks = ['--n', IMAGES, '--eps', EPS, '--attacks', 'clean,pgd-20,autoattack']
            call('-m', 'hub.evaluate', output / name, *attacks)
    bundle = output / 'bundle'
    if not bundle.exists():
        call('-m', 'hub.bundle', output / 'adversarial', '--out', bundle, '--name', 'digits_pssilu')

    # The bundle answers as the run does, on real images.
    data = load_dataset('digits', None, train=False)
    images = to_float(data.images)
    with torch.no_grad():
        logits, expected = load_bundle(bundle)(images), load_run(output / 'adversarial')(images)
    if not torch.equal(logits, expected):
        sys.exit(f'{bundle} answers otherwise than {output / "adversarial"}')
    learned = {f'PSSiLU, {name} training': load_run(output / name).act for name in RUNS}
    plot_activations({'PSSiLU as it starts': create_paf('pssilu'), **learned}, output / 'activation.png')

    attacks = list(read_json(output / 'plain' / 'evaluation.json')['attacks'])
    print(f'\nAccuracy on {IMAGES} test images, Linf eps {EPS}\n')
    print(f'{"training":14s}' + ''.join(f'{attack:>12s}' for attack in attacks))
    for name in RUNS:
        results = read_json(output / name / 'evaluation.json')['attacks']
        print(f'{name:14s}' + ''.join(f'{results[attack]["accuracy"]:12.1%}' for attack in attacks))
    print(f'\nlearned activation: {output / "activation.png"}')
    print(f'bundle: {bundle} (loaded back: same logits for all {len(data)} test images)')
    print(f'{time.monotonic() - started:.0f} s')


if __name__ == '__main__':
    main()
