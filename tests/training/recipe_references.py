"""The training steps of the papers, written out in plain torch after the authors' programs, which the recipes name.

Each says which mode each forward pass runs in, what BatchNorm sees and what is clipped. `Reference` has the state that
a program keeps: a network built as `recipe_papers` says it, an optimizer with its momenta, and a schedule. Networks and
images are float64, where no gradient is so near to 0 that rounding decides its sign, and with it a pixel.
"""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from recipe_papers import CIFAR10, NETWORKS, advance, family, optimizer_of
from torch import Tensor, nn

from timm_paf.data import derive_seed
from timm_paf.training import Trainer

SEED = 5
OURS = 'normalize.'
"""Names of what our network normalises by, which here is no part of the network."""


class Front(nn.Module):
    """A network behind the normalisation of its program, whose losses are computed in float32, as ours are."""

    def __init__(self, inner: nn.Module, normalised: bool) -> None:
        super().__init__()
        self.inner, self.normalised = inner, normalised

    def forward(self, x: Tensor) -> Tensor:
        if self.normalised:
            mean, std = (torch.tensor(each, dtype=torch.float32).double().view(3, 1, 1) for each in CIFAR10)
            x = (x - mean) / std
        return self.inner(x).float()


class Reference:
    """The state that an authors' program has: network, momenta, the learning rate of the coming step.

    It begins at the weights of ``run`` and at its step; images and noise of each step are those of ``run``, too.
    """

    def __init__(self, run: Trainer, name: str, epochs: int | None = None):
        self.run, self.name, network = run, name, NETWORKS[family(name)]
        self.net = timm.create_model(network.model, num_classes=10, **network.args).double()
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = network.bn_momentum
        self.model = Front(self.net, network.normalised)
        self.follow()
        self.sgd, self.schedule = optimizer_of(name, self.net, run.batches.steps_per_epoch, epochs)
        advance(self.sgd, self.schedule, run.step)

    def follow(self) -> None:
        """Takes the weights and statistics of the run, so that the next step begins at the same ones to the bit."""
        self.net.load_state_dict({key: value for key, value in self.run.unwrapped.state_dict().items()
                                  if not key.startswith(OURS)})

    def begin(self) -> None:
        """Takes images and noise of the coming step."""
        self.x, self.y = self.run.batch()
        self.noise = torch.Generator().manual_seed(derive_seed(SEED, 2, self.run.step, 0))
        self.model.train()
        self.net.zero_grad()

    def descend(self) -> None:
        self.sgd.step()
        self.schedule.step()

    def uniform(self, radius: float) -> Tensor:
        return torch.empty_like(self.x).uniform_(-radius, radius, generator=self.noise)

    def normal(self) -> Tensor:
        return 0.001 * torch.empty_like(self.x).normal_(generator=self.noise)

    def linf(self, x_adv: Tensor, loss: Callable[[Tensor], Tensor], step: float, eps: float, steps: int) -> Tensor:
        """The loop that all of them share: an ascent by signs, the ball, the box."""
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            grad, = torch.autograd.grad(loss(self.model(x_adv)), x_adv)
            x_adv = x_adv.detach() + step * grad.sign()
            x_adv = torch.min(torch.max(x_adv, self.x - eps), self.x + eps).clamp(0, 1)
        return x_adv.detach()

    def statistics(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.net.named_buffers()}

    def put_back(self, statistics: dict[str, Tensor]) -> None:
        for name, value in self.net.named_buffers():
            value.copy_(statistics[name])


def _divergence(adv: Tensor, clean: Tensor) -> Tensor:
    # Near the clean images, where TRADES starts, its gradient is a small difference: rounding has to be ours.
    return F.kl_div(F.log_softmax(adv, 1), F.log_softmax(clean, 1), reduction='batchmean', log_target=True)


def paper(ref: Reference) -> Tensor:
    """github.com/dash29/robust_paf, trainers.madry and utils_adv.pgd_whitebox."""
    with torch.no_grad():
        ref.model(ref.x)
    ref.model.eval()
    x_adv = ref.linf(ref.x + ref.uniform(0.031), lambda out: F.cross_entropy(out, ref.y), 0.0078, 0.031, 10)
    ref.model.train()
    loss = F.cross_entropy(ref.model(x_adv), ref.y)
    (loss + 10 * ref.net.act.beta.abs().sum()).backward()
    nn.utils.clip_grad_norm_(ref.net.act.beta, 0.01)
    return loss


