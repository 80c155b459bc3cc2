"""`timm-paf study`: what a YAML means, and what is done again."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, Program, assert_one_line

from hub.study import cases, main, one_epoch, records, tables
from timm_paf.activations import list_pafs
from timm_paf.processes import exclusive_lock
from timm_paf.training.config import check, parse

STUDY = """
recipe: study_resnet18_w8
options: {epochs: 2, paf_clip: 0}
images: 8
attacks: clean,pgd-1
seeds: [0, 3]
networks:
  relu: {model: resnet18_w8_relu}
  $act$alpha-$lr:
    grid: {act: [psilu, psoftplus], alpha: [0.5, 4], lr: [0.1]}
    model: resnet18_w8_$act
    act_kwargs: {alpha: $alpha, frozen: true}
    lr: $lr
    compile: true
"""


def opened(tmp_path: Path, text: str) -> list[cases.Case]:
    path = tmp_path / 'study.yaml'
    path.write_text(text)
    return cases.open_study(path)


def test_a_grid_is_every_combination_with_every_seed(tmp_path: Path) -> None:
    study = opened(tmp_path, STUDY)
    assert [case.name for case in study] == [f'{network}_s{seed}' for seed in (0, 3) for network in (
        'relu', 'psilu0.5-0.1', 'psilu4-0.1', 'psoftplus0.5-0.1', 'psoftplus4-0.1')]
    for case in study:
        case.check()
        recipe = check(parse([*case.train(), '--data-dir', 'data', '--output', 'run']))
        assert (recipe.seed, recipe.epochs, recipe.paf_clip) == (case.seed, 2, 0)
        assert (case.images, case.attacks) == (8, 'clean,pgd-1')
    recipe = check(parse([*study[-1].train(), '--data-dir', 'data', '--output', 'run']))
    assert (recipe.model, recipe.act_kwargs) == ('resnet18_w8_psoftplus', {'alpha': 4, 'frozen': True})
    assert (recipe.lr, recipe.compile) == (0.1, True)


def test_parts_take_what_they_leave_out_from_the_whole_and_a_recipe_lies_beside(tmp_path: Path) -> None:
    (tmp_path / 'mine.yaml').write_text('model: resnet18_w8_relu\nepochs: 7\n')
    study = opened(tmp_path, """
