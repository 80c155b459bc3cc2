"""The programs by their one name, their options and flags, and what is said of a mistake."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Program, assert_one_line

import train_robust
from hub.cli import Parser, user_path
from timm_paf import __main__ as programs
from timm_paf import files
from timm_paf.training import Recipe
from timm_paf.training.config import Config, check, parse, plain_flags, shipped_recipes
from timm_paf.training.recipe import GROUPS, RecipeOptions, options_of


def fails(*args: str) -> str:
    with pytest.raises(ValueError, match=r'^[^\n]+$') as caught:
        check(parse([*args, '--output', 'x']))
    return str(caught.value)


@pytest.mark.parametrize('name', programs.PROGRAMS)
def test_help_of_every_program(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(SystemExit) as done:
        programs.main([name, '--help'])
    assert done.value.code in (0, None)
    text = capsys.readouterr().out
    assert f'usage: timm-paf {name}' in text
    if name == 'train':
        for group, about in GROUPS.items():
            assert f'{group}: {about}' in text
        for option in options_of(Config):
            assert f'--{option.replace("_", "-")}' in text
        assert 'pgd-at, trades, mart, ikl,' in ' '.join(text.split())
    assert 'example' in text or name == 'quickstart'


def test_the_programs_by_name(program: Program) -> None:
    done = program('-m', 'timm_paf', '--help')
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == list(programs.PROGRAMS)
    assert_one_line(program('-m', 'timm_paf', 'trian'), 'timm-paf', "'trian'", 'expected one of train, robustify')
    assert program('-m', 'timm_paf').returncode == 2


def test_each_option_is_declared_once() -> None:
    """The program's options are those of a recipe and its own, each in a group, and none of its names is a recipe's."""
    shared, all_of_them = options_of(RecipeOptions), options_of(Config)
    assert shared.items() <= all_of_them.items()
    assert {option.group for _, option in all_of_them.values()} == set(GROUPS)
    assert not (set(Config.__annotations__) & set(RecipeOptions.__annotations__))
    assert not (set(Recipe.__annotations__) & set(RecipeOptions.__annotations__))
    recipe = check(parse(['--output', 'x']))
    assert recipe == Recipe()


@pytest.mark.parametrize(('args', 'words'), [
    (['--epcohs', '3'], ['--epcohs', 'did you mean --epochs']),
    (['--batch_size', '3'], ['did you mean --batch-size']),
    (['--zzz', '3'], ['--zzz', 'see --help']),
    (['--model', 'resnet18_pslu'], ["unknown model 'resnet18_pslu'", 'did you mean', 'resnet18_psilu']),
    (['--config', 'paper_lnf'], ['paper_lnf is no file', 'wong2020_fast', 'did you mean', 'paper_linf']),
    (['--epochs', '0', '--lr', '-1', '--ema', '1', '--objective', 'pdg'],
     ['--epochs is 0; expected above 0', '--lr is -1.0', '--ema is 1.0; expected from 0 to below 1',
      "unknown --objective 'pdg'; expected one of pgd-at"]),
    (['--seed', str(2 ** 70)], [f'--seed is {2 ** 70}; expected from 0 to below']),
])
def test_mistakes_are_one_line_with_the_nearest_name(args: list[str], words: list[str]) -> None:
    text = fails(*args)
    for word in words:
        assert word in text, text


def test_a_wrong_key_of_a_recipe_file(tmp_path: Path) -> None:
    (tmp_path / 'r.yaml').write_text('epochs: 3\nbatchsize: 4\n')
    text = fails('--config', str(tmp_path / 'r.yaml'))
    assert 'batchsize' in text
    assert 'did you mean batch_size' in text


@pytest.mark.parametrize('name', sorted(shipped_recipes()))
def test_a_shipped_recipe_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = yaml.safe_load((ROOT / 'hub' / 'recipes' / f'{name}.yaml').read_text())
    by_path = parse(['--config', str(ROOT / 'hub' / 'recipes' / f'{name}.yaml'), '--output', 'x'])
    monkeypatch.chdir(tmp_path)  # from anywhere
    for args in (['--config', name], [f'--config={name}']):
        config = parse([*args, '--output', 'x'])
        assert config == by_path
        assert {key: getattr(config, key) for key in given} == given
    assert parse(['--config', name, '--epochs', '7', '--output', 'x']).epochs == 7  # flags override it
    check(dataclasses.replace(by_path, data_dir='.'))


def test_flags_bare_negated_and_spelt_out() -> None:
    for args, expected in (
            (['--compile'], True), (['--no-compile'], False), (['--compile', 'true'], True),
            (['--compile=False'], False), ([], None)):
        assert parse([*args, '--output', 'x']).compile is expected
    assert parse(['--fsdp', '--epochs', '3', '--output', 'x']).fsdp
    # a value that is no flag's stays
    assert plain_flags(['--output', 'true', '--fsdp', 'true', 'false'], ['fsdp']) == ['--output', 'true', '--no-fsdp']


def test_flags_of_the_other_programs() -> None:
    import argparse

    parser = Parser(prog='p')
    parser.add_argument('--compile', action=argparse.BooleanOptionalAction)
    parser.add_argument('--images', type=int)
    for args, expected in ((['--compile'], True), (['--no-compile'], False), (['--compile', 'false'], False),
                           (['--compile=true'], True), ([], None)):
        assert parser.parse_args(args).compile is expected
    for args, words in ((['--imges', '3'], 'did you mean --images'), (['--images', 'x'], 'invalid int value')):
        with pytest.raises(SystemExit) as caught:
            parser.parse_args(args)
        assert words in str(caught.value.code)
        assert str(caught.value.code).startswith('p: ')


def test_a_recipe_of_a_notebook_is_checked() -> None:
    with pytest.raises(ValueError, match=r'--lr is -1; .*--schedule'):
        Recipe(lr=-1, schedule='none')
    with pytest.raises(TypeError):
        Recipe(epcohs=3)  # type: ignore[call-arg]
    assert Recipe(dataset='my own').dataset == 'my own'


def test_a_program_without_its_packages_says_which_extra(tmp_path: Path) -> None:
    (tmp_path / 'accelerate.py').write_text('raise ModuleNotFoundError("No module named \'accelerate\'")')
    done = subprocess.run([sys.executable, '-c', f'import sys; sys.path.insert(0, {str(tmp_path)!r})\n'
                           'from timm_paf.__main__ import main; main(["train"])'], cwd=ROOT, capture_output=True,
                          text=True, timeout=300)
    assert_one_line(done, 'timm-paf train: ', "'accelerate'", "pip install 'timm-paf[train]'")


def test_what_a_record_says_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    for argv, expected in (
            (['/opt/v/bin/python', '/opt/v/bin/timm-paf', 'train', '--lr', '1'], 'timm-paf train --lr 1'),
            (['/opt/v/bin/python', '-m', 'timm_paf', 'train'], 'python -m timm_paf train'),
            (['python', 'train_robust.py', '--act-kwargs', '{a: 1}'], "python train_robust.py --act-kwargs '{a: 1}'")):
        monkeypatch.setattr(sys, 'orig_argv', argv)
        assert files.environment()['command'] == expected


def test_the_training_program_is_short_and_the_same() -> None:
    assert len((ROOT / 'train_robust.py').read_text().splitlines()) < 250
    assert train_robust.parse is parse


@pytest.mark.parametrize('option', ['--conf', '--max-step', '--att'])
def test_half_an_option_is_a_mistake(option: str) -> None:
    """A recipe by half its option's name was not looked at before it was read."""
    with pytest.raises(ValueError, match=f'unrecognized arguments: {option}'):
        parse([option, 'x', '--output', 'x'])
    with pytest.raises(SystemExit, match=f'unrecognized arguments: {option}'):
        Parser(prog='p').parse_args([option, 'x'])


def test_the_home_directory_is_known_behind_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'mine.yaml').write_text('lr: 0.3\n')
    found = parse(['--config=~/mine.yaml', '--output=~/run', '--resume=~/run/checkpoints/step-1'])
    assert (found.lr, found.output) == (0.3, str(tmp_path / 'run'))
    assert found.resume == str(tmp_path / 'run' / 'checkpoints' / 'step-1')
    assert user_path('~/x') == tmp_path / 'x'
