"""Tables of networks that were evaluated alike: under common corruptions, and in several norms."""

from __future__ import annotations

from timm_paf.data.corrupted import KINDS

from .study.records import RESULTS, finished
from .wording import down, label, markdown

CORRUPTED, NORMS = RESULTS / 'corruptions', RESULTS / 'norms'


def corruptions_of_networks() -> str:
    """Returns the table of networks that were evaluated on corrupted images, which are the same for all.

    Raises:
        ValueError: if the images of one are others.
    """
    found = {path.parent.name: finished(path) for path in sorted(CORRUPTED.glob('*/evaluation.json'))}
    sections = {name: record['corruptions'] for name, record in found.items()}
    if len({section['data_sha256'] for section in sections.values()}) != 1 or not all(
            section['generated'] for section in sections.values()):
        raise ValueError(f'{CORRUPTED} has no records of one set of generated images; expected those')
    rows = []
    for name, section in sections.items():
        by = section['by']
        kinds = [sum(sum(by[each]) / len(by[each]) for each in names) / len(names) for names in KINDS.values()]
        values = (found[name]['attacks']['clean']['accuracy'], section['accuracy'], *kinds)
        rows.append((name, *(f'{down(100 * value):.1f}' for value in values)))
    rows.sort(key=lambda row: -float(row[2]))
    section = next(iter(sections.values()))
    made = ', '.join(f'{package} {version}' for package, version in section['versions'].items())
    return (f'{markdown(("network", "clean %", "corruptions %", *(f"{kind} %" for kind in KINDS)), rows)}\n\n'
            f'Means over the corruptions and severities, on the first {section["n"]:,} test images for each of them, '
            f'which were generated with seed {section["seed"]}; {made}.')


def norms_of_networks() -> str:
    """Returns the table of networks that were attacked in several norms, which are the same for all.

    Raises:
        ValueError: if the norms or the images of one are others.
    """
    found = {path.parent.name: finished(path) for path in sorted(NORMS.glob('*/evaluation.json'))}
    parts = {name: {f'{norm} {part["threat_model"]["eps"]}': part['worst_case'] for norm, part in (
        (record['threat_model']['norm'], record), *record['norms'].items())} for name, record in found.items()}
    about = {(record['images'], *record['attacks'], *parts[name]) for name, record in found.items()}
    if len(about) != 1 or not next(iter(about))[0].startswith('first '):
        raise ValueError(f'{NORMS} has no records of the same norms, attacks and first images; expected those')
    rows = [(name, *(f'{down(100 * result["accuracy"]):.1f}' for result in (
        record['attacks']['clean'], *parts[name].values(), record['union']))) for name, record in found.items()]
    rows.sort(key=lambda row: -float(row[-1]))
    record, columns = next(iter(found.values())), next(iter(parts.values()))
    attacks = ' and '.join(label(attack) for attack in record['attacks'] if attack != 'clean')
    return (f'{markdown(("network", "clean %", *(f"{name} %" for name in columns), "all %"), rows)}\n\n'
            f'The first {record["n"]:,} test images that withstand {attacks}, by norm and eps, and in all norms.')
