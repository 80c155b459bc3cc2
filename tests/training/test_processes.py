"""Two processes (gloo) against one: gradients, noise, averages, counts; and what becomes of the rest when one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Program

SCRIPT = '''
import os, sys, copy
from pathlib import Path
import timm, torch
from accelerate import Accelerator
from torch import nn
from timm_paf import create_paf
from timm_paf.attacks import ThreatModel
from timm_paf.data import Batches, ImageSet
from timm_paf.training import Recipe, Trainer

out = Path(sys.argv[1])
accelerator = Accelerator(cpu=True)
rank, world = accelerator.process_index, accelerator.num_processes

def trainer(model, start, by=accelerator, drop_last=True, **changes):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 12, 12, 3), dtype=torch.uint8, generator=generator)
    data = ImageSet('made', images, torch.randint(10, (40,), generator=generator), 10, pad=2)
    recipe = Recipe(
        model='made', dataset='made', epochs=2, batch_size=16, lr=0.1, min_lr=0.01, momentum=0.9, weight_decay=5e-4,
        schedule='cosine', threat=ThreatModel(steps=2, random_start=start), paf_penalty=10.0, paf_clip=0.0,
        drop_last=drop_last, **changes)
    return Trainer(recipe, model, Batches(data, 16, 0, 'cpu', rank, world, drop_last=drop_last), by)

# without BatchNorm, whose statistics are those of a process, and without noise: the same gradient and weights
torch.manual_seed(0)
act = create_paf('pssilu')
run = trainer(nn.Sequential(nn.Conv2d(3, 8, 3), act, nn.Flatten(), nn.Linear(800, 10)).double().float(), False,
              drop_last=False)
run.train_step()
found = {'gradient': {k: p.grad for k, p in run.unwrapped.named_parameters()}}
run.train_step()
run.train_step()
found['gradient of 8 images'] = {k: p.grad for k, p in run.unwrapped.named_parameters()}
found['row'] = run.end_epoch()

# with BatchNorm, noise and an average
torch.manual_seed(0)
run = trainer(timm.create_model('wrn10_1_pssilu'), True, ema=0.9)
for _ in range(2):
    run.train_step()
path = run.save(out / 'run')
x0, y = run.batches[2]
def noise(run):
    from timm_paf.data import derive_seed
    run.generator.manual_seed(derive_seed(0, 2, run.step, rank))
    return run.attack(x0, y) - x0
found['noise'] = noise(run)
torch.manual_seed(0)
other = trainer(timm.create_model('wrn10_1_pssilu'), True, ema=0.9)
other.resume(path)
found['noise after resume'] = noise(other)
found['labels'] = y
found['view'] = all(torch.equal(p, whole) for p, whole in zip(
    [*run.frozen.parameters(), *run.frozen.buffers()], [*run.unwrapped.parameters(), *run.unwrapped.buffers()]))

# IKL in two forward passes: class weights are of all processes, and DDP takes the passes where it broadcasts nothing
from accelerate.utils import DistributedDataParallelKwargs
apart = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
ikl = dict(objective='ikl', robust_weight=4.0, separate_forwards=True)
torch.manual_seed(0)
run_ikl = trainer(nn.Sequential(nn.Conv2d(3, 8, 3), create_paf('pssilu'), nn.Flatten(), nn.Linear(800, 10)), False,
                  by=apart, **ikl)
def reflection(x0, y, loss): return 1 - x0  # the same for an image in any process
run_ikl.attack = reflection
for step in range(4):
    if step == 2:
        run_ikl.end_epoch()
        found['class weights'] = run_ikl.gradients.class_weights
    if step == 3:
        path = run_ikl.save(out / 'ikl')
        found['ikl'] = {k: p.detach().clone() for k, p in run_ikl.unwrapped.named_parameters()}
    run_ikl.train_step()
found['ikl at the end'] = {k: p.detach() for k, p in run_ikl.unwrapped.named_parameters()}
run_ikl.end_epoch()
torch.manual_seed(1)
resumed = trainer(nn.Sequential(nn.Conv2d(3, 8, 3), create_paf('pssilu'), nn.Flatten(), nn.Linear(800, 10)), False,
                  by=apart, **ikl)
resumed.attack = reflection
resumed.resume(path)
resumed.train_step()
found['ikl resumed'] = {k: p.detach() for k, p in resumed.unwrapped.named_parameters()}
resumed.end_epoch()
found['class weights apart'] = (resumed.gradients.class_weights - run_ikl.gradients.class_weights).abs().max().item()
torch.manual_seed(0)
normed = trainer(timm.create_model('wrn10_1_pssilu'), True, by=apart, clean_pass='before', **ikl)
for _ in range(2):
    normed.train_step()
found['normed'] = normed.unwrapped.state_dict()
try:
    trainer(timm.create_model('wrn10_1_pssilu'), True, **ikl)
    found['refused'] = ''
except ValueError as error:
    found['refused'] = str(error)

# FSDP against DDP: momentum, an average, BatchNorm, parts, clipped gradients; and on from a checkpoint
common = dict(channels_last=False, ema=0.9, accumulate=2, clip_grad=1.0)
for name, changes in {'ddp': {}, 'ddp-compiled': {'compile': True}, 'fsdp': {'fsdp': True},
                      'fsdp-compiled': {'fsdp': True, 'compile': True}}.items():
    if world == 1:
        break
    torch.manual_seed(0)
    run = trainer(timm.create_model('wrn10_1_pssilu'), True, **common, **changes)
    for _ in range(2):
        run.train_step()
    path = run.save(out / name.replace('-', '_'))
    run.train_step()
    found[name] = {'weights': run.frozen.state_dict(), 'average': run.weights(), 'row': run.end_epoch()}
    if name == 'fsdp':
        shards = run.parameters.values()
        found['share'] = sum(p.grad.to_local().numel() for p in shards) / sum(p.numel() for p in shards)
        torch.manual_seed(1)
        other = trainer(timm.create_model('wrn10_1_pssilu'), True, **common, **changes)
        other.resume(path)
        other.train_step()
        found['resumed'] = {'weights': other.frozen.state_dict(), 'average': other.weights(), 'row': other.end_epoch()}
found['buffers'] = {k: v.clone() for k, v in run.unwrapped.named_buffers()}
found['average'] = {k: v.clone() for k, v in run.ema.module.state_dict().items()}
torch.save(found, out / f'{world}-{rank}.pt')
accelerator.wait_for_everyone()
os._exit(0)  # as train_robust.py does
'''


@pytest.fixture(scope='module')
def found(tmp_path_factory: pytest.TempPathFactory, program: Program) -> dict[str, dict[str, object]]:
    """What each process of one and of two saw, by '<processes>-<rank>'."""
    folder = tmp_path_factory.mktemp('processes')
    (folder / 'script.py').write_text(SCRIPT)
    for count in (1, 2):
        done = program('-m', 'torch.distributed.run', '--nproc_per_node', count, folder / 'script.py', folder,
                       env={'ACCELERATE_USE_CPU': 'true', 'PYTHONPATH': str(ROOT)})
        assert done.returncode == 0, done.stderr
        for run in [path for path in folder.iterdir() if path.is_dir() and '-' not in path.name]:
            run.rename(folder / f'{run.name}-{count}')
    return {name: torch.load(folder / f'{name}.pt') for name in ('1-0', '2-0', '2-1')}


def test_the_gradient_is_that_of_one_process(found: dict[str, dict[str, object]]) -> None:
    for rank in ('2-0', '2-1'):
        for what in ('gradient', 'gradient of 8 images'):  # the last ones of an epoch of 40 in batches of 16
            for name, gradient in found['1-0'][what].items():
                torch.testing.assert_close(found[rank][what][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_metrics_count_every_image_once(found: dict[str, dict[str, object]]) -> None:
    one, first, second = (found[name]['row'] for name in ('1-0', '2-0', '2-1'))
    assert first == second
    assert first == pytest.approx(one, rel=1e-5)


def test_noise_differs_between_processes_and_comes_again(found: dict[str, dict[str, object]]) -> None:
    first, second = found['2-0'], found['2-1']
    assert not torch.equal(first['noise'], second['noise'])
    for process in (first, second):
        assert torch.equal(process['noise'], process['noise after resume'])
    assert torch.equal(torch.cat([first['labels'], second['labels']]), found['1-0']['labels'])


def test_the_attacked_view_follows_the_trained_network(found: dict[str, dict[str, object]]) -> None:
    assert all(process['view'] for process in found.values())


def test_statistics_and_average_agree(found: dict[str, dict[str, object]]) -> None:
    for what in ('buffers', 'average'):
        first, second = found['2-0'][what], found['2-1'][what]
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_forward_passes_train_the_weights_of_one_process(found: dict[str, dict[str, object]]) -> None:
    one, first, second = (found[name] for name in ('1-0', '2-0', '2-1'))
    for process in (first, second):
        torch.testing.assert_close(process['class weights'], one['class weights'], rtol=1e-4, atol=1e-6)
        for name, value in one['ikl'].items():
            torch.testing.assert_close(process['ikl'][name], value, rtol=1e-3, atol=1e-5, msg=name)
        assert 'broadcast_buffers=False' in process['refused']
        for name, value in process['ikl resumed'].items():
            assert torch.equal(value, process['ikl at the end'][name]), name
        assert process['class weights apart'] < 1e-12
    assert all(torch.equal(value, second['normed'][name]) for name, value in first['normed'].items())


@pytest.mark.parametrize('name', ['ddp-compiled', 'fsdp', 'fsdp-compiled'])
def test_fsdp_and_compiling_train_as_ddp_does(found: dict[str, dict[str, object]], name: str) -> None:
    for rank in ('2-0', '2-1'):
        for what in ('weights', 'average'):
            for key, value in found[rank]['ddp'][what].items():
                torch.testing.assert_close(found[rank][name][what][key], value, rtol=1e-4, atol=1e-5, msg=key)
        assert found[rank][name]['row'] == pytest.approx(found[rank]['ddp']['row'], rel=1e-4)


def test_fsdp_shares_gradients_out_and_resumes_exactly(found: dict[str, dict[str, object]]) -> None:
    for rank in ('2-0', '2-1'):
        assert found[rank]['share'] == pytest.approx(0.5, abs=0.01)
        whole, resumed = found[rank]['fsdp'], found[rank]['resumed']
        assert resumed['row'] == whole['row']
        for what in ('weights', 'average'):
            assert whole[what].keys() == found[rank]['ddp'][what].keys()
            assert all(torch.equal(resumed[what][key], value) for key, value in whole[what].items())


def test_one_process_dying_ends_the_others(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--nproc_per_node', '2', 'train_robust.py',
         '--model', 'wrn10_1_pssilu', '--dataset', 'digits', '--batch-size', '32', '--checkpoint-steps', '1',
         '--output', str(tmp_path / 'run')], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'})
    deadline = time.monotonic() + 200
    while not list((tmp_path / 'run' / 'checkpoints').glob('step-*')):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    workers = [int(pid) for pid in children if b'train_robust.py' in Path(f'/proc/{pid}/cmdline').read_bytes()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    _, err = process.communicate(timeout=100)  # torchrun gives the others 30 seconds to end by themselves
    assert process.returncode != 0
    assert 'Signal 9 (SIGKILL)' in err
    assert not any(Path(f'/proc/{pid}').exists() for pid in workers)


@pytest.mark.skipif(torch.cuda.is_available(), reason='the processes join on GPUs')
def test_processes_that_do_not_join_are_no_trainings_of_their_own(tmp_path: Path) -> None:
    """Accelerate takes each for one alone where torch sees no GPU and nothing asks for CPUs."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
         'train_robust.py', '--model', 'wrn10_1_pssilu', '--dataset', 'digits', '--output', str(tmp_path / 'run')],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env={
            **{name: value for name, value in os.environ.items() if not name.startswith('ACCELERATE')},
            'OMP_NUM_THREADS': '1'})
    assert done.returncode == 1
    assert ('train_robust.py: 2 processes were started, which do not join on cpu; expected a GPU for each, or without '
            'GPUs accelerate launch --cpu, or ACCELERATE_USE_CPU=true\n') in done.stderr
    assert not list(tmp_path.iterdir())
