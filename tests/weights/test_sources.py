"""Weights come from the source that was named, or not at all; one reader reads them, wherever they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from networks import EXACT, images, randomise
from safetensors.torch import save_file
from torch import nn

from timm_paf.weights import sources

NET, IN_NET = 'wrn10_1_pssilu', 'resnet18_in_relu'
SMALL = {NET: {}, IN_NET: {'channels': (8, 8, 8, 8)}}


def other(name: str = NET, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(timm.create_model(name, **SMALL[name])).eval()


def create(name: str = NET, **overlay: Any) -> nn.Module:
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **SMALL[name]).eval()


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), **EXACT)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    return tmp_path / 'home' / 'hub' / 'checkpoints'


@pytest.mark.parametrize('name', SMALL)
def test_a_source_takes_the_place_of_the_embedded_weights(
        name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, file = other(name), tmp_path / 'a.bin'
    torch.save({'model': other(name, 4).state_dict(), 'ema': expected.state_dict()}, file)  # timm alone knows no ema
    asked = []

    def hub(repo: str, filename: str, **kwargs: Any) -> str:
        asked.append((repo, filename, kwargs['revision']))
        return str(file)

    monkeypatch.setattr(sources, 'hf_hub_download', hub)
    folder = tmp_path / 'folder'
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in expected.state_dict().items()}, folder / 'model.safetensors')
    for overlay in (
            {'hf_hub_id': 'org/model'}, {'hf_hub_id': 'org/model@v1', 'hf_hub_filename': 'x.bin'},
            {'hf_hub_id': 'org/model', 'source': 'hf-hub'}, {'file': str(file)}, {'file': str(file), 'source': 'file'},
            {'file': str(folder)}, {'url': file.as_uri()}, {'url': (file.as_uri(), 'b.bin')},
            {'state_dict': dict(expected.state_dict())}):
        assert_same(create(name, **overlay), expected)
    assert asked == [('org/model', 'model.safetensors', None), ('org/model', 'x.bin', 'v1'),
                     ('org/model', 'model.safetensors', None)]
    model = timm.create_model(name, checkpoint_path=str(file), **SMALL[name]).eval()
    assert_same(model, expected)
    assert model.pretrained_cfg['architecture'] == name


def test_a_source_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    def hub(fault: Exception) -> None:
        def raises(*args: Any, **kwargs: Any) -> None:
            raise fault
        monkeypatch.setattr(sources, 'hf_hub_download', raises)

    hub(LocalEntryNotFoundError('no\nnetwork'))
    with pytest.raises(ConnectionError, match=r'^org/model could not be had from the Hub: no usable answer [^\n]*; t'):
        create(hf_hub_id='org/model')
    hub(EntryNotFoundError.__new__(EntryNotFoundError))
    with pytest.raises(FileNotFoundError, match=r'^org/model on the Hub has no model\.safetensors and no pytorch'):
        create(hf_hub_id='org/model')
    with pytest.raises(FileNotFoundError, match=r'no file; expected a checkpoint$'):
        create(file=str(tmp_path / 'nowhere'))
    for url in (f'file://{tmp_path}/nowhere', 'http://127.0.0.1:9/a.pt', 'nonsense'):
        with pytest.raises(ConnectionError, match=r'^[^\n]* could not be had: [^\n]*; check the address[^\n]*$'):
            create(url=url)
    with pytest.raises(RuntimeError, match='No pretrained weights exist'):
        timm.create_model('resnet18_in_silu', pretrained=True)


def test_addresses_that_end_alike_are_different_files(tmp_path: Path, home: Path) -> None:
    for seed in (3, 4):
        (tmp_path / str(seed)).mkdir()
        torch.save(other(seed=seed).state_dict(), tmp_path / str(seed) / 'model.pt')
    for seed in (3, 4, 3):
        assert_same(create(url=(tmp_path / str(seed) / 'model.pt').as_uri()), other(seed=seed))
    assert len(list(home.iterdir())) == 2


def test_networks_of_timm_are_loaded_by_timm(tmp_path: Path) -> None:
    theirs = timm.create_model('resnet18', num_classes=3, channels=(8, 8, 8, 8)).eval()
    torch.save({'state_dict': theirs.state_dict()}, tmp_path / 'a.pt')
    model = timm.create_model(
        'resnet18', num_classes=3, channels=(8, 8, 8, 8), checkpoint_path=str(tmp_path / 'a.pt')).eval()
    torch.testing.assert_close(model(images()), theirs(images()), **EXACT)
    with pytest.raises(ValueError, match=r'does not fit WideResNet: missing act\.alpha; [^\n]*unexpected layer1'):
        timm.create_model(NET, checkpoint_path=str(tmp_path / 'a.pt'))
