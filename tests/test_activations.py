"""The activations against their closed forms, evaluated by mpmath with 40 digits: it shares nothing with torch."""

from __future__ import annotations

import copy
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from timm_paf import activations
from timm_paf.activations import (
    PAF,
    PELU,
    PSoftplus,
    PSSiLU,
    SSiLU,
    create_paf,
    list_pafs,
    paf_parameters,
)
from timm_paf.sharing import SharedActivation

mpmath.mp.dps = 40


def sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


# The table of the paper, written a second time. `a` and `b` are alpha and beta.
TRUTH = {
    'relu': lambda x, a, b: max(x, mpmath.mpf(0)),
    'elu': lambda x, a, b: x if x > 0 else mpmath.exp(x) - 1,
    'softplus': lambda x, a, b: mpmath.log(1 + mpmath.exp(x)),
    'silu': lambda x, a, b: x * sigmoid(x),
    'gelu': lambda x, a, b: x * mpmath.ncdf(x),
    'prelu': lambda x, a, b: x if x > 0 else a * x,
    'prelu_plus': lambda x, a, b: a * x if x > 0 else mpmath.mpf(0),
    'pelu': lambda x, a, b: x if x > 0 else a * (mpmath.exp(x) - 1),
    'reblu': lambda x, a, b: a * (mpmath.sqrt(x * x + 1) - 1) + x if x > 0 else mpmath.mpf(0),
    'psoftplus': lambda x, a, b: mpmath.log(1 + mpmath.exp(a * x)) / a,
    'psilu': lambda x, a, b: x * sigmoid(abs(a) * x),
    'ssilu': lambda x, a, b: x * (sigmoid(x) - b) / (1 - b),
    'pssilu': lambda x, a, b: x * (sigmoid(abs(a) * x) - abs(b)) / (1 - abs(b)),
}
INIT = {
    'prelu': {'alpha': 0}, 'prelu_plus': {'alpha': 1}, 'pelu': {'alpha': 1}, 'reblu': {'alpha': 0},
    'psoftplus': {'alpha': 1}, 'psilu': {'alpha': 1}, 'ssilu': {'beta': 0.3}, 'pssilu': {'alpha': 1, 'beta': 1e-8}}
PAFS, ALL = list(INIT), list(TRUTH)
KINKED = {'relu', 'elu', 'prelu', 'prelu_plus', 'pelu', 'reblu'}  # piecewise: nothing is differentiated at 0
# dyadic, so that float32 and float64 parameters hold the same number
SETTINGS = [{'alpha': 1.75, 'beta': 0.375}, {'alpha': 0.625, 'beta': -0.125}, {'alpha': -0.75, 'beta': 0.25}]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}


def build(name: str, dtype: torch.dtype, values: dict[str, float], **kwargs) -> nn.Module:
    kwargs.update({k: v for k, v in values.items() if k in INIT.get(name, {})})
    return create_paf(name, dtype=dtype, **kwargs)


def truth(name: str, x: torch.Tensor, alpha: float, beta: float, wrt: str = '') -> torch.Tensor:
    """The function, or its derivative with respect to x, alpha or beta, in float64; each distinct x once."""
    shift = {'': None, 'x': (1, 0, 0), 'alpha': (0, 1, 0), 'beta': (0, 0, 1)}[wrt]
    step = mpmath.mpf(10) ** -15  # central difference: 2e-30 away from exact, at 40 digits

    def at(value: float) -> float:
        point = [mpmath.mpf(v) for v in (value, alpha, beta)]
        if shift is None:
            return float(TRUTH[name](*point))
        high, low = ([p + sign * step * s for p, s in zip(point, shift)] for sign in (1, -1))
        return float((TRUTH[name](*high) - TRUTH[name](*low)) / (2 * step))

    distinct, inverse = np.unique(x.detach().double().numpy(), return_inverse=True)
    values = torch.tensor([at(v) for v in distinct], dtype=torch.float64)
    return values[torch.from_numpy(inverse)].reshape(x.shape)


