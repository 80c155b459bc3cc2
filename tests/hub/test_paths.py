"""What is published names no path of the machine that it was made on; the run keeps its own records."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, Program
from hypothesis import given
from hypothesis import strategies as st

from hub import bundle, card, upload
from hub.paths import paths_in, without_paths
from timm_paf.files import read_record, write_record
from timm_paf.weights.bundle_files import check_checksums, write_checksums

PSSILU = ROOT / 'hub' / 'models' / 'wrn10_1_pssilu'


@pytest.mark.parametrize(('text', 'expected'), [
    ('python /home/al/x/train_robust.py --data-dir /home/al/data --output=/home/al/r --synthetic /mnt/d/e/x.npz:0.7',
     'python train_robust.py --data-dir DATA_DIR --output=RUN --synthetic x.npz:0.7'),
    ("timm-paf train --output '/home/al ice/my data/x' --resume '/a b/c d/e'",
     'timm-paf train --output RUN --resume CHECKPOINT'),
    (r'python train.py --data-dir C:\Users\al\data --output D:/x/y/z', 'python train.py --data-dir data --output z'),
    (r'C:\Users\al ice\my data', 'my data'), (r'\\server\share\al\x', 'x'), ('/home/al ice/my data', 'my data'),
    ('/home/al', 'PATH'), (r'C:\Users', 'PATH'), ('~/data/cifar', 'cifar'), ('~al/x', 'PATH'),
    ('file:///home/al/x', 'x'), ('first 10, /tmp/x/y', 'first 10, y'), ("['/home/al/x', '/home/b b/y']", "['x', 'y']"),
    ('python -c \'import a; a("/home/al/y")\'', 'python -c \'import a; a("y")\'')])
def test_paths_become_their_last_part(text: str, expected: str) -> None:
    assert without_paths({'key': [text]}) == {'key': [expected]}
    assert without_paths(expected) == expected


@pytest.mark.parametrize('text', [
    '8/255', 'uoft-cs/cifar10', 'https://www.cs.toronto.edu/~kriz/cifar.html', '</summary>', 'Linf 8 / 255', '~5',
    'python train_robust.py --config hub/recipes/paper_linf.yaml --data-dir data --output runs/r18', 'a: b', 'n/a'])
def test_what_is_no_path_stays(text: str) -> None:
    assert without_paths(text) == text


NAMES = st.sampled_from(['home', 'alice', 'al ice', 'data', 'x.npz', 'run-1', 'tmp', "o'hara"])
PATHS = st.one_of(
    st.lists(NAMES, min_size=2, max_size=5).map(lambda names: '/' + '/'.join(names)),
    st.lists(NAMES, min_size=1, max_size=4).map(lambda names: '~/' + '/'.join(names)),
    st.lists(NAMES, min_size=1, max_size=4).map(lambda names: 'C:\\' + '\\'.join(names)))


@given(path=PATHS, form=st.sampled_from(['{}', '--data-dir={}', 'in {}', 'python x.py --output {}', 'a\n{}', '({})']))
def test_no_beginning_of_a_path_is_left(path: str, form: str) -> None:
    found = without_paths(form.format(path))
    for start in ('/home/', '/tmp/', '/alice/', '~/', 'C:\\', '/data/'):
        assert not re.search(rf'(?:^|[\s=(]){re.escape(start)}', found), found


@given(text=st.text(st.sampled_from('/\\~:=\'" \nCabx.-(,'), max_size=30))
def test_a_text_without_paths_has_none(text: str) -> None:
    once = without_paths(text)
    assert without_paths(once) == once


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_a_bundle_of_a_real_run_names_no_path(tmp_path: Path, program: Program,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / 'al ice' / 'run'
    for args in (('train', '--dataset', 'digits', '--model', 'wrn10_1_pssilu', '--max-steps', 1, '--batch-size', 8,
                  '--attack-steps', 1, '--data-dir', tmp_path / 'data', f'--output={run}'),
                 ('evaluate', run, '--n', 2, '--attacks', 'clean', '--data-dir', tmp_path / 'data')):
        done = program('-m', 'timm_paf', *args)
        assert done.returncode == 0, done.stderr
    before, out = files(run), tmp_path / 'bundle'
    bundle.main([str(run), '--out', str(out)])
    assert files(run) == before
    assert str(tmp_path) in read_record(run / 'run.json')['command']
    for name, content in files(out).items():
        assert str(tmp_path).encode() not in content, name
        assert b'al ice' not in content, name
        assert paths_in(out / name) is None, name
    per_epoch = read_record(run / 'run.json')['data']['n'] // 8
    done = f'\n1 step, {1 / per_epoch:.3g} of the 200 epochs of the recipe: it was to end after so many steps'
    assert done in (out / 'README.md').read_text()
    assert read_record(run / 'run.json')['device'] in ('cpu', 'cuda')
    assert '--data-dir DATA_DIR' in read_record(out / 'run.json')['command']
    assert read_record(out / 'run.json')['command'] in (out / 'README.md').read_text()
    assert "evaluate 'run' --n 2" in read_record(out / 'evaluation.json')['command']
    assert subprocess.run(['sha256sum', '-c', 'SHA256SUMS'], cwd=out, capture_output=True).returncode == 0
    upload.main([str(out), 'org/name', '--dry-run'])
    assert 'nothing was sent' in capsys.readouterr().out


def test_an_upload_refuses_an_earlier_bundle_with_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(shutil.copytree(PSSILU, tmp_path / 'bundle'))
    run = json.loads((out / 'run.json').read_text())
    for name, path in (('run.json', '/home/alice/data'), ('evaluation.json', r'C:\Users\alice\data')):
        command = f'python train_robust.py --data-dir {path}'
        write_record(out / name, {**read_record(out / name), 'command': command})
    (out / 'README.md').write_text((out / 'README.md').read_text().replace(run['command'], 'x --output /tmp/alice/run'))
    write_checksums(out)
    with pytest.raises(SystemExit, match=r'^hub\.upload: 3 files would publish paths[^\n]*timm-paf card [^\n]*$'):
        upload.main([str(out), 'org/name', '--dry-run'])
    assert capsys.readouterr().out.splitlines() == [
        'README.md names /tmp/alice/run', r'evaluation.json names C:\Users\alice\data',
        'run.json names /home/alice/data']
    card.main([str(out)])
    check_checksums(out)
    upload.main([str(out), 'org/name', '--dry-run'])
    assert not any(b'alice' in content for content in files(out).values())


@pytest.mark.parametrize('name', sorted(path.name for path in PSSILU.parent.iterdir()))
def test_no_path_is_seen_where_there_is_none(name: str) -> None:
    for path in (PSSILU.parent / name).rglob('*'):
        assert path.is_dir() or paths_in(path) is None


def test_no_committed_record_names_a_path() -> None:
    records = [*ROOT.glob('hub/results/**/*.json'), *ROOT.glob('tests/benchmarks/results/*.json')]
    assert len(records) > 60
    assert {path.name: found for path in records if (found := paths_in(path))} == {}
