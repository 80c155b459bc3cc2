"""The PAFs' written-down derivatives, and that every way of running them gives the same numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from torch import Tensor

import timm_paf
from timm_paf import create_paf, kernels, list_pafs

VALUES = {'alpha': 0.7, 'beta': 0.2}
LARGE = 3 * kernels.CHUNK + 17  # several pieces, and a rest


def paf(name: str, dtype: torch.dtype = torch.float64, **kwargs: object) -> torch.nn.Module:
    init = timm_paf.activations._PAFS[name].init
    return create_paf(name, dtype=dtype, **{k: VALUES[k] for k in init}, **kwargs)


def plain(name: str, act: torch.nn.Module, x: Tensor) -> Tensor:
    """The value alone, differentiated by torch's autograd."""
    return kernels.KERNELS[name].value(x, *(getattr(act, k) for k in act.init))


def gradients(y: Tensor, x: Tensor, act: torch.nn.Module, weight: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, [x, *act.parameters()], weight))


@pytest.fixture
def fused() -> Iterator[None]:
    timm_paf.set_fused_pafs(True)
    yield
    assert timm_paf.use_fused_pafs(), 'torch.compile failed, so nothing fused was tested'
    timm_paf.set_fused_pafs(False)


def tensors(dtype: torch.dtype, layout: str = 'flat') -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (LARGE,) if layout in ('flat', 'strided') else (5, 48, 41, 41)
    x, g = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 3 for _ in range(2))
    if layout == 'channels_last':
        x, g = x.to(memory_format=torch.channels_last), g.contiguous()
    if layout == 'strided':
        x, g = torch.stack([x, x], 1)[:, 0], g[:1].expand(LARGE)
    return x.requires_grad_(), g


@pytest.mark.parametrize(('name', 'theirs'), [
    ('relu', torch.nn.functional.relu), ('elu', torch.nn.functional.elu),
    ('prelu', lambda x: torch.nn.functional.prelu(x, torch.tensor([0.7], dtype=x.dtype)))])
