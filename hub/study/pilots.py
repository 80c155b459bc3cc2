"""The tables of what was tried for a few minutes or epochs, to choose what is worth more."""

from __future__ import annotations

from pathlib import Path

from timm_paf.files import read_json
from timm_paf.objectives import ONE_STEP

from ..wording import down, label, markdown, plural
from .records import RESULTS, Record, attacks_of, last_line, records_of
from .tables import accuracy, difference, machine_time, seeds_in_words

PILOTS, RECIPES = RESULTS / 'pilots', RESULTS / 'recipes'
RECIPE_ARMS = {'pgd': '', 'pgd_ema_ls': 'pgd', 'n_fgsm': 'pgd', 'trades': '', 'ikl': 'trades'}
"""The arms of the pilot of recipes, and what its protocol compares each with."""
APART = 'not_compared/'
"""Networks in bfloat16 whose other side was lost before it was attacked: by the protocol they enter no comparison."""


def pilots_table() -> str:
    """Returns the table of what was tried before the embedded network was trained, on held-out training images."""
    rows = []
    for path in PILOTS.glob('*/run.json'):
        run, last = read_json(path), last_line(path.with_name('metrics.jsonl'))
        recipe = run['recipe']
        steps = '' if recipe['objective'] in ONE_STEP else f', {plural(recipe["threat"]["steps"], "step")}'
        rows.append((last['val_adv_accuracy'], (
            run['architecture'], f'{recipe["objective"]}{steps}', f'{run["seconds"] / 60:.1f}',
            f'{run["steps"] * recipe["batch_size"]:,}', f'{recipe["val"]:,}',
            *(f'{down(100 * last[f"val_{kind}_accuracy"]):.1f}' for kind in ('clean', 'adv')))))
    return markdown(('network', 'objective', 'minutes', 'images trained on', 'images held out', 'clean %',
                     'under attack %'), [row for _, row in sorted(rows, reverse=True)])


def recipes_table() -> str:
    """Returns the table of the pilot of recipes, each arm beside the one that its protocol compares it with."""
    every = records_of(RECIPES)
    found = [r for r in every if not r.case.name.startswith(APART)]
    groups = {arm: group for arm in RECIPE_ARMS if (group := sorted(
        (r for r in found if Path(r.case.network).name == arm), key=lambda r: r.case.seed))}
    if not groups:
        return 'No arm of it is evaluated yet.'
    attacks = attacks_of(found)
    rows = []
    for arm, group in groups.items():
        base = RECIPE_ARMS[arm]
        theirs = {r.case.seed: r for r in groups.get(base, ())}
        for record in group:
            other = theirs.get(record.case.seed, record)
            if _made_on(record) != _made_on(other):
                raise ValueError(f'{record.case.name} is of {_made_on(record)} and {other.case.name} of '
                                 f'{_made_on(other)}; expected one machine and precision, as the protocol has it')
        compared = difference(group, groups.get(base, ()), 'pgd-50')
        rows.append((arm, ', '.join(f'{r.case.seed} {_precision(r)}' for r in group),
                     *(accuracy(group, attack) for attack in attacks),
                     f'{base}: {compared}' if compared else ''))
    return (f'{markdown(("arm", "seeds", *(f"{label(a)} %" for a in attacks), "PGD-50 minus"), rows)}\n\n'
            f'Mean over the seeds (least to most). {seeds_in_words(groups, attacks)}. {machine_time(every)}')


def _made_on(record: Record) -> str:
    """Returns on what kind of machine and in which precision a network was trained and attacked."""
    return ' and '.join('a GPU' if 'gpu' in each['hardware'] else 'a CPU' for each in (record.run, record.evaluation)
                        ) + f' in {_precision(record)}'


def _precision(record: Record) -> str:
    found: str = record.run['recipe']['mixed_precision']
    return 'float32' if found == 'no' else found
