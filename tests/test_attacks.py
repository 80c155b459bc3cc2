"""PGD against the budget it promises, closed forms, and a second implementation."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import re
import sys
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch._dynamo.utils import counters

import timm_paf
from timm_paf.attacks import (
    BN_MODES,
    STARTS,
    ThreatModel,
    frozen_view,
    n_fgsm,
    parse_fraction,
    pgd,
)
from timm_paf.convert import create_converted
from timm_paf.losses import LOSSES, TARGETED_LOSSES
from timm_paf.modes import eval_mode
from timm_paf.norms import NORMS, perturbation_norm


class Linear(nn.Module):
    """Logits linear in the image: the best attack is known."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, classes: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(classes, *shape, generator=generator, dtype=torch.float64).to(dtype))

    def as_two(self) -> Tensor:
        """The direction from class 0 to class 1; no other class is ever the largest."""
        with torch.no_grad():
            self.weight[2:] -= 100
        return (self.weight[1] - self.weight[0]).detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum('bchw,kchw->bk', x, self.weight)


@pytest.mark.parametrize(('text', 'value'), [
    ('8/255', Fraction(8, 255)), ('0.031', Fraction(31, 1000)), (0.5, Fraction(1, 2)), (0, Fraction(0)),
    (Fraction(2, 255), Fraction(2, 255)), (8 / 255, Fraction(8, 255)), (0.031, Fraction(31, 1000)),
    (1e-7, Fraction(1, 10 ** 7)), (math.pi, Fraction(str(math.pi)))])
def test_numbers_are_exact(text: object, value: Fraction) -> None:
    assert parse_fraction(text) == value  # type: ignore[arg-type]


@given(st.integers(0, 10 ** 6), st.sampled_from([255, 1000, 10 ** 6]))
def test_a_float_is_the_fraction_that_it_is_written_as(above: int, below: int) -> None:
    assert parse_fraction(above / below) == Fraction(above, below)


@pytest.mark.parametrize('text', ['', 'eight', '8/0', '8//255', 'nan', None])
def test_what_is_no_number_is_named(text: object) -> None:
    with pytest.raises(ValueError, match='expected one such as 8/255'):
        parse_fraction(text)  # type: ignore[arg-type]


