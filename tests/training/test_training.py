"""One training step against a rewriting of it, and the files of a run."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import re
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch._dynamo.utils import counters

from timm_paf.activations import paf_parameters
from timm_paf.attacks import ThreatModel, pgd
from timm_paf.convert import convert_activations, create_converted
from timm_paf.data import (
    Augmentation,
    Batches,
    ImageSet,
    IndexedBatches,
    cutmix,
    derive_seed,
    open_folder,
    open_synthetic,
    to_float,
)
from timm_paf.objectives import OBJECTIVES, has_overfitted, paf_penalty, pgd_at
from timm_paf.training import NonFiniteLoss, Recipe, Trainer
from timm_paf.training import trainer as training_module
from timm_paf.training.network import runner
from timm_paf.training.optimization import SCHEDULES, learning_rate, momentum, parameter_groups
from timm_paf.training.progress import time_attack_step
from timm_paf.training.run_directory import append_metrics, prepare_output


def small_set(n: int = 24) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return ImageSet('made', images, torch.randint(10, (n,), generator=generator), 10, pad=2)


def recipe(**changes: object) -> Recipe:
    usual = Recipe(
        model='wrn10_1_pssilu', dataset='made', epochs=2, batch_size=8, lr=0.1, min_lr=0.01, momentum=0.9,
        weight_decay=5e-4, schedule='cosine', threat=ThreatModel(steps=2), paf_penalty=10.0, paf_clip=0.01, seed=4)
    return dataclasses.replace(usual, **changes)  # type: ignore[arg-type]


def trainer(n: int = 24, **changes: object) -> Trainer:
    chosen = recipe(**changes)
    torch.manual_seed(chosen.seed)
    model = timm.create_model(chosen.model, num_classes=10, act_kwargs=chosen.act_kwargs or None)
    batches = Batches(small_set(n), 8, chosen.seed, 'cpu', drop_last=chosen.drop_last)
    return Trainer(chosen, model, batches, Accelerator(cpu=True), small_set(chosen.val) if chosen.val else None)


def mixed(path: Path, fraction: float, **kwargs: object) -> Batches:
    """Returns batches of 8, of which a share are generated."""
    generator = np.random.default_rng(0)
    np.savez(path / 'made.npz', image=generator.integers(256, size=(30, 16, 16, 3), dtype=np.uint8),
             label=np.arange(30) % 10)
    synthetic = open_synthetic(path / 'made.npz', (16, 16, 3), 10)
    return Batches(small_set(), 8, 4, 'cpu', synthetic=synthetic, fraction=fraction, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(('changes', 'words'), [
    ({'batch_size': 4}, 'batch_size is 4 in the recipe and 8 in the batches; expected the same'),
    ({'seed': 5}, 'seed is 5 in the recipe and 4 in the batches'),
    ({'mixed_precision': 'bf16'}, 'mixed_precision is bf16 in the recipe and no in the Accelerator'),
    ({'reprob': 0.25}, 'the recipe has augmentation (aa, color_jitter, reprob) and the batches have none'),
    ({'val': 3}, 'val is 3 in the recipe and there are 0 held-out images'),
    ({'drop_last': False, 'batch_size': 9}, 'batch_size is 9 in the recipe and 8 in the batches'),
    ({'synthetic': {'sha256': 'x'}}, 'the recipe has generated images (synthetic) and the batches have none'),
    ({'swa': 2, 'max_steps': 3}, 'swa is 2 and the run ends after 3 steps, before that epoch'),
    ({'clean_ratio': 0.1, 'accumulate': 4}, 'clean_ratio 0.1 of 2 images, which are worked on at once, is 0'),
    ({'clean_ratio': 0.8, 'accumulate': 4}, 'clean_ratio 0.8 of 2 images, which are worked on at once, is 2')])
def test_what_a_trainer_is_given_is_what_its_recipe_says(changes: dict[str, object], words: str) -> None:
    """Because the recipe is recorded and published."""
    model, batches = timm.create_model('wrn10_1_pssilu'), Batches(small_set(), 8, 4, 'cpu')
    with pytest.raises(ValueError, match=rf'^{re.escape(words)}[^\n]*$'):
        Trainer(recipe(**changes), model, batches, Accelerator(cpu=True))


@pytest.mark.parametrize(('changes', 'network', 'words'), [
    ({}, {'model_name': 'wrn10_1_relu'}, 'model is wrn10_1_pssilu in the recipe and the network is wrn10_1_relu'),
    ({'act_kwargs': {'alpha': 16.0}}, {}, "act_kwargs is {'alpha': 16.0} in the recipe and the network does not start"),
    ({'model_kwargs': {'normalize': [[0.5] * 3, [0.5] * 3]}}, {}, 'normalize.mean is (3, 1, 1) in the network of the'),
    ({}, {'normalize': [[0.5] * 3, [0.5] * 3]}, 'normalize.mean is not there in the network of the recipe'),
    ({'model_kwargs': {'normalize': [[0.5] * 3, [0.5] * 3]}}, {'normalize': [[0.4] * 3, [0.5] * 3]},
     'normalize is [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]] in the recipe and another one in the network'),
    ({'model_kwargs': {'normalize': [[0.5] * 3, [0.5] * 3]}}, {'normalize': [[0.501] * 3, [0.5] * 3]},
     'normalize is [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]] in the recipe and another one in the network'),
    ({'model': 'wrn10_1_relu', 'act': 'psilu'}, {'model_name': 'wrn10_1_relu'},
     'act.alpha is (1,) in the network of the recipe (model, act, model_kwargs) and not there in this one'),
    ({'model': 'resnet10t'}, {'model_name': 'resnet10t', 'num_classes': 10, 'act_layer': 'silu'},
     'conv1.2 is ReLU() in the network of the recipe (model, act, model_kwargs) and SiLU() in this one'),
    ({'model': 'resnet10t'}, {'model_name': 'resnet10t', 'num_classes': 10, 'output_stride': 8}, 'layer3.0.conv'),
    ({'model': 'resnet10t'}, {'model_name': 'resnet10t', 'num_classes': 10, 'drop_block_rate': 0.1},
     'layer3.0.drop_block is Identity() in the network of the recipe'),
    ({'model': 'resnet10t'}, {'model_name': 'resnet10t', 'num_classes': 10, 'drop_rate': 0.5}, 'drop_rate is 0 in the'),
    ({'model': 'vit_tiny_patch16_224', 'model_kwargs': {'img_size': 32}},
     {'model_name': 'vit_tiny_patch16_224', 'num_classes': 10, 'img_size': 32, 'num_heads': 6},
     'blocks.0.attn.num_heads is 3 in the'),
    ({'model': 'swinv2_tiny_window8_256', 'model_kwargs': {'img_size': 32, 'patch_size': 4, 'window_size': 4}},
     {'model_name': 'swinv2_tiny_window8_256', 'num_classes': 10, 'img_size': 32, 'patch_size': 4, 'window_size': 2},
     'layers.0.blocks.0.window_size is (4, 4) in the'),
    *(({'model': 'vit_tiny_patch16_224', 'model_kwargs': sizes}, {'model_name': 'resnet10t', 'num_classes': 10},
       "the network of the recipe (model, act, model_kwargs) can't be made: ") for sizes in (
        {'num_heads': 5}, {'depth': [1, 2]}, {'window_size': 3})),
    ({'model': 'swin_tiny_patch4_window7_224', 'model_kwargs': {'depths': [1, 1, 1], 'num_heads': [1, 2]}},
     {'model_name': 'resnet10t', 'num_classes': 10},
     "the network of the recipe (model, act, model_kwargs) can't be made: "),
    ({'act_kwargs': {'frozen': ['alpha']}}, {}, "act is PSSiLU, learned: ['beta'] in the"),
    ({'model': 'resnet10t.none'}, {'model_name': 'resnet10t', 'num_classes': 10},
     "the network of the recipe (model, act, model_kwargs) can't be made: Invalid pretrained tag")])
def test_a_network_that_the_recipe_does_not_make_is_refused(
        changes: dict[str, Any], network: dict[str, Any], words: str) -> None:
    model = timm.create_model(**{'model_name': 'wrn10_1_pssilu', **network})
    batches, by = Batches(small_set(), 8, 4, 'cpu'), Accelerator(cpu=True)
    with pytest.raises(ValueError, match=rf'^{re.escape(words)}[^\n]*; expected the same'):
        Trainer(recipe(**changes), model, batches, by)


def test_networks_that_the_recipe_makes_are_taken() -> None:
    batches, by = Batches(small_set(), 8, 4, 'cpu'), Accelerator(cpu=True)
    Trainer(recipe(act_kwargs={'curvature': 8}), timm.create_model('wrn10_1_pssilu', act_kwargs={'curvature': 8}),
            batches, by)
    old = recipe(model='tf_efficientnet_b0_ap')  # a name that timm knows for tf_efficientnet_b0
    Trainer(old, timm.create_model(old.model, num_classes=10), batches, by)
    Trainer(recipe(model='own'), nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), batches, by)
    converted = timm.create_model('resnet10t', num_classes=10)
    convert_activations(converted, 'psilu', 'layer')
    with pytest.raises(ValueError, match='in the network of the recipe'):
        Trainer(recipe(model='resnet10t', act='psilu'), converted, batches, by)
    Trainer(recipe(model='resnet10t', act='psilu', act_share='layer'), converted, batches, by)
    head = timm.create_model('resnet10t')  # of 1,000 classes, which it keeps as its attribute
    head.fc = nn.Linear(512, 10)
    Trainer(recipe(model='resnet10t', sync_bn=True), convert_sync_batchnorm(head), batches, by)
    Trainer(recipe(model='efficientvit_b0', act='psilu'), create_converted('efficientvit_b0', 'psilu', num_classes=10),
            batches, by)  # its attention does not run without memory
    args = {'normalize': [[0, 0.1, 0.2], [1, 1, 1]], 'in_chans': 1, 'act_kwargs': {'alpha': 1.1}}
    starting = recipe(model_kwargs={key: args[key] for key in ('normalize', 'in_chans')}, act_kwargs={'alpha': 1.1})
    for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        Trainer(starting, timm.create_model('wrn10_1_pssilu', **args).to(kind), batches, by)
    vit = {'img_size': 16, 'patch_size': 8, 'embed_dim': 16, 'depth': 1, 'num_heads': 2}
    converted = timm.create_model('vit_tiny_patch16_224', num_classes=10, **vit)
    convert_activations(converted, 'psilu', input_size=(3, 16, 16))
    Trainer(recipe(model='vit_tiny_patch16_224', act='psilu', model_kwargs=vit), converted, batches, by)
    converted = timm.create_model('wrn10_1_relu')
    convert_activations(converted, 'psilu', alpha=3)
    Trainer(recipe(model='wrn10_1_relu', act='psilu', act_kwargs={'alpha': 3}), converted, batches, by)


def test_data_held_out_images_and_augmentation_are_those_of_the_recipe() -> None:
    model, by = timm.create_model('wrn10_1_pssilu'), Accelerator(cpu=True)
    with pytest.raises(ValueError, match=r'^dataset is digits in the recipe and the batches are of made;'):
        Trainer(recipe(dataset='digits'), model, Batches(small_set(), 8, 4, 'cpu'), by)
    with pytest.raises(ValueError, match=r'^val is 4 in the recipe and there are 3 held-out images;'):
        Trainer(recipe(val=4), model, Batches(small_set(), 8, 4, 'cpu'), by, small_set(3))
    augmented = Batches(small_set(), 8, 4, 'cpu', augmentation=Augmentation(16, None, 0.4, 0.1))
    with pytest.raises(ValueError, match=r'^color_jitter is 0.0 in the recipe and 0.4 in the augmentation of the'):
        Trainer(recipe(reprob=0.1), model, augmented, by)
    Trainer(recipe(color_jitter=0.4, reprob=0.1), model, augmented, by)


def test_crops_are_those_of_the_recipe(tmp_path: Path) -> None:
    for i in range(8):
        (folder := tmp_path / 'train' / f'class{i % 2}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / f'{i}.png')
    batches, by = IndexedBatches(open_folder(tmp_path, True), 8, 4, 'cpu', size=16), Accelerator(cpu=True)
    options: dict[str, Any] = {'dataset': 'folder', 'image_size': 16}
    for changes, words in (({'image_size': 64}, 'image_size is 64 in the recipe and 16 in the batches'),
                           ({'pad_mode': 'reflect'}, 'pad_mode is reflect in the recipe and nothing is padded in')):
        with pytest.raises(ValueError, match=words):
            Trainer(recipe(**options | changes), timm.create_model('wrn10_1_pssilu'), batches, by)
    Trainer(recipe(**options), timm.create_model('wrn10_1_pssilu'), batches, by)


def test_batches_of_ones_own_are_compared_by_what_they_have() -> None:
    class Own:
        data, batch_size, seed, steps_per_epoch, last_size = small_set(), 16, 4, 1, 8

    with pytest.raises(ValueError, match=r'^batch_size is 8 in the recipe and 16 in the batches; expected the same'):
        Trainer(recipe(), timm.create_model('wrn10_1_pssilu'), Own(), Accelerator(cpu=True))  # type: ignore[arg-type]


def test_an_augmentation_of_ones_own_is_taken() -> None:
    own = Batches(small_set(), 8, 4, 'cpu', augmentation=lambda pixels, seed: pixels)  # type: ignore[arg-type]
    Trainer(recipe(reprob=0.1), timm.create_model('wrn10_1_pssilu'), own, Accelerator(cpu=True))


def test_no_step_follows_the_last() -> None:
    run = trainer(max_steps=2)
    run.train_step()
    run.train_step()
    with pytest.raises(ValueError, match=r'^the run ended after 2 steps; expected no more, or a longer recipe$'):
        run.train_step()
    assert run.step == 2


def test_batches_end_an_epoch_and_share_images_as_recipe_and_accelerator_say() -> None:
    model, by = timm.create_model('wrn10_1_pssilu'), Accelerator(cpu=True)
    with pytest.raises(ValueError, match=r'^drop_last is False in the recipe and True in the batches; expected'):
        Trainer(recipe(drop_last=False), model, Batches(small_set(26), 8, 4, 'cpu'), by)
    Trainer(recipe(drop_last=False), model, Batches(small_set(26), 8, 4, 'cpu', drop_last=False), by)
    with pytest.raises(ValueError, match=r'^rank is 0 in the Accelerator and 1 in the batches; world is 1 in'):
        Trainer(recipe(), model, Batches(small_set(), 8, 4, 'cpu', 1, 2), by)
    mixed, batches = recipe(drop_last=False, clean_ratio=0.2), Batches(small_set(26), 8, 4, 'cpu', drop_last=False)
    with pytest.raises(ValueError, match=r'^clean_ratio 0.2 of 2 images of the last batch of an epoch, [^\n]* is 0;'):
        Trainer(mixed, model, batches, by)


def test_what_no_trainer_can_work_with_is_named() -> None:
    model, batches = timm.create_model('wrn10_1_pssilu'), Batches(small_set(), 8, 4, 'cpu')
    by = Accelerator(cpu=True)
    with pytest.raises(ValueError, match=r'^batches are a list without data, steps_per_epoch, last_size; expected'):
        Trainer(recipe(), model, [], by)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'^the network has 4 classes and the data 10; expected at least as many$'):
        Trainer(recipe(), timm.create_model('wrn10_1_pssilu', num_classes=4), batches, by)
    batches.data = [*batches.data.labels]  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r'^n-fgsm is looked at with training images from memory'):
        Trainer(recipe(objective='n-fgsm', threat=ThreatModel(steps=1)), model, batches, by)
    with pytest.raises(ValueError, match='gradient_accumulation_steps is 4 in the Accelerator, which would divide'):
        Trainer(recipe(), model, Batches(small_set(), 8, 4, 'cpu'),
                Accelerator(cpu=True, gradient_accumulation_steps=4))


def test_mixup_pairs_images_of_a_kind(tmp_path: Path) -> None:
    model, by = timm.create_model('wrn10_1_pssilu'), Accelerator(cpu=True)
    for fraction, fits in ((0.5, True), (0.4, False)):
        batches = mixed(tmp_path, fraction)
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match=(
                r'^mixup pairs images of a kind, and 1 processes share 5 real and 3 generated ones')):
            Trainer(recipe(mixup=0.5, synthetic={'fraction': fraction}), model, batches, by)


def test_generated_images_are_those_of_the_recipe(tmp_path: Path) -> None:
    model, by = timm.create_model('wrn10_1_pssilu'), Accelerator(cpu=True)
    for said, given, words in (
            (None, {}, 'the recipe has no generated images (synthetic) and the batches have some'),
            ({'fraction': 0.75}, {}, 'generated images of a batch is 6 in the recipe and 4 in the batches'),
            ({'fraction': 0.5}, {'synthetic_augment': False}, 'synthetic_augment is True in the recipe and False in')):
        with pytest.raises(ValueError, match=rf'^{re.escape(words)}'):
            Trainer(recipe(synthetic=said), model, mixed(tmp_path, 0.5, **given), by)
    Trainer(recipe(synthetic={'name': 'of a loop'}), model, mixed(tmp_path, 0.5), by)


def test_images_outside_the_box_are_not_trained_on() -> None:
    run = trainer()
    run.batches.images = run.batches.images.float()  # type: ignore[attr-defined]
    run.batches.__class__ = type('Whole', (Batches,), {
        '__getitem__': lambda self, step: tuple(255 * each if each.ndim == 4 else each
                                                for each in Batches.__getitem__(self, step))})
    with pytest.raises(ValueError, match=r'expected \[0, 1\]: divide by 255'):
        run.train_step()


def test_a_compiled_network_is_trained_and_saved_under_its_own_names() -> None:
    torch.manual_seed(0)
    model = timm.create_model('wrn10_1_pssilu')
    run = Trainer(recipe(), torch.compile(model), Batches(small_set(), 8, 4, 'cpu'), Accelerator(cpu=True))
    assert run.result().keys() == model.state_dict().keys()
    assert run.unwrapped is model


@pytest.mark.parametrize(('changes', 'words'), [
    ({'lr': 1e-3, 'min_lr': 1e-2}, '--min-lr is 0.01, above --lr 0.001'),
    ({'warmup_epochs': 3}, '--warmup-epochs is 3, past the end')])
def test_schedules_that_never_come_down_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recipe(**changes)
    assert recipe(lr=1e-3, min_lr=1e-2, schedule='constant')


@pytest.mark.parametrize(('name', 'closed_form'), [
    ('cosine', lambda t: math.cos(math.pi * t / 2) ** 2), ('linear', lambda t: 1 - t), ('constant', lambda t: 1),
    ('one-cycle', lambda t: 0.04 + 0.96 * math.sin(math.pi * t / 0.6) ** 2 if t < 0.3
     else math.cos(math.pi * (t - 0.3) / 1.4) ** 2),
    ('triangular', lambda t: 1 - abs(2 * t - 1)), ('piecewise', lambda t: 10.0 ** -((t >= 0.5) + (t >= 0.75)))])
def test_schedules(name: str, closed_form: object) -> None:
    for t in (0, 0.1, 0.49, 0.5, 0.7, 0.75, 0.9, 1):
        assert SCHEDULES[name](t) == pytest.approx(closed_form(t), abs=1e-12)  # type: ignore[operator]
    assert SCHEDULES[name](0) == pytest.approx({'one-cycle': 0.04, 'triangular': 0}.get(name, 1))


def test_schedules_that_rise_are_torchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=101, pct_start=0.2, cycle_momentum=False)
    chosen = recipe(lr=0.2, min_lr=0.0, schedule='one-cycle', pct_start=0.2)
    for step in range(100):
        # torch's peak is a step earlier
        assert learning_rate(chosen, step, 10, 100) == pytest.approx(theirs.get_last_lr()[0], abs=0.008)
        optimizer.step()
        theirs.step()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    cyclic = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.0, 0.2, 40, 60, cycle_momentum=False)
    for step in range(100):
        now = learning_rate(recipe(lr=0.2, min_lr=0.0, schedule='triangular', pct_start=0.4), step, 10, 100)
        assert now == pytest.approx(cyclic.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        cyclic.step()


def test_a_cycle_of_momentum_is_torchs() -> None:
    for changes, schedule in (
            ({'schedule': 'one-cycle', 'pct_start': 0.2}, lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
                optimizer, 0.2, total_steps=101, pct_start=21 / 101)),
            ({'schedule': 'triangular'}, lambda optimizer: torch.optim.lr_scheduler.CyclicLR(
                optimizer, 0.0, 0.2, 50, 50, base_momentum=0.85, max_momentum=0.95))):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
        theirs = schedule(optimizer)
        chosen = recipe(lr=0.2, min_lr=0.0, momentum_cycle='0.85,0.95', epochs=10, **changes)
        for step in range(100):
            assert momentum(chosen, step, 10, 100) == pytest.approx(optimizer.param_groups[0]['momentum'], abs=1e-9)
            optimizer.step()
            theirs.step()
    for wrong, text in (({'pct_start': 0.2}, 'one-cycle or triangular'), ({'milestones': '1'}, 'expected piecewise'),
                        ({'ema': 0.9, 'swa': 1}, 'one average'), ({'val_attack': 'ce-x'}, 'number of steps'),
                        ({'objective': 'n-fgsm', 'threat': ThreatModel('L2', Fraction(1, 2))}, 'expected Linf'),
                        ({'objective': 'fgsm-rs'}, 'expected steps 1, with a step of 5/4 eps'),
                        ({'freeze_bn': True, 'clean_pass': 'after'}, 'expected none'),
                        ({'fsdp': True, 'awp': 0.1}, 'expected no --awp'),
                        ({'schedule': 'piecewise', 'milestones': '1, 9'}, 'past the end')):
        with pytest.raises(ValueError, match=text):  # a notebook's recipe, too
            recipe(**wrong)


def test_milestones_are_epochs() -> None:
    chosen = recipe(lr=1.0, min_lr=0.0, schedule='piecewise', milestones='1,2.5', epochs=3)
    rates = [learning_rate(chosen, step, 4, 12) for step in range(12)]
    assert rates == pytest.approx([1] * 4 + [0.1] * 6 + [0.01] * 2)


def test_steps_equal_the_recipe_written_out() -> None:
    """Loss, penalty, clip of beta's gradient, SGD with nesterov and decay on everything, schedule per step."""
    ours = trainer()
    model = copy.deepcopy(ours.unwrapped)
    momenta: dict[str, torch.Tensor] = {}
    for step in range(4):
        x0, y = ours.batches[step]
        generator = torch.Generator().manual_seed(derive_seed(4, 2, step, 0))
        x = pgd(model, x0, y, ThreatModel(steps=2), generator)
        model.train()
        model.zero_grad()
        loss = F.cross_entropy(model(x), y) + 10 * model.act.beta.abs().sum()
        loss.backward()
        beta = model.act.beta
        beta.grad.mul_(min(1.0, 0.01 / (beta.grad.norm() + 1e-6)))
        lr = 0.01 + (0.1 - 0.01) * 0.5 * (1 + math.cos(math.pi * step / 6))
        with torch.no_grad():
            for name, p in model.named_parameters():
                grad = p.grad + 5e-4 * p
                momenta[name] = 0.9 * momenta[name] + grad if name in momenta else grad.clone()
                p -= lr * (grad + 0.9 * momenta[name])
        ours.train_step()
    for name, p in ours.unwrapped.state_dict().items():
        torch.testing.assert_close(p, model.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)


