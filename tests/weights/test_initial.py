"""Weights to start from: every kind of source, new heads, activations that start as those of the weights."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
from conftest import ROOT
from networks import EXACT, images, in_hub_cache, randomise, small
from safetensors.torch import save_file
from torch import nn

from timm_paf.convert import create_converted
from timm_paf.files import sha256, write_record
from timm_paf.weights import open_weights

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning:timm.*')
BUNDLE = ROOT / 'hub/models/wrn10_1_relu'
NAME = 'wrn10_1_relu.timm_paf_cifar10_linf'


def create(name: str, **kwargs: object) -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model(name, **kwargs).eval()


def saved(model: nn.Module, path: Path) -> Path:
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return path


def write_run(path: Path, model: nn.Module, **changes: object) -> Path:
    path.mkdir()
    file = saved(model, path / 'model.safetensors')
    write_record(path / 'run.json', {
        'status': 'complete', 'architecture': 'wrn10_1_silu', 'num_classes': 10, 'recipe': {'act': None},
        'files': {'model.safetensors': sha256(file)}, **changes})
    return path


@pytest.mark.parametrize('source', ['wrn10_1_relu', NAME, str(BUNDLE)])
def test_a_network_with_a_paf_keeps_the_function_of_relu(source: str) -> None:
    initial = open_weights(source)
    assert (initial.kind, initial.act, initial.model_args) == ('bundle', 'relu', {})
    assert initial.record() == {
        'source': 'wrn10_1_relu' if source == str(BUNDLE) else NAME, 'kind': 'bundle',
        'sha256': sha256(BUNDLE / 'model.safetensors')}
    expected = timm.create_model('wrn10_1_relu', pretrained=True).eval()(images())
    for act, bound in {'prelu': 0, 'pelu': 0, 'reblu': 0, 'prelu_plus': 0, 'pssilu': 0.01, 'psoftplus': 0.05}.items():
        model = create(f'wrn10_1_{act}')
        loaded = initial.load(model)
        assert loaded.act == 'relu'
        assert not loaded.new_head
        assert (model(images()) - expected).abs().max() <= bound + 1e-5
        assert loaded.logits_change <= bound + 1e-5
        assert loaded.logits_size > 1
        assert f'the activation starts as relu, logits change by at most {loaded.logits_change:.2g}' in str(loaded)
    model = create('wrn10_1_relu')
    assert initial.load(model).act is None
    torch.testing.assert_close(model(images()), expected, **EXACT)


def test_a_silu_network_becomes_a_pssilu_network(tmp_path: Path) -> None:
    theirs = small('wrn10_1', 'silu')
    expected = theirs(images())
    run = write_run(tmp_path / 'run', theirs)
    model = create('wrn10_1_pssilu')
    loaded = open_weights(str(run)).load(model)
    assert (loaded.act, loaded.source) == ('silu', 'run')
    torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-5)
    assert model.act.beta.item() == pytest.approx(1e-30)
    # A file does not say what its network's activation is.
    file = saved(theirs, tmp_path / 'mine.safetensors')
    model, initial = create('wrn10_1_pssilu'), open_weights(str(file))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r'mine\.safetensors does not say which activation .* --act-start relu'):
        initial.load(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert initial.load(model, 'silu').act == 'silu'
    torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-5)
    # Values of the user stay.
    for act_start, given in (('relu', ('alpha',)), (None, ('alpha', 'beta'))):
        model = create('wrn10_1_pssilu', act_kwargs={'alpha': 7.0, 'beta': 0.1})
        initial.load(model, act_start, given)
        assert model.act.alpha.item() == 7
        assert model.act.beta.item() == pytest.approx(1e-30 if act_start else 0.1)
    # Values in the weights are loaded, wherever they come from.
    model, other = create('wrn10_1_pssilu'), small('wrn10_1', 'pssilu')
    assert open_weights(str(saved(other, tmp_path / 'other.safetensors'))).load(model).act is None
    torch.testing.assert_close(model(images()), other(images()), **EXACT)
    with pytest.raises(ValueError, match=r'unexpected act\.beta'):
        open_weights(str(tmp_path / 'other.safetensors')).load(create('wrn10_1_psilu'))
    psilu = saved(small('wrn10_1', 'psilu'), tmp_path / 'psilu.safetensors')
    with pytest.raises(ValueError, match=r'lacks act\.beta, and has other values of the activation'):
        open_weights(str(psilu)).load(create('wrn10_1_pssilu'))


def test_a_head_of_another_size_stays_new_and_is_named(tmp_path: Path) -> None:
    theirs = randomise(create('resnet10t', num_classes=7))
    file = saved(theirs, tmp_path / 'theirs.safetensors')
    model = create('resnet10t', num_classes=3)
    head = {key: value.clone() for key, value in model.get_classifier().state_dict().items()}
    loaded = open_weights(str(file)).load(model)
    assert loaded.new_head == ('fc',)
    assert ', new head fc' in str(loaded)
    assert all(torch.equal(value, head[key]) for key, value in model.get_classifier().state_dict().items())
    x = images(size=(64, 64))
    torch.testing.assert_close(model.forward_features(x), theirs.forward_features(x), **EXACT)
    bare = {key: value for key, value in theirs.state_dict().items() if not key.startswith('fc.')}
    torch.save(bare, tmp_path / 'bare.pt')  # of a training without labels
    assert open_weights(str(tmp_path / 'bare.pt')).load(create('resnet10t', num_classes=7)).new_head == ('fc',)
    # All else is strict.
    for change, words in (({'bn1.weight': None}, r'missing bn1\.weight'), ({'mine': torch.ones(1)}, 'unexpected mine'),
                          ({'bn1.weight': torch.ones(3)}, r'bn1\.weight is \(3,\)')):
        state = {key: value for key, value in {**bare, **change}.items() if value is not None}
        torch.save(state, tmp_path / 'wrong.pt')
        with pytest.raises(ValueError, match=words):
            open_weights(str(tmp_path / 'wrong.pt')).load(model)


def test_timms_own_weights_get_images_as_they_expect_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = randomise(create('resnet10t'))
    for name, value in (('HF_HUB_CACHE', str(tmp_path)), ('HF_HUB_OFFLINE', True)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    in_hub_cache(tmp_path, 'timm/resnet10t.c3_in1k', theirs)
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for source, model_name in (('pretrained', 'resnet10t'), ('resnet10t.c3_in1k', None)):
        initial = open_weights(source, model_name)
        assert (initial.source, initial.kind, initial.act) == ('resnet10t.c3_in1k', 'name', None)
        assert initial.model_args == {'normalize': [list(mean), list(std)]}
        content = safetensors.torch.save({k: v.contiguous() for k, v in theirs.state_dict().items()})
        assert initial.sha256 == hashlib.sha256(content).hexdigest()
        model = create_converted('resnet10t', **initial.model_args).eval()
        initial.load(model)
        x = images(size=(64, 64))
        normalised = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        torch.testing.assert_close(model(x), theirs(normalised), **EXACT)
    assert {'normalize.mean', 'normalize.std'} <= model.state_dict().keys()
    with pytest.raises(ConnectionError, match=r'the weights of resnet18\.a1_in1k could not be had'):
        open_weights('resnet18.a1_in1k')
    # Ours of that stem takes them into its first convolution.
    theirs = randomise(create('resnet18'))
    in_hub_cache(tmp_path, 'timm/resnet18.a1_in1k', theirs)
    initial = open_weights('resnet18.a1_in1k')
    model = create('resnet18_in_prelu', num_classes=3, **initial.model_args)
    assert initial.load(model).new_head == ('fc',)
    found, expected = model.forward_features(x), theirs.forward_features(normalised)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_timms_own_weights_fit_the_sizes_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (('HF_HUB_CACHE', str(tmp_path)), ('HF_HUB_OFFLINE', True)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    name, sizes = 'deit_tiny_patch16_224', {'img_size': 32, 'patch_size': 4}
    in_hub_cache(tmp_path, f'timm/{name}.fb_in1k', randomise(create(name)))
    in_hub_cache(tmp_path, 'timm/resnet10t.c3_in1k', randomise(create('resnet10t')))
    theirs = timm.create_model(name, pretrained=True, **sizes)
    initial = open_weights('pretrained', name, {**sizes, 'drop_rate': 0.1})
    model = create_converted(name, **sizes, **initial.model_args).eval()
    assert initial.load(model).new_head == ()
    for key, value in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    assert model.patch_embed.proj.weight.shape == (192, 3, 4, 4)
    assert model.pos_embed.shape == (1, 65, 192)
    assert open_weights('pretrained', 'resnet10t', sizes).source == 'resnet10t.c3_in1k'  # which has no such sizes
    with pytest.raises(ValueError, match=r'expected'):
        open_weights('pretrained', name, sizes).load(create(name, depth=2, **sizes))


def test_what_is_no_source_is_named_and_runs_nothing(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / 'ran'),)

    torch.save({'state_dict': {'x': Runs()}}, tmp_path / 'evil.pt')
    with pytest.raises(ValueError, match='evil'):
        open_weights(str(tmp_path / 'evil.pt')).load(create('wrn10_1_relu'))
    assert not (tmp_path / 'ran').exists()
    for source, words in (
            ('no_such', 'no_such is no file, no bundle'), ('pretrained', 'wrn16_1_relu has no weights of its own'),
            ('wrn16_1_relu', 'has no weights of its own')):
        with pytest.raises((FileNotFoundError, ValueError), match=words):
            open_weights(source, 'wrn16_1_relu')
    model = small('wrn10_1', 'silu')
    for index, (change, words) in enumerate((
            ({'status': 'running'}, 'has no result to start from'), ({'recipe': 3}, 'is not of train_robust.py'),
            ({'recipe': {'model_kwargs': {'pretrained': True}}}, "has 'pretrained'; expected num_classes"),
            ({'files': {'model.safetensors': 'a' * 64}}, 'is damaged: sha256'))):
        with pytest.raises(ValueError, match=words):
            open_weights(str(write_run(tmp_path / str(index), model, **change)))
