"""Flat operations have the gradient of the identity and their own value, also those of RobustBench's MeanSparse."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import Tensor, nn

from timm_paf.data import load_dataset, to_float
from timm_paf.evaluation import evaluate
from timm_paf.evaluation.bpda import BPDA, flat_operations
from timm_paf.robustbench import load_bundle

X = 0.8 * torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(X.shape, generator=torch.Generator().manual_seed(1))


class Applied(nn.Module):
    """A function as a part of a network, so that nothing but its operations tells what it does."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.bound = function, nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(1 * x) * 1


def rounded_in_place(x: Tensor) -> Tensor:
    x.mul_(8).round_().div_(8)
    return x


def cleared(x: Tensor) -> Tensor:
    x[x.abs() < 0.5] = 0
    return x


def masked_in_place(x: Tensor) -> Tensor:
    x *= x > 0.3
    return x


def winners(x: Tensor) -> Tensor:
    """k winners take all, as its authors' code masks."""
    least = x.flatten(1).topk(10)[0][:, -1]
    mask = (x >= least[:, None, None, None]).to(x)
    return mask * x


def by_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy((8 * x.detach().numpy()).round() / 8)


IDENTITIES: dict[str, Callable[[Tensor], Tensor]] = {
    'round': lambda x: torch.round(8 * x) / 8, 'round in place': rounded_in_place,
    'floor': lambda x: (8 * x).floor() / 8, 'ceil': lambda x: x.ceil(), 'trunc': torch.trunc, 'sign': torch.sign,
    'whole division': lambda x: torch.div(x, 0.25, rounding_mode='floor') * 0.25, '//': lambda x: x // 0.25 / 4,
    'where': lambda x: torch.where(x.abs() < 0.5, torch.zeros_like(x), x),
    'x.where': lambda x: x.where(x.abs() > 0.5, torch.tensor(0.0)),
    'masked_fill': lambda x: x.masked_fill(x < 0.2, 0.0), 'mask in place': masked_in_place,
    'mask as an index': cleared, 'bool mask': lambda x: x * (x.abs() > 0.5), 'winners': winners,
    'step': lambda x: (x > 0).float(), 'cast to integers': lambda x: (8 * x).to(torch.int32).float() / 8,
    'hardshrink': nn.Hardshrink(), 'threshold': nn.Threshold(0.2, 0.0),
    'step by where': lambda x: torch.where(x > 0, 0.5, -0.5), 'less': lambda x: 1 - (x < 0.1).type_as(x)}


@pytest.mark.parametrize('name', IDENTITIES)
def test_a_flat_operation_has_its_value_and_the_gradient_of_the_identity(name: str) -> None:
    network = Applied(IDENTITIES[name])
    x = X.clone().requires_grad_()
    out = BPDA(network)(x)
    assert torch.equal(out, network(X))
    torch.testing.assert_close(torch.autograd.grad((out * WEIGHT).sum(), x)[0], WEIGHT)
    assert flat_operations(network, X)
    assert network.bound.requires_grad


@pytest.mark.parametrize('cut', [
    lambda x: x.clamp(-0.5, 0.5), lambda x: torch.clip(x, min=-0.5, max=0.5), lambda x: x.clamp_(-0.5, 0.5),
    lambda x: F.hardtanh(x, -0.5, 0.5), nn.Hardtanh(-0.5, 0.5, inplace=True),
    lambda x: torch.minimum(torch.maximum(x, torch.tensor(-0.5)), torch.tensor(0.5))])
def test_what_is_clipped_has_a_tenth_of_the_gradient_beyond_the_bounds(cut: Callable[[Tensor], Tensor]) -> None:
    x = X.clone().requires_grad_()
    out = BPDA(Applied(cut))(x)
    assert torch.equal(out, X.clamp(-0.5, 0.5))
    expected = torch.where(X.abs() < 0.5, 1.0, 0.1) * WEIGHT
    torch.testing.assert_close(torch.autograd.grad((out * WEIGHT).sum(), x)[0], expected)


def test_a_module_that_another_library_computes_has_the_gradient_of_the_identity() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 3), Applied(by_numpy), nn.Flatten())
    behind = network[0](X).detach()
    x = X.clone().requires_grad_()
    out = BPDA(network)(x)
    assert torch.equal(out, (8 * behind).round().flatten(1) / 8)
    grad = torch.autograd.grad(out.sum(), x)[0]
    straight = X.clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(network[0](straight).sum(), straight)[0])


@pytest.mark.parametrize('name', ['resnet18', 'convnext_atto', 'wrn10_1_pssilu', 'wrn10_1_prelu', 'wrn10_1_reblu'])
def test_a_network_without_flat_operations_keeps_its_gradient_to_the_bit(name: str) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=4).eval().requires_grad_(False)
    x = torch.rand(2, 3, 32, 32).requires_grad_()
    logits, expected = BPDA(network)(x), network(x)
    assert torch.equal(logits, expected)
    assert torch.equal(*(torch.autograd.grad(each[:, 1].sum(), x)[0] for each in (logits, expected)))
    assert flat_operations(network, x) == []


class StraightThrough(nn.Module):
    """A layer whose backward pass is written by hand: the identity."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.layer(x) - x).detach()


@pytest.mark.parametrize('file', ['Meansparse_wrn_94_16', 'Meansparse_wrn_70_16', 'Meansparse_ra_wrn_70_16'])
def test_robustbench_s_mean_sparse_has_the_gradient_of_its_own_bpda(file: str) -> None:
    pytest.importorskip('robustbench')
    layer_class = importlib.import_module(f'robustbench.model_zoo.architectures.{file}').MeanSparse
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def network(wrap: type[nn.Module]) -> nn.Module:
        """One of the package with a MeanSparse, whose statistics are those of the images, behind each BatchNorm."""
        found, layers = load_bundle(ROOT / 'hub' / 'models' / 'wrn10_1_pssilu').eval(), []
        for parent in list(found.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    layers.append(layer_class(child.num_features))
                    setattr(parent, name, nn.Sequential(child, wrap(layers[-1])))
        for layer in layers:
            layer.flag_update_statistics.fill_(1)
            layer.batch_num.fill_(1)
        with torch.no_grad():
            found(x)
        for layer in layers:
            layer.flag_update_statistics.fill_(0)
            layer.threshold.fill_(0.5)
        return found.requires_grad_(False)

    grads = []
    for each in (BPDA(network(nn.Sequential)), network(StraightThrough), network(nn.Sequential)):
        inputs = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(each(inputs)[:, 3].sum(), inputs)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-5)
    assert (grads[0] - grads[2]).abs().max() > 0.1 * grads[0].abs().max()  # the layers' own is another one
    assert flat_operations(network(nn.Sequential), x) == ['where']


@pytest.mark.slow
def test_a_false_gain_of_rounding_is_gone_under_bpda(cifar10_root: Path) -> None:
    """The figures of hub/README.md."""
    data = load_dataset('cifar10', cifar10_root, train=False)
    x, y = to_float(data.images[:100]), data.labels[:100]
    network = load_bundle(ROOT / 'hub' / 'models' / 'wrn10_1_pssilu')
    rounded = nn.Sequential(Applied(lambda x: (32 * x).round() / 32), network)
    plain = evaluate(network, x, y, '8/255', 'pgd-20')
    found = evaluate(rounded, x, y, '8/255', 'pgd-20,bpda-pgd-20')
    assert (found['pgd-20']['correct'], found['bpda-pgd-20']['correct'], plain['pgd-20']['correct']) == (58, 36, 36)
