"""Images, schedule and average of each recipe that carries a paper's name, against `recipe_papers`; and its README."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from conftest import ROOT
from recipe_papers import CIFAR10, DEFINITIONS, NETWORKS, family, optimizer_of
from torch import Tensor, nn

from timm_paf.data import Batches, ImageSet
from timm_paf.data.steps import epoch_steps
from timm_paf.files import read_json
from timm_paf.training import Recipe, inputs
from timm_paf.training.averaging import WeightAverage
from timm_paf.training.config import Config, check, parse
from timm_paf.training.optimization import create_optimizer, learning_rate, momentum

STEPS = 4  # of an epoch


def recipe_of(name: str) -> tuple[Config, Recipe]:
    config = parse(['--config', name, '--output', 'x'])
    return config, check(config)


@pytest.mark.parametrize('name', DEFINITIONS)
def test_a_recipe_has_the_values_of_its_program(name: str) -> None:
    config, _ = recipe_of(name)
    definition, network = DEFINITIONS[name], NETWORKS[family(name)]
    found = {key: getattr(config, key) for key in definition._fields}
    if definition.ema_warmup is None:  # without an average
        found['ema_warmup'] = None
    assert found == definition._asdict()
    args = {key: value for key, value in network.args.items() if key != 'base_width'}  # which makes it small
    assert config.model_kwargs == args | ({'normalize': list(map(list, CIFAR10))} if network.normalised else {})
    assert (config.bn_momentum or 0.1) == network.bn_momentum
    # what none of these programs does
    nothing = (config.cutmix, config.mixup, config.color_jitter, config.reprob, config.clean_ratio, config.clip_grad,
               config.warmup_epochs, config.swa, config.patience)
    assert not any(nothing)
    assert (config.dataset, config.init, config.act, config.mixed_precision) == ('cifar10', None, None, 'no')


@pytest.mark.parametrize('name', DEFINITIONS)
def test_learning_rate_and_momentum_are_those_of_torchs_schedulers(name: str) -> None:
    """At each of four steps of each epoch, to the end of the run."""
    _, recipe = recipe_of(name)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    sgd, schedule = optimizer_of(name, network, STEPS)
    ours = create_optimizer(recipe, network)
    assert type(ours) is torch.optim.SGD
    assert len(ours.param_groups) == len(sgd.param_groups)
    for group, theirs in zip(ours.param_groups, sgd.param_groups):
        assert [id(p) for p in group['params']] == [id(p) for p in theirs['params']]
        assert [group[key] for key in ('nesterov', 'weight_decay', 'dampening', 'maximize')] == [
            theirs[key] for key in ('nesterov', 'weight_decay', 'dampening', 'maximize')]
    total = recipe.epochs * STEPS
    for step in range(total):
        # OneCycleLR ends at a 250,000th of the peak, ours at 0
        assert learning_rate(recipe, step, STEPS, total) == pytest.approx(schedule.get_last_lr()[0], abs=1e-6), step
        assert momentum(recipe, step, STEPS, total) == pytest.approx(sgd.param_groups[0]['momentum'], abs=1e-5), step
        sgd.step()
        schedule.step()


def decays(name: str, steps: list[int]) -> list[float]:
    """The weight of the average so far in a run of 480 steps, after these numbers of them."""
    _, recipe = recipe_of(name)
    average = WeightAverage(recipe, nn.Linear(1, 1), STEPS, 480)
    return [average.get_decay(step) for step in steps]


def test_the_averages_decay_as_the_programs_do() -> None:
    assert decays('fastat_ema', [1, 2, 480]) == decays('fastat_nfgsm', [1, 2, 480]) == [0, 0.9995, 0.9995]
    assert decays('ikl2023', [1, 2, 480]) == [0, 0.99973, 0.99973]
    # ema_update of watrain.py, where the rate rises in 12 of 480 steps
    assert decays('wang2023_1m', [1, 11, 12, 22, 10 ** 5]) == [0, 0, 1 / 10, 11 / 20, 0.995]


def numbered(n: int) -> np.ndarray:
    """Images of which every pixel says where it was, and the middle one of any crop which image it is of."""
    images = np.zeros((n, 32, 32, 3), np.uint8)
    number = np.arange(n)[:, None, None]
    images[..., 0] = number % 256
    images[..., 1] = 8 * np.arange(32)[None, :, None] + number // 256
    images[..., 2] = 1 + 7 * np.arange(32)
    return images


def is_crop(found: np.ndarray, image: np.ndarray, mode: str) -> bool:
    """Whether RandomCrop(32, padding=4) and a flip may make ``found`` of an image."""
    padded = [np.pad(each, ((4, 4), (4, 4), (0, 0)), mode) for each in (image, image[:, ::-1])]  # type: ignore[call-overload]
    return any(np.array_equal(found, each[y:y + 32, x:x + 32]) for each in padded for y in range(9) for x in range(9))


def batches_of(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Batches, ImageSet | None, Tensor]:
    """What the program trains on with 1,424 images and 600 generated ones, which are the last of those returned."""
    images = numbered(2024)
    labels = np.arange(len(images)) % 10
    data = ImageSet('cifar10', torch.from_numpy(images[:1424]), torch.from_numpy(labels[:1424]), 10)
    monkeypatch.setattr(inputs, 'load_dataset', lambda *args, **kwargs: data)
    config, _ = recipe_of(name)
    if config.synthetic is not None:
        np.savez(tmp_path / 'generated.npz', image=images[1424:], label=labels[1424:])
        config = dataclasses.replace(
            config, synthetic=f'{tmp_path / "generated.npz"}:{config.synthetic.rpartition(":")[2]}')
    opened = inputs.open_inputs(config, check(config), Accelerator(cpu=True))
    assert isinstance(opened.batches, Batches)
    return opened.batches, opened.validation, torch.from_numpy(images)


@pytest.mark.parametrize(('name', 'held_out', 'real', 'steps', 'last'), [
    ('paper_linf', 0, 256, 6, 144), ('paper_linf_synthetic', 0, 256, 6, 144 + 256), ('paper_l2', 0, 256, 6, 144),
    ('paper_l2_synthetic', 0, 256, 6, 144 + 256), ('wang2023_1m', 1024, 154, 2, 512), ('rice2020', 1000, 128, 4, 40),
    ('wong2020_fast', 0, 128, 12, 16), ('wu2020_trades_awp', 1000, 128, 4, 40), ('idbh2023', 1000, 128, 3, 128),
    ('ikl2023', 0, 128, 12, 16), ('fastat_ema', 1000, 128, 4, 40), ('fastat_nfgsm', 1000, 128, 4, 40)])
def test_the_batches_of_a_recipe(
        name: str, held_out: int, real: int, steps: int, last: int, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    batches, validation, images = batches_of(name, tmp_path, monkeypatch)
    assert (0 if validation is None else len(validation)) == held_out
    assert (batches.steps_per_epoch, batches.last_size) == (steps, last)
    x = (batches[0][0] * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert len(x) == (512 if 'synthetic' in name or name == 'wang2023_1m' else real)
    if name == 'idbh2023':  # whose augmentation has tests of its own
        assert batches.augmentation is not None
        return
    left = {}
    for kind, made in (('real', x[:real]), ('generated', x[real:])):
        number = made[:, 16, 16, 0].astype(int) + 256 * (made[:, 16, 16, 1].astype(int) % 8)
        originals = images.numpy()[number]
        assert ((number < 1424) == (kind == 'real')).all()
        for found, image in list(zip(made, originals))[:24]:
            assert is_crop(found, image, 'reflect' if name == 'rice2020' else 'constant')
        left[kind] = (made == originals).all((1, 2, 3)).mean() if len(made) else None
    assert left['real'] < 0.1
    if len(x) > real:
        # utils.py of the paper: ToTensor alone; cifar10s.py of wang2023: the transforms of all images
        assert left['generated'] < 0.1 if name == 'wang2023_1m' else left['generated'] == 1


def test_an_epoch_of_the_paper_has_196_steps() -> None:
    assert epoch_steps(50_000, 256, 1, recipe_of('paper_linf')[1].drop_last) == (196, 80)


def test_rice2020_drops_its_rate_one_step_after_the_program() -> None:
    """lr_schedule(epoch + (i + 1) / len(train_batches)) of train_cifar.py is already lower in an epoch's last step."""
    _, recipe = recipe_of('rice2020')
    apart = [step for step in range(800) if learning_rate(recipe, step, STEPS, 800) != pytest.approx(
        0.1 if (step + 1) / STEPS / 200 < 0.5 else 0.01 if (step + 1) / STEPS / 200 < 0.75 else 0.001)]
    assert apart == [399, 599]


