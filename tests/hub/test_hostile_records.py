"""A stranger's run.json and evaluation.json become no code, no markup and no path."""

from __future__ import annotations

import ast
import copy
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
from conftest import ROOT
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from hub import bundle, card, leaderboard
from hub.publish import networks, submission
from hub.record_check import check_command, check_evaluation, check_licence, check_name, check_run
from hub.sources import read_run
from hub.wording import escape_markdown
from timm_paf.data.corrupted import CORRUPTIONS
from timm_paf.files import read_record
from timm_paf.weights.bundle_files import write_checksums

PSSILU = ROOT / 'hub' / 'models' / 'wrn10_1_pssilu'
RUN, EVALUATION = (read_record(PSSILU / f'{name}.json') for name in ('run', 'evaluation'))
MODEL = timm.create_model('wrn10_1_pssilu')
HOSTILE = [
    "x'); import os; os.system('touch pwned') #", 'x"); exit() #', "'", '"', '\\', '{repo}', '{{x}}',
    '{0.__class__}', '%s', 'a\nb', 'a\r\n---\nlicense: mit', '---', '```\n# x\n```', '```', '`id`', '$(id)', '; id',
    '| id', '&& id', '> /tmp/x', '../../x', '/etc/passwd', 'hf-hub:org/model', 'local-dir:/tmp', 'x\0', '\u202ecod.exe',
    '\u200b', '\x1b[31m', '\u0967', '<script>alert(1)</script>', '![x](http://x.example/p.png)', '[x](javascript:x)',
    'http://x.example', 'www.x.example', '| a | b |', '# x', '</details>', '!!python/object/apply:os.system [id]', '*a',
    '&a', ' ', '', 'x' * 100_000]
OTHER = [None, True, -1, 0, 10 ** 30, float('nan'), float('inf'), 1e300, [], {}, [[]], {'a': 1}]
FREE = st.text(st.characters(exclude_categories=['Cs']), max_size=40) | st.text(
    st.sampled_from('\'"`\n\\{}<>|#*_[]()!&$;:@/.- \u202eax1'), max_size=40)


def entries(record: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    for key, value in record.items() if isinstance(record, dict) else ():
        found += entries(value, (*path, key))
    return found


def changed(record: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    record = copy.deepcopy(record)
    inner: Any = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return record


def with_more(run: dict[str, Any]) -> dict[str, Any]:
    """The record with all that a card can tell."""
    run = copy.deepcopy(run)
    run['recipe'] |= {'synthetic': {'name': 'ddpm', 'n': 10, 'fraction': 0.5}, 'act_kwargs': {'alpha': 2.0},
                      'init': {'source': 'wrn10_1_relu', 'kind': 'name', 'sha256': 'a' * 64, 'new_head': ['fc']},
                      'act_start': 'relu', 'model_kwargs': {'drop_rate': 0.1}}
    run['hardware']['gpu'] = '2 x NVIDIA H100'
    run['weights'] = {'of': 'model', 'epoch': 1, 'chosen_by': 'being the last'}
    return run


def flagged(evaluation: dict[str, Any]) -> dict[str, Any]:
    evaluation = copy.deepcopy(evaluation)
    evaluation['attacks']['autoattack'] |= {'flags': ['masked'], 'not_run': {'apgd-t': 'two classes'}}
    evaluation['corruptions'] = {
        'accuracy': 0.5, 'n': 4, 'data_sha256': 'a' * 64, 'generated': True, 'seed': 0, 'versions': {'numpy': '2.4.6'},
        'by': {name: [1, 0.75, 0.5, 0.25, 0] for name in CORRUPTIONS}, 'seconds': 1.5}
    return evaluation


RECORDS = with_more(RUN), flagged(EVALUATION)
WHERE = [(0, path) for path in entries(RECORDS[0])] + [(1, path) for path in entries(RECORDS[1])]


def written(run: dict[str, Any], evaluation: dict[str, Any]) -> str | None:
    """The card of records, None where they are refused in one line."""
    try:
        check_run(run, Path('run.json'), for_card=True)
        check_evaluation(evaluation, Path('evaluation.json'))
        refused = ''
    except ValueError as error:
        refused = str(error)
    assert refused.isprintable()
    assert len(refused) < 700
    if refused:
        return None
    found = networks.zoo_class(run)
    if found is not None:
        tree = ast.parse(found.call, mode='eval')
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert names <= {'PAF_WideResNet', 'PSSiLU', 'PAF', 'PAFWideResNet', 'PAFResNet', 'ResNet', 'BasicBlock',
                         'Bottleneck', 'nn'}
    submission.model_info(run, evaluation)
    return card.card('name', run, evaluation, MODEL, networks.describe(found))


def blocks(text: str, language: str) -> list[str]:
    """What stands between fences, without the last line break."""
    return [found[:-1] for found in re.findall(rf'^```{language}\n(.*?)^```', text, re.DOTALL | re.MULTILINE)]


def shape(text: str) -> tuple[Any, ...]:
    """The structure of a card: headings, fences, pictures, HTML, and how often there are addresses."""
    prose_only = re.sub(r'^```.*?^```', '', text, flags=re.DOTALL | re.MULTILINE)
    unescaped = re.sub(r'\\.', '', prose_only)
    return (re.findall(r'^#+ .*', text, re.MULTILINE)[1:], re.findall(r'^\s*```\w*$', text, re.MULTILINE),
            re.findall(r'!\[', unescaped), re.findall(r'<(?!=)', unescaped), re.findall(r'\w://|www\.', unescaped),
            re.findall(r'^---$', text, re.MULTILINE))


EXPECTED = shape(written(*RECORDS) or '')


def assert_harmless(text: str) -> None:
    assert shape(text) == EXPECTED
    assert all(c.isprintable() or c == '\n' for c in text)
    assert ModelCard(text).data.license is None
    for block in blocks(text, 'python'):
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)}
        assert calls <= {'timm.create_model', 'register', 'load_model', 'model.load_state_dict', 'load_file', 'eval',
                         'hf_hub_download', *(call for call in calls if call.endswith(').eval'))}
    (command,) = blocks(text, 'bash')
    assert '\n' not in command
    words = list(shlex.shlex(command, posix=False, punctuation_chars=True))
    assert not {'|', '||', '&', '&&', ';', '>', '<', '(', ')', '`'} & set(words)
    assert '`' not in re.sub(r"'[^']*'", '', command)
    json.loads(blocks(text, 'json')[0])


