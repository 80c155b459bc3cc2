"""The texts of a submission to RobustBench: the entry of its model zoo, and the issue that asks for one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from .boards import CORRUPTIONS, TITLES
from .networks import ARCHITECTURES, OWN_FILE, ZooClass

URL = 'https://github.com/RobustBench/robustbench/tree/master/robustbench/model_zoo/architectures'
_TABLES = {CORRUPTIONS: 'common_corruptions'}
ENTRY = """\
# In a checkout of RobustBench: model_info/ as it lies here{architecture}, and in
# robustbench/model_zoo/{dataset}.py this import and, in each table that is named here, the entry.
from {package}.{module} import {names}
"""
TABLE = """
{table} = [
    ({name!r}, {{
        'model': lambda: {call},
        'gdrive_id': {gdrive_id!r},
    }}),
]
"""

# The headings, the words in bold and those of the boxes are RobustBench's form of 2022-09-28.
FORM = """\
<!-- Title of the issue: [New Model] {model} -->

# Paper Information

- **Paper Title**: {title}
- **Paper URL**: {paper}
- **Paper authors**: {authors}

# Leaderboard Claim(s)

{claims}
# Model Zoo:

- [x] I want to add my models to the Model Zoo
- {known} I use an architecture that is included among those [here]({architectures}) or in `timm`. If not, I added the \
link to the architecture implementation so that it can be added.{link}
- [x] I agree to release my model(s) under MIT license **OR** under a custom license, located here: {url}
"""
CLAIM = """\
## Model {number}

- **Architecture**: {architecture}
- **Threat Model**: {norm}
- **eps**: {eps}
- **Clean accuracy**: {clean_acc}
- **Robust accuracy**: {reported}
- **Additional data**: {data}
- **Evaluation method**: {method}
- **Checkpoint and code**: https://drive.google.com/file/d/{gdrive_id}, {code}
"""


def entry(name: str, dataset: str, found: ZooClass, threat_models: Iterable[str], gdrive_id: str) -> str:
    """Returns what a pull request adds to the file of a data set in RobustBench's model zoo.

    Args:
        name: name of the model.
        dataset: name of the data set.
        found: the class of the network.
        threat_models: the threat models of the boards.
        gdrive_id: of the weights.
    """
    architecture = f', {OWN_FILE}.py in robustbench/model_zoo/architectures/' if found.module == OWN_FILE else ''
    return ENTRY.format(dataset=dataset, package=ARCHITECTURES, architecture=architecture, **found._asdict()) + ''.join(
        TABLE.format(table=_TABLES.get(threat_model, threat_model.lower()), name=name, call=found.call,
                     gdrive_id=gdrive_id) for threat_model in threat_models)


def form(name: str, claimed: dict[str, dict[str, Any]], evaluation: dict[str, Any], given: dict[str, str],
         found: ZooClass) -> str:
    """Returns the text of the issue "New Model(s)".

    Args:
        name: name of the model.
        claimed: the record of each board, by its threat model.
        evaluation: the content of evaluation.json.
        given: what the user gave, by the names of `submission.FIELDS`.
        found: the class of the network.
    """
    is_own = found.module == OWN_FILE
    text = FORM.format(
        **given, model=name, architectures=URL, claims='\n'.join(
            _claim(number, threat_model, record, evaluation, given)
            for number, (threat_model, record) in enumerate(claimed.items(), 1)),
        known='[ ]' if is_own else '[x]', link=f' ({OWN_FILE}.py, attached; {given["code"]})' if is_own else '',
        url='' if given['licence'] == 'MIT' else given['licence'])
    return re.sub(' +$', '', text, flags=re.MULTILINE)


def _claim(number: int, threat_model: str, record: dict[str, Any], evaluation: dict[str, Any],
           given: dict[str, str]) -> str:
    data = str(record['additional_data']).lower() + (f' ({record["footnote"]})' if record['footnote'] else '')
    if threat_model == CORRUPTIONS:
        by, title = evaluation['corruptions'], f'{TITLES[record["dataset"]]}-C'
        words = {'norm': 'Common Corruptions', 'eps': 'N/A', 'method': (
            f'mean accuracy over the {len(by["by"])} corruptions and 5 severities of {title}, {by["n"]:,} '
            'images of each; the attached evaluation.json has each accuracy')}
    else:
        words = {'norm': threat_model, 'eps': record['eps'], 'method': (
            f'AutoAttack (standard version, {attack_package(evaluation)}) on all {evaluation["n"]:,} test images of '
            f'{record["dataset"]}, seed {evaluation["seed"]}; the attached evaluation.json has the verdict of every '
            'image')}
    return CLAIM.format(**{**record, **words}, number=number, data=data, code=given['code'],
                        gdrive_id=given['gdrive_id'])


def attack_package(evaluation: dict[str, Any]) -> str:
    """Returns the package that ran AutoAttack, with its version and commit as far as they are recorded."""
    versions = evaluation.get('versions', {})
    package = next((name for name in ('autoattack', 'pyautoattack') if name in versions), 'autoattack')
    version, _, commit = versions.get(package, 'unknown').partition('+')
    return f'{package} {"of unknown version" if version == "unknown" else version}{commit and f", commit {commit}"}'
