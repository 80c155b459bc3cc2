"""Steps of each recipe that carries a paper's name, against those of that paper in plain torch (`recipe_references`).

Two steps in a row each, because the first shows no momentum. The network is ours at a small size, as its functions have
tests of their own.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from recipe_papers import NETWORKS, family
from recipe_references import (
    OURS,
    SEED,
    Reference,
    fastat_ema,
    fastat_nfgsm,
    ikl2023,
    locuslab,
    mart,
    paper,
    paper_l2,
    paper_trades,
    wang2023,
    wu2020,
)
from torch import Tensor

from timm_paf.data import Batches, ImageSet
from timm_paf.training import Trainer
from timm_paf.training.config import check, parse, shipped_recipes

BATCH, STEPS_PER_EPOCH = 8, 4


class DoubleBatches(Batches):
    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(step)
        return x.double(), y


def trainer(name: str, at: int, **changes: Any) -> Trainer:
    """A run of a recipe with a small network and images, before a step of its first epochs or of later ones."""
    recipe = check(parse(['--config', name, '--output', 'x', '--seed', str(SEED)]))
    network = NETWORKS[family(name)]
    width = {key: value for key, value in network.args.items() if key == 'base_width'}
    recipe = dataclasses.replace(
        recipe, batch_size=BATCH, model=network.model, val=0, val_attack=None, aa=None, channels_last=False,
        compile=False, model_kwargs={**recipe.model_kwargs, **width}, **changes)
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


def step_of_both(
        ref: Reference, step: Callable[[Reference], Tensor], after: Callable[[], object] = lambda: None) -> None:
    """A step on both sides, which begin it at the same weights: loss, each gradient, weight and statistic after it."""
    run = ref.run
    ref.follow()
    ref.begin()
    loss = step(ref)
    ref.descend()
    after()
    run.metric_sums['loss'].zero_()
    run.train_step()
    assert run.metric_sums['loss'].item() / BATCH == pytest.approx(loss.item(), rel=1e-5)
    ours = dict(run.unwrapped.named_parameters())
    assert ours.keys() == dict(ref.net.named_parameters()).keys()
    for name, p in ours.items():
        expected = ref.net.get_parameter(name)
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=f'gradient of {name}')
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6, msg=name)
    for name, value in run.unwrapped.named_buffers():
        if not name.startswith(OURS):
            torch.testing.assert_close(value, ref.net.get_buffer(name), rtol=1e-5, atol=1e-6, msg=name)


TRADES = {'objective': 'trades', 'paf_clip': 0.1, 'attack_start': 'normal', 'separate_forwards': True,
          'clean_pass': 'none'}
"""What the header of paper_linf names for the paper's TRADES."""


@pytest.mark.parametrize(('name', 'step', 'changes'), [
    ('paper_linf', paper, {}), ('paper_linf_synthetic', paper, {}), ('paper_linf', paper_trades, TRADES),
    ('paper_l2', paper_l2, {}), ('paper_l2_synthetic', paper_l2, {})])
def test_the_papers_steps(name: str, step: Callable[[Reference], Tensor], changes: dict[str, Any]) -> None:
    ref = Reference(trainer(name, 0, **changes), name)
    for _ in range(2):
        step_of_both(ref, step)


@pytest.mark.parametrize('at', [0, 10, 40])
def test_steps_of_wang2023(at: int) -> None:
    epochs = 120  # 480 steps, of which the rate rises in 12
    run = trainer('wang2023_1m', at, epochs=epochs)
    ref = Reference(run, 'wang2023_1m', epochs)
    assert run.ema is not None
    for done in (at + 1, at + 2):
        average = copy.deepcopy(run.ema.module)
        step_of_both(ref, wang2023)
        since = done - 12
        decay = min(0.995, (1 + since) / (10 + since)) if since >= 0 else 0.0  # ema_update of watrain.py
        for p, mean, new in zip(run.ema.module.parameters(), average.parameters(), run.unwrapped.parameters()):
            torch.testing.assert_close(p, decay * mean + (1 - decay) * new)
        for ours, theirs in zip(run.ema.module.buffers(), run.unwrapped.buffers()):  # update_bn
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(('name', 'at'), [
    ('rice2020', 0), ('wong2020_fast', 2), ('wong2020_fast', 40), ('idbh2023', 0)])
def test_steps_of_those_in_train_mode(name: str, at: int) -> None:
    ref = Reference(trainer(name, at), name)

    def show_clean() -> None:
        with torch.no_grad():
            ref.model(ref.x)

    def step(ref: Reference) -> Tensor:
        if name == 'idbh2023':  # github.com/TreeLLi/DA-Alone-Improves-AT, but for the start of its attack
            show_clean()
        return locuslab(ref, 10 / 255, 1) if name == 'wong2020_fast' else locuslab(ref, 2 / 255, 10)

    for _ in range(2):
        step_of_both(ref, step, show_clean if name == 'rice2020' else lambda: None)


