"""`timm-paf study`: what a YAML means, what is done again, and the statistics of the study at convergence."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Program, assert_one_line
from scipy import stats

from hub.study import cases, convergence, main, records
from timm_paf.activations import list_pafs
from timm_paf.processes import exclusive_lock
from timm_paf.training.config import check, parse

STUDY = """
recipe: study_resnet18_w8
options: {epochs: 2, paf_clip: 0}
images: 8
attacks: clean,pgd-1
seeds: [0, 3]
networks:
  relu: {model: resnet18_w8_relu}
  $act$alpha-$lr:
    each: {act: [psilu, psoftplus], alpha: [0.5, 4], lr: [0.1]}
    model: resnet18_w8_$act
    act_kwargs: {alpha: $alpha, frozen: true}
    lr: $lr
    compile: true
"""


def opened(tmp_path: Path, text: str) -> list[cases.Case]:
    path = tmp_path / 'study.yaml'
    path.write_text(text)
    return cases.open_study(path)


def test_a_grid_is_every_combination_with_every_seed(tmp_path: Path) -> None:
    study = opened(tmp_path, STUDY)
    assert [case.name for case in study] == [f'{network}_s{seed}' for seed in (0, 3) for network in (
        'relu', 'psilu0.5-0.1', 'psilu4-0.1', 'psoftplus0.5-0.1', 'psoftplus4-0.1')]
    for case in study:
        case.check()
        recipe = check(parse([*case.train(), '--data-dir', 'data', '--output', 'run']))
        assert (recipe.seed, recipe.epochs, recipe.paf_clip) == (case.seed, 2, 0)
        assert (case.images, case.attacks) == (8, 'clean,pgd-1')
    recipe = check(parse([*study[-1].train(), '--data-dir', 'data', '--output', 'run']))
    assert (recipe.model, recipe.act_kwargs) == ('resnet18_w8_psoftplus', {'alpha': 4, 'frozen': True})
    assert (recipe.lr, recipe.compile) == (0.1, True)


def test_parts_take_what_they_leave_out_from_the_whole_and_a_recipe_lies_beside(tmp_path: Path) -> None:
    (tmp_path / 'mine.yaml').write_text('model: resnet18_w8_relu\nepochs: 7\n')
    study = opened(tmp_path, """
