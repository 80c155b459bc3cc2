"""The programs by their one name, their options and flags, and what is said of a mistake."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import typing
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, Program, assert_one_line

import train_robust
from hub.cli import Parser, user_path
from timm_paf import __main__ as programs
from timm_paf import files
from timm_paf.attacks import ThreatModel
from timm_paf.training import Recipe
from timm_paf.training.config import Config, check, load_recipe, parse, plain_flags, shipped_recipes
from timm_paf.training.option import GROUPS, flag_of, options_of
from timm_paf.training.recipe import RecipeOptions


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
    assert_one_line(program('-m', 'timm_paf', 'evaluat'), 'did you mean evaluate?')
    assert program('-m', 'timm_paf').returncode == 2
    assert program('-m', 'timm_paf', '--version').stdout == f'timm-paf {importlib.metadata.version("timm-paf")}\n'


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


def test_a_value_of_another_kind_is_told_as_in_python(tmp_path: Path) -> None:
    words = {int: 'a whole number', float: 'a number', dict: 'a dict', list: 'a list'}
    checked = 0
    for name, (kind, _) in options_of(Config).items():
        classes = [typing.get_origin(cls) or cls for cls in typing.get_args(kind) or (kind,)]
        if not {str, bool} & {*classes} and typing.get_origin(kind) is not dict:
            expected = ' or '.join(words[cls] for cls in classes if cls in words)
            for value in ('a b', ''):
                assert fails(f'{flag_of(name)}={value}').partition(' or None')[0] == (
                    f'{flag_of(name)} is {value!r}; expected {expected}')
            checked += 1
    assert checked > 30
    for text, found in (('mixed_precision: no', 'mixed-precision is False'), ('schedule: [a]', "schedule is ['a']")):
        (tmp_path / 'r.yaml').write_text(f'{text}\n')
        assert fails('--config', str(tmp_path / 'r.yaml')) == (
            f'--{found}; expected a text, in quotes where YAML takes it for something else')


def test_one_mistake_is_told_once() -> None:
    assert fails('--norm', 'L3') == "unknown --norm 'L3'; expected one of Linf, L2, L1"
    assert fails('--dataset', 'cifar11').endswith('hfds/NAME')
    assert fails('--mixed-precision', 'fp8') == "unknown --mixed-precision 'fp8'; expected one of no, bf16, fp16"


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


def test_a_recipe_for_a_loop_of_ones_own(tmp_path: Path) -> None:
    found = load_recipe('fastat_ema', model='resnet18_pssilu', epochs=30, eps='4/255', milestones=None)
    assert found == check(parse(['--config', 'fastat_ema', '--output', 'x', '--model', 'resnet18_pssilu', '--epochs',
                                 '30', '--eps', '4/255']))
    (tmp_path / 'r.yaml').write_text('lr: 0.3\n')
    assert load_recipe(tmp_path / 'r.yaml') == Recipe(lr=0.3)
    (tmp_path / 's.yaml').write_text('synthetic: cifar10_ddpm.npz:0.3\nlr: 0.3\n')
    with pytest.raises(ValueError, match=r'has synthetic=[^\n]*, which a loop opens itself [^\n]*synthetic=None'):
        load_recipe(tmp_path / 's.yaml')
    assert load_recipe(tmp_path / 's.yaml', synthetic=None) == Recipe(lr=0.3)
    assert load_recipe('robustify', init=None).init is None
    with pytest.raises(TypeError, match=r'^load_recipe has no option epcohs; did you mean epochs'):
        load_recipe('fastat_ema', epcohs=3)
    with pytest.raises(TypeError, match=r'^load_recipe has no option threat; expected norm, eps, attack_step and'):
        load_recipe('fastat_ema', threat='4/255')
    assert load_recipe('fastat_ema', dataset='mine').dataset == 'mine'
    own = load_recipe('fastat_ema', dataset='mine', image_size=64)
    assert (own.dataset, own.image_size) == ('mine', 64)
    assert load_recipe('salman2020_imagenet').dataset == 'imagenet'  # without a directory, as a loop opens them itself
    (tmp_path / 's.yaml').write_text('{synthetic: a.npz:0.3, synthetic_augment: false, init: x, act_start: relu}')
    assert load_recipe(tmp_path / 's.yaml', synthetic=None, init=None) == Recipe()
    (tmp_path / 'f.yaml').write_text('{dataset: folder, data_dir: /d, skip_unreadable: true, image_size: 64}')
    assert load_recipe(tmp_path / 'f.yaml') == Recipe(dataset='folder', image_size=64)
    (tmp_path / 'f.yaml').write_text('act_start: relu')
    with pytest.raises(ValueError, match=r'^--act-start'):  # a fault of the file, which no change brought
        load_recipe(tmp_path / 'f.yaml')
    for changes, words in (({'pad_mode': 'reflect'}, '--pad-mode reflect does not work with --dataset imagenet'),
                           ({'aa': 'idbh-weak'}, '--aa idbh-weak does not work with --dataset imagenet'),
                           ({'dataset': ['a']}, r"dataset is \['a'\]; expected a name")):
        with pytest.raises(ValueError, match=words):
            load_recipe('salman2020_imagenet', **changes)
    (tmp_path / 's.yaml').write_text('{synthetic: a.npz:0.3, synthetic_augment: false, act: psilu, act_start: relu}')
    config = parse(['--config', str(tmp_path / 's.yaml'), '--synthetic', 'null', '--act', 'null', '--output', 'x'])
    assert config.synthetic_augment
    assert config.act_start is None
    found = load_recipe('fastat_ema', val=0, ema=0)
    assert (found.val_attack, found.ema_warmup, found.patience) == (None, RecipeOptions.ema_warmup, 0)
    assert found == check(parse(['--config', 'fastat_ema', '--val', '0', '--ema', '0', '--output', 'x']))
    with pytest.raises(ValueError, match=r'^--epochs is 0; expected above 0$'):
        load_recipe('fastat_ema', epochs=0)
    with pytest.raises(ValueError, match='did you mean fastat_ema'):
        load_recipe('fastat_em')


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
    with pytest.raises(ValueError, match=r'--seed is 1\.5; expected a whole number'):
        Recipe(seed=Fraction(3, 2))
    with pytest.raises(TypeError):
        Recipe(epcohs=3)  # type: ignore[call-arg]
    assert Recipe(dataset='my own').dataset == 'my own'


@pytest.mark.parametrize(('given', 'expected'), [
    ({'schedule': 'piecewise', 'milestones': [75, 90]}, {'milestones': '75,90'}),
    ({'schedule': 'piecewise', 'milestones': np.array([75, 90])}, {'milestones': '75,90'}),
    ({'schedule': 'piecewise', 'milestones': 75}, {'milestones': '75'}),
    ({'schedule': 'piecewise', 'milestones': 75.0}, {'milestones': '75'}),
    ({'schedule': 'piecewise', 'milestones': Fraction(75)}, {'milestones': '75'}),
    ({'schedule': 'one-cycle', 'momentum_cycle': (0.85, 0.95)}, {'momentum_cycle': '0.85,0.95'}),
    ({'no_decay': ['bn', 'bias']}, {'no_decay': 'bn,bias'}), ({'seed': torch.tensor(3)}, {'seed': 3}),
    ({'epochs': np.float64(3), 'lr': np.float32(0.5), 'warmup_epochs': 1}, {'epochs': 3, 'lr': 0.5}),
    ({'threat': '8/255'}, {'threat': ThreatModel()}), ({'threat': 0.031}, {'threat': ThreatModel(eps='0.031')}),
    ({'threat': '8/255', 'objective': 'fgsm-rs'}, {'threat': ThreatModel(step='10/255', steps=1)})])
def test_a_recipe_takes_what_a_notebook_has(given: dict[str, Any], expected: dict[str, Any]) -> None:
    recipe = Recipe(**given)
    for name, value in expected.items():
        found = getattr(recipe, name)
        assert (found, type(found)) == (value, type(value))
    json.dumps(recipe.record())


@pytest.mark.parametrize('name', [field.name for field in dataclasses.fields(Recipe)])
def test_no_value_of_another_type_is_more_than_a_line(name: str) -> None:
    """Each option of the recipe with values of each type: it is taken, and the recipe can be recorded, or refused."""
    refused, taken = [], 0
    for value in (
            None, True, -1, 3, 0.5, float('nan'), 10 ** 400, '', '8/255', 'a\nb', b'x', [1, 2], (0.5,), {}, {'a': 1},
            {1}, object(), torch.ones(2), np.int64(3), np.zeros((2, 2)), Fraction(1, 3), Recipe, len,
            getattr(Recipe(), name)):
        try:
            recipe = Recipe(**{name: value})
        except ValueError as error:
            refused.append(str(error))
        else:
            taken += bool(json.dumps(recipe.record()))
    assert not any('\n' in line for line in refused)
    assert taken
    assert len(refused) > 5


@pytest.mark.parametrize('changes', [
    {'steps': '10'}, {'steps': 2.5}, {'steps': None}, {'norm': ['L2']}, {'norm': None}, {'eps': None}, {'eps': [8]},
    {'eps': {}}, {'step': [1]}, {'step': 'two'}])
def test_a_threat_model_of_other_types_is_refused_in_a_line(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r'^[^\n]*expected[^\n]*$'):
        ThreatModel(**changes)


def test_what_a_recipe_says_goes_with_what_it_needs() -> None:
    """A flag that takes the average, AWP or objective away takes the recipe's options of it away, and no flag."""
    for args, gone, stays in (
            (['fastat_ema', '--ema', '0'], {'ema_warmup': 'power'}, {'label_smoothing': 0.4}),
            (['wang2023_1m', '--ema=0'], {'ema_warmup': 'power', 'ema_bn': 'average'}, {'robust_weight': 5.0}),
            (['wang2023_1m', '--objective', 'pgd-at'], {'robust_weight': 6.0, 'separate_forwards': False},
             {'ema_bn': 'copy'}),
            (['ikl2023', '--objective', 'trades'], {'ikl_mse': 20.0}, {'robust_weight': 4.0, 'awp_warmup_epochs': 9.0}),
            (['ikl2023', '--awp', '0'], {'awp_warmup_epochs': 0.0}, {'ikl_mse': 20.0}),
            (['wong2020_fast', '--optimizer', 'adamw', '--momentum-cycle', 'null'], {'nesterov': True}, {})):
        config = parse(['--config', *args, '--output', 'x'])
        check(config)
        for name, value in {**gone, **stays}.items():
            assert getattr(config, name) == value, name


