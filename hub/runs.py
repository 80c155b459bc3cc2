"""Read a run directory that train_robust.py has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from timm_paf.convert import create_converted
from timm_paf.files import read_json


def read_run(path: Path) -> dict[str, Any]:
    """The record of a finished run.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is foreign, or the run has not finished.
    """
    run = read_json(path / 'run.json')
    if not isinstance(run, dict) or not {'status', 'architecture', 'num_classes', 'recipe', 'data'} <= run.keys():
        raise ValueError(f'{path}/run.json is not of train_robust.py; expected architecture, recipe and data')
    if run['status'] != 'complete':
        raise ValueError(f'{path} has not finished; run its training command again, it goes on where it stopped')
    return run


def load_run(path: Path) -> nn.Module:
    """The trained network of a finished run, in eval mode.

    Raises:
        FileNotFoundError: if its weights are missing.
        ValueError: if they are damaged or do not fit the architecture.
    """
    run = read_run(path)
    weights = path / 'model.safetensors'
    if not weights.is_file():
        raise FileNotFoundError(f'{weights} is missing; run the training command again')
    recipe = run['recipe']
    model = create_converted(run['architecture'], recipe.get('act'), recipe.get('act_share'), recipe['act_kwargs'],
                             num_classes=run['num_classes'])
    # what it was trained on; those of timm name the normalisation and size of their ImageNet weights
    size = recipe['image_size'] if recipe['dataset'] == 'folder' else 32
    model.pretrained_cfg = {
        **model.pretrained_cfg, 'input_size': (3, size, size), 'mean': (0.0, 0.0, 0.0), 'std': (1.0, 1.0, 1.0)}
    try:
        model.load_state_dict(safetensors.torch.load_file(weights))
    except safetensors.SafetensorError as error:
        raise ValueError(f'{weights} is damaged ({error}); it may have been cut short') from None
    except RuntimeError as error:
        raise ValueError(f'{weights} does not fit {run["architecture"]}: {" ".join(str(error).split())}') from None
    return model.eval()
