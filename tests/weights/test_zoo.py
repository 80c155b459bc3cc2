"""Named weights: from a server that behaves as Google Drive does, from files that are there, and from bundles."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import drive_server
import pytest
import timm
import torch
from conftest import ROOT
from networks import EXACT, images, randomise
from safetensors import safe_open
from test_model_weights import reference
from torch import nn

import timm_paf
from hub import weights_tables
from timm_paf.weights import zoo

DAI = zoo.list_weights('wrn28_10_pssilu.dai2021_cifar10_linf')[0]
SMALL = {'depth': 10, 'width': 1}  # the published weights' name, source and checks, with a network of 300 KB
needs_gdown = pytest.mark.skipif(
    importlib.util.find_spec('gdown') is None or shutil.which('openssl') is None, reason='needs gdown and openssl')
needs_robustbench = pytest.mark.skipif(
    importlib.util.find_spec('robustbench') is None, reason="needs pip install 'timm-paf[robustbench]'")


def theirs(depth: int = 10, width: int = 1, seed: int = 0) -> nn.Module:
    """RobustBench's own network, with one PSSiLU under many names."""
    torch.manual_seed(seed)
    file = reference('paf_wide_resnet')
    return randomise(file.PAF_WideResNet(file.PSSiLU(), depth=depth, widen_factor=width)).eval()


def save(model: nn.Module, path: Path, **kwargs: Any) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f'module.{k}': v for k, v in model.state_dict().items()}
    torch.save({'state_dict': state, 'optimizer': torch.rand(1_000_000)}, path, **kwargs)  # gdown reads 512 KB at once
    return path.read_bytes()


def create(name: str = 'wrn28_10_pssilu', **kwargs: Any) -> nn.Module:
    return timm.create_model(name, pretrained=True, **{**SMALL, **kwargs}).eval()


def assert_theirs(model: nn.Module, other: nn.Module | None = None) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(images()), (other or theirs())(images()), rtol=1e-5, atol=1e-5)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's directory and the one that a user works in, both empty; no network at all."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    for name in ('HTTPS_PROXY', 'HTTP_PROXY', 'https_proxy', 'http_proxy'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')
    for name in ('NO_PROXY', 'no_proxy', 'ALL_PROXY', 'all_proxy'):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    return tmp_path / 'torch' / 'hub' / 'checkpoints'


@pytest.fixture(scope='session')
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drive_server.make_certificate(tmp_path_factory.mktemp('drive'))


