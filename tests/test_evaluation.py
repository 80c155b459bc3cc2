"""Verdicts against counts by hand and against AutoAttack's own loop."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

import timm_paf  # noqa: F401
from timm_paf import evaluation
from timm_paf.attacks import ThreatModel, frozen_view, pgd
from timm_paf.data import derive_seed, load_dataset, to_float
from timm_paf.evaluation import AUTOATTACK, evaluate
from timm_paf.robustbench import load_bundle
from timm_paf.speed import AnyBatch


class Scaled(nn.Module):
    """A small network on 8 x 8 images whose logits another function changes."""

    def __init__(self, change: object = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.SiLU(), nn.Flatten(), nn.Linear(72, 10))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return self.change(logits) if self.change else logits  # type: ignore[operator]


@pytest.fixture(scope='module')
def images() -> Tensor:
    return torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module')
def labels(images: Tensor) -> Tensor:
    """Those of the network but for two images, which are wrong without an attack."""
    labels = Scaled()(images).argmax(1)
    labels[[2, 7]] = (labels[[2, 7]] + 1) % 10
    return labels


THREAT = ThreatModel('Linf', Fraction(4, 255))


def test_counts_are_those_by_hand(images: Tensor, labels: Tensor) -> None:
    model, seen = Scaled().eval(), []
    found = evaluate(model, images, labels, THREAT, ['clean', 'pgd-3'], batch_size=5, seed=3,
                     progress=lambda *row: seen.append(row))
    assert found['clean']['verdicts'] == '110111101111'
    assert (found['clean']['n'], found['clean']['correct'], found['clean']['accuracy']) == (12, 10, 10 / 12)
    right = []
    for start in (0, 5, 10):
        x0, y = images[start:start + 5], labels[start:start + 5]
        generator = torch.Generator().manual_seed(derive_seed(3, start, 1))
        x = pgd(model, x0, y, ThreatModel('Linf', THREAT.eps, THREAT.step, 3), generator)
        right += ((model(x).argmax(1) == y) & (model(x0).argmax(1) == y)).tolist()
    assert found['pgd-3']['verdicts'] == ''.join(str(int(v)) for v in right)
    assert seen[-1] == ('pgd-3', 12, sum(right), 12)


@pytest.mark.parametrize('norm', ['Linf', pytest.param('L2', marks=pytest.mark.slow)])
def test_autoattack_is_the_package_s_own(images: Tensor, labels: Tensor, norm: str) -> None:
    """The parts one by one give the adversarial images that its standard version gives in one call."""
    from autoattack import AutoAttack
    model = Scaled().eval()
    threat = ThreatModel(norm, Fraction(6, 255) if norm == 'Linf' else Fraction(1, 4))
    found = evaluate(model, images, labels, threat, ['autoattack'], batch_size=12, seed=5)['autoattack']
    attack = AutoAttack(model, norm=norm, eps=float(threat.eps), seed=derive_seed(5, 0) % 2**31, device='cpu',
                        verbose=False)
    x = attack.run_standard_evaluation(images, labels, bs=12)
    right = model(x).argmax(1) == labels
    assert found['verdicts'] == ''.join(str(int(v)) for v in right)
    assert 0 < found['correct'] < 10  # some fall and some stand, or the comparison would say little
    after = [found['after'][part] for part in AUTOATTACK]
    assert after == sorted(after, reverse=True)
    assert after[-1] == found['accuracy']


def test_autoattack_s_warnings_are_kept(images: Tensor, labels: Tensor) -> None:
    bad = Scaled(lambda z: z.softmax(1).round(decimals=2)).eval()
    flags = evaluate(bad, images[:2], labels[:2], THREAT, ['autoattack'])['autoattack']['flags']
    assert any('zero gradient' in flag for flag in flags)
    assert len(flags) == len(set(flags))


def test_verdicts_do_not_depend_on_later_images(images: Tensor, labels: Tensor) -> None:
    model = Scaled().eval()
    few = evaluate(model, images[:8], labels[:8], THREAT, ['pgd-3'], batch_size=4)
    many = evaluate(model, images, labels, THREAT, ['pgd-3'], batch_size=4)
    assert many['pgd-3']['verdicts'].startswith(few['pgd-3']['verdicts'])


def test_unknown_attacks_are_named(images: Tensor, labels: Tensor) -> None:
    for name in ('pgd', 'pgd-0', 'fgsm', ''):
        with pytest.raises(ValueError, match='expected clean, autoattack or pgd-N'):
            evaluate(Scaled(), images, labels, THREAT, [name])


def test_an_attack_that_breaks_its_budget_is_an_error(
        images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    for broken in (lambda m, x0, *rest: (x0 + 5 / 255).clamp(0, 1), lambda m, x0, *rest: x0 - 4 / 255):
        monkeypatch.setattr(evaluation, 'pgd', broken)
        with pytest.raises(ValueError, match=r'pgd-2 gave images in .* expected \[0, 1\] and at most 4/255'):
            evaluate(Scaled(), images, labels, THREAT, ['pgd-2'])


@pytest.mark.parametrize(('attacks', 'n'), [
    (['clean', 'pgd-20'], 128), pytest.param(['autoattack'], 32, marks=pytest.mark.slow)])
def test_a_compiled_model_has_the_verdicts_of_the_eager_one(cifar10_root: Path, attacks: list[str], n: int) -> None:
    """Of a trained network on real images, whose logits may be near to each other."""
    data = load_dataset('cifar10', cifar10_root, train=False)
    x, y = to_float(data.images[:n]), data.labels[:n]
    view = frozen_view(load_bundle(ROOT / 'hub' / 'models' / 'wrn10_1_pssilu').to(memory_format=torch.channels_last))
    eager, compiled = (evaluate(model, x, y, ThreatModel(), attacks, batch_size=32) for model in (view, AnyBatch(view)))
    for attack in attacks:
        assert compiled[attack]['verdicts'] == eager[attack]['verdicts']
        assert 0 < compiled[attack]['correct'] < n
