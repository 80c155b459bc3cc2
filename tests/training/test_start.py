"""Training that starts from weights: what is loaded, recorded, resumed and packed."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from conftest import ROOT, Program, memory_left
from networks import EXACT, images, in_hub_cache, randomise
from safetensors.torch import load_file, save_file
from torch import nn

import train_robust
from hub import bundle
from hub.sources import load_run
from timm_paf.data import load_dataset, to_float
from timm_paf.files import sha256
from timm_paf.training.network import create_network, precision_advice
from timm_paf.weights import find_weights, load_bundle, open_weights

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning:timm.*')
Train = Callable[..., Path]
RELU = ROOT / 'hub/models/wrn10_1_relu'
OPTIONS = ['--dataset', 'digits', '--batch-size', '16', '--attack-steps', '1', '--compile', 'false', '--max-steps', '2']
PSSILU = ('--model', 'wrn10_1_pssilu', '--init')


@pytest.fixture(scope='module')
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Runs of two steps, here and not in processes of their own."""
    root = tmp_path_factory.mktemp('runs')

    def run(name: str, *args: object) -> Path:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            assert train_robust.run(train_robust.parse([
                *OPTIONS, '--output', str(root / name), *map(str, args)])) == 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return root / name
    return run


def recipe_of(run: Path) -> dict[str, object]:
    return json.loads((run / 'run.json').read_text())['recipe']  # type: ignore[no-any-return]


def first(*args: str) -> nn.Module:
    """The network of these options before its first step, on digits."""
    config = train_robust.parse([*OPTIONS, '--output', 'x', *args])
    data = load_dataset('digits', train=True)
    init = None if config.init is None else open_weights(config.init, config.model, config.model_kwargs)
    return create_network(train_robust.check(config), 10, to_float(data.images[:1]), 'digits', init)[0].eval()