@pytest.mark.parametrize(('epoch', 'steps'), [(0, 2), (8, 1), (9, 2), (98, 1), (99, 1), (149, 1)])
def test_steps_of_wu2020(epoch: int, steps: int) -> None:
    """Their epochs are counted from 1: AWP from the tenth, a lower rate from the hundredth."""
    ref = Reference(trainer('wu2020_trades_awp', epoch * STEPS_PER_EPOCH), 'wu2020_trades_awp')
    for _ in range(steps):
        step_of_both(ref, lambda ref: wu2020(ref, epoch + 1 >= 10))


def test_steps_of_mart() -> None:
    """The options of wu2020_trades_awp with --objective mart --awp 0."""
    run = trainer('wu2020_trades_awp', 0, objective='mart', awp=0.0, awp_warmup_epochs=0.0)
    ref = Reference(run, 'wu2020_trades_awp')
    for _ in range(2):
        step_of_both(ref, mart)


@pytest.mark.parametrize(('name', 'step'), [('fastat_ema', fastat_ema), ('fastat_nfgsm', fastat_nfgsm)])
def test_steps_of_the_fastat_benchmark(name: str, step: Callable[[Reference], Tensor]) -> None:
    run = trainer(name, 0)
    ref = Reference(run, name)
    assert run.ema is not None
    for done in (1, 2):
        before = copy.deepcopy(run.ema.module.state_dict())
        step_of_both(ref, step)
        decay = 0.9995 if done > 1 else 0.0  # the average begins at the weights of the first step
        new = run.unwrapped.state_dict()
        for key, ours in run.ema.module.state_dict().items():
            if ours.is_floating_point():  # running statistics too
                torch.testing.assert_close(ours, decay * before[key] + (1 - decay) * new[key])


def steps_of_ikl2023(ref: Reference, steps: int, weights: Tensor | None, perturbs: bool) -> Tensor:
    """Steps of an epoch on both sides, weighed by the epoch before; returns what weighs the next, not yet divided."""
    run, sums = ref.run, torch.zeros(10, 10, dtype=torch.float64)
    assert run.ema is not None
    for _ in range(steps):
        eps = 8 / 255 * (run.step + 1) / (200 * STEPS_PER_EPOCH)  # varepsilon, which theirs has by epoch
        decay = 0.99973 if run.step else 0.0  # of swa.py, 0.9 over ends of epochs
        before = copy.deepcopy(run.ema.module.state_dict())
        step_of_both(ref, functools.partial(ikl2023, eps=eps, weights=weights, sums=sums, perturbs=perturbs))
        new = run.unwrapped.state_dict()
        for key, ours in run.ema.module.state_dict().items():
            if ours.is_floating_point():
                torch.testing.assert_close(ours, decay * before[key] + (1 - decay) * new[key])
    torch.testing.assert_close(run.gradients.class_sums['sums'], sums, rtol=1e-5, atol=1e-8)
    return sums


def test_two_epochs_of_ikl2023() -> None:
    """Class weights of the first weigh the second."""
    run = trainer('ikl2023', 0)
    ref, weights = Reference(run, 'ikl2023'), None
    for _ in range(2):
        sums = steps_of_ikl2023(ref, STEPS_PER_EPOCH, weights, perturbs=False)
        run.end_epoch()
        weights = sums / sums.sum(1, keepdim=True).clamp_min(1e-12)  # theirs has no class without images
        assert run.gradients.class_weights is not None
        torch.testing.assert_close(run.gradients.class_weights, weights, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(weights.sum(1), (sums.sum(1) > 0).double())


@pytest.mark.parametrize(('epoch', 'steps'), [(8, 1), (9, 2)])
def test_steps_of_ikl2023_with_awp(epoch: int, steps: int) -> None:
    """Their epochs are counted from 1: AWP from the tenth."""
    run = trainer('ikl2023', epoch * STEPS_PER_EPOCH)
    steps_of_ikl2023(Reference(run, 'ikl2023'), steps, None, perturbs=epoch + 1 >= 10)


def test_every_recipe_of_a_paper_has_its_step_here() -> None:
    said = {name for name, path in shipped_recipes().items() if 'test_recipe_steps' in path.read_text()}
    assert said == {'paper_linf', 'paper_linf_synthetic', 'paper_l2', 'paper_l2_synthetic', 'wang2023_1m', 'rice2020',
                    'wong2020_fast', 'wu2020_trades_awp', 'fastat_ema', 'fastat_nfgsm', 'ikl2023', 'idbh2023'}
    papers = {name for name, path in shipped_recipes().items() if 'arxiv.org' in path.read_text()}
    # those of ImageNet are the standard PGD step, and their headers say what else differs; the others are ours
    assert {name for name in papers - said if not name.startswith('cpu_')} == {
        'salman2020_imagenet', 'debenedetti2022_imagenet', 'singh2023_imagenet', 'finetune_paf', 'robustify',
        'study_resnet18_w8'}
