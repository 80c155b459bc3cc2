"""From a finished run to numbers, a bundle, and the model back through timm and RobustBench."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from conftest import ROOT, Program, assert_one_line
from packaging.version import Version

import timm_paf
from hub import bundle, evaluate, quickstart
from hub.publish import networks, submission
from hub.sources import load, load_run, takes_unit_images
from timm_paf.activations import create_paf
from timm_paf.data import load_dataset, to_float
from timm_paf.files import read_record
from timm_paf.plots import plot_activations
from timm_paf.robustbench import load_bundle, register
from timm_paf.weights.zoo import find_weights


def fails(main: object, *args: object) -> str:
    """The one line that a program ends with."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(arg) for arg in args])  # type: ignore[operator]
    message = exit_info.value.code
    assert isinstance(message, str)
    assert '\n' not in message
    return message


def train(program: Program, output: Path, *args: object) -> Path:
    done = program('train_robust.py', '--dataset', 'digits', '--batch-size', 64, '--attack-steps', 1, '--lr', 0.05,
                   '--output', output, *args)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory, program: Program) -> Path:
    return train(program, tmp_path_factory.mktemp('runs') / 'pssilu', '--model', 'wrn10_1_pssilu', '--max-steps', 12)


@pytest.fixture(scope='module')
def measured(run: Path, tmp_path_factory: pytest.TempPathFactory, program: Program) -> Path:
    """The run, evaluated by the program as a user calls it."""
    copy = tmp_path_factory.mktemp('measured') / 'run'
    shutil.copytree(run, copy)
    done = program('-m', 'hub.evaluate', copy, '--n', 6, '--attacks', 'clean,pgd-2,autoattack', '--seed', 7)
    assert done.returncode == 0, done.stderr
    assert 'autoattack' in done.stdout
    return copy


def test_evaluation_says_how_it_was_made(measured: Path) -> None:
    found = json.loads((measured / 'evaluation.json').read_text())
    assert found['architecture'] == 'wrn10_1_pssilu'
    assert found['threat_model']['eps'] == '8/255'
    assert (found['n'], found['seed'], found['dataset'], found['split']) == (6, 7, 'digits', 'test')
    assert {'torch', 'timm', 'timm-paf', 'pyautoattack'} <= found['versions'].keys()
    checked = subprocess.run(['sha256sum', '-c'], cwd=measured, text=True, capture_output=True,
                             input=f'{found["weights_sha256"]}  model.safetensors\n')
    assert checked.returncode == 0
    data = load_dataset('digits', None, False)
    assert found['data_sha256'] == data.sha256()
    with torch.no_grad():
        right = load_run(measured)(to_float(data.images[:6])).argmax(1) == data.labels[:6]
    assert found['attacks']['clean']['verdicts'] == ''.join(str(int(v)) for v in right)
    for result in found['attacks'].values():
        assert result['verdicts'].count('1') == result['correct'] <= right.sum()
        assert result['accuracy'] == result['correct'] / 6


