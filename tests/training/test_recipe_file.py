"""A recipe file of a stranger runs no code, costs no more than its length, and says each thing once."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Program, assert_one_line
from hypothesis import given
from hypothesis import strategies as st

from timm_paf.attacks import parse_fraction
from timm_paf.training.config import check, parse
from timm_paf.training.recipe_file import check_recipe_file

BOMB = 'a: &a [x, x, x, x, x, x, x, x, x]\n' + ''.join(
    f'{new}: &{new} [{", ".join([f"*{old}"] * 9)}]\n' for old, new in zip('abcdefgh', 'bcdefghi', strict=True))


@pytest.mark.parametrize(('text', 'words'), [
    ("model: !!python/object/apply:os.system ['touch pwned']", 'line 2: the tag'),
    ("!!python/object/new:os.system ['touch pwned']", 'the tag'), ('act_kwargs: !!set {a}', 'the tag'),
    ('lr: 0.1\nepochs: 3\nlr: 0.2', "line 4: 'lr' is given twice, first in line 2; keep one"),
    ('"lr": 0.1\nlr: 0.2', "'lr' is given twice"), ('act_kwargs: {alpha: 1, alpha: 2}', "'alpha' is given twice"),
    (BOMB, 'line 2: an anchor or alias'), ('act_kwargs: &a {b: *a}', 'an anchor or alias'),
    ('act_kwargs: ' + '[' * 100_000, 'more than 8 brackets'), ('act_kwargs: ' + '{a: ' * 5000, 'more than 8 brackets'),
    ('epochs: ' + '9' * 5000, 'a number of more than 20 digits'), ('epochs: 9999999999999999999', '2 ** 63 or more'),
    ('lr: .nan', '--lr is nan'), ('lr: .inf', '--lr is not finite'), ('max_minutes: .inf', 'is not finite'),
    ('eps: 1e9999', 'expected a smaller number'), ("eps: '1e99999999'", 'is too long a number'),
    ('attack_step: "1/' + '9' * 200 + '"', 'a number'),
    ('config: /etc/passwd', 'line 2: a recipe names no other recipe'), ('<<: {lr: 0.1}', 'a key that is no name'),
    ('? [a]\n: 1', 'a key that is no name'), ('---\nlr: 0.1', 'no option'), ('- a', 'is no YAML'),
    ('../../x: 1', '../../x'), ('x\0: 1', 'is no YAML'), ('#' * (1 << 20), 'more than 1,048,576 bytes')])
def test_a_recipe_is_refused_in_one_line(
        text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / 'recipe.yaml'
    file.write_text(text if text.startswith('!!') else f'output: x\n{text}')
    with pytest.raises(ValueError, match=r'^[^\n]+$') as found:
        check(parse(['--config', str(file)]))
    assert words in str(found.value)
    assert len(str(found.value)) < 700
    assert [path.name for path in tmp_path.iterdir()] == ['recipe.yaml']


@pytest.mark.parametrize(('content', 'words'), [
    (b'', 'is empty'), (b'5', 'no option'), (b'- a\n', 'no option'), (b'secret', 'no option'), (b'\xff', 'is no YAML')])
def test_a_file_that_is_no_recipe(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / 'file').write_bytes(content)
    with pytest.raises(ValueError, match=words) as found:
        parse([f'--config={tmp_path / "file"}'])
    assert 'secret' not in str(found.value)


def test_the_program_ends_with_one_line(tmp_path: Path, program: Program) -> None:
    (tmp_path / 'recipe.yaml').write_text(f'output: x\n{BOMB}')
    assert_one_line(program('train_robust.py', '--config', tmp_path / 'recipe.yaml'), 'train_robust.py: ', 'anchor')


@pytest.mark.parametrize('recipe', sorted((ROOT / 'hub' / 'recipes').glob('*.yaml')), ids=lambda path: path.stem)
def test_shipped_recipes_are_taken(recipe: Path) -> None:
    check_recipe_file(recipe)


NAMES = st.text(string.ascii_lowercase + '_', min_size=1, max_size=12).filter(lambda name: name not in ('config', '_'))
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.booleans(), st.integers(-10 ** 19, 10 ** 19), st.floats(allow_nan=False), st.text(max_size=20)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=5)


@given(recipe=st.dictionaries(NAMES, VALUES, min_size=1, max_size=5), style=st.sampled_from([None, True, False]))
def test_plain_options_are_taken_and_a_second_one_is_not(
        recipe: dict[str, Any], style: bool | None, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / 'plain.yaml'
    text = yaml.safe_dump(recipe, default_flow_style=style, width=10 ** 6)
    file.write_text(text, encoding='utf-8')
    check_recipe_file(file)
    if style is False:
        file.write_text(f'{text}{yaml.safe_dump({next(iter(recipe)): 1})}', encoding='utf-8')
        with pytest.raises(ValueError, match='is given twice'):
            check_recipe_file(file)


@given(text=st.text(st.sampled_from('ab12:-[]{}&*!|>?"\',#<\n \t%@\0é~.'), max_size=40))
def test_any_text_is_taken_or_refused_in_one_line(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / 'any.yaml'
    file.write_text(text, encoding='utf-8')
    try:
        check_recipe_file(file)
        refused = ''
    except ValueError as error:
        refused = str(error)
    assert '\n' not in refused
    assert refused or isinstance(yaml.safe_load(text), dict)


@pytest.mark.parametrize('text', ['1e9999', '1E+99999999', '1e-0009999', '1/' + '9' * 100])
def test_an_endless_fraction_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match='is too long a number'):
        parse_fraction(text)