def header(name: str) -> str:
    """The comments that a recipe begins with, in one line."""
    text = (ROOT / 'hub' / 'recipes' / f'{name}.yaml').read_text()
    return ' '.join(line.removeprefix('# ') for line in text.splitlines() if line.startswith('#'))


def rates_apart(name: str, peak: float, epochs: int, rise: float, steps: int) -> list[float]:
    """By how much a rate that changes by step and the program's, which changes by epoch, differ in each epoch."""
    _, recipe = recipe_of(name)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=epochs, pct_start=rise)
    apart = []
    for epoch in range(epochs):
        apart.append(max(abs(learning_rate(recipe, epoch * steps + step, steps, epochs * steps)
                             - theirs.get_last_lr()[0]) for step in (0, steps - 1)))
        optimizer.step()
        theirs.step()
    return apart


def test_the_figures_of_headers() -> None:
    """Rates by step and by epoch, lengths of epochs, initial weights, averages, statistics: as computed here."""
    _, wang = recipe_of('wang2023_1m')
    real = round(wang.batch_size * (1 - 0.7))
    steps = (50_000 - 1024) // real
    apart = rates_apart('wang2023_1m', 0.2, 400, 0.025, 98)
    left = (1 - NETWORKS['wang2023_1m'].bn_momentum) ** 2  # by the two passes of a step
    for words in (f'({max(apart[:10]):.3f} of 0.2 apart while it rises, {max(apart[10:]):.3f} after)',
                  f'({steps} steps of {real}), so {98 * 400 // steps} make about as many', f'{left:.2f}^n is left'):
        assert words in header('wang2023_1m')
    assert f'theirs by epoch ({max(rates_apart("fastat_ema", 0.1, 100, 0.3, 383)):.3f} of 0.1 apart)' in header(
        'fastat_ema')
    torch.manual_seed(0)
    convolutions = [module.weight for module in timm.create_model(DEFINITIONS['wong2020_fast'].model).modules()
                    if isinstance(module, nn.Conv2d)]
    first, *others = (weight.std().item() * (3 * weight[0].numel()) ** 0.5 for weight in convolutions)  # torch's is 1
    said = re.search(r'standard deviation (.+) to (.+) times smaller, in the first convolution (.+) times larger',
                     header('wong2020_fast'))
    assert said is not None
    assert [float(figure) for figure in said.groups()] == pytest.approx([min(others), max(others), 1 / first], abs=0.1)
    assert f'averages the ends of epochs with 0.9, which is {0.9 ** (128 / 50_000):.5f} by step' in header('ikl2023')
    for name in ('paper_linf', 'paper_linf_synthetic'):
        assert f'theirs uniform in {512 ** -0.5:.3f}' in header(name)
    generated = 256 * epoch_steps(50_000, 256, 1, drop_last=False)[0]
    for name in ('paper_linf_synthetic', 'paper_l2_synthetic'):
        assert f'each epoch, which has {generated:,} of them' in header(name)


