"""RobustBench's ImageNet board on a stand-in with ImageNet's names: RobustBench's pixels, and the whole way."""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import unlike_its_verdicts
from PIL import Image

import train_robust
from hub import bundle, evaluate, leaderboard
from hub.imagenet import PREPROCESSINGS, open_board, open_imagenet_c, preprocessing
from timm_paf import load_bundle, robustbench
from timm_paf.data import to_float
from timm_paf.data.corrupted import CORRUPTIONS, SEVERITIES
from timm_paf.data.indexed import evaluation_transform
from timm_paf.files import read_record

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec('robustbench') is None, reason="needs pip install 'timm-paf[robustbench]'")
N = 24


def helper_file(name: str) -> str:
    place = Path(importlib.util.find_spec('robustbench').submodule_search_locations[0])
    return (place / 'helper_files' / name).read_text()


def names() -> list[str]:
    return helper_file('imagenet_test_image_ids.txt').split()


def make_classes(folder: Path) -> list[Path]:
    """Makes a directory for each of the 1,000 classes; the list has images of 997."""
    found = sorted(folder / value for value in set(json.loads(helper_file('imagenet_class_to_id_map.json'))))
    assert len(found) == 1000
    for path in found:
        path.mkdir(parents=True)
    return found


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first images of the board in many sizes, some not in colour, and an image for each class in both splits."""
    root, rng = tmp_path_factory.mktemp('imagenet'), np.random.default_rng(0)
    for folder in (*make_classes(root / 'train'), *make_classes(root / 'val')):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / 'ILSVRC2012_0.JPEG')
    for number, name in enumerate(names()[:N]):
        image = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize(
            tuple(rng.integers(200, 420, 2).tolist()))
        (image.convert('CMYK') if number == 3 else image.convert('L') if number == 5 else image).save(
            root / 'val' / name)
    return root


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The program handles signals, which are put back, and takes an accelerator that no other test has made."""
    AcceleratorState._reset_state(reset_partial_state=True)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize('name', sorted(PREPROCESSINGS))
def test_pixels_and_labels_are_those_of_robustbench(root: Path, tmp_path: Path, name: str) -> None:
    from robustbench import data

    place, n = root, N
    if name == 'none':  # RobustBench's loader stacks the images, so that they must have one size
        place, n = tmp_path, 4
        make_classes(tmp_path / 'val')
        for each in names()[:n]:
            with Image.open(root / 'val' / each) as image:
                image.convert('RGB').resize((90, 70)).save(tmp_path / 'val' / each)
    x, y = data.load_imagenet(n, str(place), data.PREPROCESSINGS[None if name == 'none' else name])
    found = open_board(place, n)
    assert torch.equal(to_float(found.transformed(preprocessing(name))), x)
    assert torch.equal(found.labels, y)


def test_images_of_imagenet_c_are_those_of_robustbench(root: Path, tmp_path: Path) -> None:
    """Two directories with other images stand in for those of the 75 severities."""
    from robustbench import data

    for number in (0, 1):
        make_classes(tmp_path / str(number))
        for name in names()[:5]:
            with Image.open(root / 'val' / name) as image:
                image.convert('RGB').resize((224, 224)).rotate(180 * number).save(tmp_path / str(number) / name)
    for number, corruption in enumerate(CORRUPTIONS):
        (tmp_path / 'ImageNet-C' / corruption).mkdir(parents=True)
        for severity in SEVERITIES:
            (tmp_path / 'ImageNet-C' / corruption / str(severity)).symlink_to(
                tmp_path / str((number + severity) % 2))
    found = open_imagenet_c(tmp_path, 5)
    for corruption, severity in (('gaussian_noise', 1), ('jpeg_compression', 5)):
        x, y = data.load_imagenetc(5, severity, tmp_path, False, [corruption], data.PREPROCESSINGS['Res224'])
        images = torch.cat([found.read(corruption, severity, 0, 2), found.read(corruption, severity, 2, 5)])
        assert torch.equal(to_float(images), x)
        assert torch.equal(found.labels, y)
    assert not torch.equal(found.read('snow', 1, 0, 5), found.read('snow', 2, 0, 5))
    assert found.about['preprocessing'] == 'Res224'
    (tmp_path / 'ImageNet-C' / 'fog' / '3').unlink()
    with pytest.raises(FileNotFoundError, match=r'ImageNet-C/fog/3 lacks 5 of the 5 images'):
        open_imagenet_c(tmp_path, 5)


def test_names_and_preprocessings_are_all_of_robustbench() -> None:
    from robustbench import data

    assert {name or 'none' for name in data.PREPROCESSINGS} == PREPROCESSINGS.keys()
    assert len(names()) == len(set(names())) == 5000


@pytest.mark.parametrize('model', ['convnext_atto', 'resnet10t', 'xcit_nano_12_p16_224'])
def test_timm_s_transform_is_what_robustbench_makes_for_a_model_of_timm(root: Path, model: str) -> None:
    import timm
    from robustbench.data import get_timm_model_preprocessing

    cfg = timm.create_model(model).default_cfg
    found = open_board(root, 6).transformed(evaluation_transform(
        cfg['input_size'][-1], cfg['crop_pct'], cfg['interpolation']))
    for index, image in enumerate(to_float(found)):
        assert torch.equal(image, get_timm_model_preprocessing(model)(open_board(root, 6).read(index)))


