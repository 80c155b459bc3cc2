"""A submission to RobustBench, tried in a copy of RobustBench."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import ROOT, unlike_its_verdicts
from networks import images, randomise
from safetensors.torch import load_file, save_file

from hub import bundle, evaluate
from hub.publish import networks, paf_networks, submission
from hub.sources import load_run
from timm_paf.activations import list_pafs
from timm_paf.data.corrupted import CORRUPTIONS
from timm_paf.files import read_record, sha256
from timm_paf.models.cifar_net import VARIANTS
from timm_paf.models.resnet_cifar import ResNetCifar
from timm_paf.models.wide_resnet import WideResNet
from timm_paf.weights import load_bundle

TRAINED = ROOT / 'hub' / 'models' / 'wrn10_1_pssilu'
THREAT = {'norm': 'Linf', 'eps': '8/255', 'step': '2/255', 'steps': 10, 'random_start': True}
FLAGS = {
    'title': 'Some "quoted" title', 'paper': 'https://example.org/paper', 'authors': "Ada B, Carl O'D",
    'venue': 'arXiv, Nov 2026', 'licence': 'MIT', 'code': 'https://example.org/code', 'gdrive-id': 'x' * 33}
needs_robustbench = pytest.mark.skipif(
    importlib.util.find_spec('robustbench') is None, reason="needs pip install 'timm-paf[robustbench]'")


def make_run(path: Path, architecture: str = 'wrn10_1_pssilu', n: int = 10_000, **recipe: Any) -> Path:
    """The directory of a run with another architecture, weights and threat model, and as if ``n`` were evaluated."""
    path.mkdir(parents=True)
    run = json.loads((TRAINED / 'run.json').read_text())
    evaluation = unlike_its_verdicts(read_record(TRAINED / 'evaluation.json'), n)
    weights = load_file(TRAINED / 'model.safetensors')
    if architecture != run['architecture']:
        torch.manual_seed(0)
        weights = randomise(timm.create_model(architecture)).state_dict()
    save_file(weights, path / 'model.safetensors', {'format': 'pt'})
    run['recipe'].update(recipe)
    run['architecture'] = architecture
    evaluation.update(weights_sha256=sha256(path / 'model.safetensors'), threat_model=run['recipe']['threat'])
    write(path, run, evaluation)
    return path


def write(path: Path, run: dict[str, Any] | None = None, evaluation: dict[str, Any] | None = None) -> None:
    for name, record in (('run', run), ('evaluation', evaluation)):
        if record is not None:
            (path / f'{name}.json').write_text(json.dumps(record))


def submit(run: Path, out: Path, name: str = 'Ours2026Small', **changes: str | None) -> Path:
    flags = {**FLAGS, **{key.replace('_', '-'): value for key, value in changes.items()}}
    bundle.main([str(run), '--out', str(out), '--name', name,
                 *(f'--{key}={value}' for key, value in flags.items() if value is not None)])
    return out / 'robustbench'


def refused(run: Path, out: Path, **changes: Any) -> str:
    with pytest.raises(SystemExit) as exit_info:
        submit(run, out, **changes)
    message = str(exit_info.value.code)
    assert message.startswith('hub.bundle: no submission to RobustBench: ')
    assert '\n' not in message
    assert not out.exists()
    return message


@needs_robustbench
@pytest.mark.parametrize('act', list_pafs(plain=True))
@pytest.mark.parametrize('arch', ['wrn10_1', 'wrn16_2', 'resnet18', 'resnet18_w8', 'resnet50'])
def test_the_zoos_network_is_ours(arch: str, act: str) -> None:
    """The same logits; those of the file that is written for RobustBench bit for bit."""
    torch.manual_seed(0)
    ours = randomise(timm.create_model(f'{arch}_{act}', num_classes=7)).eval()
    found = networks.zoo_class({'architecture': f'{arch}_{act}', 'num_classes': 7, 'recipe': {'act_kwargs': {}}})
    assert found is not None
    theirs = networks.robustbench_model(found)
    theirs.load_state_dict(networks.robustbench_state(ours, theirs))
    x = images()
    with torch.no_grad():
        expected, logits = ours(x), theirs.eval()(x)
    if found.module == networks.OWN_FILE:
        assert torch.equal(logits, expected)
    else:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_robustbenchs_own_class_is_taken_where_there_is_one() -> None:
    def module(architecture: str) -> str | None:
        found = networks.zoo_class({'architecture': architecture, 'num_classes': 10, 'recipe': {'act_kwargs': {}}})
        return found and found.module

    assert module('wrn28_10_pssilu') == module('wrn70_16_silu') == 'paf_wide_resnet'
    assert module('resnet34_relu') == 'resnet'
    assert module('wrn28_10_pelu') == module('resnet18_pssilu') == module('resnet50_silu') == networks.OWN_FILE
    assert module('resnet18_w32_relu') == module('resnet18_w8_pssilu') == networks.OWN_FILE
    assert module('resnet18_in_relu') is module('preact_resnet18_relu') is None
    assert module('convnext_tiny') is module('resnet18') is module('resnet18_tv') is None


def test_every_width_is_a_class_of_robustbench() -> None:
    """The sizes of its weights are those of our network, for every name of the two families."""
    for name, variant in VARIANTS.items():
        found = networks.zoo_class({'architecture': name, 'num_classes': 10, 'recipe': {'act_kwargs': {}}})
        assert (found is not None) == (variant.model_cls in (WideResNet, ResNetCifar))
        if found is not None and variant.act == 'pelu':
            with torch.device('meta'):
                ours, theirs = timm.create_model(name), networks.robustbench_model(found)
            shapes = [sorted(p.shape for p in model.parameters()) for model in (ours, theirs)]
            assert shapes[0] == shapes[1], name


@pytest.mark.parametrize(('name', 'expected'), [
    ('wrn28_10_pssilu', 'WideResNet-28-10-PSSiLU'), ('wrn34_20_relu', 'WideResNet-34-20'),
    ('wrn28_10_silu.wang2023_cifar10_linf', 'WideResNet-28-10-SiLU'), ('resnet34_pelu', 'ResNet-34-PELU'),
    ('resnet18_w16_pssilu', 'ResNet-18-PSSiLU (base width 16)'), ('resnet18_w8_relu', 'ResNet-18 (base width 8)'),
    ('resnet50_relu', 'ResNet-50'), ('resnet50_in_psilu', 'ResNet-50-PSiLU'),
    ('wide_resnet50_2_in_relu', 'WideResNet-50-2'), ('preact_resnet34_silu', 'PreActResNet-34-SiLU'),
    ('convnext_tiny', 'convnext_tiny'), ('resnet18', 'resnet18'), ('wrn1_1_relu', 'wrn1_1_relu')])
def test_names_of_architectures(name: str, expected: str) -> None:
    assert networks.architecture_name(name) == expected


def test_words_of_a_record_do_not_become_code() -> None:
    """What stands in run.json, which may have been downloaded, is neither run nor written into Python."""
    def found(**changes: Any) -> networks.ZooClass | None:
        record = {'architecture': 'wrn10_1_softplus', 'num_classes': 10, 'recipe': {'act_kwargs': {'beta': 2.5}}}
        return networks.zoo_class({**record, **changes})

    assert found().call.startswith('PAF_WideResNet(nn.Softplus(beta=2.5, threshold=20.0), depth=10, ')
    for value in ('exit()', float('inf'), None, [1]):
        assert found(recipe={'act_kwargs': {'beta': value}}) is None
    assert found(architecture='wrn10_1_softplus, exit()') is None
    with pytest.raises(ValueError, match='format code'):
        found(num_classes='exit()')


def test_the_architecture_file_needs_torch_alone() -> None:
    tree = ast.parse(Path(paf_networks.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {f'{"." * node.level}{node.module}' for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition('.')[0] for name in names} - sys.stdlib_module_names == {'torch'}


def test_its_pafs_start_as_ours_do() -> None:
    for name in list_pafs():
        theirs = dict(paf_networks.PAF(name).named_parameters())
        ours = timm.create_model(f'wrn10_1_{name}').act.state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in ours)


COPY = """
import sys, timm_paf  # which lets RobustBench find AutoAttack
import robustbench, torch
from robustbench import benchmark
from robustbench.utils import list_available_models, load_model
folder, data, *names = sys.argv[1:]
assert robustbench.__file__.startswith(folder), robustbench.__file__
x = torch.load('x.pt')
logits = {}
for name in names:
    model = load_model(name, model_dir='models', dataset='cifar10', threat_model='Linf')
    with torch.no_grad():
        logits[name] = type(model).__module__, model(x)
