"""Our results among RobustBench's."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Program, unlike_its_verdicts

from hub import leaderboard
from hub.leaderboard import BOARDS, Result
from hub.wording import interval
from timm_paf.data.corrupted import CORRUPTIONS
from timm_paf.files import read_record, write_record

TRAINED = ROOT / 'hub' / 'models' / 'wrn10_1_pssilu'
needs_robustbench = pytest.mark.skipif(
    importlib.util.find_spec('robustbench') is None, reason="needs pip install 'timm-paf[robustbench]'")
RECORD = {  # the schema of RobustBench's model_info, the numbers our own
    'link': 'https://example.org', 'name': 'Title', 'authors': 'A B, C D', 'additional_data': False,
    'number_forward_passes': 1, 'dataset': 'cifar10', 'venue': 'ICML 2026', 'architecture': 'WideResNet-28-10',
    'eps': '8/255', 'clean_acc': '90.10', 'reported': '50.30', 'autoattack_acc': '50.20', 'footnote': None,
    'unreliable': False}


def checkout(path: Path, records: dict[str, dict[str, Any]], board: str = 'cifar10/Linf') -> Path:
    folder = path / 'model_info' / board
    folder.mkdir(parents=True)
    for name, changes in records.items():
        record = {key: value for key, value in {**RECORD, **changes}.items() if value != 'absent'}
        (folder / f'{name}.json').write_text(json.dumps(record))
    return path


def measured(path: Path, n: int = 10_000, clean: int = 60, robust: int = 40, **changes: Any) -> Path:
    """An evaluation of ours with these percentages of ``n`` images."""
    path.mkdir()
    found = unlike_its_verdicts(read_record(TRAINED / 'evaluation.json'), n)
    for attack, percent in (('clean', clean), ('autoattack', robust)):
        correct = percent * n // 100
        found['attacks'][attack].update(correct=correct, accuracy=correct / n)
    (path / 'evaluation.json').write_text(json.dumps({**found, **changes}))
    return path


def rows(text: str) -> list[list[str]]:
    """Cells of the tables' rows: rank, model, clean, robust, architecture, venue, note."""
    lines = [line for line in text.splitlines() if line.startswith('|')]
    cells = [[cell.strip() for cell in line[1:-1].split('|')] for line in lines]
    return [row for row in cells if row[0] != '#' and set(row[2]) != {'-'}]


def main(*args: object) -> None:
    leaderboard.main([str(arg) for arg in args])


def fails(*args: object) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main(*args)
    message = str(exit_info.value.code)
    assert message.startswith('hub.leaderboard: ')
    assert '\n' not in message
    return message


@needs_robustbench
@pytest.mark.parametrize('board', [board for board in BOARDS if board[1] != 'corruptions_3d'])
def test_published_results_of_the_installed_robustbench(board: leaderboard.Board) -> None:
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    results = leaderboard.of_package(board)
    zoo = model_dicts[BenchmarkDataset(board[0])][ThreatModel(board[1])]
    names = {result.name for result in results}
    assert len(names) == len(results)
    assert len(names & zoo.keys()) > 0.9 * max(len(names), len(zoo))
    assert all(0 <= result.robust <= result.clean <= 100 for result in results)
    assert [result.robust for result in results] == sorted((result.robust for result in results), reverse=True)
    if board == ('cifar10', 'Linf'):  # what the paper's network is known to have there
        dai = next(result for result in results if result.name == 'Dai2021Parameterizing')
        assert dai[:5] == ('Dai2021Parameterizing', 87.02, 61.55, 'WideResNet-28-10-PSSiLU', 'arXiv, Oct 2021')