@pytest.mark.parametrize('value', [*HOSTILE, *OTHER], ids=lambda value: repr(value)[:30])
def test_every_entry_of_a_record_with_hostile_words(value: Any) -> None:
    taken = 0
    for record, path in WHERE:
        records = [copy.deepcopy(each) for each in RECORDS]
        records[record] = changed(records[record], path, value)
        if (text := written(*records)) is not None:
            taken += 1
            assert_harmless(text)
    assert taken < len(WHERE)


@given(place=st.sampled_from([*WHERE, (0, ('command',)), (0, ('hardware', 'gpu')), (0, ('weights', 'chosen_by'))]),
       value=FREE, command=st.booleans())
def test_every_entry_with_any_text(place: tuple[int, tuple[Any, ...]], value: str, command: bool) -> None:
    records = [copy.deepcopy(each) for each in RECORDS]
    records[place[0]] = changed(records[place[0]], place[1], f'python {value}' if command else value)
    if (text := written(*records)) is not None:
        assert_harmless(text)


@given(words=st.lists(FREE, min_size=1, max_size=4))
def test_a_command_stays_its_words(words: list[str]) -> None:
    command = shlex.join(['python', *words])
    assert shlex.split(check_command(command)) == ['python', *(w if w.isprintable() else '...' for w in words)]


@given(text=FREE)
def test_prose_escapes_and_loses_nothing(text: str) -> None:
    assert re.sub(r'\\(.)', r'\1', escape_markdown(text), flags=re.DOTALL) == text
    assert not re.search(r'(?<!\\)[`*_<>\[\]|]', re.sub(r'\\\\', '', escape_markdown(text)))


@pytest.mark.parametrize('text', [*HOSTILE[:-1], 'ä', 'x y'])
def test_names_and_licences(text: str) -> None:
    for check in (check_name, check_licence):
        if text == 'http://x.example' and check is check_licence:
            assert check(text) == text
            continue
        if check is check_licence and text == 'www.x.example':
            continue  # a word to the Hub
        with pytest.raises(ValueError, match=r'^[^\n]*$'):
            check(text)


