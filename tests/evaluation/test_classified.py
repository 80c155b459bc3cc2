"""What a network answers is looked at before a number is made of it, and networks of few classes are attacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from timm_paf import ThreatModel, evaluate
from timm_paf.evaluation import AUTOATTACK, parts_of
from timm_paf.evaluation.autoattack import targets_of

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 1])


class Answers(nn.Module):
    """Gives what a function makes of the images."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(x)


def linear(classes: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, classes)).eval()


@pytest.mark.parametrize(('answer', 'message'), [
    (lambda x: torch.full((len(x), 3), torch.nan), '4 of 4 clean images are not finite'),
    (lambda x: torch.tensor([[0.0, torch.inf, 1.0]]).expand(len(x), 3), '4 of 4 clean images are not finite'),
    (lambda x: torch.zeros(1, 3), r'gives torch.float32 \(1, 3\) for 4 images; expected logits, floats \(4, classes\)'),
    (lambda x: torch.zeros(len(x)), r'gives torch.float32 \(4,\) for 4 images'),
    (lambda x: torch.zeros(len(x), 3, dtype=torch.long), 'gives torch.int64'),
    (lambda x: torch.zeros(len(x), 1), 'has one class; expected at least two'),
    (lambda x: x.flatten(1) @ torch.zeros(5, 3), r'does not take images \(4, 3, 8, 8\) torch.float32 on cpu: .*mat1'),
    (lambda x: timm.layers.PatchEmbed(16, in_chans=3)(x), r'does not take images .*Input height \(8\) .*16'),
    (lambda x: (torch.zeros(len(x), 3), None), 'gives a tuple for 4 images'),
    (lambda x: {'logits': torch.zeros(len(x), 3)}, 'gives a dict for 4 images'),
    (lambda x: torch.zeros(len(x), 2), 'the largest label is 2 and the network has 2 classes')])
def test_answers_that_are_no_logits_are_named(answer: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f'^[^\n]*{message}[^\n]*$'):
        evaluate(Answers(answer), X, Y, '8/255', 'clean')


@pytest.mark.parametrize('attack', ['pgd-1@300/255', 'pgd-1@-1/255'])
def test_an_eps_that_cannot_be_meant_is_named_before_the_first_attack(attack: str) -> None:
    with pytest.raises(ValueError, match='expected between 0 and 1 for Linf'):
        evaluate(linear(3), X, Y, '8/255', f'pgd-100000,{attack}')


@pytest.mark.parametrize('attack', ['pgd-100000', 'autoattack'])
def test_a_label_of_a_late_batch_is_named_before_the_first_attack(attack: str) -> None:
    with pytest.raises(ValueError, match='the largest label is 5 and the network has 3 classes'):
        evaluate(linear(3), X, torch.tensor([0, 1, 2, 5]), '8/255', attack, batch_size=1)


def test_a_network_without_a_gradient_is_named_and_bpda_attacks_it() -> None:
    network = nn.Sequential(Answers(lambda x: x.detach()), linear(3))
    y = network(X).argmax(1)
    with pytest.raises(ValueError, match=r'no gradient of the logits reaches the images.*bpda-pgd-N'):
        evaluate(network, X, y, '8/255', 'clean,pgd-1')
    found = evaluate(network, X, y, '1', 'clean,bpda-pgd-20')
    assert (found['clean']['correct'], found['bpda-pgd-20']['correct']) == (4, 0)


class OfBatch(nn.Module):
    """A convolution whose BatchNorm has no statistics but those of the batch, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.SiLU(),
                                 nn.Flatten(), nn.Linear(144, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize('network', [
    OfBatch(), nn.Sequential(linear(3), Answers(lambda z: (z - z.mean(0)) / (z.std(0) + 1e-3))),
    nn.Sequential(Answers(lambda x: x.sub(0.5).div(x.sub(0.5).abs().max())), linear(3))],
    ids=['BatchNorm in train mode', 'normalised logits', 'a scale of the batch'])
def test_an_answer_that_depends_on_the_batch_is_named(network: nn.Module) -> None:
    with pytest.raises(ValueError, match=r'^the network answers an image otherwise in another batch; expected [^\n]*$'):
        evaluate(network, X, Y, '8/255', 'clean')


def test_images_attacked_alone_depend_on_no_batch() -> None:
    network = OfBatch()
    y = torch.cat([network(x[None]) for x in X]).argmax(1)
    assert evaluate(network, X, y, '8/255', 'clean', batch_size=1)['clean']['correct'] == 4


class Dropped(nn.Module):
    """A network whose dropout nobody can switch off."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share, self.net = share, linear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(nn.functional.dropout(x, self.share, training=True))