@needs_robustbench
def test_bundles_beside_the_installed_robustbench(program: Program, tmp_path: Path) -> None:
    models = sorted(TRAINED.parent.iterdir())
    done = program('-m', 'hub.leaderboard', *models, '--out', tmp_path / 'boards')
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    assert len(found) == len(leaderboard.of_package(('cifar10', 'Linf'))) + len(models)
    for model in models:
        attacks = json.loads((model / 'evaluation.json').read_text())['attacks']
        row = next(row for row in found if row[1] == f'**{model.name}**')
        assert row[0] == '-'
        assert row[2:4] == [f'{100 * attacks[name]["accuracy"]:.2f}' for name in ('clean', 'autoattack')]
        assert 'not ranked: n = 1,000, 95 % interval' in row[6]
    assert f'zoo of robustbench {importlib.metadata.version("robustbench")}' in done.stdout
    assert sorted(path.name for path in (tmp_path / 'boards').iterdir()) == ['cifar10_Linf.md', 'cifar10_Linf.png']
    assert rows((tmp_path / 'boards' / 'cifar10_Linf.md').read_text()) == found
    assert (tmp_path / 'boards' / 'cifar10_Linf.png').read_bytes().startswith(b'\x89PNG')
    assert 'expected a new directory' in fails(models[0], '--out', tmp_path / 'boards')


def test_records_of_a_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkout(tmp_path / 'robustbench', {
        'Second2026': {'autoattack_acc': '45.00'},
        'First2026': {'additional_data': True, 'architecture': 'A | B'},
        'Lower2026': {'autoattack_acc': '70.00', 'external': '39.00', 'unreliable': True},
        'Other2026': {'eps': '0.031', 'autoattack_acc': '10.0', 'venue': 'absent', 'unreliable': 'absent'},
        'Same2026': {'eps': 8 / 255, 'autoattack_acc': 9},
        'Empty2026': {'clean_acc': None}, 'Absent2026': {'autoattack_acc': 'absent'}})
    main(measured(tmp_path / 'ours'), '--robustbench', folder)
    output = capsys.readouterr().out
    assert [row[:4] for row in rows(output)] == [
        ['1', 'First2026', '90.10', '50.20'], ['2', 'Second2026', '90.10', '45.00'],
        ['3', '**ours**', '60.00', '40.00'], ['4', 'Lower2026', '90.10', '39.00'], ['5', 'Other2026', '90.10', '10.00'],
        ['6', 'Same2026', '90.10', '9.00']]
    notes = {row[1]: row[4:] for row in rows(output)}
    assert notes['First2026'] == ['A / B', 'ICML 2026', 'more real data']
    assert notes['Lower2026'][2] == 'by another attack, 70.00 by AutoAttack, unreliable'
    assert notes['Other2026'][1:] == ['', 'eps 0.031']
    assert notes['**ours**'] == ['WideResNet-10-1-PSSiLU', '', 'ours']
    assert 'beside 5 records of a checkout' in output
    assert 'without numbers and left out: Absent2026, Empty2026\n' in output


