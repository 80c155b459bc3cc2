"""A step of each recipe that carries a paper's name, against that paper's step written out in plain torch.

The steps here follow the authors' programs, which the recipes name: which mode each forward pass runs in, what
BatchNorm sees, what is clipped, decayed and averaged. The network is ours at a small size, as its functions have tests
of their own. Networks and images are float64, where no gradient is so near to 0 that rounding decides its sign, and
with it a pixel.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import ROOT
from torch import Tensor, nn

from timm_paf.data import Batches, ImageSet, derive_seed
from timm_paf.data.steps import epoch_steps
from timm_paf.files import read_json
from timm_paf.training import Trainer
from timm_paf.training.config import check, parse, shipped_recipes
from timm_paf.training.optimization import learning_rate

BATCH, STEPS_PER_EPOCH = 8, 4
SEED = 5


class DoubleBatches(Batches):
    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(step)
        return x.double(), y


class FloatLogits(nn.Module):
    """A network whose losses are computed in float32, as ours are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).float()


def trainer(name: str, at: int, **changes: Any) -> Trainer:
    """A run of a recipe with a small network and images, before a step of its first epochs or of later ones."""
    recipe = check(parse(['--config', name, '--output', 'x', '--seed', str(SEED)]))
    act = recipe.model.rpartition('_')[2]
    small = 'preact_resnet18' if recipe.model.startswith('preact') else 'resnet18' if recipe.model.startswith(
        'resnet') else 'wrn10_1'
    args = {'base_width': 8} if 'resnet18' in small else {}
    recipe = dataclasses.replace(
        recipe, batch_size=BATCH, model=f'{small}_{act}', val=0, val_attack=None, channels_last=False, compile=False,
        model_kwargs={**recipe.model_kwargs, **args}, **changes)
    generator = torch.Generator().manual_seed(0)
    n = BATCH * STEPS_PER_EPOCH
    images = torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator)
    images[::2] = images[::2] // 200 * 255  # many at the ends of the range, where a start is clipped
    data = ImageSet('made', images, torch.randint(10, (n,), generator=generator), 10, pad=0, flip=False)
    torch.manual_seed(recipe.seed)
    model = timm.create_model(recipe.model, num_classes=10, **recipe.model_kwargs).double()
    run = Trainer(recipe, model, DoubleBatches(data, BATCH, recipe.seed, 'cpu'), Accelerator(cpu=True))
    run.step = at
    return run


class Reference:
    """The state that an authors' program has: network, momenta, average."""

    def __init__(self, run: Trainer):
        self.net, self.recipe = copy.deepcopy(run.unwrapped), run.recipe
        self.model = FloatLogits(self.net)
        self.x, self.y = run.batch()
        self.noise = torch.Generator().manual_seed(derive_seed(SEED, 2, run.step, 0))
        self.model.train()

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
    radius = 0.5 * torch.empty(BATCH, dtype=torch.float64).uniform_(generator=ref.noise) ** (1 / 3072)
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


def ikl2023(ref: Reference, eps: float, weights: Tensor | None, perturbs: bool) -> Tensor:
    """github.com/jiequancui/DKL, DKLv1/Adv-training-dkl/train_dkl_cifar10.py, but for the order of the two passes."""
    ref.model.eval()
    with torch.no_grad():
        clean = ref.model(ref.x)
    x_adv = ref.linf(ref.x + ref.normal(), lambda out: _divergence(out, clean), eps / 2, eps, 5)
    ref.model.train()
    of_class = torch.full((BATCH, 10), 0.1) if weights is None else (F.one_hot(ref.y, 10).double() @ weights).float()
    pairs = of_class[:, :, None] @ of_class[:, None, :]

    def loss() -> Tensor:
        clean, adv = ref.model(ref.x), ref.model(x_adv)
        gaps = [z[:, :, None] - z[:, None, :] for z in (clean, adv)]
        error = 0.25 * ((gaps[0] - gaps[1]) ** 2 * pairs).sum() / BATCH
        soft = -(F.softmax(clean, 1).detach() * F.log_softmax(adv, 1)).sum(1).mean()
        return F.cross_entropy(clean, ref.y) + 20 * error + 4 * soft

    if perturbs:
        return _perturbed(ref, loss, 0.005)
    found = loss()
    found.backward()
    return found


