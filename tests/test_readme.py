"""The pages: code blocks run or parse, links lead somewhere, numbers are those of the files that they name."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torture
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, Program
from torch.distributed.run import get_args_parser

import timm_paf
from timm_paf import __main__ as programs
from timm_paf.cycles import LONGEST_CYCLE
from timm_paf.data.corrupted import CORRUPTIONS
from timm_paf.evaluation import check_attacks
from timm_paf.speed import forward_flops
from timm_paf.training import config

README, HUB, RECIPES, RESULTS, BENCHMARKS, MODELS, WEIGHTS = PAGES = (
    'README.md', 'hub/README.md', 'hub/recipes/README.md', 'hub/results/README.md', 'tests/benchmarks/README.md',
    'timm_paf/models/README.md',
    'timm_paf/weights/README.md')
RESULT = ROOT / 'tests' / 'benchmarks' / 'results' / 'cpu.json'


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding='utf-8')


def words_of(page: str) -> str:
    """The page with its line breaks as spaces."""
    return ' '.join(text_of(page).split())


# ---- code blocks


class Block(NamedTuple):
    """A fenced block, with the HTML comment in the line before it."""

    page: str
    line: int
    language: str
    text: str
    comment: str


def blocks(page: str) -> list[Block]:
    lines, found, begin = text_of(page).splitlines(), [], -1
    for i, line in enumerate(lines):
        if line.startswith('```'):
            if begin < 0:
                begin = i
                continue
            before = re.fullmatch(r'<!-- (.*) -->', lines[begin - 1])
            found.append(Block(page, begin + 2, lines[begin][3:], '\n'.join(lines[begin + 1:i]),
                               before[1] if before else ''))
            begin = -1
    assert begin < 0, f'{page}:{begin + 1}: a block without an end'
    return found


ALL = [block for page in PAGES for block in blocks(page)]
WITH_PYTHON = sorted({block.page for block in ALL if block.language == 'python'})


def test_the_readme_is_short() -> None:
    assert len(text_of(README).splitlines()) <= 130


def test_every_block_is_of_a_kind_that_is_checked_and_fits_in_the_page() -> None:
    for block in ALL:
        studies = block.language == 'yaml' and block.text.startswith('recipe: ')  # tests/hub/test_study.py
        assert studies or block.language in ('python', 'bash', 'text'), f'{block.page}:{block.line}'
        assert re.fullmatch('|not run: .+|run|output of: timm-paf (quickstart|verify .*)', block.comment), block.comment
        long = [line for line in block.text.splitlines() if len(line) > 88]
        assert not long, f'{block.page}:{block.line}: {long}'
    assert [block.page for block in ALL if block.comment.startswith('not run')] == [HUB, MODELS, WEIGHTS]


# What a page's blocks need and a user has: data, a bundle, a checkpoint.
STAND_INS = {
    README: '''
import os, torch, timm_paf.data
if not os.environ.get('CIFAR10_ROOT'):
    images = torch.zeros(200, 32, 32, 3, dtype=torch.uint8)
    timm_paf.data.load_dataset = lambda name, train: timm_paf.data.ImageSet(
        name, images, torch.zeros(200, dtype=torch.int64), 10)
''',
    HUB: '''
import inspect, os, timm_paf, robustbench
os.makedirs('bundles')
os.symlink(os.path.join(ROOT, 'hub/models/wrn10_1_pssilu'), 'bundles/mine')
signature = inspect.signature(robustbench.benchmark)
robustbench.benchmark = lambda *args, **kwargs: (signature.bind(*args, **kwargs), 0.0)
''',
    MODELS: '''
import timm, timm_paf, torch
from safetensors.torch import save_file
save_file(timm.create_model('resnet18').state_dict(), 'resnet18.safetensors')
torch.save(timm_paf.load_bundle(os.path.join(ROOT, 'hub/models/wrn10_1_pssilu')).state_dict(), 'theirs.pt')
'''}

# Runs the blocks that stand in a file as JSON, one after the other, and writes what each printed.
DRIVER = '''
import contextlib, io, json, os, shlex, sys, traceback, warnings
warnings.simplefilter('ignore')
ROOT, before, blocks = json.load(open('blocks.json'))
names, printed = {'__name__': '__main__'}, []
exec(before, {'ROOT': ROOT, 'os': os})
for language, where, text in blocks:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if language == 'python':
            exec(compile(text, where, 'exec'), names)
        else:
            from timm_paf.__main__ import main
            for line in text.splitlines():
                main(shlex.split(line)[1:])
    printed.append(out.getvalue())
json.dump(printed, open('printed.json', 'w'))
'''


def assert_printed(line: str, out: str) -> None:
    """A line stands in an output, but for rounding in its numbers, which another processor may do otherwise."""
    number = r'-?\d+(?:\.\d+)?(?:e-?\d+)?'
    for found in out.splitlines():
        if re.sub(number, '#', found) == re.sub(number, '#', line):
            assert [*map(float, re.findall(number, found))] == pytest.approx(
                [*map(float, re.findall(number, line))], abs=0.021)
            return
    pytest.fail(f'{line!r} is not in the output:\n{out}')


@pytest.mark.parametrize('page', WITH_PYTHON)
def test_python_blocks_run_and_print_what_the_page_says(page: str, tmp_path: Path) -> None:
    chosen = [b for b in blocks(page) if b.comment == 'run' or (b.language == 'python' and not b.comment)]
    (tmp_path / 'blocks.json').write_text(json.dumps([str(ROOT), STAND_INS.get(page, ''), [
        (b.language, f'{b.page}, block at line {b.line}', b.text) for b in chosen]]))
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'PYTHONPATH': os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))}
    done = subprocess.run([sys.executable, '-c', DRIVER], cwd=tmp_path, env=env, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads((tmp_path / 'printed.json').read_text())
    outputs = {b.line: b.text.splitlines() for b in blocks(page) if b.language == 'text' and not b.comment}
    for block, out in zip(chosen, printed, strict=True):
        said = [line[2:] for line in block.text.splitlines() if line.startswith('# ')]
        said += outputs.pop(block.line + len(block.text.splitlines()) + 3, [])  # in a block below, after an empty line
        for line in said if block.language == 'python' else ():
            if page == README and not os.environ.get('CIFAR10_ROOT') and "'clean'" in line:
                assert f'{line.split(")")[0]})' in out
            else:
                assert_printed(line, out)
    assert not outputs, f'{page} has outputs of no block'
    if page == RECIPES:  # what the loop wrote is a run, and its bundle is one
        assert set(timm_paf.paf_parameters(timm_paf.load_bundle(tmp_path / 'bundles' / 'loop'))) == {
            'act.alpha', 'act.beta'}
        kept = json.loads((tmp_path / 'bundles' / 'loop' / 'evaluation.json').read_text())
        assert kept['complete']
        assert list(kept['attacks']) == ['clean', 'pgd-2']


@pytest.mark.slow
def test_the_loop_of_ones_own_gives_the_weights_of_the_program(tmp_path: Path, program: Program) -> None:
    """The page's loop, for as many steps, against train_robust.py."""
    block, = (b for b in blocks(RECIPES) if b.language == 'python')
    done = program('-c', f'import os; os.chdir({str(tmp_path)!r})\n{block.text}')
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / 'runs' / 'loop' / 'run.json').read_text())
    recipe = record['recipe']
    done = program('train_robust.py', '--model', recipe['model'], '--dataset', recipe['dataset'], '--epochs', 1,
                   '--batch-size', 64, '--max-steps', recipe['max_steps'], '--eps', '16/255', '--attack-step', '8/255',
                   '--attack-steps', 3, '--output', tmp_path / 'program')
    assert done.returncode == 0, done.stderr
    other = json.loads((tmp_path / 'program' / 'run.json').read_text())
    assert record.keys() == other.keys()
    assert {**record, **dict.fromkeys(('seconds', 'command'))} == {**other, **dict.fromkeys(('seconds', 'command'))}
    assert (tmp_path / 'runs' / 'loop' / 'metrics.jsonl').read_text() == (
        tmp_path / 'program' / 'metrics.jsonl').read_text()
    assert (tmp_path / 'runs' / 'loop' / 'model.safetensors').read_bytes() == (
        tmp_path / 'program' / 'model.safetensors').read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_quickstart_prints_what_the_page_says(tmp_path: Path) -> None:
    block, = (b for b in ALL if b.comment == 'output of: timm-paf quickstart')
    done = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'timm_paf', 'quickstart', '--output', tmp_path / 'q'],
                          cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in filter(None, block.text.splitlines()):
        assert line in done.stdout.splitlines()