@pytest.fixture
def drive(
        home: Path, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[drive_server.Drive]:
    content = save(theirs(), tmp_path / 'theirs.pt')
    with drive_server.serve(content, DAI.gdrive_id, certificate) as server:
        point(server, certificate, tmp_path, monkeypatch)
        yield server
        assert server.elsewhere == []


def point(server: Any, certificate: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gdown's requests go to the server, and its cookies stay with the test."""
    import gdown  # noqa: F401

    for name in ('HTTPS_PROXY', 'https_proxy'):
        monkeypatch.setenv(name, f'http://127.0.0.1:{server.server_port}')
    monkeypatch.setenv('REQUESTS_CA_BUNDLE', str(certificate))
    (home / '.cache' / 'gdown').mkdir(parents=True)
    monkeypatch.setattr(sys.modules['gdown.download'], 'home', str(home))
    monkeypatch.setattr(sys.modules['gdown.download'], 'DEFAULT_COOKIES_FILE', str(home / 'cookies'), raising=False)


# ---- names


def test_timm_lists_them_without_a_download(home: Path) -> None:
    listed = timm.list_pretrained('*pssilu*')
    assert {'wrn28_10_pssilu.dai2021_cifar10_linf', 'wrn10_1_pssilu.timm_paf_cifar10_linf'} <= set(listed)
    for weights in timm_paf.list_weights():
        plain = f'{weights.model}_{weights.dataset}_{weights.norm}'.lower()
        first = zoo.find_weights(weights.model) == weights
        for name in (weights.name, plain, *([weights.model] if first else [])):
            assert timm.models.is_model_pretrained(name)
            cfg = timm.get_pretrained_cfg(name)
            assert (cfg.mean, cfg.std, cfg.num_classes) == ((0, 0, 0), (1, 1, 1), weights.num_classes)
        assert {weights.name, plain} <= set(timm.list_pretrained())
        assert weights.name.count('.') == 1
        assert weights.eps in ('8/255', '4/255', '0.5', '0.031', '0') or weights.norm == 'corruptions'
    assert not timm.models.is_model_pretrained('wrn10_2_pssilu')
    assert timm.create_model('wrn28_10_pssilu', **SMALL).conv1.weight.std() > 0
    assert not home.exists()
    with pytest.raises(RuntimeError, match='Invalid pretrained tag'):
        create('wrn28_10_pssilu.nobody2021_cifar10_linf')


@needs_robustbench
def test_the_published_id_is_robustbenchs() -> None:
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    for weights in timm_paf.list_weights():
        if weights.robustbench:
            models = model_dicts[BenchmarkDataset(weights.dataset)][ThreatModel(weights.norm)]
            assert models[weights.robustbench]['gdrive_id'] == weights.gdrive_id


def test_table_says_what_the_records_say() -> None:
    lines = weights_tables.weights_table().splitlines()[2:]
    shown = [zoo.find_weights(line.split('`')[1]) for line in lines]
    assert any('61.55 (RobustBench); 61.96 (the paper, whose code has eps 0.031)' in line for line in lines)
    assert [weights for weights in shown if weights.bundle] == [w for w in zoo.list_weights() if w.bundle]
    board = [weights_tables.robust(w) for w in zoo.list_weights() if (w.dataset, w.norm) == ('cifar10', 'Linf')]
    best = weights_tables.BEST
    assert [weights_tables.robust(w) for w in shown[:best]] == sorted(board, reverse=True)[:best]
    for weights, line in zip(shown, lines, strict=True):
        assert f'| {weights.norm} {weights.eps} |' in line
        if weights.bundle:
            evaluation = json.loads((weights.bundle / 'evaluation.json').read_text())
            clean, robust = (evaluation['attacks'][name]['correct'] for name in ('clean', 'autoattack'))
            n = f'(n = {evaluation["n"]:,})'
            assert f'| {clean / 10:.1f} {n} | {robust / 10:.1f} {n} |' in line  # of 1,000
            assert weights.sha256 == evaluation['weights_sha256']
    assert weights_tables.weights_table() in (ROOT / 'README.md').read_text()


def test_the_page_has_every_published_name_once() -> None:
    page = (ROOT / 'timm_paf/weights/README.md').read_text()
    assert weights_tables.zoo_tables() in page
    assert weights_tables.refused_table() in page
    names = [line.split('`')[1] for line in weights_tables.zoo_tables().splitlines() if line.startswith('| `')]
    assert sorted(zoo.find_weights(name).name for name in names) == sorted(
        w.name for w in zoo.list_weights() if not w.bundle)


# ---- from Drive


@needs_gdown
def test_the_whole_way(drive: drive_server.Drive, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = create()
    assert_theirs(model)
    assert timm_paf.paf_parameters(model).keys() == {'act.alpha', 'act.beta'}
    assert model.pretrained_cfg['tag'] == DAI.tag
    assert 'state_dict' not in model.pretrained_cfg
    file, ready = home / f'{DAI.name}.pt', home / f'{DAI.name}.safetensors'
    digest = hashlib.sha256(drive.content).hexdigest()
    assert file.read_bytes() == drive.content
    assert (home / f'{ready.name}.sha256').read_text() == \
        f'{hashlib.sha256(ready.read_bytes()).hexdigest()}  {ready.name}\n'
    with safe_open(ready, framework='pt') as opened:
        assert opened.metadata() == {'format': 'pt', 'sha256': digest, 'url': DAI.location}
        assert {'act.alpha', 'act.beta'} <= set(opened.keys())
    (said,) = [record.getMessage() for record in caplog.records]
    assert digest in said
    assert 'the zoo knows none to compare it with' in said
    assert "without the prefix module.; 6 copies of the activation's values, equal, merged" in said
    assert len(drive.downloads) == 1

    file.unlink()  # from here on the other file is enough
    for name in ('wrn28_10_pssilu', DAI.name, 'wrn28_10_pssilu_cifar10_linf'):
        torch.testing.assert_close(create(name)(images()), model(images()), **EXACT)
    assert_theirs(create(cache_dir=str(home)))
    assert len(drive.downloads) == 1
    assert sorted(path.name for path in home.iterdir() if not path.name.endswith('.lock')) == \
        [ready.name, f'{ready.name}.sha256']
    body = ready.read_bytes()
    ready.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    with pytest.raises(ValueError, match=r'^[^\n]*sha256 is \w{64}, expected \w{64} [^\n]*remove it[^\n]*$'):
        create()


@needs_gdown
@pytest.mark.parametrize(('faults', 'said'), [
    ([('cut', 1_500_000)], 'the connection broke after'),
    ([('cut', 1_500_000), None, ('cut', 1_000_000), None, ('cut', 600_000)], 'the connection broke after'),
    ([('cut', 1_500_000), 'ignore-range'], 'starting anew'),
    ([('cut', 1_500_000), 'page-in-the-middle'], 'starting anew'),
], ids=['cut', 'cut three times', 'resumed from zero', 'page in the middle'])
def test_faults_that_are_survived(
        drive: drive_server.Drive, home: Path, faults: list[Any], said: str, caplog: pytest.LogCaptureFixture) -> None:
    drive.faults = list(faults)
    assert_theirs(create())
    assert drive.faults == []
    assert any(asked.startswith('bytes=') for asked in drive.downloads)
    assert (home / f'{DAI.name}.pt').read_bytes() == drive.content
    assert said in caplog.text


@needs_gdown
@pytest.mark.parametrize(('fault', 'kind', 'said'), [
    ('quota', ConnectionError, 'Too many users have viewed or downloaded this file recently'),
    ('sign-in', ConnectionError, 'Cannot retrieve the public link'),
    ('missing', ConnectionError, ''),
    ('error', ConnectionError, ''),
    ('refuse', ConnectionError, ''),
    ('page', ValueError, r'is a web page \(Sign in - Google Accounts\)'),
    ('short', ValueError, 'is cut off or damaged'),
    ('wrong', ValueError, 'is damaged: .* has another CRC-32'),
])
def test_faults_that_are_named(
        drive: drive_server.Drive, home: Path, fault: str, kind: type[Exception], said: str) -> None:
    drive.faults = [fault]
    with pytest.raises(kind, match=rf'^wrn28_10_pssilu\.dai2021_cifar10_linf\.pt could not be had from https://drive\.google\.com/uc\?id='
                       rf'{DAI.gdrive_id}: [^\n]*{said}[^\n]*; try again later, or put the file at '
                       r'models/cifar10/Linf/Dai2021Parameterizing\.pt \(train takes it by --init too, [^\n]*$'):
        create()
    assert drive.faults == []
    assert not [path for path in home.rglob('*') if path.suffix in ('.pt', '.safetensors')]
    assert_theirs(create())  # what went wrong left nothing behind


@needs_gdown
def test_what_arrived_is_gone_on_from_next_time(drive: drive_server.Drive, home: Path) -> None:
    drive.faults = [('cut', 1_500_000), 'quota']
    with pytest.raises(ConnectionError, match=r'Too many users[^\n]*; 1,\d{3},\d{3} bytes are kept and gone on from'):
        create()
    drive.downloads.clear()
    assert_theirs(create())
    (rest,) = [asked for asked in drive.downloads if asked]
    assert 1_000_000 < int(rest.strip('bytes=-')) <= 1_500_000


@needs_gdown
def test_a_connection_that_always_breaks(drive: drive_server.Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    either = ConnectionError, ValueError  # gdown 6 sees what our check sees with gdown 5
    for attempts, kind, faults in (
            (2, ConnectionError, [('cut', 600_000), None, ('cut', 600_000)]), (1, either, ['page-in-the-middle'])):
        drive.faults = list(faults)
        monkeypatch.setattr(sys.modules['timm_paf.weights.download'], 'ATTEMPTS', attempts)
        with pytest.raises(kind, match=r'^wrn28_10_pssilu\.dai2021_cifar10_linf\.pt could not be had from '):
            create()
    assert_theirs(create())


@needs_gdown
def test_processes_that_start_together_download_once(drive: drive_server.Drive) -> None:
    with ThreadPoolExecutor(3) as pool:
        for model in list(pool.map(lambda _: create(), range(3))):
            assert_theirs(model)
    assert len(drive.downloads) == 1


@needs_gdown
def test_without_network(home: Path) -> None:
    with pytest.raises(ConnectionError, match=r'^wrn28_10_pssilu\.dai2021_cifar10_linf\.pt could not be had from '
                       r'[^\n]*; try again later, or put the file at models/cifar10/Linf/[^\n]*$'):
        create()


def test_without_gdown(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'gdown', None)
    with pytest.raises(ModuleNotFoundError, match=r"^[^\n]*no gdown; pip install 'timm-paf\[robustbench\]', or put "):
        create()


@needs_gdown
def test_a_sha256_that_the_zoo_knows(drive: drive_server.Drive, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    digest = hashlib.sha256(drive.content).hexdigest()

    def know(digest: str) -> None:
        monkeypatch.setattr(zoo, '_WEIGHTS', (dataclasses.replace(DAI, sha256=digest),))

    know('0' * 64)
    with pytest.raises(ValueError, match=rf'has sha256 {digest}, expected 0{{64}}'):
        create()
    know(digest)
    assert_theirs(create())
    assert 'as the zoo expects' in caplog.text
    know('0' * 64)
    with pytest.raises(ValueError, match=rf'was made from a file with sha256 {digest}, expected 0{{64}}'):
        create()


@pytest.mark.slow
@needs_gdown
@needs_robustbench
def test_the_published_size(
        home: Path, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cifar10_root: Path) -> None:
    from robustbench.utils import load_model
    from torchvision.datasets import CIFAR10

    other = theirs(28, 10)
    content = save(other, tmp_path / 'theirs.pt')
    with drive_server.serve(content, DAI.gdrive_id, certificate) as server:
        point(server, certificate, tmp_path, monkeypatch)
        server.faults = [('cut', 50_000_000)]
        models = [load_model('wrn28_10_pssilu', dataset='cifar10', threat_model='Linf'),
                  load_model('wrn28_10_pssilu.dai2021', dataset='cifar10', threat_model='Linf'),
                  timm.create_model('wrn28_10_pssilu', pretrained=True).eval()]
        assert len([asked for asked in server.downloads if not asked]) == 2
    x = torch.from_numpy(CIFAR10(cifar10_root, train=False).data[:8]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        expected, logits = other(x), models[0](x)
        for model in models[1:]:
            torch.testing.assert_close(model(x), logits, **EXACT)
    print(f'logits up to {expected.abs().max():.3g} differ by at most {(logits - expected).abs().max():.3g}')
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


# ---- from files that are there


@pytest.mark.parametrize('legacy', [False, True])
def test_robustbenchs_own_download_is_used(home: Path, legacy: bool) -> None:
    save(theirs(), Path('models/cifar10/Linf/Dai2021Parameterizing.pt'), _use_new_zipfile_serialization=not legacy)
    assert_theirs(create())
    assert not home.exists(), 'nothing was downloaded or written'


def test_a_file_at_a_path_is_used(home: Path, tmp_path: Path) -> None:
    save(theirs(seed=1), tmp_path / 'mine.pt')
    save(theirs(seed=2), Path('models/cifar10/Linf/Dai2021Parameterizing.pt'))
    mine = {'file': str(tmp_path / 'mine.pt')}
    for name in ('wrn28_10_pssilu', DAI.name):
        assert_theirs(create(name, pretrained_cfg_overlay=mine), theirs(seed=1))
    assert_theirs(create('wrn10_2_pssilu', pretrained_cfg_overlay=mine), theirs(seed=1))  # has no weights of its own
    assert_theirs(timm.create_model('wrn28_10_pssilu', checkpoint_path=mine['file'], **SMALL).eval(), theirs(seed=1))
    with pytest.raises(FileNotFoundError, match=r'^[^\n]*nowhere\.pt is no file; expected a checkpoint$'):
        create(pretrained_cfg_overlay={'file': 'nowhere.pt'})
    assert not home.exists()


def test_a_page_in_robustbenchs_place_is_named(home: Path) -> None:
    path = Path('models/cifar10/Linf/Dai2021Parameterizing.pt')
    path.parent.mkdir(parents=True)
    path.write_text(drive_server.QUOTA)
    with pytest.raises(ValueError, match=r'^models/cifar10/Linf/Dai2021Parameterizing\.pt is a web page \(Google Drive '
                       r'- Quota exceeded\); expected a checkpoint: remove it and get it again$'):
        create()
    assert path.exists()


def test_no_code_of_a_file_is_run(home: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / 'run'),)

    torch.save({'state_dict': theirs().state_dict(), 'best': Code()}, tmp_path / 'code.pt')
    (tmp_path / 'junk.pt').write_bytes(b'123')
    with pytest.raises(ValueError, match=r'^[^\n]*junk\.pt is cut off or no checkpoint \([^\n]*$'):
        create(pretrained_cfg_overlay={'file': str(tmp_path / 'junk.pt')})
    with pytest.raises(ValueError, match=r'^[^\n]*code\.pt needs code to be read \(posix\.mkdir\)[^\n]*$'):
        create(pretrained_cfg_overlay={'file': str(tmp_path / 'code.pt')})
    assert not (tmp_path / 'run').exists()


def test_another_head_and_other_channels(home: Path) -> None:
    save(theirs(), Path('models/cifar10/Linf/Dai2021Parameterizing.pt'))
    whole, x = create(), images()
    for classes in (7, 0):
        model = create(num_classes=classes)
        torch.testing.assert_close(model.forward_features(x), whole.forward_features(x), **EXACT)
        assert model(x).shape[1] == (classes or 64)
    grey = create(in_chans=1)
    torch.testing.assert_close(grey.conv1.weight, whole.conv1.weight.sum(1, keepdim=True))
    features = create(features_only=True)(x)
    torch.testing.assert_close(features, whole.forward_intermediates(x, intermediates_only=True), **EXACT)
    state = theirs().state_dict()
    del state['block2.layer.0.bn1.bias']  # missing under a new head too
    torch.save(state, 'models/cifar10/Linf/Dai2021Parameterizing.pt')
    for kwargs in ({}, {'num_classes': 7}, {'features_only': True}):
        with pytest.raises(ValueError, match=r'does not fit WideResNet: missing block2\.layer\.0\.bn1\.bias; expected'):
            create(**kwargs)
    with pytest.raises(ValueError, match=r'does not fit WideResNet: .*conv1\.weight is \(16, 16, 3, 3\) and not'):
        create(width=2)


# ---- bundles


def bundled(name: str) -> nn.Module:
    return timm.create_model(name, pretrained=True).eval()


@needs_robustbench
@pytest.mark.parametrize('weights', [w for w in zoo.list_weights() if w.bundle], ids=lambda weights: weights.name)
def test_a_bundle_by_every_name(home: Path, weights: zoo.Weights) -> None:
    from robustbench.utils import load_model

    first = zoo.find_weights(weights.model) is weights  # of several sets of weights of a model the one without a tag
    expected = timm_paf.robustbench.load_bundle(weights.bundle)(images())
    models = [*map(bundled, (weights.name, *((weights.model, weights.plain_name) if first else ()))),
              *(load_model(name, dataset=weights.dataset, threat_model=weights.norm)
                for name in (f'{weights.model}.{weights.source}', *((weights.model,) if first else ())))]
    for model in models:
        torch.testing.assert_close(model(images()), expected, **EXACT)
        assert model.pretrained_cfg['architecture'] == weights.model
    assert not home.exists()


def test_a_directory_is_all_that_a_new_bundle_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = zoo.list_weights('wrn10_1_pssilu.*')[0].bundle
    for name in ('wrn10_1_pssilu', 'wrn10_1_pssilu_frozen', 'broken'):
        shutil.copytree(ours, tmp_path / name)
    frozen = tmp_path / 'wrn10_1_pssilu_frozen'
    config = json.loads((frozen / 'config.json').read_text())
    config |= {'model_args': {'act_kwargs': {'frozen': 'beta'}}}
    config['timm_paf']['threat_model'] = {'norm': 'L2', 'eps': '0.5'}
    (frozen / 'config.json').write_text(json.dumps(config))
    (frozen / 'SHA256SUMS').unlink()
    (tmp_path / 'broken' / 'config.json').write_text('{')
    with pytest.warns(UserWarning, match='broken is left out of the named weights: .*is no JSON'):
        found = (DAI, *zoo.bundled_weights(tmp_path))
    assert [weights.name for weights in found] == [
        DAI.name, 'wrn10_1_pssilu.timm_paf_cifar10_linf', 'wrn10_1_pssilu.frozen_cifar10_l2']
    assert [m.attack for m in found[2].measured] == ['clean', 'pgd-50, Linf 8/255', 'autoattack, Linf 8/255']
    monkeypatch.setattr(zoo, '_WEIGHTS', found)
    cfg = {**timm.get_pretrained_cfg('wrn10_1_pssilu').to_dict(), **found[2].cfg(), 'tag': found[2].tag}
    model = timm.create_model('wrn10_1_pssilu', pretrained=True, pretrained_cfg=cfg).eval()
    assert timm_paf.paf_parameters(model).keys() == {'act.alpha'}
    torch.testing.assert_close(model(images()), timm_paf.robustbench.load_bundle(ours)(images()), **EXACT)
    (frozen / 'model.safetensors').write_bytes(b'')
    with pytest.raises(ValueError, match=r'^[^\n]*model\.safetensors is cut off'):
        timm.create_model('wrn10_1_pssilu', pretrained=True, pretrained_cfg=cfg)


def test_bundles_are_small() -> None:
    for bundle in (ROOT / 'hub' / 'models').iterdir():
        size = sum(file.stat().st_size for file in bundle.rglob('*') if file.is_file())
        assert size <= 12e6, f'{bundle} is in every clone, and nearly all of it in every wheel; use the Hub and zoo.py'
