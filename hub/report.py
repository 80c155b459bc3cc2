"""The README's tables of accuracies and its pictures, from the records in hub/models and hub/results.

    python -m hub.report           # after an evaluation or a study
    python -m hub.report --check   # says what is not as the records have it, and changes nothing

No number is typed: what stands between ``<!-- hub.report: NAME -->`` and ``<!-- end -->`` is replaced as a whole, and a
picture carries the numbers that it was drawn from.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from PIL import Image
from scipy.stats import spearmanr

from timm_paf.activations import create_paf, list_pafs
from timm_paf.attacks import parse_fraction
from timm_paf.files import read_json
from timm_paf.plots import plot_activations, plot_eps, plot_shapes
from timm_paf.zoo import list_weights, table

from .study import ARCHITECTURE, RECORDS, RESULTS, Case, shape

PILOTS = RESULTS.with_name('pilots')
PAGES = (Path('README.md'), RESULTS.with_name('README.md'))
PICTURES = RESULTS.with_name('activations.png'), RESULTS.with_name('eps.png'), RESULTS.with_name('shapes.png')
_BLOCK = re.compile(r'(?<=<!-- hub\.report: )(\w+)( -->\n).*?(?=\n<!-- end -->)', re.DOTALL)


class Record:
    """What is known of one network of the study."""

    def __init__(self, directory: Path) -> None:
        self.run, self.evaluation = (read_json(directory / name) for name in (RECORDS[0], RECORDS[2]))
        kwargs = dict(self.run['recipe']['act_kwargs'])
        kwargs.pop('frozen', None)
        act = self.run['architecture'].removeprefix(f'{ARCHITECTURE}_')
        self.case = Case(act, self.run['recipe']['seed'], kwargs, act == 'pssilu' and not self.run['recipe']['paf_penalty'])
        last = json.loads((directory / RECORDS[1]).read_text().splitlines()[-1])
        self.learned = {key.removeprefix('act.'): last[key] for key in ('act.alpha', 'act.beta') if key in last}

    def verdicts(self, attack: str) -> torch.Tensor | None:
        """(n,) 1 where the image stands."""
        found = self.evaluation['attacks'].get(attack)
        return None if found is None else torch.tensor([float(c) for c in found['verdicts']])


def records() -> list[Record]:
    """Of every network of the study that is complete."""
    return [Record(path.parent) for path in sorted(RESULTS.glob('*/evaluation.json'))]


def spread(values: Sequence[float], sign: str = '') -> str:
    """Mean, and least and most where there are several."""
    return f'{mean(values):{sign}.1f}' + (
        f' ({min(values):{sign}.1f} to {max(values):{sign}.1f})' if len(values) > 1 else '')


def accuracies(found: Sequence[Record], attack: str) -> str:
    """In percent over the seeds."""
    values = [100 * v.mean().item() for r in found if (v := r.verdicts(attack)) is not None]
    return spread(values) if values else ''


def difference(found: Sequence[Record], relu: Sequence[Record], attack: str) -> str:
    """To ReLU with the same seed, in points: mean, spread over seeds, and twice the standard error over images."""
    base = {r.case.seed: v for r in relu if (v := r.verdicts(attack)) is not None}
    pairs = [100 * (v - base[r.case.seed]) for r in found
             if r.case.seed in base and (v := r.verdicts(attack)) is not None]
    if not pairs:
        return ''
    images = torch.stack(pairs).mean(0)
    return f'{spread([p.mean().item() for p in pairs], "+")} ± {2 * images.std().item() / math.sqrt(len(images)):.1f}'


def rows_to_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f'| {" | ".join(row)} |' for row in (header, *rows)]
    return '\n'.join([lines[0], '|---' * len(header) + '|', *lines[1:]])


def activations(found: Sequence[Record]) -> dict[str, list[Record]]:
    """Those with nothing fixed, by variant."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in found:
        if not record.case.fixed:
            groups[record.case.variant].append(record)
    return groups


def attacks_of(found: Sequence[Record]) -> list[str]:
    """The attacks that any has, in order."""
    return list(dict.fromkeys(attack for r in found for attack in r.evaluation['attacks']))