def small_net(dtype: torch.dtype = torch.float64, classes: int = 5) -> nn.Module:
    """Takes (batch, 3, 8, 8); BatchNorm and dropout in train mode, with statistics that no batch has."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(), nn.Flatten(), nn.Linear(4 * 36, classes))
    nn.init.uniform_(net[1].running_mean, -0.5, 0.5)
    return net.to(dtype).train()


def images(n: int = 6, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(n, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return x0, torch.randint(5, (n,), generator=generator)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_threat_model_refuses_what_cannot_be_meant() -> None:
    with pytest.raises(ValueError, match=r'eps is 8; expected between 0 and 1 for Linf; .* write 8/255'):
        ThreatModel('Linf', Fraction(8))
    with pytest.raises(ValueError, match='step is 2'):
        ThreatModel('Linf', Fraction(8, 255), Fraction(2))
    with pytest.raises(ValueError, match='unknown norm'):
        ThreatModel('linf')
    with pytest.raises(ValueError, match='at least 0'):
        ThreatModel('L2', Fraction(-1))
    with pytest.raises(ValueError, match='steps is -1'):
        ThreatModel(steps=-1)
    assert ThreatModel('L2', Fraction(2)).step == Fraction(1, 2)
    assert ThreatModel('Linf', '8/255').record()['eps'] == '8/255'  # type: ignore[arg-type]


shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize('norm', NORMS)
@settings(max_examples=60)
@given(shape=shapes, eps=st.fractions(0, 1, max_denominator=1000), steps=st.integers(0, 4),
       dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000), edge=st.booleans(),
       layout=st.sampled_from(['plain', 'channels_last', 'strided']), loss=st.sampled_from(list(LOSSES)),
       targeted=st.booleans(), restarts=st.integers(1, 2))
def test_budget_and_box_hold_for_every_sample(
        shape: tuple[int, int, int, int], norm: str, eps: Fraction, steps: int, dtype: torch.dtype, seed: int,
        edge: bool, layout: str, loss: str, targeted: bool, restarts: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    if edge:
        x0 = x0.round()
    if layout == 'channels_last':
        x0 = x0.contiguous(memory_format=torch.channels_last)
    elif layout == 'strided':
        x0 = x0.repeat_interleave(2, 3)[..., ::2]
    before = x0.clone()
    y = torch.randint(3, shape[:1], generator=generator)
    x = pgd(Linear(shape[1:], dtype, 4), x0, y, ThreatModel(norm, eps, eps, steps), generator, loss=loss,
            targeted=targeted and loss != 'kl', restarts=restarts)
    assert torch.equal(x0, before)
    assert x.shape == x0.shape
    assert x.dtype == dtype
    assert not x.requires_grad
    assert x.min() >= 0
    assert x.max() <= 1
    if norm == 'Linf':  # exact in the arithmetic of float32, or the images' own if that is finer
        wide = torch.promote_types(dtype, torch.float32)
        assert ((x.to(wide) - x0.to(wide)).abs() <= torch.tensor(float(eps), dtype=wide)).all()
    else:  # exact
        assert (perturbation_norm(x.double(), x0.double(), norm) <= float(eps)).all()
    if not eps or not steps:
        assert torch.equal(x, x0)


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('scale', [1e-40, 1e-25, 1e-13, 1e-9, 1.0, 1e9, 1e25])
def test_a_step_does_not_depend_on_the_scale_of_the_gradient(norm: str, scale: float) -> None:
    """Of images that the network is sure of it is tiny; beside them in the batch are others."""
    generator = torch.Generator().manual_seed(0)
    grad, x = (torch.rand(3, 3, 8, 8, generator=generator) + 0.5 for _ in range(2))
    scales = torch.tensor([scale, 1.0, 0.0]).view(3, 1, 1, 1)
    found = NORMS[norm].step(grad * scales, x / 2, 0.3)
    expected = NORMS[norm].step(grad, x / 2, 0.3)
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-2 if scale < 1e-38 else 1e-5, atol=1e-7)
    assert not found[2].any()


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('norm', NORMS)
def test_large_images_stay_within_the_budget_and_use_it(norm: str, dtype: torch.dtype) -> None:
    """Sums of 3,072 terms, and the rounding of images."""
    x0, y = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype), torch.arange(4) % 3
    eps = {'Linf': Fraction(8, 255), 'L2': Fraction(1, 2), 'L1': Fraction(12)}[norm]
    x = pgd(Linear((3, 32, 32), dtype), x0, y, ThreatModel(norm, eps, steps=20), torch.Generator().manual_seed(0))
    used = perturbation_norm(x.double(), x0.double(), norm) / float(eps)
    assert (used <= (1 + 1e-5 if norm == 'Linf' else 1)).all()
    # the box takes some of the others', and half precisions lose what is rounded towards the image
    assert (used > (0.7 if norm == 'L1' or dtype == torch.bfloat16 else 0.9)).all()


@pytest.mark.parametrize('norm', ['L2', 'L1'])
def test_half_precision_rounds_towards_the_image_and_no_further(norm: str) -> None:
    x0 = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    point = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    project, eps = NORMS[norm].project, {'L2': 2.0, 'L1': 20.0}[norm]
    exact, found = (project(point.to(dtype), x0.to(dtype), eps) for dtype in (torch.float64, torch.bfloat16))
    lost = (exact - x0.double()).abs() - (found.double() - x0.double()).abs()
    assert lost.max() <= 2 ** -8  # a unit in the last place of numbers below 1
    assert (perturbation_norm(found.double(), x0.double(), norm) <= eps).all()


@pytest.mark.parametrize('norm', NORMS)
def test_pgd_reaches_the_optimum_of_a_linear_model(norm: str) -> None:
    """Two classes that differ by a linear function: the optimum is eps times its dual direction."""
    model = Linear((1, 4, 4))
    direction = model.as_two()
    x0, y = torch.full((5, 1, 4, 4), 0.5), torch.zeros(5, dtype=torch.long)
    eps = 0.1
    best = eps * {'Linf': direction.abs().sum(), 'L2': direction.norm(), 'L1': direction.abs().max()}[norm]
    threat = ThreatModel(norm, Fraction(1, 10), Fraction(1, 20), 50)
    for loss in ('ce', 'cw'):
        x = pgd(model, x0, y, threat, torch.Generator().manual_seed(0), loss=loss)
        gained = ((x - x0) * direction).flatten(1).sum(1)
        torch.testing.assert_close(gained, best.expand(5), rtol=2e-3, atol=0)
    # the same way back: class 0 is the one to reach
    x = pgd(model, x0, y, threat, torch.Generator().manual_seed(0), targeted=True)
    torch.testing.assert_close(((x - x0) * direction).flatten(1).sum(1), -best.expand(5), rtol=2e-3, atol=0)


def test_l1_goes_on_where_the_box_stops_it() -> None:
    """Linear again, and now the best pixels are moved as far as the box has room, one after the other."""
    model = Linear((3, 32, 32))
    direction = model.as_two()
    x0, y = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(4, dtype=torch.long)
    x = pgd(model, x0, y, ThreatModel('L1', Fraction(12), steps=20), torch.Generator().manual_seed(0), loss='cw')
    gained = ((x - x0) * direction).flatten(1).sum(1)
    order = direction.flatten().abs().argsort(descending=True)
    room = torch.where(direction > 0, 1 - x0, x0).flatten(1)[:, order]
    moved = (12 - (room.cumsum(1) - room)).clamp_min(0).minimum(room)
    best = moved @ direction.flatten().abs()[order]
    assert (gained <= best).all()
    assert (gained > 0.96 * best).all()


def _project_by_bisection(point: np.ndarray, eps: float) -> np.ndarray:
    """On the L1 ball: the threshold at which the magnitudes that are left sum to eps."""
    magnitude = np.abs(point)
    if magnitude.sum() <= eps:
        return point
    low, high = 0.0, magnitude.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(magnitude - middle, 0).sum() > eps else (low, middle)
    return np.sign(point) * np.maximum(magnitude - high, 0)


@settings(max_examples=200)
@given(shape=shapes, eps=st.floats(1e-3, 20), scale=st.floats(1e-3, 100), seed=st.integers(0, 1000),
       ties=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_l1_projection_is_the_nearest_point(
        shape: tuple[int, int, int, int], eps: float, scale: float, seed: int, ties: bool, dtype: torch.dtype) -> None:
    point = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale
    if ties:
        point = (point / scale).round() * scale
    center = torch.zeros(shape, dtype=dtype)
    found = NORMS['L1'].project(point, center, eps)
    # it stays 1e-5 of eps inside; the rest is the rounding of thresholds, which have the size of the point
    atol = 1e-5 * eps + 10 * torch.finfo(dtype).eps * point.abs().max().item()
    for one, nearest in zip(point.double().flatten(1).numpy(), found.double().flatten(1).numpy()):
        np.testing.assert_allclose(nearest, _project_by_bisection(one, eps), rtol=0, atol=atol)
        # of a convex set: from the nearest point nothing in it lies further towards the point
        away = one - nearest
        assert eps * np.abs(away).max() - away @ nearest <= len(one) * atol * (np.abs(away).max() + eps) * 2
    torch.testing.assert_close(NORMS['L1'].project(found, center, eps), found, rtol=1e-6, atol=0)
    inside = found * 0.99
    assert torch.equal(NORMS['L1'].project(inside, center, eps), inside)


def test_pgd_gives_the_numbers_it_gave() -> None:
    """Fixed ones, from before there were other losses than cross-entropy."""
    weight = torch.tensor([[1.0, -2, 3, 0, 1, -1], [2, 1, -1, 1, 0, 3], [-1, 0, 2, -3, 2, 1]])
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3, bias=False))
    model[1].weight.data = weight
    x0 = torch.tensor([[0.1, 0.9, 0.5, 0.0, 1.0, 0.3], [0.25, 0.75, 0.02, 0.6, 0.98, 0.4]]).view(2, 1, 2, 3)
    expected = {
        'Linf': [0.0686274543, 0.922685683, 0.506943464, 0.0, 1.0, 0.331372559,
                 0.278742582, 0.750215709, 0.000995928422, 0.631372571, 0.948627472, 0.431372553],
        'L2': [0.16646117, 1.0, 0.194709539, 0.0, 0.924380481, 0.476275325,
               0.462873667, 0.881976724, 0.0, 0.677383244, 0.884970009, 0.460396737]}
    for norm, eps in (('Linf', Fraction(8, 255)), ('L2', Fraction(1, 2))):
        x = pgd(model, x0, torch.tensor([0, 2]), ThreatModel(norm, eps, steps=3), torch.Generator().manual_seed(11))
        numbers = torch.tensor(expected[norm]).view_as(x)
        # L2 keeps the rounding of a softmax, which is another library's on another machine
        torch.testing.assert_close(x, numbers, rtol=0, atol=0 if norm == 'Linf' else 2e-7)


def _naive_losses(logits: Tensor, y: Tensor, clean: Tensor, targeted: bool = False) -> dict[str, list[Tensor]]:
    """Sample by sample, from the formulas."""
    losses: dict[str, list[Tensor]] = {name: [] for name in LOSSES}
    for z, label, z0 in zip(logits, y.tolist(), clean):
        p, p0 = (t.exp() / t.exp().sum() for t in (z, z0))
        others = torch.stack([z[k] for k in range(len(z)) if k != label])
        top = z.sort(descending=True).values
        losses['ce'].append(-p[label].log())
        losses['cw'].append(others.max() - z[label])
        losses['dlr'].append((others.max() - z[label]) / (top[0] - ((top[2] + top[3]) / 2 if targeted else top[2])))
        losses['kl'].append((p0 * (p0 / p).log()).sum())
    return losses


@pytest.mark.parametrize('name', LOSSES)
def test_losses_are_their_formulas(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, clean = (3 * torch.randn(40, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    y = torch.randint(6, (40,), generator=generator)
    logits.requires_grad_()
    ours = LOSSES[name](logits, clean if name == 'kl' else y)
    naive = torch.stack(_naive_losses(logits, y, clean)[name])
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, naive)))
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, clean if name == 'kl' else y), logits)


def test_dlr_is_that_of_autoattack() -> None:
    base = pytest.importorskip('pyautoattack.autopgd_base')
    logits = 3 * torch.randn(50, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(50) % 10
    y[:25] = logits[:25].argmax(1)  # right ones too
    theirs = base.APGDAttack(lambda x: x, eps=0.1).dlr_loss(logits, y)
    torch.testing.assert_close(LOSSES['dlr'](logits, y), theirs, rtol=1e-12, atol=1e-12)
    attack = base.APGDAttack_targeted(lambda x: x, eps=0.1)
    attack.y_target = (y + 3) % 10
    right = logits.argmax(1) == y  # else theirs asks for more than the target's victory
    ours = TARGETED_LOSSES['dlr'](logits, attack.y_target)
    torch.testing.assert_close(-ours[right], attack.dlr_loss_targeted(logits, y)[right], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(('loss', 'targeted'), [
    *((loss, False) for loss in LOSSES), *((loss, True) for loss in TARGETED_LOSSES)])
def test_pgd_is_the_textbook_loop(loss: str, targeted: bool) -> None:
    """Against a plain rewriting of Madry et al.'s Linf loop, from the same start."""
    model = small_net().eval()
    x0, y = images()
    eps, step = 8 / 255, 2 / 255
    clean = model(x0).detach()
    x = x0 + (torch.rand(x0.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2 - 1) * eps
    x = x.clamp(0, 1)
    for _ in range(10):
        x = x.detach().requires_grad_()
        torch.stack(_naive_losses(model(x), y, clean, targeted)[loss]).sum().backward()
        assert x.grad is not None
        x = x.detach() + (-step if targeted else step) * x.grad.sign()
        x = torch.min(torch.max(x, x0 - eps), x0 + eps).clamp(0, 1)
    ours = pgd(model, x0, y, ThreatModel(), torch.Generator().manual_seed(3), loss=loss, targeted=targeted)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize('loss', ['ce', 'cw', 'dlr'])
@pytest.mark.parametrize('norm', NORMS)
def test_a_target_is_reached(norm: str, loss: str) -> None:
    model, x0 = Linear((3, 8, 8), classes=5), torch.full((5, 3, 8, 8), 0.5)
    eps = {'Linf': Fraction(1, 4), 'L2': Fraction(3), 'L1': Fraction(30)}[norm]
    target = torch.arange(5)
    assert (model(x0).argmax(1) == target).sum() == 1  # all five images are the same
    threat = ThreatModel(norm, eps, eps / 20, 60)
    x = pgd(model, x0, target, threat, torch.Generator().manual_seed(0), loss=loss, targeted=True)
    assert torch.equal(model(x).argmax(1), target)


@pytest.mark.parametrize('targeted', [False, True])
@pytest.mark.parametrize('loss', ['ce', 'cw', 'dlr'])
def test_restarts_keep_the_best_of_each_sample(loss: str, targeted: bool) -> None:
    """Against the same attacks one by one, which draw from the generator in turn, and a choice written out."""
    model = small_net().eval()
    with torch.no_grad():
        model[-1].weight *= 8
    x0, _ = images(40)
    y = model(x0).topk(2).indices[:, int(targeted)]
    threat = ThreatModel('Linf', Fraction(8, 255), steps=1)
    generator = torch.Generator().manual_seed(0)
    singles = [pgd(model, x0, y, threat, generator, loss=loss, targeted=targeted) for _ in range(3)]
    generator.manual_seed(0)
    ours = pgd(model, x0, y, threat, generator, loss=loss, targeted=targeted, restarts=3)
    chosen, undecided = set(), 0
    for i in range(len(x0)):
        keys = []
        for x in singles:
            logits = model(x[i:i + 1])
            value = (TARGETED_LOSSES if targeted else LOSSES)[loss](logits.float(), y[i:i + 1]).item()
            hit = (logits.argmax(1) == y[i]).item()
            keys.append((hit, -value) if targeted else (not hit, value))
        best = max(range(3), key=keys.__getitem__)
        undecided += len({hit for hit, _ in keys}) - 1
        chosen.add(best)
        assert torch.equal(ours[i], singles[best][i]), (keys, i)
    assert chosen == {0, 1, 2}
    assert undecided  # samples that one restart fools and another does not


def test_what_fools_goes_before_a_higher_loss() -> None:
    """Cross-entropy can be higher where the right class still wins: (.34, .33, .33) against (.45, .55, 0)."""
    class Twofold(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            p = torch.where(x.flatten(1)[:, :1] > 0.5, torch.tensor([0.34, 0.33, 0.33]), torch.tensor([0.45, 0.55, 0]))
            return (p + 1e-6).log() + 0 * x.sum()

    x0, y = torch.full((20, 1, 1, 1), 0.5), torch.zeros(20, dtype=torch.long)
    once, often = (pgd(Twofold(), x0, y, ThreatModel(steps=1), torch.Generator().manual_seed(0), restarts=restarts)
                   for restarts in (1, 8))
    assert 0.2 < (once > 0.5).float().mean() < 0.8
    assert (often <= 0.5).all()


@pytest.mark.parametrize('norm', NORMS)
def test_random_start_is_uniform_in_the_ball(norm: str) -> None:
    """With a zero step only the start is left. In d dimensions P(size <= t eps) is t^d, and a coordinate follows the
    law that it has in that ball; no coordinate and no sign is preferred."""
    d = 3
    x0, y = torch.full((20000, 1, 1, d), 0.5, dtype=torch.float64), torch.zeros(20000, dtype=torch.long)
    threat = ThreatModel(norm, Fraction(1, 10), Fraction(0), 1)
    x = pgd(Linear((1, 1, d), torch.float64), x0, y, threat, torch.Generator().manual_seed(0))
    delta = ((x - x0).flatten(1) / 0.1).numpy()
    order = {'Linf': np.inf, 'L2': 2, 'L1': 1}[norm]
    assert stats.kstest(np.linalg.norm(delta, order, axis=1) ** d, 'uniform').pvalue > 0.01
    law = {'Linf': ('uniform',), 'L2': ('beta', (0.5, (d + 1) / 2)), 'L1': ('beta', (1, d))}[norm]
    power = 2 if norm == 'L2' else 1
    for coordinate in delta.T:
        assert stats.kstest(np.abs(coordinate) ** power, *law).pvalue > 0.01
        assert stats.binomtest(int((coordinate > 0).sum()), len(delta)).pvalue > 0.01
    for a, b in itertools.combinations(delta.T, 2):  # nor a pair of signs
        assert stats.binomtest(int((a * b > 0).sum()), len(delta)).pvalue > 0.01


def test_starts_are_what_they_say() -> None:
    """With a zero step the projection alone is left of the loop, which takes the ends of the range into it."""
    x0, y = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(2, dtype=torch.long)
    x0[0] = 0.0
    model, seen = small_net(torch.float32), list[Tensor]()
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    for start in STARTS:
        generator = torch.Generator().manual_seed(4)
        pgd(model, x0, y, ThreatModel(step=Fraction(0), steps=1), generator, start=start)
        noise = seen.pop() - x0
        drawn = torch.Generator().manual_seed(4)
        expected = torch.empty_like(x0).normal_(generator=drawn) * 0.001 if start == 'normal' else torch.empty_like(
            x0).uniform_(-8 / 255, 8 / 255, generator=drawn)
        clipped = (x0 + expected).clamp(0, 1) - x0 if start == 'uniform' else expected
        torch.testing.assert_close(noise, clipped, rtol=1e-5, atol=1e-7)
        assert (noise[0].min() < 0) == (start != 'uniform')
    with pytest.raises(ValueError, match="unknown start 'sphere'; expected one of uniform, unclipped, normal"):
        pgd(model, x0, y, ThreatModel(), start='sphere')


@pytest.mark.parametrize('eps', ['8/255', 8 / 255, Fraction(8, 255)])
def test_an_eps_is_a_threat_model(eps: str | float | Fraction) -> None:
    model, (x0, y) = small_net(), images(4)
    found, expected = (pgd(model, x0, y, threat, torch.Generator().manual_seed(0)) for threat in (
        eps, ThreatModel(eps=eps)))
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"^'eight' is not a number; expected one such as 8/255 or 0.5$"):
        pgd(model, x0, y, 'eight')


@pytest.mark.parametrize('bn', BN_MODES)
def test_n_fgsm_is_one_step_from_wide_noise(bn: str) -> None:
    """De Jorge et al., algorithm 1; the images leave the ball but not the box."""
    model, (x0, y) = small_net(), images(40)
    before = state(model)
    threat = ThreatModel(step='8/255')  # type: ignore[arg-type]
    ours = n_fgsm(model, x0, y, threat, torch.Generator().manual_seed(0), bn=bn, label_smoothing=0.3)
    reference, eps = small_net().eval(), 8 / 255
    reference[1].train(bn != 'eval')
    noise = torch.empty_like(x0).uniform_(-2 * eps, 2 * eps, generator=torch.Generator().manual_seed(0))
    x = (x0 + noise).clamp(0, 1).requires_grad_()
    F.cross_entropy(reference(x).float(), y, label_smoothing=0.3).backward()
    torch.testing.assert_close(ours, (x.detach() + eps * x.grad.sign()).clamp(0, 1), rtol=0, atol=1e-12)
    for wrong, text in (({'bn': 'tran'}, "unknown bn 'tran'"), ({'x0': 255 * x0}, r'expected \[0, 1\]')):
        with pytest.raises(ValueError, match=text):
            n_fgsm(small_net(), **{'x0': x0, 'y': y, 'threat': threat, **wrong})
    distance = (ours - x0).abs()
    assert distance.max() > 2.5 * eps
    assert distance.max() <= 3 * eps + 1e-12
    assert 0 <= ours.min() <= ours.max() <= 1
    assert not ours.requires_grad
    after = state(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == ({'1.running_mean', '1.running_var', '1.num_batches_tracked'} if bn == 'train' else set())
    assert all(module.training for module in model.modules())
    given = n_fgsm(small_net(), x0, y, '8/255', torch.Generator().manual_seed(0), bn=bn, label_smoothing=0.3)
    assert torch.equal(given, ours)
    soft = F.one_hot(y, 5).double()
    torch.testing.assert_close(n_fgsm(small_net(), x0, soft, threat, torch.Generator().manual_seed(0)),
                               n_fgsm(small_net(), x0, y, threat, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize('attack', ['Linf', 'L2', 'L1', 'n-fgsm'])
def test_an_attack_in_half_precision_fools_a_confident_network(attack: str) -> None:
    """The probability of a wrong class, from which the gradient begins, is 0 in float16 where the margin is over 17."""
    class Margin(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            weight = torch.tensor([[0.0, 0.0], [25.0, 25.0]], device=x.device)
            return F.linear(x.flatten(1), weight, torch.tensor([margins[-1], 0.0]))

    norm = attack if attack in NORMS else 'Linf'
    threat = ThreatModel(norm, Fraction(1), Fraction(1), steps=3)
    for margins in ([12.0], [20.0], [24.0]):  # a step of 1 makes up for at least 25
        x0, y = torch.full((8, 1, 1, 2), 0.0), torch.zeros(8, dtype=torch.long)
        for precision in (torch.bfloat16, torch.float16):
            with torch.autocast('cpu', precision):
                found = n_fgsm(Margin(), x0, y, threat) if attack == 'n-fgsm' else pgd(Margin(), x0, y, threat)
            assert bool((Margin()(found).argmax(1) == 1).all()), (margins, precision)


@pytest.mark.parametrize('norm', NORMS)
def test_what_is_not_finite_moves_no_image_out_of_the_ball(norm: str) -> None:
    class Infinite(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = x.flatten(1)[:, :3]
            return torch.where(torch.arange(len(x))[:, None] == 1, logits / 0, logits)

    x0 = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    threat = ThreatModel(norm, Fraction(1, 4), steps=3)
    found = pgd(Infinite(), x0, torch.zeros(4, dtype=torch.long), threat, torch.Generator().manual_seed(0))
    assert bool(perturbation_norm(found, x0, norm).le(0.25 + 1e-6).all())


@pytest.mark.parametrize('bn', BN_MODES)
def test_batch_norm_works_as_asked(bn: str) -> None:
    """Against an attack on a copy whose BatchNorm is in that mode, and running statistics of the same forwards."""
    model = small_net()
    x0, y = images()
    before = state(model)
    threat = ThreatModel(steps=3)
    ours = pgd(model, x0, y, threat, torch.Generator().manual_seed(0), bn=bn)

    reference = small_net().eval()
    reference[1].train(bn != 'eval')
    x = x0 + torch.empty_like(x0).uniform_(-8 / 255, 8 / 255, generator=torch.Generator().manual_seed(0))
    x = x.clamp(0, 1)
    for _ in range(3):
        x = x.detach().requires_grad_()
        F.cross_entropy(reference(x), y).backward()
        assert x.grad is not None
        x = x.detach() + 2 / 255 * x.grad.sign()
        x = torch.min(torch.max(x, x0 - 8 / 255), x0 + 8 / 255).clamp(0, 1)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)
    after = reference.state_dict() if bn == 'train' else before
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, after[name], rtol=1e-12 if bn == 'train' else 0, atol=0, msg=name)
    assert model[1].num_batches_tracked == (3 if bn == 'train' else 0)


class Failing(nn.Module):
    """Raises at a forward pass, counted from 1; 0 never does."""

    def __init__(self, inner: nn.Module, at: int) -> None:
        super().__init__()
        self.inner, self.at, self.count = inner, at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        if self.count == self.at:
            raise RuntimeError('out of memory')
        return self.inner(x)


@pytest.mark.parametrize('fails_at', [0, 1, 2, 6])
@pytest.mark.parametrize('bn', BN_MODES)
@pytest.mark.parametrize(('norm', 'loss', 'restarts'), [('Linf', 'ce', 1), ('L1', 'kl', 2)])
def test_pgd_leaves_the_model_as_it_found_it(norm: str, loss: str, restarts: int, bn: str, fails_at: int) -> None:
    model = Failing(small_net(), fails_at).train()
    model.inner[1].eval()  # a mixed mode comes back as it was
    model.inner[0].weight.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    before, modes = state(model), [m.training for m in model.modules()]
    x0, y = images()
    arguments = {'loss': loss, 'restarts': restarts, 'bn': bn}
    if fails_at:
        with pytest.raises(RuntimeError, match='out of memory'):
            pgd(model, x0, y, ThreatModel(norm, Fraction(8, 255), steps=6), **arguments)  # type: ignore[arg-type]
    else:
        pgd(model, x0, y, ThreatModel(norm, Fraction(8, 255), steps=6), **arguments)  # type: ignore[arg-type]
    assert modes == [m.training for m in model.modules()]
    for name, value in model.state_dict().items():
        follows = bn == 'train' and name.startswith('inner.1.')
        assert follows or torch.equal(value, before[name]), name
    assert all(p.grad is not None and (p.grad == 7).all() for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1


def test_a_caller_without_gradients_gets_an_attack() -> None:
    x0, y = images()
    with torch.no_grad():
        assert not torch.equal(pgd(small_net(), x0, y, ThreatModel(steps=3, random_start=False)), x0)


@pytest.mark.parametrize('loss', LOSSES)
def test_probabilities_are_labels_too(loss: str) -> None:
    model = small_net().eval()
    x0, y = images()
    generator = torch.Generator()
    hard = pgd(model, x0, y, ThreatModel(steps=4), generator.manual_seed(0), loss=loss, restarts=2)
    certain = F.one_hot(y, 5).double()
    soft = pgd(model, x0, certain, ThreatModel(steps=4), generator.manual_seed(0), loss=loss, restarts=2)
    torch.testing.assert_close(soft, hard, rtol=0, atol=1e-12)
    # a mixture whose larger part is y
    mixed = 0.6 * certain + 0.4 * certain.roll(1, 1)
    x = pgd(model, x0, mixed, ThreatModel('L2', Fraction(1), steps=1, random_start=False) if loss != 'kl' else
            ThreatModel('L2', Fraction(1), steps=1), generator.manual_seed(0), loss=loss)
    if loss == 'ce':
        leaf = x0.clone().requires_grad_()
        grad, = torch.autograd.grad(-(mixed * model(leaf).log_softmax(1)).sum(), leaf)
        step = grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1) / 4
        torch.testing.assert_close(x, (x0 + step).clamp(0, 1), rtol=1e-5, atol=1e-6)  # logits are taken in float32
    else:
        threat = ThreatModel('L2', Fraction(1), steps=1, random_start=loss == 'kl')
        assert torch.equal(x, pgd(model, x0, y, threat, generator.manual_seed(0), loss=loss))


@pytest.mark.parametrize(('arguments', 'message'), [
    ({'loss': 'mse'}, "unknown loss 'mse'; expected one of ce, cw, dlr, kl"),
    ({'bn': 'frozen'}, "unknown bn 'frozen'; expected one of eval, train-frozen, train"),
    ({'restarts': 0}, 'restarts is 0; expected at least 1'),
    ({'restarts': 2, 'random_start': False}, 'restarts is 2 and all would be the same'),
    ({'loss': 'kl', 'targeted': True}, "loss 'kl' leads away .* expected one of ce, cw, dlr"),
    ({'loss': 'kl', 'random_start': False}, "loss 'kl' has no gradient at the clean images"),
    ({'y': torch.rand(6)}, r'labels are torch.float32.* for 6 images; expected int64 \(batch,\), or probabilities'),
    ({'y': torch.zeros(6, 5, dtype=torch.long)}, r'labels are torch.int64 of shape \(6, 5\)'),
    ({'y': torch.zeros(6, dtype=torch.int32)}, r'labels are torch.int32 of shape \(6,\)'),
    ({'y': torch.zeros(1, dtype=torch.long), 'loss': 'cw'}, r'labels are torch.int64 of shape \(1,\) for 6 images'),
    ({'x0': torch.ones(6, 3, 8, 8, dtype=torch.uint8)}, r'images are torch.uint8; expected float in \[0, 1\]'),
    ({'loss': 'dlr', 'model': nn.Sequential(nn.Flatten(), nn.Linear(192, 2, dtype=torch.float64)),
      'y': torch.zeros(6, dtype=torch.long)},
     "loss 'dlr' compares 3 classes and the model has 2; use 'cw'")])
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, object], message: str) -> None:
    x0, y = images()
    arguments = dict(arguments)
    x0, y = arguments.pop('x0', x0), arguments.pop('y', y)  # type: ignore[assignment]
    threat = ThreatModel(random_start=bool(arguments.pop('random_start', True)))
    model = arguments.pop('model', None) or small_net()
    with pytest.raises(ValueError, match=message):
        pgd(model, x0, y, threat, **arguments)  # type: ignore[arg-type]


def test_inference_mode_is_told_from_no_grad() -> None:
    x0, y = images(4)
    x, model = x0.float(), small_net().float()
    for attack in (lambda: pgd(model, x, y, '8/255'), lambda: timm_paf.evaluate(model, x, y, attacks='pgd-2')):
        with torch.inference_mode(), pytest.raises(ValueError, match=r'expected torch\.no_grad\(\)$'):
            attack()


@pytest.mark.parametrize('bad', [1.01, -0.01, float('nan'), 255.0])
def test_images_outside_the_box_are_refused(bad: float) -> None:
    x0 = torch.rand(2, 1, 4, 4)
    x0[1, 0, 2, 2] = bad
    with pytest.raises(ValueError, match=r'expected \[0, 1\]: divide by 255'):
        pgd(Linear((1, 4, 4)), x0, torch.zeros(2, dtype=torch.long), ThreatModel())


@pytest.mark.parametrize('norm', NORMS)
def test_a_sample_is_attacked_alike_whatever_its_batch(norm: str) -> None:
    x0, y = torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.randint(3, (6,))
    model, threat = Linear((3, 8, 8), torch.float64), ThreatModel(norm, Fraction(1, 2), random_start=False)
    whole = pgd(model, x0, y, threat)
    parts = torch.cat([pgd(model, x0[:1], y[:1], threat), pgd(model, x0[1:], y[1:], threat)])
    # einsum adds in another order for another batch, which signs do not show
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-12 if norm == 'L2' else 0)


class Counted(nn.Module):
    """A network that counts the images it was given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.images = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.model(x)


@pytest.mark.parametrize('bundle', ['wrn10_1_relu', 'wrn10_1_pssilu', 'resnet18_w16_pssilu'])
def test_stopping_at_cycles_gives_the_same_images_for_less(bundle: str) -> None:
    model = Counted(frozen_view(timm_paf.load_bundle(ROOT / 'hub' / 'models' / bundle)))
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(4, 3, 32, 32, generator=generator)
    y = model(x0).argmax(1).detach()
    y[0] = (y[0] + 1) % 10
    for steps in (41, 42):  # places in a cycle
        found = []
        for stop_cycles in (False, True):
            model.images = 0
            found.append((pgd(model, x0, y, ThreatModel(eps='1/255', steps=steps), generator.manual_seed(1),
                              stop_cycles=stop_cycles), model.images))
        (whole, all_images), (stopped, images) = found
        assert torch.equal(whole, stopped)
        assert all_images == 4 * steps
        assert images < 0.8 * all_images


class Answers(nn.Module):
    """Logits that drive every image to a corner of its ball, where it stays, and that depend on more than the image."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == 'random':
            return self.model(x) * (1 + 0.01 * torch.randn(len(x), 1))
        if self.kind == 'batch':  # another sign in a batch of another size
            return self.model(x) * (1 if len(x) == 3 else -1)
        return self.model(x)


@pytest.mark.parametrize(('kind', 'passes'), [('image', 4 * 3 + 4 + 2 * 1), ('random', 20 * 3), ('batch', 20 * 3 + 4)])
def test_only_images_that_answer_alone_and_always_alike_stop(kind: str, passes: int) -> None:
    x0, y = torch.full((3, 1, 4, 4), 0.5), torch.tensor([0, 1, 2])
    model = Counted(Answers(Linear((1, 4, 4)), kind))
    threat = ThreatModel(eps='4/255', step='2/255', steps=20, random_start=False)
    expected = pgd(Answers(Linear((1, 4, 4)), kind), x0, y, threat)
    assert torch.equal(pgd(model, x0, y, threat, stop_cycles=True), expected)
    assert model.images == passes


def test_stopping_at_cycles_is_refused_where_images_depend_on_each_other() -> None:
    with pytest.raises(ValueError, match="bn is 'train'; expected 'eval'"):
        pgd(small_net(), *images(), ThreatModel(), bn='train', stop_cycles=True)


every_attack = pytest.mark.parametrize(('norm', 'loss', 'bn'), [
    *((norm, 'ce', 'eval') for norm in NORMS), *(('Linf', loss, 'train-frozen') for loss in LOSSES)])


def test_labels_of_no_class_of_the_network_are_named() -> None:
    network = timm.create_model('wrn10_1_relu', num_classes=3)
    for label, span in ((3, '[0, 3]'), (-1, '[-1, 0]')):
        with pytest.raises(ValueError, match=re.escape(f'labels span {span}; the network has 3 classes: expected')):
            pgd(network, torch.rand(2, 3, 32, 32), torch.tensor([0, label]), '8/255')
        with pytest.raises(ValueError, match='the network has 3 classes'):
            n_fgsm(nn.Sequential(network), torch.rand(2, 3, 32, 32), torch.tensor([0, label]), '8/255')
    network.fc = nn.Linear(network.fc.in_features, 7)  # what it says of its classes is of before
    pgd(network, torch.rand(2, 3, 32, 32), torch.tensor([0, 6]), '8/255')


@every_attack
def test_the_host_never_looks_at_values(norm: str, loss: str, bn: str) -> None:
    """On the meta device there are none, and who asks for one gets an error."""
    model = small_net().to('meta')
    x0, y = (t.to('meta') for t in images())
    with pytest.raises(RuntimeError, match=r'[mM]eta'):
        x0.max().item()
    x = pgd(model, x0, y, ThreatModel(norm, steps=2), loss=loss, restarts=2, bn=bn, check=False)
    assert x.shape == x0.shape
    assert x.is_meta


@every_attack
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_a_compiled_model_is_one_program(norm: str, loss: str, bn: str, layout: torch.memory_format) -> None:
    torch._dynamo.reset()
    counters.clear()
    model = small_net().to(memory_format=layout)
    compiled: Callable[..., Tensor] = torch.compile(model, backend='eager')
    x0, y = images()
    x0 = x0.contiguous(memory_format=layout)
    for restarts in (2, 1):
        x = pgd(compiled, x0, y, ThreatModel(norm, steps=2), loss=loss, restarts=restarts, bn=bn)
        assert x.is_contiguous(memory_format=layout)
    assert counters['stats']['unique_graphs'] == 1


def test_frozen_view_is_the_model_for_attacks() -> None:
    torch.manual_seed(0)
    model = timm.create_model('wrn10_1_pssilu').train()
    view = frozen_view(model)
    shared = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert {name: p.data_ptr() for name, p in view.named_parameters()} == shared
    assert len({id(m) for m in view.modules() if isinstance(m, timm_paf.activations.PAF)}) == 1
    x0, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    F.cross_entropy(model(x0), y).backward()  # moves the statistics of BatchNorm
    optimizer.step()
    assert model.training
    assert not any(module.training for module in view.modules())
    expected = copy.deepcopy(model).eval()
    assert torch.equal(view(x0), expected(x0))
    threat = ThreatModel(steps=2)
    attacked = [pgd(m, x0, y, threat, torch.Generator().manual_seed(1)) for m in (view, expected)]
    torch.testing.assert_close(*attacked)
    model.load_state_dict(timm.create_model('wrn10_1_pssilu').state_dict())
    assert torch.equal(view(x0), model.eval()(x0))
    view(x0.requires_grad_()).sum().backward()
    assert all(p.grad is None for p in view.parameters())


def test_what_a_network_keeps_in_eval_mode_is_forgotten() -> None:
    """LeViT keeps its attention biases until ``train()``, so that other weights were attacked than there are."""
    torch.manual_seed(0)
    model = create_converted('levit_128s', 'psilu', num_classes=10, img_size=32).eval()
    x0, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    view, threat = frozen_view(model), ThreatModel(steps=2, random_start=False)
    before = pgd(view, x0, y, threat)
    model(x0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if 'attention_biases' in name:
                value += 10 * torch.randn_like(value)
    fresh = create_converted('levit_128s', 'psilu', num_classes=10, img_size=32).eval()
    fresh.load_state_dict(model.state_dict())
    expected = pgd(fresh, x0, y, threat)
    assert not torch.equal(expected, before)
    for each in (view, model, frozen_view(model)):
        assert torch.equal(pgd(each, x0, y, threat), expected)
        with eval_mode(each):
            assert torch.equal(each(x0), fresh(x0))


class Noisy(Linear):
    """Answers otherwise after ``train()``, which it refuses once it is fused."""

    noisy, fused = True, False

    def train(self, mode: bool = True) -> Noisy:
        assert not (mode and self.fused)
        self.noisy = mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.5 * torch.rand_like(x) if self.noisy else x)


@pytest.mark.parametrize('training', [False, True])
def test_a_mode_of_ones_own_comes_back(training: bool) -> None:
    model, outer = Noisy((3, 8, 8)), nn.Sequential(nn.BatchNorm2d(3), nn.Identity())
    outer[1] = model
    outer.train(training)
    outer[0].eval()
    model.fused = not training
    pgd(outer, torch.rand(2, 3, 8, 8), torch.arange(2), ThreatModel(steps=1))
    assert (outer.training, outer[0].training, model.training, model.noisy) == (training, False, training, training)
    with eval_mode(outer), eval_mode(model):
        assert (outer.training, model.training, model.noisy) == (False, False, False)
    assert (model.training, model.noisy) == (training, training)


def test_modes_come_back_where_a_train_of_ones_own_fails() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), fused := Noisy((3, 8, 8)), nn.BatchNorm2d(3)).train()
    with pytest.raises(AssertionError), eval_mode(model):
        fused.fused = True
    assert all(module.training for module in model.modules())


def test_no_module_of_timm_forgets_something_else_in_train() -> None:
    """What else were kept in eval mode, an attack would have of other weights."""
    for name in timm.list_modules():
        timm.list_models(module=name)
    classes = {value for key, module in list(sys.modules.items()) if key.startswith('timm.')
               for value in vars(module).values() if isinstance(value, type) and issubclass(value, nn.Module)}
    own = [each for each in classes if 'train' in vars(each) and each.__module__.startswith('timm.')]
    assert len(own) > 5
    assert all('self.attention_bias_cache = {}' in inspect.getsource(each.train) for each in own)


def test_budget_used() -> None:
    x0 = torch.zeros(2, 1, 1, 2)
    x = torch.tensor([[3.0, -4.0], [0.0, 1.0]]).view(2, 1, 1, 2)
    assert perturbation_norm(x, x0, 'Linf').tolist() == [4, 1]
    assert perturbation_norm(x, x0, 'L2').tolist() == [5, 1]
    assert perturbation_norm(x, x0, 'L1').tolist() == [7, 1]