def test_objective_is_the_mean_cross_entropy_of_the_attacked_images() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    x0, y = torch.rand(5, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    loss, counts = pgd_at(model, x0, y, lambda x, _: 1 - x)
    logits = model(1 - x0)
    expected = -logits.softmax(1)[range(5), y].log().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # the loss is computed in float32
    assert torch.equal(counts['adv_correct'], logits.argmax(1) == y)


def test_penalty_is_on_beta_alone() -> None:
    model = timm.create_model('wrn10_1_pssilu', act_kwargs={'alpha': 3.0, 'beta': -0.25})
    assert paf_penalty(paf_parameters(model), 10).item() == pytest.approx(2.5)  # type: ignore[union-attr]
    for name in ('wrn10_1_psilu', 'wrn10_1_relu', 'wrn10_1_ssilu'):
        assert paf_penalty(paf_parameters(timm.create_model(name)), 10) == 0


@pytest.mark.parametrize(('changes', 'attack_loss'), [
    ({'objective': 'trades', 'robust_weight': 3.0}, 'kl'), ({'objective': 'mart', 'label_smoothing': 0.1}, 'ce'),
    ({'attack_bn': 'train-frozen'}, 'ce'), ({'awp': 0.01}, 'ce'), ({'objective': 'trades', 'awp': 0.01}, 'kl'),
    ({'cutmix': 1.0}, 'ce')])
def test_a_step_of_each_objective_written_out(changes: dict[str, object], attack_loss: str) -> None:
    """The gradient of the objective on the images of its attack, at weights that AWP has moved, on mixed images."""
    run = trainer(paf_clip=0.0, **changes)
    chosen, model = run.recipe, copy.deepcopy(run.unwrapped)
    x0, y = run.batches[0]
    if chosen.cutmix:
        x0, y = cutmix(x0, y, 10, 1.0, torch.Generator().manual_seed(derive_seed(4, 6, 0, 0)))
    x = pgd(model, x0, y, ThreatModel(steps=2), torch.Generator().manual_seed(derive_seed(4, 2, 0, 0)),
            loss=attack_loss, bn=chosen.attack_bn)
    model.train()

    def loss() -> torch.Tensor:
        return OBJECTIVES[chosen.objective].loss(
            model, x0, y, lambda *_, **__: x, beta=chosen.robust_weight, label_smoothing=chosen.label_smoothing)[0]

    kept = [p.detach().clone() for p in model.parameters()]
    statistics = copy.deepcopy(dict(model.named_buffers()))
    if chosen.awp:
        gradients = torch.autograd.grad(loss(), list(model.parameters()))
        with torch.no_grad():
            for p, gradient in zip(model.parameters(), gradients):
                if p.ndim > 1:
                    p += gradient * (chosen.awp * p.norm() / gradient.norm())
            for name, buffer in model.named_buffers():
                buffer.copy_(statistics[name])
    model.zero_grad()
    (loss() + 10 * model.act.beta.abs().sum()).backward()
    run.train_step()
    for before, (name, p), trained in zip(kept, model.named_parameters(), run.unwrapped.parameters()):
        torch.testing.assert_close(trained.grad, p.grad, rtol=1e-4, atol=1e-5, msg=name)
        # SGD's first step with nesterov, from the weights that were there before AWP
        expected = before - 0.1 * 1.9 * (p.grad + 5e-4 * before)
        torch.testing.assert_close(trained.detach(), expected, rtol=1e-4, atol=1e-5, msg=name)
    for name, buffer in run.unwrapped.named_buffers():
        torch.testing.assert_close(buffer, model.get_buffer(name), rtol=1e-4, atol=1e-5, msg=name)
    assert run.metric_sums['clean_images'] == 8  # of the objective's own forward, or of one every ten steps


def test_one_step_training_is_looked_at_with_pgd(tmp_path: Path) -> None:
    run = trainer(objective='fgsm-rs', threat=ThreatModel(step=Fraction(10, 255), steps=1))
    for _ in range(3):
        run.train_step()
    row = run.end_epoch()
    x0, y = to_float(run.batches.data.images), run.batches.data.labels
    x = pgd(run.frozen, x0, y, ThreatModel(step=Fraction(1, 255), steps=20, random_start=False), loss='cw')
    assert row['pgd_adv_accuracy'] == pytest.approx((run.frozen(x).argmax(1) == y).double().mean().item())
    assert row['catastrophic_overfitting'] is False
    run.history[:] = [(0.5, 0.4), (0.9, 0.0)]
    other = trainer(objective='fgsm-rs', threat=ThreatModel(step=Fraction(10, 255), steps=1))
    other.resume(run.save(tmp_path))
    assert other.history == [(0.5, 0.4), (0.9, 0.0)]
    for _ in range(3):
        other.train_step()
    other.history.append((1.0, 0.01))
    assert has_overfitted(other.history)


def test_the_average_is_the_recursion_by_hand(tmp_path: Path) -> None:
    """Of parameters and BatchNorm's statistics, with timm's warm-up of the decay; and it goes on after a resume."""
    run, other = trainer(ema=0.6), trainer(ema=0.6)
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 5):
        run.train_step()
        decay = 0.0 if step == 1 else min(0.6, 1 - step ** (-2 / 3))
        for name, value in run.unwrapped.state_dict().items():
            if not value.is_floating_point() or step == 1:
                expected[name] = value.clone()
            else:
                expected[name] = decay * expected[name] + (1 - decay) * value
        if step == 2:
            other.resume(run.save(tmp_path))
    assert run.ema is not None
    for name, value in run.ema.module.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
        assert torch.equal(run.weights()[name], value)
    for _ in range(2):
        other.train_step()
    assert all(torch.equal(v, other.weights()[k]) for k, v in run.weights().items())
    assert not torch.equal(run.weights()['fc.weight'], run.unwrapped.fc.weight)