def title(attack: str) -> str:
    return {'clean': 'clean', 'autoattack': 'AutoAttack', 'apgd': 'APGD-CE, -T'}.get(attack, attack.upper())


def study_table() -> str:
    """Every activation: learned parameters, accuracies, and the paired difference to ReLU under each attack."""
    groups = activations(records())
    attacks = attacks_of([r for group in groups.values() for r in group])
    weakest_first = [attack for attack in attacks if attack != 'clean']

    def learned(group: Sequence[Record]) -> str:
        names = [name for name in ('alpha', 'beta') if name in group[0].learned]
        return ', '.join(f'{name} {mean([r.learned[name] for r in group]):.2f}' for name in names)

    def order(act: str) -> float:
        return -mean([v.mean().item() for r in groups[act] if (v := r.verdicts(weakest_first[0])) is not None])

    rows = [(act, str(len(create_paf_parameters(act))), str(len(groups[act])), learned(groups[act]),
             *(accuracies(groups[act], attack) for attack in attacks),
             *(difference(groups[act], groups['relu'], attack) if act != 'relu' else '' for attack in weakest_first))
            for act in sorted(groups, key=order)]
    return rows_to_markdown(('activation', 'parameters', 'seeds', 'learned (mean)', *map(title, attacks),
                             *(f'{title(attack)} minus ReLU' for attack in weakest_first)), rows)


def create_paf_parameters(act: str) -> list[torch.Tensor]:
    return list(create_paf(act).parameters())


def fixed_shapes() -> list[tuple[Record, float, float]]:
    """Networks whose activation learned nothing, with its curvature and its output at -1; of plain ones seed 0."""
    found = []
    for record in records():
        plain = record.case.act not in list_pafs() or not create_paf_parameters(record.case.act)
        if record.case.seed == 0 and (record.case.fixed or plain):
            found.append((record, *shape(record.case.act, **record.case.fixed)))
    return found


def shape_table() -> str:
    """Every fixed shape: largest second derivative, output at -1, accuracies."""
    found = fixed_shapes()
    relu = [r for r, *_ in found if r.case.name == 'relu_s0']
    rows = [(r.case.name.removesuffix('_s0').replace('_', ' '), 'kink' if math.isinf(curvature) else f'{curvature:.2f}',
             f'{at:+.3f}', accuracies([r], 'clean'), accuracies([r], 'pgd-50'), difference([r], relu, 'pgd-50'))
            for r, curvature, at in found]
    return rows_to_markdown(
        ('shape', 'largest second derivative', 'output at -1', 'clean', 'PGD-50', 'PGD-50 minus ReLU'), rows)


def correlations() -> str:
    """Spearman's rank correlation of PGD-50 accuracy with each property."""
    found = [(curvature, at, v.mean().item()) for r, curvature, at in fixed_shapes()
             if (v := r.verdicts('pgd-50')) is not None]
    smooth = [(c, a) for c, _, a in found if math.isfinite(c)]
    lines = []
    for what, pairs in (('the largest second derivative, of the smooth ones', smooth),
                        ('the output at -1', [(at, a) for _, at, a in found])):
        result = spearmanr(*zip(*pairs))
        lines.append(f'- with {what}: {result.statistic:+.2f} (n = {len(pairs)}, p = {result.pvalue:.2f})')
    return '\n'.join(lines)


def pilots_table() -> str:
    """What was tried before the embedded network was trained: equal minutes, accuracies on held-out training images."""
    rows = []
    for path in sorted(PILOTS.glob('*/run.json')):
        run, last = read_json(path), json.loads((path.parent / 'metrics.jsonl').read_text().splitlines()[-1])
        recipe = run['recipe']
        attack = '' if recipe['objective'] == 'fgsm-rs' else f', {recipe["threat"]["steps"]} steps'
        rows.append((run['architecture'], f'{recipe["objective"]}{attack}', str(run['steps']),
                     f'{run["seconds"] / 60:.1f}',
                     f'{last["val_clean_accuracy"]:.1%}', f'{last["val_adv_accuracy"]:.1%}'))
    return rows_to_markdown(('network', 'objective', 'steps', 'minutes', 'clean', 'under attack'), rows)


