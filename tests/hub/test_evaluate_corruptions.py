"""timm-paf evaluate --corruptions: alone, resumed and shared it gives the accuracies of the images, and says which."""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Program

from hub import bundle, card, evaluate
from hub.corruptions import open_corrupted
from hub.record_check import check_evaluation
from timm_paf import load_bundle
from timm_paf.data import ImageSet, derive_seed, load_dataset, to_float
from timm_paf.data.corrupted import CORRUPTIONS, SEVERITIES
from timm_paf.files import read_record, write_record

MODEL = ROOT / 'hub' / 'models' / 'wrn10_1_pssilu'
N = 3
Alone = tuple[Path, dict[str, Any]]
SECTION: dict[str, Any] = {
    'accuracy': 0.5, 'n': 4, 'data_sha256': 'a' * 64, 'generated': True, 'seed': 0, 'versions': {'numpy': '2.4.6'},
    'by': {name: [1, 0.75, 0.5, 0.25, 0] for name in CORRUPTIONS}, 'seconds': 1.5}


def evaluated(output: Path, root: Path, *more: object) -> dict[str, Any]:
    evaluate.main([str(arg) for arg in (
        MODEL, '--data-dir', root, '--n', N, '--batch-size', 2, '--attacks', 'clean', '--corruptions', '--seed', 3,
        '--device', 'cpu', '--output', output, *more)])
    found: dict[str, Any] = read_record(output / 'evaluation.json')['corruptions']
    found.pop('seconds')
    return found