torch.save(logits, 'logits.pt')
list_available_models('cifar10', 'Linf')
for name in names[:2] if data else ():
    model = load_model(name, model_dir='models', dataset='cifar10', threat_model='Linf')
    clean, robust = benchmark(model, model_name=name, dataset='cifar10', threat_model='Linf', eps=8 / 255,
                              data_dir=data, n_examples=3, to_disk=True)
    print('benchmark', name, clean, robust)
"""


def install(submitted: Path, copy: Path) -> None:
    """What a pull request would do, with the files of the submission alone."""
    zoo = copy / 'robustbench' / 'model_zoo'
    shutil.copytree(submitted / 'model_info', copy / 'model_info', dirs_exist_ok=True)
    record = next((submitted / 'model_info').rglob('*.json'))
    weights = copy / 'models' / record.parent.relative_to(submitted / 'model_info') / f'{record.stem}.pt'
    weights.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(submitted / weights.name, weights)
    for file in submitted.glob(f'{networks.OWN_FILE}.py'):
        shutil.copy(file, zoo / 'architectures')
    entry = (submitted / 'zoo_entry.py').read_text()
    imports, entries = re.search(r'^(from .*\n)\n\w+ = \[\n(.*)\]\n\Z', entry, re.MULTILINE | re.DOTALL).groups()
    file = zoo / f'{record.parent.parent.name}.py'
    source, n = re.subn(r'^linf = OrderedDict\(\s*\[\n', lambda found: found[0] + entries, file.read_text(),
                        flags=re.MULTILINE)
    assert n == 1
    file.write_text(imports + source)


def robustbench_copy(folder: Path) -> Path:
    found = importlib.util.find_spec('robustbench')
    shutil.copytree(found.submodule_search_locations[0], folder / 'robustbench',
                    ignore=shutil.ignore_patterns('__pycache__'))
    return folder


def run_in_copy(copy: Path, data: str, *names: str) -> str:
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', COPY, str(copy), data, *names], cwd=copy, text=True, capture_output=True,
        timeout=600, env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(copy), str(ROOT)]), 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    return done.stdout


NETWORKS = {'Ours2026Small': 'wrn10_1_pssilu', 'Ours2026Small_PELU': 'wrn10_1_pelu',
            'Ours2026Small_R18': 'resnet18_relu', 'Ours2026Small_R18-PSSiLU': 'resnet18_pssilu',
            'Ours2026Small_R18-w8': 'resnet18_w8_relu', 'Ours2026Small_R18-w16': 'resnet18_w16_pssilu'}


@needs_robustbench
def test_robustbench_runs_what_is_submitted(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Its own load_model, list_available_models and, on real CIFAR-10, benchmark."""
    copy, runs = robustbench_copy(tmp_path / 'copy'), {}
    for name, architecture in NETWORKS.items():
        runs[name] = make_run(tmp_path / 'runs' / name, architecture)
        install(submit(runs[name], tmp_path / 'bundles' / name, name=name), copy)
    x = images()
    torch.save(x, copy / 'x.pt')
    data = os.environ.get('CIFAR10_ROOT', '')
    output = run_in_copy(copy, data, *NETWORKS)
    logits = torch.load(copy / 'logits.pt')
    for name, run in runs.items():
        module, found = logits[name]
        with torch.no_grad():
            torch.testing.assert_close(found, load_run(run)(x), rtol=1e-5, atol=1e-5)
        assert module.startswith('robustbench.model_zoo.architectures.')
        assert re.search(rf'\*\*{name}\*\*.*\[Some "quoted" title\]\(https://example.org/paper\).*52.60%.*27.10%.*'
                         'arXiv, Nov 2026', output)
    if not data:
        pytest.skip('loaded; benchmark() needs CIFAR10_ROOT')
    verdicts = {attack: result['verdicts'][:3] for attack, result
                in json.loads((TRAINED / 'evaluation.json').read_text())['attacks'].items()}
    clean, robust = map(float, re.search(r'^benchmark Ours2026Small (\S+) (\S+)$', output, re.MULTILINE).groups())
    assert clean == pytest.approx(verdicts['clean'].count('1') / 3)
    assert robust == pytest.approx(verdicts['autoattack'].count('1') / 3)
    # its to_disk updates the record that is there, so ours has the fields that it looks for
    record = json.loads((copy / 'model_info' / 'cifar10' / 'Linf' / 'Ours2026Small.json').read_text())
    assert record['clean_acc'] == str(round(100 * clean, 2))
    assert record['authors'] == FLAGS['authors']


