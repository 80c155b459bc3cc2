"""The cells of tables of a study's networks, and the table that compares them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

import torch

from ..wording import down, ends, label, markdown, plural
from .records import Record, attacked_otherwise, attacks_of, by_seed, grouped


def named(variant: str) -> str:
    """Returns the name of a variant for the tables."""
    return variant.replace('_free', ', no penalty').replace('_curvature8', ', from curvature 8')


def learned(found: Sequence[Record]) -> str:
    """Returns what the parameters of the activation are at the end: mean, least and most over the seeds."""
    values = {name: [r.learned[name] for r in found] for name in found[0].learned}
    return ', '.join(f'{name} {mean(each):.2g}{ends(each, ".2g")}' for name, each in values.items())


def second_derivative(found: Sequence[Record]) -> str:
    """Returns the largest second derivative of the activation: mean, least and most over the seeds."""
    values = [r.curvature for r in found]
    return 'kink' if math.inf in values else f'{mean(values):.2g}{ends(sorted(set(values)), ".2g")}'


def accuracy(found: Sequence[Record], attack: str) -> str:
    """Returns the accuracy in percent: mean, least and most over the seeds."""
    values = [v.mean().item() for v in by_seed(found, attack).values()]
    return f'{down(mean(values)):.1f}{ends([down(value) for value in values])}' if values else ''


def pairs_of(found: Sequence[Record], base: Sequence[Record], attack: str) -> dict[int, torch.Tensor]:
    """Returns by seed and image, where both have the attack, the points that a network has and the base has not."""
    ours, theirs = by_seed(found, attack), by_seed(base, attack)
    both = [r for r in (*found, *base) if r.case.seed in ours.keys() & theirs.keys()]
    for record in both:
        record.refuse_other_attack(both[0])
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def difference(found: Sequence[Record], base: Sequence[Record], attack: str) -> str:
    """Returns the difference to another network by seed, in points: over seeds, ± twice the standard error over the
    images. Seeds are named where the other network lacks some of this one's."""
    by = pairs_of(found, base, attack)
    if found is base or not by:
        return ''
    seeds, images = [pair.mean().item() for pair in by.values()], torch.stack([*by.values()]).mean(0)
    error = images.std().item() / math.sqrt(len(images))
    which = '' if [*by] == [*by_seed(found, attack)] else f', seed {", ".join(map(str, by))}'
    return f'{mean(seeds):+.1f}{ends(seeds, "+.1f")} ± {2 * error:.1f}{which}'


def seeds_in_words(groups: Mapping[str, Sequence[Record]], attacks: Sequence[str]) -> str:
    """Returns with which seeds each attack was made, on most networks and on those where it is otherwise."""
    said = []
    for attack in attacks:
        seeds = {network: ', '.join(map(str, sorted(by_seed(group, attack)))) for network, group in groups.items()}
        sets = {found: [named(network) for network in seeds if seeds[network] == found] for found in seeds.values()}
        usual = max(filter(None, sets), key=lambda found: len(sets[found]))
        said.append(f'{label(attack)}: seed {usual}' + ''.join(
            f' ({found or "none"} of {", ".join(networks)})' for found, networks in sets.items() if found != usual))
    return '; '.join(said)


def machine_time(found: Sequence[Record], of: Sequence[str] = ('training', 'attacks')) -> str:
    """Returns how many hours of GPUs and of CPU cores networks took, in training and under attack, in a sentence.

    The hours are elapsed ones: other work beside a network makes them longer.

    Args:
        of: what is counted.
    """
    def hours(record: Mapping[str, Any]) -> Iterator[tuple[bool, float]]:
        earlier = record.get('earlier') or ()
        last = {**record, 'seconds': record['seconds'] - sum(each['seconds'] for each in earlier)}
        for each in (*earlier, last):
            hardware = each['hardware']
            on_gpu = 'gpu' in hardware
            # An evaluation has the seconds of all its processes together.
            at_once = each['processes'] if 'recipe' in record else 1
            yield on_gpu, each['seconds'] * at_once * (1 if on_gpu else hardware['threads']) / 3600

    said = []
    for what in of:
        spent = [each for r in found for each in hours(r.run if what == 'training' else r.evaluation)]
        said.append(f'{what} ' + ' and '.join(
            f'{sum(h for g, h in spent if g is gpu):.1f} hours of {name}' for gpu, name in (
                (True, 'a GPU'), (False, 'a CPU core')) if any(g is gpu for g, _ in spent)))
    return f'Machine time of {plural(len(found), "network")}, as elapsed: {", ".join(said)}.'


def compared(found: Sequence[Record], base: str) -> str:
    """Returns the table of a study's networks, in its order, each beside the base with the same seed.

    A difference is only of the same images and threat model; what networks were attacked on is said where it differs.
    """
    groups = grouped(found)
    attacks = attacks_of(found)
    relative = [attack for attack in attacks if attack != 'clean' and base in groups]
    various = len({r.attacked_on for r in found}) > 1
    rows = []
    for network, group in groups.items():
        beside = [r for r in groups.get(base, ()) if r.case.seed in {ours.case.seed for ours in group}]
        alike = network != base and not any(
            attacked_otherwise(group[0].evaluation, r.evaluation) for r in (*group, *beside))
        rows.append((
            network, ', '.join(str(r.case.seed) for r in group), f'{mean(r.minutes for r in group):.1f}',
            *(['; '.join(dict.fromkeys(r.attacked_on[0] for r in group))] if various else ()),
            *(accuracy(group, attack) for attack in attacks),
            *(difference(group, groups[base], attack) if alike else '' for attack in relative)))
    return markdown(
        ('network', 'seeds', 'minutes', *(['attacked on'] if various else ()), *(f'{label(a)} %' for a in attacks),
         *(f'{label(attack)} minus {base}' for attack in relative)), rows)
