"""The network in the package and its twin with ReLU, and pairs that were trained as long: their records and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from timm_paf.files import read_json
from timm_paf.weights.zoo import weights_of

from .chosen_images import in_words
from .quickstart import EMBEDDED
from .record_check import read_evaluation
from .study.convergence import CONVERGENCE, STRONGEST
from .study.records import RESULTS, Record, attacked_otherwise, finished, records_of
from .wording import down, label, markdown

TWIN = RESULTS / 'twin' / 'resnet18_w16_relu'
"""The network of the package with ReLU in place of PSSiLU: same recipe, seed and images."""
LATER = {act: TWIN.with_name('images_1000_1999') / name for act, name in (('PSSiLU', EMBEDDED), ('ReLU', TWIN.name))}
"""The evaluations of the two on a second thousand of the test images, which was looked at once."""


def bundle_of_embedded() -> Path:
    """Returns the bundle of the network that the package brings.

    Raises:
        ValueError: if there is none.
    """
    bundle = next((w.bundle for w in weights_of(EMBEDDED) if w.bundle), None)
    if bundle is None:
        raise ValueError(f'hub/models has no {EMBEDDED}')
    return bundle


class Twins:
    """The records of the network in the package and of its twin with ReLU.

    Args:
        evaluations: the directories of their evaluations by activation; default: those beside the records of training.

    Attributes:
        networks: the records of the training and of the evaluation, by activation.
        epochs: number of epochs of the training.
        images: the test images of the evaluation, in words.

    Raises:
        ValueError: if the two differ in more than the activation, or were not attacked alike.
    """

    def __init__(self, evaluations: Mapping[str, Path] | None = None) -> None:
        runs = {'PSSiLU': bundle_of_embedded(), 'ReLU': TWIN}
        self.networks = {
            name: (read_json(directory / 'run.json'), finished((evaluations or runs)[name] / 'evaluation.json'))
            for name, directory in runs.items()}
        (run, found), (other_run, other) = self.networks.values()
        unlike = [key for key in run['recipe'] if key != 'model' and run['recipe'][key] != other_run['recipe'].get(key)]
        unlike += [key for key in ('data', 'steps', 'processes', 'weights') if run[key] != other_run[key]]
        unlike += attacked_otherwise(found, other)
        if other_run['architecture'] != EMBEDDED.replace('pssilu', 'relu'):
            unlike.append('architecture')
        for name, directory in runs.items() if evaluations else ():
            if self.networks[name][1]['weights_sha256'] != read_evaluation(
                    directory / 'evaluation.json')['weights_sha256']:
                unlike.append(f'weights of {name}')
        if unlike or list(found['attacks']) != list(other['attacks']):
            raise ValueError(f'{TWIN} is no twin of {EMBEDDED}: other {", ".join(unlike) or "attacks"}')
        self.epochs, self.images = run['recipe']['epochs'], in_words(found['images'])

    def result(self, name: str, attack: str) -> dict[str, Any]:
        """Returns the result of an attack on one of the two networks."""
        return self.networks[name][1]['attacks'][attack]

    def accuracies(self, attack: str) -> list[float]:
        """Returns the accuracies in percent under an attack, rounded down."""
        return [down(100 * self.result(name, attack)['accuracy']) for name in self.networks]

    def mcnemar(self, attack: str) -> tuple[int, int, float]:
        """Returns `mcnemar` of the verdicts under an attack."""
        return mcnemar(*(self.result(name, attack)['verdicts'] for name in self.networks))


def twins() -> str:
    """Returns the table of the two networks, attack by attack, on the first test images and on later ones."""
    return _table({found.images: [evaluation for _, evaluation in found.networks.values()]
                   for found in (Twins(), Twins(LATER))})


def strongest() -> str:
    """Returns the same table of part 4 of the study at convergence, as far as both networks of a pair are there."""
    pairs: dict[str, dict[str, Record]] = {}
    for record in records_of(CONVERGENCE):
        if record.case.network.startswith(STRONGEST):
            title = f'{record.run["architecture"].rpartition("_")[0]}, seed {record.case.seed}'
            pairs.setdefault(title, {})[record.act] = record
    both = {name: [pair[act] for act in ('pssilu', 'relu')] for name, pair in pairs.items() if len(pair) == 2}
    for ours, theirs in both.values():
        ours.refuse_other_attack(theirs)
    return _table({name: [record.evaluation for record in pair] for name, pair in both.items()})


def _table(pairs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Returns the table of pairs of evaluations, PSSiLU's first, by title."""
    rows = []
    for title, pair in pairs.items():
        if len({tuple(each['attacks']) for each in pair}) > 1:
            raise ValueError(f'the two of {title} have {" and ".join(",".join(each["attacks"]) for each in pair)}; '
                             'expected the same attacks')
        for attack in pair[0]['attacks']:
            found = [each['attacks'][attack] for each in pair]
            gained, lost, p = mcnemar(*(each['verdicts'] for each in found))
            rows.append((title, label(attack), *(f'{down(100 * each["accuracy"]):.1f}' for each in found),
                         f'{gained} and {lost}', f'{p:.1g}'))
    return markdown(('', 'attack', 'PSSiLU %', 'ReLU %', 'only one right', 'p'), rows)


def mcnemar(ours: str, theirs: str) -> tuple[int, int, float]:
    """Returns how many images only ours and only theirs have right, and McNemar's exact p over them.

    https://doi.org/10.1007/BF02295996

    Args:
        ours, theirs: verdicts on the same images, '1' where right.
    """
    pairs = list(zip(ours, theirs, strict=True))
    gained, lost = pairs.count(('1', '0')), pairs.count(('0', '1'))
    return gained, lost, float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