@needs_robustbench
def test_the_record_has_the_numbers_and_the_words(tmp_path: Path) -> None:
    submitted = submit(make_run(tmp_path / 'run'), tmp_path / 'b')
    names = sorted(str(path.relative_to(submitted)) for path in submitted.rglob('*') if path.is_file())
    assert names == ['Ours2026Small.pt', 'model_info/cifar10/Linf/Ours2026Small.json', 'new_model.md', 'zoo_entry.py']
    record = json.loads((submitted / 'model_info' / 'cifar10' / 'Linf' / 'Ours2026Small.json').read_text())
    assert record == {
        'link': FLAGS['paper'], 'name': FLAGS['title'], 'authors': FLAGS['authors'], 'additional_data': False,
        'number_forward_passes': 1, 'dataset': 'cifar10', 'venue': FLAGS['venue'],
        'architecture': 'WideResNet-10-1-PSSiLU', 'eps': '8/255', 'clean_acc': '52.60', 'reported': '27.10',
        'autoattack_acc': '27.10', 'unreliable': False}
    form = (submitted / 'new_model.md').read_text()
    for line in ('# Paper Information', '- **Paper Title**: Some "quoted" title',
                 "- **Paper authors**: Ada B, Carl O'D", '- **Threat Model**: Linf',
                 '- **eps**: 8/255', '- **Clean accuracy**: 52.60',
                 '- **Robust accuracy**: 27.10', '- **Additional data**: false',
                 f'- **Checkpoint and code**: https://drive.google.com/file/d/{"x" * 33}, https://example.org/code'):
        assert line in form.splitlines()
    assert 'all 10,000 test images of cifar10, seed 0' in form
    assert [line[:5] for line in form.splitlines() if line.startswith('- [')] == ['- [x]', '- [x]', '- [x]']
    assert form.endswith('located here:\n')
    assert '(standard version, pyautoattack 0.2.0)' in form
    assert not re.search(r'\bNone\b|[{}<]', form.partition('-->')[2])
    checked = subprocess.run(['sha256sum', '-c', 'SHA256SUMS'], cwd=tmp_path / 'b', capture_output=True)
    assert checked.returncode == 0