def test_a_program_without_its_packages_says_which_extra(tmp_path: Path) -> None:
    (tmp_path / 'accelerate.py').write_text('raise ModuleNotFoundError("No module named \'accelerate\'")')
    done = subprocess.run([sys.executable, '-c', f'import sys; sys.path.insert(0, {str(tmp_path)!r})\n'
                           'from timm_paf.__main__ import main; main(["train"])'], cwd=ROOT, capture_output=True,
                          text=True, timeout=300)
    assert_one_line(done, 'timm-paf train: ', "'accelerate'", "pip install 'timm-paf[train]'")


@pytest.mark.parametrize('name', ['timm_paf', 'hub.bundle', 'train_robust'])
def test_no_program_passes_on_a_warning_of_torch_to_timm(name: str, program: Program) -> None:
    done = program('-m', name, '--help', env={'PYTHONWARNINGS': 'default'})
    assert done.returncode == 0, done.stderr
    assert 'torch.jit' not in done.stderr


def test_a_reader_that_has_enough_is_no_fault() -> None:
    """As ``head`` is; a broken pipe of another kind is said."""
    code = "import os; from hub.cli import one_line\nwith one_line('x'): {}"
    buffered = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
    wait = "print('0', flush=True), sys.stdin.read(), print('more')"
    for what, said in (('[print(i, flush=True) for i in range(100_000)]', ''), (f'import sys; {wait}', ''),
                       ('raise BrokenPipeError(32, os.strerror(32))', 'x: [Errno 32] Broken pipe\n')):
        process = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code.format(what)], cwd=ROOT, text=True,
                                   env=buffered, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        if not said:
            assert process.stdout.readline() == '0\n'
            process.stdout.close()
        process.stdin.close()
        assert (process.stderr.read(), process.wait(timeout=60)) == (said, 1)


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


