"""What a user has who installs the wheel: models, weights, recipes, and every program by one command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from networks import EXACT, images

import timm_paf
from timm_paf.training.config import shipped_recipes
from timm_paf.weights import load_bundle

Run = Callable[..., str]


def test_every_package_and_file_of_the_programs_goes_into_the_wheel() -> None:
    setup = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']
    found = {'.'.join(path.parent.relative_to(ROOT).parts) for name in ('timm_paf', 'hub')
             for path in (ROOT / name).rglob('__init__.py')}
    assert set(setup['packages']) == {name if name.startswith('timm_paf') else f'timm_paf.{name}' for name in found}
    patterns = setup['package-data']['timm_paf.hub']
    hub = ROOT / 'hub'
    needed = [hub / 'card_template.md', *(hub / 'recipes').glob('*.yaml'),
              *(hub / 'models' / 'wrn10_1_relu' / name for name in (
                  'config.json', 'run.json', 'evaluation.json', 'SHA256SUMS', 'README.md', 'model.safetensors'))]
    for file in needed:
        assert any(file.relative_to(hub).match(pattern) for pattern in patterns), file


@pytest.fixture(scope='module')
def installed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``python ARGS`` in an empty directory, with the package from its wheel; what was printed."""
    root = tmp_path_factory.mktemp('wheel')
    for name in ('timm_paf', 'hub'):  # building writes beside its source
        shutil.copytree(ROOT / name, root / 'source' / name, ignore=shutil.ignore_patterns('__pycache__', 'results'))
    for name in ('pyproject.toml', 'README.md', 'LICENSE', 'train_robust.py'):
        shutil.copy(ROOT / name, root / 'source')
    (root / 'work').mkdir()

    def run(*args: object, fails: bool = False, **env: str) -> str:
        usual = {key: value for key, value in os.environ.items() if key != 'CIFAR10_ROOT'}
        path = os.pathsep.join([str(root / 'site'), *other_timm])
        done = subprocess.run(
            [sys.executable, *map(str, args)], cwd=root / 'work', check=False, capture_output=True, text=True,
            timeout=600, env={**usual, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1', **env})
        assert (done.returncode != 0) == fails, done.stderr
        return done.stderr if fails else done.stdout

    other_timm = [path for path in os.environ.get('PYTHONPATH', '').split(os.pathsep) if path and Path(path) != ROOT]
    pip = ('-m', 'pip', '-q', '--disable-pip-version-check')
    run(*pip, 'wheel', root / 'source', '--no-deps', '--no-build-isolation', '-w', root)
    (wheel,) = root.glob('*.whl')
    assert wheel.stat().st_size < 12e6
    run(*pip, 'install', '--no-deps', '--target', root / 'site', wheel)
    shutil.rmtree(root / 'source')
    assert run('-c', 'import timm_paf; print(timm_paf.__file__)').strip() == str(
        root / 'site' / 'timm_paf' / '__init__.py')
    return run


@pytest.mark.slow
def test_the_bundles_are_there(installed: Run) -> None:
    lines = installed('-W', 'error::UserWarning:timm_paf', '-c', '''
import timm, timm_paf, torch
x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
for weights in timm_paf.list_weights():
    if weights.bundle:
        model = timm.create_model(weights.name, pretrained=True).eval()
        print(weights.name, len(weights.measured), model(x).flatten().tolist())
''').splitlines()
    expected = [weights for weights in timm_paf.list_weights() if weights.bundle]
    assert len(lines) == len(expected) >= 3
    for line, weights in zip(lines, expected):
        name, measured, values = line.split(' ', 2)
        assert (name, int(measured)) == (weights.name, len(weights.measured))
        ours = load_bundle(weights.bundle)(images())
        torch.testing.assert_close(torch.tensor(json.loads(values)), ours.flatten(), **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize('launch', [
    ('-m', 'timm_paf'), ('-m', 'accelerate.commands.launch', '--cpu', '-m', 'timm_paf'),
    ('-m', 'torch.distributed.run', '--nproc_per_node', '1', '-m', 'timm_paf')],
    ids=['python', 'accelerate', 'torchrun'])
def test_the_whole_way(installed: Run, launch: tuple[str, ...], tmp_path: Path) -> None:
    run, bundle = tmp_path / 'run', tmp_path / 'bundle'
    programs = ('-W', 'ignore', *launch)
    for option in ('train', 'evaluate'):
        assert option in installed('-W', 'ignore', '-m', 'timm_paf', '--help')
    missing = installed(*programs[:2], '-m', 'timm_paf', 'train', '--config', 'nothing', '--output', run, fails=True)
    assert all(name in missing for name in shipped_recipes())
    installed(*programs, 'train', '--config', 'cpu_wrn10_1_pssilu', '--dataset', 'digits', '--max-steps', 2,
              '--output', run, ACCELERATE_USE_CPU='true')
    installed(*programs, 'evaluate', run, '--images', 8, '--attacks', 'clean,pgd-2', ACCELERATE_USE_CPU='true')
    installed('-W', 'ignore', '-m', 'timm_paf', 'bundle', run, '--out', bundle, '--name', 'mine')
    code = f'import timm_paf; print(type(timm_paf.load_bundle({str(bundle)!r})).__name__)'
    assert installed('-c', code).strip() == 'WideResNet'
    record = json.loads((bundle / 'run.json').read_text())
    assert record['git_commit'] is None
    assert 'site' not in record['command']