def paper_trades(ref: Reference) -> Tensor:
    """The same program, trainers.adv: clip of 0.1, normal start, clean and adversarial images apart."""
    ref.model.eval()
    with torch.no_grad():
        clean = ref.model(ref.x)
    x_adv = ref.linf(ref.x + ref.normal(), lambda out: _divergence(out, clean), 0.0078, 0.031, 10)
    ref.model.train()
    clean, adv = ref.model(ref.x), ref.model(x_adv)
    loss = F.cross_entropy(clean, ref.y) + 6 * _divergence(adv, clean)
    (loss + 10 * ref.net.act.beta.abs().sum()).backward()
    nn.utils.clip_grad_norm_(ref.net.act.beta, 0.1)
    return loss


def paper_l2(ref: Reference) -> Tensor:
    """The same program in L2; its start alone is ours, uniform in the ball and not on its surface."""
    with torch.no_grad():
        ref.model(ref.x)
    ref.model.eval()
    direction = torch.empty_like(ref.x).normal_(generator=ref.noise)
    radius = 0.5 * torch.empty(len(ref.x), dtype=torch.float64).uniform_(generator=ref.noise) ** (1 / 3072)
    x_adv = ref.x + direction * (radius / direction.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    for _ in range(10):
        x_adv = x_adv.detach().requires_grad_()
        grad, = torch.autograd.grad(F.cross_entropy(ref.model(x_adv), ref.y), x_adv)
        moved = x_adv.detach() + 0.075 * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1) - ref.x
        x_adv = (ref.x + moved.renorm(p=2, dim=0, maxnorm=0.5)).clamp(0, 1)
    ref.model.train()
    loss = F.cross_entropy(ref.model(x_adv.detach()), ref.y)
    (loss + 10 * ref.net.act.beta.abs().sum()).backward()
    nn.utils.clip_grad_norm_(ref.net.act.beta, 0.01)
    return loss


def wang2023(ref: Reference) -> Tensor:
    """github.com/wzekai99/DM-Improves-AT, gowal21uncovering/utils/trades.py: in train mode, without statistics."""
    before = ref.statistics()
    with torch.no_grad():
        clean = ref.model(ref.x)
    eps = 8 / 255
    x_adv = ref.linf((ref.x + ref.uniform(eps)).clamp(0, 1), lambda out: _divergence(out, clean), 2 / 255, eps, 10)
    ref.put_back(before)
    clean, adv = ref.model(ref.x), ref.model(x_adv)
    loss = F.cross_entropy(clean, ref.y, label_smoothing=0.1) + 5 * _divergence(adv, clean)
    loss.backward()
    return loss


def locuslab(ref: Reference, step: float, steps: int) -> Tensor:
    """github.com/locuslab/robust_overfitting, train_cifar.py, but for the last forward pass of its attack, and
    github.com/locuslab/fast_adversarial, CIFAR10/train_fgsm.py: all of it in train mode."""
    eps = 8 / 255
    x_adv = ref.linf((ref.x + ref.uniform(eps)).clamp(0, 1), lambda out: F.cross_entropy(out, ref.y), step, eps, steps)
    loss = F.cross_entropy(ref.model(x_adv), ref.y)
    loss.backward()
    return loss


def _perturbed(ref: Reference, loss: Callable[[], Tensor], gamma: float) -> Tensor:
    """github.com/csdongxian/AWP, utils_awp.py: a step uphill, scaled to each weight's norm; then taken back."""
    statistics = ref.statistics()
    grads = torch.autograd.grad(loss(), list(ref.net.parameters()))
    ref.put_back(statistics)
    kept = [p.detach().clone() for p in ref.net.parameters()]
    with torch.no_grad():
        for p, grad in zip(ref.net.parameters(), grads):
            if p.ndim > 1:
                p += gamma * p.norm() / (grad.norm() + 1e-20) * grad
    found = loss()
    found.backward()
    with torch.no_grad():
        for p, before in zip(ref.net.parameters(), kept):
            p.copy_(before)
    return found


