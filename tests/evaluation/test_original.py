"""The original AutoAttack and RobustBench's benchmark() on it give the verdicts that pyautoattack gives here.

    PYTHONPATH=.:auto-attack:robustbench CIFAR10_ROOT=data pytest -m original

with clones of github.com/fra31/auto-attack, which is not on PyPI, and github.com/RobustBench/robustbench.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from hub import evaluate
from timm_paf.attacks import parse_fraction
from timm_paf.data import derive_seed, load_dataset, to_float
from timm_paf.files import imported_version
from timm_paf.robustbench import load_bundle

NETWORK = ROOT / 'hub' / 'models' / 'wrn10_1_pssilu'
PYAUTOATTACK = """
import sys, timm_paf
sys.meta_path.insert(0, sys.meta_path.pop())  # pyautoattack, though the original is on the path
from hub import evaluate
evaluate.main(sys.argv[1:])
"""
pytestmark = [
    pytest.mark.original, pytest.mark.timeout(3600),
    pytest.mark.skipif('autoattack' not in imported_version('autoattack'),
                       reason='needs a clone of github.com/fra31/auto-attack on PYTHONPATH'),
    pytest.mark.skipif(importlib.util.find_spec('robustbench') is None, reason='needs RobustBench')]


@pytest.mark.parametrize(('norm', 'eps', 'version', 'n'), [
    ('Linf', '8/255', 'standard', 8), ('L2', '1/2', 'standard', 8), ('Linf', '8/255', 'rand', 4),
    ('L2', '1/2', 'plus', 3)])
def test_verdicts_are_those_of_the_original(
        norm: str, eps: str, version: str, n: int, cifar10_root: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    import autoattack

    attack = 'autoattack' + ('' if version == 'standard' else f'-{version}')
    args = [str(NETWORK), '--data-dir', str(cifar10_root), '--n', str(n), '--attacks', attack, '--norm', norm,
            '--eps', eps, '--no-compile', '--output']
    evaluate.main([*args, str(tmp_path / 'original')])
    subprocess.run([sys.executable, '-W', 'ignore', '-c', PYAUTOATTACK, *args, str(tmp_path / 'ours')], check=True,
                   cwd=ROOT, env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), *filter(None, sys.path)])})
    original, ours = (json.loads((tmp_path / name / 'evaluation.json').read_text()) for name in ('original', 'ours'))
    assert original['versions'].items() >= imported_version('autoattack').items()
    assert ours['versions'].keys() & {'autoattack', 'pyautoattack'} == {'pyautoattack'}
    assert original['versions'].keys() & {'autoattack', 'pyautoattack'} == {'autoattack'}

    data = load_dataset('cifar10', cifar10_root, train=False)
    images, labels, seed = to_float(data.images[:n]), data.labels[:n], derive_seed(0, 0) % 2**31
    model = load_bundle(NETWORK)
    if version == 'standard':
        monkeypatch.syspath_prepend(str(ROOT / 'tests' / 'benchmarks'))
        theirs = importlib.import_module('parity').benchmark_verdicts(
            model, images, labels, float(parse_fraction(eps)), seed, norm)
    else:
        found = autoattack.AutoAttack(model, norm, float(parse_fraction(eps)), seed, version=version, device='cpu',
                                      verbose=False).run_standard_evaluation(images, labels, bs=n)
        with torch.no_grad():
            theirs = ''.join(str(int(right)) for right in model(found).argmax(1) == labels)
    assert original['attacks'][attack]['verdicts'] == ours['attacks'][attack]['verdicts'] == theirs
