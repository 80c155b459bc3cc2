"""Against the real RobustBench, AutoAttack and timm's registry."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import Hub
from safetensors.torch import save_file
from torch import Tensor, nn

import timm_paf
from hub.sources import find_name
from timm_paf import robustbench as rb
from timm_paf.files import environment, imported_version

needs_robustbench = pytest.mark.skipif(
    importlib.util.find_spec('robustbench') is None, reason="needs pip install 'timm-paf[robustbench]'")
needs_pyautoattack = pytest.mark.skipif(
    importlib.util.find_spec('pyautoattack') is None, reason="needs pip install 'timm-paf[robustbench]'")
Edit = Callable[[dict[str, Any]], Any]


def random_model(seed: int = 0, **kwargs: Any) -> nn.Module:
    """A wrn10_1_pssilu in eval mode, of which no value is the initial one."""
    torch.manual_seed(seed)
    model = timm.create_model('wrn10_1_pssilu', **kwargs)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and value.ndim == 1:
                value.copy_(torch.rand_like(value) * (0.3 if name.endswith('beta') else 1) + 0.1)
    return model.eval()


def make_bundle(path: Path, seed: int = 0, edit: Edit = lambda config: None, **model_args: Any) -> Path:
    path.mkdir(parents=True)
    model = random_model(seed, **model_args)
    save_file(model.state_dict(), path / 'model.safetensors')
    config: dict[str, Any] = {
        'architecture': 'wrn10_1_pssilu', 'num_classes': model.num_classes, 'num_features': 64,
        'pretrained_cfg': {
            'custom_load': False, 'input_size': [3, 32, 32], 'mean': [0, 0, 0], 'std': [1, 1, 1], 'crop_pct': 1.0,
            'interpolation': 'bicubic', 'num_classes': model.num_classes, 'pool_size': [8, 8], 'first_conv': 'conv1',
            'classifier': 'fc'},
        'timm_paf': {
            'version': '0.1.0', 'dataset': 'cifar10', 'threat_model': {'norm': 'Linf', 'eps': '8/255'}}}
    if model_args:
        config['model_args'] = model_args
    edit(config)
    (path / 'config.json').write_text(json.dumps(config))
    (path / 'README.md').write_text('a card')
    write_sums(path)
    return path


def write_sums(path: Path) -> None:
    files = ('README.md', 'config.json', 'model.safetensors')
    (path / 'SHA256SUMS').write_text(
        ''.join(f'{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}\n' for name in files))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / 'bundle')


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """timm's registry lasts as long as the process: each test has a name of its own."""
    return f'Test-{abs(hash(request.node.name))}'