def test_a_run_starts_at_the_function_of_its_weights(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run = train('relu', *PSSILU, RELU)
    assert recipe_of(run)['init'] == {
        'source': 'wrn10_1_relu', 'kind': 'bundle', 'sha256': sha256(RELU / 'model.safetensors'), 'new_head': []}
    out = capsys.readouterr().out
    assert 'starts from weights of wrn10_1_relu (sha256 ' in out
    assert 'the activation starts as relu, logits change by at most 0.00' in out
    expected = load_bundle(RELU)(images())
    torch.testing.assert_close(first(*PSSILU, str(RELU))(images()), expected, rtol=0, atol=0.01)
    torch.testing.assert_close(first('--model', 'wrn10_1_relu', '--act', 'prelu', '--init', str(RELU))(images()),
                               expected, rtol=1e-5, atol=1e-5)
    # From that run, converted or not, and without values of the activation of another kind.
    again = train('again', *PSSILU, run)
    assert recipe_of(again)['init']['kind'] == 'run'  # type: ignore[index]
    torch.testing.assert_close(first(*PSSILU, str(run))(images()), load_run(run)(images()), **EXACT)


def test_a_converted_run_starts_from_converted_and_other_weights(train: Train) -> None:
    options = ('--model', 'resnet10t', '--act', 'pssilu', '--act-share', 'stage', '--channels-last', 'false')
    one = train('converted', *options, '--act-start', 'same', '--model-kwargs', '{drop_path_rate: 0.1}')
    assert recipe_of(one)['act_start'] == 'same'
    assert recipe_of(one)['model_kwargs'] == {'drop_path_rate': 0.1}
    assert 90 < load_file(one / 'model.safetensors')['conv1.2.act.alpha'].item() < 110
    torch.testing.assert_close(first(*options, '--init', str(one))(images()), load_run(one)(images()), **EXACT)
    with pytest.raises(ValueError, match=r'is of a network with pssilu, and ResNet here has its own activations'):
        first('--model', 'resnet18', '--act', 'pssilu', '--init', str(one))


def test_a_run_with_weights_goes_on_exactly_and_with_the_same_weights_alone(train: Train, tmp_path: Path) -> None:
    file = tmp_path / 'mine.safetensors'
    shutil.copy(RELU / 'model.safetensors', file)
    options = (*PSSILU, file, '--act-start', 'relu', '--freeze-bn', '--head-lr', '0.005', '--layer-decay', '0.8')
    whole, output = train('whole', *options), train('parts', *options, '--max-minutes', '0.00001')
    assert json.loads((output / 'run.json').read_text())['status'] == 'running'
    assert recipe_of(output)['init'] == {
        'source': 'mine.safetensors', 'kind': 'file', 'sha256': sha256(file), 'new_head': []}
    with pytest.raises(FileExistsError, match=r"init \{.*'mine\.safetensors'.*\}, now None"):
        train('parts', '--model', 'wrn10_1_pssilu', '--act-kwargs', '{}')
    state = load_file(file)
    state['fc.bias'] += 1
    for change, words in (('--no-freeze-bn', 'freeze_bn True, now None'), ('--head-lr=1', 'head_lr 0.005, now 1.0'),
                          ('--layer-decay=1', 'layer_decay 0.8, now 1.0')):
        with pytest.raises(FileExistsError, match=words):
            train('parts', *options, change)
    (tmp_path / 'b').mkdir()
    save_file(state, tmp_path / 'b' / 'mine.safetensors')
    with pytest.raises(FileExistsError, match='holds another run: init'):
        train('parts', *PSSILU, tmp_path / 'b' / 'mine.safetensors', *options[4:])
    file.replace(tmp_path / 'b' / 'mine.safetensors')  # the same file elsewhere
    train('parts', *PSSILU, tmp_path / 'b' / 'mine.safetensors', *options[4:])
    assert (output / 'model.safetensors').read_bytes() == (whole / 'model.safetensors').read_bytes()


@pytest.mark.parametrize('stops', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_start_from_the_same_weights(tmp_path: Path, program: Program, stops: bool) -> None:
    launch = ['-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', '29633', 'train_robust.py']
    whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
    for output, extra in ((whole, []), *(((stopped, ['--max-minutes', '0.0001']), (stopped, [])) if stops else ())):
        done = program(*launch, *OPTIONS, *PSSILU, RELU, '--output', output, *extra, env={'ACCELERATE_USE_CPU': 'true'})
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('starts from weights of wrn10_1_relu') == 1
    if not stops:
        return
    assert 'resumes from' in done.stdout
    assert (stopped / 'model.safetensors').read_bytes() == (whole / 'model.safetensors').read_bytes()


def test_timms_weights_are_trained_and_packed_with_their_normalisation(
        train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (('HF_HUB_CACHE', str(tmp_path)), ('HF_HUB_OFFLINE', True)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    torch.manual_seed(0)
    theirs = randomise(timm.create_model('resnet10t')).eval()
    in_hub_cache(tmp_path, 'timm/resnet10t.c3_in1k', theirs)
    options = ('--model', 'resnet10t', '--init', 'pretrained', '--channels-last', 'false')
    statistics = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    for name, act, bound in (('plain', (), 1e-5), ('paf', ('--act', 'pssilu'), 0.1)):
        network = first(*options, *act)
        expected = theirs.forward_features((images() - mean) / std)
        difference = (network.forward_features((images() - mean) / std) - expected).abs().max() / expected.abs().max()
        assert difference < bound
        torch.testing.assert_close(network(images()), network.forward_head(
            network.forward_features((images() - mean) / std)), **EXACT)
        run = train(name, *options, *act)
        assert recipe_of(run)['model_kwargs'] == {'normalize': statistics}
        assert recipe_of(run)['init'] == {
            'source': 'resnet10t.c3_in1k', 'kind': 'name', 'new_head': ['fc'],
            'sha256': open_weights('resnet10t.c3_in1k').sha256}
        bundle.main([str(run), '--out', str(tmp_path / name)])
        packed = load_bundle(tmp_path / name)
        torch.testing.assert_close(packed(images()), load_run(run)(images()), **EXACT)
        assert packed.normalize.mean.flatten().tolist() == pytest.approx(statistics[0])
        card = (tmp_path / name / 'README.md').read_text()
        assert r'from weights: resnet10t.c3\_in1k' in card or 'from weights: resnet10t.c3_in1k' in card
        assert 'load_bundle(' in card
        block, = re.findall(r'```python\n([^`]*load_file[^`]*)```', card)
        made: dict[str, Any] = {}
        at = f"'{tmp_path / name}/' + \\1"
        exec(re.sub(r"hf_hub_download\('ORG/NAME', ('model.safetensors')\)", at, block), made)
        torch.testing.assert_close(made['model'](images()), load_run(run)(images()), **EXACT)
        torch.testing.assert_close(first(*options[:2], *act, '--init', str(tmp_path / name))(images()),
                                   packed(images()), **EXACT)
        config = json.loads((tmp_path / name / 'config.json').read_text())
        assert config['model_args']['normalize'] == statistics
        (tmp_path / name / 'SHA256SUMS').unlink()
        for wrong, words in (([[0.5], [0.0]], 'mean and std'), ('print', 'mean and std')):
            (tmp_path / name / 'config.json').write_text(json.dumps({**config, 'model_args': {'normalize': wrong}}))
            with pytest.raises(ValueError, match=words):
                load_bundle(tmp_path / name)


def test_heads_are_those_of_the_weights(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shape of a weight tells them."""
    def vit(model: str = 'vit_tiny_patch16_224', **sizes: Any) -> list[str]:
        return ['--model', model, '--channels-last', 'false', '--model-kwargs', json.dumps({
            'img_size': 32, 'patch_size': 8, 'embed_dim': 24, 'depth': 1, **sizes})]

    run = train('vit', *vit())  # of 3 heads, as is usual
    bundle.main([str(run), '--out', str(tmp_path / 'packed')])
    for source in (run, tmp_path / 'packed'):
        for same in (vit(), vit(num_heads=3), vit('vit_small_patch16_224', num_heads=3)):
            torch.testing.assert_close(first(*same, '--init', str(source))(images()), load_run(run)(images()), **EXACT)
        for other, heads in ((vit(num_heads=2), 2), (vit('vit_small_patch16_224'), 6)):
            said = (rf'^blocks.0.attn has {heads} heads and {source.name} is of a network with 3; expected --model '
                    r'vit_tiny_patch16_224, with the num_heads of the weights$')
            with pytest.raises(ValueError, match=said):
                first(*other, '--init', str(source))
        with pytest.raises(ValueError, match=r'is of a network with img_size, which resnet10t does not take; '):
            first('--model', 'resnet10t', '--init', str(source))
    for name, value in (('HF_HUB_CACHE', str(tmp_path)), ('HF_HUB_OFFLINE', True)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    name = 'vit_tiny_patch16_224'
    in_hub_cache(tmp_path, f'timm/{name}.augreg_in21k_ft_in1k', timm.create_model(name))
    with pytest.raises(ValueError, match=rf'^blocks.0.attn has 6 heads and {name}\.\w+ is of a network with 3; exp'):
        first('--model', name, '--init', 'pretrained', '--model-kwargs', '{img_size: 32, num_heads: 6}')
    first('--model', name, '--init', 'pretrained', '--model-kwargs', '{img_size: 32, num_heads: 3}')


def test_a_lack_of_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the network, and of weights that timm would make fit it."""
    for name, value in (('HF_HUB_CACHE', str(tmp_path)), ('HF_HUB_OFFLINE', True)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    name = 'vit_tiny_patch16_224'
    in_hub_cache(tmp_path, f'timm/{name}.augreg_in21k_ft_in1k', timm.create_model(name))
    args = ['--model', name, '--model-kwargs', '{img_size: 4096, patch_size: 1}', '--output', str(tmp_path / 'run')]
    for start in ([], ['--init', 'pretrained']):
        with memory_left(2 << 30), pytest.raises(SystemExit, match=r'^train_robust.py: [^\n]*allocate[^\n]*$'):
            train_robust.main([*OPTIONS, *args, *start])


@pytest.mark.parametrize(('args', 'words'), [
    (('--init', 'no_such'), 'no_such is no file, no bundle (config.json), no run'),
    (('--init', 'pretrained', '--model', 'wrn16_1_relu'), 'wrn16_1_relu has no weights of its own'),
    (('--init', str(RELU), '--model', 'wrn10_1_ssilu'), 'ssilu has no values with which it is relu'),
    (('--init', str(RELU), '--model', 'wrn16_1_relu'), 'does not fit'),
    (('--init', str(RELU / 'model.safetensors')), 'does not say which activation'),
    (('--act-start', 'relu'), '--act-start relu without --act or --init'),
    (('--model-kwargs', '{pretrained: true}'), "--model-kwargs has 'pretrained'; expected global_pool"),
    (('--model-kwargs', '{num_classes: 3}'), '--model-kwargs has num_classes'),
    (('--model-kwargs', '{drop_path_rate: 0.1}'), 'drop_path_rate'),
    *((('--model', model, '--model-kwargs', sizes), f'with --model-kwargs {said}') for model, sizes, said in (
        ('swin_tiny_patch4_window7_224', '{img_size: 32, depths: [1, 1, 1], num_heads: [1, 2]}', '{"img_size"'),
        ('vit_tiny_patch16_224', '{img_size: 32, num_heads: 5}', '{"img_size": 32, "num_heads": 5}'),
        ('vit_tiny_patch16_224', '{img_size: 32, patch_size: 64}', '{"img_size": 32, "patch_size": 64}'))),
    (('--model', 'vit_tiny_patch16_224', '--model-kwargs', '{depth: [1, 2]}'), '(linspace|integer)')])
def test_mistakes_are_one_line(args: tuple[str, ...], words: str, tmp_path: Path) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        with pytest.raises(SystemExit) as ended:
            train_robust.main([*OPTIONS, '--model', 'wrn10_1_pssilu', *args, '--output', str(tmp_path / 'run')])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert words in str(ended.value.code) or (words[0] == '(' and re.search(words, str(ended.value.code)))
    assert '\n' not in str(ended.value.code)
    assert not (tmp_path / 'run').exists()


def test_a_run_before_these_options_resumes() -> None:
    record = train_robust.check(train_robust.parse(['--output', 'x'])).record()
    assert {record[name] for name in (
        'init', 'act_start', 'model_kwargs', 'head_lr', 'layer_decay', 'freeze_bn', 'pad_mode', 'synthetic_augment',
        'drop_last')} == {None}
    for path in ROOT.glob('hub/results/convergence/gpu/*/run.json'):  # made before most options
        before = json.loads(path.read_text())['recipe']
        assert {record[name] for name in record.keys() - before.keys()} <= {None}, path
    changed = train_robust.check(train_robust.parse([
        '--output', 'x', '--no-drop-last', '--synthetic', 'a.npz:0.5', '--no-synthetic-augment', '--pad-mode',
        'reflect'])).record()
    assert [changed[name] for name in ('pad_mode', 'synthetic_augment', 'drop_last')] == ['reflect', False, False]


def test_a_tag_is_its_network_without_its_name(tmp_path: Path, program: Program) -> None:
    """The architecture in a record is of no other weights, and has the arguments that the tag brought."""
    for name in ('preact_resnet18_relu.wong2020_cifar10_linf', 'preact_resnet18_relu_cifar10_linf'):
        weights = find_weights(name)
        assert weights is not None
        args = ['--model', name, '--dataset', 'digits', '--max-steps', '1', '--batch-size', '8', '--attack-steps', '1',
                '--no-compile', '--output', tmp_path / name]
        done = program('train_robust.py', *args)
        assert done.returncode == 0, done.stderr
        run = json.loads((tmp_path / name / 'run.json').read_text())
        assert run['architecture'] == 'preact_resnet18_relu'
        assert run['recipe']['model_kwargs'] == weights.model_args


@pytest.mark.parametrize(('options', 'said'), [
    (['--model', 'wrn10_1_silu', '--init', 'wrn10_1_relu'], 'network with relu, and WideResNet here has silu'),
    (['--model', 'wrn10_1_prelu', '--init', 'wrn10_1_pssilu'], 'network with pssilu, and WideResNet here has prelu'),
    (['--model', 'wrn10_1_pssilu', '--init', 'wrn10_1_relu', '--act-start', 'silu'], 'expected no other --act-start'),
    (['--model', 'wrn10_1_relu', '--init', 'wrn10_1_relu', '--model-kwargs',
      '{normalize: [[0.5, 0.5, 0.5], [0.2, 0.2, 0.2]]}'], '--model-kwargs has normalize'),
    (['--model', 'resnet10t', '--init', str(RELU / 'model.safetensors')], 'does not say whether its network takes')])
def test_weights_of_another_function_are_refused(
        options: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        train_robust.main([*options, *OPTIONS, '--output', str(tmp_path / 'run')])
    assert said in str(error.value)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'run').exists()


def test_a_paf_starts_as_the_weights_activation_not_as_that_of_the_model(
        tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    args = ['--model', 'wrn10_1_silu', '--act', 'pssilu', '--init', 'wrn10_1_relu', *OPTIONS]
    with pytest.raises(SystemExit) as error:
        train_robust.main([*args, '--output', str(tmp_path / 'run')])
    assert not error.value.code
    assert 'the activation starts as relu, logits change by at most 0.00' in capfd.readouterr().out


def test_stopped_on_the_way_from_weights_it_ends_alike(tmp_path: Path, program: Program) -> None:
    args = ['train_robust.py', *PSSILU, 'wrn10_1_relu', '--dataset', 'digits', '--batch-size', '16',
            '--attack-steps', '1', '--no-compile', '--max-steps', '6', '--checkpoint-steps', '1', '--output']
    assert program(*args, tmp_path / 'whole').returncode == 0
    for _ in range(2):
        assert program(*args, tmp_path / 'run', '--max-minutes', '0.0001').returncode == 0
    done = program(*args, tmp_path / 'run')
    assert done.returncode == 0
    assert 'resumes from' in done.stdout
    assert sha256(tmp_path / 'run/model.safetensors') == sha256(tmp_path / 'whole/model.safetensors')


def test_a_precision_asked_for_of_accelerate_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device('cpu')
    for asked, own, told in ((None, 'no', False), ('no', 'bf16', False), ('bf16', 'bf16', False), ('BF16', 'no', True),
                             ('fp8', 'bf16', True)):
        monkeypatch.delenv('ACCELERATE_MIXED_PRECISION', raising=False)
        if asked:
            monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', asked)
        lines = [line for line in precision_advice(own, cpu) if 'accelerate' in line]
        assert lines == ([f'mixed_precision {asked.lower()} of accelerate does not count, the recipe has {own}' + (
            '' if asked == 'fp8' else f': --mixed-precision {asked.lower()} takes it')] if told else [])