def test_the_table_of_steps_is_its_record() -> None:
    """hub/recipes/README.md against the steps that were done beside the authors' functions."""
    page = (ROOT / 'hub' / 'recipes' / 'README.md').read_text()
    record = read_json(ROOT / 'tests' / 'benchmarks' / 'results' / 'official.json')
    assert {row['recipe'] for row in record['steps']} - {'TRADES', 'MART', 'paper_linf --objective trades'} == {
        name for name in DEFINITIONS if not name.endswith('synthetic')}
    for row in record['steps']:
        plain, now = row['plain'], row['now']
        figures = (f'| {plain["pixels_apart"]:.0%}, {plain["gradient_apart"]:.0%} | {now["pixels_apart"]:.0%}, '
                   f'{now["gradient_apart"]:.0e}, {now["weights_apart"]:.0e} |')
        assert any(row['recipe'] in line and figures in line for line in page.splitlines()), row['recipe']
        if row['recipe'] not in ('paper_l2', 'idbh2023'):  # whose attacks start elsewhere
            assert now['pixels_apart'] == 0
            assert now['gradient_apart'] < 1e-7
            # a wrong rate, momentum or decay is seen here; AWP of the two is decayed otherwise
            awp = row['recipe'] in ('wu2020_trades_awp', 'ikl2023')
            assert now['weights_apart'] < (3e-7 if awp else 1e-9)
    apart = {row['recipe']: row['now'] for row in record['steps']}
    for awp in ('wu2020_trades_awp', 'ikl2023'):
        assert f'({apart[awp]["weights_apart"]:.0e} of the weights)'.replace('e-0', 'e-') in header(awp)
    for name, of, words in (
            ('paper_l2', 'gradient', 'the gradient of a step differs by {}'),
            ('idbh2023', 'pixels', '({} of the pixels'), ('idbh2023', 'gradient', 'and {} of the gradient'),
            ('rice2020', 'statistics', '{} where not'),
            ('wu2020_trades_awp', 'statistics', 'changes running statistics alone ({} in a step)')):
        assert words.format(f'{100 * apart[name][f"{of}_apart"]:.0f} %') in header(name)
    assert record['augmentations'] == [{'aa': f'idbh-{name}', 'n': 800, 'differ': 0} for name in ('weak', 'strong')]
    assert 'Of 800 images that IDBH changed' in page
