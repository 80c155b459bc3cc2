"""A network that normalises its images itself: timm's own between its transform and its logits."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from networks import EXACT, images
from torch import nn

import timm_paf  # noqa: F401
from timm_paf.attacks import frozen_view
from timm_paf.normalize import normalize_input

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network(normalize: object = (MEAN, STD)) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model('convnext_atto', num_classes=10).eval()
    normalize_input(model, normalize)
    return model


def expected() -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        return network(None)((images() - mean) / std)


@pytest.mark.parametrize('how', ['as it is', 'copied', 'saved', 'functional', 'frozen', 'exported', 'compiled'])
def test_the_logits_are_those_of_normalised_images(how: str, tmp_path) -> None:
    model = network()
    if how == 'copied':
        model = copy.deepcopy(model)
    elif how == 'saved':
        torch.save(model.state_dict(), tmp_path / 'a.pt')
        torch.manual_seed(1)
        model = timm.create_model('convnext_atto', num_classes=10).eval()
        normalize_input(model, ((0.1,) * 3, (1.0,) * 3))
        model.load_state_dict(torch.load(tmp_path / 'a.pt'))
    elif how == 'exported':
        model = torch.export.export(model, (images(),)).module()
    elif how == 'compiled':
        model = torch.compile(model, backend='aot_eager')
    call = model
    if how == 'functional':
        def call(x: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, dict(model.named_parameters()), x)
    elif how == 'frozen':
        call = frozen_view(model)
    with torch.no_grad():
        torch.testing.assert_close(call(images()), expected(), **(EXACT if how != 'compiled' else {}))


def test_a_second_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match=r'^ConvNeXt normalises its input already[^\n]*$'):
        normalize_input(network(), 'image')
    assert not any('normalize' in name for name, _ in network(None).named_modules())


def test_a_sequential_network_and_names_that_are_taken() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    right = model((images() - mean) / std)
    normalize_input(model, (MEAN, STD))
    torch.testing.assert_close(model(images()), right)

    class Scaled(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self[1](self[0](x))

    model = Scaled(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    right = model((images() - mean) / std)
    with pytest.raises(ValueError, match=r'^Scaled is a Sequential with a forward of its own; expected it wrapped: '):
        normalize_input(model, (MEAN, STD))
    wrapped = nn.Sequential(model)
    normalize_input(wrapped, (MEAN, STD))
    torch.testing.assert_close(wrapped(images()), right)
    model = nn.Linear(3, 10)
    model.normalize = True
    with pytest.raises(ValueError, match=r'^Linear has another attribute normalize; expected a network without one$'):
        normalize_input(model, (MEAN, STD))


def test_a_replica_on_another_device_normalises_there() -> None:
    """nn.DataParallel's replicas have the first one's hooks."""
    model = timm.create_model('convnext_atto', num_classes=10).eval()
    normalize_input(model, (MEAN, STD), first='stem')
    model.stem.to('meta')
    assert model.stem(images().to('meta')).is_meta
    assert not model.normalize.mean.is_meta


TINY = {
    'convnext_base': {'depths': (1, 1, 1, 1), 'dims': (8, 16, 32, 64)},
    'swin_base_patch4_window7_224': {'depths': (1, 1, 1, 1), 'embed_dim': 8, 'num_heads': (1, 1, 2, 2)},
    'vit_base_patch16_224': {'embed_dim': 32, 'depth': 4, 'num_heads': 2}}


@pytest.mark.parametrize('arch', TINY)
def test_timms_networks_normalise_in_all_that_timm_calls(arch: str) -> None:
    """Against timm's own network with the same weights, for images that are normalised before."""
    x = images(size=(224, 224))
    z = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    model, theirs = (timm.create_model(name, **TINY[arch]).eval() for name in (f'{arch}_in', arch))
    theirs.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith('normalize.')})
    with torch.no_grad():
        logits = theirs(z)
        for ours in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for found in (ours(x), ours(x=x), ours.forward_head(ours.forward_features(x))):
                torch.testing.assert_close(found, logits, **EXACT)
        expected = theirs.forward_intermediates(z, intermediates_only=True)
        torch.testing.assert_close(model.forward_intermediates(x, intermediates_only=True), expected, **EXACT)
        features = timm.create_model(f'{arch}_in', features_only=True, **TINY[arch]).eval()
        named = {key.replace('.', '_'): value for key, value in model.state_dict().items()}
        features.load_state_dict({key: named[key.removeprefix('model.').replace('.', '_')]
                                  for key in features.state_dict()})
        for found, whole in zip(features(x), expected[-len(features.feature_info.channels()):], strict=True):
            torch.testing.assert_close(found, whole, **EXACT)
        assert features.feature_info.channels() == [each.shape[1] for each in features(x)]
        copied = copy.deepcopy(model).to(torch.bfloat16)
        assert copied(x.bfloat16()).dtype == copied.normalize.mean.dtype == torch.bfloat16