@pytest.mark.parametrize('bn', ['average', 'copy'])
def test_an_equal_average_is_torchs(bn: str, tmp_path: Path) -> None:
    """torch.optim.swa_utils, updated at the end of each epoch from the second on; and it goes on after a resume."""
    run = trainer(swa=2, epochs=4, ema_bn=bn)  # epochs of three steps
    theirs: torch.optim.swa_utils.AveragedModel | None = None
    for step in range(1, 13):
        run.train_step()
        if step == 3:
            for ours, now in zip(run.weights().values(), run.unwrapped.state_dict().values()):
                assert torch.equal(ours, now)
        if step == 8:
            other = trainer(swa=2, epochs=4, ema_bn=bn)
            other.resume(run.save(tmp_path))
            run = other
        if step in (6, 9, 12):
            theirs = theirs or torch.optim.swa_utils.AveragedModel(run.unwrapped, use_buffers=bn == 'average')
            theirs.update_parameters(run.unwrapped)
    assert theirs is not None
    for name, value in run.weights().items():
        if value.is_floating_point():  # torch averages the number of batches too
            torch.testing.assert_close(value, theirs.module.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)


def test_what_is_not_decayed() -> None:
    model = timm.create_model('resnet18_w8_pssilu')
    norms = {f'{name}.{key}' for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)
             for key in ('weight', 'bias')}
    for no_decay, expected in (
            (None, set()), ('bn', norms), ('bias', {name for name in norms if name.endswith('bias')} | {'fc.bias'}),
            ('paf', {'act.alpha', 'act.beta'}), ('bn,bias,paf', norms | {'fc.bias', 'act.alpha', 'act.beta'})):
        groups = parameter_groups(recipe(no_decay=no_decay), model)
        names = {id(p): name for name, p in model.named_parameters()}
        found = [names[id(p)] for group in groups for p in group['params']]
        assert sorted(found) == sorted(names.values())
        assert {names[id(p)] for group in groups if group.get('weight_decay') == 0 for p in group['params']} == expected
    groups = parameter_groups(recipe(no_decay='paf', paf_weight_decay=0.3), model)
    assert [group['weight_decay'] for group in groups if 'weight_decay' in group] == [0.3]
    with pytest.raises(ValueError, match='Sequential has no BatchNorm; expected no --no-decay bn'):
        parameter_groups(recipe(no_decay='bn'), nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="unknown --no-decay 'head'; expected some of bn, bias, paf"):
        recipe(no_decay='bn,head')


