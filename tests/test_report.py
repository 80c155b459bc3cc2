"""The study's command, and the README's tables and pictures: they are what the records say."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Program, assert_one_line
from PIL import Image

import timm_paf
from hub import report, study, study_records
from timm_paf.plots import plot_activations, plot_eps, plot_shapes

RECORDS = sorted((ROOT / 'hub').glob('*/**/evaluation.json'))  # of hub/models too


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What hub.report reads and writes, in a place of its own."""
    shutil.copy(ROOT / 'README.md', tmp_path)
    shutil.copytree(ROOT / 'hub' / 'results', tmp_path / 'hub' / 'results')
    return tmp_path


def run(program: Program, checkout: Path, *args: str):  # type: ignore[no-untyped-def]
    code = f'import os; from hub.report import main; os.chdir({str(checkout)!r}); main()'
    return program('-c', code, *args)


def test_everything_is_up_to_date(program: Program) -> None:
    done = program('-m', 'hub.report', '--check')
    assert (done.returncode, done.stdout) == (0, ''), done.stdout + done.stderr


def test_a_number_that_no_record_has_is_found_and_mended(program: Program, checkout: Path) -> None:
    readme, picture = checkout / 'README.md', checkout / 'hub' / 'results' / 'eps.png'
    whole = readme.read_text()
    row = next(line for line in whole.splitlines() if line.startswith('| `wrn10_1_relu.'))
    readme.write_text(whole.replace(row, re.sub(r'\d\.\d \| measured', '9.9 | measured', row)))
    other = {'x': [('0', 50.0), ('8/255', 20.0)]}
    plot_eps(other, picture, source=json.dumps(other))
    done = run(program, checkout, '--check')
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines()] == ['README.md', 'hub/results/eps.png']
    assert readme.read_text() != whole
    assert run(program, checkout).returncode == 0
    assert readme.read_text() == whole
    assert run(program, checkout, '--check').returncode == 0


def test_mistakes_are_named_and_change_nothing(
        program: Program, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    readme, record = checkout / 'README.md', checkout / study.RESULTS / 'silu_s0'
    whole = readme.read_text()
    for text, words in (
            (whole.replace('<!-- end -->', '', 1), 'not followed by its own'),
            (whole.replace('hub.report: weights', 'hub.report: weight'), "the mark of 'weight' is unknown"),
            (re.sub('<!-- hub.report: embedded.*?<!-- end -->', '', whole, flags=re.DOTALL), 'no mark of embedded')):
        readme.write_text(text)
        with pytest.raises(ValueError, match=words):
            report.run(check=False)
        assert readme.read_text() == text
    assert_one_line(run(program, checkout), 'hub.report:', 'no mark of embedded')
    readme.write_text(whole)
    record.rename(record.with_name('silu_s9'))
    with pytest.raises(ValueError, match='silu_s9 holds the records of silu_s0'):
        report.run(check=False)
    record.with_name('silu_s9').rename(record)
    for name, keys, value, words in (
            ('run.json', ('recipe', 'lr'), 0.2, 'silu_s0 in hub/results/study were made in another way'),
            ('evaluation.json', ('n',), 999, 'silu_s0 in hub/results/study were made in another way'),
            ('evaluation.json', ('complete',), False, 'evaluation.json is not finished'),
            ('evaluation.json', ('attacks',), {}, 'expected pgd-50 among them')):
        before = (record / name).read_text()
        changed = inner = json.loads(before)
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (record / name).write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=words):
            report.run(check=False)
        (record / name).write_text(before)
    shutil.rmtree(checkout / study.RESULTS)
    with pytest.raises(ValueError, match=r'has no relu_s0; run python -m hub\.study'):
        report.run(check=False)


@pytest.mark.parametrize('path', RECORDS, ids=lambda path: path.parent.name)
def test_counts_are_those_of_the_verdicts(path: Path) -> None:
    found = json.loads(path.read_text())
    for result in found['attacks'].values():
        assert len(result['verdicts']) == result['n'] == found['n']
        assert result['verdicts'].count('1') == result['correct'] == round(result['accuracy'] * result['n'])


def test_the_readmes_reason_to_leave_fab_t_and_square_out() -> None:
    for path in (ROOT / 'hub' / 'models').glob('*/evaluation.json'):
        after = json.loads(path.read_text())['attacks']['autoattack']['after']
        assert after['apgd-t'] == after['fab-t'] == after['square'], path


def test_differences_against_arithmetic_on_the_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    groups = study_records.activations()
    table = report.study_table()
    for act in ('silu', 'psoftplus', 'pssilu_free'):
        pairs = []
        for mine in groups[act]:
            base = next(r for r in groups['relu'] if r.case.seed == mine.case.seed)
            pairs.append([int(a) - int(b) for a, b in zip(mine.evaluation['attacks']['pgd-50']['verdicts'],
                                                          base.evaluation['attacks']['pgd-50']['verdicts'])])
        seeds = [100 * statistics.mean(pair) for pair in pairs]
        images = [statistics.mean(column) for column in zip(*pairs)]
        expected = [statistics.mean(seeds), *((min(seeds), max(seeds)) if len(seeds) > 1 else ()),
                    200 * statistics.stdev(images) / math.sqrt(len(images))]
        text = report.difference(groups[act], groups['relu'], 'pgd-50')
        assert [float(number) for number in re.findall(r'-?\d+\.\d', text)] == pytest.approx(expected, abs=0.0501)
        assert text in table


