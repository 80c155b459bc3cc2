"""timm-paf verify: what is true is confirmed, and a change of any file, number, image or verdict is found."""

from __future__ import annotations

import importlib
import json
import random
import shutil
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from conftest import ROOT, Program
from hub_server import LFS_SUFFIXES, File, Hub, Repo
from networks import randomise

from hub import bundle, evaluate, robustbench_names, sources, verify
from timm_paf.data import load_dataset, to_float
from timm_paf.files import read_record, sha256, write_record
from timm_paf.weights import list_weights
from timm_paf.weights.bundle_files import write_checksums


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory, program: Program) -> Path:
    output = tmp_path_factory.mktemp('runs') / 'run'
    done = program('train_robust.py', '--dataset', 'digits', '--model', 'wrn10_1_pssilu', '--batch-size', 64, '--lr',
                   0.1, '--attack-steps', 1, '--attack-step', '8/255', '--max-steps', 60, '--output', output)
    assert done.returncode == 0, done.stderr
    evaluate.main([str(output), '--images', '40', '--attacks', 'clean,pgd-5,pgd-3@64/255', '--batch-size', '16',
                   '--norms', 'Linf=16/255,L2=1'])
    return output


@pytest.fixture(scope='module')
def packed(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('bundles') / 'mine'
    bundle.main([str(run), '--out', str(out)])
    return out


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / 'copy'))


