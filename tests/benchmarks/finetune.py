"""Fine-tuning from robust weights, with the activation left alone and with PSSiLU in its place.

    python tests/benchmarks/finetune.py --data-dir data --output tests/benchmarks/results/finetune.json

From the embedded wrn10_1_relu on CIFAR-10, the same steps, images and attack for all, three seeds. PSSiLU starts as
ReLU, nearly, with alpha 100, or less near with 10. Clean, PGD-50 and APGD (CE and T) before and after, on the first
test images. What is finished is in the output, and the same command resumes from there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import timm_paf
from timm_paf.data import load_dataset, to_float
from timm_paf.evaluation import evaluate
from timm_paf.files import environment, read_json, write_json
from timm_paf.weights import open_weights

NETWORKS: dict[str, tuple[str, dict[str, float]]] = {
    'relu': ('wrn10_1_relu', {}), 'pssilu': ('wrn10_1_pssilu', {}),
    'pssilu_alpha10': ('wrn10_1_pssilu', {'alpha': 10.0})}
SEEDS = (0, 1, 2)
SETTING: dict[str, Any] = {
    'init': 'wrn10_1_relu', 'max_steps': 40, 'batch_size': 128, 'lr': 0.01, 'schedule': 'one-cycle', 'eps': '8/255',
    'attack_step': '6/255', 'attack_steps': 2, 'images': {'clean,pgd-50': 400, 'apgd': 48}}
CODE = 'import sys; from train_robust import main; main(sys.argv[1:])'


def train(act: str, seed: int, data_dir: str, runs: Path) -> Path:
    """Returns the run of a fine-tuning."""
    run = runs / f'{act}_s{seed}'
    model, kwargs = NETWORKS[act]
    options = {'model': model, 'act-kwargs': json.dumps(kwargs), 'data-dir': data_dir, 'seed': seed, 'output': run,
               'min-lr': 0}
    options |= {name.replace('_', '-'): SETTING[name] for name in (
        'init', 'max_steps', 'batch_size', 'lr', 'schedule', 'eps', 'attack_step', 'attack_steps')}
    words = [str(word) for name, value in options.items() for word in (f'--{name}', value)]
    subprocess.run([sys.executable, '-W', 'ignore', '-c', CODE, *words, '--no-compile'], check=True,
                   cwd=Path(__file__).resolve().parents[2])
    return run


def start(act: str) -> nn.Module:
    """Returns the network before the first step."""
    name, kwargs = NETWORKS[act]
    model: nn.Module = timm.create_model(name, **({'act_kwargs': kwargs} if kwargs else {}))
    open_weights(str(SETTING['init'])).load(model, given=kwargs.keys())
    return model.eval()


def measure(model: nn.Module, data: Any, attacks: str, n: int) -> dict[str, Any]:
    """Returns number right and verdict of each image, by attack."""
    found = evaluate(model, to_float(data.images[:n]), data.labels[:n], SETTING['eps'], attacks, batch_size=100)
    return {name: {key: result[key] for key in ('n', 'correct', 'verdicts') if key in result}
            for name, result in found.items()}


def table(result: dict[str, Any]) -> str:
    """Returns the accuracies in percent, before and after: the mean over the seeds, and the least and the most."""
    networks = result['networks']
    attacks = [name for name in networks['relu_start'] if name != 'learned']
    lines = ['| activation | | ' + ' | '.join(
        f'{attack} % (n = {networks["relu_start"][attack]["n"]})' for attack in attacks) + ' |',
             '|' + '---|' * (2 + len(attacks))]
    for act in NETWORKS:
        for when, names in (('before', [f'{act}_start']), ('after', [f'{act}_s{seed}' for seed in result['seeds']])):
            cells = []
            for attack in attacks:
                found = [100 * networks[name][attack]['correct'] / networks[name][attack]['n'] for name in names]
                mean = f'{sum(found) / len(found):.1f}'
                cells.append(mean if when == 'before' else f'{mean} ({min(found):.1f} to {max(found):.1f})')
            lines.append(f'| {act} | {when} | {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', required=True)
    parser.add_argument('--output', type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load_dataset('cifar10', args.data_dir, train=False)
    result: dict[str, Any] = read_json(args.output) if args.output.is_file() else {
        **environment(), 'command': 'python tests/benchmarks/finetune.py --data-dir data --output JSON',
        'setting': SETTING, 'seeds': list(SEEDS), 'networks': {}}
    networks = result['networks']
    with tempfile.TemporaryDirectory() as directory:
        cases = [(act, None) for act in NETWORKS] + [(act, seed) for seed in SEEDS for act in NETWORKS]
        models: dict[tuple[str, int | None], nn.Module] = {}
        for attacks, n in SETTING['images'].items():
            for act, seed in cases:
                record = networks.setdefault(f'{act}_start' if seed is None else f'{act}_s{seed}', {})
                if set(attacks.split(',')) <= record.keys():
                    continue
                if (act, seed) not in models:
                    models[act, seed] = start(act)
                    if seed is not None:
                        run = train(act, seed, str(Path(args.data_dir).resolve()), Path(directory))
                        timm_paf.load_checkpoint(models[act, seed], run / 'model.safetensors')
                model = models[act, seed]
                record |= measure(model, data, attacks, n)
                record['learned'] = {name: value.item() for name, value in timm_paf.paf_parameters(model).items()}
                write_json(args.output, result)
                print(act, seed, {name: f'{found["correct"]} of {found["n"]}' for name, found in record.items()
                                  if name != 'learned'}, flush=True)


if __name__ == '__main__':
    main()
