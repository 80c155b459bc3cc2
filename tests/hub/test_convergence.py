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

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

from hub.study import cases, convergence, records, tables


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


def test_seeds_that_one_side_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
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


def test_a_claim_needs_pairs_of_seeds_and_an_interval_without_zero() -> None:
    one, three = np.full((1, 4), 100.0), np.full((3, 4), 100.0)
    assert convergence.claim({'silu': 1.0}, {'silu': one}) == (
        'No row has two seeds beside those of ReLU yet, so there is no claim.')
    assert 'is shown to differ' in convergence.claim(
        {'silu': 0.05, 'pssilu': 1.0}, {'silu': three / 200, 'pssilu': one})
    said = convergence.claim({'silu': 0.01, 'pssilu_free': 0.02, 'pssilu': 0.04},
                             {'silu': three, 'pssilu_free': -three, 'pssilu': three})
    assert said == ('More robust than ReLU, beyond what seeds do: silu; pssilu. Less robust than ReLU, beyond what '
                    'seeds do: pssilu, no penalty. A claim waits for other images to agree.')
    assert convergence.claim({'silu': 0.06, 'pssilu': 0.06}, {'silu': three / 200, 'pssilu': three}) == (
        'Undecided, over a point from ReLU but not beyond what seeds do after the correction: pssilu.')


def test_the_table_of_the_second_thousand_is_of_the_same_networks(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(convergence, 'LATER', tmp_path)
    assert convergence.later_table() == 'No network is attacked on them yet.'
    for name in ('gpu/relu_s0', 'gpu/silu_s0', 'gpu/silu_s1'):
        shutil.copytree(convergence.CONVERGENCE / name, tmp_path / name)
    lines = [line.strip('| ').split(' | ') for line in convergence.later_table().splitlines()]
    found = {line[0]: line[1:] for line in lines if line[0] in ('relu', 'silu')}
    first = {name: json.loads((tmp_path / 'gpu' / name / 'evaluation.json').read_text())['attacks']['apgd']['correct']
             for name in ('relu_s0', 'silu_s0')}
    assert found['silu'][0] == '0, 1'
    assert found['silu'][-1] == f'{(first["silu_s0"] - first["relu_s0"]) / 10:+.1f}'  # seed 1 of ReLU is not there
    assert found['relu'][:2] + found['relu'][3:] == ['0', '68.3', f'{first["relu_s0"] / 10:.1f}']
    shutil.copyfile(tmp_path / 'gpu/silu_s0/evaluation.json', tmp_path / 'gpu/relu_s0/evaluation.json')
    with pytest.raises(ValueError, match=r'relu_s0.evaluation\.json is of other weights than those of gpu/relu_s0'):
        convergence.later_table()


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