@pytest.mark.parametrize('version', ['autoattack', 'autoattack-plus', 'apgd'])
@pytest.mark.parametrize('network', [Dropped(0.2), nn.Sequential(Answers(lambda x: x + 0.01 * torch.randn_like(x)),
                                                                 linear(3))], ids=['dropout', 'noise'])
def test_a_random_network_is_asked_for_rand(network: nn.Module, version: str) -> None:
    with pytest.raises(ValueError, match=f'is random: .* misleads {version}; expected autoattack-rand'):
        evaluate(network, X, Y, '8/255', f'clean,{version}')


def test_a_random_network_runs_under_rand_and_is_flagged_under_pgd() -> None:
    network = Dropped(0.05)
    found = evaluate(network, X[:2], linear(3)(X[:2]).argmax(1), '8/255', 'clean,pgd-2,autoattack-rand')
    assert list(found['autoattack-rand']['parts']) == ['apgd-ce', 'apgd-dlr']
    for attack in ('clean', 'pgd-2'):
        assert 'the network is random: a verdict is that of one answer' in found[attack]['flags']
    assert [flag for flag in found['pgd-2']['flags'] if 'takes no mean over the answers of a random network' in flag]
    assert 'flags' not in evaluate(linear(3), X, Y, '8/255', 'pgd-2')['pgd-2']


def test_a_random_network_is_asked_once_and_by_autoattack_after_each_part() -> None:
    """AutoAttack asks which images are right, and again after each of its two parts."""
    n, y = 6000, torch.zeros(6000, dtype=torch.long)

    def coin(x: Tensor) -> Tensor:  # right half of the time, whatever the image
        side = 10 * (torch.rand(len(x)) < 0.5).float() - 5
        return torch.stack([side + 1e-3 * x.sum((1, 2, 3)), -side, x.amax((1, 2, 3)) - 20, -20 - side], 1)

    found = evaluate(Answers(coin), torch.rand(n, 1, 1, 1), y, '8/255', 'clean,pgd-2,autoattack-rand', batch_size=n)
    after = found['autoattack-rand']['after']
    for share, expected in ((found['clean']['accuracy'], 1 / 2), (found['pgd-2']['accuracy'], 1 / 2),
                            (after['apgd-ce'], 1 / 4), (after['apgd-dlr'], 1 / 8),
                            (found['autoattack-rand']['accuracy'], 1 / 8)):
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / n) ** 0.5)


def test_an_attack_that_always_succeeds_leaves_nothing_of_a_random_network() -> None:
    def noisy(x: Tensor) -> Tensor:  # of clean images three of ten answers are wrong, of attacked ones all
        right = 100 * (x.mean((1, 2, 3)) - 0.5 + 1e-2) - 10 * (torch.rand(len(x)) < 0.3).float()
        return torch.stack([right, torch.zeros_like(right)], 1)

    found = evaluate(Answers(noisy), torch.full((500, 3, 4, 4), 0.5), torch.zeros(500, dtype=torch.long), '8/255',
                     'clean,pgd-5', batch_size=500)
    assert found['clean']['accuracy'] == pytest.approx(0.7, abs=0.1)
    assert found['pgd-5']['accuracy'] == 0


@pytest.mark.parametrize(('images', 'labels', 'message'), [
    ((255 * X).byte(), Y, 'images are torch.uint8'), (255 * X, Y, r'images span .* expected \[0, 1\]'),
    (X - 0.5, Y, 'images span'), (X[:0], Y[:0], 'n at least 1'), (X[0], Y[:3], 'expected float32'),
    (X.double(), Y, 'images are torch.float64'),
    (X, Y[:1], r'labels are torch.int64 \(1,\); expected int64 \(4,\)'), (X, Y.float(), 'labels are torch.float32'),
    (X, Y - 1, 'smallest label is -1')])
