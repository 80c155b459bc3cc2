"""A network that normalises its images itself: timm's own between its transform and its logits."""

from __future__ import annotations

import copy

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