def outcome(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """What the program prints, with 'refused: ' before the line of an error."""
    capsys.readouterr()
    try:
        verify.main([str(arg) for arg in args])
    except SystemExit as end:
        said = capsys.readouterr().out
        return said if end.code == 1 else f'{said}refused: {end.code}'
    return capsys.readouterr().out


def test_what_is_true_is_confirmed(run: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = read_record(packed / 'evaluation.json')
    assert record['threat_model'] == {'norm': 'Linf', 'eps': '16/255'}
    assert record['worst_case']['attacks'] == ['clean', 'pgd-5']
    assert record['union']['norms'] == ['Linf', 'L2']
    assert 4 < record['union']['correct'] < record['attacks']['clean']['correct'] - 4
    for source in (packed, run):
        said = outcome(capsys, source)
        assert said.count('confirmed') == 1
        assert 'NOT' not in said
        assert said.count('evidence that fails: 0 images') == 2
        for part in (record, record['norms']['L2']):
            fooled = record['attacks']['clean']['correct'] - part['worst_case']['correct']
            assert f'robust accuracy at most {part["worst_case"]["accuracy"]:.2%}' in said
            assert f'evidence inside eps and [0, 1] that fools the network: {fooled} images' in said
        assert f'Linf and L2 together: at most {record["union"]["accuracy"]:.2%}' in said
    assert f'{len(list(packed.rglob("*"))) - 2} files have their sha256' in outcome(capsys, packed)
    assert 'evidence.npz' in (packed / 'README.md').read_text()


def test_what_is_true_of_a_range_is_confirmed(
        run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And of no other range of as many images. Its bundle says which images these are."""
    again = Path(shutil.copytree(run, tmp_path / 'run'))
    evaluate.main([str(again), '--images', '100:140', '--attacks', 'clean,pgd-5', '--eps', '16/255', '--overwrite'])
    bundle.main([str(again), '--out', str(tmp_path / 'bundle')])
    record = read_record(again / 'evaluation.json')
    assert (record['images'], record['n']) == ('100:140', 40)
    assert record['worst_case']['correct'] < record['attacks']['clean']['correct'] - 4
    for source in (again, tmp_path / 'bundle'):
        said = outcome(capsys, source)
        assert f'{record["attacks"]["clean"]["correct"]} of 40 images of digits[100:140] are right, as eval' in said
        assert 'NOT' not in said
        assert 'confirmed as upper bounds' in said
    text = (tmp_path / 'bundle' / 'README.md').read_text()
    assert 'The test images 100 to 139 (counted from 0) of digits, Linf eps 16/255, seed 0' in text
    assert 'test images 100 to 139 (counted from 0), seed 0)' in text
    assert 'first' not in text.partition('## ')[2].partition('evidence.npz')[0]
    for images in ('101:141', 'first 40'):
        change_record(lambda found, images=images: found.update(images=images))(again)
        assert 'NOT confirmed' in outcome(capsys, again)


def test_norms_are_those_of_evaluations_of_their_own(run: Path, packed: Path, tmp_path: Path) -> None:
    """Also resumed, and in an order of its own; the same command again finds it complete, another one is refused."""
    together = read_record(packed / 'evaluation.json')
    common = [str(run), '--images', '40', '--attacks', 'clean,pgd-5,pgd-3@64/255', '--batch-size', '16']
    for norm, eps, part in (('Linf', '16/255', together), ('L2', '1', together['norms']['L2'])):
        evaluate.main([*common, '--norm', norm, '--eps', eps, '--output', str(tmp_path / norm)])
        alone = read_record(tmp_path / norm / 'evaluation.json')
        assert {name: result['verdicts'] for name, result in alone['attacks'].items()} == {
            name: result['verdicts'] for name, result in part['attacks'].items()}
        assert alone['worst_case'] == part['worst_case']
    worst = [part['worst_case']['verdicts'] for part in (together, together['norms']['L2'])]
    assert together['union']['verdicts'] == ''.join(map(min, *worst))
    evaluate.main([*common, '--norms', 'Linf=16/255,L2=1'])
    assert read_record(run / 'evaluation.json') == together
    with pytest.raises(SystemExit, match='exists with other norms; give another --output DIR, or --overwrite'):
        evaluate.main([*common, '--norms', 'Linf=16/255,L2=0.5'])


def test_the_pages_of_a_bundle_show_it(packed: Path) -> None:
    text = (packed / 'README.md').read_text()
    assert '](evidence.png)' in text
    assert '| pgd-5, L2 eps 1 |' in text
    assert '| all of Linf, L2 |' in text
    assert 'other perturbations than Linf and L2' in text


def test_the_evidence_of_an_earlier_evaluation_goes_into_no_bundle(run: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(run, tmp_path / 'run'))
    assert (again / 'evidence.png').is_file()
    evaluate.main([str(again), '--images', '8', '--attacks', 'clean,pgd-1', '--eps', '1/10000', '--overwrite'])
    assert not (again / 'evidence.png').exists()
    (again / 'evidence.png').touch()
    evaluate.main([str(again), '--images', '8', '--attacks', 'clean', '--overwrite', '--no-evidence'])
    bundle.main([str(again), '--out', str(tmp_path / 'bundle')])
    assert not list((tmp_path / 'bundle').glob('evidence.*'))


def test_what_no_attack_fooled_has_no_evidence(run: Path, tmp_path: Path) -> None:
    for attacks in ('clean', 'clean,pgd-2@64/255'):
        common = [str(run), '--images', '8', '--attacks', attacks, '--output', str(tmp_path)]
        with pytest.raises(SystemExit, match='has no attack within eps 8/255; expected one such as pgd-50'):
            evaluate.main([*common, '--evidence', '--overwrite'])
        evaluate.main([*common, '--overwrite'])
        assert [path.name for path in tmp_path.iterdir()] == ['evaluation.json']
        assert 'evidence' not in read_record(tmp_path / 'evaluation.json')


def test_a_flip_in_any_file_is_found(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    files = sorted(path for path in copy.rglob('*') if path.is_file())
    assert {'evidence.npz', 'evaluation.json', 'model.safetensors', 'SHA256SUMS'} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        for _ in range(3):
            changed = bytearray(content)
            changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(changed)
            assert 'refused: ' in outcome(capsys, copy), path
        path.write_bytes(content)
    assert 'NOT' not in outcome(capsys, copy)


def change_record(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        record = read_record(folder / 'evaluation.json')
        change(record)
        write_record(folder / 'evaluation.json', record)
    return changed


def change_evidence(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        with np.load(folder / 'evidence.npz') as file:
            arrays = dict(file)
        change(arrays)
        np.savez_compressed(folder / 'evidence.npz', **arrays)
        counts = {norm: {kind: len(arrays[f'{norm}.{kind}.index']) for kind in ('eight_bit', 'float32')
                         if f'{norm}.{kind}.index' in arrays} for norm in ('Linf', 'L2')}
        norms = {norm: {**counts[norm], 'missing': []} for norm in counts}
        change_record(lambda record: record['evidence'].update(
            sha256=sha256(folder / 'evidence.npz'), norms=norms))(folder)
    return changed


def recount(result: dict[str, Any]) -> None:
    result['correct'] = result['verdicts'].count('1')
    result['accuracy'] = result['correct'] / result['n']


def flip(record: dict[str, Any], was: str) -> None:
    """Forges a verdict, and all numbers that follow from it."""
    clean = record['attacks']['clean']['verdicts']
    at = next(i for i, (right, verdict) in enumerate(
        zip(clean, record['attacks']['pgd-5']['verdicts'], strict=True)) if (right, verdict) == ('1', was))
    for result in (record['attacks']['pgd-5'], record['worst_case'], record['union']):
        result['verdicts'] = result['verdicts'][:at] + '10'[int(was)] + result['verdicts'][at + 1:]
        if result is record['union']:
            result['verdicts'] = ''.join(map(min, record['worst_case']['verdicts'],
                                             record['norms']['L2']['worst_case']['verdicts']))
        recount(result)


def leave_out(record: dict[str, Any]) -> None:
    """Forges a worst case of the clean images alone."""
    record['worst_case'].update(record['attacks']['clean'], attacks=['clean'])


def shadow(record: dict[str, Any]) -> None:
    """Forges the results in the first norm, and adds the true ones as those of a further norm."""
    record['norms'] = json.loads(json.dumps({'Linf': {key: record[key] for key in (
        'threat_model', 'attacks', 'worst_case')}}))
    record['attacks']['pgd-5']['verdicts'] = '1' * 40
    recount(record['attacks']['pgd-5'])
    leave_out(record)
    record['worst_case']['attacks'] = ['clean', 'pgd-5']
    del record['union']


def without_a_norm(record: dict[str, Any]) -> None:
    record['union'] = {**record['norms']['L2']['worst_case'], 'norms': ['L2']}


def without_verdicts(record: dict[str, Any]) -> None:
    for part in (record, record['norms']['L2']):
        del part['worst_case'], part['attacks']['clean']['verdicts']
    del record['union']


def of_more_images(record: dict[str, Any]) -> None:
    """Forges verdicts of images that the data set does not have."""
    record.update(n=400, images='first 400')
    for part in (record, record['norms']['L2']):
        for result in (*part['attacks'].values(), part['worst_case'], *([record['union']] if part is record else [])):
            result.update(n=400, verdicts=result['verdicts'] + '1' * 360)
            recount(result)


def forge_clean(record: dict[str, Any]) -> None:
    for part in (record, record['norms']['L2']):
        verdicts = part['attacks']['clean']['verdicts']
        at = verdicts.index('0')
        part['attacks']['clean']['verdicts'] = verdicts[:at] + '1' + verdicts[at + 1:]
        recount(part['attacks']['clean'])


@pytest.mark.parametrize(('forge', 'found'), [
    (change_record(lambda r: r['attacks']['pgd-5'].update(accuracy=0.9)), 'the record was changed'),
    (change_record(lambda r: r['attacks']['pgd-5'].update(correct=39, accuracy=39 / 40)), 'the record was changed'),
    (change_record(lambda r: r['worst_case'].update(verdicts='1' * 40, correct=40, accuracy=1.0)),
     'is not the worst of'),
    (change_record(lambda r: r['union'].update(correct=40, accuracy=1.0, verdicts='1' * 40)), 'is not the worst of'),
    (change_record(leave_out), r"Linf: worst_case is of ['clean']; expected all of clean, pgd-5"),
    (change_record(shadow), 'of other norms than Linf'),
    (change_record(without_a_norm), "union is of ['L2']; expected all of L2, Linf"),
    (change_record(without_verdicts), 'has no worst_case in every norm'),
    (change_record(of_more_images), 'is of the first 400 test images of data with sha256'),
    (change_record(lambda r: r.update(images='first 5')), "images is 'first 5' and n is 40; expected as many"),
    (change_record(lambda r: r.update(images='1:41')), 'and otherwise of '),
    (change_record(lambda r: r.update(images='320:360')), 'is of the test images 320 to 359 (counted from 0) of data'),
    (change_record(lambda r: r.update(images='999:1039')), '; found 359 images with '),
    (change_record(lambda r: flip(r, '0')), 'which did not fool it by evaluation.json'),
    (change_record(lambda r: flip(r, '1')), 'without evidence: 1 image'),
    (change_record(forge_clean), 'and otherwise of 1 image'),
    (change_record(lambda r: r['threat_model'].update(eps='15/255')), 'outside of eps or [0, 1]'),
    (change_record(lambda r: r.update(data_sha256='0' * 64)), 'of data with sha256 000'),
    (change_record(lambda r: r.update(weights_sha256='0' * 64)), 'is of weights with sha256 000'),
    (change_record(lambda r: r.pop('evidence')), 'has no evidence'),
    (change_record(lambda r: r['evidence'].update(sha256='0' * 64)), 'evaluation.json expects 000'),
    (change_evidence(lambda a: a['Linf.eight_bit.delta'].fill(0)), 'does not fool the network'),
    (change_evidence(lambda a: a['Linf.eight_bit.delta'].__imul__(2)), 'outside of eps or [0, 1]'),
    (change_evidence(lambda a: [a.pop(key) for key in list(a) if key.startswith('L2')]), 'without evidence: '),
    (change_evidence(lambda a: a.update({key: value[1:] for key, value in a.items() if 'Linf.eight' in key})),
     'without evidence: 1 image'),
    (change_evidence(lambda a: a['Linf.eight_bit.attack'].fill('clean')), "of the attack 'clean' in Linf"),
    (change_evidence(lambda a: a['Linf.eight_bit.attack'].fill('x\x1b')), r"of the attack 'x\x1b' in Linf"),
    (change_record(lambda r: r['evidence']['norms']['Linf'].update(eight_bit=999)), 'images; evaluation.json says'),
    (lambda folder: (folder / 'evidence.npz').unlink(), 'evidence.npz is missing')])
def test_a_forger_who_writes_the_checksums_too_is_found(
        forge: Callable[[Path], None], found: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forge(copy)
    write_checksums(copy)
    said = outcome(capsys, copy)
    assert found in said
    assert ('NOT confirmed' in said) != ('refused: ' in said)


def test_other_weights_are_found(copy: Path, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Also where every digest is made to fit."""
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / 'model.safetensors')
    weights['fc.bias'] += 0.3 * weights['fc.weight'].norm() * weights['fc.bias'].sign()
    save_file(weights, copy / 'model.safetensors', {'format': 'pt'})
    change_record(lambda record: record.update(weights_sha256=sha256(copy / 'model.safetensors')))(copy)
    write_checksums(copy)
    assert 'NOT confirmed' in outcome(capsys, copy)


def test_a_network_of_other_images_is_refused_in_one_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which its configuration may make of it, as one flipped bit does."""
    config = json.loads((copy / 'config.json').read_text())
    config['pretrained_cfg']['input_size'] = [2, 32, 32]
    (copy / 'config.json').write_text(json.dumps(config))
    write_checksums(copy)
    said = outcome(capsys, copy)
    assert 'refused: ' in said
    assert len(said.splitlines()) == 2


def test_an_evaluation_of_a_name_is_checked_where_it_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                         cifar10_root: Path) -> None:
    name = 'wrn10_1_relu'
    evaluate.main([name, '--data-dir', str(cifar10_root), '--images', '30', '--attacks', 'clean,pgd-3', '--output',
                   str(tmp_path)])
    said = outcome(capsys, name, '--evaluation', tmp_path, '--data-dir', cifar10_root)
    assert 'confirmed as upper bounds in' in said
    assert 'NOT' not in said
    assert 'refused: ' in outcome(capsys, 'wrn10_1_pssilu', '--evaluation', tmp_path, '--data-dir', cifar10_root)


@pytest.mark.parametrize('name', ['resnet18_w16_pssilu', 'wrn10_1_pssilu', 'wrn10_1_relu'])
def test_the_evidence_of_several_norms_is_confirmed(
        name: str, capsys: pytest.CaptureFixture[str], cifar10_root: Path) -> None:
    said = outcome(capsys, name, '--evaluation', ROOT / 'hub' / 'results' / 'norms' / name, '--data-dir', cifar10_root)
    assert 'confirmed as upper bounds in' in said
    assert said.count('evidence that fails: 0 images') == 3


def leave(folder: Path, name: str, network: torch.nn.Module, head: str, images: torch.Tensor) -> None:
    """Leaves random weights where RobustBench's load_model looks first; every class is the largest for some image."""
    folder.mkdir(parents=True)
    randomise(network).eval()
    with torch.no_grad():
        network.get_submodule(head).bias -= network(images).mean(0)
    torch.save(network.state_dict(), folder / f'{name}.pt')


def test_a_name_of_robustbench(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        cifar10_root: Path) -> None:
    """Of the file that its load_model leaves, here with random weights: what it downloads can't be had here."""
    pytest.importorskip('robustbench', reason="needs pip install 'timm-paf[robustbench]'")
    from robustbench.model_zoo.architectures.resnet import ResNet18
    from robustbench.utils import load_model

    name, folder = 'Addepalli2021Towards_RN18', tmp_path / 'models' / 'cifar10' / 'Linf'
    torch.manual_seed(0)
    images = load_dataset('cifar10', cifar10_root, False).take(torch.arange(20))
    leave(folder, name, ResNet18(), 'linear', to_float(images.images))
    monkeypatch.chdir(tmp_path)
    evaluate.main([name, '--data-dir', str(cifar10_root), '--images', '20', '--attacks', 'clean,pgd-2'])
    with torch.no_grad():
        theirs = load_model(name, dataset='cifar10', threat_model='Linf').eval()(to_float(images.images)).argmax(1)
    record = read_record(tmp_path / 'evaluation.json')
    assert record['attacks']['clean']['correct'] == int((theirs == images.labels).sum()) > record['attacks']['pgd-2'][
        'correct']
    said = outcome(capsys, name, '--evaluation', tmp_path, '--data-dir', cifar10_root)
    assert 'confirmed as upper bounds in' in said
    weights = torch.load(folder / f'{name}.pt')
    weights['linear.bias'][0] += 1
    torch.save(weights, folder / f'{name}.pt')
    assert 'is of weights with sha256' in outcome(capsys, name, '--evaluation', tmp_path, '--data-dir', cifar10_root)


def test_an_entry_of_robustbench_that_has_no_name_in_timm(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        cifar10_root: Path) -> None:
    pytest.importorskip('robustbench', reason="needs pip install 'timm-paf[robustbench]'")
    from robustbench.model_zoo.models import model_dicts
    from robustbench.utils import BenchmarkDataset, ThreatModel, load_model

    name, folder = 'Hendrycks2020AugMix_ResNeXt', tmp_path / 'models' / 'cifar10' / 'corruptions'
    torch.manual_seed(0)
    images = load_dataset('cifar10', cifar10_root, False).take(torch.arange(6))
    leave(folder, name, model_dicts[BenchmarkDataset.cifar_10][ThreatModel.corruptions][name]['model'](), 'classifier',
          to_float(images.images))
    monkeypatch.chdir(tmp_path)
    board, data = f'cifar10/corruptions/{name}', ('--data-dir', str(cifar10_root))
    evaluate.main([board, *data, '--images', '6', '--attacks', 'clean,pgd-2', '--eps', '8/255'])
    with torch.no_grad():
        theirs = load_model(name, dataset='cifar10', threat_model='corruptions')(to_float(images.images)).argmax(1)
    record = read_record(tmp_path / 'evaluation.json')
    assert record['attacks']['clean']['correct'] == int((theirs == images.labels).sum())
    assert 'confirmed as upper bounds in' in outcome(capsys, board, '--evaluation', tmp_path, *data)
    for source, expected in (
            (name, f'several networks of RobustBench; expected one of {board}, cifar100/corruptions/{name}'),
            (board, 'comes without an evaluation'), (f'cifar10/Linf/{name}', 'is no run (run.json), no bundle')):
        assert expected in outcome(capsys, source, *data)
    (folder / f'{name}.pt').write_bytes(b'damaged')
    said = outcome(capsys, board, '--evaluation', tmp_path, *data)
    assert f'robustbench.utils.load_model does not give {name}' in said


def raising(error: Exception) -> Callable[..., None]:
    """A function that raises it."""
    def function(*args: object, **kwargs: object) -> None:
        raise error
    return function


def test_what_load_model_raises_is_said_without_a_servers_words_or_is_the_machines(
        monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip('robustbench.utils', reason="needs pip install 'timm-paf[robustbench]'")
    entry = robustbench_names.find_entry('cifar10/corruptions/Hendrycks2020AugMix_ResNeXt')
    assert entry is not None
    of_server = requests.HTTPError('403 Client Error for url: https://x.test/?token=SECRET')
    raised: list[Exception] = [
        of_server, AssertionError(), ImportError('cannot import name x'), NameError('xla'),
        ModuleNotFoundError('No module named x', name='x'), MemoryError(), OSError(24, 'Too many open files')]
    for error in raised:
        monkeypatch.setattr(utils, 'load_model', raising(error))
        with pytest.raises((ValueError, ModuleNotFoundError, MemoryError, OSError)) as found:
            robustbench_names.load_entry(entry)
        if error in raised[4:]:
            assert found.value is error
        else:
            assert str(found.value).startswith(f'robustbench.utils.load_model does not give {entry.name}: ')
            assert 'SECRET' not in str(found.value)
            assert type(error).__name__ in str(found.value)


def test_a_robustbench_that_lacks_a_package_is_not_taken_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('robustbench', reason="needs pip install 'timm-paf[robustbench]'")
    for name in [name for name in sys.modules if name.startswith('robustbench.model_zoo')]:
        monkeypatch.delitem(sys.modules, name)
    with monkeypatch.context() as other:
        other.setattr(importlib, 'import_module', raising(ImportError("cannot import name 'x' from 'timm'")))
        with pytest.raises(ValueError, match=r'Standardd is no run .* does not start: cannot import name'):
            sources.find_name('Standardd')
        with pytest.raises(FileNotFoundError, match=r'runs/mine is no run '):  # a path, which is no name of RobustBench
            sources.find_name('runs/mine')
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    with pytest.raises(ModuleNotFoundError, match='torchvision'):
        robustbench_names.find_entry('Standard')
    with pytest.raises(ModuleNotFoundError, match=r'Standardd is no run .* which may have it, lacks torchv'):
        sources.find_name('Standardd')
    monkeypatch.setitem(sys.modules, 'robustbench', None)
    assert robustbench_names.find_entry('Standard') is None


def test_a_name_of_robustbench_means_the_same_with_its_board() -> None:
    zoo = pytest.importorskip('robustbench.model_zoo.models', reason="needs pip install 'timm-paf[robustbench]'")
    named = {weights.name: weights for weights in list_weights()}
    for dataset, boards in zoo.model_dicts.items():
        for threat, entries in boards.items():
            for name in entries:
                found = sources.find_name(f'{dataset.value}/{threat.value}/{name}')
                if isinstance(found, str):
                    assert named[found].robustbench == name
                    assert (named[found].dataset, named[found].norm) == (dataset.value, threat.value)
                else:
                    assert (found.name, found.dataset, found.threat) == (name, dataset.value, threat.value)


def test_weights_that_share_memory_have_the_hash_of_those_that_do_not() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    apart = deepcopy(model)
    apart[1].weight = torch.nn.Parameter(model[0].weight.clone())
    assert sources.sha256_of(model) == sources.sha256_of(apart)


def test_a_bundle_on_the_hub(packed: Path, tmp_path: Path, program: Program) -> None:
    with Hub() as hub:
        env = {'HF_ENDPOINT': hub.url, 'HF_HOME': str(tmp_path), 'HF_HUB_DISABLE_XET': '1'}
        repo = hub.repos['org/name'] = Repo()
        files = {path.relative_to(packed).as_posix(): path.read_bytes() for path in packed.rglob('*') if path.is_file()}
        for changed in ('.gitattributes', 'evidence.npz'):
            commit = repo.commit('main', {name: File(content, name.endswith(LFS_SUFFIXES))
                                          for name, content in {**files, changed: b'changed'}.items()}, changed)
            done = program('-m', 'timm_paf', 'verify', f'org/name@{commit}', env=env)
            if changed == '.gitattributes':  # the repository's own, which is not of the bundle
                assert done.returncode == 0, done.stderr
                assert 'confirmed as upper bounds in' in done.stdout
            else:
                assert done.returncode == 1
                assert 'evidence.npz: sha256 is' in done.stderr
                assert len(done.stderr.strip().splitlines()) == 1
        missing = program('-m', 'timm_paf', 'verify', 'org/other', env=env)
        assert missing.returncode == 1
        assert len(missing.stderr.strip().splitlines()) == 1


def test_what_can_not_be_checked_is_said_in_one_line(
        run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, expected in (
            (['nothing'], 'nothing is no run (run.json), no bundle'), (['resnet18'], 'comes without an evaluation'),
            (['wrn28_10_pssilu'], 'expected --evaluation DIR'),
            ([run, '--batch-size', '0'], 'the batch size is 0; expected at least 1'),
            ([tmp_path], 'no run'), ([run, '--evaluation', tmp_path], 'evaluation.json')):
        said = outcome(capsys, *args)
        assert expected in said
        assert said.count('\n') == 0
    assert json.loads((run / 'evaluation.json').read_text())['complete']
