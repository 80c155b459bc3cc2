"""A converted model from training to a bundle and back."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from networks import EXACT, images, paf_keys
from PIL import Image
from safetensors.torch import load_file

import train_robust
from hub import bundle, evaluate
from hub.sources import load_run
from timm_paf.robustbench import load_bundle, register

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning:timm.*')
Train = Callable[..., Path]
OPTIONS = ['--model', 'resnet10t', '--act', 'pssilu', '--act-share', 'stage', '--act-kwargs', '{alpha: 2.0}',
           '--dataset', 'digits', '--batch-size', '16', '--attack-steps', '1', '--channels-last', 'false',
           '--compile', 'false', '--ema', '0.5', '--max-steps', '2']


@pytest.fixture(scope='module')
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Runs of two steps, here and not in processes of their own."""
    root = tmp_path_factory.mktemp('runs')

    def run(name: str, *args: str) -> Path:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            assert train_robust.run(train_robust.parse([*OPTIONS, '--output', str(root / name), *args])) == 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return root / name
    return run


@pytest.fixture(scope='module')
def finished(train: Train) -> Path:
    return train('whole')


@pytest.mark.parametrize(('name', 'args'), [
    ('levit_128s', ['--model-kwargs', '{img_size: 32}']),  # its size is not that of timm's cfg
    ('deit_tiny_patch16_224', [
        '--model-kwargs', '{img_size: 32, patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}']),
    ('swin_tiny_patch4_window7_224', [
        '--model-kwargs',
        '{img_size: 32, patch_size: [2, 2], window_size: 4, embed_dim: 8, depths: [2, 2], num_heads: [1, 2]}']),
    ('lambda_resnet26t', ['--model-kwargs', '{img_size: 32}', '--channels-last', 'true']),  # weights of 5 dimensions
    ('pvt_v2_b0', ['--grad-checkpointing'])])  # imports the module of torch's checkpoint
def test_other_networks_from_training_to_the_card(
        name: str, args: list[str], train: Train, tmp_path: Path) -> None:
    output = train(name, '--model', name, '--act', 'psilu', '--act-share', 'network', *args)
    evaluate.main([str(output), '--images', '4', '--attacks', 'clean,pgd-1', '--batch-size', '4'])
    bundle.main([str(output), '--out', str(tmp_path / 'bundle')])
    code = (tmp_path / 'bundle' / 'README.md').read_text().split('With plain torch')[1].split('```')[1]
    code = re.sub(r"hf_hub_download\(.*'model.safetensors'\)", repr(str(output / 'model.safetensors')), code)
    found: dict[str, Any] = {}
    exec(code.removeprefix('python\n'), found)
    with torch.no_grad():
        assert torch.equal(found['model'](images()), load_bundle(tmp_path / 'bundle')(images()))


def test_a_converted_run_goes_on_exactly(finished: Path, train: Train) -> None:
    output = train('parts', '--max-minutes', '0.00001')
    assert json.loads((output / 'run.json').read_text())['status'] == 'running'
    for other, text in (('layer', 'act_share stage, now layer'), ('network', 'act_share stage, now network')):
        with pytest.raises(FileExistsError, match=text):
            train('parts', '--act-share', other)
    with pytest.raises(FileExistsError, match='act pssilu, now None'):
        train_robust.run(train_robust.parse([*OPTIONS[:2], *OPTIONS[8:], '--output', str(output)]))
    train('parts')
    whole, parts = (load_file(path / 'model.safetensors') for path in (finished, output))
    assert len(paf_keys(whole)) == 10
    for key in whole.keys() | parts.keys():
        torch.testing.assert_close(parts[key], whole[key], **EXACT)
    alphas = [value.item() for key, value in whole.items() if key.endswith('alpha')]
    assert all(alpha not in (1.0, 2.0) and abs(alpha - 2) < 0.5 for alpha in alphas)