@pytest.fixture
def no_autoattack(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As before the first import of autoattack; what a test imports under that name is gone after it."""
    saved = {key: sys.modules.pop(key) for key in list(sys.modules) if key.split('.')[0] == 'autoattack'}
    yield
    for key in [key for key in sys.modules if key.split('.')[0] == 'autoattack']:
        del sys.modules[key]
    sys.modules.update(saved)


def run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=120, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- autoattack, found ---


@needs_robustbench
def test_robustbench_imports_after_timm_paf() -> None:
    out = run('''
import sys
import timm_paf
print(sorted({'robustbench', 'autoattack', 'pyautoattack', 'pandas'} & set(sys.modules)))
from robustbench.utils import load_model
print(load_model.__module__)''')
    assert out.splitlines()[-2:] == ['[]', 'robustbench.utils']


@needs_robustbench
def test_robustbench_imports_after_a_failed_import() -> None:
    out = run('''
try:
    import robustbench
    print('autoattack')
except ModuleNotFoundError as error:
    print(error.name)
import timm_paf
import robustbench
print(robustbench.benchmark.__module__)''')
    assert out.splitlines()[-2:] == ['autoattack', 'robustbench.eval']


def test_the_real_autoattack_wins(no_autoattack: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'autoattack').mkdir()
    (tmp_path / 'autoattack' / '__init__.py').write_text('marker = 1\n')
    (tmp_path / 'autoattack' / 'checks.py').write_text('')
    monkeypatch.syspath_prepend(tmp_path)
    importlib.reload(rb)
    module = importlib.import_module('autoattack')
    assert module.marker == 1
    assert importlib.import_module('autoattack.checks').__file__ == str(tmp_path / 'autoattack' / 'checks.py')
    with pytest.raises(ModuleNotFoundError, match=r"'autoattack\.state'"):  # pyautoattack has one, the real one has not
        importlib.import_module('autoattack.state')


def commit(folder: Path) -> str:
    """Commits all that is in a folder; the commit's hash."""
    git = ['git', '-C', str(folder), '-c', 'user.name=x', '-c', 'user.email=x@example.org']
    for command in (['init', '-q'], ['add', '-A'], ['commit', '-qm', 'x']):
        subprocess.run([*git, *command], check=True)
    return subprocess.run([*git, 'rev-parse', 'HEAD'], check=True, capture_output=True, text=True).stdout.strip()


@needs_pyautoattack
def test_versions_are_of_what_an_import_gives(
        no_autoattack: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of what is installed beside it."""
    def found(name: str = 'autoattack') -> dict[str, str]:
        recorded = environment()['versions']
        assert recorded.items() >= imported_version(name).items()
        assert len({'autoattack', 'pyautoattack'} & recorded.keys()) == 1
        assert 'autoattack' not in sys.modules, 'asking must not import it'
        return imported_version(name)

    stand_in = {'pyautoattack': importlib.metadata.version('pyautoattack')}
    assert found() == stand_in
    assert imported_version('no_such_package') == {}
    folders = {}
    for name in ('plain', 'clone', 'wheel', 'git', 'sources'):
        folders[name] = tmp_path / name
        (folders[name] / 'autoattack').mkdir(parents=True)
        (folders[name] / 'autoattack' / '__init__.py').write_text('')
    head = commit(folders['clone'])

    def metadata(folder: Path, origin: dict[str, Any] | None = None) -> None:  # as pip writes it
        info = folder / 'autoattack-0.1.dist-info'
        info.mkdir(parents=True)
        (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: autoattack\nVersion: 0.1\n')
        if origin is not None:
            (info / 'direct_url.json').write_text(json.dumps(origin))

    metadata(folders['wheel'])
    metadata(folders['git'], {'url': 'https://x', 'vcs_info': {'vcs': 'git', 'commit_id': 'a' * 40}})
    metadata(tmp_path / 'site', {'url': folders['sources'].as_uri(), 'dir_info': {'editable': True}})
    expected = {'plain': 'unknown', 'clone': f'unknown+{head}', 'wheel': '0.1', 'git': f'0.1+{"a" * 40}',
                'sources': '0.1'}
    monkeypatch.syspath_prepend(tmp_path / 'site')
    assert found() == stand_in, 'metadata is no package'
    for name, version in expected.items():
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folders[name])
            assert found() == {'autoattack': version}
    (folders['clone'] / 'autoattack' / '__init__.py').write_text('changed = 1\n')
    monkeypatch.syspath_prepend(folders['clone'])
    assert found() == {'autoattack': f'unknown+{head}-dirty'}
    monkeypatch.syspath_prepend(folders['wheel'])
    importlib.import_module('autoattack')
    monkeypatch.syspath_prepend(folders['plain'])
    assert imported_version('autoattack') == {'autoattack': '0.1'}, 'what is imported runs, not what is first now'


@needs_pyautoattack
def test_autoattack_is_pyautoattack(no_autoattack: None) -> None:
    spec = importlib.util.find_spec('autoattack')
    assert spec is not None
    assert 'autoattack' not in sys.modules, 'asking must not import it'
    import autoattack
    import autoattack.state
    import pyautoattack.state
    from autoattack import checks
    from autoattack.autoattack import AutoAttack
    from autoattack.state import EvaluationState

    assert AutoAttack is autoattack.AutoAttack
    assert issubclass(AutoAttack, pyautoattack.AutoAttack)
    assert EvaluationState is pyautoattack.state.EvaluationState
    assert checks is pyautoattack.checks
    assert autoattack.state is pyautoattack.state
    assert pyautoattack.state.__spec__.name == 'pyautoattack.state', 'the other module is left as it was'
    assert importlib.util.find_spec('autoattack.nothing') is None
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'autoattack\.nothing'"):
        importlib.import_module('autoattack.nothing')
    assert importlib.reload(autoattack) is autoattack


@needs_pyautoattack
def test_autoattack_in_threads(no_autoattack: None) -> None:
    names = ['autoattack', 'autoattack.state', 'autoattack.autoattack', 'autoattack.checks'] * 4
    barrier = threading.Barrier(len(names))

    def load(name: str) -> Any:
        barrier.wait()
        return importlib.import_module(name)

    with ThreadPoolExecutor(len(names)) as pool:
        modules = list(pool.map(load, names))
    assert len({id(module) for module in modules}) == 4
    assert modules[0].AutoAttack is modules[2].AutoAttack


def test_no_autoattack_at_all(no_autoattack: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'pyautoattack', None)
    assert importlib.util.find_spec('autoattack') is None
    for name in ('autoattack', 'autoattack.state'):
        with pytest.raises(ModuleNotFoundError, match=r"^[^\n]*pip install 'timm-paf\[robustbench\]'$") as info:
            importlib.import_module(name)
        assert info.value.name == 'autoattack'


def test_finder_is_installed_once() -> None:
    before = list(sys.meta_path)
    importlib.reload(timm_paf)
    importlib.reload(rb)
    assert sys.meta_path == before
    assert [type(finder).__name__ for finder in before].count('_AutoAttackFinder') == 1


# --- autoattack, with the original's interface ---


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A net, images, and the labels it gives them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 49, 10)).eval()
    x = torch.rand(6, 3, 16, 16)
    return net, x, net(x).argmax(1)


@needs_pyautoattack
@pytest.mark.parametrize('attack', ['apgd-ce', 'square'])
def test_adapter_computes_what_pyautoattack_does(problem: Any, attack: str, tmp_path: Path, capsys: Any) -> None:
    import autoattack
    import pyautoattack

    net, x, y = problem
    log = tmp_path / 'log.txt'
    log.write_text('before\n')
    ours = autoattack.AutoAttack(net, 'Linf', 4 / 255, 3, True, [attack], 'custom', False, 'cpu', str(log))
    theirs = pyautoattack.AutoAttack(
        net, norm='Linf', eps=4 / 255, seed=3, attacks=[attack], version='custom', device='cpu')
    assert (ours.attacks_to_run, ours.seed, ours.verbose) == ([attack], 3, True)
    ours.apgd.n_iter = theirs.apgd.n_iter = 10
    ours.square.n_queries = theirs.square.n_queries = 50
    x_adv = ours.run_standard_evaluation(x, y, 4)
    expected, labels = theirs.run_standard_evaluation(x, y, batch_size=4)
    assert torch.equal(x_adv, expected)
    assert not torch.equal(x_adv, x), 'nothing was attacked'
    printed = capsys.readouterr().out
    assert f'robust accuracy after {attack.upper()}' in printed
    assert log.read_text() == 'before\n' + printed

    both = ours.run_standard_evaluation(x, y, bs=4, return_labels=True)
    assert torch.equal(both[0], expected)
    assert torch.equal(both[1], labels)
    alone = ours.run_standard_evaluation_individual(x, y, bs=4)
    assert list(alone) == [attack]
    assert torch.equal(alone[attack], expected)
    assert ours.attacks_to_run == [attack]


@needs_pyautoattack
def test_adapter_is_silent_on_request(problem: Any, tmp_path: Path, capsys: Any) -> None:
    import autoattack

    net, x, y = problem
    log = tmp_path / 'log.txt'
    attack = autoattack.AutoAttack(
        net, eps=4 / 255, seed=0, verbose=False, attacks_to_run=['apgd-ce'], version='custom', device='cpu',
        log_path=log)
    attack.apgd.n_iter = 5
    attack.run_standard_evaluation(x, y)
    assert autoattack.AutoAttack(net, verbose=False, device='cpu').attacks_to_run[0] == 'apgd-ce'
    captured = capsys.readouterr()
    assert captured.out + captured.err == ''
    assert not log.exists()
    attack.run_standard_evaluation(x * 0, y * 0 + net(x[:1] * 0).argmax())  # warnings are not the verbose ones
    attack.logger.warning('it seems to be a randomized defense!')
    assert 'it seems' in capsys.readouterr().out
    assert 'it seems' in log.read_text()


@needs_pyautoattack
@pytest.mark.parametrize('version', ['standard', 'plus', 'rand'])
@pytest.mark.parametrize('norm', ['Linf', 'L2', 'L1'])
def test_adapter_versions(problem: Any, version: str, norm: str, capsys: Any) -> None:
    import autoattack
    import pyautoattack

    def settings(attack: Any) -> Any:
        parts = {part: vars(getattr(attack, part)) for part in ('apgd', 'apgd_targeted', 'fab', 'square')}
        return attack.attacks_to_run, attack.epsilon, {
            part: {k: v for k, v in values.items() if isinstance(v, (bool, int, float, str))}
            for part, values in parts.items()}

    ours = autoattack.AutoAttack(problem[0], norm=norm, eps=0.5, seed=1, version=version, device='cpu')
    theirs = pyautoattack.AutoAttack(problem[0], norm=norm, eps=0.5, seed=1, version=version)
    assert settings(ours) == settings(theirs)
    assert f'setting parameters for {version} version' in capsys.readouterr().out


@needs_pyautoattack
def test_adapter_errors(problem: Any) -> None:
    from autoattack import AutoAttack

    net, x, y = problem
    with pytest.raises(ValueError, match="version='custom'"):
        AutoAttack(net, attacks_to_run=['apgd-ce'], device='cpu')
    with pytest.raises(ValueError, match="'standart'; expected one of standard, plus, rand, or 'custom'"):
        AutoAttack(net, version='standart', device='cpu')
    with pytest.raises(AssertionError):
        AutoAttack(net, norm='L0', device='cpu')
    with pytest.raises(NotImplementedError, match='auto-attack'):
        AutoAttack(net, is_tf_model=True, device='cpu')
    with pytest.raises(ValueError, match='Attack not supported'):
        AutoAttack(net, attacks_to_run=['apgd'], version='custom', device='cpu').run_standard_evaluation(x, y)


# --- bundles ---


def logits(model: nn.Module) -> Tensor:
    assert not model.training
    with torch.no_grad():
        return model(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize('act_kwargs', [None, {'frozen': 'alpha'}])
def test_load_bundle(tmp_path: Path, act_kwargs: Any) -> None:
    args = {'act_kwargs': act_kwargs} if act_kwargs else {}
    path = make_bundle(tmp_path / 'bundle', 3, **args)
    model = rb.load_bundle(str(path))
    assert torch.equal(logits(model), logits(random_model(3, **args)))
    assert len(timm_paf.paf_parameters(model)) == (1 if act_kwargs else 2)
    config = rb.read_bundle(path)
    assert config['model_args'] == args
    assert config['timm_paf']['threat_model']['eps'] == '8/255'


@needs_robustbench
def test_robustbench_loads_a_registered_bundle(bundle: Path, name: str) -> None:
    from robustbench.utils import load_model

    with warnings.catch_warnings():
        warnings.simplefilter('error')
        full_name = rb.register(bundle, name)
        assert rb.register(str(bundle), name) == full_name
    assert full_name == f'{name.lower().replace("-", "_")}_cifar10_linf'
    model = load_model(name, dataset='cifar10', threat_model='Linf')
    assert torch.equal(logits(model), logits(random_model()))
    # what it would be saved or uploaded as is a name that needs no registration
    assert model.pretrained_cfg['architecture'] == 'wrn10_1_pssilu'


@needs_robustbench
def test_names_are_those_of_robustbench() -> None:
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
    from robustbench.utils import DATASET_CLASSES

    assert {dataset.value: n for dataset, n in DATASET_CLASSES.items()} == rb._NUM_CLASSES
    assert {dataset.value for dataset in BenchmarkDataset} == set(rb._NUM_CLASSES)
    assert {threat.value.replace('_3d', '') for threat in ThreatModel} == set(rb._THREATS)


@needs_robustbench
def test_own_name_and_names_of_the_zoos(bundle: Path, tmp_path: Path) -> None:
    from robustbench.utils import load_model

    for name, warned in (
            ('wrn10_1_silu', False), ('Dai2021Parameterizing', True), ('sehwag2021proxy-ResNest152', True)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            rb.register(bundle, name)
        assert [str(one.message) for one in caught] == [
            f"{name} is a model of RobustBench too; load_model('{name}', dataset='cifar10', threat_model='Linf') gives "
            f'{bundle} from now on'] * warned
        assert torch.equal(logits(load_model(name)), logits(random_model()))
    # a name that has weights in timm_paf keeps them
    ours = timm_paf.list_weights('wrn10_1_pssilu.timm_paf_*')[0].bundle
    shutil.copytree(ours, tmp_path / 'copy')
    for same in (ours, tmp_path / 'copy'):
        assert rb.register(same, 'wrn10_1_pssilu') == 'wrn10_1_pssilu_cifar10_linf'
    with pytest.raises(ValueError, match=f'is registered for {ours}; register {bundle} under another name'):
        rb.register(bundle, 'wrn10_1_pssilu')
    assert torch.equal(logits(load_model('wrn10_1_pssilu')), logits(rb.load_bundle(ours)))


def test_timm_knows_a_registered_bundle(bundle: Path, name: str) -> None:
    full_name = rb.register(bundle, name)
    assert timm.is_model(full_name)
    assert timm.list_models(full_name) == [full_name]
    assert timm.list_models(full_name, module='robustbench', pretrained=True) == [full_name]
    assert timm.get_pretrained_cfg(full_name).file == str(bundle / 'model.safetensors')
    assert timm.get_pretrained_cfg(full_name).mean == (0, 0, 0)
    assert getattr(rb, full_name).__name__ in rb.__all__
    source = logits(random_model())
    assert torch.equal(logits(timm.create_model(full_name, pretrained=True).eval()), source)
    assert not torch.equal(logits(timm.create_model(full_name).eval()), source)
    features = timm.create_model(full_name, pretrained=True, features_only=True).eval()
    assert [f.shape[1] for f in features(torch.rand(1, 3, 32, 32))] == [16, 32, 64]
    with pytest.raises(RuntimeError, match='Invalid pretrained tag'):
        timm.create_model(f'{full_name}.other', pretrained=True)


def test_another_checkpoint(bundle: Path, name: str, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / 'other', 1) / 'model.safetensors'
    full_name = rb.register(bundle, name)
    model = timm.create_model(full_name, pretrained=True, checkpoint_path=str(other)).eval()
    assert torch.equal(logits(model), logits(random_model(1)))


def test_loading_is_strict(bundle: Path, name: str) -> None:
    state = random_model().state_dict()
    state['more'] = state.pop('fc.bias')
    save_file(state, bundle / 'model.safetensors')
    write_sums(bundle)
    full_name = rb.register(bundle, name)
    with pytest.raises(ValueError, match=r'^[^\n]*does not fit WideResNet: missing fc\.bias; unexpected more[^\n]*$'):
        timm.create_model(full_name, pretrained=True)
    with pytest.raises(ValueError, match=r'does not fit .* missing fc\.bias'):
        rb.load_bundle(bundle)


def test_other_num_classes(bundle: Path, name: str) -> None:
    full_name = rb.register(bundle, name)
    for pretrained in (True, False):
        with pytest.raises(ValueError, match='num_classes is 100; expected 10'):
            timm.create_model(full_name, pretrained=pretrained, num_classes=100)


def test_files_are_checked_again_when_they_are_loaded(bundle: Path, name: str) -> None:
    full_name = rb.register(bundle, name)
    save_file(random_model(1).state_dict(), bundle / 'model.safetensors')
    with pytest.raises(ValueError, match='sha256'):
        timm.create_model(full_name, pretrained=True)


def test_reload_keeps_the_names(bundle: Path, name: str) -> None:
    full_name = rb.register(bundle, name)
    importlib.reload(rb)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert rb.register(bundle, name) == full_name


def test_local_dir_of_timm(bundle: Path) -> None:
    if tuple(map(int, timm.__version__.split('.')[:3])) < (1, 0, 16):
        pytest.skip(f'timm {timm.__version__} has no local-dir: names; needs timm 1.0.16')
    model = timm.create_model(f'local-dir:{bundle}', pretrained=True).eval()
    assert torch.equal(logits(model), logits(random_model()))


def edit(**values: Any) -> Edit:
    return lambda config: config.update(values)


def in_section(**values: Any) -> Edit:
    return lambda config: config['timm_paf'].update(values)


@pytest.mark.parametrize(('change', 'message'), [
    (lambda config: config.pop('timm_paf'), r'has no timm_paf section; expected'),
    (edit(timm_paf=None), r'has no timm_paf section; expected'),
    (edit(architecture=None), r'architecture is None; expected str'),
    (edit(architecture='wrn1_1_nothing'), r"architecture is 'wrn1_1_nothing'; expected.*pip install"),
    (edit(num_classes='10'), r"num_classes is '10'; expected int"),
    (edit(model_args=[]), r'model_args is \[\]; expected dict'),
    (edit(pretrained_cfg={'newer': 1}), r'pretrained_cfg has newer; expected .*pip install'),
    (in_section(threat_model={}), r'threat_model\.norm is None; expected str'),
    (in_section(threat_model='Linf'), r"threat_model is 'Linf'; expected dict"),
    (in_section(dataset=None), r'dataset is None; expected str'),
])
def test_foreign_config(tmp_path: Path, change: Edit, message: str) -> None:
    path = make_bundle(tmp_path / 'bundle', edit=change)
    for load in (rb.read_bundle, rb.load_bundle, lambda path: rb.register(path, 'foreign')):
        with pytest.raises(ValueError, match=f'^[^\n]*config.json[^\n]*{message}[^\n]*$'):
            load(path)


@pytest.mark.parametrize(('change', 'message'), [
    (in_section(dataset='digits'), r"dataset is 'digits'; RobustBench knows cifar10, cifar100, imagenet"),
    (in_section(threat_model={'norm': 'L1', 'eps': '12'}), r"threat model is 'L1'; RobustBench knows Linf, L2"),
    (in_section(dataset='cifar100'), r'num_classes is 10; RobustBench expects 100 for cifar100'),
])
def test_not_of_robustbench(tmp_path: Path, change: Edit, message: str) -> None:
    path = make_bundle(tmp_path / 'bundle', edit=change)
    with pytest.raises(ValueError, match=f'^[^\n]*{message}[^\n]*load_bundle[^\n]*$'):
        rb.register(path, 'foreign')
    assert torch.equal(logits(rb.load_bundle(path)), logits(random_model()))


def test_missing_files(tmp_path: Path) -> None:
    for path in (tmp_path / 'nothing', tmp_path / 'config.json'):
        with pytest.raises(FileNotFoundError, match='is no directory; expected a model bundle'):
            rb.register(path, 'missing')
    for missing in ('config.json', 'model.safetensors'):
        path = make_bundle(tmp_path / missing.split('.')[0])
        (path / missing).unlink()
        with pytest.raises(FileNotFoundError, match=f'^[^\n]*has no {missing}; expected[^\n]*$'):
            rb.register(path, 'missing')


def test_damaged_files(bundle: Path, tmp_path: Path) -> None:
    weights = bundle / 'model.safetensors'
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r'^[^\n]*safetensors: sha256 is \w{64}; SHA256SUMS expects \w{64}; [^\n]*$'):
        rb.register(bundle, 'damaged')
    for part in (whole[:-1000], whole[:100], b''):
        weights.write_bytes(part)
        with pytest.raises(ValueError, match=r'^[^\n]*safetensors is cut off or no safetensors file[^\n]*$'):
            rb.register(bundle, 'damaged')
    weights.write_bytes(whole)
    (bundle / 'README.md').write_text('edited')  # not loaded, so not checked
    rb.read_bundle(bundle)
    (bundle / 'config.json').write_text((bundle / 'config.json').read_text() + ' ')
    with pytest.raises(ValueError, match=r'config\.json: sha256 is'):
        rb.read_bundle(bundle)
    (bundle / 'config.json').write_text('{')
    with pytest.raises(ValueError, match=r'^[^\n]*config\.json is no JSON[^\n]*$'):
        rb.read_bundle(bundle)
    for sums, message in (('', 'names no model.safetensors'), ('abc\n', "has the line 'abc'; expected")):
        path = make_bundle(tmp_path / message)
        (path / 'SHA256SUMS').write_text(sums)
        with pytest.raises(ValueError, match=message):
            rb.read_bundle(path)
        (path / 'SHA256SUMS').unlink()
        rb.read_bundle(path)


@pytest.mark.parametrize('error', ["ImportError('of torchdiffeq')", "AttributeError('np.float')"])
def test_a_robustbench_that_does_not_start_hinders_no_name(
        error: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'broken' / 'robustbench').mkdir(parents=True)
    (tmp_path / 'broken' / 'robustbench' / '__init__.py').write_text(f'raise {error}')
    monkeypatch.syspath_prepend(tmp_path / 'broken')
    for module in [name for name in sys.modules if name.partition('.')[0] == 'robustbench']:
        monkeypatch.delitem(sys.modules, module)
    assert rb.register(bundle, f'not_started_{error[0]}') == f'not_started_{error[0]}_cifar10_linf'.lower()
    with pytest.raises(ValueError, match=rf'RobustBench, which may have it, does not start: .*{error[-9:-2]}'):
        find_name('Some2099Entry')


def test_names_that_are_taken(bundle: Path, name: str, tmp_path: Path) -> None:
    rb.register(bundle, name)
    other = make_bundle(tmp_path / 'other', 1)
    with pytest.raises(ValueError, match=f'is registered for {bundle}; register {other} under another name'):
        rb.register(other, name)

    def foreign_cifar10_linf(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return nn.Identity()

    if not timm.is_model('foreign_cifar10_linf'):
        timm.models.register_model(foreign_cifar10_linf)
    with pytest.raises(ValueError, match=r'^foreign_cifar10_linf is another timm model; register'):
        rb.register(bundle, 'Foreign')
    for bad in ('', 'resnet50.a1_in1k', 'a b', '../x', 'ä'):
        with pytest.raises(ValueError, match='expected letters, digits, _ and -'):
            rb.register(bundle, bad)


# --- the Hub ---


def test_hub(tmp_path: Path) -> None:
    try:
        importlib.import_module('huggingface_hub.utils').HfHubHTTPError  # noqa: B018  loads what it needs for HTTP
    except ImportError as error:
        pytest.skip(f'huggingface_hub does not import here: {error}')
    with Hub() as hub:
        hub.add('org/model', make_bundle(tmp_path / 'on_the_hub', 5), branches=('main', 'v1'))
        out = run(f'''
import timm, torch
from timm_paf import robustbench as rb
name = rb.register('org/model', 'a')
assert rb.register('org/model', 'a') == name
assert rb.register('org/model@v1', 'b') != name
for source in ('org/other', 'org/model@v2'):
    try:
        rb.register(source, 'c')
    except FileNotFoundError as error:
        print(error)
try:
    rb.register('org/model@v1', 'a')
except ValueError as error:
    print(error)
model = timm.create_model(name, pretrained=True).eval()
x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
assert torch.equal(rb.load_bundle('org/model')(x), model(x))
torch.save(model(x).detach(), {str(tmp_path / 'logits.pt')!r})
''', HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / 'home'), HF_HUB_DISABLE_XET='1')
    assert torch.equal(torch.load(tmp_path / 'logits.pt', weights_only=True), logits(random_model(5)))
    lines = out.splitlines()[-3:]
    assert lines[0].startswith('org/other is no directory here, and on the Hub: ')
    assert lines[1].startswith('org/model@v2 is no directory here, and on the Hub: ')
    assert lines[2] == 'a_cifar10_linf is registered for org/model; register org/model@v1 under another name'
    assert {request.rpartition('/')[2] for request in hub.asked('.*/resolve/')} == {'config.json', 'model.safetensors'}


# --- benchmark() ---


@needs_robustbench
def test_benchmark(bundle: Path, name: str, capsys: Any) -> None:
    root = os.environ.get('CIFAR10_ROOT')
    if not root:
        pytest.skip('needs CIFAR-10: set CIFAR10_ROOT to the folder of cifar-10-batches-py')
    from robustbench import benchmark
    from robustbench.utils import load_model
    from torchvision.datasets import CIFAR10

    n = 16
    data = CIFAR10(root, train=False)
    x, y = torch.from_numpy(data.data[:n]).permute(0, 3, 1, 2) / 255, torch.tensor(data.targets[:n])
    # Statistics of these images make the net depend on its input: then a few steps of the first attack suffice.
    source = random_model()
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    source.train()(x)
    save_file(source.state_dict(), bundle / 'model.safetensors')
    write_sums(bundle)
    rb.register(bundle, name)
    model = load_model(name, dataset='cifar10', threat_model='Linf')
    with torch.no_grad():
        correct = int((model(x).argmax(1) == y).sum())
    assert correct > 0, 'nothing to attack'
    clean, adversarial = benchmark(model, n_examples=n, data_dir=root, batch_size=n, eps=8 / 255)
    assert clean == correct / n
    assert adversarial <= clean
    assert 'robust accuracy after APGD-CE' in capsys.readouterr().out