recipe: mine.yaml
images: 4
attacks: clean
seeds: [0]
parts:
- {networks: {a: {}}}
- {networks: {b: {lr: 0.5}}, seeds: [1, 2], images: 9, attacks: 'pgd-3'}
""")
    assert [(case.name, case.images, case.attacks) for case in study] == [
        ('a_s0', 4, 'clean'), ('b_s1', 9, 'pgd-3'), ('b_s2', 9, 'pgd-3')]
    assert check(parse([*study[0].train(), '--data-dir', 'data', '--output', 'run'])).epochs == 7


def test_the_example_of_the_page(tmp_path: Path) -> None:
    example, = re.findall(r'```yaml\n(recipe: .*?)```', (ROOT / 'hub' / 'README.md').read_text(), re.DOTALL)
    study = opened(tmp_path, example)
    for case in study:
        case.check()
    assert {case.network for case in study} == {'relu', 'psilu_alpha1', 'psilu_alpha4', 'psilu_alpha16'}


@pytest.mark.parametrize(('old', 'new', 'words'), [
    ('seeds: [0, 3]', 'seed: [0, 3]', "unknown key 'seed'; expected recipe, options, networks, seeds"),
    ('seeds: [0, 3]', '', 'seeds is None; expected a list such as [0, 1, 2]'),
    ('seeds: [0, 3]', 'seeds: [-1]', r'seeds is [-1]; expected whole numbers'),
    ('seeds: [0, 3]', 'seeds: [1, 1]', 'relu_s1 is there twice'),
    ('images: 8', 'images: true', 'images is True; expected a whole number'),
    ('lr: [0.1]', 'lr: 0.1', "expected options of train, and beside them grid with lists of at least one value"),
    ('lr: [0.1]', 'lr: []', "expected options of train, and beside them grid with lists of at least one value"),
    ('$act$alpha-$lr', '$act-$lr', "psilu-0.1_s0 is there twice; expected another name or seed, and the $name of"),
    ('alpha: $alpha, ', '', '$act$alpha-$lr stands twice for the same options; expected the $name of every list'),
    ('images: 8', 'images: -8', 'images is -8; expected a whole number above 0'),
    ('seeds: [0, 3]', 'seeds: [true]', 'seeds is [True]; expected whole numbers'),
    ('networks:', 'parts: []\nnetworks:', 'parts is []; expected a list of parts'),
    ('networks:', 'parts: [{seeds: [0]}, {seeds: [1], images: 9}]\nnetworks:',
     'relu has images 8 and 9; expected the same with each seed'),
    ('lr: $lr', 'lr: $lrr', "has $ with 'lrr', of which grid says no values"),
    ('relu: {', '../relu: {', "'../relu' is no name of a directory"),
    ('networks:', 'parts: 3\nnetworks:', 'parts is 3; expected a list of parts'),
    ('networks:', 'options: {}\nnetworks:', "'options' is given twice, first in line 3"),
    ('recipe: study_resnet18_w8', 'recipe: !!python/name:os.system', 'expected a plain value')])
def test_what_no_study_can_mean_is_said_in_one_line(old: str, new: str, words: str, tmp_path: Path) -> None:
    assert STUDY.count(old) == 1
    with pytest.raises(ValueError, match=r'study\.yaml') as found:
        opened(tmp_path, STUDY.replace(old, new))
    assert words in str(found.value)
    assert '\n' not in str(found.value)


@pytest.mark.parametrize(('old', 'new', 'words'), [
    ('epochs: 2', 'epohcs: 2', 'relu_s0: .*epohcs.*; did you mean --epochs'),
    ('lr: [0.1]', 'lr: [-1]', 'psilu0.5--1_s0: --lr is -1'),
    ('relu: {', 'relu: {seed: 1, ', 'relu_s0: --seed is given; expected seeds in the study'),
    ('epochs: 2', 'config: fastat_ema', 'relu_s0: --config is given; .* recipe in the study in place of --config'),
    ('epochs: 2', 'output: x', 'relu_s0: --output is given; expected seeds in the study, --output and --data-dir of'),
    ('epochs: 2', 'mixed_precision: no', "relu_s0: unknown --mixed-precision 'false'; expected one of no, bf16, fp16"),
    ('pgd-1', 'pgd-0', "relu_s0: unknown attack 'pgd-0'"),
    ('pgd-1', 'pgd-1@8', 'relu_s0: pgd-1@8: eps is 8; expected between 0 and 1 for Linf'),
    ('pgd-1', 'transfer-pgd-1', 'relu_s0: transfer-pgd-1 needs the network that it is made on'),
    ('resnet18_w8_$act', 'resnet18_w9_$act', "psilu0.5-0.1_s0: unknown model 'resnet18_w9_psilu'")])
def test_a_network_that_can_not_be_trained_is_named(old: str, new: str, words: str, tmp_path: Path) -> None:
    study = opened(tmp_path, STUDY.replace(old, new))
    wrong = next(case for case in study if case.name == words.partition(':')[0])
    with pytest.raises(ValueError, match=words):
        wrong.check()


def test_a_list_names_what_can_not_be_trained_too(tmp_path: Path) -> None:
    opened(tmp_path, STUDY.replace('resnet18_w8_$act', 'resnet18_w9_$act'))
    with pytest.raises(SystemExit, match=r"psilu0\.5-0\.1_s0: unknown model 'resnet18_w9_psilu'"):
        main([str(tmp_path / 'study.yaml'), '--output', str(tmp_path / 'runs'), '--list'])


def test_a_fault_of_the_last_network_is_found_before_the_first_is_trained(tmp_path: Path, program: Program) -> None:
    opened(tmp_path, STUDY.replace('alpha: [0.5, 4]', 'alpha: [0.5, no]'))
    done = program('-m', 'hub.study', tmp_path / 'study.yaml', '--data-dir', 'data', '--output', tmp_path / 'runs')
    assert_one_line(done, 'hub.study: psiluFalse-0.1_s0: ')
    assert not (tmp_path / 'runs').exists()


@pytest.mark.parametrize('directory', ['study', 'convergence', 'recipes'])
def test_records_are_of_the_study(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    folder = Path('hub/results') / directory
    study = {case.name: case for case in cases.open_study(folder / cases.FILE)}
    for case in study.values():
        case.check()
    found = records.records_of(folder)
    assert found
    for record in found:
        assert records.is_complete(study[record.case.name], folder / record.case.name)
        assert record.run['architecture'].endswith(f'_{record.act}')
        assert bool(record.learned) == (not record.fixed and records.parameters(record.act) > 0)
        kwargs = {**record.fixed, 'frozen': True} if record.fixed else record.case.options.get('act_kwargs', {})
        assert record.run['recipe']['act_kwargs'] == kwargs
        assert set(record.case.attacks.split(',')) <= record.evaluation['attacks'].keys()
    if directory == 'study':
        assert {case.network for case in study.values()} >= {'relu', 'elu', 'softplus', 'silu', *list_pafs()}


@pytest.mark.parametrize(('file', 'keys', 'value', 'words'), [
    ('run.json', ('recipe', 'seed'), 1, r'run\.json is not of pssilu_free_s0 as the study has it: seed 1, now 0'),
    ('run.json', ('recipe', 'paf_penalty'), 10.0, r'run\.json .*: paf_penalty 10\.0, now 0'),
    ('run.json', ('recipe', 'max_steps'), 2, r'run\.json .*: max_steps 2, now None'),
    ('run.json', ('recipe',), None, r'run\.json: recipe\.dataset is nan'),
    ('evaluation.json', ('n',), 999, r"evaluation\.json: images is 'first 1000' and n is 999"),
    ('evaluation.json', ('attacks', 'pgd-50', 'verdicts'), '1' * 1000, r'evaluation\.json: pgd-50 has .* was changed'),
    ('evaluation.json', ('attacks',), [], r'evaluation\.json: attacks is \[\]'),
    ('evaluation.json', ('images',), '1000:2000', None),
    ('evaluation.json', ('complete',), False, None)])
def test_records_of_another_network_or_evaluation_are_not_taken(
        file: str, keys: tuple[str, ...], value: object, words: str | None, tmp_path: Path) -> None:
    folder = ROOT / 'hub' / 'results' / 'study'
    case = next(case for case in cases.open_study(folder / cases.FILE) if case.name == 'pssilu_free_s0')
    shutil.copytree(folder / case.name, tmp_path / case.name)
    assert records.is_complete(case, tmp_path / case.name)
    changed = inner = json.loads((tmp_path / case.name / file).read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (tmp_path / case.name / file).write_text(json.dumps(changed))
    if words is None:
        assert not records.is_complete(case, tmp_path / case.name)
    else:
        with pytest.raises(ValueError, match=words):
            records.is_complete(case, tmp_path / case.name)


@pytest.mark.parametrize('written', [
    'lr: 1e-3', 'eps: 0.031', 'eps: 16/510', "eps: '0.5', norm: L2", 'nesterov: true', 'attack_steps: 3',
    'act: silu, act_share: layer', 'ema: 0.9, ema_bn: average', 'schedule: piecewise, epochs: 9, milestones: "3,6"',
    'model: resnet18_w8_psilu, act_kwargs: {alpha: 1e-3}', 'drop_last: true, pad_mode: zeros', 'compile: false'])
def test_a_run_is_of_the_network_however_its_options_are_written(written: str, tmp_path: Path) -> None:
    """What train records for the options is what the study expects, and nothing else is."""
    model = '' if 'model' in written else 'model: resnet18_w8_relu, '
    case, = opened(tmp_path, 'recipe: study_resnet18_w8\nimages: 8\nattacks: clean\nseeds: [0]\n'
                             f'networks: {{x: {{{model}{written}}}}}\n')
    recipe = json.loads(json.dumps(case.meant()[1].record()))
    case.refuse_other_run({'recipe': recipe}, tmp_path)
    for name, other in (('lr', 0.7), ('threat', {**recipe['threat'], 'eps': '1/255'}), ('model', 'resnet18_w8_gelu'),
                        ('init', {'source': 'x'}), ('act_kwargs', {'alpha': 3.0})):
        with pytest.raises(ValueError, match=f'is not of x_s0 as the study has it: {name} '):
            case.refuse_other_run({'recipe': {**recipe, name: other}}, tmp_path)


def test_weights_to_start_from_and_what_they_bring_are_of_the_network(tmp_path: Path) -> None:
    case, = opened(tmp_path, 'recipe: study_resnet18_w8\nimages: 8\nattacks: clean\nseeds: [0]\n'
                             'networks: {x: {model: resnet18_w8_relu, init: mine.pt}}\n')
    recipe = case.meant()[1].record()
    started = {**recipe, 'init': {'source': 'mine.pt'}, 'model_kwargs': {'pad_type': 'same'}}
    case.refuse_other_run({'recipe': started}, tmp_path)
    with pytest.raises(ValueError, match=r'init None, now mine\.pt'):
        case.refuse_other_run({'recipe': recipe}, tmp_path)


def test_records_of_another_training_are_not_replaced(tmp_path: Path) -> None:
    kept, runs = copied(tmp_path / 'kept', 'relu_s0', 'silu_s0'), copied(tmp_path / 'runs', 'relu_s0')
    for folder in kept.iterdir():
        (folder / 'evaluation.json').unlink()
        run = json.loads((folder / 'run.json').read_text())
        (folder / 'run.json').write_text(json.dumps({**run, 'files': {'model.safetensors': '0' * 64}}))
    (tmp_path / 'study.yaml').write_text(SMALL)
    before = {path: path.read_bytes() for path in kept.rglob('*.json*')}
    for name, said in (('relu_s0', 'another training than .*'), ('silu_s0', 'a training that .*runs/silu_s0 has not')):
        with pytest.raises(SystemExit, match=f'{name}/run.json is of {said}; nothing kept is overwritten'):
            main([str(tmp_path / 'study.yaml'), '--output', str(runs), '--keep', str(kept), '--only', name])
    assert {path: path.read_bytes() for path in kept.rglob('*.json*')} == before


@pytest.mark.parametrize('asked', [True, False])
def test_a_data_set_is_downloaded_if_any_network_asks_for_it(
        asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tmp_path, 'recipe: study_resnet18_w8\nimages: 8\nattacks: clean\nseeds: [0]\nnetworks:\n'
                     '  a: {dataset: digits}\n  b: {dataset: cifar100}\n'
                     f'  c: {{dataset: cifar100, lr: 0.2, download: {str(asked).lower()}}}\n')
    wanted = {}
    monkeypatch.setattr('hub.study.load_dataset', lambda name, root, train, download: wanted.update({name: download}))
    main([str(tmp_path / 'study.yaml'), '--output', str(tmp_path / 'runs'), '--minutes', '-1'])
    assert wanted == {'digits': False, 'cifar100': asked}


@pytest.mark.parametrize(('options', 'words'), [
    ('dataset: folder, objective: pgd-at', 'folder needs a directory; expected --data-dir DIR'),
    ('dataset: cifar10', 'which has no cifar-10-batches-py')])
def test_data_that_is_not_there_is_said_before_the_first_network(
        options: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv('CIFAR10_ROOT', str(tmp_path))
    (tmp_path / 'study.yaml').write_text(SMALL.replace('seeds:', f'options: {{{options}}}\nseeds:'))
    with pytest.raises(SystemExit, match=words):
        main([str(tmp_path / 'study.yaml'), '--output', str(tmp_path / 'runs')])
    assert capsys.readouterr().out == ''
    with pytest.raises(SystemExit, match=r'nothing\.yaml is no file; expected a study'):
        main([str(tmp_path / 'nothing.yaml'), '--list'])


def test_what_is_written_anew_does_not_keep_the_list_from_the_others(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, there = tmp_path / 'study.yaml', copied(tmp_path / 'there', 'relu_s0', 'silu_s0')
    study.write_text(SMALL)
    cut = there / 'relu_s0' / 'evaluation.json'
    cut.write_text(cut.read_text()[:99])
    cut.with_suffix('.state').mkdir()
    (there / 'silu_s0' / 'evaluation.json').unlink()
    (there / 'silu_s0' / 'run.json').write_text('{')
    main([str(study), '--output', str(there), '--list'])
    assert capsys.readouterr().out == ('relu_s0 trained, its evaluation is written anew\n'
                                       'silu_s0 in training, its run.json is written anew\n'
                                       '0 of 2 networks are complete\n')


def test_seeds_are_named_where_networks_lack_an_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    groups = {name: [r for r in group if r.case.seed in seeds] for (name, group), seeds in zip(
        one_epoch.activations().items(), ((0, 1), (0, 1), (0,)))}
    names = [tables.named(name) for name in groups]
    assert tables.seeds_in_words(groups, ['pgd-50']) == f'PGD-50: seed 0, 1 (0 of {names[2]})'
    for name in [*groups][1:]:
        groups[name] = [copy.copy(record) for record in groups[name]]
        for record in groups[name]:
            record.evaluation = {**record.evaluation, 'attacks': {'clean': record.evaluation['attacks']['clean']}}
    assert tables.seeds_in_words(groups, ['pgd-50']) == f'PGD-50: seed 0, 1 (none of {names[1]}, {names[2]})'


def copied(folder: Path, *names: str) -> Path:
    """Copies records of the study of one epoch."""
    for name in names:
        shutil.copytree(ROOT / 'hub' / 'results' / 'study' / name, folder / name)
    return folder


SMALL = """
recipe: study_resnet18_w8
images: 1000
attacks: clean,pgd-50
seeds: [0]
networks:
  relu: {model: resnet18_w8_relu}
  silu: {model: resnet18_w8_silu}
