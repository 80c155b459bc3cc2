"""The same numbers on a GPU as on the CPU; run with ``pytest -m gpu tests/gpu``."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator

from timm_paf.attacks import ThreatModel, pgd
from timm_paf.data import Batches, ImageSet
from timm_paf.training import Recipe, Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='torch sees no GPU')]


@pytest.fixture(autouse=True)
def full_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def trainer(mixed_precision: str) -> Trainer:
    recipe = Recipe(
        model='wrn10_1_pssilu', dataset='made', epochs=2, batch_size=32, lr=0.05, min_lr=0.001, momentum=0.9,
        weight_decay=5e-4, schedule='cosine', threat=ThreatModel(steps=2), paf_penalty=10.0, paf_clip=0.01,
        mixed_precision=mixed_precision)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (96, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (96,), generator=generator)
    accelerator = Accelerator(mixed_precision=mixed_precision)
    torch.manual_seed(0)
    model = timm.create_model(recipe.model)
    return Trainer(recipe, model, Batches(ImageSet('made', images, labels, 10), 32, 0, accelerator.device), accelerator)


def test_logits_and_attack_equal_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    model = timm.create_model('wrn16_2_pssilu').double().eval()
    x0, y = torch.rand(8, 3, 32, 32, dtype=torch.float64), torch.arange(8)
    threat = ThreatModel(steps=5, random_start=False)
    logits, attacked = model(x0), pgd(model, x0, y, threat)
    model.cuda()
    torch.testing.assert_close(model(x0.cuda()).cpu(), logits, rtol=1e-9, atol=1e-9)
    on_gpu = pgd(model, x0.cuda(), y.cuda(), threat).cpu()
    assert (on_gpu == attacked).double().mean() > 0.999  # the sign of a gradient near 0 may turn


@pytest.mark.parametrize('mixed_precision', ['no', 'bf16', 'fp16'])
def test_training_runs_and_resumes(tmp_path: Path, mixed_precision: str) -> None:
    whole, first, second = trainer(mixed_precision), trainer(mixed_precision), trainer(mixed_precision)
    for _ in range(4):
        whole.train_step()
    for _ in range(2):
        first.train_step()
    second.resume(first.save(tmp_path))
    for _ in range(2):
        second.train_step()
    assert all(p.dtype == torch.float32 for p in whole.unwrapped.parameters())
    for name, value in whole.unwrapped.state_dict().items():
        torch.testing.assert_close(second.unwrapped.state_dict()[name], value, rtol=1e-3, atol=1e-4)
