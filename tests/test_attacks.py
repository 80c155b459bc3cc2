"""PGD against the budget it promises, closed forms, and a second implementation."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import timm_paf
from timm_paf.attacks import ThreatModel, budget_used, frozen_view, parse_fraction, pgd


class Linear(nn.Module):
    """Logits linear in the image: the best attack is known."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, *shape, generator=generator, dtype=torch.float64).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum('bchw,kchw->bk', x, self.weight)


@pytest.mark.parametrize(('text', 'value'), [
    ('8/255', Fraction(8, 255)), ('0.031', Fraction(31, 1000)), (0.5, Fraction(1, 2)), (0, Fraction(0)),
    (Fraction(2, 255), Fraction(2, 255))])
def test_numbers_are_exact(text: object, value: Fraction) -> None:
    assert parse_fraction(text) == value  # type: ignore[arg-type]


@pytest.mark.parametrize('text', ['', 'eight', '8/0', '8//255', 'nan', None])
def test_what_is_no_number_is_named(text: object) -> None:
    with pytest.raises(ValueError, match='expected one such as 8/255'):
        parse_fraction(text)  # type: ignore[arg-type]


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


@settings(max_examples=60, deadline=None)
@given(shape=shapes, norm=st.sampled_from(['Linf', 'L2']), eps=st.fractions(0, 1, max_denominator=1000),
       steps=st.integers(0, 4), dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 1000),
       edge=st.booleans(), layout=st.sampled_from(['plain', 'channels_last', 'strided']))
def test_budget_and_box_hold_for_every_sample(
        shape: tuple[int, int, int, int], norm: str, eps: Fraction, steps: int, dtype: torch.dtype, seed: int,
        edge: bool, layout: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(shape, generator=generator, dtype=dtype)
    if edge:
        x0 = x0.round()
    if layout == 'channels_last':
        x0 = x0.contiguous(memory_format=torch.channels_last)
    elif layout == 'strided':
        x0 = x0.repeat_interleave(2, 3)[..., ::2]
    before = x0.clone()
    y = torch.randint(3, shape[:1], generator=generator)
    x = pgd(Linear(shape[1:], dtype), x0, y, ThreatModel(norm, eps, eps, steps), generator)
    assert torch.equal(x0, before)
    assert x.shape == x0.shape
    assert x.dtype == dtype
    assert not x.requires_grad
    assert x.min() >= 0
    assert x.max() <= 1
    if norm == 'Linf':  # exact in the images' own arithmetic
        assert ((x - x0).abs() <= torch.tensor(float(eps), dtype=dtype)).all()
    else:
        assert ((x.double() - x0.double()).flatten(1).norm(dim=1) <= float(eps) + 1e-6).all()
    if not eps or not steps:
        assert torch.equal(x, x0)


@pytest.mark.parametrize('norm', ['Linf', 'L2'])
def test_pgd_reaches_the_optimum_of_a_linear_model(norm: str) -> None:
    """Two classes that differ by a linear function: the optimum is eps times its dual direction."""
    model = Linear((1, 4, 4))
    with torch.no_grad():
        model.weight[2] -= 100  # never the largest
    x0, y = torch.full((5, 1, 4, 4), 0.5), torch.zeros(5, dtype=torch.long)
    eps = 0.1
    x = pgd(model, x0, y, ThreatModel(norm, Fraction(1, 10), Fraction(1, 20), 50), torch.Generator().manual_seed(0))
    direction = (model.weight[1] - model.weight[0]).detach()
    best = eps * (direction.abs().sum() if norm == 'Linf' else direction.norm())
    gained = ((x - x0) * direction).flatten(1).sum(1)
    torch.testing.assert_close(gained, best.expand(5), rtol=2e-3, atol=0)


def test_pgd_is_the_textbook_loop() -> None:
    """Against a plain rewriting of Madry et al.'s Linf loop, from the same start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).double()
    x0, y = torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.randint(5, (6,))
    eps, step = 8 / 255, 2 / 255
    x = x0 + (torch.rand(x0.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2 - 1) * eps
    x = x.clamp(0, 1)
    for _ in range(10):
        x = x.detach().requires_grad_()
        F.cross_entropy(model(x), y).backward()
        assert x.grad is not None
        x = (x.detach() + step * x.grad.sign())
        x = torch.min(torch.max(x, x0 - eps), x0 + eps).clamp(0, 1)
    ours = pgd(model, x0, y, ThreatModel(), torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize('norm', ['Linf', 'L2'])
def test_random_start_is_uniform_in_the_ball(norm: str) -> None:
    """With a zero step only the start is left. P(|delta| <= t eps) is t for a coordinate, t^d for the L2 radius."""
    x0, y = torch.full((20000, 1, 1, 2), 0.5), torch.zeros(20000, dtype=torch.long)
    threat = ThreatModel(norm, Fraction(1, 10), Fraction(0), 1)
    x = pgd(Linear((1, 1, 2)), x0, y, threat, torch.Generator().manual_seed(0))
    delta = (x - x0).flatten(1) / 0.1
    u = delta.abs()[:, 0] if norm == 'Linf' else delta.norm(dim=1) ** 2
    grid = torch.linspace(0.1, 0.9, 9)
    found = (u[:, None] <= grid).float().mean(0)
    assert (found - grid).abs().max() < 0.015
    assert delta.mean(0).abs().max() < 0.02


def test_pgd_leaves_the_model_as_it_found_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(144, 5))
    model.train()
    model[1].eval()  # a mixed mode comes back as it was
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    x0, y = torch.rand(4, 3, 8, 8), torch.randint(5, (4,))
    pgd(model, x0, y, ThreatModel(steps=3))
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is not None and (p.grad == 7).all() and p.requires_grad for p in model.parameters())
    with torch.no_grad():  # a caller without gradients still gets an attack
        assert not torch.equal(pgd(model, x0, y, ThreatModel(steps=3, random_start=False)), x0)


def test_mode_comes_back_after_an_error() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 2)).train()
    with pytest.raises(RuntimeError, match='shapes'):
        pgd(model, torch.rand(2, 3, 2, 2), torch.zeros(2, dtype=torch.long), ThreatModel())
    assert model.training


@pytest.mark.parametrize('bad', [1.01, -0.01, float('nan'), 255.0])
def test_images_outside_the_box_are_refused(bad: float) -> None:
    x0 = torch.rand(2, 1, 4, 4)
    x0[1, 0, 2, 2] = bad
    with pytest.raises(ValueError, match=r'expected \[0, 1\]: divide by 255'):
        pgd(Linear((1, 4, 4)), x0, torch.zeros(2, dtype=torch.long), ThreatModel())


def test_a_sample_is_attacked_alike_whatever_its_batch() -> None:
    x0, y = torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.randint(3, (6,))
    model, threat = Linear((3, 8, 8), torch.float64), ThreatModel(random_start=False)
    whole = pgd(model, x0, y, threat)
    parts = torch.cat([pgd(model, x0[:1], y[:1], threat), pgd(model, x0[1:], y[1:], threat)])
    assert torch.equal(whole, parts)


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


def test_budget_used() -> None:
    x0 = torch.zeros(2, 1, 1, 2)
    x = torch.tensor([[3.0, -4.0], [0.0, 1.0]]).view(2, 1, 1, 2)
    assert budget_used(x, x0, 'Linf').tolist() == [4, 1]
    assert budget_used(x, x0, 'L2').tolist() == [5, 1]