def test_records_are_of_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = study_records.records()
    assert {record.case.name for record in found} <= {case.name for case in study.cases(3)}
    assert {case.name for case in study.cases(1)} <= {record.case.name for record in found}
    for record in found:
        assert record.run['architecture'] == f'{study.ARCHITECTURE}_{record.case.act}'
        assert bool(record.learned) == (not record.case.fixed and study_records.parameters(record.case.act) > 0)
        kwargs = {**record.case.fixed, 'frozen': True} if record.case.fixed else {}
        assert record.run['recipe']['act_kwargs'] == kwargs
        assert record.evaluation['complete']
        assert set(record.case.attacks.split(',')) <= record.evaluation['attacks'].keys()


@pytest.mark.parametrize(('act', 'values', 'curvature', 'at'), [
    ('psilu', {'alpha': 4.0}, 2.0, -1 / (1 + math.exp(4))),  # alpha / 2 at 0
    ('silu', {}, 0.5, -1 / (1 + math.e)),
    ('softplus', {}, 0.25, math.log1p(math.exp(-1))),
    ('pssilu', {'beta': 0.5}, 1.0, 1 - 2 / (1 + math.e)),  # alpha / 2 / (1 - beta)
    ('elu', {}, 1.0, math.exp(-1) - 1), ('pelu', {'alpha': 0.5}, math.inf, (math.exp(-1) - 1) / 2),
    ('prelu', {'alpha': -0.3}, math.inf, 0.3), ('relu', {}, math.inf, 0.0)])
def test_shape_against_closed_forms(act: str, values: dict[str, float], curvature: float, at: float) -> None:
    found = study.shape(act, **values)
    assert found == (pytest.approx(curvature, abs=1e-3), pytest.approx(at, abs=1e-6))


def test_cases() -> None:
    names = [case.name for case in study.cases(3)]
    assert len(set(names)) == len(names)
    assert {f'{act}_s{seed}' for act in timm_paf.list_pafs(plain=True) for seed in range(3)} <= set(names)
    strong = {case.name for case in study.cases(3) if case.attacks.endswith(',apgd')}
    assert {f'{act}_s0' for act in timm_paf.list_pafs(plain=True)} <= strong
    assert {name for name in strong if not name.endswith('_s0')} == {
        f'{act}_s{seed}' for act in ('relu', 'psoftplus', 'pssilu') for seed in (1, 2)}


def test_study_trains_attacks_and_goes_on(tmp_path: Path, cifar10_root: Path, program: Program) -> None:
    def call(*args: object):  # type: ignore[no-untyped-def]
        return program('-m', 'hub.study', '--data-dir', cifar10_root, '--output', tmp_path / 'runs', '--keep',
                       tmp_path / 'kept', '--images', 8, *args, '--', '--max-steps', 2, '--batch-size', 16)

    assert_one_line(call('--only', 'gelu*'), "no case matches 'gelu*'")
    assert_one_line(program('-m', 'hub.study', '--', '--max-steps', 2), 'an --output of its own')
    assert_one_line(program('-m', 'hub.study', '--only', 'relu_s0'), 'expected --data-dir DIR')
    assert 'relu_s0                 to do\n' in program('-m', 'hub.study', '--list').stdout
    done = call('--only', 'psilu_alpha0.5_s0')
    assert done.returncode == 0, done.stderr
    kept = tmp_path / 'kept' / 'psilu_alpha0.5_s0'
    found = study_records.Record(kept)
    assert found.case == study.Case('psilu', 0, {'alpha': 0.5})
    assert list(found.evaluation['attacks']) == ['clean', 'pgd-50']
    assert not found.learned
    before = (kept / 'run.json').stat().st_mtime_ns
    shutil.rmtree(tmp_path / 'runs')
    done = call('--only', 'psilu_alpha0.5_s0')
    assert (done.returncode, done.stdout) == (0, '1 of 1 networks are complete\n')
    assert (kept / 'run.json').stat().st_mtime_ns == before
    done = call('--only', 'psilu_alpha*_s0', '--minutes', 0)
    assert done.stdout == ('0 minutes are over; the same command goes on with psilu_alpha4_s0\n'
                           '1 of 3 networks are complete\n')


def test_pictures_show_their_numbers_and_carry_them(tmp_path: Path) -> None:
    curves = {'a': [('0', 60.0), ('8/255', 30.0)], 'b': [('0', 50.0), ('4/255', 40.0)]}
    points = [('relu', math.inf, 0.0, 20.0), ('silu', 0.5, -0.27, 25.0)]
    for plot, numbers, others in (
            (plot_eps, curves, {**curves, 'b': [('0', 50.0), ('4/255', 41.0)]}),
            (plot_shapes, points, [points[0], ('silu', 0.5, -0.27, 24.0)]),
            (plot_activations, {'f': torch.nn.SiLU()}, {'f': torch.nn.ELU()})):
        pixels = []
        for given in (numbers, others, numbers):
            plot(given, tmp_path / 'a.png', source=f'{given}')
            with Image.open(tmp_path / 'a.png') as picture:
                assert picture.info['Description'] == f'{given}'
                pixels.append(picture.convert('L').tobytes())
        assert pixels[0] == pixels[2] != pixels[1]