def test_verify_prints_what_the_page_says(cifar10_root: Path, program: Program) -> None:
    block, = (b for b in ALL if b.comment.startswith('output of: timm-paf verify'))
    done = program('-m', *block.comment.replace('-', '_').split()[2:], '--data-dir', cifar10_root)
    assert done.returncode == 0, done.stderr
    said, shown = (re.sub(r'in \d+\.\d s', 'in seconds', text).splitlines() for text in (done.stdout, block.text))
    assert said == shown


# ---- commands


class Parsed(Exception):
    """A program parsed its arguments; here it ends."""


class Commands:
    """Follows the commands of a page, each to the parser of its program."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.folder, self.count = monkeypatch, ROOT, 0
        self.extras = re.findall(r'^(\w+) = \[', re.search(
            r'\[project.optional-dependencies\](.*?)\n\[', text_of('pyproject.toml'), re.DOTALL)[1], re.MULTILINE)

    def check(self, words: Sequence[str]) -> None:
        while re.fullmatch(r'[A-Z_0-9]+=\S+', words[0]):
            words = words[1:]
        first, *rest = words
        self.count += 1
        if first == 'timm-paf':
            self.program(rest[0], rest[1:])
        elif first == 'python':
            self.script(rest)
        elif first == 'accelerate':
            assert rest[0] == 'launch'
            found = launch_command_parser().parse_args(rest[1:])
            self.script([*(['-m'] if found.module else []), found.training_script, *found.training_script_args])
        elif first == 'torchrun':
            found = get_args_parser().parse_args(rest)
            self.script([*(['-m'] if found.module else []), found.training_script, *found.training_script_args])
        elif first == 'sbatch':
            launcher, *inner = shlex.split(rest[rest.index('--wrap') + 1])
            assert launcher == 'srun'
            self.check(inner)
        elif first == 'pip':
            assert rest[0] == 'install'
            name, _, extra = rest[1].rstrip(']').partition('[')
            assert name == '.'
            assert not extra or extra in self.extras
        elif first == 'make':
            assert not rest or re.search(rf'^{rest[0]}:', text_of('Makefile'), re.MULTILINE)
        elif first == 'cd':
            self.folder = self.folder / rest[0]
            assert self.folder.is_dir()
        else:
            assert words in (['hf', 'auth', 'login'], ['export', 'OMP_NUM_THREADS=1']), words

    def script(self, words: Sequence[str]) -> None:
        first, *rest = words
        if first == '-m' and rest[0] == 'timm_paf':
            self.program(rest[1], rest[2:])
        elif first == '-m':
            assert rest[0].startswith('hub.')
            self.parse(importlib.import_module(rest[0]), rest[1:])
        elif first == 'train_robust.py':
            self.program('train', rest)
        else:
            assert (self.folder / first).is_file()
            self.monkeypatch.syspath_prepend(str((self.folder / first).parent))
            self.parse(importlib.import_module(Path(first).stem), rest)

    def program(self, name: str, args: Sequence[str]) -> None:
        assert name in programs.PROGRAMS
        if name == 'train':
            config.check(config.parse(args))
        else:
            found = self.parse(importlib.import_module(f'hub.{name}'), args)
            if name == 'evaluate':
                check_attacks(found.attacks.split(','))

    def parse(self, module: Any, args: Sequence[str]) -> argparse.Namespace:
        """Runs a program's main as far as its options."""
        original = argparse.ArgumentParser.parse_args

        def parse_args(parser: argparse.ArgumentParser, *given: Any) -> None:
            raise Parsed(original(parser, *given))

        with self.monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, 'parse_args', parse_args)
            patch.setattr(sys, 'argv', [str(module.__file__), *args])  # some take them from there
            with pytest.raises(Parsed) as found:
                module.main(*[list(args)] * module.main.__code__.co_argcount)
        return found.value.args[0]