def test_what_robustbench_would_not_take_has_no_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkout(tmp_path / 'robustbench', {'Other2026': {'autoattack_acc': '30.00'}})
    main(measured(tmp_path / 'few', n=9_999, robust=50), measured(tmp_path / 'fast', standard=False),
         measured(tmp_path / 'range', images='1:10001'),  # as many as a board has
         measured(tmp_path / 'all', robust=35, standard=True), '--robustbench', folder)
    found = {row[1]: (row[0], row[6]) for row in rows(capsys.readouterr().out)}
    low, high = (100 * end for end in interval(50 * 9_999 // 100, 9_999))
    assert found == {
        '**few**': ('-', f'ours, not ranked: n = 9,999, 95 % interval {low:.2f} to {high:.2f}'),
        '**range**': ('-', 'ours, not ranked: test images 1 to 10000 (counted from 0), n = 10,000, 95 % interval '
                           '39.04 to 40.96'),
        '**fast**': ('-', 'ours, not ranked: not the standard evaluation'), '**all**': ('1', 'ours'),
        'Other2026': ('2', '')}


@pytest.mark.parametrize(('correct', 'n'), [(271, 1000), (2, 4), (0, 20), (20, 20), (300, 9_999)])
def test_interval(correct: int, n: int) -> None:
    """Its ends are the shares from which the measured one is 1.96 standard deviations away."""
    share = correct / n
    for end in interval(correct, n):
        assert abs(share - end) == pytest.approx(1.959964 * (end * (1 - end) / n)**0.5, abs=1e-6)
    low, high = interval(correct, n)
    assert low <= share + 1e-12
    assert share - 1e-12 <= high
    assert low < high


def test_a_board_for_each_threat_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkout(tmp_path / 'robustbench', {'Linf2026': {}})
    checkout(folder, {'L22026': {'eps': '0.5'}}, 'cifar10/L2')
    l2 = measured(tmp_path / 'l2', threat_model={'norm': 'L2', 'eps': '1/2'})
    main(l2, measured(tmp_path / 'linf') / 'evaluation.json', '--robustbench', folder, '--out', tmp_path / 'boards')
    assert 'cifar10 L2 0.5, beside 1 records' in capsys.readouterr().out
    assert [row[1] for row in rows((tmp_path / 'boards' / 'cifar10_L2.md').read_text())] == ['L22026', '**l2**']
    assert [row[1] for row in rows((tmp_path / 'boards' / 'cifar10_Linf.md').read_text())] == ['Linf2026', '**linf**']


def test_boards_without_results_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkout(tmp_path / 'robustbench', {
        'A2026': {'eps': None, 'corruptions_acc': '40.00', 'corruptions_acc_3d': '50.00', 'autoattack_acc': 'absent'},
        'B2026': {'eps': None, 'corruptions_acc': '60.00', 'autoattack_acc': 'absent'}}, 'imagenet/corruptions')
    main('--board', 'imagenet/corruptions', '--board', 'imagenet/corruptions_3d', '--robustbench', folder,
         '--out', tmp_path / 'boards')
    out = capsys.readouterr().out
    assert [row[:4] for row in rows(out)] == [
        ['1', 'B2026', '90.10', '60.00'], ['2', 'A2026', '90.10', '40.00'], ['1', 'A2026', '90.10', '50.00']]
    assert 'imagenet corruptions: 2 records' in out
    assert 'imagenet corruptions_3d: 1 records of a checkout of RobustBench; without numbers and left out: B2026' in out
    assert {path.name for path in (tmp_path / 'boards').iterdir()} == {
        f'imagenet_corruptions{end}' for end in ('.md', '.png', '_3d.md', '_3d.png')}
    assert 'has no table of imagenet corruptions_3d; git clone' in fails('--board', 'imagenet/corruptions_3d')


@needs_robustbench
def test_all_boards_where_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    found = re.findall(r'^(\S+ \S+)(?: \S+)?: \d+ models of the zoo', capsys.readouterr().out, re.MULTILINE)
    assert found == [' '.join(board) for board in BOARDS if board[1] != 'corruptions_3d']


THEIRS = """
import sys, timm_paf  # which lets RobustBench find AutoAttack
from robustbench.leaderboard.template import generate_leaderboard
for board in sys.argv[2:]:
    generate_leaderboard(*board.split('/'), sys.argv[1])
"""


@needs_robustbench
def test_boards_are_those_of_robustbenchs_own_program(robustbench_checkout: Path) -> None:
    """As many rows, in the order of its accuracies; it puts equal ones as the file system lists them."""
    boards = [board for board in BOARDS if board[1] != 'corruptions_3d']
    env = {**os.environ, 'PYTHONPATH': f'{robustbench_checkout}{os.pathsep}{ROOT}', 'OMP_NUM_THREADS': '1'}
    page = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', THEIRS, str(robustbench_checkout / 'model_info'),
         *map('/'.join, boards)], env=env, text=True, capture_output=True, check=True).stdout
    tables = page.split('<table')[1:]
    assert len(tables) == len(boards)
    for board, text in zip(boards, tables):
        kind = 'aa-extd' if BOARDS[board].eps else 'aatd'
        cells = [[re.search(f'<td class="{name}">(.*?)</td>', row)[1].replace('<br>', ' ').removesuffix('%')
                  for name in (kind, 'catd', 'archtd', 'venuetd')] for row in text.split('<tr>')[2:]]
        theirs = [(f'{float(robust):.2f}', f'{float(clean):.2f}', *words) for robust, clean, *words in cells]
        results, empty = leaderboard.of_checkout(board, robustbench_checkout)
        by_name = {result.name: result for result in results}
        found = [by_name[row[1]] for row in rows(leaderboard.table(results))]
        ours = [(f'{r.robust:.2f}', f'{r.clean:.2f}', r.architecture, r.venue) for r in found]
        assert len(ours) == len(theirs) > 10
        assert not empty
        assert [row[0] for row in ours] == [row[0] for row in theirs]
        assert sorted(ours) == sorted(theirs)