recipe: mine.yaml
images: 4
attacks: clean
seeds: [0]
parts:
- {networks: {a: {}}}
- {networks: {b: {lr: 0.5}}, seeds: [1, 2], images: 9, attacks: 'pgd-3'}
""")
    assert [(case.name, case.images, case.attacks) for case in study] == [
        ('a_s0', 4, 'clean'), ('b_s1', 9, 'pgd-3'), ('b_s2', 9, 'pgd-3')]
    assert check(parse([*study[0].train(), '--data-dir', 'data', '--output', 'run'])).epochs == 7


def test_the_example_of_the_page(tmp_path: Path) -> None:
    example, = re.findall(r'```yaml\n(recipe: .*?)```', (ROOT / 'hub' / 'README.md').read_text(), re.DOTALL)
    study = opened(tmp_path, example)
    for case in study:
        case.check()
    assert {case.network for case in study} == {'relu', 'psilu_alpha1', 'psilu_alpha4', 'psilu_alpha16'}


@pytest.mark.parametrize(('old', 'new', 'words'), [
    ('seeds: [0, 3]', 'seed: [0, 3]', "unknown key 'seed'; expected recipe, options, networks, seeds"),
    ('seeds: [0, 3]', '', 'seeds is None; expected a list such as [0, 1, 2]'),
    ('seeds: [0, 3]', 'seeds: [-1]', r'seeds is [-1]; expected whole numbers'),
    ('seeds: [0, 3]', 'seeds: [1, 1]', 'relu_s1 is there twice'),
    ('images: 8', 'images: true', 'images is True; expected a whole number'),
    ('lr: [0.1]', 'lr: 0.1', "expected options of train, and beside them each with lists of values"),
    ('lr: $lr', 'lr: $lrr', "has $ with 'lrr', of which each says no values"),
    ('relu: {', 'relu: {seed: 1, ', "'relu' is no name of a directory, or has a seed"),
    ('relu: {', '../relu: {', "'../relu' is no name of a directory"),
    ('networks:', 'parts: 3\nnetworks:', 'parts is 3; expected a list of parts'),
    ('networks:', 'options: {}\nnetworks:', "'options' is given twice, first in line 3"),
    ('recipe: study_resnet18_w8', 'recipe: !!python/name:os.system', 'expected a plain value')])
def test_what_no_study_can_mean_is_said_in_one_line(old: str, new: str, words: str, tmp_path: Path) -> None:
    assert STUDY.count(old) == 1
    with pytest.raises(ValueError, match=r'study\.yaml') as found:
        opened(tmp_path, STUDY.replace(old, new))
    assert words in str(found.value)
    assert '\n' not in str(found.value)


@pytest.mark.parametrize(('old', 'new', 'words'), [
    ('epochs: 2', 'epohcs: 2', 'relu_s0: .*epohcs.*; did you mean --epochs'),
    ('lr: [0.1]', 'lr: [-1]', 'psilu0.5--1_s0: --lr is -1'),
    ('pgd-1', 'pgd-0', "relu_s0: unknown attack 'pgd-0'"),
    ('resnet18_w8_$act', 'resnet18_w9_$act', "psilu0.5-0.1_s0: unknown model 'resnet18_w9_psilu'")])
def test_a_network_that_can_not_be_trained_is_named(old: str, new: str, words: str, tmp_path: Path) -> None:
    study = opened(tmp_path, STUDY.replace(old, new))
    wrong = next(case for case in study if case.name == words.partition(':')[0])
    with pytest.raises(ValueError, match=words):
        wrong.check()


def test_a_fault_of_the_last_network_is_found_before_the_first_is_trained(tmp_path: Path, program: Program) -> None:
    opened(tmp_path, STUDY.replace('alpha: [0.5, 4]', 'alpha: [0.5, no]'))
    done = program('-m', 'hub.study', tmp_path / 'study.yaml', '--data-dir', 'data', '--output', tmp_path / 'runs')
    assert_one_line(done, 'hub.study: psiluFalse-0.1_s0: ')
    assert not (tmp_path / 'runs').exists()


@pytest.mark.parametrize('directory', ['study', 'convergence'])
def test_records_are_of_the_study(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    folder = Path('hub/results') / directory
    study = {case.name: case for case in cases.open_study(folder / cases.FILE)}
    for case in study.values():
        case.check()
    found = records.records_of(folder)
    assert found
    for record in found:
        assert study[record.case.name].complete(folder / record.case.name)
        assert record.run['architecture'].endswith(f'_{record.act}')
        assert bool(record.learned) == (not record.fixed and records.parameters(record.act) > 0)
        kwargs = {**record.fixed, 'frozen': True} if record.fixed else record.case.options.get('act_kwargs', {})
        assert record.run['recipe']['act_kwargs'] == kwargs
        assert set(record.case.attacks.split(',')) <= record.evaluation['attacks'].keys()
    if directory == 'study':
        assert {case.network for case in study.values()} >= {'relu', 'elu', 'softplus', 'silu', *list_pafs()}


@pytest.mark.parametrize(('file', 'keys', 'value', 'words'), [
    ('run.json', ('recipe', 'seed'), 1, r'run\.json has seed 1; expected 0, which the study has for pssilu_free_s0'),
    ('run.json', ('recipe', 'paf_penalty'), 10.0, r'run\.json has paf_penalty 10\.0; expected 0'),
    ('evaluation.json', ('n',), 999, None), ('evaluation.json', ('images',), '1000:2000', None),
    ('evaluation.json', ('complete',), False, None)])
def test_records_of_another_network_or_evaluation_are_not_taken(
        file: str, keys: tuple[str, ...], value: object, words: str | None, tmp_path: Path) -> None:
    folder = ROOT / 'hub' / 'results' / 'study'
    case = next(case for case in cases.open_study(folder / cases.FILE) if case.name == 'pssilu_free_s0')
    shutil.copytree(folder / case.name, tmp_path / case.name)
    assert case.complete(tmp_path / case.name)
    changed = inner = json.loads((tmp_path / case.name / file).read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (tmp_path / case.name / file).write_text(json.dumps(changed))
    if words is None:
        assert not case.complete(tmp_path / case.name)
    else:
        with pytest.raises(ValueError, match=words):
            case.complete(tmp_path / case.name)


@pytest.mark.parametrize(('act', 'values', 'curvature', 'at'), [
    ('psilu', {'alpha': 4.0}, 2.0, -1 / (1 + math.exp(4))),  # alpha / 2 at 0
    ('silu', {}, 0.5, -1 / (1 + math.e)),
    ('softplus', {}, 0.25, math.log1p(math.exp(-1))),
    ('pssilu', {'beta': 0.5}, 1.0, 1 - 2 / (1 + math.e)),  # alpha / 2 / (1 - beta)
    ('elu', {}, 1.0, math.exp(-1) - 1), ('pelu', {'alpha': 0.5}, math.inf, (math.exp(-1) - 1) / 2),
    ('prelu', {'alpha': -0.3}, math.inf, 0.3), ('relu', {}, math.inf, 0.0)])
def test_shape_against_closed_forms(act: str, values: dict[str, float], curvature: float, at: float) -> None:
    found = records.shape(act, **values)
    assert found == (pytest.approx(curvature, abs=1e-3), pytest.approx(at, abs=1e-6))

@pytest.mark.slow
def test_study_trains_attacks_and_resumes(tmp_path: Path, cifar10_root: Path, program: Program) -> None:
    study = tmp_path / 'tiny.yaml'
    study.write_text(STUDY.replace('compile: true', 'compile: false'))

    def call(*args: object):  # type: ignore[no-untyped-def]
        return program('-m', 'hub.study', study, '--data-dir', cifar10_root, '--output', tmp_path / 'runs', '--keep',
                       tmp_path / 'kept', *args, '--', '--max-steps', 2, '--batch-size', 16)

    assert_one_line(call('--only', 'gelu*'), "no network matches 'gelu*'")
    assert_one_line(program('-m', 'hub.study', study, '--', '--max-steps', 2), 'an --output of its own')
    assert_one_line(program('-m', 'hub.study', study, '--only', 'relu_s0'), 'expected --data-dir DIR')
    assert 'relu_s0                 to do\n' in program('-m', 'hub.study', study, '--list').stdout
    done = call('--only', 'psilu0.5*_s0')
    assert done.returncode == 0, done.stderr
    kept, case = tmp_path / 'kept' / 'psilu0.5-0.1_s0', cases.open_study(study)[1]
    found = records.Record(kept, case)
    assert (found.act, found.fixed, found.learned) == ('psilu', {'alpha': 0.5}, {})
    assert list(found.evaluation['attacks']) == ['clean', 'pgd-1']
    assert str(tmp_path) in (tmp_path / 'runs' / kept.name / 'run.json').read_text()
    assert str(tmp_path) not in ''.join((kept / name).read_text() for name in cases.RECORDS)
    before = (kept / 'run.json').stat().st_mtime_ns
    shutil.rmtree(tmp_path / 'runs')
    done = call('--only', 'psilu0.5*_s0')
    assert (done.returncode, done.stdout) == (0, '1 of 1 networks are complete\n')
    assert (kept / 'run.json').stat().st_mtime_ns == before
    done = call('--only', 'psilu*_s0', '--minutes', 0)
    assert done.stdout == ('0 minutes are over; the same command resumes with psilu4-0.1_s0\n'
                           '1 of 2 networks are complete\n')
    listed = call('--only', 'psilu*_s0', '--list').stdout
    accuracy = math.floor(1000 * found.evaluation['attacks']['pgd-1']['accuracy']) / 10
    assert f'| psilu0.5-0.1 | 0 | {found.minutes:.1f} | ' in listed
    assert f'| {accuracy:.1f} |' in listed


def test_a_network_of_another_process_is_left_to_it(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened(tmp_path, STUDY)
    with exclusive_lock(tmp_path / 'runs' / 'relu_s0.study', 'study'):
        main([str(tmp_path / 'study.yaml'), '--data-dir', 'data', '--output', str(tmp_path / 'runs'), '--only',
              'relu_s0'])
    assert capsys.readouterr().out == ("relu_s0 is another process's, which is at work on it\n"
                                       '0 of 1 networks are complete\n')


def test_the_interval_over_seeds_is_that_of_students_t() -> None:
    pairs = np.random.default_rng(0).choice([-100.0, 0.0, 100.0], (3, 50))
    low, high, p = convergence.interval_of_seeds(pairs)
    seeds = pairs.mean(1).tolist()
    error = statistics.stdev(seeds) / math.sqrt(3)
    half = stats.t.ppf(0.975, 2) * error
    assert (low, high) == pytest.approx((statistics.mean(seeds) - half, statistics.mean(seeds) + half))
    assert p == pytest.approx(2 * stats.t.sf(abs(statistics.mean(seeds)) / error, 2))


def test_holms_correction_is_that_of_its_definition() -> None:
    assert convergence.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert convergence.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert convergence.holm([]) == []


def test_the_bootstrap_draws_seeds_and_images() -> None:
    """Of one seed it is the spread of images alone, of equal images that of seeds alone."""
    one = np.random.default_rng(1).choice([-100.0, 0.0, 100.0], (1, 1000))
    half = stats.norm.ppf(0.975) * one.std() / math.sqrt(1000)
    assert convergence.bootstrap(one) == pytest.approx((one.mean() - half, one.mean() + half), abs=0.1 * half)
    seeds = np.repeat([[0.0], [30.0]], 7, axis=1)  # both, or one of them twice: 0, 15, 30 at 1/4, 1/2, 1/4
    assert convergence.bootstrap(seeds) == pytest.approx((0.0, 30.0))
    assert convergence.bootstrap(np.full((3, 5), 2.0)) == pytest.approx((2.0, 2.0))


def test_the_table_at_convergence_is_arithmetic_on_the_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    rows = {line.split(' | ')[0].strip('| '): line.strip('| ').split(' | ')
            for line in convergence.convergence_table().splitlines() if line.startswith('| ')}
    base = {path.name[-1]: json.loads((path / 'evaluation.json').read_text())['attacks']['apgd']['verdicts']
            for path in Path('hub/results/convergence/gpu').glob('relu_s?') if (path / 'evaluation.json').is_file()}
    for name, network in (('silu', 'silu'), ('pssilu, no penalty', 'pssilu_free')):
        points = []
        for path in sorted(Path('hub/results/convergence/gpu').glob(f'{network}_s?/evaluation.json')):
            ours = json.loads(path.read_text())['attacks']['apgd']['verdicts']
            points.append((ours.count('1') - base[path.parent.name[-1]].count('1')) / len(ours) * 100)
        assert rows[name][7].split(' ')[0] == f'{statistics.mean(points):+.1f}'