def commands(text: str) -> Iterator[list[str]]:
    for line in text.replace('\\\n', '').splitlines():
        if words := shlex.split(line, comments=True):
            yield words


@pytest.mark.parametrize('page', PAGES)
def test_programs_take_the_options_of_every_command(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = Commands(monkeypatch)
    for block in blocks(page):
        found.folder = ROOT
        for words in commands(block.text) if block.language == 'bash' else ():
            found.check(words)
    assert found.count >= (page not in (MODELS, WEIGHTS))


def test_a_command_with_a_mistake_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for line, error in (
            ('timm-paf train --epcohs 3 --output x', ValueError), ('timm-paf train --config no --output x', ValueError),
            ('timm-paf evaluate x --imges 3', SystemExit), ('timm-paf evaluate x --attacks pdg', ValueError),
            ('accelerate launch --mutli_gpu -m timm_paf train --output x', SystemExit),
            ('accelerate launch -m timm_paf train --mutli 3 --output x', ValueError),
            ('torchrun --nproc_per_node 2 -m timm_paf evaluate x --attakcs clean', SystemExit),
            ('sbatch --wrap "srun torchrun -m timm_paf train --ouput x"', ValueError),
            ('make nothing', AssertionError), ("pip install '.[none]'", AssertionError), ('rm -r x', AssertionError)):
        with pytest.raises(error):
            Commands(monkeypatch).check(next(commands(line)))


# ---- links


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r'```.*?```', '', path.read_text(encoding='utf-8'), flags=re.DOTALL)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
            for heading in re.findall(r'^#+ (.*)$', text, re.MULTILINE)}


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r'```.*?```', '', text_of(page), flags=re.DOTALL)
    links = re.findall(r'\[[^\]]*\]\(([^)\s]+)\)', text)
    assert links
    for link in links:
        if link.startswith('https://'):
            continue
        file, _, anchor = link.partition('#')
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link
    for name in re.findall(r'`((?:tests|timm_paf|hub)/[\w./]+)`', text):
        assert (ROOT / name).exists(), name