def test_the_board_of_corruptions_in_3d(robustbench_checkout: Path) -> None:
    """RobustBench's program has none; its page shows the column of the records."""
    results, empty = leaderboard.of_checkout(('imagenet', 'corruptions_3d'), robustbench_checkout)
    assert not empty
    assert {result.name: f'{result.robust:.2f}' for result in results} == {
        path.stem: f'{float(json.loads(path.read_text())["corruptions_acc_3d"]):.2f}'
        for path in (robustbench_checkout / 'model_info' / 'imagenet' / 'corruptions').glob('*.json')}


def test_no_markup_of_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {
        'GitHub,<br>Sep 2019': 'GitHub, Sep 2019', 'A<BR/>B': 'A B', '<b>Bold</b> &amp; more': 'Bold & more',
        'a | b': 'a / b', 'line\nbreak\u2028': 'line break', '<<b>script>x</script>': r'\< script>x',
        'l < 1': r'l \< 1',
        '&lt;script src="//x"&gt;': '', '[x](http://x)': r'\[x\](http://x)', '`rm`': r'\`rm\`', '**x**': r'\*\*x\*\*'}
    for i, text in enumerate(words):
        checkout(tmp_path / 'robustbench' / str(i), {'Other2026': {'venue': text, 'architecture': text}})
        main('--board', 'cifar10/Linf', '--robustbench', tmp_path / 'robustbench' / str(i))
        line = capsys.readouterr().out.strip().splitlines()[-1]
        assert [part.strip() for part in line.split('|')[5:7]] == [words[text]] * 2


SEVERITIES = [0.9, 0.8, 0.7, 0.6, 0.5]


def corrupted(**changes: Any) -> dict[str, Any]:
    return {'accuracy': 0.7, 'generated': False, 'n': 10_000, 'data_sha256': 'a' * 64, 'seconds': 1.0, 'seed': 0,
            'by': dict.fromkeys(CORRUPTIONS, SEVERITIES),
            **changes}