def test_several_sizes_missing_images_and_missing_lists_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'comes out as \d+ x \d+ and .*; expected one size'):
        open_board(root, 4).transformed(preprocessing('none'))
    with pytest.raises(FileNotFoundError, match=r"lacks [\d,]+ of the 5,000 images of RobustBench's list, such as n"):
        open_board(root, 5000)
    with pytest.raises(FileNotFoundError, match='val lacks 3 of the 3 images'):
        open_board(tmp_path, 3)
    with pytest.raises(FileNotFoundError, match='imagenet needs a directory; expected --data-dir DIR'):
        open_board(None, 3)
    with pytest.raises(ValueError, match="unknown preprocessing 'Res'; expected one of Res256Crop224, "):
        preprocessing('Res')


def test_the_list_may_lie_beside_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_classes(tmp_path / 'val')
    Image.new('RGB', (30, 20)).save(tmp_path / 'val' / 'n01440764' / 'x.JPEG')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(FileNotFoundError, match=r'imagenet_test_image_ids\.txt is not there; expected RobustBench'):
        open_board(tmp_path, 2)
    (tmp_path / 'imagenet_test_image_ids.txt').write_text('\n'.join(['n01440764/x.JPEG']))
    assert open_board(tmp_path, 9).labels.tolist() == [0]
    (tmp_path / 'val' / 'n02106662').rmdir()
    with pytest.raises(ValueError, match=r'val has 999 directories; expected the 1,000'):
        open_board(tmp_path, 9)


def test_a_run_on_imagenet_is_evaluated_packed_and_ranked(
        root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_robust.run(train_robust.parse([
        '--model', 'wrn10_1_pssilu', '--dataset', 'imagenet', '--data-dir', str(root), '--image-size', '32',
        '--max-steps', '2', '--batch-size', '8', '--attack-steps', '1', '--eps', '4/255', '--output',
        str(tmp_path / 'run')])) == 0
    options = ['--data-dir', str(root), '--n', '6', '--attacks', 'clean,pgd-1', '--device', 'cpu']
    evaluate.main([str(tmp_path / 'run'), *options])
    found = read_record(tmp_path / 'run' / 'evaluation.json')
    assert [found[key] for key in ('dataset', 'images', 'preprocessing', 'n')] == [
        'imagenet', 'first 6', 'timm: 32, 0.875, bicubic, center', 6]
    assert found['threat_model'] == {'norm': 'Linf', 'eps': '4/255'}
    bundle.main([str(tmp_path / 'run'), '--out', str(tmp_path / 'packed')])
    assert 'Numbers of RobustBench are of 5,000.' in (tmp_path / 'packed' / 'README.md').read_text()
    info = json.loads((tmp_path / 'packed' / 'robustbench' / 'model_info.json').read_text())
    assert (info['dataset'], info['eps'], info['clean_acc']) == ('imagenet', '4/255', None)
    model = load_bundle(tmp_path / 'packed')
    assert len(model.pretrained_cfg['label_names']) == 1000

    from robustbench.utils import load_model
    robustbench.register(tmp_path / 'packed', 'Mine2026Imagenet')
    theirs = load_model('Mine2026Imagenet', dataset='imagenet', threat_model='Linf')
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(theirs(x), model(x))

    evaluate.main([str(tmp_path / 'packed'), *options, '--preprocessing', 'Res224', '--output',
                   str(tmp_path / 'other')])
    assert json.loads((tmp_path / 'other' / 'evaluation.json').read_text())['preprocessing'] == 'Res224'
    found['attacks'] = {name: dict(found['attacks']['clean']) for name in ('clean', 'autoattack')}
    (tmp_path / 'other' / 'evaluation.json').write_text(json.dumps(unlike_its_verdicts(found, 5000)))
    capsys.readouterr()
    leaderboard.main([str(tmp_path / 'other')])
    out = capsys.readouterr().out
    assert 'imagenet Linf 4/255, beside 30 models of the zoo' in out
    row = next(line for line in out.splitlines() if '**other**' in line)
    assert 'not ranked' not in row
    assert row.split('|')[1].strip().isdecimal()


def test_a_folder_of_other_classes_is_no_imagenet(tmp_path: Path) -> None:
    for name in ('train/a', 'train/b', 'val/a', 'val/b'):
        (tmp_path / name).mkdir(parents=True)
        Image.new('RGB', (9, 9)).save(tmp_path / name / '0.png')
    with pytest.raises(ValueError, match='has 2 classes; expected the 1,000 of ImageNet, or --dataset folder'):
        train_robust.run(train_robust.parse(['--dataset', 'imagenet', '--data-dir', str(tmp_path), '--output',
                                             str(tmp_path / 'run'), '--batch-size', '2']))
