"""Compiled networks of any batch size, the rule for compiling, and the allocator."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.utils import counters

from timm_paf import speed
from timm_paf.attacks import frozen_view


def test_flops_are_counted_as_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 36, 5))
    assert speed.forward_flops(net, torch.rand(2, 3, 6, 6)) == 2 * (2 * 36 * 8 * 27 + 2 * 8 * 36 * 5)


def test_only_long_work_is_compiled() -> None:
    cpu = torch.device('cpu')
    assert not speed.pays_to_compile(1e9, cpu)
    assert speed.pays_to_compile(1e16, cpu)
    assert not speed.pays_to_compile(1e14, torch.device('cuda'))


@pytest.mark.parametrize(('device', 'flags', 'has'), [
    ('cpu', ('fpu', 'avx512f', 'avx512_bf16'), True), ('cpu', ('avx2', 'amx_bf16', 'amx_tile'), True),
    ('cpu', ('avx2', 'avx512f', 'avx512_vnni', 'amx_tile'), False), ('cpu', (), False),
    ('meta', ('avx512_bf16',), False)])
def test_bfloat16_units_are_those_of_the_device(device: str, flags: tuple[str, ...], has: bool) -> None:
    assert speed.has_bfloat16_units(torch.device(device), flags) is has


@pytest.mark.skipif(not hasattr(torch.cpu, 'get_capabilities'), reason='torch has to know the CPU')
def test_bfloat16_units_of_this_machine_are_those_that_torch_finds() -> None:
    found = torch.cpu.get_capabilities()
    expected = any(found.get(name, False) for name in ('avx512_bf16', 'amx_bf16'))
    assert speed.has_bfloat16_units(torch.device('cpu')) is expected


def test_what_emulates_bfloat16_is_not_what_has_units() -> None:
    """PyTorch's convolutions in bfloat16 leave oneDNN on a CPU without AVX-512: pytorch/pytorch#183815."""
    found = speed.emulates_bfloat16(torch.device('cpu'))
    assert not (found and speed.has_bfloat16_units(torch.device('cpu')))
    capability, cpuinfo = torch.backends.cpu.get_cpu_capability(), Path('/proc/cpuinfo')
    if capability in ('AVX2', 'AVX512') and cpuinfo.is_file():  # elsewhere than on Linux the flags are not known
        assert found == (capability == 'AVX2' and 'avx_ne_convert' not in cpuinfo.read_text().split())
    assert not speed.emulates_bfloat16(torch.device('meta'))


def test_one_program_serves_every_batch_size() -> None:
    torch.manual_seed(0)
    model = frozen_view(timm.create_model('wrn10_1_pssilu'))
    fast = speed.AnyBatch(model)
    programs = []
    for size in (32, 17, 40, 32, 64):  # 32 is also the height of the images
        x = torch.rand(size, 3, 32, 32, requires_grad=True)
        for layout in (torch.contiguous_format, torch.channels_last):
            given = x.contiguous(memory_format=layout)
            torch.testing.assert_close(fast(given), model(given), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(*(torch.autograd.grad(f(given).logsumexp(1).sum(), x)[0] for f in (fast, model)),
                                       rtol=1e-4, atol=1e-6)
            with torch.no_grad():
                torch.testing.assert_close(fast(given), model(given), rtol=1e-5, atol=1e-5)
        programs.append(counters['stats']['unique_graphs'])
    assert programs[-1] == programs[0]
    torch.testing.assert_close(fast(x[:1]), model(x[:1]), rtol=1e-5, atol=1e-5)
    assert fast(x[:1]).shape == (1, 10)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='glibc is what it tells')
def test_freed_memory_is_used_again() -> None:
    code = '''
import resource, torch
from timm_paf.speed import keep_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = faults()
keep_memory()
faults()
print(given_back, faults())
'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True,
                          timeout=300)
    given_back, kept = map(int, done.stdout.split())
    assert kept < given_back / 10