def settings() -> str:
    """What all networks of the study share, from their records."""
    found = records()
    first, seconds = found[0], [r.run['seconds'] for r in found]
    unlike = [r.case.name for r in found if (r.run['data'], r.run['steps'], r.evaluation['threat_model'])
              != (first.run['data'], first.run['steps'], first.evaluation['threat_model'])]
    if unlike:
        raise ValueError(f'{", ".join(unlike)} were made with another recipe than {first.case.name}')
    versions, threat = first.evaluation['versions'], first.evaluation['threat_model']
    return (f'{len(found)} networks, `{ARCHITECTURE}_<activation>`, {first.run["steps"]:,} steps of batch '
            f'{first.run["recipe"]["batch_size"]} each ({min(seconds) / 60:.1f} to {max(seconds) / 60:.1f} minutes '
            f'on one core of an {first.run["hardware"]["cpu"]}); the {first.evaluation["images"]} test images of CIFAR-10, '
            f'{threat["norm"]} {threat["eps"]}; torch {versions["torch"]}, timm {versions["timm"]}.')


BLOCKS = {'weights': table, 'study': study_table, 'shapes': shape_table, 'correlations': correlations,
          'pilots': pilots_table, 'settings': settings}


def eps_curves() -> dict[str, list[tuple[str, float]]]:
    """Of every bundle with PGD-20 at several eps: name -> (eps, accuracy in percent), clean at 0."""
    curves = {}
    for weights in list_weights():
        if weights.bundle is None or not (weights.bundle / 'evaluation.json').is_file():
            continue
        attacks = read_json(weights.bundle / 'evaluation.json')['attacks']
        points = [(attack.partition('@')[2], 100 * found['accuracy']) for attack, found in attacks.items()
                  if attack.startswith('pgd-20@')]
        if points:
            points.append(('0', 100 * attacks['clean']['accuracy']))
            curves[weights.model] = sorted(points, key=lambda point: parse_fraction(point[0]))
    return curves


def learned_shapes() -> dict[str, dict[str, float]]:
    """Of seed 0 of every activation that learned something: its parameters; and those of the embedded networks."""
    found = {f'{act} ({ARCHITECTURE})': r.learned for act, group in activations(records()).items() for r in group
             if r.case.seed == 0 and r.learned}
    for weights in list_weights('*pssilu*'):
        if weights.bundle:
            last = json.loads((weights.bundle / 'metrics.jsonl').read_text().splitlines()[-1])
            found[f'pssilu ({weights.model.removesuffix("_pssilu")})'] = {
                name: last[f'act.{name}'] for name in ('alpha', 'beta')}
    return found


def pictures() -> dict[Path, tuple[Any, Any]]:
    """Path -> what is drawn, and a function that draws it."""
    def draw_activations(found: dict[str, dict[str, float]], path: Path, source: str) -> None:
        plot_activations({f'{name}: {", ".join(f"{k} {v:.2f}" for k, v in values.items())}':
                          create_paf(name.partition(' ')[0], **values) for name, values in found.items()},
                         path, source=source)

    points = [(r.case.act, round(curvature, 4), round(at, 4), round(100 * v.mean().item(), 2))
              for r, curvature, at in fixed_shapes() if (v := r.verdicts('pgd-50')) is not None]
    return dict(zip(PICTURES, [(learned_shapes(), draw_activations), (eps_curves(), plot_eps), (points, plot_shapes)]))


def main() -> None:
    parser = argparse.ArgumentParser(prog='hub.report', description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--check', action='store_true', help='change nothing; exit 1 if something is not up to date')
    check, stale = parser.parse_args().check, []
    for page in PAGES:
        text = page.read_text()
        new = _BLOCK.sub(lambda match: f'{match[1]}{match[2]}{BLOCKS[match[1]]()}', text)
        if new != text:
            stale.append(str(page))
            if not check:
                page.write_text(new)
    for path, (found, draw) in pictures().items():
        source = json.dumps(found, sort_keys=True)
        if not path.is_file() or Image.open(path).info.get('Description') != source:
            stale.append(str(path))
            if not check:
                draw(found, path, source=source)
    for name in stale:
        print(f'{name} is not what the records say; run python -m hub.report' if check else f'{name} written')
    if check and stale:
        sys.exit(1)


if __name__ == '__main__':
    main()
