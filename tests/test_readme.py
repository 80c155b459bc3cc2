"""The README's numbers are those of the files it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

from conftest import ROOT

MODELS = ROOT / 'hub' / 'models'


def test_measured_table_is_what_the_files_say() -> None:
    readme = (ROOT / 'README.md').read_text()
    rows = re.findall(r'^\| \[`(\w+)`\]\((hub/models/\w+)\) \|(.*)\|$', readme, re.MULTILINE)
    assert {Path(path).name for _, path, _ in rows} == {path.name for path in MODELS.iterdir()}
    for architecture, path, cells in rows:
        run, found = (json.loads((ROOT / path / name).read_text()) for name in ('run.json', 'evaluation.json'))
        assert architecture == run['architecture'] == found['architecture']
        accuracies = [f'{result["accuracy"]:.1%}' for result in found['attacks'].values()]
        expected = [f'{run["seconds"] / 60:.0f} min', *accuracies]
        assert [cell.strip() for cell in cells.split('|')] == expected
        assert f'{found["n"]:,} test images' in readme
        assert f'seed {run["recipe"]["seed"]}' in readme
        for result in found['attacks'].values():
            assert result['verdicts'].count('1') == result['correct']
