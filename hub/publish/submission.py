"""Makes what RobustBench wants of a model beside its weights: records, its zoo's entry, the form of an issue."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

from timm_paf.files import write_json
from timm_paf.training.option import flag_of

from ..chosen_images import in_words
from ..training_summary import training_summary
from . import forms
from .boards import CORRUPTIONS, board_eps, boards_in_words, corruptions_fault, images_of
from .networks import OWN_FILE, architecture_name, zoo_class

FIELDS = {
    'title': 'of the paper',
    'paper': 'its URL',
    'authors': 'separated by commas',
    'venue': "such as 'ICML 2026', or 'arXiv, Nov 2026'",
    'licence': 'of the weights: MIT, or the URL of another',
    'code': 'URL of the code',
    'gdrive_id': 'of robustbench/NAME.pt on Google Drive, from where RobustBench loads it',
    'additional_data': ('after training with generated images or from weights: yes if real ones beyond the data set '
                        'made them, else no'),
}
"""The facts that only the authors know. The last is asked for where ``run.json`` names generated images."""


def model_info(run: dict[str, Any], evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """Returns RobustBench's record of a model, in its schema, with the numbers of every board.

    Facts that only the model's authors know are null, and so are numbers of fewer images than the board has, of another
    threat model or of a faster evaluation than the standard one. ``unreliable`` is whether AutoAttack gave a warning,
    null where that is not known.
    """
    from robustbench.utils import ModelInfo

    dataset, threat, synthetic = run['data']['name'], run['recipe']['threat'], run['recipe'].get('synthetic')
    init = run['recipe'].get('init')
    notes = [f'Trained with {training_summary(run).generated:,} synthetic images.'] if synthetic else []
    notes += [f'Started from the weights {init["source"]}.'] if init else []
    percent: dict[str, str] = {}
    unreliable = None
    if evaluation is not None and evaluation['dataset'] == dataset and evaluation.get('standard', True):
        whole = images_of(dataset)
        same = all(evaluation['threat_model'][key] == threat[key] for key in ('norm', 'eps'))
        percent = {f'{name}_acc': _percent(result['accuracy']) for name, result in evaluation['attacks'].items()
                   if evaluation['images'] == f'first {whole}' and (same or name == 'clean')}
        if 'autoattack_acc' in percent and 'flags' in evaluation['attacks']['autoattack']:
            unreliable = bool(evaluation['attacks']['autoattack']['flags'])
        if corruptions_fault(evaluation) is None:
            percent['corruptions_acc'] = _percent(evaluation['corruptions']['accuracy'])
    info = ModelInfo(
        additional_data=None if synthetic or init else False, number_forward_passes=1, dataset=dataset,
        architecture=architecture_name(run['architecture']),
        eps=board_eps(dataset, threat['norm'], threat['eps']) or threat['eps'],
        **{key: percent.get(key) for key in ('clean_acc', 'autoattack_acc', 'corruptions_acc')},
        footnote=' '.join(notes) or None)
    # The records have this field and RobustBench's class has not.
    return {**dataclasses.asdict(info), 'unreliable': unreliable}


def _percent(share: float) -> str:
    return f'{100 * share:.2f}'


def claims(run: dict[str, Any], info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the record of each board that a model's record has the numbers for, by the board's threat model.

    Args:
        run: the content of run.json.
        info: the result of `model_info`.
    """
    threat, found = run['recipe']['threat'], {}
    if info['clean_acc'] is None:
        return {}
    if info['autoattack_acc'] is not None and board_eps(info['dataset'], threat['norm'], threat['eps']):
        found[threat['norm']] = {**info, 'reported': info['autoattack_acc'], 'corruptions_acc': None}
    if info['corruptions_acc'] is not None:
        trained = f'Trained for {threat["norm"]} robustness with eps {threat["eps"]}.'
        found[CORRUPTIONS] = {
            **info, 'reported': info['corruptions_acc'], 'autoattack_acc': None, 'unreliable': None,
            **({'eps': None} if threat['eps'] == '0' else
               {'footnote': ' '.join(filter(None, (info['footnote'], trained)))})}
    return found


