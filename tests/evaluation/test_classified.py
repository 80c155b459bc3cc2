"""What a network answers is looked at before a number is made of it, and networks of few classes are attacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from timm_paf import ThreatModel, evaluate

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
    (lambda x: torch.zeros(1, 3), r'gives \(1, 3\) for 4 images; expected logits \(4, classes\)'),
    (lambda x: torch.zeros(len(x)), r'gives \(4,\) for 4 images'),
    (lambda x: (torch.zeros(len(x), 3), None), 'gives a tuple for 4 images'),
    (lambda x: {'logits': torch.zeros(len(x), 3)}, 'gives a dict for 4 images'),
    (lambda x: torch.zeros(len(x), 2), 'the largest label is 2 and the network has 2 classes')])
def test_answers_that_are_no_logits_are_named(answer: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f'^[^\n]*{message}[^\n]*$'):
        evaluate(Answers(answer), X, Y, '8/255', 'clean')


@pytest.mark.parametrize(('images', 'labels', 'message'), [
    ((255 * X).byte(), Y, 'images are torch.uint8'), (255 * X, Y, r'images span .* expected \[0, 1\]'),
    (X - 0.5, Y, 'images span'), (X[:0], Y[:0], 'n at least 1'), (X[0], Y[:3], 'expected float32'),
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
        if standing:
            assert [flag for flag in found['flags'] if 'was not run' in flag] == (
                [f'apgd-t was not run: its loss compares 4 classes and the network has {classes}'] * (classes < 4))


@pytest.mark.slow
@pytest.mark.parametrize('norm', ['L2', 'L1'])
def test_autoattack_plus_on_two_classes(norm: str) -> None:
    network = linear(2)
    y = network(X).argmax(1)
    found = evaluate(network, X, y, ThreatModel(norm, eps='1/1000'), 'autoattack-plus')['autoattack-plus']
    assert found['n'] == 4
    assert {flag.split()[0] for flag in found['flags'] if 'was not run' in flag} == {'apgd-dlr', 'apgd-t'}
