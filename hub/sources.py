"""A network with weights, from wherever a user names it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
from torch import nn

from timm_paf.files import sha256
from timm_paf.robustbench import load_bundle, read_bundle
from timm_paf.zoo import find_weights

from .runs import load_run, read_run


def load(source: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model in eval mode, and what its files or `timm_paf.zoo` say: architecture, dataset, threat, sha256 (of its
    file, or of the file that its weights would make). Nobody says the dataset (None) and threat ({}) of timm's others.

    Raises:
        ValueError, FileNotFoundError: if it is no run, bundle or model with weights, or is damaged.
    """
    path = Path(source)
    if (path / 'config.json').is_file():
        config, model = read_bundle(path), load_bundle(path)
        about = {'architecture': config['architecture'], 'dataset': config['timm_paf']['dataset'],
                 'threat': config['timm_paf']['threat_model']}
    elif (path / 'run.json').is_file():  # a bundle holds one too
        run, model = read_run(path), load_run(path)
        about = {'architecture': run['architecture'], 'dataset': run['data']['name'], 'threat': run['recipe']['threat'],
                 'image_size': run['recipe'].get('image_size')}
    elif timm.is_model(source):
        if not timm.models.is_model_pretrained(source):
            raise ValueError(f'{source} has no weights; expected a run, a bundle, or a name of timm.list_pretrained()')
        named = find_weights(source)
        if named is not None and named.bundle:
            return load(str(named.bundle))
        model = timm.create_model(source, pretrained=True).eval()
        content = safetensors.torch.save({k: v.contiguous() for k, v in model.state_dict().items()})
        about = {'architecture': source, 'dataset': None, 'threat': {}} if named is None else {
            'architecture': named.model, 'dataset': named.dataset, 'threat': {'norm': named.norm, 'eps': named.eps}}
        return model, {**about, 'sha256': hashlib.sha256(content).hexdigest()}
    else:
        raise FileNotFoundError(f'{source} is no run (run.json), no bundle (config.json) and no model of timm')
    return model, {**about, 'sha256': sha256(path / 'model.safetensors')}