def test_evaluation_refuses_bad_input(run: Path, measured: Path, tmp_path: Path) -> None:
    main = evaluate.main
    other = 'exists with other images, n, seed, attacks; give another --output DIR, or --overwrite'
    assert other in fails(main, measured, '--attacks', 'clean')
    assert 'is a file; expected a directory' in fails(main, run, '--output', run / 'run.json')
    assert 'was trained on digits, and the classes of cifar10 are others' in fails(main, run, '--dataset', 'cifar10')
    assert 'did you mean wrn10_1_pssilu' in fails(main, 'wrn10_1_pssilo')
    assert 'did you mean cifar10/Linf/Dai2021Parameterizing or ' in fails(main, 'cifar10/Linf/Dai2021Parametrizing')
    assert 'unknown attack' in fails(main, run, '--attacks', 'clean,fgsm')
    assert 'is no run' in fails(main, tmp_path / 'nowhere')
    assert 'has no weights' in fails(main, 'wrn10_2_pssilu')
    assert 'write 8/255' in fails(main, run, '--eps', '8')
    assert 'unknown data set' in fails(main, run, '--dataset', 'mnist')
    for images in ('-1', '', 'all', '1e3', '1:2:3', ':4', '4:-1', ' 4', '\u0664', '9' * 20):
        assert f"--images is '{images}'" in fails(main, run, f'--images={images}')
    for images in ('0', '4:4', '8:4', '0:0'):
        assert f'--images is {images}, which names no image; expected N' in fails(main, run, '--n', images)
    for images in ('355:360', '359:', '999:1000', '0:360'):
        assert f'--images is {images} and digits has 359 test images; expected' in fails(main, run, '--n', images)
    assert '--corruptions is of the first images' in fails(main, run, '--images', '4:8', '--corruptions')
    assert '--device gpu is not to be had here' in fails(main, run, '--device', 'gpu')
    assert 'says no eps for L2' in fails(main, run, '--norm', 'L2')
    for norms in ('Linf', 'Linf=', 'L3=1', 'Linf=8/255,Linf=4/255', ''):
        assert f'--norms is {norms!r}; expected different ones of Linf, L2, L1' in fails(main, run, '--norms', norms)
    assert '--norms and --eps are given' in fails(main, run, '--norms', 'L2=1', '--eps', '1')
    assert 'write 8/255' in fails(main, run, '--norms', 'L2=1,Linf=8')
    assert 'is several networks of RobustBench; expected one of wrn' in fails(main, 'Wang2023Better_WRN-28-10')
    broken = tmp_path / 'run'
    shutil.copytree(run, broken)
    (broken / 'model.safetensors').write_bytes((run / 'model.safetensors').read_bytes()[:-9])
    assert 'is damaged' in fails(main, broken)
    (broken / 'model.safetensors').unlink()
    assert 'model.safetensors is missing' in fails(main, broken)
    record = read_record(run / 'run.json')
    (broken / 'run.json').write_text(json.dumps({**record, 'status': 'running'}))
    assert 'has not finished; run its training command again, it resumes from step-00000012' in fails(main, broken)
    shutil.rmtree(broken / 'checkpoints')
    assert 'has not finished; it has no checkpoint yet, wait for it' in fails(main, broken)
    (broken / 'run.json').write_text('{"lr": 0.1}')
    assert 'is not of train_robust.py' in fails(main, broken)
    (broken / 'run.json').write_text('{"lr"')
    assert 'is not JSON' in fails(main, broken)
    with open(broken / 'run.json', 'wb') as file:
        file.truncate(1 << 32)  # of zeros that take no place
    assert 'run.json has 4,294,967,296 bytes; expected at most 67,108,864' in fails(main, broken)
    assert not (run / 'evaluation.json').exists()


NAMES = [name for weights in timm_paf.list_weights() if weights.bundle
         for name in (weights.model, weights.name, weights.plain_name)]


@pytest.mark.parametrize('name', NAMES)
def test_a_name_says_what_its_bundle_says(name: str) -> None:
    model, found = load(name)
    _, expected = load(str(find_weights(name).bundle))
    assert found == expected
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(x), timm.create_model(name, pretrained=True).eval()(x))


@pytest.mark.parametrize('name', [
    'wrn10_1_pssilu', 'wrn10_1_pssilu.timm_paf_cifar10_linf', 'wrn10_1_pssilu_cifar10_linf'])
def test_a_name_is_measured_as_its_bundle_is(name: str, cifar10_root: Path, tmp_path: Path) -> None:
    found = []
    for source in (name, ROOT / 'hub' / 'models' / 'wrn10_1_pssilu'):
        output = tmp_path / f'{len(found)}'
        evaluate.main([str(source), '--data-dir', str(cifar10_root), '--images', '20', '--attacks', 'clean',
                       '--output', str(output)])
        found.append(json.loads((output / 'evaluation.json').read_text()))
    for key in ('architecture', 'weights_sha256', 'dataset', 'threat_model', 'images', 'data_sha256'):
        assert found[0][key] == found[1][key]
    verdicts = [result['attacks']['clean']['verdicts'] for result in found]
    assert verdicts[0] == verdicts[1]
    assert len(verdicts[0]) == 20
    assert 0 < verdicts[0].count('1') < 20


