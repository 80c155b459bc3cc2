"""The README's numbers are those of the files it names."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

from conftest import ROOT

from timm_paf import list_pafs

RESULT = ROOT / 'tests' / 'benchmarks' / 'results' / 'cpu.json'


def test_speed_table_is_what_the_file_says() -> None:
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', 'tests/benchmarks/bench.py', '--table', str(RESULT)], cwd=ROOT,
        capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip().count('\n') > 5
    readme, result = (ROOT / 'README.md').read_text(), json.loads(RESULT.read_text())
    assert done.stdout.strip() in readme
    hardware, torch = result['hardware'], result['versions']['torch']
    assert f'{hardware["cpu"]}, {hardware["threads"]} threads, torch {torch}' in readme
    shares = [f'{row["share"]:.0%}' for row in result['rows'] if 'share' in row]
    assert f'{", ".join(shares[:-1])} and {shares[-1]} of a compiled attack step' in readme
    ratio = {row['case']: row['ratio'] for row in result['rows'] if 'forward and input gradient' in row['what']}
    assert f'a fused PSSiLU costs {1 / ratio["PSSiLU fused"]:.2f} times a ReLU' in readme
    assert f'own SiLU {1 / ratio["SiLU of torch"]:.2f} times' in readme
    kept = json.loads(RESULT.with_name('cpu_keep_memory.json').read_text())
    speeds = [f'{row["ratio"]:.2f}' for row in kept['rows'] if row['case'] == 'PSSiLU compiled']
    assert f'{", ".join(speeds[:-1])} and {speeds[-1]} times the peer' in readme
    one, two = (row['images_per_second'] for row in result['rows'] if 'processes' in row['what'])
    assert f'at {two:.0f} images/s where one does {one:.0f}' in readme
    saved = {row['case']: row['megabytes_per_image'] for row in result['rows'] if 'backward, wrn16_4' in row['what']}
    numbers = [saved[case] for case in ('PSSiLU', 'PSSiLU compiled', "RobustBench's PSSiLU")]
    assert '{:.1f} MB per image for the backward pass ({:.1f} compiled), the peer {:.1f};'.format(*numbers) in readme
    gigabytes = next(row['gigabytes_for_batch_512'] for row in result['rows'] if 'gigabytes_for_batch_512' in row)
    assert f'{gigabytes:.0f} GB at batch 512' in readme


def test_parity_is_what_the_file_says() -> None:
    readme, result = (ROOT / 'README.md').read_text(), json.loads(RESULT.with_name('parity.json').read_text())
    ours, theirs = (''.join(batch['verdicts'] for batch in result[side]) for side in ('ours', 'robustbench'))
    assert ours == theirs
    assert len(ours) == result['n'] == 1000
    ratios = [b['cpu_seconds'] / a['cpu_seconds'] for a, b in zip(result['ours'], result['robustbench'])]
    total = sum(b['cpu_seconds'] for b in result['robustbench']) / sum(a['cpu_seconds'] for a in result['ours'])
    assert f'{ours.count("1")} robust with both' in readme
    assert f'{total:.2f} times the CPU seconds ({min(ratios):.2f} to {max(ratios):.2f} by batch' in readme


def test_families_table_is_what_the_file_says() -> None:
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', 'tests/benchmarks/families.py', '--table',
         str(RESULT.with_name('families.json'))], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip().count('\n') > 5
    assert done.stdout.strip() in (ROOT / 'README.md').read_text()


def bound(value: float) -> str:
    """The smallest upper bound with one digit."""
    unit = 10.0 ** math.floor(math.log10(value))
    return f'{math.ceil(value / unit) * unit:.1g}'


def test_starting_as_relu_is_what_the_file_says() -> None:
    found = re.search(
        r"([^.]+) start as ReLU; ([^;]+) with alpha 100 start within ([\d.]+) standard deviations of ReLU's logits, "
        r'with alpha 10 within ([\d.]+); ([^;]+) is not close \(([\d.]+); \[`relu_start\.json`\]\(([\w./]+)\)',
        ' '.join((ROOT / 'README.md').read_text().split()))
    assert found, 'the sentence has other words: this test reads its numbers'
    same, near, at_100, at_10, far, distance, file = found.groups()
    result = json.loads((ROOT / file).read_text())
    assert result['logits_difference_in'] == "standard deviations of the ReLU network's logits"

    def names(text: str) -> set[str]:
        return {name.lower().replace('+', '_plus') for name in re.findall(r'[A-Z][\w+]+', text)}

    start = {row['activation']: row for row in result['rows'] if row['start']}
    assert sorted(start) == sorted(list_pafs()) == sorted([*names(same), *names(near), *names(far)])
    difference = {act: row['logits_difference']['max'] for act, row in start.items()}
    assert {act for act, value in difference.items() if value == 0} == names(same)
    assert {act for act, row in start.items() if row['values'].get('alpha') == 100} == names(near)
    assert at_100 == bound(max(difference[act] for act in names(near)))
    rows = [row for row in result['rows'] if row['values'].get('alpha') == 10]
    assert {row['activation'] for row in rows} == names(near)
    assert at_10 == bound(max(row['logits_difference']['max'] for row in rows))
    assert distance == f'{max(difference[act] for act in names(far)):.1f}'