def wu2020(ref: Reference, perturbs: bool) -> Tensor:
    """github.com/csdongxian/AWP, trades_AWP/train_trades_cifar.py."""
    ref.model.eval()
    with torch.no_grad():
        clean = ref.model(ref.x)
    x_adv = ref.linf(ref.x + ref.normal(), lambda out: _divergence(out, clean), 2 / 255, 8 / 255, 10)
    ref.model.train()

    def loss() -> Tensor:
        clean, adv = ref.model(ref.x), ref.model(x_adv)
        return F.cross_entropy(clean, ref.y) + 6 * _divergence(adv, clean)

    if perturbs:
        return _perturbed(ref, loss, 0.005)
    found = loss()
    found.backward()
    return found


def mart(ref: Reference) -> Tensor:
    """github.com/YisenWang/MART, mart.py, with the attack of `wu2020` and the cross-entropy as its loss."""
    ref.model.eval()
    x_adv = ref.linf(ref.x + ref.normal(), lambda out: F.cross_entropy(out, ref.y), 2 / 255, 8 / 255, 10)
    ref.model.train()
    clean, adv = ref.model(ref.x), ref.model(x_adv)
    p, q = F.softmax(adv, 1), F.softmax(clean, 1)
    first, second = p.argsort(1, descending=True)[:, :2].T
    wrong = torch.where(first == ref.y, second, first)
    boosted = F.cross_entropy(adv, ref.y) + F.nll_loss((1.0001 - p + 1e-12).log(), wrong)
    doubt = 1.0000001 - q.gather(1, ref.y[:, None])[:, 0]
    loss = boosted + 6 * (F.kl_div((p + 1e-12).log(), q, reduction='none').sum(1) * doubt).mean()
    loss.backward()
    return loss


def fastat_ema(ref: Reference) -> Tensor:
    """github.com/fzjcdt/FastAT_Benchmark, fast_at/pgd_at.py with torchattacks' PGD, which attacks in eval mode."""
    eps = 8 / 255
    ref.model.eval()
    x_adv = ref.linf((ref.x + ref.uniform(eps)).clamp(0, 1), lambda out: F.cross_entropy(out, ref.y), 2 / 255, eps, 10)
    ref.model.train()
    loss = F.cross_entropy(ref.model(x_adv), ref.y, label_smoothing=0.4)
    loss.backward()
    return loss


def fastat_nfgsm(ref: Reference) -> Tensor:
    """fast_at/n_fgsm.py of the same program: labels are smoothed in the attack too."""
    eps = 8 / 255
    x_adv = (ref.x + ref.uniform(2 * eps)).clamp(0, 1).requires_grad_()
    grad, = torch.autograd.grad(F.cross_entropy(ref.model(x_adv), ref.y, label_smoothing=0.4), x_adv)
    x_adv = (x_adv.detach() + eps * grad.sign()).clamp(0, 1)
    loss = F.cross_entropy(ref.model(x_adv), ref.y, label_smoothing=0.4)
    loss.backward()
    return loss


def ikl2023(
        ref: Reference, eps: float, weights: Tensor | None, sums: Tensor, perturbs: bool) -> Tensor:
    """github.com/jiequancui/DKL, DKLv1/Adv-training-dkl/train_dkl_cifar10.py, but for the order of the two passes.

    It adds what weighs the next epoch to ``sums``: the class probabilities at temperature 4, by class.
    """
    ref.model.eval()
    with torch.no_grad():
        clean = ref.model(ref.x)
    x_adv = ref.linf(ref.x + ref.normal(), lambda out: _divergence(out, clean), eps / 2, eps, 5)
    ref.model.train()
    labels = F.one_hot(ref.y, 10).double()
    of_class = (labels @ (torch.full((10, 10), 0.1, dtype=torch.float64) if weights is None else weights)).float()
    pairs = of_class[:, :, None] @ of_class[:, None, :]
    seen: list[Tensor] = []

    def loss() -> Tensor:
        clean, adv = ref.model(ref.x), ref.model(x_adv)
        seen.append(clean.detach())
        gaps = [z[:, :, None] - z[:, None, :] for z in (clean, adv)]
        error = 0.25 * ((gaps[0] - gaps[1]) ** 2 * pairs).sum() / len(ref.x)
        soft = -(F.softmax(clean, 1).detach() * F.log_softmax(adv, 1)).sum(1).mean()
        return F.cross_entropy(clean, ref.y) + 20 * error + 4 * soft

    found = _perturbed(ref, loss, 0.005) if perturbs else loss()
    if not perturbs:
        found.backward()
    sums += labels.T @ F.softmax(seen[-1] / 4, 1).double()
    return found
