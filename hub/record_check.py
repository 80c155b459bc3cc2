"""Checks run.json and evaluation.json, which may be a stranger's: what becomes an argument, code or a card is listed.

Words that are free, such as the name of a processor, are one line of printable characters; `hub.wording` escapes them.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from timm_paf.attacks import parse_fraction
from timm_paf.data import DATASETS
from timm_paf.data.corrupted import CORRUPTIONS, MAKERS, SEVERITIES
from timm_paf.evaluation import worst_case
from timm_paf.evaluation.evidence import KINDS
from timm_paf.evaluation.names import keeps_to
from timm_paf.files import read_record
from timm_paf.norms import NORMS
from timm_paf.training.option import options_of
from timm_paf.training.recipe import RecipeOptions
from timm_paf.weights.bundle_config import check_act_kwargs, check_model_args
from timm_paf.wording import shown

__all__ = ['check_command', 'check_evaluation', 'check_licence', 'check_name', 'check_run']

Rule = tuple[Callable[[Any], bool], str]


def _matches(pattern: str, expected: str) -> Rule:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII) is not None, expected


def _whole(low: int, high: int = 10 ** 15) -> Rule:
    return (lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
            f'an integer from {low} to {high}')


def _one_of(*values: Any) -> Rule:
    return (lambda value: isinstance(value, str | None) and value in values), f'one of {", ".join(map(str, values))}'


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2 ** 63


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 300 and value.isprintable()


def _is_fraction(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.fullmatch(r'[\d./]+', value, re.ASCII) is not None \
            and math.isfinite(float(parse_fraction(value)))
    except (ValueError, OverflowError):
        return False


def _is_command(value: Any) -> bool:
    try:
        return isinstance(value, str) and len(value) <= 10_000 and re.fullmatch(
            r'[\w./-]*(python[\d.]*|timm-paf|\.py|accelerate|torchrun)', shlex.split(value)[0], re.ASCII) is not None
    except (ValueError, IndexError):
        return False


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_line, value))


def _is_evidence(value: Any) -> bool:
    return isinstance(value, dict) and all(
        norm in NORMS and isinstance(part, dict) and part.keys() <= {*KINDS, 'missing'}
        and isinstance(part.get('missing'), list)
        and all(isinstance(part.get(kind, 0), int) and 0 <= part.get(kind, 0) < 10 ** 9 for kind in KINDS)
        for norm, part in value.items())


_NAME = _matches(r'[A-Za-z0-9]\w{0,199}(\.\w{1,100})?', 'a name of timm.list_models, of letters, digits, _ and .')
_WORD = _matches(r'[A-Za-z0-9][\w-]{0,99}', 'a name of letters, digits, _ and -')
_SET = _matches(r'[A-Za-z0-9][\w-]{0,99}(/[\w.-][\w./-]{0,199})?', 'the name of a data set')
_LINE: Rule = _is_line, 'a text of one line'
_NUMBER: Rule = _is_number, 'a finite number'
_SHARE: Rule = (lambda value: _is_number(value) and 0 <= value <= 1), 'a share'
_FRACTION: Rule = _is_fraction, 'a number such as 8/255'
_FLAG: Rule = (lambda value: isinstance(value, bool)), 'true or false'
_PACKAGE = _matches(r'(\d|unknown)[\w.+!-]{0,100}', 'a version, or unknown, with a commit where there is one')
_VERSION = _matches(r'\d[\w.+!-]{0,60}', 'a version')
_DIGEST = _matches('[0-9a-f]{64}', 'a sha256')


_SIZE: Rule = (lambda value: isinstance(value, list) and len(value) == 3 and all(
    isinstance(each, int) and 1 <= each <= 4096 for each in value) and value[0] < 5), (
    '[channels, height, width] with at most 4 channels')


def _option(name: str) -> Rule:
    """Returns the rule of an option of the training, from the one place that declares it."""
    kind, option = options_of(RecipeOptions)[name]
    whole = int in (kind, *get_args(kind))
    words = ', '.join(option.names()) if option.choices else f'{"an integer" if whole else "a number"} {option.range()}'

    def holds(value: Any) -> bool:
        of_kind = isinstance(value, str) if option.choices else _is_number(value) and (
            isinstance(value, int) or not whole)
        return of_kind and option.fault(name, value) is None

    return holds, words


# The entries that one of our programs uses. Where a part of a name ends in ?, it may lack, with what follows.
_RUN: dict[str, Rule] = {
    'status': _WORD, 'architecture': _NAME, 'num_classes': _whole(1, 100_000), 'recipe.dataset': _SET,
    'recipe.image_size?': _whole(1, 4096),  # of which memory is made
    'data.image_size?': _SIZE,
    **{f'recipe.{name}{optional}': _option(name) for name, optional in (
        ('act', '?'), ('act_share', '?'), ('act_start', '?'), ('epochs', ''), ('batch_size', ''), ('seed', ''),
        ('max_steps', '?'), ('patience', '?'), ('eps_warmup_epochs', '?'), ('paf_lr', '?'))},
    'recipe.threat.norm': _one_of(*NORMS), 'recipe.threat.eps': _FRACTION,
    'recipe.threat.step?': _FRACTION, 'recipe.synthetic?.name': _LINE, 'recipe.drop_last?': _FLAG,
    'recipe.init?.source': _LINE, 'recipe.init?.kind': _one_of('name', 'file', 'bundle', 'run'),
    'recipe.init?.sha256': _DIGEST, 'recipe.synthetic?.n': _whole(1), 'recipe.synthetic?.fraction': _SHARE,
    'data.name': _SET, 'data.n?': _whole(1), 'data.label_names?': (_is_list, 'texts of one line'),
    'device?': _WORD, 'steps?': _whole(0), 'resumed_from?.step': _whole(0),
    'weights?.of': _one_of('model', 'ema', 'swa'), 'weights?.epoch': _whole(0), 'weights?.chosen_by': _LINE}
_HARDWARE: dict[str, Rule] = {
    'seconds': _NUMBER, 'hardware.cpu': _LINE, 'hardware.gpu?': _LINE, 'hardware.threads': _whole(1, 10 ** 6)}
_SESSION: dict[str, Rule] = {
    'processes': _whole(1, 10 ** 6), 'device?': _WORD, 'versions.torch': _VERSION, 'versions.timm-paf?': _VERSION,
    **_HARDWARE}
# A card tells these too.
_CARD: dict[str, Rule] = {
    'data.n': _whole(1), 'command': (_is_command, 'a command that starts Python or timm-paf'), **_SESSION}
_EVALUATION: dict[str, Rule] = {
    'architecture': _NAME, 'weights_sha256': _DIGEST, 'dataset': _SET, 'threat_model.norm': _one_of(*NORMS),
    'threat_model.eps': _FRACTION, 'n': _whole(1),
    'images': _matches(r'first \d{1,15}|\d{1,15} evenly spaced|[1-9]\d{0,14}:\d{1,15}',
                       'first N, N evenly spaced, or FIRST:END such as 1000:2000'),
    'preprocessing?': _LINE, 'seed': _option('seed'), 'data_sha256?': _DIGEST, 'standard?': _FLAG, 'complete?': _FLAG,
    'evidence?.sha256': _DIGEST, 'evidence?.norms': (_is_evidence, 'numbers of images by norm'),
    **{f'versions?.{name}?': _PACKAGE for name in ('autoattack', 'pyautoattack')}}
_ATTACK: dict[str, Rule] = {
    'n': _whole(1), 'correct': _whole(0), 'accuracy': _SHARE,
    'standard?': _FLAG, 'flags?': (_is_list, 'a list of texts of one line'),
    'not_run?': (lambda value: isinstance(value, dict) and _is_list([*value, *value.values()]), 'texts of one line'),
    'verdicts?': _matches('[01]*', 'a text of 0 and 1')}


_CORRUPTIONS: dict[str, Rule] = {
    'accuracy': _SHARE, 'n': _whole(1), 'generated': _FLAG, 'data_sha256': _DIGEST, 'seconds': _NUMBER,
    'by': (lambda value: isinstance(value, dict) and value.keys() == {*CORRUPTIONS}, 'accuracies by corruption'),
    **{f'by.{name}': (lambda value: isinstance(value, list) and len(value) == len(SEVERITIES) and all(
        map(_SHARE[0], value)), 'five shares') for name in CORRUPTIONS},
    **{f'versions?.{name}?': _VERSION for name in MAKERS}}


def _check(record: Any, rules: dict[str, Rule], where: str) -> None:
    for key, (rule, expected) in rules.items():
        value = record
        for part in key.split('.'):
            value = value.get(part.removesuffix('?')) if isinstance(value, dict) else math.nan
            if value is None and part.endswith('?'):
                break
        else:
            if not rule(value):
                raise ValueError(f'{where}: {key.replace("?", "")} is {shown(repr(value))}; expected {expected}')


def check_run(run: dict[str, Any], file: Path, for_card: bool = False) -> dict[str, Any]:
    """Returns the content of a run.json whose entries are what train_robust.py writes.

    Args:
        run: the content.
        file: the file, for the message.
        for_card: whether to ask for the entries that a model card tells, too.

    Raises:
        ValueError: for the first entry that is not.
    """
    _check(run, _RUN, str(file))
    check_act_kwargs(run['recipe'].get('act_kwargs'), f'{file}: recipe.act_kwargs')
    check_model_args(run['recipe'].get('model_kwargs') or {}, f'{file}: recipe.model_kwargs')
    if for_card:
        _check(run, _CARD, str(file))
    _check_earlier(run, {'last_step': _whole(0), **_SESSION}, str(file))
    return run


def read_evaluation(path: Path) -> dict[str, Any]:
    """Reads an evaluation.json as `check_evaluation` wants it.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, or not of evaluate.
    """
    return check_evaluation(read_record(path), path)


def check_evaluation(evaluation: dict[str, Any], file: Path) -> dict[str, Any]:
    """Returns the content of an evaluation.json whose entries are what hub.evaluate writes.

    Raises:
        ValueError: for the first entry that is not.
    """
    _check(evaluation, _EVALUATION, str(file))
    _check_earlier(evaluation, _HARDWARE, str(file))
    numbers = [int(digits) for digits in re.findall(r'\d+', evaluation['images'])]
    if numbers[-1] - sum(numbers[:-1]) != evaluation['n']:
        raise ValueError(f'{file}: images is {evaluation["images"]!r} and n is {evaluation["n"]}; expected as many')
    if len(numbers) > 1 and ('corruptions' in evaluation or evaluation['dataset'] not in DATASETS):
        raise ValueError(f'{file}: images is {evaluation["images"]!r}; expected a range only of {", ".join(DATASETS)}, '
                         'and without corruptions')
    norms = evaluation.get('norms', {})
    if not isinstance(norms, dict) or not all(
            norm in NORMS and norm != evaluation['threat_model']['norm'] and isinstance(part, dict)
            and isinstance(part.get('threat_model'), dict)
            and part['threat_model'].get('norm') == norm and _is_fraction(part['threat_model'].get('eps'))
            for norm, part in norms.items()):
        raise ValueError(f'{file}: norms is {shown(repr(norms))}; expected findings by norm, each with its eps, of '
                         f'other norms than {evaluation["threat_model"]["norm"]}')
    worst: dict[str, Any] = {}
    for norm, part in ((evaluation['threat_model']['norm'], evaluation), *norms.items()):
        where, attacks = f'{file}{f": {norm}" if norms else ""}', part.get('attacks')
        if not isinstance(attacks, dict) or not attacks:
            raise ValueError(f'{where}: attacks is {shown(repr(attacks))}; expected results by attack')
        for name, result in attacks.items():
            named, at, eps = name.partition('@')
            if not re.fullmatch(r'[a-z][a-z0-9.x-]{0,60}', named, re.ASCII) or (at and not _is_fraction(eps)):
                raise ValueError(f'{where}: attacks has {shown(repr(name))}; expected a name such as pgd-50')
            _check_counts(result, evaluation['n'], f'{where}: {name}')
        if 'worst_case' in part:
            inside = {name for name in attacks if keeps_to(name, parse_fraction(part['threat_model']['eps']))}
            worst[norm] = _check_worst_case(part['worst_case'], 'attacks', attacks, inside, f'{where}: worst_case')
    if 'union' in evaluation:
        _check_worst_case(evaluation['union'], 'norms', worst, {evaluation['threat_model']['norm'], *norms},
                          f'{file}: union')
    if 'corruptions' in evaluation:
        section = evaluation['corruptions']
        _check(section, _CORRUPTIONS, f'{file}: corruptions')
        if section['generated']:
            _check(section, {'seed': _option('seed')}, f'{file}: corruptions')
        mean = sum(map(sum, section['by'].values())) / (len(CORRUPTIONS) * len(SEVERITIES))
        if abs(section['accuracy'] - mean) > 1e-9:
            raise ValueError(f'{file}: corruptions.accuracy is {section["accuracy"]}; expected {mean}, the mean of by')
    return evaluation


def _check_earlier(record: dict[str, Any], rules: dict[str, Rule], where: str) -> None:
    """Checks the entries on what was done on other hardware than the last."""
    earlier = record.get('earlier', [])
    if not isinstance(earlier, list):
        raise ValueError(f'{where}: earlier is {shown(repr(earlier))}; expected a list')
    for place, each in enumerate(earlier):
        _check(each, rules, f'{where}: earlier {place}')


def _check_counts(result: Any, n: int, where: str) -> None:
    """Checks that the numbers of a result are those of its verdicts."""
    _check(result, _ATTACK, where)
    verdicts = result.get('verdicts')
    if result['n'] != n or (verdicts is not None and (len(verdicts), verdicts.count('1')) != (n, result['correct'])) \
            or abs(result['accuracy'] - result['correct'] / n) > 1e-9:
        raise ValueError(f'{where} has accuracy {result["accuracy"]}, {result["correct"]} of {result["n"]} and '
                         f'{0 if verdicts is None else len(verdicts)} verdicts with '
                         f'{0 if verdicts is None else verdicts.count("1")} right; expected the same from each, of {n} '
                         'images: the record was changed')


def _check_worst_case(worst: Any, of: str, results: dict[str, Any], needed: set[str], where: str) -> Any:
    """Returns a worst case that is what its results have in common, the ``needed`` ones among them."""
    names: Any = worst.get(of) if isinstance(worst, dict) else None
    if not _is_list(names) or not names or not needed <= set(names) <= results.keys():
        raise ValueError(f'{where} is of {shown(repr(names))}; expected all of {", ".join(sorted(needed))}')
    if any(results[name].get('verdicts') is None for name in names):
        raise ValueError(f'{where} is of results without verdicts; expected those of each image')
    _check_counts(worst, results[names[0]]['n'], where)
    if worst.get('verdicts') != worst_case({name: results[name] for name in names})['verdicts']:
        raise ValueError(f'{where} is not the worst of {", ".join(names)}; the record was changed')
    return worst


def check_name(name: str) -> str:
    """Returns a model's name of letters, digits, _ and -.

    Raises:
        ValueError: for another one.
    """
    if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9_-]*', name):
        raise ValueError(f'the name is {shown(repr(name))}; expected letters, digits, _ and -: give --name')
    return name


def check_licence(licence: str | None) -> str | None:
    """Returns a licence that is an id, such as apache-2.0, or an address.

    Raises:
        ValueError: for another text.
    """
    if licence is not None and not (isinstance(licence, str) and re.fullmatch(
            r'[A-Za-z0-9][\w.+-]{0,99}|https?://[\w.~:/?#@$&+,;=%-]{1,500}', licence, re.ASCII)):
        raise ValueError(f'the licence is {shown(repr(str(licence)[:100]))}; expected an id such as apache-2.0, or an '
                         'address: give --licence')
    return licence


def check_command(command: str) -> str:
    """Returns a command with every word quoted that a shell would read as more than a word.

    In place of a word of several lines, such as a script after ``-c``, it has '...'.
    """
    return shlex.join(word if word.isprintable() else '...' for word in shlex.split(command))