def test_results_on_corruptions_have_their_own_board(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkout(tmp_path / 'robustbench', {'A2026': {'corruptions_acc': '60.00'}}, 'cifar10/corruptions')
    checkout(folder, {'B2026': {}})
    clean_few = measured(tmp_path / 'clean_few', n=1_000, corruptions=corrupted())
    main(measured(tmp_path / 'ranked', clean=80, corruptions=corrupted()),
         measured(tmp_path / 'generated', clean=80, corruptions=corrupted(generated=True)), clean_few,
         measured(tmp_path / 'few', corruptions=corrupted(n=500)),
         measured(tmp_path / 'fast', corruptions=corrupted(), standard=False), '--board', 'cifar10/corruptions',
         '--robustbench', folder)
    text = capsys.readouterr().out
    linf, corruptions = text.index('cifar10 Linf 8/255'), text.index('cifar10 corruptions')
    assert corruptions < linf
    assert len(rows(text[linf:])) == 6
    found = {row[1]: [row[0], *row[2:4], row[6]] for row in rows(text[:linf])}
    assert found == {
        '**ranked**': ['1', '80.00', '70.00', 'ours'], 'A2026': ['2', '90.10', '60.00', ''],
        '**generated**': ['-', '80.00', '70.00', "ours, not ranked: generated corruptions, not the benchmark's files"],
        '**clean_few**': ['-', '60.00', '70.00', 'ours, not ranked: 1,000 clean images'],
        '**few**': ['-', '60.00', '70.00',
                    'ours, not ranked: 500 images of each corruption and severity, not 10,000'],
        '**fast**': ['-', '60.00', '70.00', 'ours, not ranked: not the standard evaluation']}
    alone = measured(tmp_path / 'alone', corruptions=corrupted())
    record = json.loads((alone / 'evaluation.json').read_text())
    record['attacks'] = {'clean': record['attacks']['clean']}
    (alone / 'evaluation.json').write_text(json.dumps(record))
    main(alone, '--robustbench', folder)
    assert 'Linf' not in capsys.readouterr().out


@pytest.mark.parametrize(('changes', 'words'), [
    ({'accuracy': 0.8}, r'corruptions\.accuracy is 0\.8; expected 0\.7\d*, the mean of by'),
    ({'accuracy': None}, r'accuracy is None; expected a share'),
    ({'generated': 1}, r'generated is 1; expected true or false'), ({'n': '5'}, r"n is '5'"),
    *(({'by': by}, r'by(\.\w+)? is .*; expected') for by in (
        {}, [], {'fog': 0.5}, {'fog': [0.5]}, {**dict.fromkeys(CORRUPTIONS, SEVERITIES), 'fog': [2] * 5},
        {'| x': SEVERITIES}, None))])
def test_a_strangers_corruptions(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = measured(tmp_path / 'run', corruptions=corrupted(**changes))
    assert re.search(words, fails(path))


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkout(tmp_path / 'robustbench', {'Other2026': {}})
    assert 'evaluation.json is missing' in fails(tmp_path, '--robustbench', folder)
    changed = tmp_path / 'evaluation.json'
    write_record(changed, read_record(TRAINED / 'evaluation.json'))
    changed.write_text(changed.read_text().replace('"seed": 0', '"seed": 1'))
    assert 'evaluation.json is damaged: record_sha256' in fails(changed)
    assert 'has no records; expected a checkout of RobustBench: git clone' in fails(TRAINED, '--robustbench', tmp_path)
    other = measured(tmp_path / 'eps', threat_model={'norm': 'Linf', 'eps': '31/1000'})
    assert 'is of cifar10 Linf 31/1000; RobustBench has cifar10 Linf 8/255' in fails(other, '--robustbench', folder)
    attacks = unlike_its_verdicts(read_record(TRAINED / 'evaluation.json'), 10_000)['attacks']
    del attacks['autoattack']
    assert 'has clean, pgd-50; run timm-paf evaluate with --attacks clean,autoattack' in fails(
        measured(tmp_path / 'pgd', **{'attacks': attacks}), '--robustbench', folder)
    (folder / 'model_info' / 'cifar10' / 'Linf' / 'Broken2026.json').write_text('{')
    assert 'Broken2026.json is not JSON' in fails(TRAINED, '--robustbench', folder)

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(importlib.metadata, 'metadata', missing)
    assert 'no robustbench is installed to give its published results; git clone' in fails(TRAINED)


@needs_robustbench
def test_a_package_without_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an installation from elsewhere may be."""
    info = tmp_path / 'robustbench-9.dist-info'
    shutil.copytree(importlib.metadata.distribution('robustbench')._path, info)
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: robustbench\nVersion: 9\n\n### CIFAR-10\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert 'has no table of cifar10 Linf 8/255; git clone' in fails(TRAINED)


def test_table_is_aligned() -> None:
    lines = leaderboard.table([Result('a', 1, 0.5, 'long architecture'), Result('b', 100, 99, '')]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [row[1] for row in rows('\n'.join(lines))] == ['b', 'a']