def check(name: str, run: dict[str, Any], evaluation: dict[str, Any] | None, fields: dict[str, str]) -> None:
    """Checks that a submission is complete: every flag, the name, and an evaluation by RobustBench's rules.

    Args:
        name: name of the model.
        run: the content of run.json.
        evaluation: the content of evaluation.json, if there is one.
        fields: what the user gave, by the names of `FIELDS`.

    Raises:
        ValueError: with everything that is missing or wrong, in one line.
    """
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    problems = []
    synthetic = bool(run['recipe'].get('synthetic') or run['recipe'].get('init'))
    wanted = [key for key in FIELDS if key != 'additional_data' or synthetic]
    missing = [flag_of(key) for key in wanted if not fields.get(key, '').strip()]
    if missing:
        problems.append(f'it needs {", ".join(missing)}')
    for key, pattern, expected in (
            ('paper', r'https?://\S+', 'a URL'), ('code', r'https?://\S+', 'a URL'),
            ('licence', r'MIT|https?://\S+', 'MIT or a URL'),
            ('gdrive_id', r'[A-Za-z0-9_-]{25,100}', 'an id of Google Drive'),
            ('additional_data', r'yes|no', 'yes or no')):
        value = fields.get(key, '').strip()
        if value and not re.fullmatch(pattern, value):
            problems.append(f'{flag_of(key)} is {value!r}, expected {expected}')
    if fields.get('additional_data') and not synthetic:
        problems.append('--additional-data is given, but run.json names no generated images and no initial weights')
    if not re.fullmatch(r'[A-Za-z-]+\d{4}[A-Za-z][\w-]*', name, re.ASCII):
        problems.append(f'--name is {name!r}, expected author, year, first word of the title, as Dai2021Parameterizing')
    dataset, threat = run['data']['name'], run['recipe']['threat']
    has_board = board_eps(dataset, threat['norm'], threat['eps']) is not None
    claimed = claims(run, model_info(run, evaluation))
    if not has_board and not claimed:
        problems.append(f'the run is for {dataset} {threat["norm"]} {threat["eps"]}, expected one of '
                        f'{boards_in_words()}, or an evaluation on corruptions')
    for threat_model in claimed or ([threat['norm']] if has_board else []):
        if name in model_dicts[BenchmarkDataset(dataset)][ThreatModel(threat_model)]:
            problems.append(f"--name is {name}, which RobustBench's zoo has, expected another, such as {name}_PAF")
    whole = images_of(dataset)
    fix = f'run timm-paf evaluate --n {whole} --attacks clean,autoattack'
    if evaluation is None:
        problems.append(f'there is no evaluation.json, {fix}')
    elif not evaluation.get('standard', True):
        problems.append('evaluation.json is of a fast evaluation, run timm-paf evaluate without --fast')
    elif not claimed and has_board:
        found, attacks = evaluation['threat_model'], ', '.join(evaluation['attacks'])
        problems.append(f'evaluation.json has {attacks} of the {in_words(evaluation["images"])} of '
                        f'{evaluation["dataset"]}, {found["norm"]} {found["eps"]}, expected clean, autoattack of '
                        f'{whole:,} of {dataset}, {threat["norm"]} {threat["eps"]}, {fix}')
    if evaluation is not None and evaluation.get('corruptions') and not claimed:
        fault = corruptions_fault(evaluation) or f'no clean accuracy of {whole:,} images'
        problems.append(f'its corruptions have no board ({fault})')
    if zoo_class(run) is None:
        problems.append(f'{run["architecture"]} has no self-contained file, expected a wrn or a resnet of timm_paf')
    if problems:
        raise ValueError(f'no submission to RobustBench: {"; ".join(problems)}')


def write(
        folder: Path, name: str, run: dict[str, Any], evaluation: dict[str, Any] | None, fields: dict[str, str] | None,
) -> None:
    """Writes what RobustBench wants beside the weights: its record, and our architecture file where it has no class.

    With ``fields``, which `check` has found complete, the records of its boards stand under their paths in RobustBench,
    and with them the entry of its model zoo, ``zoo_entry.py``, and the text of its form, ``new_model.md``.
    """
    found, info = zoo_class(run), model_info(run, evaluation)
    is_own = found is not None and found.module == OWN_FILE
    if is_own:
        shutil.copy(Path(__file__).with_name(f'{OWN_FILE}.py'), folder)
    if fields is None:
        write_json(folder / 'model_info.json', info)
        return
    assert found is not None  # `check` has made sure of this and of the next condition
    assert evaluation is not None
    given = {key: ' '.join(value.split()) for key, value in fields.items()}
    info.update(link=given['paper'], name=given['title'], authors=given['authors'], venue=given['venue'])
    if 'additional_data' in given:
        info['additional_data'] = given['additional_data'] == 'yes'
    claimed = claims(run, info)
    for threat_model, record in claimed.items():
        file = folder / 'model_info' / info['dataset'] / threat_model / f'{name}.json'
        file.parent.mkdir(parents=True)
        write_json(file, {key: value for key, value in record.items() if value is not None})
    (folder / 'zoo_entry.py').write_text(forms.entry(name, info['dataset'], found, claimed, given['gdrive_id']))
    (folder / 'new_model.md').write_text(forms.form(name, claimed, evaluation, given, found))