# ---- what the pages say of the code


def rows(text: str) -> list[list[str]]:
    """The cells of all tables in a text, without their headers."""
    lines = [line for line in text.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line.strip('|').split(' | ')] for line in lines if '---' not in line]


KINKS = ('prelu', 'prelu_plus', 'pelu', 'reblu')


def test_formulas_are_those_of_the_code() -> None:
    found = {row[0].strip('`'): row for row in rows(text_of(README)) if 'x' in row[1] and row[0].strip('`') in
             timm_paf.list_pafs()}
    assert list(found) == timm_paf.list_pafs()
    known = {'exp': math.exp, 'log': math.log, 'sqrt': math.sqrt, 'inf': math.inf,
             'sigmoid': lambda x: 1 / (1 + math.exp(-x))}
    for name, (_, formula, start, largest) in found.items():
        paf = timm_paf.create_paf(name)
        said = {key: float(value) for key, value in re.findall(r'(alpha|beta) ([\d.e-]+)', start)}
        assert said == pytest.approx({key: value.item() for key, value in paf.state_dict().items()})
        assert ('fixed' in start) == (not list(paf.parameters()))
        values = {'alpha': -0.75, 'beta': -0.25} if name == 'pssilu' else {'alpha': 1.75, 'beta': 0.25}
        values = {key: value for key, value in values.items() if key in said}
        paf = timm_paf.create_paf(name, **values).double()
        for x in (-3.0, -0.4, 0.0, 0.3, 2.0):
            expected = eval(formula.strip('`'), known, {**values, 'x': x})
            assert paf(torch.tensor([x], dtype=torch.float64)).item() == pytest.approx(expected, abs=1e-7), name
        for shape in (values, {}, *({'alpha': alpha} for alpha in (0.0, 1.0) if name in KINKS)):
            paf = timm_paf.create_paf(name, **shape).double()
            value = {key: value.item() for key, value in paf.state_dict().items()}
            assert timm_paf.curvature(paf) == pytest.approx(eval(largest.strip('`'), known, value)), (name, shape)


def test_the_papers_numbers_are_those_of_its_recipe() -> None:
    gains = re.search(r'PSSiLU gains ([\d.]+) points of AutoAttack accuracy over ReLU with ResNet-18, and ([\d.]+) '
                      'with WRN-28-10', words_of(README))
    assert gains
    recipe = text_of('hub/recipes/paper_linf.yaml')
    assert f'ResNet-18 with PSSiLU {gains[1]} points of AutoAttack over ReLU, WRN-28-10 {gains[2]}' in recipe


def test_the_table_of_recipes_is_that_of_the_folder() -> None:
    start = text_of(RECIPES).index('| recipe |')
    table = rows(text_of(RECIPES)[start:text_of(RECIPES).index('Each file names')])[1:]
    said = {name: row[2] for row in table for name in re.findall(r'`(\w+)`', row[0])}
    assert said.keys() == config.shipped_recipes().keys()
    for name, published in said.items():
        text = config.shipped_recipes()[name].read_text()
        for number in re.findall(r'\d+\.\d+', published):
            assert number in text or name == 'paper_l2_synthetic', name
        if published == 'none known':
            assert '% AutoAttack' not in text, name
    for name, (_, option) in config.options_of(config.Config).items():
        if f'`--{name.replace("_", "-")}`' in text_of(RECIPES):
            assert option.help
    for name in re.findall(r'`--([a-z-]+)', text_of(RECIPES)):
        option = name.replace('-', '_')
        assert {option, option.removeprefix('no_')} & {
            *config.options_of(config.Config), 'config', 'help', 'signals_to_handle'}, name


def test_the_defaults_are_those_of_a_recipe() -> None:
    recipe, words = timm_paf.Recipe(), words_of(RECIPES)
    assert (f'PGD-{recipe.threat.steps}, eps {recipe.threat.eps}, step {recipe.threat.step}, SGD with learning rate '
            f'{recipe.lr}, weight decay 5e-4 on every parameter, {recipe.schedule}, {recipe.paf_penalty:g} |beta| '
            f'added to the loss, the gradient of beta clipped to {recipe.paf_clip}') in words
    assert (recipe.optimizer, recipe.weight_decay) == ('sgd', 5e-4)
    paper = yaml.safe_load(text_of('hub/recipes/paper_linf.yaml'))
    for beside_the_text in ('clean_pass', 'attack_start', 'drop_last'):
        assert paper.pop(beside_the_text) != getattr(recipe, beside_the_text)
    assert {key: getattr(recipe, key) for key in paper if hasattr(recipe, key)} == {
        key: value for key, value in paper.items() if hasattr(recipe, key)}


