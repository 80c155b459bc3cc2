"""What `timm_paf.convert_activations` reaches in every family of timm, by one small model of each.

    python tests/benchmarks/families.py --output tests/benchmarks/results/families.json     (ten minutes on one core)
    python tests/benchmarks/families.py --table tests/benchmarks/results/families.json      (the README's)
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch

from timm_paf.activation_sites import functional_activations
from timm_paf.activations import paf_parameters
from timm_paf.convert import convert_activations
from timm_paf.files import environment, is_of_machine, write_json

OURS = {'resnet_cifar', 'wide_resnet', 'robustbench'}
SAME = {'relu': ('relu',), 'silu': ('silu',), 'elu': ('elu',)}
"""Plain activation that replaces itself: the logits have to stay."""


def look_at_all(family: str) -> tuple[dict[str, int], dict[str, list[str]], list[str]]:
    """Every model of a family, without memory or arithmetic: on torch's meta device.

    Returns:
        Parameters of each that can be made; of each with something out of reach, what that is; those that do not run
        so. Models made of the same classes of modules are looked at once.
    """
    sizes: dict[str, int] = {}
    beyond: dict[str, list[str]] = {}
    unknown: list[str] = []
    looked: dict[frozenset[str], list[str]] = {}
    for name in timm.list_models(module=family):
        try:
            with torch.device('meta'):
                model = timm.create_model(name)
        except (RuntimeError, ValueError, TypeError, AttributeError):  # not every network can be made without memory
            unknown.append(name)
            continue
        sizes[name] = sum(p.numel() for p in model.parameters())
        classes = frozenset(type(module).__name__ for module in model.modules())
        if classes not in looked:
            try:
                with torch.device('meta'):  # also of one that has function calls alone, so that nothing is converted
                    looked[classes] = list(kinds(functional_activations(model)))
            except (RuntimeError, ValueError):  # nor can every one be run so
                unknown.append(name)
                continue
        if looked[classes]:
            beyond[name] = looked[classes]
    return sizes, beyond, unknown


def kinds(out_of_reach: dict[str, int]) -> dict[str, int]:
    """Class and function -> places."""
    return dict(Counter(where.rpartition('(')[2].rstrip(')') for where in out_of_reach))


def same_logits(name: str, x: torch.Tensor) -> bool | None:
    """Whether an activation that is replaced by itself leaves the logits; None where there is none to try."""
    model = timm.create_model(name).eval()
    expected = model(x)
    tried = False
    for act, replace in SAME.items():
        try:
            convert_activations(model, act, replace=replace, gates=True, input_size=tuple(x.shape[1:]))
            tried = True
        except ValueError:
            continue
    return torch.allclose(model(x), expected, atol=1e-5) if tried else None


def survey(family: str) -> dict[str, Any]:
    """One row of the table."""
    sizes, beyond, unknown = look_at_all(family)
    names = [name for name in sizes if not name.startswith('test_')] or list(sizes)
    name = min(names, key=sizes.__getitem__) if names else min(timm.list_models(module=family), key=len)
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    row: dict[str, Any] = {
        'model': name, 'parameters': sum(p.numel() for p in model.parameters()),
        'models': len(timm.list_models(module=family)), 'models_with_something_out_of_reach': beyond,
        'models_not_looked_at': unknown}
    cfg = model.pretrained_cfg
    for size in dict.fromkeys((cfg['input_size'] if cfg['fixed_input_size'] else (3, 96, 96), cfg['input_size'])):
        try:
            done = convert_activations(model, 'pssilu', input_size=size)
        except ValueError as error:
            row['error'] = str(error)
        else:
            row.pop('error', None)
            break
    if 'error' in row:
        return row
    x = torch.rand(1, *size)
    row |= {
        'activations': len(done.replaced) + len(done.left) + len(done.out_of_reach), 'replaced': len(done.replaced),
        'was': dict(Counter(done.replaced.values())), 'left': dict(Counter(done.left.values())),
        'input_size': size, 'out_of_reach': done.out_of_reach}
    out = model(x)
    row['forward'] = bool(torch.isfinite(out).all())
    if row['parameters'] < 30e6:
        out.square().sum().backward()
        row['backward'] = all(p.grad is not None and bool(torch.isfinite(p.grad).all())
                              for p in paf_parameters(model).values())
        del out
        with torch.no_grad():
            row['same_logits_with_itself'] = same_logits(name, x)
    return row


def table(found: dict[str, Any]) -> str:
    """For the README: how many families, and those with activations out of reach."""
    rows = found['families']
    ok = {family: row for family, row in rows.items() if 'error' not in row}
    whole = [family for family, row in ok.items() if not row['left'] and not row['out_of_reach']]
    gates = [family for family, row in ok.items() if row['left'] and not row['out_of_reach']]
    rest = {family: row for family, row in ok.items() if row['out_of_reach']}
    lines = [
        f'timm {found["versions"]["timm"]}, the smallest model of each of {len(rows)} families: '
        f'{sum(row["replaced"] for row in ok.values()):,} of {sum(row["activations"] for row in ok.values()):,} '
        'activations replaced.', '',
        '| families | | activations | replaced | left in gates | out of reach |', '|---|---|---|---|---|---|']

    def line(name: str, count: str, some: list[dict[str, Any]]) -> str:
        left = sum(sum(row['left'].values()) for row in some)
        beyond = sum(len(row['out_of_reach']) for row in some)
        return (f'| {name} | {count} | {sum(row["activations"] for row in some):,} | '
                f'{sum(row["replaced"] for row in some):,} | {left:,} | {beyond:,} |')

    lines += [line('every activation replaced', str(len(whole)), [ok[f] for f in whole]),
              line('every one but those in gates', str(len(gates)), [ok[f] for f in gates])]
    for family, row in rest.items():
        lines.append(line(f'{family} (`{row["model"]}`)', '; '.join(kinds(row['out_of_reach'])), [row]))
    models = {name: tuple(what) for row in rows.values()
              for name, what in row.get('models_with_something_out_of_reach', {}).items()}
    unknown = sum(len(row.get('models_not_looked_at', ())) for row in rows.values())
    total = sum(row.get('models', 0) for row in rows.values())
    listed = '; '.join(f'{", ".join(f"`{name}`" for name in models if models[name] == what)} ({", ".join(what)})'
                       for what in sorted(set(models.values())))
    lines += ['', f'Of all {total:,} models, {len(models)} have something out of reach'
              + (f' ({unknown} could not be looked at)' if unknown else '') + f': {listed}.']
    bad = [f'{family} ({row["error"]})' for family, row in rows.items() if 'error' in row]
    return '\n'.join([*lines, *(['', f'Not converted: {"; ".join(bad)}.'] if bad else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--output', type=Path, help='JSON file to write')
    parser.add_argument('--families', nargs='*', help='default: all; else these in --output are measured again')
    parser.add_argument('--table', type=Path, help='print the table of such a file')
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    warnings.simplefilter('ignore')
    about, rows, started = environment(), {}, time.monotonic()
    again: dict[str, Any] = {}
    if args.families and args.output and args.output.exists():  # the others stay
        before = json.loads(args.output.read_text())
        if before['versions'] != about['versions']:
            parser.error(f'{args.output} is of other versions; expected a survey of all families')
        again = {key: about[key] for key in ('git_commit', 'command')}  # of the rows measured now
        rows, about = before['families'], {key: before[key] for key in about}
        started -= before['seconds']
    for family in args.families or sorted(set(timm.list_modules()) - OURS):
        begun = time.monotonic()
        try:
            rows[family] = survey(family)
        except Exception as error:  # of somebody else's model; it is what the survey wants to know
            if isinstance(error, ImportError | NameError) or is_of_machine(error):
                raise
            rows[family] = {'error': f'{type(error).__name__}: {" ".join(str(error).split())}'[:300]}
        rows[family] |= again
        gc.collect()
        if args.output:  # after each, for it takes long
            write_json(args.output, {**about, 'seconds': round(time.monotonic() - started),
                                     'families': dict(sorted(rows.items()))})
        print(f'{family} {time.monotonic() - begun:.1f} s {rows[family]}', flush=True)


if __name__ == '__main__':
    main()
