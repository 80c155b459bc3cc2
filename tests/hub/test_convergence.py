"""The statistics of the study at convergence, and its tables."""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy import stats

from hub.study import cases, convergence, pilots, records, tables
from timm_paf.files import write_record


def test_the_interval_over_seeds_is_that_of_students_t() -> None:
    pairs = np.random.default_rng(0).choice([-100.0, 0.0, 100.0], (3, 50))
    low, high, p = convergence.interval_of_seeds(pairs)
    seeds = pairs.mean(1).tolist()
    error = statistics.stdev(seeds) / math.sqrt(3)
    half = stats.t.ppf(0.975, 2) * error
    assert (low, high) == pytest.approx((statistics.mean(seeds) - half, statistics.mean(seeds) + half))
    assert p == pytest.approx(2 * stats.t.sf(abs(statistics.mean(seeds)) / error, 2))


def test_equal_differences_of_all_seeds_claim_nothing() -> None:
    for pairs in (np.zeros((3, 4)), np.array([[100.0, 0.0], [0.0, 100.0]])):
        low, high, p = convergence.interval_of_seeds(pairs)
        assert (math.isnan(low), math.isnan(high), p) == (True, True, 1.0)
    assert convergence.holm([1.0, 0.001, 0.01, 1.0]) == pytest.approx([1.0, 0.004, 0.03, 1.0])


def test_seeds_that_one_side_lacks_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(convergence, 'LATER', tmp_path)
    rows = convergence.rows_of_test()
    first = [record for record in rows['relu'] if record.case.seed == 0]
    ours = [record for record in rows['silu'] if record.case.seed == 0]
    assert convergence.differences(ours, first).shape == (1, 1000)
    moved = copy.copy(ours[0])
    moved.case = replace(moved.case, seed=7)
    assert (convergence.differences([moved, *ours], first) == convergence.differences(ours, first)).all()
    monkeypatch.setattr(convergence, 'rows_of_test', lambda: {'relu': first, 'silu': [moved]})
    line = next(line for line in convergence.convergence_table().splitlines() if line.startswith('| silu'))
    assert line.endswith('|  |  |  |  |')


def claimed(rows: dict[str, tuple[float, float, int]], later: dict[str, float] | None = None) -> str:
    """What is claimed of rows with a p, a mean difference in points and a number of seeds."""
    return convergence.claim({name: convergence.Comparison(np.full((seeds, 4), points), math.nan, math.nan, p)
                              for name, (p, points, seeds) in rows.items()}, later or {})


def test_a_claim_needs_pairs_of_seeds_and_an_interval_without_zero() -> None:
    assert claimed({'silu': (1.0, 100, 1)}) == 'No row has two seeds beside those of ReLU yet, so there is no claim.'
    assert 'is shown to differ' in claimed({'silu': (0.05, 0.5, 3), 'pssilu': (1.0, 100, 1)})
    assert claimed({'silu': (0.06, 0.5, 3), 'pssilu': (0.06, 100, 3)}) == (
        'Undecided, over a point from ReLU but not beyond what seeds do after the correction: pssilu.')


def test_a_claim_waits_for_the_second_thousand_to_agree() -> None:
    rows = {'silu': (0.01, 2, 3), 'pssilu_free': (0.02, -2, 3), 'pssilu': (0.04, 2, 3)}
    missing = 'Beyond what seeds do, and not attacked on the second thousand images, so there is no claim: '
    assert claimed(rows) == f'{missing}silu; pssilu, no penalty; pssilu.'
    assert claimed(rows, {'silu': 1.0, 'pssilu_free': 1.0}) == (
        'More robust than ReLU, beyond what seeds do and on the second thousand images: silu. Beyond what seeds do, '
        f'and otherwise on the second thousand images, so there is no claim: pssilu, no penalty. {missing}pssilu.')
    assert claimed(rows, {'pssilu_free': -1.0}) == (
        'Less robust than ReLU, beyond what seeds do and on the second thousand images: pssilu, no penalty. '
        f'{missing}silu; pssilu.')