def test_images_and_labels_that_cannot_be_meant_are_named(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f'^[^\n]*{message}[^\n]*$'):
        evaluate(linear(3), images, labels, '8/255', 'clean')


def test_an_attacked_image_without_a_finite_logit_is_fooled() -> None:
    """Its row has no class; argmax would call it class 0."""
    def answer(x: Tensor) -> Tensor:
        logits = torch.stack([x.mean((1, 2, 3)) + 1, *[-x.mean((1, 2, 3))] * 2], 1)
        return torch.where((x != X[:len(x)]).flatten(1).any(1)[:, None], torch.nan, 1.0) * logits

    network, zeros = Answers(answer), torch.zeros(4, dtype=torch.long)
    found = evaluate(network, X, zeros, '8/255', 'clean,pgd-1')
    assert found['clean']['correct'] == 4
    assert found['pgd-1']['correct'] == 0


@pytest.mark.parametrize('classes', [2, pytest.param(3, marks=pytest.mark.slow), 4,
                                     pytest.param(8, marks=pytest.mark.slow)])
def test_autoattack_on_networks_of_few_classes(classes: int) -> None:
    network, x = linear(classes), X[:1]
    y = network(x).argmax(1)
    for eps, standing in (('1/2550000', 1), ('1', 0)):
        found = evaluate(network, x, y, ThreatModel(eps=eps), 'autoattack')['autoattack']
        assert found['correct'] == standing
        assert found['flags'] == []
        assert found.get('not_run') == ({'apgd-t': f'its loss compares 4 classes and the network has {classes}'}
                                        if classes < 4 else None)
        run = [part for part in AUTOATTACK['autoattack'] if classes >= 4 or part != 'apgd-t']
        assert list(found['parts']) == list(found['after']) == run
        assert {part: result['targets'] for part, result in found['parts'].items() if 'targets' in result} == {
            part: classes - 1 for part in run if part.endswith('-t')}


def test_dlr_compares_three_classes_and_nobody_warns_of_that() -> None:
    network = linear(3)
    found = evaluate(network, X[:1], network(X[:1]).argmax(1), '1/2550000', 'autoattack-rand')['autoattack-rand']
    assert (list(found['parts']), found['flags'], 'not_run' in found) == (['apgd-ce', 'apgd-dlr'], [], False)


@pytest.mark.slow
@pytest.mark.parametrize('norm', ['L2', 'L1'])
def test_autoattack_plus_on_two_classes(norm: str) -> None:
    network = linear(2)
    y = network(X).argmax(1)
    found = evaluate(network, X, y, ThreatModel(norm, eps='1/1000'), 'autoattack-plus')['autoattack-plus']
    assert found['n'] == 4
    assert found['not_run'].keys() == {'apgd-dlr', 'apgd-t'}
    assert list(found['parts']) == ['apgd-ce', 'fab', 'square', 'fab-t']


@pytest.mark.parametrize('norm', ['Linf', 'L2', 'L1'])
@pytest.mark.parametrize('version', AUTOATTACK)
def test_targets_are_those_of_the_package_and_at_most_the_wrong_classes(version: str, norm: str) -> None:
    from autoattack import AutoAttack
    theirs = AutoAttack(linear(1000), norm=norm, version=version.partition('-')[2] or 'standard', device='cpu',
                        verbose=False)
    assert tuple(theirs.attacks_to_run)[:len(AUTOATTACK[version])] == AUTOATTACK[version]
    counts = {'apgd-t': theirs.apgd_targeted.n_target_classes, 'fab-t': theirs.fab.n_target_classes}
    for classes in (2, 3, 4, 8, 10, 1000):
        for part in parts_of(version, classes)[:-1]:
            expected = min(counts[part], classes - 1) if part in counts else None
            assert targets_of(version, part, norm, classes) == expected
    assert parts_of(version, 4) == parts_of(version, 1000)
