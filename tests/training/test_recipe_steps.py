"""Steps of each recipe that carries a paper's name, against those of that paper in plain torch (`recipe_references`).

`STEPS` says where they begin. They are two in a row, because the first shows no momentum. The network is ours at a
small size, as its functions have tests of their own.
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
from recipe_papers import DEFINITIONS, NETWORKS, family
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

Step = Callable[[Reference], Tensor]
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
    data = ImageSet(recipe.dataset, images, torch.randint(10, (n,), generator=generator), 10, pad=0, flip=False)
    torch.manual_seed(recipe.seed)
    model = timm.create_model(recipe.model, num_classes=10, **recipe.model_kwargs).double()
    batches = DoubleBatches(data, BATCH, recipe.seed, 'cpu', pad_mode=recipe.pad_mode)
    run = Trainer(recipe, model, batches, Accelerator(cpu=True))
    run.step = at
    return run


def step_of_both(ref: Reference, step: Step, after: Callable[[Reference], object] = lambda ref: None) -> None:
    """A step on both sides, which begin it at the same weights: loss, each gradient, weight and statistic after it."""
    run = ref.run
    average = None if run.ema is None else copy.deepcopy(run.ema.module.state_dict())
    ref.follow()
    ref.begin()
    loss = step(ref)
    ref.descend()
    after(ref)
    run.metric_sums['loss'].zero_()
    run.train_step()
    assert run.metric_sums['loss'].item() / BATCH == pytest.approx(loss.item(), rel=1e-5)
    ours = dict(run.unwrapped.named_parameters())
    assert ours.keys() == dict(ref.net.named_parameters()).keys()
    for name, p in ours.items():
        expected = ref.net.get_parameter(name)
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=f'gradient of {name}')
        torch.testing.assert_close(p, expected, rtol=1e-7, atol=1e-7, msg=name)  # of weight decay too
    for name, value in run.unwrapped.named_buffers():
        if not name.startswith(OURS):
            torch.testing.assert_close(value, ref.net.get_buffer(name), rtol=1e-5, atol=1e-6, msg=name)
    assert_averaged(ref, average)


def assert_averaged(ref: Reference, before: dict[str, Tensor] | None) -> None:
    """The average of the weights is the program's, where it has one; it begins at the weights of the first step."""
    definition, done = DEFINITIONS[ref.name], ref.run.step
    assert (before is not None) == bool(definition.ema)
    if before is None or ref.run.ema is None:
        return
    decay = definition.ema if done > 1 else 0.0
    if ref.name == 'wang2023_1m':  # ema_update of watrain.py, where the rate rises in 12 steps
        decay = min(definition.ema, (done - 11) / (done - 2)) if done >= 12 else 0.0
    new, parameters = ref.run.unwrapped.state_dict(), dict(ref.run.unwrapped.named_parameters())
    for key, ours in ref.run.ema.module.state_dict().items():
        if ours.is_floating_point():  # running statistics too, which update_bn of wang2023's utils copies
            kept = decay if key in parameters or definition.ema_bn == 'average' else 0.0
            torch.testing.assert_close(ours, kept * before[key] + (1 - kept) * new[key], msg=f'average of {key}')


def show_clean(ref: Reference) -> None:
    with torch.no_grad():
        ref.model(ref.x)


def rice2020(ref: Reference) -> Tensor:
    return locuslab(ref, 2 / 255, 10)


def wong2020(ref: Reference) -> Tensor:
    return locuslab(ref, 10 / 255, 1)


def idbh2023(ref: Reference) -> Tensor:
    """github.com/TreeLLi/DA-Alone-Improves-AT, but for the start of its attack."""
    show_clean(ref)
    return rice2020(ref)


def perturbs(ref: Reference) -> bool:
    """Whether there is AWP; epochs are counted from 1, and it begins with the tenth."""
    return ref.run.step // STEPS_PER_EPOCH + 1 >= 10


