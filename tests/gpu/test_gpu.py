"""The same numbers on a GPU as on the CPU; run with ``pytest -m gpu tests/gpu``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import get_manager

import timm_paf
from timm_paf.attacks import ThreatModel, frozen_view, pgd
from timm_paf.data import Batches, ImageSet
from timm_paf.speed import AnyBatch
from timm_paf.training import Recipe, Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='torch sees no GPU')]


@pytest.fixture(autouse=True)
def full_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def trainer(mixed_precision: str, compiled: bool = False, **changes: object) -> Trainer:
    recipe = Recipe(
        model='wrn10_1_pssilu', dataset='made', epochs=2, batch_size=32, lr=0.05, min_lr=0.001, momentum=0.9,
        weight_decay=5e-4, schedule='cosine', threat=ThreatModel(steps=2), paf_penalty=10.0, paf_clip=0.01,
        mixed_precision=mixed_precision, compile=compiled)
    recipe = dataclasses.replace(recipe, **changes)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (96, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (96,), generator=generator)
    AcceleratorState._reset_state()  # which holds one precision
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


@pytest.mark.parametrize('changes', [
    {}, {'compiled': True}, {'cutmix': 1.0, 'ema': 0.9}, {'objective': 'trades', 'awp': 0.005}, {'objective': 'mart'},
    {'clip_grad': 1.0, 'accumulate': 2}])
def test_the_host_waits_for_no_step(changes: dict[str, Any]) -> None:
    run = trainer('bf16', **changes)
    for _ in range(2):
        run.train_step()
    torch.cuda.set_sync_debug_mode('error')  # raises where the host waits
    try:
        run.train_step()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    run.check_finite()


def test_compiled_training_is_the_same() -> None:
    runs = [trainer('no', compiled) for compiled in (False, True)]
    for run in runs:
        for _ in range(5):
            run.train_step()
    torch.testing.assert_close(*(run.metric_sums['loss'] for run in runs), rtol=1e-4, atol=1e-4)


def test_cuda_graphs_give_the_same_images_and_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured in the first three of eight steps."""
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    without_graph, found = counters['inductor']['cudagraph_skips'], []
    for graphs in (False, True):
        run, losses = trainer('bf16', True, epochs=4, cuda_graphs=graphs), []
        for _ in range(8):
            run.train_step()
            losses.append(run.metric_sums['loss'].item())
        found.append((losses, run.attack(*run.batch())))
    (losses, images), (losses_of_graphs, images_of_graphs) = found
    assert losses_of_graphs == losses
    assert torch.equal(images_of_graphs, images)
    assert counters['inductor']['cudagraph_skips'] == without_graph
    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    assert manager is not None
    assert list(manager.get_roots())


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('name', timm_paf.list_pafs())
def test_activations_equal_those_of_the_cpu(name: str, fused: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(300_000, dtype=torch.float64, generator=generator) for _ in range(2))
    act = timm_paf.create_paf(name, dtype=torch.float64, frozen=False)
    timm_paf.set_fused_pafs(fused)
    results = []
    for device in ('cpu', 'cuda'):
        act, leaf = act.to(device), x.to(device).requires_grad_()
        y = act(leaf)
        gradients = torch.autograd.grad(y, [leaf, *act.parameters()], g.to(device))
        results.append([t.cpu() for t in (y.detach(), *gradients)])
    timm_paf.set_fused_pafs(False)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_one_program_serves_every_batch_size() -> None:
    torch.manual_seed(0)
    model = frozen_view(timm.create_model('wrn10_1_pssilu').cuda())
    fast = AnyBatch(model)
    for size in (32, 17, 1):
        x = torch.rand(size, 3, 32, 32, device='cuda', requires_grad=True)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
