"""A PAF that starts as the activation it replaces: against that activation, and in networks."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from networks import images, pafs, randomise
from torch import nn

from timm_paf import convert_activations, create_paf, list_pafs
from timm_paf.convert import create_converted, fixed_logits
from timm_paf.starts import STARTS, start_values

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning:timm.*')
PAIRS = [(plain, act) for plain, found in STARTS.items() for act in found]
# The largest distance between the functions where they differ: log 2 / 100; max of x sigmoid(-100 x); GELU's by a grid.
CLOSE = {('relu', 'psoftplus'): math.log(2) / 100, ('relu', 'psilu'): 0.0027847, ('relu', 'pssilu'): 0.0027847,
         ('gelu', 'psilu'): 0.0204, ('gelu', 'pssilu'): 0.0204}


@pytest.mark.parametrize(('plain', 'act'), PAIRS)
def test_a_start_is_that_activation_and_learns(plain: str, act: str) -> None:
    x = torch.linspace(-30, 30, 60_001)
    paf, expected = create_paf(act, **start_values(act, plain)), create_paf(plain)(x)
    found = paf(x)
    distance = (found - expected).abs().max().item()
    if (plain, act) in CLOSE:
        assert 0.9 * CLOSE[plain, act] < distance <= 1.01 * CLOSE[plain, act]
    else:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    found.backward(torch.linspace(0.3, 1, len(x)))
    for name, parameter in paf.named_parameters():
        assert parameter.grad is not None
        assert 0 < parameter.grad.abs().item() < math.inf, name


def test_a_shift_of_nothing_is_none_to_rounding() -> None:
    """Bits differ only where the sigmoid is below 1e-22."""
    x = torch.cat([torch.linspace(-30, 30, 60_001), torch.logspace(-6, 2, 100)])
    for plain in ('silu', 'gelu', 'relu'):
        torch.testing.assert_close(create_paf('pssilu', **start_values('pssilu', plain))(x),
                                   create_paf('psilu', **start_values('psilu', plain))(x), rtol=0, atol=1e-27)


def test_what_has_no_start_is_named() -> None:
    assert start_values('relu', 'relu') == {}
    for act, plain, words in (
            ('ssilu', 'silu', 'ssilu has no values with which it is silu; expected another activation, or one of ps'),
            ('prelu', 'silu', 'expected it in place of relu, or one of psilu, pssilu'),
            ('pssilu', 'mish', 'expected it in place of relu, silu, gelu'), ('silu', 'relu', 'or one of prelu')):
        with pytest.raises(ValueError, match=words):
            start_values(act, plain)
    assert set(STARTS['relu']) == set(list_pafs()) - {'ssilu'}


NETWORKS = {'relu': 'resnet10t', 'silu': 'cspdarknet53', 'gelu': 'convnext_atto'}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    kwargs = {'act_layer': nn.SiLU} if name == 'cspdarknet53' else {}
    return randomise(timm.create_model('resnet10t' if kwargs else name, num_classes=5, **kwargs))


@pytest.mark.parametrize(('plain', 'act', 'share'), [
    *((plain, act, 'network') for plain, act in PAIRS if plain in NETWORKS),
    ('relu', 'pssilu', 'channel'), ('silu', 'pssilu', 'stage'), ('relu', 'prelu', 'layer')])
def test_a_converted_network_keeps_its_function(plain: str, act: str, share: str) -> None:
    model, x = network(NETWORKS[plain]).train(), images(4, size=(32, 32))
    before = model.eval()(x)
    model.train()
    done = convert_activations(model, act, share, start='same', input_size=(3, 32, 32))
    assert all(module.training for module in model.modules())
    model.eval()
    # The record's number is that of its four images of noise.
    noise = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    other = network(NETWORKS[plain]).eval()(noise)
    assert done.logits_size == other.abs().max().item()
    assert done.logits_change == pytest.approx((model(noise) - other).abs().max().item(), rel=1e-6)
    assert f'; logits change by at most {done.logits_change:.2g}, the largest is {done.logits_size:.3g}' in str(done)
    change = (model(x) - before).abs().max().item() / before.abs().max().item()
    assert change <= (0.1 if (plain, act) in CLOSE else 1e-5)
    assert all(paf.alpha.unique().item() == pytest.approx(STARTS[plain][act]['alpha']) for paf in pafs(model))


def test_values_given_go_before_those_of_the_start() -> None:
    changes = []
    for alpha in (10.0, 100.0, 1000.0):
        model = network('resnet10t')
        changes.append(convert_activations(
            model, 'pssilu', start='same', input_size=(3, 32, 32), alpha=alpha, frozen='alpha').logits_change)
        assert {paf.alpha.item() for paf in pafs(model)} == {alpha}
        assert {name for paf in pafs(model) for name, _ in paf.named_parameters()} == {'beta'}
    assert changes[0] > 2 * changes[1] > 4 * changes[2]
    model = create_converted('resnet10t', 'psilu', start='same')
    assert {paf.alpha.item() for paf in pafs(model)} == {100}
    assert convert_activations(network('resnet10t'), 'psilu', input_size=(3, 32, 32)).logits_change is None


def test_several_activations_have_no_start_together() -> None:
    def mixed() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))

    size = {'input_size': (3, 8, 8)}
    model = mixed()
    expected = fixed_logits(model, (3, 8, 8))
    with pytest.raises(ValueError, match="has relu, silu, which one pssilu can't all start as; expected share="):
        convert_activations(model, 'pssilu', start='same', **size)
    with pytest.raises(ValueError, match="unknown start 'mish'; expected one of same, relu"):
        convert_activations(model, 'pssilu', start='mish', **size)
    with pytest.raises(ValueError, match='prelu has no values with which it is silu'):
        convert_activations(model, 'prelu', 'layer', start='same', **size)
    assert torch.equal(fixed_logits(model, (3, 8, 8)), expected)  # as it was
    convert_activations(model, 'pssilu', 'layer', start='same', alpha=1e4, replace='relu', **size)
    torch.testing.assert_close(fixed_logits(model, (3, 8, 8)), expected, rtol=1e-3, atol=1e-4)
    for options, alphas in (({'share': 'layer', 'start': 'same'}, [1, 100]), ({'start': 'silu'}, [1, 1])):
        model = mixed()
        convert_activations(model, 'pssilu', **options, **size)
        assert [paf.alpha.item() for paf in pafs(model)] == alphas


def test_our_own_network_starts_as_its_activation() -> None:
    model = randomise(timm.create_model('wrn10_1_silu')).eval()
    expected = model(images())
    done = convert_activations(model, 'pssilu', start='same')
    assert done.pafs == 1
    torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-5)
    assert done.logits_change < 1e-5 < done.logits_size