def _descend(
        ref: Reference, lr: float, nesterov: bool = False, no_decay: Callable[[str], bool] = lambda _: False,
        momentum: float = 0.9) -> None:
    """SGD's first step, with decay 5e-4."""
    groups = [{'params': [p for name, p in ref.net.named_parameters() if no_decay(name) is skip],
               'weight_decay': 0.0 if skip else 5e-4} for skip in (False, True)]
    torch.optim.SGD([group for group in groups if group['params']], lr, momentum=momentum, nesterov=nesterov).step()


def compare(run: Trainer, ref: Reference, loss: Tensor) -> None:
    """The loss, each gradient, each weight and each statistic after the step."""
    assert run.metric_sums['loss'].item() / BATCH == pytest.approx(loss.item(), rel=1e-5)
    for name, p in run.unwrapped.named_parameters():
        expected = ref.net.get_parameter(name)
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=f'gradient of {name}')
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6, msg=name)
    for name, value in run.unwrapped.named_buffers():
        torch.testing.assert_close(value, ref.net.get_buffer(name), rtol=1e-5, atol=1e-6, msg=name)


LAST = 4 * STEPS_PER_EPOCH + 1  # a step past the warm-up of these tests' shortened runs


TRADES = {'objective': 'trades', 'paf_clip': 0.1, 'attack_start': 'normal', 'separate_forwards': True,
          'clean_pass': 'none'}
"""What the header of paper_linf names for the paper's TRADES."""


@pytest.mark.parametrize(('name', 'step', 'changes'), [
    ('paper_linf', paper, {}), ('paper_linf_synthetic', paper, {}), ('paper_linf', paper_trades, TRADES),
    ('paper_l2', paper_l2, {}), ('paper_l2_synthetic', paper_l2, {})])
def test_the_papers_steps(name: str, step: Callable[[Reference], Tensor], changes: dict[str, Any]) -> None:
    run = trainer(name, 0, **changes)
    ref = Reference(run)
    loss = step(ref)
    _descend(ref, 0.1, nesterov=True)
    run.train_step()
    compare(run, ref, loss)