def test_the_momentum_of_norms() -> None:
    run = trainer(bn_momentum=0.25)
    norm = next(module for module in run.unwrapped.modules() if isinstance(module, nn.BatchNorm2d))
    seen = list[torch.Tensor]()
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    run.train_step()
    torch.testing.assert_close(norm.running_mean, 0.25 * seen[-1].mean((0, 2, 3)))
    with pytest.raises(ValueError, match='ConvNeXt has no BatchNorm; expected no --bn-momentum'):
        trainer(model='convnext_atto', bn_momentum=0.1)


def test_the_attack_that_chooses_epochs() -> None:
    held_out = small_set(8)
    for chosen, loss, steps in (('ce-3', 'ce', 3), ('cw-2', 'cw', 2)):
        run = trainer(val=8, val_attack=chosen)
        for _ in range(3):
            run.train_step()
        row = run.end_epoch()
        x0, y = to_float(held_out.images), held_out.labels
        generator = torch.Generator().manual_seed(derive_seed(4, 11, 0))
        x = pgd(run.frozen, x0, y, ThreatModel(steps=steps), generator, loss=loss)  # steps of eps / 4
        assert row['val_adv_accuracy'] == (run.frozen(x).argmax(1) == y).double().mean().item()


def test_a_pass_of_clean_images_counts_them_and_updates_statistics_alone() -> None:
    plain, shown = trainer(), trainer(clean_pass='after')
    plain.train_step()
    shown.train_step()
    for name, p in plain.unwrapped.named_parameters():
        assert torch.equal(p, shown.unwrapped.get_parameter(name))
    model = copy.deepcopy(plain.unwrapped).train()
    x0, y = plain.batches[0]
    right = (model(x0).argmax(1) == y).sum()
    for name, value in model.named_buffers():
        torch.testing.assert_close(shown.unwrapped.get_buffer(name), value, rtol=1e-5, atol=1e-6, msg=name)
    assert shown.metric_sums['clean_correct'] == right
    assert shown.metric_sums['clean_images'] == 8