@pytest.fixture(scope='module')
def alone(cifar10_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """One process that nobody disturbed."""
    for package in ('cv2', 'skimage', 'imagecorruptions'):
        pytest.importorskip(package, reason="needs pip install 'timm-paf[corruptions]'")
    output = tmp_path_factory.mktemp('alone')
    found = evaluated(output, cifar10_root)
    assert {path.name for path in output.iterdir()} == {'evaluation.json', 'corruptions.png'}
    assert (output / 'corruptions.png').read_bytes().startswith(b'\x89PNG')
    return output, found


def test_the_accuracies_are_those_of_the_images(alone: Alone, cifar10_root: Path) -> None:
    from timm_paf.data.corruptions import corrupt

    _, found = alone
    data, model = load_dataset('cifar10', cifar10_root, train=False), load_bundle(MODEL).eval()
    assert list(found['by']) == list(CORRUPTIONS)
    for number, name in enumerate(CORRUPTIONS):
        severity = 1 + number % 5
        images = torch.from_numpy(np.stack([corrupt(
            data.images[i].numpy(), name, severity, np.random.default_rng(derive_seed(3, number, severity, i)))
            for i in range(N)]))
        with torch.no_grad():
            right = (model(to_float(images)).argmax(1) == data.labels[:N]).sum().item()
        assert found['by'][name][severity - 1] == right / N
    assert found['accuracy'] == pytest.approx(np.mean(list(found['by'].values())))
    assert (found['n'], found['generated'], found['seed']) == (N, True, 3)
    assert {'numpy', 'pillow', 'scikit-image'} <= found['versions'].keys()


def test_it_is_complete_and_other_images_are_not_these(
        alone: Alone, cifar10_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(alone[0], tmp_path, dirs_exist_ok=True)
    assert evaluated(tmp_path, cifar10_root) == alone[1]
    out = capsys.readouterr().out
    assert 'it was complete already' in out
    assert 'generated with seed 3' in out
    rows = [line.split() for line in out.splitlines()]
    first = rows.index(['corruption', '1', '2', '3', '4', '5', 'mean'])
    assert [row[0] for row in rows[first + 1:first + 17]] == [*CORRUPTIONS, 'mean']
    assert [len(row) for row in rows[first + 1:first + 17]] == [7] * 16
    assert float(rows[first + 16][6]) == pytest.approx(100 * alone[1]['accuracy'], abs=0.1)
    record = read_record(tmp_path / 'evaluation.json')
    for section in (None, {**record['corruptions'], 'versions': {}}):
        write_record(tmp_path / 'evaluation.json', {
            key: section if key == 'corruptions' else value for key, value in record.items()
            if key != 'corruptions' or section})
        with pytest.raises(SystemExit, match='exists with other corruptions; give another --output DIR, or --overwri'):
            evaluated(tmp_path, cifar10_root)


def test_it_resumes_with_what_is_whole(
        alone: Alone, cifar10_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(tmp_path, cifar10_root, '--keep-state')
    files = sorted((tmp_path / 'evaluation.state' / 'corruptions').glob('*.safetensors'))
    assert len(files) == 15 * 5
    for file in files[::2]:
        file.unlink()
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    left = files[3].stat().st_mtime_ns
    (tmp_path / 'evaluation.json').unlink()
    assert evaluated(tmp_path, cifar10_root, '--keep-state') == alone[1]
    assert f'{files[1]} is damaged and is done again' in capsys.readouterr().out
    assert files[3].stat().st_mtime_ns == left
    (tmp_path / 'evaluation.json').unlink()
    with pytest.raises(SystemExit, match=r'is of another evaluation \(seed 3, now 4\)'):
        evaluated(tmp_path, cifar10_root, '--seed', 4)


@pytest.mark.slow
def test_two_processes_share_it(
        alone: Alone, cifar10_root: Path, tmp_path: Path, program: Program) -> None:
    done = program('-m', 'torch.distributed.run', '--nproc_per_node', 2, '-m', 'hub.evaluate', MODEL, '--data-dir',
                   cifar10_root, '--images', N, '--batch-size', 1, '--attacks', 'clean', '--corruptions', '--seed', 3,
                   '--output', tmp_path, env={'ACCELERATE_USE_CPU': 'true', **{
                       key: value for key, value in os.environ.items() if key == 'PYTHONPATH'}})
    assert done.returncode == 0, done.stderr
    assert read_record(tmp_path / 'evaluation.json')['processes'] == 2
    found = read_record(tmp_path / 'evaluation.json')['corruptions']
    assert {**alone[1], 'seconds': found['seconds']} == found


def test_a_bundle_and_its_card_have_it(alone: Alone, tmp_path: Path) -> None:
    run = Path(shutil.copytree(MODEL, tmp_path / 'run'))
    for name in ('config.json', 'evaluation.json'):
        (run / name).unlink()
    shutil.copytree(alone[0], run, dirs_exist_ok=True)
    bundle.main([str(run), '--out', str(tmp_path / 'packed')])
    assert (tmp_path / 'packed' / 'corruptions.png').is_file()
    text = (tmp_path / 'packed' / 'README.md').read_text()
    assert '| corruption | 1 | 2 | 3 | 4 | 5 | mean |' in text
    assert f'on {N} test images each, **generated** with seed 3:' in text
    assert all(f'| {name} | ' in text for name in CORRUPTIONS)
    assert 'Nothing is said of other perturbations than Linf and common corruptions' in text
    assert 'corruptions' not in card.measured({
        key: value for key, value in read_record(run / 'evaluation.json').items() if key != 'corruptions'})


@pytest.mark.parametrize(('key', 'value'), [
    ('accuracy', 0.51), ('accuracy', 2), ('n', 0), ('generated', 'no'), ('seed', -1), ('seed', None), ('by', {}),
    ('by', {**SECTION['by'], 'rain': [0] * 5}), ('by', {**SECTION['by'], 'snow': [0] * 4}), ('by', [0] * 15),
    ('by', {**SECTION['by'], 'snow': [2, 0, 0, 0, 0]}), ('data_sha256', 'x'), ('versions', {'numpy': '$(id)'}),
    ('seconds', '1')])
def test_a_section_that_nobody_measured_is_refused(key: str, value: object) -> None:
    record = json.loads((MODEL / 'evaluation.json').read_text())
    section = copy.deepcopy(SECTION)
    assert check_evaluation({**record, 'corruptions': section}, Path('e'))['corruptions'] == SECTION
    with pytest.raises(ValueError, match=rf'^e: corruptions[.: ]+{key}'):
        check_evaluation({**record, 'corruptions': {**section, key: value}}, Path('e'))


def test_a_data_set_without_corruptions_is_told(tmp_path: Path) -> None:
    digits = ImageSet('digits', torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.tensor([0, 1]), 10)
    with pytest.raises(ValueError, match='--corruptions is for cifar10, cifar100, imagenet; there are none of digits'):
        open_corrupted(argparse.Namespace(data_dir=str(tmp_path), seed=0), digits, 2)


@pytest.fixture
def files(cifar10_root: Path, tmp_path: Path) -> Path:
    """A directory with CIFAR-10 and files of CIFAR-10-C."""
    sys.path.insert(0, str(ROOT / 'tests' / 'data'))
    from test_corrupted import write_cifar_c

    write_cifar_c(tmp_path / 'data' / 'CIFAR-10-C')
    (tmp_path / 'data' / 'cifar-10-batches-py').symlink_to(cifar10_root.absolute() / 'cifar-10-batches-py')
    return tmp_path / 'data'


@pytest.mark.parametrize('given', ['.', 'cifar-10-batches-py', '..'])
def test_files_are_taken_where_they_lie_beside_cifar(files: Path, given: str) -> None:
    labels = torch.from_numpy(np.load(files / 'CIFAR-10-C' / 'labels.npy')[:2].astype(np.int64))
    data = ImageSet('cifar10', torch.zeros(2, 32, 32, 3, dtype=torch.uint8), labels, 10)
    found = open_corrupted(argparse.Namespace(data_dir=str(files / given), seed=0), data, 2)
    assert (found.name, found.about['generated']) == ('CIFAR-10-C', False)
    with pytest.raises(ValueError, match=r'labels\.npy has other labels than the test images of cifar10'):
        open_corrupted(argparse.Namespace(data_dir=str(files / given), seed=0), replace(data, labels=9 - labels), 2)


@pytest.mark.slow
def test_robustbench_has_the_same_accuracies(files: Path, tmp_path: Path) -> None:
    """By its loader and its accuracy: its benchmark() gives the loader of CIFAR an argument that it does not take."""
    pytest.importorskip('robustbench', reason="needs pip install 'timm-paf[robustbench]'")
    from robustbench.data import load_cifar10c
    from robustbench.utils import clean_accuracy

    data, n = load_dataset('cifar10', files, train=False), 12
    np.save(files / 'CIFAR-10-C' / 'labels.npy', np.tile(data.labels.numpy(), 5).astype(np.uint8))
    for number, name in enumerate(CORRUPTIONS):
        images = np.lib.format.open_memmap(files / 'CIFAR-10-C' / f'{name}.npy', 'r+')
        for severity in SEVERITIES:
            first = (severity - 1) * 10_000
            images[first:first + n] = np.roll(data.images[:n].numpy() // severity, number, 2)
    found, model = evaluated(tmp_path / 'ours', files, '--n', n), load_bundle(MODEL).eval()
    assert not found['generated']
    assert found['by'] == {name: [
        clean_accuracy(model, *load_cifar10c(n, severity, str(files), False, [name]), batch_size=5)
        for severity in SEVERITIES] for name in CORRUPTIONS}
    assert len({value for values in found['by'].values() for value in values}) > 3
    assert found['accuracy'] == pytest.approx(np.mean(list(found['by'].values())), abs=1e-12)