@needs_robustbench
def test_eps_is_spelled_as_robustbench_does(tmp_path: Path) -> None:
    threat = {'norm': 'L2', 'eps': '1/2', 'step': '1/8', 'steps': 10, 'random_start': True}
    submitted = submit(make_run(tmp_path / 'run', 'resnet18_pelu', threat=threat), tmp_path / 'b',
                       licence='https://example.org/licence')
    record = json.loads((submitted / 'model_info' / 'cifar10' / 'L2' / 'Ours2026Small.json').read_text())
    assert (record['eps'], record['architecture']) == ('0.5', 'ResNet-18-PELU')
    assert '\nl2 = [' in (submitted / 'zoo_entry.py').read_text()
    form = (submitted / 'new_model.md').read_text()
    assert '- **eps**: 0.5' in form
    assert [line[:5] for line in form.splitlines() if line.startswith('- [')] == ['- [x]', '- [ ]', '- [x]']
    assert 'so that it can be added. (paf_networks.py, attached; https://example.org/code)\n' in form
    assert form.endswith('located here: https://example.org/licence\n')


@needs_robustbench
@pytest.mark.parametrize('bundle', sorted(TRAINED.parent.iterdir()), ids=lambda path: path.name)
def test_committed_bundles_have_what_the_code_writes(bundle: Path, tmp_path: Path) -> None:
    run, evaluation = read_record(bundle / 'run.json'), read_record(bundle / 'evaluation.json')
    submission.write(tmp_path, bundle.name, run, evaluation, None)
    for file in tmp_path.iterdir():
        assert (bundle / 'robustbench' / file.name).read_bytes() == file.read_bytes()
    model, theirs = load_bundle(bundle), networks.robustbench_model(networks.zoo_class(run))
    theirs.load_state_dict(torch.load(bundle / 'robustbench' / f'{bundle.name}.pt', weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(images()), model(images()), rtol=1e-5, atol=1e-5)


def parts_of_form(text: str) -> tuple[list[str], list[str], list[str]]:
    """Its headings, the words in bold before a colon, and the words of its boxes without what stands in brackets."""
    joined = re.sub(r'\n  +', ' ', text)  # an item may have several lines
    boxes = re.findall(r'^- \[[ x]\] (.*)', joined, re.MULTILINE)
    return (re.findall(r'^#+ .*', text, re.MULTILINE), re.findall(r'^- (\*\*.*?\*\*:)', text, re.MULTILINE),
            [' '.join(re.sub(r'\([^()]*\)', '', box).split()) for box in boxes])


@needs_robustbench
@pytest.mark.parametrize('architecture', ['wrn10_1_pssilu', 'resnet18_w8_pssilu'])
def test_the_form_is_robustbenchs(architecture: str, tmp_path: Path, robustbench_checkout: Path) -> None:
    template = (robustbench_checkout / '.github' / 'ISSUE_TEMPLATE' / 'new-model.md').read_text()
    submitted = submit(make_run(tmp_path / 'run', architecture), tmp_path / 'b')
    form = (submitted / 'new_model.md').read_text()
    headings, labels, boxes = parts_of_form(template)
    assert headings.pop(3) == '## Model 2'  # where more are to follow
    assert parts_of_form(form) == (headings, labels, boxes)
    title = re.search('^title: "(.*)<', template, re.MULTILINE)[1]
    assert f'Title of the issue: {title}Ours2026Small' in form


@needs_robustbench
def test_unreliable_is_what_autoattack_warned_of(tmp_path: Path) -> None:
    for name, flags, expected in (('none', [], False), ('some', ['zero gradients'], True), ('unknown', None, None)):
        run = make_run(tmp_path / name)
        found = json.loads((run / 'evaluation.json').read_text())
        found['attacks']['autoattack']['flags'] = flags
        if flags is None:
            del found['attacks']['autoattack']['flags']
        write(run, evaluation=found)
        record = json.loads(next(submit(run, tmp_path / f'{name}-b').rglob('Ours2026Small.json')).read_text())
        assert record.get('unreliable') is expected


@needs_robustbench
def test_the_attack_package_is_the_one_that_ran(tmp_path: Path) -> None:
    run = make_run(tmp_path / 'run')
    found = json.loads((run / 'evaluation.json').read_text())
    for i, (versions, words) in enumerate((
            ({'pyautoattack': '0.2.0'}, 'pyautoattack 0.2.0'), ({'autoattack': '0.1'}, 'autoattack 0.1'),
            ({'autoattack': f'0.1+{"a3" * 20}'}, f'autoattack 0.1, commit {"a3" * 20}'),
            ({'autoattack': 'unknown'}, 'autoattack of unknown version'), ({}, 'autoattack of unknown version'))):
        write(run, evaluation={**found, 'versions': versions})
        assert f'(standard version, {words}) on all' in (submit(run, tmp_path / f'{i}') / 'new_model.md').read_text()


@needs_robustbench
def test_corruptions_are_submitted_to_their_board(tmp_path: Path) -> None:
    """With AutoAttack to two boards, alone to one."""
    def submitted(name: str, **changes: Any) -> Path:
        run = make_run(tmp_path / f'run-{name}', **changes.pop('recipe', {}))
        found = json.loads((run / 'evaluation.json').read_text())
        section = {'accuracy': 0.456, 'generated': False, 'n': 10_000, 'data_sha256': 'a' * 64, 'seconds': 1.0,
                   'seed': 0, 'by': {key: [0.656, 0.556, 0.456, 0.356, 0.256] for key in CORRUPTIONS}}
        write(run, evaluation={**found, 'corruptions': section, **changes})
        return submit(run, tmp_path / name)

    both = submitted('both')
    linf, corruptions = (json.loads((both / 'model_info' / 'cifar10' / threat / 'Ours2026Small.json').read_text())
                         for threat in ('Linf', 'corruptions'))
    assert 'corruptions_acc' not in linf
    assert linf['autoattack_acc'] == '27.10'
    assert corruptions == {
        'link': FLAGS['paper'], 'name': FLAGS['title'], 'authors': FLAGS['authors'], 'additional_data': False,
        'number_forward_passes': 1, 'dataset': 'cifar10', 'venue': FLAGS['venue'],
        'architecture': 'WideResNet-10-1-PSSiLU', 'eps': '8/255', 'clean_acc': '52.60', 'reported': '45.60',
        'corruptions_acc': '45.60', 'footnote': 'Trained for Linf robustness with eps 8/255.'}
    form = (both / 'new_model.md').read_text()
    assert re.findall(r'^## .*|(?<=\*\*Threat Model\*\*: ).*|(?<=\*\*eps\*\*: ).*|(?<=Robust accuracy\*\*: ).*', form,
                      re.MULTILINE) == ['## Model 1', 'Linf', '8/255', '27.10',
                                        '## Model 2', 'Common Corruptions', 'N/A', '45.60']
    entry = (both / 'zoo_entry.py').read_text()
    assert re.findall(r'^\w+ = \[$', entry, re.MULTILINE) == ['linf = [', 'common_corruptions = [']
    compile(entry, 'entry', 'exec')
    clean = {'clean': json.loads((tmp_path / 'run-both' / 'evaluation.json').read_text())['attacks']['clean']}
    alone = submitted('alone', attacks=clean)
    assert [path.name for path in (alone / 'model_info' / 'cifar10').iterdir()] == ['corruptions']
    plain = submitted('plain', recipe={'threat': {**THREAT, 'eps': '0'}}, attacks=clean)
    record = json.loads(next(plain.rglob('Ours2026Small.json')).read_text())
    assert not {'eps', 'footnote'} & record.keys()

    run = tmp_path / 'run-both'
    found = json.loads((run / 'evaluation.json').read_text())
    for changes, words in (({'generated': True}, "(generated corruptions, not the benchmark's files)"),
                           ({'n': 1000}, '(1,000 images of each corruption and severity, not 10,000)')):
        write(run, evaluation={**found, 'attacks': clean, 'corruptions': {**found['corruptions'], **changes}})
        assert f'its corruptions have no board {words}' in refused(run, tmp_path / 'b')
        info = submission.model_info(json.loads((run / 'run.json').read_text()),
                                     json.loads((run / 'evaluation.json').read_text()))
        assert (info['clean_acc'], info['corruptions_acc']) == ('52.60', None)


@needs_robustbench
def test_generated_images_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / 'run', synthetic={'name': 'ddpm.npz', 'n': 1_000_000, 'fraction': 0.5})
    assert 'it needs --additional-data;' in refused(run, tmp_path / 'b', name='ours') + ';'
    assert "--additional-data is 'maybe', expected yes or no" in refused(run, tmp_path / 'b', additional_data='maybe')
    for answer in ('yes', 'no'):
        submitted = submit(run, tmp_path / answer, additional_data=answer)
        record = json.loads(next(submitted.rglob('Ours2026Small.json')).read_text())
        assert record['additional_data'] == (answer == 'yes')
        assert '149,760 synthetic images' in record['footnote']
        assert record['footnote'] in (submitted / 'new_model.md').read_text()
    plain = make_run(tmp_path / 'plain')
    assert 'run.json names no generated images' in refused(plain, tmp_path / 'b', additional_data='no')