def test_the_table_of_the_second_thousand_is_of_the_same_networks(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(convergence, 'LATER', tmp_path)
    assert convergence.later_table() == 'No network is attacked on them yet.'
    for name in ('gpu/relu_s1', 'gpu/silu_s1', 'gpu/silu_s2'):
        shutil.copytree(convergence.CONVERGENCE / name, tmp_path / name)
    lines = [line.strip('| ').split(' | ') for line in convergence.later_table().splitlines()]
    found = {line[0]: line[1:] for line in lines if line[0] in ('relu', 'silu')}
    of_relu, of_silu = (json.loads((tmp_path / f'gpu/{name}_s1/evaluation.json').read_text())['attacks']
                        for name in ('relu', 'silu'))
    assert found['silu'][0] == '1, 2'
    assert found['silu'][-1] == (  # seed 2 of ReLU is not there
        f'{(of_silu["apgd"]["correct"] - of_relu["apgd"]["correct"]) / 10:+.1f}')
    assert found['relu'][:2] == ['1', f'{of_relu["clean"]["correct"] / 10:.1f}']
    assert found['relu'][3] == f'{of_relu["apgd"]["correct"] / 10:.1f}'


def test_an_evaluation_of_others_is_none_of_the_second_thousand(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(convergence, 'LATER', tmp_path)
    for name in ('gpu/relu_s1', 'gpu/silu_s1'):
        shutil.copytree(convergence.CONVERGENCE / name, tmp_path / name)
    ours, file = tmp_path / 'gpu' / 'silu_s1' / 'evaluation.json', 'evaluation.json'
    for wrong, said in (
            (convergence.CONVERGENCE / 'gpu' / 'silu_s2' / file, r'is of other weights than those of gpu/silu_s1'),
            (None, r'has evaluations with other seed; expected the same of all')):
        record = json.loads((wrong or convergence.CONVERGENCE / 'gpu' / 'silu_s1' / file).read_text())
        record.pop('record_sha256', None)
        write_record(ours, record if wrong else {**record, 'seed': 1})
        with pytest.raises(ValueError, match=said):
            convergence.later_table()
    shutil.move(tmp_path / 'gpu' / 'silu_s1', tmp_path / 'gpu' / 'silu_s7')
    with pytest.raises(ValueError, match=r'silu_s7.evaluation\.json is of no network of part 1'):
        convergence.later_table()


@pytest.mark.parametrize(('key', 'value'), [
    ('threat_model', {'norm': 'Linf', 'eps': '4/255'}), ('precision', 'bfloat16 autocast'), ('data_sha256', '0' * 64),
    ('seed', 5), ('batch_size', 100), ('pgd_step', '1/2550'), ('weights_sha256', '1' * 64),
    ('architecture', 'resnet18')])
def test_networks_that_were_not_attacked_alike_are_not_compared(
        key: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / 'convergence'
    for name in ('relu_s1', 'silu_s1', 'relu_s2', 'silu_s2'):
        shutil.copytree(ROOT / convergence.CONVERGENCE / 'gpu' / name, there / 'gpu' / name)
    shutil.copy(ROOT / convergence.CONVERGENCE / cases.FILE, there)
    monkeypatch.setattr(convergence, 'CONVERGENCE', there)
    monkeypatch.setattr(convergence, 'LATER', tmp_path / 'none')
    assert 'silu' in convergence.convergence_table()
    for seed in (1, 2):
        path = there / 'gpu' / f'silu_s{seed}' / 'evaluation.json'
        record = {name: old for name, old in json.loads(path.read_text()).items() if not name.startswith('record_')}
        write_record(path, {**record, key: value})
    of_network = key in ('weights_sha256', 'architecture')
    said = r'evaluation\.json is of .*; expected those of ' if of_network else rf'were attacked with other {key}'
    with pytest.raises(ValueError, match=said):
        convergence.convergence_table()


def test_a_mean_is_not_below_the_least() -> None:
    record = SimpleNamespace(case=SimpleNamespace(seed=0), verdicts=lambda _: 100.0 * (torch.arange(10_000) < 4829))
    other = SimpleNamespace(case=SimpleNamespace(seed=1), verdicts=record.verdicts)
    assert tables.accuracy([record, other], 'apgd') == '48.2 (48.2 to 48.2)'


def test_the_pilot_compares_what_its_protocol_does_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    rows = {line.split(' | ')[0].strip('| '): line.strip('|').split(' | ')[-1].strip()
            for line in pilots.recipes_table().splitlines() if line.startswith('| ')}
    assert (rows['pgd'], rows['trades']) == ('', '')
    assert rows['ikl'].startswith('trades: ')
    assert rows['n_fgsm'].startswith('pgd: ')
    found = records.records_of(pilots.RECIPES)
    ikl = next(r for r in found if r.case.name == 'float32/ikl_s1')
    ikl.run['recipe']['mixed_precision'] = 'bf16'
    monkeypatch.setattr(pilots, 'records_of', lambda _: found)
    with pytest.raises(ValueError, match=r'ikl_s1 is of a CPU and a CPU in bf16 and float32/trades_s1 of a CPU and '):
        pilots.recipes_table()


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


def test_machine_time_is_that_of_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = records.records_of(convergence.CONVERGENCE)
    spent = dict.fromkeys(itertools.product(('run', 'evaluation'), ('a GPU', 'a CPU core')), 0.0)
    for path in (record for case in cases.open_study(convergence.CONVERGENCE / 'study.yaml')
                 for record in (convergence.CONVERGENCE / case.name).glob('evaluation.json')):
        for name in ('run', 'evaluation'):  # on one thread of a CPU where not on a GPU
            record = json.loads((path.parent / f'{name}.json').read_text())
            spent[name, 'a GPU' if 'gpu' in record['hardware'] else 'a CPU core'] += record['seconds'] / 3600
    assert min(spent.values()) > 0
    training, attacks = (' and '.join(f'{hours:.1f} hours of {kind}' for (what, kind), hours in spent.items()
                                      if what == name) for name in ('run', 'evaluation'))
    assert tables.machine_time(found) == (
        f'Machine time of {len(found)} networks, as elapsed: training {training}, attacks {attacks}.')
    two = copy.copy(found[0])
    two.run = {**two.run, 'seconds': 1800, 'processes': 2, 'hardware': {'threads': 3}}
    assert 'training 3.0 hours of a CPU core, ' in tables.machine_time([two])
    two.run['earlier'] = [{'seconds': 600, 'processes': 2, 'hardware': {'threads': 3, 'gpu': '2 x A'}}]
    two.evaluation = {**two.evaluation, 'seconds': 7200, 'processes': 2, 'hardware': {'threads': 3}, 'earlier': [
        {'seconds': 3600, 'hardware': {'threads': 1}}]}
    assert 'training 0.3 hours of a GPU and 2.0 hours of a CPU core, attacks 4.0 hours of a CPU core.' in (
        tables.machine_time([two]))


def test_a_second_look_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(convergence, 'LATER', tmp_path)
    rows, words = convergence.rows_of_test(), 'doubled for it, p is below 0.05 of '
    twice = [tables.named(name) for name, found in convergence.comparisons(rows).items() if found.p < 0.025]
    assert f'{words}{"; ".join(twice)}.\n' in convergence.convergence_table()
    monkeypatch.setattr(convergence, 'rows_of_test', lambda: {name: group[:3] for name, group in rows.items()})
    assert words not in convergence.convergence_table()


def test_learned_ones_are_compared_with_the_smooth_one_that_learns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    line = convergence.convergence_table().splitlines()[-1]
    rows = convergence.rows_of_test()
    points = {name: {r.case.seed: r.evaluation['attacks']['apgd']['correct'] / 10 for r in rows[name]}
              for name in ('silu', 'pssilu')}
    gains = [points['pssilu'][seed] - points['silu'][seed] for seed in points['silu']]
    found = stats.ttest_1samp(gains, 0)
    low, high = found.confidence_interval(0.95)
    said = f'pssilu {statistics.mean(gains):+.1f} ({min(gains):+.1f} to {max(gains):+.1f}), '
    assert f'{said}t {low:+.1f} to {high:+.1f}, p {found.pvalue:.2g}' in line