@pytest.mark.parametrize('at', [0, 3, LAST])
def test_a_step_of_wang2023(at: int) -> None:
    run = trainer('wang2023_1m', at, epochs=10, pct_start=0.1)  # 40 steps, of which the rate rises in 4
    ref = Reference(run)
    average = copy.deepcopy(ref.net)
    for norm in (module for module in ref.net.modules() if isinstance(module, nn.BatchNorm2d)):
        assert norm.momentum == 0.01
    loss = wang2023(ref)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.2, momentum=0.9)  # its momentum goes round too
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=41, pct_start=5 / 41)  # its peak: step 4
    for _ in range(at):
        optimizer.step()
        schedule.step()
    assert run.learning_rate() == pytest.approx(schedule.get_last_lr()[0], abs=1e-6)
    norms = {f'{name}.{key}' for name, module in ref.net.named_modules() if isinstance(module, nn.BatchNorm2d)
             for key, _ in module.named_parameters()}
    _descend(ref, run.learning_rate(), nesterov=True, no_decay=norms.__contains__,
             momentum=optimizer.param_groups[0]['momentum'])
    run.train_step()
    compare(run, ref, loss)
    assert run.optimizer.param_groups[0]['momentum'] == pytest.approx(optimizer.param_groups[0]['momentum'], abs=1e-6)
    done = at + 1  # ema_update of watrain.py
    since = done - 4
    decay = min(0.995, (1 + since) / (10 + since)) * (done >= 4)
    assert run.ema is not None
    for p, mean, new in zip(run.ema.module.parameters(), average.parameters(), ref.net.parameters()):
        torch.testing.assert_close(p, decay * mean + (1 - decay) * new, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(run.ema.module.buffers(), ref.net.buffers()):  # update_bn
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('name', ['rice2020', 'wong2020_fast', 'idbh2023'])
def test_a_step_of_one_in_train_mode(name: str) -> None:
    run = trainer(name, 2 if name == 'wong2020_fast' else 0, aa=None)
    ref = Reference(run)
    if name == 'idbh2023':  # github.com/TreeLLi/DA-Alone-Improves-AT, but for the start of its attack
        with torch.no_grad():
            ref.model(ref.x)
    loss = locuslab(ref, 10 / 255, 1) if name == 'wong2020_fast' else locuslab(ref, 2 / 255, 10)
    lr = 0.2 * 2 / (15 * STEPS_PER_EPOCH / 2) if name == 'wong2020_fast' else 0.1
    _descend(ref, lr)
    if name == 'rice2020':
        with torch.no_grad():
            ref.model(ref.x)
    run.train_step()
    compare(run, ref, loss)


@pytest.mark.parametrize(('epoch', 'lr'), [(0, 0.1), (8, 0.1), (9, 0.1), (98, 0.1), (99, 0.01), (149, 0.001)])
def test_a_step_of_wu2020(epoch: int, lr: float) -> None:
    """Their epochs are counted from 1: AWP from the tenth, a lower rate from the hundredth."""
    run = trainer('wu2020_trades_awp', epoch * STEPS_PER_EPOCH)
    ref = Reference(run)
    loss = wu2020(ref, epoch + 1 >= 10)
    _descend(ref, lr)
    run.train_step()
    compare(run, ref, loss)


@pytest.mark.parametrize('name', ['fastat_ema', 'fastat_nfgsm'])
def test_steps_of_the_fastat_benchmark(name: str) -> None:
    run = trainer(name, 0)
    ref = Reference(run)
    loss = fastat_ema(ref) if name == 'fastat_ema' else fastat_nfgsm(ref)
    _descend(ref, 0.1 / 25)
    run.train_step()
    compare(run, ref, loss)
    assert run.ema is not None
    kept = [value.clone() for value in run.ema.module.state_dict().values()]
    for ours, first in zip(kept, run.unwrapped.state_dict().values()):
        assert torch.equal(ours, first)  # the average begins at the weights of the first step
    run.train_step()
    for ours, before, new in zip(run.ema.module.state_dict().values(), kept, run.unwrapped.state_dict().values()):
        if ours.is_floating_point():  # running statistics too
            torch.testing.assert_close(ours, 0.9995 * before + 0.0005 * new)


@pytest.mark.parametrize('epoch', [0, 9])
def test_steps_of_ikl2023(epoch: int) -> None:
    """Two epochs of it: class weights of the first weigh the second."""
    run = trainer('ikl2023', epoch * STEPS_PER_EPOCH)
    weights = None
    for _ in range(2):
        ref = Reference(run)
        loss = ikl2023(ref, 8 / 255 * (run.step + 1) / (200 * STEPS_PER_EPOCH), weights, epoch + 1 >= 10)
        rate, momenta = run.learning_rate(), copy.deepcopy(run.optimizer.optimizer.state_dict()['state'])
        counted = torch.zeros(10, 10)
        for step in range(STEPS_PER_EPOCH):
            run.metric_sums['loss'].zero_()
            if step == 0:
                run.train_step()
                optimizer = torch.optim.SGD(ref.net.parameters(), rate, momentum=0.9, weight_decay=5e-4)
                for p, state in zip(ref.net.parameters(), momenta.values()):
                    optimizer.state[p]['momentum_buffer'] = state['momentum_buffer'].clone()
                optimizer.step()
                compare(run, ref, loss)
            else:
                run.train_step()
        counted = run.gradients.class_sums['sums'].clone()
        run.end_epoch()
        weights = counted / counted.sum(1, keepdim=True).clamp_min(1e-12)
        assert run.gradients.class_weights is not None
        torch.testing.assert_close(run.gradients.class_weights, weights)
        torch.testing.assert_close(run.gradients.class_weights.sum(1), (counted.sum(1) > 0).double())


def test_every_recipe_of_a_paper_has_its_step_here() -> None:
    said = {name for name, path in shipped_recipes().items() if 'test_recipe_steps' in path.read_text()}
    assert said == {'paper_linf', 'paper_linf_synthetic', 'paper_l2', 'paper_l2_synthetic', 'wang2023_1m', 'rice2020',
                    'wong2020_fast', 'wu2020_trades_awp', 'fastat_ema', 'fastat_nfgsm', 'ikl2023', 'idbh2023'}
    papers = {name for name, path in shipped_recipes().items() if 'arxiv.org' in path.read_text()}
    # those of ImageNet are the standard PGD step, and their headers say what else differs; the others are ours
    assert papers - said == {'salman2020_imagenet', 'debenedetti2022_imagenet', 'singh2023_imagenet', 'finetune_paf',
                             'robustify', 'study_resnet18_w8'}


def test_an_epoch_of_the_paper_has_196_steps() -> None:
    assert not check(parse(['--config', 'paper_linf', '--output', 'x'])).drop_last
    assert epoch_steps(50_000, 256, 1, False) == (196, 80)


def test_the_figures_of_headers() -> None:
    """By how much a rate that changes by step and one that changes by epoch differ; initial weights; averages."""
    for name, epochs, pct_start, steps, rising, after in (
            ('wang2023_1m', 400, 0.025, 98, 0.018, 0.001), ('fastat_ema', 100, 0.3, 383, 0.003, 0.002)):
        recipe = check(parse(['--config', name, '--output', 'x']))
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1, momentum=0.9)
        theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=epochs, pct_start=pct_start)
        apart = []
        for epoch in range(epochs):
            now = theirs.get_last_lr()[0]
            apart.append(max(abs(learning_rate(recipe, epoch * steps + step, steps, epochs * steps) - now)
                             for step in (0, steps - 1)))
            optimizer.step()
            theirs.step()
        peak = round(pct_start * epochs)
        assert max(apart[:peak]) == pytest.approx(rising, abs=5e-4), name
        assert max(apart[peak:]) == pytest.approx(after, abs=5e-4), name
    ratios = []
    for shape in ((3, 64), (64, 64), (64, 128)):
        torch.manual_seed(0)
        conv = nn.Conv2d(*shape, 3, bias=False)
        default = conv.weight.std().item()
        nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
        ratios.append(conv.weight.std().item() / default)
    assert [1 / ratios[0], *ratios[1:]] == pytest.approx([1.9, 2.4, 1.7], rel=0.05)
    by_step = 0.9 ** (128 / 50_000)  # of an average of the ends of epochs
    assert by_step == pytest.approx(0.99973, abs=5e-6)


def test_the_table_of_steps_is_its_record() -> None:
    """hub/recipes/README.md against the steps that were done beside the authors' functions."""
    table = (ROOT / 'hub' / 'recipes' / 'README.md').read_text()
    for row in read_json(ROOT / 'tests' / 'benchmarks' / 'results' / 'official.json')['steps']:
        plain, now = row['plain'], row['now']
        figures = (f'| {plain["pixels_apart"]:.0%}, {plain["gradient_apart"]:.0%} | {now["pixels_apart"]:.0%}, '
                   f'{now["gradient_apart"]:.0e}, {now["weights_apart"]:.0e} |')
        assert any(row['recipe'] in line and figures in line for line in table.splitlines()), row['recipe']
        if row['recipe'] not in ('paper_l2', 'idbh2023'):  # whose attacks start elsewhere
            assert now['pixels_apart'] == 0
            assert now['gradient_apart'] < 1e-7