def test_an_average_of_ends_is_chosen_where_it_has_begun() -> None:
    run = trainer(swa=2, epochs=3, patience=1, val=8, val_attack='ce-1')
    for epoch in range(3):
        for _ in range(3):
            assert not run.out_of_patience or epoch > 1
            run.train_step()
        assert (run.end_epoch()['best_epoch'] >= 1) is (epoch >= 1)


def test_perturbed_weights_leave_the_statistics_of_the_attack() -> None:
    plain, perturbed = (trainer(attack_bn='train', awp=awp, awp_warmup_epochs=0.0) for awp in (0.0, 0.01))
    for run in (plain, perturbed):
        run.train_step()
    norms = [next(m for m in run.unwrapped.modules() if isinstance(m, nn.BatchNorm2d)) for run in (plain, perturbed)]
    assert norms[0].num_batches_tracked == norms[1].num_batches_tracked == 3  # two steps of the attack, one pass after


def test_ikl_of_a_class_that_was_not_seen_is_finite() -> None:
    model, (x0, y) = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (torch.rand(2, 3, 2, 2), torch.tensor([0, 2]))
    weights = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.8, 0.1], [0.0, 0.0, 0.0]])
    loss, _ = OBJECTIVES['ikl'].loss(model, x0, y, lambda x, *_, **__: 1 - x, class_weights=weights)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_ikl_resumes_exactly_in_an_epoch(tmp_path: Path) -> None:
    whole, other = (trainer(objective='ikl', robust_weight=4.0, accumulate=2) for _ in range(2))
    for step in range(6):
        if step == 3:
            whole.end_epoch()
        if step == 4:
            other.resume(whole.save(tmp_path))
            assert torch.equal(other.gradients.class_weights, whole.gradients.class_weights)  # type: ignore[arg-type]
        whole.train_step()
    for _ in range(2):
        other.train_step()
    for name, value in whole.state_dict()['model'].items():
        assert torch.equal(value, other.state_dict()['model'][name]), name
    whole.end_epoch()
    other.end_epoch()
    assert torch.equal(other.gradients.class_weights, whole.gradients.class_weights)  # type: ignore[arg-type]


def test_activations_may_have_a_learning_rate_and_decay_of_their_own() -> None:
    run = trainer(paf_lr=0.02, paf_weight_decay=0.3, momentum=0.0, paf_clip=0.0, paf_penalty=0.0)
    before = {k: v.detach().clone() for k, v in run.unwrapped.named_parameters()}
    run.train_step()
    for name, lr, decay in (('act.alpha', 0.02, 0.3), ('act.beta', 0.02, 0.3), ('fc.weight', 0.1, 5e-4)):
        p = run.unwrapped.get_parameter(name)
        torch.testing.assert_close(p.detach(), before[name] - lr * (p.grad + decay * before[name]))


def timms_groups(model: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
    try:
        from timm.optim import param_groups_layer_decay
    except ImportError:
        from timm.optim.optim_factory import param_groups_layer_decay
    return param_groups_layer_decay(model, 0.05, getattr(model, 'no_weight_decay', set)(), layer_decay=layer_decay)


@pytest.mark.parametrize('name', ['wrn10_1_pssilu', 'resnet10t', 'convnext_atto', 'vit_tiny_patch16_224'])
def test_a_layer_decay_is_timms(name: str) -> None:
    model = timm.create_model(name, num_classes=3)
    chosen = recipe(model=name, layer_decay=0.7, weight_decay=0.05)
    theirs, ours = timms_groups(model, 0.7), parameter_groups(chosen, model)
    shared = {id(p) for p in paf_parameters(model).values()}  # are of no layer
    if shared:
        last = ours.pop()
        assert ({id(p) for p in last['params']}, last['lr_scale'], last['weight_decay']) == (shared, 1.0, 0.05)
        theirs = [{**group, 'params': [p for p in group['params'] if id(p) not in shared]} for group in theirs]
        theirs = [group for group in theirs if group['params']]
    for group, expected in zip(ours, theirs, strict=True):
        assert [id(p) for p in group['params']] == [id(p) for p in expected['params']]
        assert group['weight_decay'] == expected['weight_decay']
        assert group['lr_scale'] == expected['lr_scale']
    assert len({group['lr_scale'] for group in ours}) > 3

    # The classifier and the PAFs leave these groups, with all else as it was.
    if 'resnet' in name:
        convert_activations(model, 'pssilu', 'layer')
    pafs, head = {id(p) for p in paf_parameters(model).values()}, {id(p) for p in model.get_classifier().parameters()}
    of_timm = {id(p): group for group in timms_groups(model, 0.7) for p in group['params']}
    options = {'head_lr': 0.5, **({'paf_lr': 0.02, 'paf_weight_decay': 0.3} if pafs else {})}
    groups = parameter_groups(dataclasses.replace(chosen, **options), model)
    found = [(id(p), group) for group in groups for p in group['params']]
    assert sorted(key for key, _ in found) == sorted(id(p) for p in model.parameters())  # each once
    for key, group in found:
        expected = of_timm[key]
        assert group['lr_scale'] == pytest.approx(
            5 if key in head else 0.2 if key in pafs else expected['lr_scale'])
        assert group['weight_decay'] == (0.3 if key in pafs else expected['weight_decay'])
    for wrong, text in (({'head_lr': 1.0}, 'no classifier'), ({'layer_decay': 0.5}, 'no group_matcher')):
        with pytest.raises(ValueError, match=text):
            parameter_groups(recipe(**wrong), nn.Sequential(nn.Linear(2, 2)))


def test_each_parameter_moves_at_its_own_rate() -> None:
    run = trainer(layer_decay=0.5, head_lr=0.3, paf_lr=0.02, momentum=0.0, paf_clip=0.0, paf_penalty=0.0)
    before = {k: v.detach().clone() for k, v in run.unwrapped.named_parameters()}
    scales = {id(p): (group['lr_scale'], group['weight_decay']) for group in timms_groups(run.unwrapped, 0.5)
              for p in group['params']}
    run.train_step()
    for name, p in run.unwrapped.named_parameters():
        scale, decay = scales[id(p)]
        lr = 0.3 if name.startswith('fc.') else 0.02 if name.startswith('act.') else 0.1 * scale
        torch.testing.assert_close(
            p.detach(), before[name] - lr * (p.grad + (5e-4 if decay else 0) * before[name]), msg=name)
    for _ in range(2):
        run.train_step()
    assert run.end_epoch()['lr'] == pytest.approx(run.recipe.min_lr + 0.09 * math.cos(math.pi * 2 / 12) ** 2)


def test_frozen_norms_are_those_of_evaluation(tmp_path: Path) -> None:
    def with_statistics() -> Trainer:
        run = trainer(freeze_bn=True, paf_clip=0.0, paf_penalty=0.0, ema=0.9)
        generator = torch.Generator().manual_seed(0)
        for norm in (module for module in run.unwrapped.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.running_mean.uniform_(-0.5, 0.5, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
        return run

    run = with_statistics()
    start = copy.deepcopy(run.unwrapped)
    norms = {f'{name}.{key}' for name, module in start.named_modules() if isinstance(module, nn.BatchNorm2d)
             for key in module.state_dict()}
    assert len(norms) == 5 * len([m for m in start.modules() if isinstance(m, nn.BatchNorm2d)]) > 30
    x0, y = run.batches[0]
    x = pgd(start, x0, y, ThreatModel(steps=2), torch.Generator().manual_seed(derive_seed(4, 2, 0, 0)))
    F.cross_entropy(start.eval()(x), y).backward()
    run.train_step()
    for name, p in run.unwrapped.named_parameters():
        if name in norms:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, start.get_parameter(name).grad, rtol=1e-4, atol=1e-6, msg=name)
    path = run.save(tmp_path)
    run.train_step()
    other = with_statistics()
    other.resume(path)
    other.train_step()
    ours, theirs, begun = run.state_dict(), other.state_dict(), start.state_dict()
    for part in ('model', 'ema'):
        assert all(torch.equal(value, theirs[part][name]) for name, value in ours[part].items())
        assert all(torch.equal(ours[part][name], begun[name]) for name in norms)
    assert not torch.equal(ours['model']['fc.weight'], begun['fc.weight'])
    with pytest.raises(ValueError, match='ConvNeXt has no BatchNorm'):
        trainer(model='convnext_atto', freeze_bn=True)


def test_adamw_is_torch_s_and_others_are_timm_s() -> None:
    runs = [trainer(optimizer=name, lr=0.01) for name in ('adamw', 'lion')]
    model = copy.deepcopy(runs[0].unwrapped)
    reference = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=5e-4)
    runs[0].train_step()
    for p, trained in zip(model.parameters(), runs[0].unwrapped.parameters()):
        p.grad = trained.grad
    reference.step()
    for p, trained in zip(model.parameters(), runs[0].unwrapped.parameters()):
        torch.testing.assert_close(p, trained)
    with torch.no_grad():
        runs[1].unwrapped.fc.bias[0] = math.nan
    before = {k: v.clone() for k, v in runs[1].unwrapped.named_parameters()}
    with pytest.raises(NonFiniteLoss):  # it can't be told on the device, so the host looks before the step
        runs[1].train_step()
    assert all(torch.equal(p.nan_to_num(), before[k].nan_to_num()) for k, p in runs[1].unwrapped.named_parameters())
    with pytest.raises(ValueError, match="unknown optimizer 'adamv'; expected sgd, adamw or"):
        trainer(optimizer='adamv')


def test_warm_ups() -> None:
    run = trainer(warmup_epochs=1.0, eps_warmup_epochs=4 / 3, schedule='linear')
    rates, eps = [], []
    for run.step in range(6):  # three steps an epoch
        rates.append(run.learning_rate())
        eps.append((run.threat().eps, run.threat().step))
    assert rates == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1, 0.01 + 0.09 * 2 / 3, 0.01 + 0.09 / 3])
    assert eps == [(Fraction(8 * k, 4 * 255), Fraction(2 * k, 4 * 255)) for k in (1, 2, 3, 4, 4, 4)]