def test_a_mistyped_option_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r'--confg x; did you mean --config\?'):
        parse(['--confg', 'x', '--output', 'x'])
    parser = Parser(prog='p', takes_train=True)
    parser.add_argument('--heap')
    parser.add_argument('--minutes')
    for args in (['--lr', '0.1'], ['--no-compile'], ['--no-drop-last'], ['--max-minutes', '3']):
        expected = f'unrecognized arguments: {" ".join(args)}; an option of train goes behind --; see'
        with pytest.raises(SystemExit, match=expected):
            parser.parse_args(args)
    with pytest.raises(SystemExit, match=r'unrecognized arguments: --no-lr; see --help'):  # which train does not have
        parser.parse_args(['--no-lr'])
    with pytest.raises(SystemExit, match=r'unrecognized arguments: --hepl; did you mean --heap\?; see --help'):
        parser.parse_args(['--hepl'])
    with pytest.raises(SystemExit, match=r'unrecognized arguments: --lr; see --help'):
        Parser(prog='p').parse_args(['--lr'])


def test_a_second_interruption_is_one_line_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_robust, 'run', interrupted)
    with pytest.raises(SystemExit, match=r'^train_robust\.py: stopped; the same command resumes$'):
        train_robust.main(['--model', 'wrn10_1_relu', '--output', str(tmp_path / 'run')])


def test_the_home_directory_is_known_behind_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'mine.yaml').write_text('lr: 0.3\n')
    found = parse(['--config=~/mine.yaml', '--output=~/run', '--resume=~/run/checkpoints/step-1'])
    assert (found.lr, found.output) == (0.3, str(tmp_path / 'run'))
    assert found.resume == str(tmp_path / 'run' / 'checkpoints' / 'step-1')
    assert user_path('~/x') == tmp_path / 'x'
