"""Bundles of strangers: their configuration names no argument of its own, and their links lead nowhere else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import memory_left
from safetensors.torch import save_file
from test_hostile import EMBEDDED, Call, raw

import train_robust
from timm_paf.convert import create_converted
from timm_paf.training.network import create_network
from timm_paf.weights import load_bundle, open_weights, read_bundle
from timm_paf.weights.bundle import build_bundle
from timm_paf.weights.bundle_config import check_config
from timm_paf.weights.bundle_files import check_checksums, write_checksums


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / 'ran'
    yield path
    assert not path.exists(), 'code of a bundle ran'


def bundle(tmp_path: Path, change: Callable[[dict[str, Any]], Any] | None = None) -> Path:
    path = tmp_path / 'bundle'
    shutil.copytree(EMBEDDED, path, dirs_exist_ok=True)
    if change:
        config = json.loads((path / 'config.json').read_text())
        change(config)
        (path / 'config.json').write_text(json.dumps(config))
    write_checksums(path)
    return path


def args(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config.update(model_args=values)


def cfg(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config['pretrained_cfg'].update(values)


def act(act_kwargs: Any, **values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config['timm_paf'].update(
        {'act': 'pssilu', 'act_share': 'network', 'act_kwargs': act_kwargs, **values})


@pytest.mark.parametrize(('change', 'said'), [
    *((args(**{key: '{pickle}'}), rf"model_args has '{key}'; expected act_kwargs, num_classes") for key in (
        'checkpoint_path', 'pretrained_cfg', 'cache_dir', 'features_only', 'device')),
    *((args(**{key: value}), rf'model_args\.{key} is .*; expected') for key, value in (
        ('in_chans', 1_000_000), ('in_chans', '{pickle}'), ('num_classes', '{pickle}'), ('num_classes', True),
        ('global_pool', ['avg']), ('img_size', [10**9, 10**9]), ('patch_size', 0), ('window_size', [4096, 4096]),
        ('depth', 10**6), ('depths', [[2]]), ('depths', [2] * 6), ('depth', []), ('num_heads', '{pickle}'),
        ('patch_size', [1, 1, 1]), ('embed_dim', [10**6]))),
    (args(pretrained_cfg_overlay={'file': '{pickle}', 'source': 'file'}), r'model_args has .*pretrained_cfg_overlay'),
    *((args(act_kwargs=value), r'model_args\.act_kwargs') for value in (
        {'device': 'cuda'}, {'alpha': float('inf')}, {'alpha': float('nan')}, {'alpha': 'a'}, {'alpha': True},
        {'frozen': ['gamma']}, {'frozen': [['alpha']]}, {'frozen': {'alpha': 1}}, [1], {'alpha': [1]},
        {'alpha': 1e300}, {'curvature': '8'}, {'curvature': float('inf')}, {'curvature': None})),
    *((act(value), r'timm_paf\.act_kwargs') for value in (
        {'replace': ['relu']}, {'gates': True}, {'act': 'relu'}, None)),
    (act({}, act=['pssilu']), r'timm_paf\.act is'), (act({}, act_share={}), r'timm_paf\.act_share is'),
    *((cfg(**{key: value}), rf'pretrained_cfg\.{key} is ') for key, value in (
        ('input_size', [1_000_000, 32, 32]), ('input_size', [3, 10**9, 10**9]), ('input_size', [3, 32]),
        ('input_size', 'big'), ('mean', [float('nan')]), ('mean', 'x'), ('std', {}), ('crop_pct', 1e308),
        ('interpolation', 'a\nb'), ('first_conv', '../x'), ('classifier', [{}]), ('num_classes', 10**9),
        ('num_classes', -1), ('pool_size', [10**9, 1]), ('label_offset', 'a'), ('fixed_input_size', 1),
        ('label_names', {'a': 1}), ('description', 'a' * 20_000), ('paper_ids', 3))),
    *((lambda config, value=value: config.update(architecture=value), r'architecture is ') for value in (
        'hf-hub:org/model', 'local-dir:/tmp', '../x', 'a b', '', 'x' * 500, 'wrn10_1_pssilu\n', 'ä')),
    *((lambda config, value=value: config.update(num_classes=value), r'num_classes is ') for value in (
        0, -1, 10**6, True, 1.0, '10')),
    (lambda config: config['timm_paf'].update(dataset='a\nb'), r'timm_paf\.dataset is'),
    (lambda config: config['timm_paf'].update(threat_model={'norm': 'Linf', 'eps': ['x']}), r'threat_model\.eps is'),
])
def test_a_configuration_names_no_argument_of_its_own(
        change: Callable[[dict[str, Any]], Any], said: str, marker: Path, tmp_path: Path) -> None:
    raw(Call(os.system, f'touch {marker}'), tmp_path / 'p', 2)
    path = bundle(tmp_path, change)
    text = (path / 'config.json').read_text().replace('{pickle}', str(tmp_path / 'p'))
    (path / 'config.json').write_text(text)
    write_checksums(path)
    for load in (read_bundle, load_bundle):
        with pytest.raises(ValueError, match=rf'^[^\n]*config\.json: [^\n]*{said}[^\n]*$') as caught:
            load(path)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize('fields', [
    {'file': '{pickle}'}, {'file': '{pickle}', 'source': 'file'}, {'url': 'file://{pickle}'},
    {'hf_hub_id': 'org/model', 'hf_hub_filename': '{pickle}', 'source': 'hf-hub', 'custom_load': 'hf'},
    {'custom_load': True}, {'state_dict': {'fc.weight': 1}}, {'architecture': 'resnet50', 'tag': 'a1_in1k'}],
    ids=lambda fields: next(iter(fields)))
@pytest.mark.parametrize('converted', [False, True])
def test_the_weights_of_a_bundle_are_its_own(
        fields: dict[str, Any], converted: bool, marker: Path, tmp_path: Path) -> None:
    raw(Call(os.system, f'touch {marker}'), tmp_path / 'p', 2)
    filled = json.loads(json.dumps(fields).replace('{pickle}', str(tmp_path / 'p')))
    path = bundle(tmp_path, lambda config: (cfg(**filled)(config), act({})(config) if converted else None))
    expected, found = load_bundle(EMBEDDED).state_dict(), load_bundle(path).state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


PARAMETERS = 'has 78,339 parameters and buffers, and the network that is to take them more than twice as many;'
COMPUTED = 'computes indices or masks of more than 536,870,912 elements;'


@pytest.mark.parametrize(('name', 'sizes', 'said', 'limit'), [
    ('vit_tiny_patch16_224', {'embed_dim': 2048, 'depth': 64, 'num_heads': 8, 'img_size': 4096, 'patch_size': 1},
     PARAMETERS, 1 << 30),
    ('vit_tiny_patch16_224', {'embed_dim': 2048, 'depth': 64, 'num_heads': 8, 'img_size': 32}, PARAMETERS, 1 << 30),
    ('swin_tiny_patch4_window7_224', {'embed_dim': 2048, 'depths': [64] * 4, 'num_heads': [8] * 4},
     PARAMETERS, 1 << 30),
    ('beit_base_patch16_224', {'img_size': 4096, 'embed_dim': 8, 'num_heads': 1},  # the distances of all its patches
     COMPUTED, 1 << 30),
    ('swinv2_tiny_window8_256', {'img_size': [64, 192], 'patch_size': 1, 'window_size': 64, 'embed_dim': 8,
                                 'depths': [64], 'num_heads': [1]}, COMPUTED, 5 << 30)])
@pytest.mark.parametrize('converted', [False, True])
def test_a_network_of_far_more_numbers_than_the_file_takes_no_memory(
        name: str, sizes: dict[str, Any], said: str, limit: int, converted: bool, tmp_path: Path) -> None:
    """Each size is a usual one, and together they are of 10 to hundreds of GB."""
    def change(config: dict[str, Any]) -> None:
        config.update(architecture=name, model_args=sizes)
        if converted:
            act({})(config)

    path = bundle(tmp_path, change)
    config = read_bundle(path)
    options = ['--output', 'x', '--model', name, *(('--act', 'pssilu') if converted else ())]
    recipe = train_robust.check(train_robust.parse(options))
    for load in (load_bundle, lambda path: create_network(
            recipe, 10, torch.rand(1, 3, 32, 32), 'digits', open_weights(str(path)))):
        with memory_left(limit), pytest.raises(ValueError, match=said):
            load(path)
    if not converted:
        (path / 'model.safetensors').unlink()
        build_bundle(config, path, pretrained=False, **(
            {'depths': [1], 'num_heads': [1]} if 'swin' in name else {'depth': 1, 'num_heads': 1}), embed_dim=8)


@pytest.mark.parametrize(('name', 'sizes'), [
    ('resnet14t', {}),  # a conversion runs it, in whose 1 x 1 convolutions filters, channels and places are 400 million
    ('beit_base_patch16_224', {'img_size': 64, 'patch_size': 1, 'embed_dim': 96, 'num_heads': 3, 'depth': 2})])
def test_what_a_network_computes_is_no_parameter_of_it(name: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = create_converted(name, None if sizes else 'pssilu', num_classes=10, **sizes).state_dict()
    path = bundle(tmp_path, lambda config: (config.update(architecture=name, model_args=sizes),
                                            None if sizes else act({})(config)))
    save_file(state, path / 'model.safetensors')
    write_checksums(path)
    assert all(torch.equal(value, state[key]) for key, value in load_bundle(path).state_dict().items())


@pytest.mark.parametrize(('name', 'sizes', 'said'), [
    ('swin_tiny_patch4_window7_224', {'embed_dim': 8, 'depths': [1, 1, 1], 'num_heads': [1, 2]}, 'index out of range'),
    ('vit_tiny_patch16_224', {'num_heads': 5}, 'divisible'),
    ('vit_tiny_patch16_224', {'depth': [1, 2]}, '(linspace|integer)'),
    ('vit_tiny_patch16_224', {'embed_dim': [8, 8]}, 'unsupported operand'),
    ('wrn10_1_pssilu', {'patch_size': 4}, 'unexpected keyword')])
def test_sizes_that_make_no_network_are_one_line(name: str, sizes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = bundle(tmp_path, lambda config: config.update(architecture=name, model_args=sizes))
    with pytest.raises(ValueError, match=rf'^[^\n]*does not fit {name}: [^\n]*{said}[^\n]*$'):
        load_bundle(path)


def test_json_that_is_deep_or_large(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    for text, said in (('[' * 200_000, 'is no JSON'), ('{"a":' * 100_000, 'is no JSON'), ('1' * 10_000, 'is no JSON'),
                       ('"' + 'a' * (1 << 20) + '"', r'has 1,048,578 bytes; expected at most 1,048,576'),
                       ('\x00', 'is no JSON'), ('[]', 'has no timm_paf section')):
        (path / 'config.json').write_text(text)
        with pytest.raises(ValueError, match=rf'^[^\n]*config\.json {said}[^\n]*$'):
            read_bundle(path)
    (path / 'config.json').write_bytes(b'\xff\xfe')
    with pytest.raises(ValueError, match=r'^[^\n]*config\.json is no JSON[^\n]*$'):
        read_bundle(path)
    shutil.copy(EMBEDDED / 'config.json', path)
    (path / 'SHA256SUMS').write_bytes(b'\xff')
    with pytest.raises(ValueError, match=r'^[^\n]*SHA256SUMS is no list of checksums[^\n]*$'):
        read_bundle(path)


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors', 'README.md', 'robustbench', 'loop', 'extra'])
def test_links_that_lead_outside(name: str, tmp_path: Path) -> None:
    path, outside = bundle(tmp_path), tmp_path / 'outside'
    if (path / name).exists():
        (path / name).rename(outside)
    else:
        outside.write_text('secret')
    (path / name).symlink_to(path / name if name == 'loop' else f'../{outside.name}')
    for check in (read_bundle, load_bundle, check_checksums):
        with pytest.raises(ValueError, match=rf'^[^\n]*{name} is a link to [^\n]*outside of the bundle[^\n]*$'):
            check(path)


def test_links_that_lead_to_the_bundle_itself_and_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    (path / 'config.json').rename(path / 'the-config')
    (path / 'config.json').symlink_to('the-config')
    load_bundle(path)
    (tmp_path / 'link').symlink_to(path)  # the bundle as a whole may lie elsewhere
    load_bundle(tmp_path / 'link')
    repo = tmp_path / 'hub' / 'models--org--name'
    snapshot = repo / 'snapshots' / 'commit'
    snapshot.mkdir(parents=True)
    (repo / 'blobs').mkdir()
    for index, file in enumerate(('config.json', 'model.safetensors', 'SHA256SUMS')):
        shutil.copy(EMBEDDED / file, repo / 'blobs' / str(index))
        (snapshot / file).symlink_to(f'../../blobs/{index}')
    read_bundle(snapshot)
    load_bundle(snapshot)
    other = tmp_path / 'hub' / 'models--org--other' / 'blobs'
    other.mkdir(parents=True)
    shutil.copy(EMBEDDED / 'config.json', other / '0')
    (snapshot / 'config.json').unlink()
    (snapshot / 'config.json').symlink_to('../../../models--org--other/blobs/0')
    with pytest.raises(ValueError, match=r'config\.json is a link to '):
        read_bundle(snapshot)


def test_weights_of_a_bundle_that_are_not_finite(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    state = load_bundle(EMBEDDED).state_dict()
    state['fc.weight'][0, 0] = float('inf')
    save_file(state, path / 'model.safetensors')
    write_checksums(path)
    with pytest.raises(ValueError, match=r'^[^\n]*fc\.weight has 1 values that are not finite; expected finite'):
        load_bundle(path)


@pytest.mark.parametrize('kwargs', [
    {'alpha': 2.0, 'frozen': True}, {'frozen': 'beta'}, {'beta': 0.1, 'frozen': ['alpha', 'beta']}, {},
    {'curvature': 8, 'beta': 0.1}])
def test_arguments_of_an_activation_that_the_programs_write_are_taken(kwargs: dict[str, Any]) -> None:
    config = {'architecture': 'wrn10_1_pssilu', 'num_classes': 10, 'pretrained_cfg': {},
              'model_args': {'act_kwargs': kwargs},
              'timm_paf': {'dataset': 'cifar10', 'threat_model': {'norm': 'Linf', 'eps': '8/255'}}}
    assert check_config(config, Path('config.json'))['model_args'] == {'act_kwargs': kwargs}