def test_the_table_of_networks_is_that_of_timm() -> None:
    table = [row for row in rows(text_of(MODELS)) if row[-1].endswith('.py`')]
    said = {name: row[2].strip('`') for row in table for name in re.findall(r'`(\w+)`', row[0])}
    found = {name.removesuffix('_pssilu'): timm.models.model_entrypoint(name).__module__.rpartition('.')[2] + '.py'
             for name in timm.list_models('*_pssilu')}
    assert said == found


def test_the_arithmetic_of_several_gpus() -> None:
    with torch.device('meta'):
        models = [timm.create_model(f'{name}_pssilu') for name in ('wrn28_10', 'wrn70_16')]
        flops = [64 * forward_flops(model, torch.zeros(1, 3, 32, 32)) for model in models]
    start = text_of(RECIPES).index('| | WRN-28-10 |')
    table = rows(text_of(RECIPES)[start:text_of(RECIPES).index('A part of that is hidden')])[1:]
    said = [[float(cell.split()[0].replace(',', '')) for cell in row[1:]] for row in table]
    passes = 2 * 10 + 3  # ten to the logits and back to the image, one that goes to the weights too
    work = [passes * count / 1e12 for count in flops]
    data = [4e-6 * sum(p.numel() for p in model.parameters()) for model in models]
    ring8, ring64 = ([2 * (n - 1) / n * megabytes / 1e3 for megabytes in data] for n in (8, 64))
    expected = [work, data, ring8, ring64, [1e3 * w / 300 for w in work], [1e3 * g / 200 for g in ring8],
                [1e3 * g / 50 for g in ring64]]
    for told, computed in zip(said, expected, strict=True):
        assert told == pytest.approx(computed, rel=0.06)


