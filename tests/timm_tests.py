"""timm's own tests of its models, run with ours: a plugin of pytest for ``make timm-tests``.

timm's ``tests/test_models.py`` (of its sdist; not copied here) chooses names by patterns and by timm's module names,
which would leave ours out of some tests and timm's 1,300 in. This puts our names into its tests and takes all else out.
"""

from __future__ import annotations

from collections import Counter

import pytest

import timm_paf

NAMES = [
    *(f'wrn10_1_{act}' for act in timm_paf.list_pafs(plain=True)),
    *(f'{arch}_{act}' for arch in ('wrn16_4', 'resnet18', 'resnet34', 'resnet50', 'resnet18_in', 'resnet50_in')
      for act in ('pssilu', 'relu'))]
TESTS = {
    'test_model_forward', 'test_model_backward', 'test_model_default_cfgs', 'test_model_forward_torchscript',
    'test_model_forward_features', 'test_model_forward_intermediates_features', 'test_model_forward_intermediates',
    'test_model_forward_fx', 'test_model_backward_fx', 'test_model_forward_fx_torchscript'}
NEWER = {  # than timm 1.0.9
    'test_prune_intermediate_layers_contract', 'test_prune_intermediate_layers_params_used',
    'test_prune_to_stem_feature', 'test_head_hidden_size'}


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Our names in timm's ``parametrize('model_name', ...)``, and no arguments where it pairs them with some."""
    if metafunc.function.__name__ not in TESTS | NEWER:
        return
    marks = metafunc.definition.own_markers
    for i, mark in enumerate(marks):
        if mark.name == 'parametrize' and str(mark.args[0]).startswith('model_name'):
            values = NAMES if mark.args[0] == 'model_name' else [(name, {}) for name in NAMES]
            marks[i] = pytest.mark.parametrize(mark.args[0], values).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours, others = [], []
    for item in items:
        model = item.callspec.params.get('model_name') if hasattr(item, 'callspec') else None
        (ours if model in NAMES else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = ours
    counts = Counter(item.originalname for item in ours)
    short = sorted(test for test in TESTS | (NEWER & set(counts)) if counts[test] != len(NAMES))
    if short:
        raise pytest.UsageError(f'expected {len(NAMES)} models in each of timm\'s tests; {", ".join(short)} has others')
