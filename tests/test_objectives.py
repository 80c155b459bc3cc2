"""Objectives against their formulas in numpy, and what surrounds them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_paf.attacks import ThreatModel, pgd
from timm_paf.objectives import OBJECTIVES, Loss, awp, has_overfitted, pgd_at, trades

N, CLASSES = 7, 5
CLASS_WEIGHTS = torch.rand(CLASSES, CLASSES, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
SOFT = {'hard': False, 'soft': True}


def attack(x0: Tensor, y: Tensor, loss: str = 'ce') -> Tensor:
    """Far enough away to make a difference, and another for another loss."""
    return 1 - x0 if loss == 'ce' else x0.flip(3)


def linear(scale: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES)).double()
    with torch.no_grad():
        model[1].weight.mul_(6 * scale)
    return model


def batch(soft: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x0 = torch.rand(N, 3, 2, 2, generator=generator, dtype=torch.float64)
    y = torch.arange(N) % CLASSES
    if soft:
        return x0, torch.rand(N, CLASSES, generator=generator, dtype=torch.float64).pow(3).softmax(1)
    return x0, y


class Counting(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.sizes = inner, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return self.inner(x)


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z)
    return e / e.sum(1, keepdims=True)


def _written_out(name: str, model: nn.Module, x0: Tensor, y: Tensor, beta: float, smoothing: float,
                 soft_labels: np.ndarray | None = None) -> float:
    """The papers' losses, in float64; IKL's soft labels have no gradient, so they may be given."""
    loss_of_attack = 'kl' if name in ('trades', 'ikl') else 'ce'
    with torch.no_grad():
        q, p = (_softmax(model(x).numpy()) for x in (x0, attack(x0, y, loss_of_attack)))
    labels = y.numpy() if y.ndim == 2 else np.eye(CLASSES)[y.numpy()]
    target = (1 - smoothing) * labels + smoothing / CLASSES
    true = labels.argmax(1)
    kl = (q * np.log(q / p)).sum(1)
    if name == 'trades':
        return float((-(target * np.log(q)).sum(1) + beta * kl).mean())
    if name == 'ikl':  # algorithm 1 of arXiv 2305.13948, over all pairs of classes
        with torch.no_grad():
            zs = [model(x).numpy() for x in (x0, attack(x0, y, 'kl'))]
        gaps = [z[:, :, None] - z[:, None, :] for z in zs]
        weights = labels @ CLASS_WEIGHTS.numpy()
        error = 0.25 * (weights[:, :, None] * weights[:, None, :] * (gaps[0] - gaps[1]) ** 2).sum((1, 2))
        return float((-(target * np.log(q)).sum(1) + 20 * error
                     - beta * ((q if soft_labels is None else soft_labels) * np.log(p)).sum(1)).mean())
    boost = -np.log(1.0001 - np.where(np.eye(CLASSES)[true] == 1, 0, p).max(1))
    loss = -(target * np.log(p)).sum(1)
    if name == 'mart':
        loss = loss + boost + beta * (q * np.log(q / (p + 1e-12))).sum(1) * (1 - (labels * q).sum(1))
    return float(loss.mean())


def objective(name: str) -> Loss:
    extra = {'class_weights': CLASS_WEIGHTS.float()} if name == 'ikl' else {}
    return functools.partial(OBJECTIVES[name].loss, **extra)


@pytest.mark.parametrize('soft', SOFT.values(), ids=SOFT)
@pytest.mark.parametrize('name', OBJECTIVES)
def test_losses_are_their_formulas(name: str, soft: bool) -> None:
    model, (x0, y) = linear(), batch(soft)
    for beta, smoothing in ((6.0, 0.0), (1.5, 0.2)):
        loss, _ = objective(name)(model, x0, y, attack, beta=beta, label_smoothing=smoothing)
        expected = _written_out(name, model, x0, y, beta, smoothing)
        assert loss.item() == pytest.approx(expected, rel=1e-5)  # logits are taken in float32
    loss, _ = objective(name)(model, x0, y, attack)
    beta = 4.0 if name == 'ikl' else 6.0
    assert loss.item() == pytest.approx(_written_out(name, model, x0, y, beta, 0.0), rel=1e-5)


@pytest.mark.parametrize('soft', SOFT.values(), ids=SOFT)
@pytest.mark.parametrize('name', OBJECTIVES)
def test_gradients_are_those_of_the_formulas(name: str, soft: bool) -> None:
    """Central differences of the numpy formulas: clean and adversarial output, and the weight of MART, all count."""
    model, (x0, y) = linear(0.5), batch(soft)
    objective(name)(model, x0, y, attack, beta=6.0)[0].backward()
    weight = model[1].weight
    with torch.no_grad():
        soft_labels = _softmax(model(x0).numpy())
    for index in ((0, 0), (1, 5), (3, 11), (4, 2)):
        sides = []
        for change in (1e-5, -1e-5):
            with torch.no_grad():
                weight[index] += change
                sides.append(_written_out(name, model, x0, y, 6.0, 0.0, soft_labels))
                weight[index] -= change
        assert weight.grad[index].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize('name', OBJECTIVES)
def test_the_model_runs_once_and_the_counts_are_right(name: str) -> None:
    model, (x0, y) = Counting(linear()), batch()
    x_adv = attack(x0, y, 'kl' if name in ('trades', 'ikl') else 'ce')
    with torch.no_grad():
        y[:3] = model.inner(x_adv)[:3].argmax(1)  # three that are right
        clean, adv = ((model.inner(x).argmax(1) == y).sum() for x in (x0, x_adv))
    assert clean != adv
    for labels in (y, F.one_hot(y, CLASSES).double()):
        model.sizes.clear()
        loss, counts = OBJECTIVES[name].loss(model, x0, labels, attack)
        shares = name in ('trades', 'mart', 'ikl')
        assert model.sizes == [2 * N if shares else N]
        assert counts.keys() - {'class_sums'} == ({'adv_correct', 'clean_correct'} if shares else {'adv_correct'})
        assert counts['adv_correct'].sum() == adv >= 3
        assert not shares or counts['clean_correct'].sum() == clean
        assert loss.ndim == 0
        assert loss.requires_grad
        assert not any(count.requires_grad for count in counts.values())
        model.sizes.clear()
        other, _ = OBJECTIVES[name].loss(model, x0, labels, attack, separate=True)
        assert model.sizes == ([N, N] if shares else [N])
        torch.testing.assert_close(other, loss)  # a linear model has no BatchNorm


def test_trades_without_beta_is_clean_training() -> None:
    model, (x0, y) = linear(), batch()
    loss, _ = trades(model, x0, y, attack, beta=0)
    torch.testing.assert_close(loss, F.cross_entropy(model(x0).float(), y))


def test_ikl_counts_probabilities_by_class() -> None:
    model, (x0, y) = linear(), batch()
    _, counts = OBJECTIVES['ikl'].loss(model, x0, y, attack, temperature=3.0)
    with torch.no_grad():
        probabilities = (model(x0) / 3).softmax(1)
    for label in range(CLASSES):
        torch.testing.assert_close(counts['class_sums'][label].double(), probabilities[y == label].sum(0))


def test_mart_is_bounded_where_probabilities_round_to_one() -> None:
    """The authors' 1.0001 - p, with a gradient of 1 and not of 2 for an image that is hopeless."""
    x0, y = torch.zeros(1, 3, 1, 1), torch.tensor([0])
    model = nn.Flatten()
    x_adv = torch.tensor([0.0, 200.0, -50.0]).view(1, 3, 1, 1).requires_grad_()
    loss, _ = OBJECTIVES['mart'].loss(model, x0, y, lambda *_: x_adv, beta=0)
    assert loss.item() == pytest.approx(200 - np.log(1e-4), rel=1e-3)  # -log p_0 and -log(1.0001 - p_1)
    loss.backward()
    assert x_adv.grad is not None
    torch.testing.assert_close(x_adv.grad.flatten(), torch.tensor([-1.0, 1.0, 0.0]))


