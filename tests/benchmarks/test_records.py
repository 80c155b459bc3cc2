"""The records of the benchmarks: the programs read the right rows, and the page says what the files say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import hours
import pytest

RECORDS = Path(__file__).resolve().parent / 'results'
PAGE = ' '.join((RECORDS.parent / 'README.md').read_text(encoding='utf-8').split())


def read(name: str) -> dict[str, Any]:
    """A record that names no directory of a machine, and that the page names."""
    text = (RECORDS / name).read_text()
    assert not re.search(r'["\' =]/', text)
    assert f'[`{name}`](results/{name})' in PAGE
    found: dict[str, Any] = json.loads(text)
    assert {'versions', 'hardware', 'git_commit', 'command'} <= found.keys()
    return found


def rows_of(cases: dict[str, float]) -> list[dict[str, Any]]:
    """The rows of bench.py for two networks, each with the same speeds."""
    return [row for name in ('resnet18', 'wrn28_10') for row in (
        *({'what': f'training step PGD-10, {name}, batch 8', 'case': case, 'images_per_second': speed}
          for case, speed in cases.items()),
        {'what': f'training step PGD-10, {name}, batch 8', 'case': 'Trainer compiled, profiled', 'seconds': 1.0},
        {'what': f'CUDA graphs, training step PGD-10, {name}, batch 8, bf16', 'case': 'compiled',
         'images_per_second': 3.0})]


@pytest.mark.parametrize('cases', [
    {"paper's loop": 1.0, "paper's loop bf16": 2.0, 'Trainer': 4.0, 'Trainer compiled': 8.0},
    {"paper's loop": 1.0, "paper's loop bf16": 2.0, 'Trainer': 4.0, 'Trainer compiled': 5.0,
     'Trainer compiled bf16': 8.0}], ids=['before both were compared', 'both'])
@pytest.mark.parametrize('name', ['resnet18', 'wrn28_10'])
def test_hours_are_of_training_in_bfloat16(cases: dict[str, float], name: str) -> None:
    assert hours.speed_in_bf16(rows_of(cases), name) == 8.0


def test_hours_are_of_no_record_without_bfloat16() -> None:
    with pytest.raises(ValueError, match='no training of resnet18 in bf16 is in the record'):
        hours.speed_in_bf16(rows_of({"paper's loop": 1.0, 'Trainer compiled': 5.0}), 'resnet18')


def test_hours_are_of_the_speeds_that_the_pages_say() -> None:
    rows = json.loads(hours.RESULT.read_text())['rows']
    speeds = [f'{hours.speed_in_bf16(rows, name):,.0f}' for name in ('resnet18', 'wrn28_10')]
    page = (RECORDS.parents[2] / 'hub' / 'recipes' / 'README.md').read_text(encoding='utf-8')
    said = f'{speeds[0]} (ResNet-18) and {speeds[1]} images/s (WRN-28-10) of PGD-10 training that one H200 did in bf16'
    assert said in ' '.join(page.split())


def test_the_first_hour_was_rehearsed_with_a_training_that_was_stopped() -> None:
    starts = read('first_hour_rehearsal.json')['starts']
    assert all(start['exit'] == 0 for start in starts)
    assert [(start['part'], start['passed']) for start in starts] == [
        ('train', False), ('tests', True), ('bench', True), ('train', True), ('evaluate', True)]
    stopped, ended = (start['command'] for start in starts if start['part'] == 'train')
    assert stopped.replace('--max-minutes 0.001', '--max-minutes 15.0') == ended
    assert '--max-steps 4' in ended
    assert 'a rehearsal on a CPU whose first start was stopped after one of four tiny steps did so' in PAGE


def test_emulated_bfloat16_costs_what_the_page_says() -> None:
    result = read('cpu_avx2.json')
    assert result['cpu_time']
    assert result['hardware']['capability'] == 'AVX2'
    seconds = {row['case']: row['seconds'] for row in result['rows'] if 'seconds' in row}
    ours, theirs = (seconds[f'{case} bf16'] / seconds[case] for case in ('PSSiLU compiled', "RobustBench's PSSiLU"))
    assert (f'the compiled attack step of WRN-16-4 takes {ours:.0f} times the CPU seconds of float32, RobustBench\'s '
            f'network {theirs:.0f} times') in PAGE


def test_stopping_at_cycles_gains_what_the_page_says() -> None:
    rows = read('cycles_seconds.json')['rows']
    assert all(row['same_images'] == row['images'] == 200 for row in rows)
    assert [(row['network'], row['eps'], row['steps']) for row in rows] == [
        ('resnet18_w16_pssilu', *case) for case in (('8/255', 50), ('8/255', 100), ('2/255', 50))]
    gains = [f'{row["ratio"]:.2f} ({row["ratio_min"]:.2f} to {row["ratio_max"]:.2f}) times' for row in rows]
    fewer = [f'{row["passes"]:.2f}' for row in rows]
    assert (f'{gains[0]} as fast at `pgd-50` and {gains[1]} at `pgd-100` of 8/255, {gains[2]} at `pgd-50` of 2/255, '
            f'with {fewer[0]}, {fewer[1]} and {fewer[2]} times fewer passes') in PAGE
