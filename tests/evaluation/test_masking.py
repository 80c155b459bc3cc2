"""A network that was trained as usual passes; networks whose gradients say nothing are called out."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_paf.attacks import ThreatModel, pgd
from timm_paf.data import load_dataset, to_float
from timm_paf.evaluation import check_attacks, evaluate
from timm_paf.evaluation.bpda import flat_operations
from timm_paf.evaluation.classified import same_again
from timm_paf.evaluation.masking import masking_attacks, masking_report
from timm_paf.plots import plot_masking

THREAT = ThreatModel('Linf', Fraction(16, 255))


@pytest.fixture(scope='module')
def data() -> tuple[Tensor, Tensor]:
    test = load_dataset('digits', None, train=False)
    return to_float(test.images[:64]), test.labels[:64]


def trained(seed: int, attack: ThreatModel | None) -> nn.Module:
    torch.manual_seed(seed)
    train = load_dataset('digits', None, train=True)
    images, labels = to_float(train.images), train.labels
    model = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 16, 3, 2), nn.SiLU(), nn.Conv2d(16, 32, 3), nn.SiLU(),
                          nn.Flatten(), nn.Linear(800, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        rows = torch.randint(len(images), (128,))
        x, y = images[rows], labels[rows]
        if attack is not None:
            x = pgd(model, x, y, attack)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope='module')
def robust() -> nn.Module:
    return trained(0, ThreatModel('Linf', THREAT.eps, Fraction(8, 255), 3))


@pytest.fixture(scope='module')
def plain() -> nn.Module:
    return trained(1, None)


class Changed(nn.Module):
    """A network whose logits go through something else."""

    def __init__(self, model: nn.Module, change: Any) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.model(x))


def report(model: nn.Module, data: tuple[Tensor, Tensor], source: nn.Module | None) -> dict[str, Any]:
    attacks = masking_attacks(THREAT, [] if source is None else [''], bool(flat_operations(model, data[0])))
    results = evaluate(model, *data, THREAT, attacks, batch_size=64, source=source)
    return masking_report(results, THREAT, same_again(model, data[0]))


def test_a_trained_network_passes(
        robust: nn.Module, plain: nn.Module, data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    found = report(robust, data, plain)
    assert found['verdict'] == 'no sign of gradient masking', found['reasons']
    assert found['passed']
    assert [eps for eps, _ in found['eps']] == ['0', '8/255', '16/255', '32/255', '64/255', '128/255', '1']
    assert found['eps'][0][1] > 0.85
    assert 0.3 < found['eps'][2][1] <= found['transfer']
    assert found['eps'][-1][1] == 0
    assert found['bpda'] is None
    assert found['transfers'] == {'': found['transfer']}
    plot_masking(found, 'Linf', tmp_path / 'masking.png')
    assert (tmp_path / 'masking.png').read_bytes().startswith(b'\x89PNG')


def test_a_plainly_trained_network_is_not_robust_but_not_masked(plain: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    found = report(plain, data, None)
    assert found['passed'], found['reasons']
    assert found['eps'][2][1] < 0.6
    assert found['transfer'] is None


def test_a_network_that_rounds_its_images_is_as_robust_as_the_one_behind(
        robust: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = robust

        def forward(self, x: Tensor) -> Tensor:
            return self.model((255 * x).round() / 255)  # so fine that the network is the same

    rounded, base = (evaluate(network, *data, THREAT, attacks, batch_size=64) for network, attacks in (
        (Rounded(), 'clean,pgd-20,bpda-pgd-20'), (robust, 'clean,pgd-20')))
    accuracy = base['pgd-20']['accuracy']
    assert rounded['clean']['accuracy'] == base['clean']['accuracy']
    assert rounded['pgd-20']['accuracy'] > accuracy + 0.1  # a false one
    assert abs(rounded['bpda-pgd-20']['accuracy'] - accuracy) < 0.02
    assert flat_operations(Rounded(), data[0]) == ['round']
    assert 'bpda-pgd-20' in masking_attacks(THREAT, flat=True)


def test_transfer_attacks_on_several_networks_have_their_names(
        robust: nn.Module, plain: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    names = masking_attacks(THREAT, ['', 'a_1.b'])
    assert names[-2:] == ['transfer-pgd-20', 'transfer-a_1.b-pgd-20']
    both = evaluate(robust, *data, THREAT, names[-2:], source={'': plain, 'a_1.b': robust})
    for name, source in zip(names[-2:], (plain, robust)):
        alone = evaluate(robust, *data, THREAT, 'transfer-pgd-20', source=source)['transfer-pgd-20']
        assert both[name]['verdicts'] == alone['verdicts']
    with pytest.raises(ValueError, match='transfer-c-pgd-20 needs the network that it is made on'):
        evaluate(robust, *data, THREAT, 'transfer-c-pgd-20', source={'': plain})


@pytest.mark.parametrize(('change', 'reason'), [
    (lambda z: z.mul(2).round(), 'are right even at eps 1'),  # a quantiser, which has no gradient
    (lambda z: 1e3 * z, 'images made on another network leave'),  # so sharp a softmax that the gradient is 0
    (lambda z: z + 0.5 * torch.randn_like(z), 'other logits the second time'),
], ids=['quantised', 'saturated', 'random'])
def test_masked_gradients_are_called_out(
        robust: nn.Module, plain: nn.Module, data: tuple[Tensor, Tensor], change: Any, reason: str) -> None:
    found = report(Changed(plain if reason.startswith('images made') else robust, change), data,
                   plain if reason.startswith('images made') else None)
    assert not found['passed']
    assert found['verdict'].startswith('signs of gradient masking: ')
    assert '\n' not in found['verdict']
    assert reason in found['verdict'], found['verdict']


def made_up(**changes: float) -> dict[str, Any]:
    """Results of a network without masking, but for these."""
    accuracy = dict(zip(masking_attacks(THREAT, ['', 'b'], True), (
        0.9, 0.8, 0.6, 0.55, 0.54, 0.53, 0.7, 0.2, 0.05, 0.0, 0.0, 0.53, 0.54, 0.8, 0.7)))
    return {name: {'n': 200, 'accuracy': value} for name, value in (accuracy | changes).items()}


@pytest.mark.parametrize(('changes', 'reason'), [
    ({}, None),
    ({'pgd-50': 0.58}, 'steps 50 leaves 58.0% right where steps 20 leaves 54.0%'),
    ({'pgd-50': 0.55}, None),
    ({'pgd-20@32/255': 0.6}, 'eps 32/255 leaves 60.0% right where eps 16/255 leaves 54.0%'),
    ({'pgd-20@1': 0.02}, '2.0% are right even at eps 1'),
    ({'pgd-20x10': 0.45}, '10 starts leave 45.0% right where one leaves 54.0%'),
    ({'transfer-pgd-20': 0.4}, 'images made on another network leave 40.0% right, those made on this one 54.0%'),
    ({'transfer-pgd-20': 0.535}, None),
    ({'transfer-b-pgd-20': 0.4}, 'images made on b leave 40.0% right, those made on this one 54.0%'),
    ({'bpda-pgd-20': 0.5}, 'the identity in place of flat operations leaves 50.0% right, their own gradient 54.0%'),
    ({'bpda-pgd-20': 0.6}, None),
])
def test_each_sign_is_a_reason(changes: dict[str, float], reason: str | None) -> None:
    found = masking_report(made_up(**changes), THREAT, True)
    assert found['reasons'] == ([] if reason is None else [reason])
    assert found['passed'] == (reason is None)


def test_a_network_that_is_never_right_is_not_judged(tmp_path: Path) -> None:
    found = masking_report({name: {'n': 8, 'accuracy': 0.0} for name in made_up()}, THREAT, True)
    assert (found['passed'], found['verdict']) == (False, 'not judged: 0 of 8 images are right')
    plot_masking(found, 'Linf', tmp_path / 'masking.png')


def test_the_picture_of_all_checks(tmp_path: Path) -> None:
    plot_masking(masking_report(made_up(), THREAT, True), 'Linf', tmp_path / 'masking.png')
    assert (tmp_path / 'masking.png').read_bytes().startswith(b'\x89PNG')


def test_flags_and_randomness_are_reasons() -> None:
    found = masking_report(made_up(), THREAT, False, ['zero gradient'])
    assert found['reasons'] == ['AutoAttack warned: zero gradient', 'the same images get other logits the second time']


@pytest.mark.parametrize('norm', ['Linf', 'L2', 'L1'])
def test_the_attacks_have_names_that_are_known(norm: str) -> None:
    names = masking_attacks(ThreatModel(norm, Fraction(1, 2)), ['', 'resnet18_w16_pssilu'], True)
    check_attacks(names)
    assert ('pgd-20@16' in names) == (norm != 'Linf')
    with pytest.raises(ValueError, match='eps is 0'):
        masking_attacks(ThreatModel(norm, Fraction(0)))
