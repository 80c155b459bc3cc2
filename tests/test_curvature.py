"""Curvature: against a numeric maximum of the second derivative, and activations that start with one."""

from __future__ import annotations

import json
import math
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from networks import EXACT, images, pafs, small
from scipy.optimize import minimize_scalar
from torch import nn

import timm_paf
import train_robust
from hub import bundle
from hub.sources import load_run
from timm_paf import convert_activations, create_paf, curvature, list_pafs, load_bundle
from timm_paf.activations import PAF, ChannelPAF, values_given
from timm_paf.convert import create_converted
from timm_paf.training.metrics import curvatures
from timm_paf.weights import open_weights

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning:timm.*')


def slopes(act: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and second derivatives, by autograd."""
    x = x.clone().requires_grad_()
    first = torch.autograd.grad(act(x).sum(), x, create_graph=True)[0]
    if not first.requires_grad:
        return first, torch.zeros_like(x)
    return first.detach(), torch.autograd.grad(first.sum(), x, materialize_grads=True)[0]


def numeric(act: nn.Module, scales: Sequence[float] = (1.0,), corner: float = 0.0) -> float:
    """The largest second derivative on a grid, refined; infinite if the slope jumps by more than it at the corner."""
    size = torch.cat([torch.logspace(-12, 1.8, 1000, dtype=torch.float64) * scale for scale in scales]).sort()[0]
    x = corner + torch.cat([-size.flip(0), size])
    first, second = slopes(act, x)
    best = int(second.abs().argmax())
    near = minimize_scalar(
        lambda at: -slopes(act, torch.tensor([at], dtype=torch.float64))[1].abs().item(),
        bounds=(x[max(best - 1, 0)].item(), x[min(best + 1, len(x) - 1)].item()), method='bounded',
        options={'xatol': 1e-12 * min(scales)})
    largest = max(second.abs().max().item(), -near.fun)
    across = slice(len(size) - 1, len(size) + 1)
    jump, step = first[across].diff().abs().item(), x[across].diff().item()
    return math.inf if jump > 2 * largest * step + 1e-13 else largest


DRAWN = random.Random(0)
ALPHAS = [*(sign * 10 ** DRAWN.uniform(-6, 6) for sign in (1, -1) for _ in range(8)), 1e-6, -1e6, 1e6, -1.0, 1.0, 0.5]
BETAS = [1e-8, -1e-8, 0.3, -0.3, 0.99, -0.99, 1.5, -2.0, 0.0, *(DRAWN.uniform(-3, 3) for _ in range(4))]
VALUES: list[tuple[str, dict[str, float]]] = [
    *((name, {'alpha': alpha}) for name in ('prelu', 'prelu_plus', 'pelu', 'reblu', 'psoftplus', 'psilu')
      for alpha in ALPHAS),
    *((name, {'alpha': alpha}) for name in ('prelu', 'prelu_plus', 'pelu', 'reblu', 'psilu')
      for alpha in (0.0, 1 + 1e-9, 1 - 1e-9, 1e-9)),
    *(('ssilu', {'beta': beta}) for beta in BETAS),
    *(('pssilu', {'alpha': alpha, 'beta': beta}) for alpha, beta in zip(ALPHAS, BETAS * 2)),
    *((name, {}) for name in list_pafs(plain=True)), ('gelu', {'approximate': 'tanh'}), ('elu', {'alpha': 0.5}),
    ('elu', {'alpha': -1.0}), *(('softplus', {'beta': beta}) for beta in (0.1, 7.0, -3.0))]


@pytest.mark.parametrize('name', list_pafs(plain=True))
def test_it_is_the_largest_second_derivative(name: str) -> None:
    kinds = set()
    for act, values in VALUES:
        if act == name:
            paf = create_paf(name, **values, dtype=torch.float64)
            size = abs(values.get('alpha', values.get('beta', 1.0))) or 1.0
            found, expected = curvature(paf), numeric(paf, (1 / size, 1.0))
            assert found == pytest.approx(expected, rel=1e-6, abs=0), values
            kinds.add('kink' if found == math.inf else 'linear' if found == 0 else 'smooth')
    assert kinds == {'prelu': {'kink', 'linear'}, 'prelu_plus': {'kink', 'linear'}, 'pelu': {'kink', 'smooth'},
                     'elu': {'kink', 'smooth'}, 'reblu': {'kink'}, 'relu': {'kink'},
                     'psilu': {'smooth', 'linear'}}.get(name, {'smooth'})


@pytest.mark.parametrize(('act', 'corner'), [
    (nn.LeakyReLU(0.1), 0), (nn.LeakyReLU(1.0), 0), (nn.PReLU(), 0), (nn.PReLU(init=1.0), 0),
    (nn.Softplus(beta=2.0, threshold=1.0), 0.5), (nn.Softplus(beta=2.0, threshold=15.0), 7.5)])
def test_torchs_other_activations(act: nn.Module, corner: float) -> None:
    assert curvature(act) == numeric(act.double(), corner=corner) in (0, math.inf)


def test_of_values_per_channel_it_is_the_largest() -> None:
    act = ChannelPAF(create_paf('psilu'), 3, 1)
    act.alpha.data = torch.tensor([0.5, -6.0, 2.0])
    assert curvature(act) == 3
    act = ChannelPAF(create_paf('pelu'), 3, 1)
    assert curvature(act) == 1
    act.alpha.data[2] = 0.9
    assert curvature(act) == math.inf
    for dtype in (torch.bfloat16, torch.float16):
        assert curvature(create_paf('psoftplus', alpha=-10.0, dtype=dtype)) == 2.5


@pytest.mark.parametrize('act', [nn.Mish(), nn.Identity(), nn.Sequential(nn.ReLU())])
def test_of_another_module_it_is_not_known(act: nn.Module) -> None:
    with pytest.raises(TypeError, match=rf'^the curvature of {type(act).__name__} is not known; expected a PAF or one '
                                        r'of ReLU, [^\n]*GELU$'):
        curvature(act)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(('name', 'values', 'decided'), [
    ('psilu', {}, 'alpha'), ('psoftplus', {}, 'alpha'), ('ssilu', {}, 'beta'), ('pssilu', {}, 'alpha'),
    ('pssilu', {'beta': 0.3}, 'alpha'), ('pssilu', {'beta': -0.75}, 'alpha'), ('pssilu', {'beta': 1.5}, 'alpha')])
def test_a_paf_starts_with_it(name: str, values: dict[str, float], decided: str, dtype: torch.dtype) -> None:
    for wanted in (1e-6, 0.7, 4, 8, 10.0, 1e4):
        if name == 'ssilu' and wanted * torch.finfo(dtype).eps > 1e-2:
            continue  # its beta is too close to 1
        paf = create_paf(name, curvature=wanted, frozen='alpha' if decided == 'alpha' else None, dtype=dtype, **values)
        # beta of SSiLU is 1 - 1 / (2 curvature), so what rounds it is larger there by that
        rounding = torch.finfo(dtype).eps * (2 * max(1, 2 * wanted) if name == 'ssilu' else 1)
        assert curvature(paf) == pytest.approx(wanted, rel=rounding)
        assert decided in dict(paf.named_buffers())
        for other in set(paf.init) - {decided}:
            assert getattr(paf, other).item() == pytest.approx(values.get(other, paf.init[other]), rel=1e-2)
        again = create_paf(name, curvature=wanted, dtype=dtype, **values)
        again.load_state_dict(create_paf(name, dtype=dtype).state_dict())  # a start, and no more than that
        assert curvature(again) == curvature(create_paf(name, dtype=dtype))
    assert values_given(name, {'curvature', 'frozen'}) == {decided}


def test_closed_forms_of_the_start() -> None:
    assert create_paf('psilu', curvature=8).alpha.item() == 16
    assert create_paf('psoftplus', curvature=8).alpha.item() == 32
    assert create_paf('pssilu', curvature=8, beta=0.25).alpha.item() == 12
    assert create_paf('ssilu', curvature=1 / 1.4).beta.item() == pytest.approx(0.3)
    assert create_paf('psilu', curvature=None).alpha.item() == 1
    assert timm_paf.PSiLU(curvature=8).alpha.item() == 16


@pytest.mark.parametrize(('name', 'kwargs', 'said'), [
    *((name, {'curvature': 8}, f'{name} has no value that sets its curvature; expected none, or one of psoftplus, '
       'psilu, ssilu, pssilu') for name in list_pafs(plain=True)
      if name not in ('psoftplus', 'psilu', 'ssilu', 'pssilu')),
    *(('psilu', {'curvature': value}, f'curvature is {value!r}; expected a number above 0') for value in (
        0, -8, math.nan, math.inf, '8', True, [8])),
    ('psilu', {'curvature': 8, 'alpha': 16}, 'alpha and curvature are both given, and each decides the other; expected '
                                             'one of them'),
    ('pssilu', {'curvature': 8, 'alpha': 16, 'beta': 0.1}, 'alpha and curvature are both given'),
    ('ssilu', {'curvature': 8, 'beta': 0.1}, 'beta and curvature are both given'),
    ('ssilu', {'curvature': 1e7}, 'curvature is 1e+07, which SSiLU does not have for any beta in its precision; expec'),
    ('psilu', {'curvature': 1e-60}, 'curvature is 1e-60, which PSiLU does not have for any alpha'),
    ('psoftplus', {'curvature': 1e38}, 'curvature is 1e+38, which PSoftplus does not have for any alpha'),
    ('pssilu', {'curvature': 8, 'beta': 1.0}, 'beta is 1, where PSSiLU is not finite')])
def test_what_it_can_not_be_is_said(name: str, kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match='expected') as caught:
        create_paf(name, **kwargs)
    assert str(caught.value).startswith(said)
    assert '\n' not in str(caught.value)


def test_networks_start_with_it() -> None:
    for name, kwargs in (('resnet18_w16_psilu', {}), ('wrn10_1_pssilu', {'beta': 0.5}), ('resnet18_in_psoftplus', {})):
        model = timm.create_model(name, act_kwargs={'curvature': 8, **kwargs})
        assert curvature(model.act) == pytest.approx(8)
        assert curvatures(model) == {'act.curvature': curvature(model.act)}
    assert curvatures(small('wrn10_1', 'relu')) == {}
    assert curvatures(timm.create_model('wrn10_1_prelu')) == {}
    # Beside a start it goes before that of the alpha; beta starts as it would.
    for act, start in (('psilu', 'same'), ('pssilu', 'relu'), ('psoftplus', 'same')):
        model = timm.create_model('resnet10t')
        convert_activations(model, act, 'layer', start=start, input_size=(3, 32, 32), curvature=8)
        assert {curvature(paf) for paf in pafs(model)} == {8}
        assert act != 'pssilu' or all(paf.beta.item() == pytest.approx(1e-30) for paf in pafs(model))
    for share in ('network', 'stage', 'channel'):
        model = create_converted('resnet10t', 'psilu', share, {'curvature': 8})
        assert {curvature(paf) for paf in pafs(model)} == {8}
        assert len(curvatures(model)) == len({id(paf) for paf in pafs(model)}) == {
            'network': 1, 'stage': 5, 'channel': 11}[share]
        assert set(curvatures(model)) == {
            f'{name.rpartition(".")[0]}.curvature' for name in timm_paf.paf_parameters(model)}
    with pytest.raises(ValueError, match='relu has no value that sets its curvature'):
        convert_activations(timm.create_model('resnet10t'), 'relu', curvature=8)


def test_weights_without_values_of_the_activation_leave_it(tmp_path: Path) -> None:
    for act, beta in (('pssilu', 1e-30), ('psilu', None)):
        model = timm.create_model(f'wrn10_1_{act}', act_kwargs={'curvature': 8})
        open_weights('wrn10_1_relu').load(model, given={'curvature': 8})
        assert curvature(model.act) == pytest.approx(8)
        assert beta is None or model.act.beta.item() == pytest.approx(beta)
    file = tmp_path / 'relu.pt'
    torch.save(timm.create_model('resnet18').state_dict(), file)
    model = timm.create_model('resnet18_in_pssilu', act_kwargs={'curvature': 8}, pretrained=True,
                              pretrained_cfg_overlay={'file': str(file)})
    assert curvature(model.act) == pytest.approx(8)
    assert model.act.beta.item() == pytest.approx(1e-30)


@pytest.mark.parametrize(('options', 'pafs_of_it'), [
    (['--model', 'wrn10_1_pssilu', '--act-kwargs', '{curvature: 8, frozen: alpha}'], 1),
    (['--model', 'resnet10t', '--act', 'psilu', '--act-share', 'channel', '--act-kwargs', '{curvature: 8}'], 11)])
def test_a_run_its_metrics_its_bundle_and_a_start_from_it(options: list[str], pafs_of_it: int, tmp_path: Path) -> None:
    def train(name: str, *more: str) -> Path:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            assert train_robust.run(train_robust.parse([
                *options, '--dataset', 'digits', '--batch-size', '16', '--attack-steps', '1', '--compile', 'false',
                '--max-steps', '2', '--output', str(tmp_path / name), *more])) == 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return tmp_path / name

    run = train('run')
    assert json.loads((run / 'run.json').read_text())['recipe']['act_kwargs']['curvature'] == 8
    row = json.loads((run / 'metrics.jsonl').read_text())
    model: Any = load_run(run)
    assert {key: value for key, value in row.items() if key.endswith('.curvature')} == curvatures(model)
    assert len(curvatures(model)) == pafs_of_it
    if pafs_of_it == 1:
        assert 8 < row['act.curvature'] == pytest.approx(8 / (1 - model.act.beta.abs().item()))  # alpha is frozen
    else:
        assert all(7 < value < 12 and value != 8 for value in curvatures(model).values()), curvatures(model)
    bundle.main([str(run), '--out', str(tmp_path / 'packed')])
    loaded = load_bundle(tmp_path / 'packed')
    torch.testing.assert_close(loaded(images()), model(images()), **EXACT)
    assert isinstance(pafs(loaded)[0], PAF)
    card = (tmp_path / 'packed' / 'README.md').read_text()
    assert ("act_kwargs={'curvature': 8, 'frozen': 'alpha'})" if pafs_of_it == 1 else
            "'psilu', 'channel', {'curvature': 8}, num_classes=10)") in card
    assert ("largest second derivative, max |f''|, is 8.0" in card) == (pafs_of_it == 1)
    again = train('again', '--init', str(run), '--lr', '1e-6', '--min-lr', '0', '--seed', '1')
    assert curvatures(load_run(again)) == pytest.approx(curvatures(model), rel=1e-4)


@pytest.mark.parametrize(('given', 'said'), [
    ('{curvature: 8, alpha: 2}', 'alpha and curvature are both given'), ('{curvature: -1}', 'curvature is -1; exp'),
    ('{curvature: null}', '--act-kwargs.curvature is None; expected alpha, beta and curvature as numbers within 1e6'),
    ('{alpha: 1e9}', '--act-kwargs.alpha is 1000000000.0; expected'),  # no bundle could hold it
    ('{frozen: gamma}', "--act-kwargs.frozen is 'gamma'; expected")])
def test_a_training_that_no_record_could_hold_does_not_begin(given: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said.replace('.', r'\.')) as caught:
        train_robust.run(train_robust.parse(['--model', 'wrn10_1_pssilu', '--dataset', 'digits', '--act-kwargs', given,
                                             '--output', str(tmp_path / 'run')]))
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'run').exists()
