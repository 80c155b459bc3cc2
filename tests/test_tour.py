"""The notebook runs as a reader runs it; and the forms and the workflow of .github are what they say."""

from __future__ import annotations

import ast
import base64
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import matplotlib
import nbformat
import pytest
import yaml
from conftest import ROOT
from nbclient import NotebookClient

TOUR = ROOT / 'hub' / 'tour.ipynb'
MEASURED = re.compile(
    r'(\w+), (\d+) test images of (\w+): clean ([\d.]+)%, under PGD-20 at Linf (\d+/255) ([\d.]+)%')
LOADED, TRAINED = ('resnet18_w16_pssilu', 'cifar10', '8/255'), ('wrn10_1_pssilu', 'digits', '16/255')
PATH = re.compile(r'(?<![\w.])/(?:\w[\w.-]*/)+|[A-Za-z]:\\')
"""An absolute path; 8/255 is none."""


def execute(place: Path, monkeypatch: pytest.MonkeyPatch, cifar10: Path | None) -> Any:
    """Runs the notebook with ``place`` as working and home directory; it raises where a cell does."""
    monkeypatch.setenv('MPLCONFIGDIR', matplotlib.get_configdir())  # not in the new home: it has the list of fonts
    monkeypatch.setenv('HOME', str(place))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, (os.environ.get('PYTHONPATH'), str(ROOT)))))
    monkeypatch.delenv('CIFAR10_ROOT', raising=False)
    if cifar10 is not None:
        monkeypatch.setenv('CIFAR10_ROOT', str(cifar10.resolve()))
    notebook = nbformat.read(TOUR, as_version=4)
    NotebookClient(notebook, timeout=400, kernel_name='python3', coalesce_streams=True,
                   resources={'metadata': {'path': str(place)}}).execute()
    return notebook


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == 'code' for output in cell.outputs]


def printed(notebook: Any) -> str:
    return ''.join(output.text for output in outputs(notebook) if output.output_type == 'stream')


def pictures(notebook: Any) -> list[bytes]:
    return [base64.b64decode(output.data['image/png']) for output in outputs(notebook)
            if 'image/png' in output.get('data', {})]


def accuracies(notebook: Any) -> dict[tuple[str, str, str], tuple[float, float]]:
    """Returns clean and attacked accuracy in percent by (network, data set, eps)."""
    found = {(name, data, eps): (float(clean), float(attacked))
             for name, _, data, clean, eps, attacked in MEASURED.findall(printed(notebook))}
    for name, (clean, attacked) in found.items():
        assert 10 < attacked < clean <= 100, name
    return found


def check_training(notebook: Any) -> None:
    losses = [float(loss) for loss in re.findall(r'epoch \d: loss ([\d.]+)', printed(notebook))]
    assert len(losses) >= 2
    assert losses[-1] < losses[0]
    assert re.findall(r'act\.(\w+) = ', printed(notebook)) == ['alpha', 'beta']


def test_on_cifar10(cifar10_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = execute(tmp_path, monkeypatch, cifar10_root)
    check_training(notebook)
    found, kept = accuracies(notebook), accuracies(nbformat.read(TOUR, as_version=4))
    assert found.keys() == kept.keys() == {LOADED, TRAINED}
    assert found[LOADED] == pytest.approx(kept[LOADED], abs=3), 'execute hub/tour.ipynb anew'
    assert found[TRAINED] == pytest.approx(kept[TRAINED], abs=15)
    assert len(pictures(notebook)) == 3
    assert 'not found' not in printed(notebook)


@pytest.mark.slow
def test_without_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = execute(tmp_path, monkeypatch, None)
    check_training(notebook)
    assert accuracies(notebook).keys() == {TRAINED}
    assert len(pictures(notebook)) == 2
    assert 'CIFAR-10 was not found' in printed(notebook)


def test_committed_outputs() -> None:
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == 'python3'
    assert TOUR.stat().st_size < 400_000
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)], 'run all cells, in order'
    for output in outputs(notebook):
        assert output.output_type != 'error'
        assert output.get('name') != 'stderr', output.text
        text = output.get('text', '') + json.dumps(
            {kind: value for kind, value in output.get('data', {}).items() if not kind.startswith('image/')})
        assert PATH.search(text) is None, text
    for picture in pictures(notebook):
        assert picture.startswith(b'\x89PNG')
        assert str(ROOT).encode() not in picture
    for cell in code:
        ast.parse(cell.source)
        assert all(len(line) <= 88 for line in cell.source.splitlines()), 'a page of GitHub is 88 characters wide'


def test_what_counts_as_a_path() -> None:
    assert all(PATH.search(text) for text in ("'/srv/x.py'", 'see /home/me/data', 'in /tmp/a', '(/a/b)', r'C:\x'))
    assert not any(PATH.search(text) for text in ('8/255', 'images/s', 'Linf 16/255 79.0%', '1/2/3', 'a / b'))


def test_the_issue_form_asks_for_what_runs() -> None:
    form = yaml.safe_load((ROOT / '.github' / 'ISSUE_TEMPLATE' / 'bug.yml').read_text())
    assert {'name', 'description', 'body'} <= form.keys()
    fields = {field['id']: field for field in form['body']}
    assert [*fields] == ['command', 'seen', 'expected', 'versions']
    assert all(field['type'] == 'textarea' and field['attributes']['label'] for field in fields.values())
    command, = re.findall('`(python .*)`', fields['versions']['attributes']['description'])
    done = subprocess.run([sys.executable, '-W', 'ignore', *shlex.split(command)[1:]], cwd=ROOT, text=True,
                          capture_output=True, timeout=300, check=True)
    assert {'python', 'torch', 'timm'} <= ast.literal_eval(done.stdout)['versions'].keys()


def test_the_workflow_runs_the_two_commands() -> None:
    workflow = yaml.safe_load((ROOT / '.github' / 'workflows' / 'test.yml').read_text())
    assert workflow[True] == ['push', 'pull_request']  # in YAML 1.1 the word 'on' is true
    job = workflow['jobs']['test']
    assert job['runs-on'] == 'ubuntu-latest'
    assert [step['run'] for step in job['steps'] if 'run' in step] == ['make install', 'make test']
    assert 'secrets' not in (ROOT / '.github' / 'workflows' / 'test.yml').read_text()
    about = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    claimed = {text.rpartition(' ')[2] for text in about['classifiers'] if re.search(r':: 3\.\d+$', text)}
    assert {'3.11', '3.13'} == set(job['strategy']['matrix']['python']) <= claimed
    makefile = (ROOT / 'Makefile').read_text()
    assert re.search('^install:', makefile, re.MULTILINE)
    assert re.search('^test:', makefile, re.MULTILINE)