def test_a_name_that_is_not_the_zoos_needs_the_data_set() -> None:
    name = register(ROOT / 'hub' / 'models' / 'wrn10_1_pssilu', 'not_of_the_zoo')
    assert f'{name} does not say its data set; expected --dataset' in fails(evaluate.main, name)
    assert 'has no weights' in fails(evaluate.main, 'wrn10_1_pssilu.nobody_cifar10_linf')


def test_weights_of_another_architecture_are_refused(run: Path, tmp_path: Path) -> None:
    other = tmp_path / 'run'
    shutil.copytree(run, other)
    record = read_record(run / 'run.json')
    (other / 'run.json').write_text(json.dumps({**record, 'architecture': 'wrn10_2_pssilu'}))
    assert 'does not fit wrn10_2_pssilu' in fails(evaluate.main, other)


@pytest.fixture(scope='module')
def packed(measured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('bundles') / 'digits_pssilu'
    bundle.main([str(measured), '--out', str(out)])
    return out


def test_a_bundle_loads_back(measured: Path, packed: Path) -> None:
    names = sorted(str(path.relative_to(packed)) for path in packed.rglob('*') if path.is_file())
    assert names == ['README.md', 'SHA256SUMS', 'activation.png', 'config.json', 'evaluation.json', 'evidence.npz',
                     'metrics.jsonl', 'model.safetensors', 'robustbench/digits_pssilu.pt',
                     'robustbench/model_info.json', 'run.json']
    checked = subprocess.run(['sha256sum', '-c', 'SHA256SUMS'], cwd=packed, capture_output=True)
    assert checked.returncode == 0
    x = torch.rand(4, 3, 32, 32)
    expected = load_run(measured)(x)
    assert torch.equal(load_bundle(packed)(x), expected)
    if Version(timm.__version__) >= Version('1.0.16'):
        assert torch.equal(timm.create_model(f'local-dir:{packed}', pretrained=True).eval()(x), expected)
    from robustbench.model_zoo.architectures.paf_wide_resnet import PAF_WideResNet, PSSiLU
    theirs = PAF_WideResNet(PSSiLU(), depth=10, widen_factor=1)
    theirs.load_state_dict(torch.load(packed / 'robustbench' / 'digits_pssilu.pt', weights_only=True))
    torch.testing.assert_close(theirs.eval()(x), expected, rtol=1e-5, atol=1e-5)


def test_the_card_says_what_was_measured_and_nothing_else(run: Path, packed: Path, tmp_path: Path) -> None:
    found = json.loads((packed / 'evaluation.json').read_text())
    card = (packed / 'README.md').read_text()
    for name, result in found['attacks'].items():
        assert f'| {name} | {result["accuracy"]:.2%} | {result["correct"]} of 6 |' in card
    info = json.loads((packed / 'robustbench' / 'model_info.json').read_text())
    assert (info['eps'], info['dataset'], info['authors']) == ('8/255', 'digits', None)
    assert info['autoattack_acc'] is None  # RobustBench's numbers are of 10,000 images
    record, all_images = read_record(run / 'run.json'), {
        **found, 'images': 'first 10000', 'n': 10_000,
        'attacks': {k: {**v, 'n': 10_000} for k, v in found['attacks'].items()}}
    expected = f'{100 * found["attacks"]["autoattack"]["accuracy"]:.2f}'
    assert submission.model_info(record, all_images)['autoattack_acc'] == expected
    for changes in ({'threat_model': {'norm': 'Linf', 'eps': '4/255'}}, {'images': '1:10001'}):
        assert submission.model_info(record, {**all_images, **changes})['autoattack_acc'] is None
    bundle.main([str(run), '--out', str(tmp_path / 'b')])
    assert 'Nothing has been measured.' in (tmp_path / 'b' / 'README.md').read_text()
    assert json.loads((tmp_path / 'b' / 'robustbench' / 'model_info.json').read_text())['autoattack_acc'] is None
    assert not (tmp_path / 'b' / 'evaluation.json').exists()
    from huggingface_hub import ModelCard
    assert ModelCard(card).data.library_name == 'timm'


def test_bundle_refuses_bad_input(measured: Path, packed: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in packed.rglob('*') if path.is_file()}
    assert 'exists; expected a new directory' in fails(bundle.main, measured, '--out', packed)
    assert before == {path: path.read_bytes() for path in packed.rglob('*') if path.is_file()}
    other = tmp_path / 'run'
    shutil.copytree(measured, other)
    found = read_record(other / 'evaluation.json')
    assert '--name' in fails(bundle.main, measured, '--out', tmp_path / 'v1.0')
    (other / 'evaluation.json').write_text('{}')
    assert 'is not of timm-paf evaluate' in fails(bundle.main, other, '--out', tmp_path / 'b')
    (other / 'evaluation.json').write_text(json.dumps({**found, 'weights_sha256': '0' * 64}))
    assert 'is of other weights' in fails(bundle.main, other, '--out', tmp_path / 'b')
    assert 'run.json is missing' in fails(bundle.main, tmp_path, '--out', tmp_path / 'b')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['run']  # nothing half-written stays


def test_a_bundle_that_does_not_load_back_is_not_written(
        run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that change on their way to the file are noticed."""
    save = bundle.save_file
    monkeypatch.setattr(bundle, 'save_file', lambda weights, *rest: save({k: v * 2 for k, v in weights.items()}, *rest))
    assert 'loads back to other logits' in fails(bundle.main, run, '--out', tmp_path / 'b')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('model', ['wrn10_1_prelu', 'wrn10_1_relu', 'resnet18_relu', 'resnet18_pelu'])
def test_other_architectures_are_packed(model: str, tmp_path: Path, program: Program) -> None:
    """With RobustBench's class where it has one; packing itself compares the logits."""
    run = train(program, tmp_path / 'run', '--model', model, '--max-steps', 1, '--batch-size', 8)
    bundle.main([str(run), '--out', str(tmp_path / 'b')])
    card = (tmp_path / 'b' / 'README.md').read_text()
    assert f'`{model}` trained on digits' in card
    theirs = networks.zoo_class(read_record(run / 'run.json'))
    assert theirs is not None
    assert (theirs.module == networks.OWN_FILE) == (model in ('wrn10_1_prelu', 'resnet18_pelu'))
    assert (tmp_path / 'b' / 'robustbench' / 'paf_networks.py').exists() == (theirs.module == networks.OWN_FILE)


def test_frozen_values_come_back(tmp_path: Path, program: Program) -> None:
    run = train(program, tmp_path / 'run', '--model', 'wrn10_1_pssilu', '--max-steps', 2,
                '--act-kwargs', '{alpha: 2.0, frozen: [alpha]}')
    bundle.main([str(run), '--out', str(tmp_path / 'b')])
    model = load_bundle(tmp_path / 'b')
    assert model.act.alpha.item() == 2.0
    assert list(timm_paf.paf_parameters(model)) == ['act.beta']


def test_robustbench_loads_a_bundle_by_name(cifar10_root: Path, tmp_path: Path, program: Program) -> None:
    """Trained on real CIFAR-10 images, packed, loaded and measured by RobustBench's own functions."""
    args = ['--model', 'wrn10_1_pssilu', '--dataset', 'cifar10', '--data-dir', cifar10_root, '--max-steps', 3]
    run = train(program, tmp_path / 'run', *args)
    bundle.main([str(run), '--out', str(tmp_path / 'b'), '--name', 'Ours2026Test'])
    card = (tmp_path / 'b' / 'README.md').read_text()
    assert "load_model('Ours2026Test', dataset='cifar10', threat_model='Linf')" in card
    register(tmp_path / 'b', 'Ours2026Test')
    from robustbench.data import load_cifar10
    from robustbench.utils import clean_accuracy, load_model
    model = load_model('Ours2026Test', dataset='cifar10', threat_model='Linf')
    x, y = load_cifar10(n_examples=100, data_dir=str(cifar10_root))
    assert torch.equal(model(x), load_run(run)(x))
    evaluate.main([str(tmp_path / 'b'), '--data-dir', str(cifar10_root), '--n', '100', '--attacks', 'clean',
                   '--output', str(tmp_path / 'new' / 'directory')])
    found = json.loads((tmp_path / 'new' / 'directory' / 'evaluation.json').read_text())
    assert found['attacks']['clean']['accuracy'] == pytest.approx(clean_accuracy(model, x, y))


def test_a_program_without_its_input_says_so(program: Program, tmp_path: Path) -> None:
    done = program('-m', 'hub.bundle', tmp_path, '--out', tmp_path / 'b')
    assert_one_line(done, 'hub.bundle:', 'run.json is missing')


def test_picture_of_activations(tmp_path: Path) -> None:
    plot_activations({'PSSiLU': create_paf('pssilu', alpha=2.0)}, tmp_path / 'a.png')
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')


def test_quickstart_attacks_what_comes_along(
        cifar10_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    for _ in range(2):  # the second time from what is kept
        quickstart.attack_embedded(tmp_path, cifar10_root)
    found = json.loads((tmp_path / 'evaluation.json').read_text())
    assert found['architecture'] == quickstart.EMBEDDED
    expected = json.loads((find_weights(quickstart.EMBEDDED).bundle / 'evaluation.json').read_text())
    assert found['weights_sha256'] == expected['weights_sha256']
    assert found['attacks']['clean']['verdicts'] == expected['attacks']['clean']['verdicts'][:100]
    assert 0.2 < found['attacks']['pgd-20']['accuracy'] < found['attacks']['clean']['accuracy']
    out = capfd.readouterr().out
    assert out.count('timm-paf evaluate') == 1
    assert out.count(f'clean {found["attacks"]["clean"]["accuracy"]:.1%}, pgd-20') == 2


@pytest.mark.slow
def test_quickstart(tmp_path: Path, program: Program) -> None:
    done = program('-m', 'hub.quickstart', '--output', tmp_path / 'q')
    assert done.returncode == 0, done.stderr
    plain, adversarial = (json.loads((tmp_path / 'q' / name / 'evaluation.json').read_text())['attacks']
                          for name in ('plain', 'adversarial'))
    assert plain['autoattack']['accuracy'] < 0.1
    assert adversarial['autoattack']['accuracy'] > 0.4
    assert (tmp_path / 'q' / 'activation.png').read_bytes().startswith(b'\x89PNG')


def test_weights_that_are_not_to_be_had_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (('HF_HUB_CACHE', str(tmp_path)), ('HF_HUB_OFFLINE', True)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    with pytest.raises(ConnectionError, match=r'^the weights of resnet18 could not be had: [^\n]*; try again later, or '
                                              r'name a run or a bundle$'):
        load('resnet18')


def test_timms_own_networks_get_images_as_their_weights_expect_them() -> None:
    torch.manual_seed(0)
    model = timm.create_model('convnext_atto').eval()
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = model((x - mean) / std)
        torch.testing.assert_close(takes_unit_images(model)(x), expected, rtol=0, atol=0)
    ours = timm.create_model('resnet18_in_relu')
    assert not hasattr(takes_unit_images(ours), 'normalize')
    ours = timm.create_model('convnext_base_in', depths=(1,) * 4, dims=(8,) * 4).eval()
    before = ours(x)
    torch.testing.assert_close(takes_unit_images(ours)(x), before, rtol=0, atol=0)