def test_a_converted_run_is_measured_and_packed(finished: Path, tmp_path: Path) -> None:
    evaluate.main([str(finished), '--n', '10', '--attacks', 'clean'])
    assert json.loads((finished / 'evaluation.json').read_text())['attacks']['clean']['n'] == 10
    out = tmp_path / 'packed'
    bundle.main([str(finished), '--out', str(out)])
    x = images(3)
    with torch.no_grad():
        torch.testing.assert_close(load_bundle(out)(x), load_run(finished)(x), **EXACT)
    config = json.loads((out / 'config.json').read_text())
    assert {key: config['timm_paf'][key] for key in ('act', 'act_share', 'act_kwargs')} == {
        'act': 'pssilu', 'act_share': 'stage', 'act_kwargs': {'alpha': 2.0}}
    assert config['pretrained_cfg']['mean'] == [0, 0, 0]  # not ImageNet's: it was trained on images in [0, 1]
    assert config['pretrained_cfg']['input_size'] == [3, 32, 32]
    card = (out / 'README.md').read_text()
    assert 'load_bundle(' in card
    assert ("\nmodel = create_converted('resnet10t', 'pssilu', 'stage', {'alpha': 2.0}, num_classes=10).eval()\n"
            'model.load_state_dict(') in card
    assert "create_model('hf-hub" not in card
    # timm alone would make a ReLU network
    with pytest.raises(RuntimeError, match='Unexpected key'):
        timm.create_model('resnet10t', pretrained=True, num_classes=10,
                          pretrained_cfg_overlay={'file': str(out / 'model.safetensors'), 'num_classes': 10})
    evaluate.main([str(out), '--n', '10', '--attacks', 'clean', '--output', str(tmp_path / 'again.json')])
    (out / 'SHA256SUMS').unlink()
    for key, value, message in (('act_share', 'block', "timm_paf.act_share is 'block'; expected one of network"),
                                ('act', 'nope', "timm_paf.act is 'nope'"), ('act_kwargs', None, 'expected dict')):
        wrong = {**config, 'timm_paf': {**config['timm_paf'], key: value}}
        (out / 'config.json').write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            load_bundle(out)


@pytest.mark.parametrize(('options', 'of_network', 'size'), [
    (('resnet10t', '--act', 'pssilu'), {'first_conv': 'conv1.0', 'classifier': 'fc'}, 32),  # c3_in1k, 1,000 classes
    (('convnext_atto', '--act', 'pssilu', '--dataset', 'folder', '--image-size', '48'),
     {'first_conv': 'stem.0', 'classifier': 'head.fc'}, 48),
    (('wrn10_1_pssilu',), {'first_conv': 'conv1', 'classifier': 'fc', 'pool_size': [8, 8]}, 32)])  # ours, of CIFAR-10
def test_a_bundle_says_nothing_of_other_weights(
        options: tuple[str, ...], of_network: dict[str, object], size: int, tmp_path: Path) -> None:
    data = []
    if 'folder' in options:
        data = ['--data-dir', str(tmp_path / 'images')]
        for index in range(64):
            path = tmp_path / 'images' / ('train', 'val')[index // 2 % 2] / f'class{index % 2}' / f'{index}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (64, 56), (4 * index, 9, 90)).save(path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        assert train_robust.run(train_robust.parse([
            '--dataset', 'digits', *OPTIONS[10:], '--output', str(tmp_path / 'run'), '--model', *options, *data])) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    bundle.main([str(tmp_path / 'run'), '--out', str(tmp_path / 'packed')])
    config = json.loads((tmp_path / 'packed' / 'config.json').read_text())
    folder = 'folder' in options
    assert config['num_classes'] == (2 if folder else 10)
    assert config['pretrained_cfg'] == {
        'custom_load': False, 'num_classes': 2 if folder else 10, 'input_size': [3, size, size], 'mean': [0, 0, 0],
        'std': [1, 1, 1], 'interpolation': 'bicubic', 'crop_pct': 0.875 if folder else 1, 'crop_mode': 'center',
        'fixed_input_size': False, 'pool_size': None, **of_network,
        **({'label_names': ['class0', 'class1']} if folder else {})}  # timm writes that null
    model = load_bundle(tmp_path / 'packed')
    assert model.pretrained_cfg['num_classes'] == config['num_classes']
    assert not any(model.pretrained_cfg.get(key) for key in (
        'tag', 'url', 'hf_hub_id', 'origin_url', 'paper_ids', 'paper_name', 'license', 'test_input_size'))
    for text in ('in1k', '2110.00476', 'timm_paf_cifar10'):
        assert text not in (tmp_path / 'packed' / 'config.json').read_text()
        assert text not in (tmp_path / 'packed' / 'README.md').read_text()


def test_robustbench_loads_a_converted_bundle(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / 'packed'
    bundle.write(finished, out, 'packed')
    config = json.loads((out / 'config.json').read_text())
    config['timm_paf']['dataset'] = 'cifar10'  # RobustBench knows no digits
    (out / 'config.json').write_text(json.dumps(config))
    (out / 'SHA256SUMS').unlink()
    name = register(out, 'converted_resnet')
    with torch.no_grad():
        found = timm.create_model(name, pretrained=True).eval()(images())
        torch.testing.assert_close(found, load_run(finished)(images()), **EXACT)


@pytest.mark.parametrize(('args', 'message'), [
    (['--act', 'nope'], "unknown --act 'nope'; expected one of relu"),
    (['--act', 'psilu', '--act-share', 'block'], "unknown --act-share 'block'; expected one of network, stage"),
    (['--act-share', 'layer'], '--act-share layer without --act')])
def test_wrong_options_are_one_line(args: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_robust.check(train_robust.parse(['--output', 'x', *args]))


def test_runs_before_this_option_resume() -> None:
    recipe = train_robust.check(train_robust.parse(['--output', 'x']))
    assert (recipe.record()['act'], recipe.record()['act_share']) == (None, None)  # as in a record that has neither