@needs_robustbench
def test_all_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / 'run', n=1000)
    changes = {'paper': 'arxiv', 'authors': None, 'venue': ' ', 'licence': 'GPL', 'gdrive_id': 'ID'}
    message = refused(run, tmp_path / 'b', name='mine', **changes)
    for words in ('it needs --authors, --venue;', "--paper is 'arxiv', expected a URL", "--licence is 'GPL'",
                  "--gdrive-id is 'ID'", "--name is 'mine'", 'of the first 1000 test images of cifar10',
                  '--n 10000'):
        assert words in message
    assert '--title' not in message
    assert "--name is Dai2021Parameterizing, which RobustBench's zoo has" in refused(
        run, tmp_path / 'b', name='Dai2021Parameterizing')


@needs_robustbench
def test_numbers_that_robustbench_would_not_take(tmp_path: Path) -> None:
    run = make_run(tmp_path / 'run')
    record, found = (json.loads((run / name).read_text()) for name in ('run.json', 'evaluation.json'))
    attacks, few = found['attacks'], unlike_its_verdicts(copy.deepcopy(found), 9999)
    for change, words in (
            ({'standard': False}, 'fast evaluation'), (few, 'of the first 9999 test images'),
            ({'attacks': {'clean': attacks['clean']}}, 'expected clean, autoattack of 10,000'),
            ({'threat_model': {**found['threat_model'], 'eps': '4/255'}}, 'Linf 4/255, expected'),
            ({'dataset': 'cifar100'}, 'images of cifar100'),
            ({'images': '1:10001'}, 'of the test images 1 to 10000 (counted from 0) of cifar10')):
        write(run, evaluation={**found, **change})
        assert words in refused(run, tmp_path / 'b')
    (run / 'evaluation.json').unlink()
    assert 'there is no evaluation.json, run timm-paf evaluate --n 10000' in refused(run, tmp_path / 'b')
    threat = {**record['recipe']['threat'], 'eps': '31/1000'}
    write(run, {**record, 'recipe': {**record['recipe'], 'threat': threat}}, {**found, 'threat_model': threat})
    assert 'the run is for cifar10 Linf 31/1000, expected one of cifar10 Linf 8/255' in refused(run, tmp_path / 'b')
    write(run, {**record, 'data': {**record['data'], 'name': 'digits'}}, found)
    assert 'the run is for digits' in refused(run, tmp_path / 'b')