def test_a_share_of_the_batch_stays_clean() -> None:
    run = trainer(clean_ratio=0.25)
    x0, y = run.batches[0]
    x = run.attack(x0, y)
    changed = (x != x0).flatten(1).any(1).tolist()
    assert changed == [False] * 2 + [True] * 6


def test_adversarial_accuracy_is_of_attacked_images_alone() -> None:
    run = trainer(clean_ratio=0.25, accumulate=2)
    seen: list[torch.Tensor] = []
    run.gradients.trained.register_forward_hook(lambda _, args, logits: seen.append(logits.argmax(1)))
    _, y = run.batch()
    run.train_step()
    right = torch.cat(seen) == y
    assert len(right) == 8
    assert run.progress()['adv_accuracy'] == torch.cat([right[1:4], right[5:]]).double().mean().item()
    assert right[[0, 4]].double().mean() != run.progress()['adv_accuracy']


def test_accumulated_parts_are_one_step_on_their_mean_gradient() -> None:
    run = trainer(accumulate=2, paf_clip=0.0, clip_grad=0.5)
    model = copy.deepcopy(run.unwrapped)
    x0, y = run.batches[0]
    generator = torch.Generator().manual_seed(derive_seed(4, 2, 0, 0))
    model.zero_grad()
    for part in (slice(0, 4), slice(4, 8)):
        x = pgd(model.eval(), x0[part], y[part], ThreatModel(steps=2), generator)
        (F.cross_entropy(model.train()(x), y[part]) / 2).backward()
    (10 * model.act.beta.abs().sum()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    run.train_step()
    for (name, p), trained in zip(model.named_parameters(), run.unwrapped.parameters()):
        torch.testing.assert_close(trained.grad, p.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_held_out_images_choose_the_best_epoch(tmp_path: Path) -> None:
    held_out = small_set(11)
    run = Trainer(recipe(ema=0.5, val=11, epochs=4, patience=2), timm.create_model('wrn10_1_pssilu'),
                  Batches(small_set(), 8, 4, 'cpu'), Accelerator(cpu=True), held_out)
    threat = ThreatModel(step=Fraction(1, 255), steps=20, random_start=False)
    x0, y = to_float(held_out.images), held_out.labels
    accuracies, ended = [], None
    for epoch in range(4):
        for _ in range(3):
            run.train_step()
        row = run.end_epoch()
        for name, model in (('val', run.frozen), ('ema_val', run.ema.module)):
            x = pgd(model, x0, y, threat, loss='cw')
            for kind, images in (('clean', x0), ('adv', x)):
                expected = (model(images).argmax(1) == y).double().mean().item()
                assert row[f'{name}_{kind}_accuracy'] == pytest.approx(expected)
        accuracies.append(row['ema_val_adv_accuracy'])
        best = accuracies.index(max(accuracies))
        assert row['best_epoch'] == best
        if best == epoch:
            weights = run.weights()
        assert all(torch.equal(value, weights[name]) for name, value in run.result().items())
        assert run.out_of_patience == (epoch - best >= 2)
        if run.out_of_patience and ended is None:
            ended = epoch
    other = trainer(ema=0.5, val=11, epochs=4, patience=2)
    other.resume(run.save(tmp_path))
    assert other.selection.best == run.selection.best
    assert all(torch.equal(value, weights[name]) for name, value in other.result().items())


@pytest.mark.parametrize('changes', [
    {'ema': 0.5, 'patience': 1}, {'objective': 'fgsm-rs', 'threat': ThreatModel(steps=1)}, {'objective': 'ikl'}],
    ids=['ema', 'fgsm-rs', 'ikl'])
def test_the_end_of_an_epoch_that_is_broken_off_changes_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    """Neither here nor in a run that resumes; each batch of each measurement may be the one."""
    def started() -> Trainer:
        return trainer(val=11, **changes)

    seen: list[tuple[str, int, int]] = []
    whole = started()
    for _ in range(3):
        whole.train_step()
    assert whole.at_epoch_end
    path = whole.save(tmp_path)
    row = whole.end_epoch(lambda *at: seen.append(at))
    assert not whole.at_epoch_end
    names = ['val', *(['ema_val'] if 'ema' in changes else [])]
    expected = [(name, done, 11) for name in names for done in (0, 8)]
    assert seen == expected + [('pgd', done, 24) for done in (0, 8, 16)] * (changes.get('objective') == 'fgsm-rs')
    for count in range(len(seen)):
        run, at = started(), iter(range(len(seen)))
        run.resume(path)

        def between(*_: object, at: Any = at, count: int = count) -> None:
            if next(at) == count:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run.end_epoch(between)
        assert run.at_epoch_end
        assert not run.done
        assert run.end_epoch() == row
        assert run.selection.best == whole.selection.best
        assert run.gradients.state_dict().keys() == whole.gradients.state_dict().keys()


def test_frozen_values_stay() -> None:
    run = trainer(act_kwargs={'alpha': 2.0, 'frozen': ['alpha']})
    for _ in range(2):
        run.train_step()
    assert run.unwrapped.act.alpha.item() == 2.0
    assert list(run.pafs) == ['act.beta']
    assert run.unwrapped.act.beta.item() != pytest.approx(1e-8, rel=1e-3)


def test_resume_is_exact(tmp_path: Path) -> None:
    whole = trainer()
    for _ in range(6):
        whole.train_step()
    first = trainer()
    for _ in range(4):
        first.train_step()
    path = first.save(tmp_path)
    second = trainer()
    torch.manual_seed(99)  # the global state a process starts with does not matter
    second.resume(path)
    assert second.step == 4
    for _ in range(2):
        second.train_step()
    for name, value in whole.unwrapped.state_dict().items():
        assert torch.equal(second.unwrapped.state_dict()[name], value), name
    assert second.end_epoch() == whole.end_epoch()
    states = whole.optimizer.state_dict()['state'], second.optimizer.state_dict()['state']
    assert all(torch.equal(states[0][k]['momentum_buffer'], states[1][k]['momentum_buffer']) for k in states[0])


def test_checkpoints_keep_the_newest_two_and_hold_no_code(tmp_path: Path) -> None:
    run = trainer()
    for _ in range(4):
        run.train_step()
        run.save(tmp_path)
    kept = sorted(path.name for path in (tmp_path / 'checkpoints').iterdir())
    assert kept == ['step-00000003', 'step-00000004']
    torch.load(tmp_path / 'checkpoints' / kept[0] / 'state.pt', weights_only=True)


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    run, said = trainer(), []
    (tmp_path / 'run.json').write_text(json.dumps({'recipe': recipe().record()}))
    paths = []
    for _ in range(2):
        run.train_step()
        paths.append(run.save(tmp_path))
    whole = (paths[1] / 'checkpoint.json').read_bytes()
    (paths[1] / 'state.pt').write_bytes((paths[1] / 'state.pt').read_bytes()[:-100])
    assert prepare_output(tmp_path, recipe().record(), 'auto', said.append) == paths[0]
    assert len(said) == 1
    assert 'skips' in said[0]
    assert 'step-00000002/state.pt is damaged' in said[0]
    again = trainer()
    again.resume(paths[0])
    again.train_step()
    again.save(tmp_path)  # where the damaged one was
    assert prepare_output(tmp_path, recipe().record(), 'auto', said.append) == paths[1]
    assert len(said) == 1
    assert json.loads(whole).keys() == json.loads((paths[1] / 'checkpoint.json').read_bytes()).keys()
    for path in paths:
        (path / 'state.pt').unlink()
    with pytest.raises(ValueError, match=r'every checkpoint in .* is damaged; start anew with another --output'):
        prepare_output(tmp_path, recipe().record(), 'auto', said.append)


@pytest.mark.parametrize('keep', [1, 2])
def test_the_checkpoint_that_was_just_written_stays(tmp_path: Path, keep: int) -> None:
    """Also where a damaged one of a later step is still there, which does not count."""
    run = trainer()
    run.keep = 4
    paths = []
    for _ in range(3):
        run.train_step()
        paths.append(run.save(tmp_path))
    (paths[2] / 'state.pt').write_bytes(b'')
    shutil.rmtree(paths[1])
    again = trainer()
    again.keep = keep
    again.resume(paths[0])
    again.train_step()
    assert again.save(tmp_path) == paths[1]
    assert sorted((tmp_path / 'checkpoints').iterdir()) == paths[2 - keep:2]


def test_a_part_of_the_first_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / '.run.json.123.part').write_text('{')
    assert prepare_output(tmp_path, recipe().record(), 'auto') is None


def test_timing_leaves_the_statistics_alone() -> None:
    run = trainer(attack_bn='train', compile=False)
    before = [b.clone() for b in run.unwrapped.buffers()]
    time_attack_step(run)
    assert all(torch.equal(b, kept) for b, kept in zip(run.unwrapped.buffers(), before, strict=True))


def test_an_average_that_is_asked_for_later_begins_at_the_weights(tmp_path: Path) -> None:
    run = trainer()
    run.train_step()
    other = trainer(ema=0.9, seed=5)
    other.resume(run.save(tmp_path), lambda line: None)
    assert all(torch.equal(value, run.weights()[name]) for name, value in other.weights().items())


def test_gradient_checkpointing_changes_no_gradient() -> None:
    runs = [trainer(), trainer()]
    runs[1].unwrapped.set_grad_checkpointing(True)
    for run in runs:
        run.train_step()
    for (name, p), other in zip(runs[0].unwrapped.named_parameters(), runs[1].unwrapped.parameters(), strict=True):
        torch.testing.assert_close(other, p, rtol=1e-5, atol=1e-6, msg=name)


def test_another_recipe_anyway_is_said(tmp_path: Path) -> None:
    run, other, said = trainer(), trainer(lr=0.2), []
    run.train_step()
    other.resume(run.save(tmp_path), said.append)
    assert said == ['resumes from another run: lr 0.1, now 0.2']
    assert other.step == 1


@pytest.mark.parametrize('damage', ['truncated', 'tampered', 'foreign', 'no record', 'other recipe'])
def test_damaged_checkpoints_are_refused(tmp_path: Path, damage: str) -> None:
    run = trainer()
    run.train_step()
    path = run.save(tmp_path)
    before = {k: v.clone() for k, v in run.unwrapped.state_dict().items()}
    state, about = path / 'state.pt', path / 'checkpoint.json'
    other = trainer()
    match damage:
        case 'truncated':
            state.write_bytes(state.read_bytes()[:1000])
            message = 'state.pt is damaged: sha256 .*; without --resume the newest whole one'
        case 'tampered':
            raw = bytearray(state.read_bytes())
            raw[len(raw) // 2] ^= 1
            state.write_bytes(raw)
            message = 'state.pt is damaged'
        case 'foreign':
            about.write_text('{"epoch": 3}')
            message = 'is not of train_robust.py'
        case 'no record':
            about.unlink()
            message = 'checkpoint.json is missing'
        case _:
            other = trainer(lr=0.2)
            message = 'is of another run: lr 0.1, now 0.2'
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        other.resume(path)
    assert all(torch.equal(v, before[k]) for k, v in run.unwrapped.state_dict().items())
    assert other.step == 0


@pytest.mark.parametrize('look_every', [1, 3])
def test_a_loss_that_is_not_finite_stops_before_the_step(look_every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training_module.SYNC_EVERY, 'cpu', look_every)  # a GPU is looked at every tenth step
    run = trainer()
    run.train_step()
    with torch.no_grad():
        run.unwrapped.fc.bias[0] = math.nan
    before = {k: v.clone() for k, v in run.unwrapped.named_parameters()}
    if look_every == 3:
        run.train_step()
    with pytest.raises(NonFiniteLoss, match=r'step 1 \(epoch 0\): the loss'):
        run.train_step()
    for name, p in run.unwrapped.named_parameters():
        assert torch.equal(p.nan_to_num(), before[name].nan_to_num())


def test_a_gradient_that_is_not_finite_never_reaches_weights_or_files(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training_module.SYNC_EVERY, 'cpu', 100)
    run = trainer()
    run.train_step()
    before = {k: v.clone() for k, v in run.unwrapped.named_parameters()}
    hook = run.unwrapped.fc.weight.register_hook(lambda grad: grad * math.inf)
    run.train_step()
    hook.remove()
    run.train_step()  # a good one, but after a step that was left out
    assert all(torch.equal(p, before[name]) for name, p in run.unwrapped.named_parameters())
    for method in (run.end_epoch, lambda: run.save(tmp_path)):
        with pytest.raises(NonFiniteLoss, match=r'step 1 \(epoch 0\): the gradient'):
            method()
    assert not list(tmp_path.iterdir())


def test_a_step_that_is_left_out_first_leaves_no_trace_in_the_momentum() -> None:
    """As GradScaler does when its first scale is too large."""
    runs = [trainer(), trainer()]
    inner = runs[0].optimizer.optimizer
    for p in runs[0].unwrapped.parameters():
        p.grad = torch.full_like(p, math.inf)
    inner.found_inf = torch.ones(())
    inner.step()
    for run in runs:
        run.train_step()
    for first, second in zip(*(run.unwrapped.parameters() for run in runs)):
        assert torch.equal(first, second)


def test_momentum_follows_the_memory_format(tmp_path: Path) -> None:
    plain = {'threat': ThreatModel('Linf', Fraction(0))}  # under attack the sign of a gradient near 0 may turn
    runs = [trainer(channels_last=last, **plain) for last in (True, False)]
    for run in runs:
        run.train_step()
    changed = trainer(channels_last=False, **plain)
    changed.resume(runs[0].save(tmp_path), lambda _: None)
    for run in (runs[1], changed):
        run.train_step()
    for first, second in zip(runs[1].unwrapped.parameters(), changed.unwrapped.parameters()):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_generated_images_are_in_every_part_of_a_batch(tmp_path: Path) -> None:
    model = timm.create_model('wrn10_1_pssilu', num_classes=10)
    run = Trainer(recipe(synthetic={'fraction': 0.5}), model, mixed(tmp_path, 0.5), Accelerator(cpu=True))
    x0, y = run.batches[0]
    shuffled, labels = run.batch()
    assert not torch.equal(shuffled, x0)
    assert sorted(labels.tolist()) == sorted(y.tolist())
    assert torch.equal(shuffled.sum((1, 2, 3)).sort().values, x0.sum((1, 2, 3)).sort().values)


def test_synchronised_statistics_change_no_name_and_no_logit() -> None:
    """Training with them needs several GPUs; alone, torch's SyncBatchNorm is BatchNorm."""
    run, other = trainer(sync_bn=True), trainer()
    norms = [m for m in run.unwrapped.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)
    for _ in range(2):
        run.train_step()
        other.train_step()
    assert all(torch.equal(v, run.weights()[k]) for k, v in other.weights().items())


def test_the_attacked_view_follows_the_model(tmp_path: Path) -> None:
    run, other = trainer(), trainer()
    for _ in range(2):
        run.train_step()
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(run.frozen(x), run.unwrapped.eval()(x), rtol=0, atol=0)
    other.resume(run.save(tmp_path))
    torch.testing.assert_close(other.frozen(x), run.frozen(x), rtol=0, atol=0)
    assert not any(p.requires_grad for p in run.frozen.parameters())
    assert all(p.requires_grad for p in run.unwrapped.parameters())


def test_compiled_training_is_the_same() -> None:
    """Twenty steps to 1e-4, in two programs that a change of mode, learning rate or PAF values does not remake."""
    runs = [trainer(compile=compiled, epochs=7) for compiled in (False, True)]
    losses: list[list[float]] = [[], []]
    programs = []
    for run, seen in zip(runs, losses):
        for _ in range(20):
            before = run.metric_sums['loss'].item()
            run.train_step()
            seen.append(run.metric_sums['loss'].item() - before)
            programs.append(counters['stats']['unique_graphs'])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-4)
    assert [runs[1].unwrapped.act.alpha.item()] != [1.0]
    assert programs[20] > programs[19]
    assert programs[-1] == programs[20]


def test_cuda_graphs_are_asked_of_the_compiler() -> None:
    """A CPU has none, so what they give is for tests/gpu; where they can't be had they are refused."""
    torch._dynamo.reset()  # of programs that tests before it compiled in this process
    runs = [trainer(**options) for options in ({'compile': True}, {'cuda_graphs': True})]
    for run in runs:
        for _ in range(2):
            run.train_step()
    assert runs[0].metric_sums['loss'] == runs[1].metric_sums['loss']
    assert [runner(run.recipe, True, 1).keywords['mode'] for run in runs] == [None, 'reduce-overhead']
    with pytest.raises(ValueError, match='one GPU, and there are 2 processes; expected one, or no --cuda-graphs'):
        runner(runs[1].recipe, True, 2)
    for name, value in (('compile', False), ('accumulate', 2), ('fsdp', True)):
        with pytest.raises(ValueError, match=f'--{"" if value else "no-"}{name}.* does not work with --cuda-graphs'):
            dataclasses.replace(runs[1].recipe, **{name: value})


@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_smaller_last_batch_counts_as_its_images(tmp_path: Path, compiled: bool) -> None:
    """Steps of 8, 8 and 4 images: whole epochs in the metrics, two programs for each mode, an exact resume."""
    changes = {'drop_last': False, 'compile': compiled, 'ema': 0.9, 'accumulate': 2, 'epochs': 3}
    run = trainer(20, **changes)
    assert (run.batches.steps_per_epoch, run.total_steps) == (3, 9)
    first, programs = counters['stats']['unique_graphs'], []
    for step in range(1, 10):
        run.train_step()
        programs.append(counters['stats']['unique_graphs'] - first)
        if step == 4:
            saved = run.save(tmp_path)
        if step % 3 == 0:
            assert run.metric_sums['images'] == 20
            row = run.end_epoch()
            assert row['epoch'] == step // 3 - 1
            assert row['adv_accuracy'] * 20 == pytest.approx(round(row['adv_accuracy'] * 20))
    assert programs == ([2, 2, 4, 4, 4, 4, 4, 4, 4] if compiled else [0] * 9)
    torch._dynamo.reset()
    other = trainer(20, **changes)
    other.resume(saved)
    for _ in range(5):
        other.train_step()
        again = other.end_epoch() if other.step % 3 == 0 else None
    assert all(map(torch.equal, other.weights().values(), run.weights().values()))
    assert again == row


@pytest.mark.parametrize(('n', 'changes', 'words'), [
    (17, {}, 'there is 1 image to work on at once in the last batch of an epoch; expected more: another batch size'),
    (21, {'mixup': 1.0}, 'mixup pairs the images of a batch and a process has 5 in the last batch of an epoch'),
    (21, {'accumulate': 2}, 'accumulate is 2; expected a divisor of the 5 images of a process in the last batch of an'),
    (18, {'accumulate': 2}, 'there is 1 image to work on at once in the last batch')])
def test_a_last_batch_that_cannot_be_worked_on_is_refused(n: int, changes: dict[str, object], words: str) -> None:
    run = {'drop_last': False, **changes}
    with pytest.raises(ValueError, match=words):
        trainer(n, **run)
    trainer(n, **{**run, 'drop_last': True})


def test_output_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    assert prepare_output(tmp_path / 'new', recipe().record(), 'auto') is None
    assert prepare_output(tmp_path, recipe().record(), 'never') is None  # empty
    (tmp_path / 'thesis.tex').write_text('years')
    with pytest.raises(FileExistsError, match=r'holds files but no run\.json'):
        prepare_output(tmp_path, recipe().record(), 'auto')
    (tmp_path / 'run.json').write_text(json.dumps({'recipe': recipe().record()}))
    assert prepare_output(tmp_path, recipe().record(), 'auto') is None
    with pytest.raises(FileExistsError, match='holds a run; expected a new --output'):
        prepare_output(tmp_path, recipe().record(), 'never')
    with pytest.raises(FileExistsError, match='holds another run: epochs 2, now 3; seed 4, now 5'):
        prepare_output(tmp_path, recipe(seed=5, epochs=3).record(), 'auto')
    with pytest.raises(FileNotFoundError, match='--resume'):
        prepare_output(tmp_path, recipe().record(), str(tmp_path / 'nowhere'))


def test_metrics_rows_come_once(tmp_path: Path) -> None:
    path = tmp_path / 'metrics.jsonl'
    for step in (10, 20, 30, 20):
        append_metrics(path, {'step': step})
    assert [json.loads(line)['step'] for line in path.read_text().splitlines()] == [10, 20]


def test_metrics_are_means_over_the_images() -> None:
    run = trainer()
    for _ in range(3):
        run.train_step()
    row = run.end_epoch()
    assert row['epoch'] == 0
    assert row['step'] == 3
    assert 0 < row['loss'] < 10
    assert row['adv_accuracy'] * 24 == pytest.approx(round(row['adv_accuracy'] * 24))
    assert row['clean_accuracy'] * 8 == pytest.approx(round(row['clean_accuracy'] * 8))  # counted at one step of three
    assert row['act.alpha'] == run.unwrapped.act.alpha.item()
    for _ in range(3):
        run.train_step()
    assert run.metric_sums['clean_images'] == 8  # every epoch counts some