# ---- what the pages say of the benchmarks


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a program of tests/benchmarks."""
    monkeypatch.syspath_prepend(str(ROOT / 'tests' / 'benchmarks'))
    return importlib.import_module


def test_speed_is_what_the_file_says(benchmark: Any) -> None:
    page, result = words_of(BENCHMARKS), json.loads(RESULT.read_text())
    table = benchmark('bench').table(RESULT)
    assert table.count('\n') > 5
    assert table in text_of(BENCHMARKS)
    hardware = result['hardware']
    assert f'{hardware["cpu"]}, {hardware["threads"]} threads, torch {result["versions"]["torch"]}' in page
    shares = [f'{row["share"]:.0%}' for row in result['rows'] if 'share' in row]
    assert f'{", ".join(shares[:-1])} and {shares[-1]} of a compiled attack step' in page
    ratio = {(row['what'].split(',')[0], row['case']): row['ratio'] for row in result['rows']
             if 'forward and input gradient' in row['what']}
    assert f'a fused PSSiLU costs {1 / ratio["activation", "PSSiLU fused"]:.2f} times a ReLU' in page
    assert f"torch's own SiLU costs {1 / ratio['activation', 'SiLU of torch']:.2f} times" in page
    steps = {row['what']: row['ratio'] for row in result['rows'] if row['case'].endswith(' compiled')
             and ('attack step' in row['what'] or 'training step' in row['what'])}
    assert f"WRN-28-10's attack step {steps['attack step, wrn28_10, batch 32']:.2f} (" in page
    assert f"WRN-16-4's training step {steps['training step PGD-10, wrn16_4, batch 128']:.2f} (" in page
    kept = json.loads(RESULT.with_name('cpu_keep_memory.json').read_text())
    speeds = [f'{row["ratio"]:.2f}' for row in kept['rows'] if row['case'] == 'PSSiLU compiled']
    assert f'{", ".join(speeds[:-1])} and {speeds[-1]} times the peer' in page
    loader = max(row['share_of_step'] for row in result['rows'] if 'share_of_step' in row)
    assert f'The loader takes {loader:.2%} of a step' in page
    saved = {row['case']: row['megabytes_per_image'] for row in result['rows'] if 'backward, wrn16_4' in row['what']}
    numbers = [saved[case] for case in ('PSSiLU', 'PSSiLU compiled', "RobustBench's PSSiLU")]
    assert '{:.1f} MB per image for the backward pass ({:.1f} compiled), the peer {:.1f}.'.format(*numbers) in page
    gigabytes = next(row['gigabytes_for_batch_512'] for row in result['rows'] if 'gigabytes_for_batch_512' in row)
    assert f'{gigabytes:.0f} GB at batch 512' in page

    attack = [ratio for what, ratio in steps.items() if what.startswith('attack step')]
    assert (f'On two threads of an {hardware["cpu"]}, a compiled attack step with PSSiLU is {min(attack):.2f} to '
            f"{max(attack):.2f} times as fast as with RobustBench's network") in words_of(README)
    assert hardware['threads'] == 2
    one, two = (row['images_per_second'] for row in result['rows'] if 'processes' in row['what'])
    assert f'at {two:.0f} images/s where one does {one:.0f}' in words_of(RECIPES)


def test_speed_in_bfloat16_is_what_the_file_says(benchmark: Any) -> None:
    page, path = words_of(BENCHMARKS), RESULT.with_name('cpu_bf16.json')
    result = json.loads(path.read_text())
    assert benchmark('bench').table(path) in text_of(BENCHMARKS)
    assert result['cpu_time']
    hardware = result['hardware']
    assert f'{hardware["cpu"]}, {hardware["threads"]} thread, torch {result["versions"]["torch"]}' in page
    attack, training = ({row['case']: row for row in result['rows'] if row['what'].startswith(what) and 'ratio' in row}
                        for what in ('attack step', 'training step'))
    gains = [rows[ours]['seconds'] / rows[f'{ours} bf16']['seconds']
             for rows, ours in ((attack, 'PSSiLU compiled'), (training, 'Trainer compiled'))]
    assert 'bf16 makes ours {:.2f} and {:.2f} times as fast as float32'.format(*gains) in page
    theirs = attack["RobustBench's PSSiLU bf16"]['ratio'], training["paper's loop bf16"]['ratio']
    assert 'gains {:.2f} and {:.2f} times from it'.format(*theirs) in page
    ours = [rows[case]['ratio'] for rows, case in (
        (attack, 'PSSiLU compiled bf16'), (attack, 'PSSiLU compiled'), (training, 'Trainer compiled bf16'),
        (training, 'Trainer compiled'))]
    assert ('On one thread with units for bf16 (WRN-16-4, CPU seconds) it is {:.2f} times as fast in bf16 and {:.2f} '
            'in float32, a PGD-10 training step {:.2f} and {:.2f}').format(*ours) in words_of(README)


def test_gpu_hours_are_what_the_program_computes(benchmark: Any) -> None:
    table = {row[0]: row[-1] for row in rows(text_of(RECIPES)) if len(row) == 4}
    for name, value in benchmark('hours').hours().items():
        said = next(hours for names, hours in table.items() if f'`{name}`' in names)
        assert said == f'{value:.2g}', name


def test_cycles_of_pgd_are_what_the_file_says(benchmark: Any) -> None:
    page, result = words_of(BENCHMARKS), json.loads(RESULT.with_name('cycles.json').read_text())
    cycles = benchmark('cycles')
    assert cycles.table(result) in text_of(BENCHMARKS)
    assert f'the first {result["images"]} test images' in page
    lengths = [int(length) for row in result['rows'] for length in row['cycle_lengths']]
    assert all(sum(row['cycle_lengths'].values()) == result['images'] for row in result['rows'])
    assert f'All images repeat, in cycles of {min(lengths)} to {max(lengths)} steps' in page
    assert max(lengths) <= LONGEST_CYCLE
    usual = [{attack['steps']: attack for attack in row['attacks']} for row in result['rows']
             if (row['eps'], row['step']) == ('8/255', '2/255')]
    short, long = ([1 / attacks[steps]['passes']['until repeated'] for attacks in usual] for steps in (50, 1000))
    assert f'gains {min(short):.2f} to {max(short):.2f} times of `pgd-50`' in page
    assert f'and {min(long):.1f} to {max(long):.1f} times of `pgd-1000`' in page
    more = [right['last step'] - right['every step'] for right in (attacks[50]['right_after'] for attacks in usual)]
    assert f'{min(more)} to {max(more)} more of the {result["images"]} images' in page


def test_evidence_is_what_the_file_says(benchmark: Any) -> None:
    result = json.loads(RESULT.with_name('verify.json').read_text())
    assert benchmark('verify').table(result) in text_of(BENCHMARKS)
    assert all(row['found'] == row['flips'] for flips in result['flips'].values() for row in flips)
    assert all(row['missing'] == [] and 'evidence that fails: 0 images' in ' '.join(row['said'])
               for row in result['cost'])
    networks = {path.parent.name for path in (ROOT / 'hub' / 'models').glob('*/config.json')}
    assert {row['network'] for row in result['cost']} == networks


def test_generated_corruptions_are_what_the_file_says() -> None:
    rows = json.loads(RESULT.with_name('corruptions.json').read_text())['rows']
    same, images = (sum(row[key] for row in rows) for key in ('same', 'images'))
    assert same == images
    assert [row['corruption'] for row in rows] == [*CORRUPTIONS]
    assert f'{same:,} of {images:,}, {images // 75} test images' in words_of(BENCHMARKS)


def test_what_corruptions_cost_is_what_the_records_say() -> None:
    assert ('Contrast, fog and frost cost all of them most; pixelate, JPEG, Gaussian and shot noise at most 3 points '
            'each.') in words_of(RESULTS)
    for path in (ROOT / 'hub' / 'results' / 'corruptions').glob('*/evaluation.json'):
        found = json.loads(path.read_text())
        cost = {name: 100 * (found['attacks']['clean']['accuracy'] - sum(shares) / len(shares))
                for name, shares in found['corruptions']['by'].items()}
        assert {*sorted(cost, key=cost.__getitem__)[-3:]} == {'contrast', 'fog', 'frost'}
        assert max(cost[name] for name in ('pixelate', 'jpeg_compression', 'gaussian_noise', 'shot_noise')) <= 3


def test_parity_is_what_the_file_says() -> None:
    page, result = words_of(HUB), json.loads(RESULT.with_name('parity.json').read_text())
    ours, theirs = (''.join(batch['verdicts'] for batch in result[side]) for side in ('ours', 'robustbench'))
    assert ours == theirs
    assert len(ours) == result['n'] == 1000
    ratios = [b['cpu_seconds'] / a['cpu_seconds'] for a, b in zip(result['ours'], result['robustbench'])]
    total = sum(b['cpu_seconds'] for b in result['robustbench']) / sum(a['cpu_seconds'] for a in result['ours'])
    assert f'{ours.count("1")} robust with both' in page
    assert f'{total:.2f} times the CPU seconds ({min(ratios):.2f} to {max(ratios):.2f} by batch' in page


def test_speed_on_a_gpu_is_what_the_file_says(benchmark: Any) -> None:
    page, path = words_of(BENCHMARKS), RESULT.with_name('H200.json')
    result = json.loads(path.read_text())
    rows = result['rows']
    assert benchmark('bench').table(path) in text_of(BENCHMARKS)
    assert f'on one {result["hardware"]["gpu"].removeprefix("1 x ")} (torch {result["versions"]["torch"]}, ' in page

    def both(case: str, key: str, form: str = '{:.0%}') -> str:
        first, second = (form.format(row[key]) for row in rows
                         if row['case'] == case and 'training step' in row['what'])
        return f'{first} and {second}'

    rate, papers = '{:,.0f}', "paper's loop"
    speed = [both(case, 'images_per_second', rate) for case in (papers + ' bf16', papers + ', ReLU')]
    in_bf16 = benchmark('hours').speed_in_bf16
    speed.append(' and '.join(rate.format(in_bf16(rows, name)) for name in ('resnet18', 'wrn28_10')))
    assert f"The paper's loop in bf16 does {speed[0]} images/s" in page
    assert f'and {speed[1]} with ReLU' in page
    readme = words_of(ROOT / 'README.md')
    steps = [row['ratio'] for row in rows if row['case'] == 'PSSiLU compiled bf16']
    assert (f'On an NVIDIA H200 in bf16 it is {steps[0]:.2f} and {steps[1]:.2f} times as fast (ResNet-18, WRN-28-10)'
            in readme)
    assert f'PGD-10 training does {speed[2]} images/s' in readme
    profiled = 'Trainer compiled, profiled'
    busy, convolutions = both(profiled, 'busy'), both(profiled, 'share_convolutions')
    assert f'busy for {busy} of its time; convolutions are {convolutions}' in page
    assert f'reaches {both("Trainer compiled", "share_of_best_rate")} of the rate of the fastest' in page
    assert f'({rows[0]["gflops"] / 1e3:.0f} TFLOP/s)' in page
    alone = [row['seconds'] for row in rows
             if 'input gradient' in row['what'] and row['case'] in ('ReLU', 'PSSiLU fused')]
    single, half = alone[1] / alone[0], alone[3] / alone[2]
    assert f'costs {single:.2f} times a ReLU in float32 and {half:.2f} times in bf16' in page


def test_what_an_h100_showed_is_what_the_files_say(benchmark: Any) -> None:
    page, path = words_of(BENCHMARKS), RESULT.with_name('H100.json')
    graphs, tests = (json.loads(file.read_text()) for file in (path, path.with_name('H100_tests.json')))
    assert benchmark('bench').table(path) in text_of(BENCHMARKS)
    gpu = graphs['hardware']['gpu'].removeprefix('1 x ').removesuffix(' 80GB HBM3')
    assert gpu == tests['hardware']['gpu'].removeprefix('1 x ').removesuffix(' 80GB HBM3')
    assert f'On an {gpu} the {tests["passed"]} tests passed, beside {tests["beside"]}' in page
    assert [each['failed'] for each in (tests, *tests['later'])] == [0, 0]
    assert 'another day the one of `--cuda-graphs`' in page
    assert 'cuda_graphs' in tests['later'][0]['test']
    assert f'one {gpu}, torch {graphs["versions"]["torch"]};' in page
    assert f'{graphs["command"].partition("benchmarks/")[2].partition(" --output")[0]}' in page
    same = next(row for row in graphs['rows'] if row['case'] == 'both ways')
    assert (same['same_pixels_after_pgd'], same['losses_differ_by']) == (1.0, 0.0)


def test_what_was_tried_to_break_it_is_what_the_file_says() -> None:
    result = json.loads(RESULT.with_name('torture.json').read_text())
    assert torture.table(result['rows']) in text_of(BENCHMARKS)
    page, hardware = words_of(BENCHMARKS), result['hardware']
    assert f'{hardware["cpu"]}, {hardware["cores"]} cores, torch {result["versions"]["torch"]}' in page
    assert f'seed {result["seed"]}, {result["seconds"] / 60:.0f} minutes' in page
    count = {word: sum(row['tried'] for row in result['rows'] if word in row['what']) for word in (
        'SIGKILL', 'flipped', 'hostile')}
    bad = sum(row[key] for row in result['rows'] for key in ('lost', 'silent', 'ran'))
    assert (f'{count["SIGKILL"]} kills, {count["flipped"]:,} flipped bits and {count["hostile"]} hostile files: '
            f'{bad} lost, wrong in silence or run') in words_of(README)


def test_families_table_is_what_the_file_says(benchmark: Any) -> None:
    table = benchmark('families').table(json.loads(RESULT.with_name('families.json').read_text()))
    assert table.count('\n') > 5
    assert table in text_of(BENCHMARKS)


def test_fine_tuning_table_is_what_the_file_says(benchmark: Any) -> None:
    result = json.loads(RESULT.with_name('finetune.json').read_text())
    table, text = benchmark('finetune').table(result), words_of(BENCHMARKS)
    assert table.count('\n') == 8
    assert table in text_of(BENCHMARKS)
    assert '/root' not in json.dumps(result)
    setting, learned = result['setting'], [
        [result['networks'][f'{act}_s{seed}']['learned']['act.alpha'] for seed in result['seeds']]
        for act in ('pssilu', 'pssilu_alpha10')]
    assert f'{setting["max_steps"]} steps of {setting["batch_size"]} images' in text
    for values in learned:
        assert f'{min(values):.2f} to {max(values):.2f}' in text
    for name, row in result['networks'].items():  # a count is that of its verdicts
        counts = [found['verdicts'].count('1') == found['correct'] for key, found in row.items() if key != 'learned']
        assert all(counts), name


def bound(value: float) -> str:
    """The smallest upper bound with one digit."""
    unit = 10.0 ** math.floor(math.log10(value))
    return f'{math.ceil(value / unit) * unit:.1g}'


def test_starting_as_relu_is_what_the_file_says() -> None:
    found = re.search(
        r"([^.]+) start as ReLU; ([^;]+) with alpha 100 start within ([\d.]+) standard deviations of ReLU's logits, "
        r'with alpha 10 within ([\d.]+); ([^;]+) is not close \(([\d.]+); \[`relu_start\.json`\]\(([\w./]+)\)',
        words_of(MODELS))
    assert found, 'the sentence has other words: this test reads its numbers'
    same, near, at_100, at_10, far, distance, file = found.groups()
    result = json.loads(((ROOT / MODELS).parent / file).read_text())
    assert result['logits_difference_in'] == "standard deviations of the ReLU network's logits"

    def names(text: str) -> set[str]:
        return {name.lower().replace('+', '_plus') for name in re.findall(r'[A-Z][\w+]+', text)}

    start = {row['activation']: row for row in result['rows'] if row['start']}
    assert sorted(start) == sorted(timm_paf.list_pafs()) == sorted([*names(same), *names(near), *names(far)])
    difference = {act: row['logits_difference']['max'] for act, row in start.items()}
    assert {act for act, value in difference.items() if value == 0} == names(same)
    assert {act for act, row in start.items() if row['values'].get('alpha') == 100} == names(near)
    assert at_100 == bound(max(difference[act] for act in names(near)))
    found_10 = [row for row in result['rows'] if row['values'].get('alpha') == 10]
    assert {row['activation'] for row in found_10} == names(near)
    assert at_10 == bound(max(row['logits_difference']['max'] for row in found_10))
    assert distance == f'{max(difference[act] for act in names(far)):.1f}'