def test_fgsm_rs_is_the_objective_of_pgd() -> None:
    """One step of 1.25 eps from a uniform start, which Wong et al. clip to the ball and the box."""
    assert OBJECTIVES['fgsm-rs'].loss is OBJECTIVES['n-fgsm'].loss is pgd_at
    model, (x0, y) = linear(), batch()
    eps = 8 / 255
    start = x0 + (torch.rand(x0.shape, generator=torch.Generator().manual_seed(3), dtype=x0.dtype) * 2 - 1) * eps
    start = start.clamp(0, 1).requires_grad_()
    grad, = torch.autograd.grad(F.cross_entropy(model(start), y), start)
    x_adv = (x0 + (start.detach() + 1.25 * eps * grad.sign() - x0).clamp(-eps, eps)).clamp(0, 1)
    threat = ThreatModel(step='10/255', steps=1)  # type: ignore[arg-type]
    loss, _ = OBJECTIVES['fgsm-rs'].loss(
        model, x0, y, lambda x, y: pgd(model, x, y, threat, torch.Generator().manual_seed(3)))
    assert loss.item() == pytest.approx(F.cross_entropy(model(x_adv), y).item(), rel=1e-6)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, CLASSES)).double().train()


def test_awp_on_a_linear_layer() -> None:
    """loss = sum of c (W x + b): the gradient is the outer product of c and x."""
    layer = nn.Linear(3, 2).double()
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for p in layer.parameters():
        p.grad = torch.full_like(p, 7.0)
    x, c = torch.tensor([1.0, -2, 0.5]).double(), torch.tensor([3.0, -1]).double()
    direction = torch.outer(c, x)
    for scale in (1.0, 1e-12):  # which does not matter
        with torch.no_grad(), awp(layer, lambda: scale * (c * layer(x)).sum(), gamma=0.01):  # noqa: B023
            expected = before['weight'] + 0.01 * before['weight'].norm() * direction / direction.norm()
            torch.testing.assert_close(layer.weight, expected, rtol=1e-12, atol=0)
            assert torch.equal(layer.bias, before['bias'])
        assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters())
    assert all((p.grad == 7).all() for p in layer.parameters())


