"""The cases of bench.py that only a GPU measures, on a CPU; how the programs here start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Program


def test_the_program_that_needs_hub_starts_in_its_own_directory() -> None:
    done = subprocess.run([sys.executable, 'verify.py', '--help'], cwd=Path(__file__).parent, capture_output=True,
                          text=True, env={name: value for name, value in os.environ.items() if name != 'PYTHONPATH'})
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_comparison_with_cuda_graphs_runs_on_a_cpu_which_has_none(tmp_path: Path, program: Program) -> None:
    output = tmp_path / 'graphs.json'
    done = program('tests/benchmarks/bench.py', '--tiny', '--rounds', 1, '--only', 'cuda graphs', '--output', output)
    assert done.returncode == 0, done.stderr
    *timed, both = json.loads(output.read_text())['rows']
    assert [(row['what'].split(',')[1], row['case']) for row in timed] == [
        (what, case) for what in (' attack step', ' training step PGD-10') for case in ('compiled', 'CUDA graphs')]
    assert both['same_pixels_after_pgd'] == 1
    assert both['losses_differ_by'] == 0
    assert both['programs_without_graph'] > 0  # a CPU has none