def ikl(ref: Reference, weights: Tensor | None = None, sums: Tensor | None = None) -> Tensor:
    """A step that classes of the epoch before weigh, and that adds to what weighs the next, not yet divided."""
    eps = 8 / 255 * (ref.run.step + 1) / (200 * STEPS_PER_EPOCH)  # varepsilon, which theirs has by epoch
    return ikl2023(ref, eps, weights, torch.zeros(10, 10, dtype=torch.float64) if sums is None else sums, perturbs(ref))


TRADES = {'objective': 'trades', 'paf_clip': 0.1, 'attack_start': 'normal', 'separate_forwards': True,
          'clean_pass': 'none'}
"""What the header of paper_linf names for the paper's TRADES."""
MART = {'objective': 'mart', 'awp': 0.0, 'awp_warmup_epochs': 0.0}

STEPS: list[tuple[str, Step, tuple[int, ...], dict[str, Any]]] = [
    ('paper_linf', paper, (0,), {}), ('paper_linf', paper_trades, (0,), TRADES),
    ('paper_linf_synthetic', paper, (0,), {}),
    ('paper_l2', paper_l2, (0,), {}), ('paper_l2_synthetic', paper_l2, (0,), {}),
    ('wang2023_1m', wang2023, (0, 10, 40), {'epochs': 120}),  # 480 steps, of which the rate rises in 12
    ('rice2020', rice2020, (0,), {}), ('wong2020_fast', wong2020, (2, 40), {}), ('idbh2023', idbh2023, (0,), {}),
    # AWP begins at step 36, and the rate drops at 396 and 596
    ('wu2020_trades_awp', lambda ref: wu2020(ref, perturbs(ref)), (0, 35, 36, 395, 596), {}),
    ('wu2020_trades_awp', mart, (0,), MART),
    # The first step begins the average; at step 120 is the peak of the rate, where weight decay shows most.
    ('fastat_ema', fastat_ema, (0, 120), {}), ('fastat_nfgsm', fastat_nfgsm, (0, 120), {}),
    ('ikl2023', ikl, (0,), {})]
"""Of each recipe of a paper: a step as the program does it, where two of them begin, options beside the recipe."""


@pytest.mark.parametrize(('name', 'step', 'at', 'changes'), [
    pytest.param(name, step, at, changes, id=f'{name}-{changes.get("objective", "")}-{at}')
    for name, step, begins, changes in STEPS for at in begins])
def test_steps_are_those_of_the_program(name: str, step: Step, at: int, changes: dict[str, Any]) -> None:
    ref = Reference(trainer(name, at, **changes), name, changes.get('epochs'))
    for _ in range(2):
        step_of_both(ref, step, *[show_clean] * (name == 'rice2020'))


def test_two_epochs_of_ikl2023() -> None:
    """Class weights of the first weigh the second, in which AWP begins."""
    run = trainer('ikl2023', 8 * STEPS_PER_EPOCH)
    ref, weights = Reference(run, 'ikl2023'), None
    for _ in range(2):
        sums = torch.zeros(10, 10, dtype=torch.float64)
        for _ in range(STEPS_PER_EPOCH):
            step_of_both(ref, functools.partial(ikl, weights=weights, sums=sums))
        torch.testing.assert_close(run.gradients.class_sums['sums'], sums, rtol=1e-5, atol=1e-8)
        run.end_epoch()
        weights = sums / sums.sum(1, keepdim=True).clamp_min(1e-12)  # theirs has no class without images
        assert run.gradients.class_weights is not None
        torch.testing.assert_close(run.gradients.class_weights, weights, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(weights.sum(1), (sums.sum(1) > 0).double())


def test_every_recipe_of_a_paper_has_its_steps_here() -> None:
    said = {name for name, path in shipped_recipes().items() if 'test_recipe_steps' in path.read_text()}
    assert said == {name for name, *_ in STEPS} == set(DEFINITIONS)
    papers = {name for name, path in shipped_recipes().items() if 'arxiv.org' in path.read_text()}
    # those of ImageNet are the standard PGD step, and their headers say what else differs; the others are ours
    assert {name for name in papers - said if not name.startswith('cpu_')} == {
        'salman2020_imagenet', 'debenedetti2022_imagenet', 'singh2023_imagenet', 'finetune_paf', 'robustify',
        'study_resnet18_w8'}