@needs_robustbench
@pytest.mark.slow
def test_from_10000_images_to_a_submission(cifar10_root: Path, tmp_path: Path) -> None:
    """Nothing made up: a network that is almost always wrong, so that AutoAttack has few images to attack."""
    run = make_run(tmp_path / 'run')
    weights = load_file(run / 'model.safetensors')
    save_file({k: -v if k.startswith('fc.') else v for k, v in weights.items()}, run / 'model.safetensors',
              {'format': 'pt'})
    evaluate.main([str(run), '--data-dir', str(cifar10_root), '--n', '10000', '--attacks', 'clean,autoattack',
                   '--overwrite'])
    found = json.loads((run / 'evaluation.json').read_text())['attacks']
    submitted = submit(run, tmp_path / 'b')
    record = json.loads(next(submitted.rglob('Ours2026Small.json')).read_text())
    assert record['clean_acc'] == f'{found["clean"]["correct"] / 100:.2f}'
    assert record['autoattack_acc'] == f'{found["autoattack"]["correct"] / 100:.2f}'
    assert found['autoattack']['correct'] <= found['clean']['correct'] < 1000
    copy = robustbench_copy(tmp_path / 'copy')
    install(submitted, copy)
    torch.save(images(), copy / 'x.pt')
    assert f'{record["clean_acc"]}%' in run_in_copy(copy, str(cifar10_root), 'Ours2026Small')