def test_programs_refuse_a_strangers_record_in_one_line(tmp_path: Path) -> None:
    run = Path(shutil.copytree(PSSILU, tmp_path / 'run'))
    (run / 'config.json').unlink()
    (run / 'run.json').write_text(json.dumps({**RUN, 'architecture': 'hf-hub:org/model'}))
    with pytest.raises(ValueError, match=r"run\.json: architecture is 'hf-hub:org/model'; expected a name"):
        read_run(run)
    (run / 'run.json').write_text(json.dumps({**RUN, 'architecture': 'no_such_model'}))
    with pytest.raises(SystemExit, match=r'^hub\.bundle: [^\n]*architecture is no_such_model; expected a model[^\n]*$'):
        bundle.main([str(run), '--out', str(tmp_path / 'b')])
    (run / 'run.json').write_text(json.dumps(RUN))
    (run / 'evaluation.json').write_text(json.dumps({**EVALUATION, 'dataset': 'cifar10|x\n# x'}))
    for program, args in ((bundle, ['--out', str(tmp_path / 'b')]), (leaderboard, [])):
        with pytest.raises(SystemExit, match=r'^hub\.\w+: [^\n]*evaluation\.json: dataset is [^\n]*$'):
            program.main([str(run), *args])
    assert not (tmp_path / 'b').exists()


@pytest.mark.parametrize('front', ['license: [', 'license: &a [*a]', 'license: "x\\n# y"', 'license: ' + '[' * 5000])
def test_the_metadata_of_a_strangers_card(front: str, tmp_path: Path) -> None:
    out = Path(shutil.copytree(PSSILU, tmp_path / 'bundle'))
    (out / 'README.md').write_text(f'---\n{front}\n---\n# x\n')
    write_checksums(out)
    with pytest.raises(SystemExit, match=r'^hub\.card: [^\n]*give --licence$'):
        card.main([str(out)])
    card.main([str(out), '--licence', 'mit'])


def test_the_rules_of_a_recipe_are_those_of_its_options() -> None:
    record = changed(RUN, ('recipe',), {**RUN['recipe'], 'seed': 2 ** 63 - 1, 'epochs': 10 ** 17})
    assert check_run(record, PSSILU) == record
    for name, value in (
            ('seed', 2 ** 63), ('seed', -1), ('seed', 1.5), ('epochs', 0), ('act', 'tanh'), ('paf_lr', '1')):
        with pytest.raises(ValueError, match=f'recipe.{name} is '):
            check_run(changed(record, ('recipe', name), value), PSSILU)


def test_the_network_of_a_record_has_listed_arguments_alone() -> None:
    for name, value in (('pretrained', True), ('drop_rate', 1), ('normalize', [[0.5], [0]]), ('normalize', 'print')):
        with pytest.raises(ValueError, match=f'recipe.model_kwargs.*{name}'):
            check_run(changed(RUN, ('recipe', 'model_kwargs'), {name: value}), PSSILU)
    normalised = changed(RUN, ('recipe', 'model_kwargs'), {'normalize': [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]})
    assert check_run(normalised, PSSILU) == normalised
    assert networks.zoo_class(RUN) is not None
    assert networks.zoo_class(normalised) is None  # RobustBench's class does not normalise


@pytest.mark.parametrize('images', [
    '1000', 'first', 'first 999', 'first -1000', 'first 1000 evenly spaced', '999 evenly spaced', 'evenly spaced', ':',
    '1:', ':1000', '0:1000', '01:1001', '1:1000', '2000:1000', '1001:1', '1:1001:1', '-1001:-1', '1.0:1001', ' 1:1001',
    '1:1001\n', '\u0661:1001', f'1{"0" * 5000}:{10 ** 16}', 'first 1_000', 1000, [1, 1001]])
def test_images_that_none_can_mean_are_refused_with_their_file(images: Any) -> None:
    for n in (1000, 1, 0, -1000):
        with pytest.raises(ValueError, match=r'^evaluation\.json: (images is .*; expected|n is .*; expected)[^\n]*$'):
            check_evaluation({**EVALUATION, 'images': images, 'n': n}, Path('evaluation.json'))
    for good in ('first 1000', '1000 evenly spaced', '1:1001', '9000:10000'):
        assert check_evaluation({**EVALUATION, 'images': good}, Path('evaluation.json'))['images'] == good
    for record in (RECORDS[1], {**EVALUATION, 'dataset': 'folder'}):  # which have none
        with pytest.raises(ValueError, match=r"^evaluation\.json: images is '1:1001'; expected a range only of "):
            check_evaluation({**record, 'images': '1:1001'}, Path('evaluation.json'))


@pytest.mark.parametrize('name', ['pgd-50@1/0', 'pgd-50@', 'pgd-5@1@2', 'Clean', 'pgd-50\n'])
def test_an_attack_that_none_can_mean_is_refused_with_its_file(name: str) -> None:
    evaluation = copy.deepcopy(EVALUATION)
    evaluation['attacks'][name] = evaluation['attacks']['clean']
    with pytest.raises(ValueError, match=r'^evaluation\.json: attacks has .*; expected a name such as pgd-50$'):
        check_evaluation(evaluation, Path('evaluation.json'))