def points(limit: float, dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
    """Both signs, evenly spaced in the logarithm, from 1e-6 to the limit."""
    size = torch.logspace(-6, math.log10(limit), 45, dtype=torch.float64)
    return torch.cat([-size, torch.zeros(int(zero), dtype=torch.float64), size]).to(dtype)


def tiny(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What rounding may cost at x: the terms of every formula and derivative are of about the size 1 + |x|."""
    return TOLERANCE[dtype] * (1 + x.double().abs())


def test_names_and_initial_values() -> None:
    assert list_pafs() == PAFS
    assert set(list_pafs(plain=True)) == set(ALL)
    assert list_pafs(plain=True)[-len(PAFS):] == PAFS
    for name, values in INIT.items():
        act = create_paf(name)
        assert type(act).__name__ in activations.__all__
        assert {k: v.tolist() for k, v in act.state_dict().items()} == {
            k: pytest.approx([v], rel=1e-7) for k, v in values.items()}
        assert all(v.shape == (1,) for v in act.state_dict().values())  # as in the published checkpoints


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('values', SETTINGS, ids=str)
@pytest.mark.parametrize('name', ALL)
def test_value_is_the_closed_form(name: str, values: dict[str, float], dtype: torch.dtype) -> None:
    x = points(40, dtype, zero=True)
    y = build(name, dtype, values)(x)
    assert y.dtype == dtype
    assert y.shape == x.shape
    linear = math.exp(-20) if name == 'softplus' else 0  # nn.Softplus is the identity past 20
    assert ((y.double() - truth(name, x, **values)).abs() <= tiny(x, dtype) + linear).all()


@pytest.mark.parametrize('name', ALL)
def test_first_and_second_derivatives(name: str) -> None:
    """By finite differences in float64, for the input and the parameters, with respect to both at once."""
    x = [-6.0, -2.5, -1.0, -0.3, -0.02, 0.015, 0.25, 0.9, 2.0, 7.0] + ([] if name in KINKED else [0.0])
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    for values in SETTINGS:
        act = build(name, torch.float64, values, **({'frozen': False} if name in PAFS else {}))
        inputs = (x, *act.parameters())
        assert len(inputs) == 1 + len(INIT.get(name, {}))
        assert gradcheck(lambda v, *_, act=act: act(v), inputs)
        assert gradgradcheck(lambda v, *_, act=act: act(v), inputs)


@pytest.mark.parametrize('values', SETTINGS, ids=str)
@pytest.mark.parametrize('name', ALL)
def test_float32_is_accurate_up_to_1e4(name: str, values: dict[str, float]) -> None:
    act = build(name, torch.float32, values, **({'frozen': False} if name in PAFS else {}))
    x = points(1e4, torch.float32).requires_grad_()
    y = act(x)
    (grad,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert ((y.double() - truth(name, x, **values)).abs() <= tiny(x.detach(), torch.float32)).all()
    # an x-derivative stays near 1, however large x is
    assert ((grad.double() - truth(name, x, **values, wrt='x')).abs() <= 4e-6 + 4e-7 * grad.double().abs()).all()
    for key, parameter in act.named_parameters():  # one row of the Jacobian per element: a sum would hide errors
        jacobian = torch.stack([torch.autograd.grad(v, parameter, retain_graph=True)[0] for v in y]).flatten().double()
        assert ((jacobian - truth(name, x, **values, wrt=key)).abs() <= 2 * tiny(x.detach(), torch.float32)).all(), key


@pytest.mark.parametrize('name', ALL)
def test_gradients_are_finite_everywhere(name: str) -> None:
    """At 0, where some are a convention, at initial values where abs() has its kink nearby, and where exp overflows."""
    x = torch.tensor([-3e4, -1e4, -89.0, -0.0, 0.0, 1e-38, 89.0, 1e4, 3e4])
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        act = create_paf(name, **({'frozen': False} if name in PAFS else {}))
        v = x.to(dtype, copy=True).requires_grad_()
        y = act(v)
        y.sum().backward()
        assert y.isfinite().all()
        assert v.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in act.parameters())


@pytest.mark.parametrize('name', PAFS)
def test_bfloat16_input_with_float32_parameters(name: str) -> None:
    values = SETTINGS[0]
    act = build(name, torch.float32, values, frozen=False)
    x = (3 * torch.randn(20000, generator=torch.Generator().manual_seed(0))).bfloat16().requires_grad_()
    y = act(x)
    assert y.dtype == torch.bfloat16
    expected = truth(name, x, **values)
    # half a unit in the last of 8 bits; computing in bfloat16 throughout would be several times that
    assert ((y.double() - expected).abs() <= 2 ** -8 * 1.001 * expected.abs() + 1e-6).all()
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    slope = truth(name, x, **values, wrt='x')
    away = (x != 0).detach()
    assert ((x.grad.double() - slope).abs() <= 2 ** -8 * 1.001 * slope.abs() + 1e-5)[away].all()
    for key, parameter in act.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.item() == pytest.approx(truth(name, x, **values, wrt=key).sum().item(), rel=0.01), key


def test_parameters_and_input_of_other_dtypes() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for other in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            for name in PAFS:
                y = create_paf(name, dtype=dtype)(torch.randn(3, 2, dtype=other))
                assert (y.dtype, y.shape) == (other, (3, 2)), name


@given(x=st.floats(-1e3, 1e3, width=32), alpha=st.floats(0.125, 4, width=32), beta=st.floats(-0.75, 0.75, width=32))
@settings(max_examples=60)
def test_closed_form_for_any_value(x: float, alpha: float, beta: float) -> None:
    v, values = torch.tensor([x], dtype=torch.float64), {'alpha': alpha, 'beta': beta}
    for name in PAFS:
        y = build(name, torch.float64, values)(v)
        assert abs(y - truth(name, v, **values)) <= 1e-13 * (1 + abs(x)) * (1 + alpha), name


@given(x=st.lists(st.floats(-50, 50, width=32), max_size=8), alpha=st.floats(0.125, 4), beta=st.floats(0, 0.75))
@settings(max_examples=40)
def test_symmetries_and_special_cases(x: list[float], alpha: float, beta: float) -> None:
    v = torch.tensor(x, dtype=torch.float64)
    new = {'dtype': torch.float64}
    # only the absolute values count
    signed = [create_paf('pssilu', alpha=a, beta=b, **new)(v) for a in (alpha, -alpha) for b in (beta, -beta)]
    assert all(torch.equal(signed[0], other) for other in signed)
    same = {'rtol': 1e-12, 'atol': 1e-12}
    psilu = create_paf('psilu', alpha=alpha, **new)(v)
    torch.testing.assert_close(create_paf('pssilu', alpha=alpha, beta=0.0, **new)(v), psilu, **same)
    torch.testing.assert_close(psilu, torch.nn.functional.silu(alpha * v) / alpha, **same)
    torch.testing.assert_close(
        create_paf('pssilu', alpha=1.0, beta=beta, **new)(v), create_paf('ssilu', beta=beta, **new)(v), **same)
    for name, plain in {'prelu': 'relu', 'prelu_plus': 'relu', 'reblu': 'relu', 'pelu': 'elu',
                        'psoftplus': 'softplus', 'psilu': 'silu'}.items():
        torch.testing.assert_close(create_paf(name, **new)(v), create_paf(plain)(v), rtol=1e-12, atol=3e-9, msg=name)


@pytest.mark.parametrize(('name', 'frozen', 'learnable'), [
    ('pssilu', None, {'alpha', 'beta'}), ('pssilu', False, {'alpha', 'beta'}), ('pssilu', True, set()),
    ('pssilu', 'alpha', {'beta'}), ('pssilu', ('beta',), {'alpha'}), ('pssilu', ['alpha', 'beta'], set()),
    ('pssilu', (), {'alpha', 'beta'}), ('ssilu', None, set()), ('ssilu', False, {'beta'}), ('ssilu', (), {'beta'}),
    ('pelu', True, set())])
def test_frozen_values_are_saved_buffers_that_no_step_changes(name, frozen, learnable) -> None:
    start = dict.fromkeys(INIT[name], 0.5)
    act = create_paf(name, frozen=frozen, **start)
    assert {key for key, _ in act.named_parameters()} == learnable
    assert {key for key, _ in act.named_buffers()} == set(start) - learnable
    if learnable:
        optimizer = torch.optim.SGD(act.parameters(), lr=0.1, weight_decay=0.1)
        act(torch.linspace(-3, 2, 20)).sum().backward()
        optimizer.step()
    state = act.state_dict()
    assert set(state) == set(INIT[name])
    assert {key for key, value in state.items() if value.item() != 0.5} == learnable
    # a file from a frozen one loads into a learnable one, and back
    for other in (create_paf(name, frozen=True), create_paf(name, frozen=False)):
        other.load_state_dict(state, strict=True)
        x = torch.linspace(-4, 4, 9)
        assert torch.equal(other(x), act(x))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"'mish'.*relu.*psoftplus.*pssilu"):
        create_paf('mish')
    with pytest.raises(TypeError, match='PSSiLU has no parameter gamma; it has alpha, beta'):
        create_paf('pssilu', gamma=1.0)
    for frozen in ('gamma', ('alpha', 'gamma')):
        with pytest.raises(TypeError, match='PSSiLU has no parameter gamma; it has alpha, beta'):
            PSSiLU(frozen=frozen)
    with pytest.raises(TypeError, match='SSiLU has no parameter alpha; it has beta'):
        SSiLU(alpha=2.0)


def test_what_a_module_of_torch_is_asked_for() -> None:
    x = torch.linspace(-3, 3, 7)
    for name in PAFS:
        kept = x.clone()
        act = create_paf(name, inplace=True)  # timm passes it
        assert isinstance(act, PAF)
        assert torch.equal(act(kept), create_paf(name)(x))
        assert torch.equal(kept, x)  # and it is not acted on
    act = PSSiLU(alpha=2.0, frozen='beta')
    assert repr(act) == 'PSSiLU(alpha=2, beta=1e-08 frozen)'
    assert repr(PELU(device='meta')) == 'PELU()'
    twin = copy.deepcopy(act)
    twin.alpha.data.fill_(3)
    assert act.alpha.item() == 2
    assert act.half()(x.half()).dtype == torch.float16
    assert create_paf('relu', inplace=True, device='cpu', dtype=torch.float64).inplace


def test_paf_parameters_are_each_found_once() -> None:
    shared, own = PSSiLU(frozen='beta'), PSoftplus()
    model = nn.Sequential(SharedActivation(shared), nn.Linear(2, 2), nn.PReLU(), SharedActivation(shared), own, SSiLU())
    found = paf_parameters(model)
    assert set(found) == {'0.act.alpha', '4.alpha'}
    assert found['0.act.alpha'] is shared.alpha
    assert found['4.alpha'] is own.alpha
    assert paf_parameters(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize(('act', 'values'), [
    ('pssilu', {'beta': 1}), ('pssilu', {'beta': -1.0}), ('ssilu', {'beta': 1 - 1e-9}), ('psoftplus', {'alpha': 0}),
    ('psilu', {'alpha': math.nan}), ('prelu', {'alpha': math.inf})])
def test_values_at_which_an_activation_is_not_finite_are_refused(act: str, values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f'{next(iter(values))} is .* is not finite; expected another number'):
        create_paf(act, **values)


@pytest.mark.parametrize('act', list_pafs())
def test_nan_stays_nan(act: str) -> None:
    """Or a guard against values that are not finite would see nothing."""
    x = torch.tensor([math.nan, 1.0], requires_grad=True)
    y = create_paf(act)(x)
    assert y.isnan().tolist() == [True, False]
    grad, = torch.autograd.grad(y.sum(), x)
    assert grad[1].isfinite()


@pytest.mark.parametrize('alpha', [0.5, -0.57, 3.0])
def test_reblu_of_large_inputs(alpha: float) -> None:
    """It goes to (1 + alpha) x - alpha, and its slope to 1 + alpha."""
    x = torch.tensor([1e10, 1e18, 1e25, 1e37], requires_grad=True)
    act = create_paf('reblu', alpha=alpha)
    y = act(x)
    torch.testing.assert_close(y, (1 + alpha) * x, rtol=1e-5, atol=0)
    grad, of_alpha = torch.autograd.grad(y.sum(), [x, act.alpha])
    torch.testing.assert_close(grad, torch.full_like(x, 1 + alpha))
    torch.testing.assert_close(of_alpha, x.sum().detach().reshape(1), rtol=1e-5, atol=0)