"""


@pytest.mark.parametrize(('old', 'new', 'words'), [
    ('pgd-50', 'pgd-10', 'relu_s0/evaluation.json is of first 1000 images and clean,pgd-50,apgd; expected 1000 and '
                         'clean,pgd-10, as the study has for relu_s0: move it away'),
    ('1000', '500', 'expected 500 and clean,pgd-50'),
    ('resnet18_w8_silu}', 'resnet18_w8_silu, lr: 0.3}', 'silu_s0 as the study has it: lr 0.1, now 0.3')])
@pytest.mark.parametrize('where', ['--output', '--keep'])
def test_what_is_there_is_not_overwritten_by_a_study_that_was_edited(
        old: str, new: str, words: str, where: str, tmp_path: Path) -> None:
    study, there = tmp_path / 'study.yaml', copied(tmp_path / 'there', 'relu_s0', 'silu_s0')
    study.write_text(SMALL.replace(old, new))
    before = {path: path.read_bytes() for path in there.rglob('*.json*')}
    with pytest.raises(SystemExit, match=re.escape(words)):
        main([str(study), '--data-dir', 'data', '--output', str(tmp_path / 'runs'), where, str(there)])
    assert {path: path.read_bytes() for path in there.rglob('*.json*')} == before
    assert not list(tmp_path.rglob('model.safetensors'))


@pytest.mark.parametrize(('options', 'words'), [
    (['--max-stepz', '3'], 'relu_s0: .*did you mean --max-steps'), (['--seed=3'], 'relu_s0: --seed=3 is given'),
    (['--output', 'x'], 'relu_s0: --output is given'),
    (['--epochs', '9'], 'relu_s0 as the study has it: epochs 1, now 9')])
def test_options_for_all_networks_are_checked_before_the_first(
        options: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / 'study.yaml').write_text(SMALL)
    there = copied(tmp_path / 'there', *(['relu_s0'] if '--epochs' in options else []))
    with pytest.raises(SystemExit, match=words):
        main([str(tmp_path / 'study.yaml'), '--data-dir', 'data', '--output', str(there), '--', *options])


@pytest.mark.parametrize(('content', 'words'), [
    ('', 'does not end with the line of an epoch'), ('{"epoch": 0, "a', 'does not end with the line of an epoch'),
    ('[1]', 'does not end'), ('{"epoch": 0, "act.alpha": "x"}', 'does not end')])
def test_a_damaged_metrics_jsonl_is_named(
        content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / 'study.yaml').write_text(SMALL)
    (copied(tmp_path / 'runs', 'relu_s0') / 'relu_s0' / 'metrics.jsonl').write_text(content)
    with pytest.raises(SystemExit, match=f'relu_s0/metrics.jsonl {words}'):
        main([str(tmp_path / 'study.yaml'), '--list', '--output', str(tmp_path / 'runs')])


def test_networks_that_were_attacked_on_other_images_have_no_difference(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'study.yaml').write_text(SMALL.replace('  silu: {model: resnet18_w8_silu}\n', '')
                                         + '  a_name_of_more_than_24_letters: {model: resnet18_w8_silu}\n'
                                           'parts: [{}, {images: 500, networks: {silu: {model: resnet18_w8_silu}}}]\n')
    runs = copied(tmp_path / 'runs', 'relu_s0', 'silu_s0')
    shutil.copytree(runs / 'silu_s0', runs / 'a_name_of_more_than_24_letters_s0')
    path = runs / 'silu_s0' / 'evaluation.json'
    found = json.loads(path.read_text())
    for name in ('worst_case', 'record_sha256', 'record_format'):
        found.pop(name, None)
    for result in found['attacks'].values():
        verdicts = result['verdicts'][:500]
        right = verdicts.count('1')
        result |= {'verdicts': verdicts, 'n': 500, 'correct': right, 'accuracy': right / 500}
    path.write_text(json.dumps({**found, 'n': 500, 'images': 'first 500'}))
    main([str(tmp_path / 'study.yaml'), '--list', '--output', str(runs)])
    out = capsys.readouterr().out
    assert 'a_name_of_more_than_24_letters_s0 complete\n' in out
    relu, other, silu = (line.strip('|').split(' | ') for line in out.splitlines() if ' | 0 | ' in line)
    assert relu[3].strip() == other[3].strip() == 'cifar10, first 1000, Linf 8/255'
    assert silu[3].strip() == 'cifar10, first 500, Linf 8/255'
    assert '±' in other[-1]
    assert not any('±' in cell for cell in silu)


@pytest.mark.slow
def test_a_network_that_fails_does_not_hold_up_the_others_and_none_is_left_at_work(
        tmp_path: Path, program: Program) -> None:
    study, runs = tmp_path / 'study.yaml', tmp_path / 'runs'
    study.write_text("""