def test_at_a_kink_the_derivative_is_torch_s(name: str, theirs: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([-1.0, -0.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    act = create_paf(name, dtype=torch.float64, **({'alpha': 0.7} if name == 'prelu' else {}))
    found, expected = (torch.autograd.grad(f(x).sum(), x)[0] for f in (act, theirs))
    assert torch.equal(found, expected)


@pytest.mark.parametrize('name', list_pafs())
def test_derivatives_are_those_of_the_value(name: str) -> None:
    act = paf(name, frozen=False)
    x = torch.linspace(-9, 9, 181, dtype=torch.float64).requires_grad_()  # 0, the kink, is among them
    weight = torch.linspace(-1, 2, 181, dtype=torch.float64)
    expected = gradients(plain(name, act, x), x, act, weight)
    for found, want in zip(gradients(act(x), x, act, weight), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name', list_pafs())
def test_only_the_input_is_saved(name: str, dtype: torch.dtype) -> None:
    act, saved = paf(name, torch.float32), []
    x = torch.randn(1000, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        act(x)
    large = [t for t in saved if t.numel() > 1]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]


@pytest.mark.parametrize('layout', ['flat', 'channels_last', 'strided'])
@pytest.mark.parametrize('name', list_pafs())
def test_pieces_equal_the_whole(name: str, layout: str) -> None:
    act, (x, g) = paf(name), tensors(torch.float64, layout)
    y, expected = act(x), plain(name, act, x)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    if layout != 'strided':
        assert y.stride() == x.stride()
    for found, want in zip(gradients(y, x, act, g), gradients(expected, x, act, g), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name', list_pafs())
def test_parameter_gradients_are_summed_in_float32(name: str, dtype: torch.dtype) -> None:
    act, (x, g) = paf(name, torch.float32, frozen=False), tensors(dtype)
    exact, x64 = paf(name, frozen=False).requires_grad_(), x.detach().double().requires_grad_()
    found, want = gradients(act(x), x, act, g), gradients(plain(name, exact, x64), x64, exact, g.double())
    terms = [(slope * g.double()).abs().sum() for slope in kernels.KERNELS[name].parameter_grads(
        x64.detach(), *(getattr(exact, k).detach() for k in exact.init))]
    for sum_found, sum_want, size in zip(found[1:], want[1:], terms, strict=True):
        assert sum_found.dtype == torch.float32
        assert (sum_found - sum_want).abs() <= 2e-7 * size
    assert found[0].dtype == dtype
    torch.testing.assert_close(found[0].double(), want[0], rtol=1e-5 if dtype == torch.float32 else 5e-3, atol=1e-5)


@pytest.mark.parametrize('layout', ['flat', 'channels_last'])
@pytest.mark.parametrize('name', list_pafs())
def test_fused_equals_plain(name: str, layout: str, fused: None) -> None:
    act, (x, g) = paf(name), tensors(torch.float64, layout)
    torch.testing.assert_close(act(x), plain(name, act, x), rtol=1e-12, atol=1e-12)
    for found, want in zip(gradients(act(x), x, act, g), gradients(plain(name, act, x), x, act, g), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_fused_in_other_precisions(dtype: torch.dtype, fused: None) -> None:
    act, (x, g) = paf('pssilu', torch.float32), tensors(dtype)
    found = gradients(act(x), x, act, g)
    timm_paf.set_fused_pafs(False)
    want = gradients(act(x), x, act, g)
    timm_paf.set_fused_pafs(True)
    assert (found[0].dtype, found[1].dtype) == (dtype, torch.float32)
    torch.testing.assert_close(found[0], want[0], rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
    torch.testing.assert_close(found[1:], want[1:], rtol=1e-4, atol=0.05)


def test_fused_second_derivative(fused: None) -> None:
    act, (x, g) = paf('pssilu'), tensors(torch.float64)
    first, = torch.autograd.grad(act(x), x, g, create_graph=True)
    second, = torch.autograd.grad(first.sum(), x)
    want, = torch.autograd.grad(plain('pssilu', act, x), x, g, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(want.sum(), x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name', list_pafs())
def test_function_transforms(name: str) -> None:
    act = paf(name)
    x = torch.linspace(-3, 3, 24, dtype=torch.float64).reshape(4, 6) + 0.01

    def scalar(row: Tensor) -> Tensor:
        return (act(row) ** 2).sum()

    one_by_one = torch.stack([torch.autograd.functional.jacobian(scalar, row) for row in x])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(scalar))(x), one_by_one)
    hessian = torch.autograd.functional.hessian(scalar, x[0])
    torch.testing.assert_close(torch.func.hessian(scalar)(x[0]), hessian)
    value, tangent = torch.func.jvp(act, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(value, act(x))
    torch.testing.assert_close(tangent, torch.func.vmap(torch.func.vmap(torch.func.grad(act)))(x))


def test_gradients_in_a_batch_are_those_one_by_one() -> None:
    """Also where the input is large enough to be worked on in pieces."""
    act = paf('pssilu')
    x = torch.linspace(-3, 3, kernels.CHUNK + 8).requires_grad_()
    grads = torch.stack([torch.ones_like(x), torch.arange(len(x)) / len(x)])
    together = torch.autograd.grad(act(x), (x, act.alpha), grads, is_grads_batched=True)
    for i, grad in enumerate(grads):
        for one, of_both in zip(torch.autograd.grad(act(x), (x, act.alpha), grad), together):
            torch.testing.assert_close(of_both[i], one)


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_compiled_network_has_the_same_logits_and_gradients(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    model = timm.create_model('wrn10_1_pssilu').to(dtype).eval()
    x = torch.rand(4, 3, 32, 32, dtype=dtype, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True)  # which raises where the graph breaks

    def results(network: torch.nn.Module) -> list[Tensor]:
        """Logits, the gradient of the input, and that of all parameters as one vector."""
        logits = network(x)
        of_input, *rest = torch.autograd.grad(logits.logsumexp(1).sum(), [x, *model.parameters()])
        return [logits, of_input, torch.cat([g.flatten() for g in rest])]

    for found, want in zip(results(compiled), results(model), strict=True):
        assert (found - want).norm() <= tolerance * want.norm()


def test_compiled_under_autocast() -> None:
    torch.manual_seed(0)
    net = timm.create_model('wrn10_1_pssilu').eval()
    x = torch.rand(2, 3, 16, 16)
    results = []
    torch._dynamo.reset()
    for model in (net, torch.compile(net, fullgraph=True)):
        with torch.autocast('cpu', torch.bfloat16):
            out = model(x)
        results.append([out, *torch.autograd.grad(out.float().pow(2).sum(), list(net.parameters()))])
    assert results[1][0].dtype == torch.bfloat16
    for found, want in zip(results[1], results[0]):
        assert found.dtype == want.dtype
        assert (found - want).norm() <= 0.05 * want.norm() + 1e-3


def test_fx_sees_operations() -> None:
    model = timm.create_model('wrn10_1_pssilu').eval()
    traced = torch.fx.symbolic_trace(model)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize('shape', [(), (0,), (2, 0, 3)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    act = paf('pssilu')
    x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    y = act(x)
    assert y.shape == x.shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_without_a_compiler_there_is_one_warning_and_the_same_numbers() -> None:
    code = '''
import warnings, torch, timm_paf
act, x = timm_paf.create_paf('pssilu'), torch.linspace(-3, 3, 400000)
before = act(x)
timm_paf.set_fused_pafs()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    again = [act(x), act(x)]
ours = [w for w in caught if 'PAFs run uncompiled' in str(w.message)]
assert all(torch.equal(before, y) for y in again) and not timm_paf.use_fused_pafs()
print('warnings:', len(ours))
'''
    # a fresh cache: a kernel that was compiled before would be found there
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300, env={
        **os.environ, 'CXX': '/nowhere/c++', 'TORCHINDUCTOR_FORCE_DISABLE_CACHES': '1'})
    assert done.stdout.splitlines()[-1:] == ['warnings: 1'], done.stderr[-2000:]