def test_awp_trains_on_the_worse_weights_and_restores_the_rest() -> None:
    model, (x0, y) = small_net(), batch()
    model[3].weight.requires_grad_(False)

    def loss_fn() -> Tensor:
        return F.cross_entropy(model(x0), y)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    with awp(model, loss_fn, 0.05):
        for name in ('1.running_mean', '1.running_var', '1.num_batches_tracked', '1.weight', '3.bias'):
            assert torch.equal(model.state_dict()[name], before[name]), name
        assert torch.equal(model[3].weight, before['3.weight'])  # which does not learn
        moved = (model[0].weight - before['0.weight']).norm() / before['0.weight'].norm()
        assert moved.item() == pytest.approx(0.05)
        assert not any(p.grad is not None for p in model.parameters())
        worse = loss_fn()
        worse.backward()
    gradient = model[0].weight.grad.clone()
    assert model[1].num_batches_tracked == 1  # of the pass inside
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name
    model.zero_grad()
    loss = loss_fn()
    loss.backward()
    assert worse > loss
    assert not torch.allclose(gradient, model[0].weight.grad)


@pytest.mark.parametrize('where', ['loss_fn', 'inside'])
def test_awp_restores_after_an_error(where: str) -> None:
    model, (x0, y) = small_net(), batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loss_fn() -> Tensor:
        loss = F.cross_entropy(model(x0), y)
        if where == 'loss_fn':
            raise KeyboardInterrupt
        return loss

    def step() -> None:
        with awp(model, loss_fn):
            assert not torch.equal(model[0].weight, before['0.weight'])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_awp_leaves_alone_what_has_no_gradient() -> None:
    model = nn.ModuleDict({'used': nn.Linear(3, 2), 'idle': nn.Linear(3, 2)})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with awp(model, lambda: 0 * model['used'](torch.ones(3)).sum(), 0.1):
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match=r'gamma is -0\.1; expected at least 0'), awp(model, torch.tensor, -0.1):
        pass


def _process(rank: int, directory: str) -> None:
    torch.distributed.init_process_group('gloo', init_method=f'file://{directory}/store', rank=rank, world_size=2)
    model, (x0, y) = small_net(), batch()
    wrapped = nn.parallel.DistributedDataParallel(model)
    x0, y = x0[rank * 3:rank * 3 + 3], y[rank * 3:rank * 3 + 3]
    for name in OBJECTIVES:
        with awp(model, lambda: F.cross_entropy(model(x0), y), 0.1):
            if name == 'trades':
                torch.save(model[3].weight.detach().clone(), f'{directory}/{rank}.pt')
            OBJECTIVES[name].loss(wrapped, x0, y, attack)[0].backward()
    torch.save([p.grad for p in model.parameters()], f'{directory}/grads{rank}.pt')
    torch.distributed.destroy_process_group()


def test_processes_hold_the_same_weights(tmp_path: Path) -> None:
    """Two of them: awp's gradient is that of both, and DDP takes every objective's backward."""
    spawn: Callable[..., None] = torch.multiprocessing.spawn
    spawn(_process, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    assert torch.equal(one, other)
    model, (x0, y) = small_net(), batch()
    weight = model[3].weight
    (F.cross_entropy(model(x0[:3]), y[:3]) + F.cross_entropy(model(x0[3:6]), y[3:6])).backward()
    torch.testing.assert_close(one, weight + 0.1 * weight.norm() * weight.grad / weight.grad.norm())
    for mine, theirs in zip(*(torch.load(tmp_path / f'grads{rank}.pt') for rank in (0, 1))):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(('history', 'expected'), [
    ([], False),
    ([(0.1, 0.1)], False),
    ([(0.35, 0.3), (0.45, 0.4), (0.5, 0.44), (0.49, 0.43)], False),
    ([(0.35, 0.3), (0.45, 0.4), (0.85, 0.01)], True),  # as in Wong et al., figure 5
    ([(0.35, 0.3), (0.45, 0.4), (0.44, 0.19)], True),
    ([(0.35, 0.3), (0.45, 0.4), (0.85, 0.21)], False),
    ([(0.35, 0.3), (0.45, 0.4), (0.1, 0.1)], False),  # diverged: guessing
    ([(0.15, 0.0)], False),  # never was robust
    ([(0.45, 0.4), (0.85, 0.01), (0.5, 0.42)], False),  # recovered
    ([(35.0, 30.0), (45.0, 40.0), (85.0, 1.0)], True)])  # percents
def test_overfitting_to_the_training_attack_is_seen(history: list[tuple[float, float]], expected: bool) -> None:
    assert has_overfitted(history) is expected