recipe: mine.yaml
images: 20
attacks: clean
seeds: [0]
networks: {diverges: {lr: 1e9}, relu: {max_steps: 1}, long: {epochs: 1000}}
""")
    (tmp_path / 'mine.yaml').write_text('{model: wrn10_1_relu, dataset: digits, epochs: 1, compile: false, '
                                        'attack_steps: 1}\n')
    done = program('-m', 'hub.study', study, '--data-dir', '.', '--output', runs, '--only', '[dr]*')
    assert_one_line(done, 'hub.study: diverges_s0 failed, as said above; the same command tries again')
    assert '1 of 2 networks are complete' in done.stdout
    working = subprocess.Popen([sys.executable, '-m', 'hub.study', study, '--data-dir', '.', '--output', runs, '--only',
                                'long*'], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (runs / 'long_s0' / 'run.json').is_file() and time.monotonic() < until:
        time.sleep(0.2)
    working.terminate()
    assert working.wait(120) == 1
    assert list((runs / 'long_s0' / 'checkpoints').glob('step-*'))
    with exclusive_lock(runs / 'long_s0', 'training'):  # nobody holds it
        pass


@pytest.mark.parametrize(('act', 'values', 'curvature', 'at'), [
    ('psilu', {'alpha': 4.0}, 2.0, -1 / (1 + math.exp(4))),  # alpha / 2 at 0
    ('silu', {}, 0.5, -1 / (1 + math.e)),
    ('softplus', {}, 0.25, math.log1p(math.exp(-1))),
    ('pssilu', {'beta': 0.5}, 1.0, 1 - 2 / (1 + math.e)),  # alpha / 2 / (1 - beta)
    ('elu', {}, 1.0, math.exp(-1) - 1), ('pelu', {'alpha': 0.5}, math.inf, (math.exp(-1) - 1) / 2),
    ('prelu', {'alpha': -0.3}, math.inf, 0.3), ('relu', {}, math.inf, 0.0)])
def test_shape_against_closed_forms(act: str, values: dict[str, float], curvature: float, at: float) -> None:
    found = records.shape(act, **values)
    assert found == (pytest.approx(curvature, abs=1e-3), pytest.approx(at, abs=1e-6))


@pytest.mark.slow
def test_study_trains_attacks_and_resumes(tmp_path: Path, cifar10_root: Path, program: Program) -> None:
    study = tmp_path / 'tiny.yaml'
    study.write_text(STUDY.replace('compile: true', 'compile: false'))

    def call(*args: object):  # type: ignore[no-untyped-def]
        return program('-m', 'hub.study', study, '--data-dir', cifar10_root, '--output', tmp_path / 'runs', '--keep',
                       tmp_path / 'kept', *args, '--', '--max-steps', 2, '--batch-size', 16)

    assert_one_line(call('--only', 'gelu*'), "no network matches 'gelu*'")
    assert_one_line(program('-m', 'hub.study', study, '--', '--max-steps', 2), 'an --output of its own')
    nowhere = program('-m', 'hub.study', study, '--only', 'relu_s0', '--output', tmp_path / 'x', env={
        'CIFAR10_ROOT': str(tmp_path)})
    assert_one_line(nowhere, 'hub.study: CIFAR10_ROOT is ', 'which has no cifar-10-batches-py')
    assert not (tmp_path / 'x').exists()
    assert 'relu_s0             to do\n' in program('-m', 'hub.study', study, '--list').stdout
    done = call('--only', 'psilu0.5*_s0')
    assert done.returncode == 0, done.stderr
    kept, case = tmp_path / 'kept' / 'psilu0.5-0.1_s0', replace(
        cases.open_study(study)[1], more=('--max-steps', '2', '--batch-size', '16'))
    found = records.Record(kept, case)
    assert (found.act, found.fixed, found.learned) == ('psilu', {'alpha': 0.5}, {})
    assert list(found.evaluation['attacks']) == ['clean', 'pgd-1']
    assert str(tmp_path) in (tmp_path / 'runs' / kept.name / 'run.json').read_text()
    assert str(tmp_path) not in ''.join((kept / name).read_text() for name in cases.RECORDS)
    before = (kept / 'run.json').stat().st_mtime_ns
    shutil.rmtree(tmp_path / 'runs')
    done = call('--only', 'psilu0.5*_s0')
    assert (done.returncode, done.stdout) == (0, '1 of 1 networks are complete\n')
    assert (kept / 'run.json').stat().st_mtime_ns == before
    done = call('--only', 'psilu*_s0', '--minutes', 0)
    assert done.stdout == ('0 minutes are over; the same command resumes with psilu4-0.1_s0\n'
                           '1 of 2 networks are complete\n')
    listed = call('--only', 'psilu*_s0', '--list').stdout
    accuracy = math.floor(1000 * found.evaluation['attacks']['pgd-1']['accuracy']) / 10
    assert f'| psilu0.5-0.1 | 0 | {found.minutes:.1f} | ' in listed
    assert f'| {accuracy:.1f} |' in listed


def test_a_network_of_another_process_is_left_to_it(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened(tmp_path, STUDY)
    with exclusive_lock(tmp_path / 'runs' / 'relu_s0.study', 'study'):
        main([str(tmp_path / 'study.yaml'), '--output', str(tmp_path / 'runs'), '--only', 'relu_s0', '--', '--dataset',
              'digits'])
    assert capsys.readouterr().out == ("relu_s0 is another process's, which is at work on it\n"
                                       '0 of 1 networks are complete\n')
