"""RobustBench's model zoo under our names: its classes beside ours on random weights, and the way of its files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import drive_server
import pytest
import timm
import torch
from networks import images, randomise
from test_zoo import certificate, home, needs_gdown, needs_robustbench, point  # noqa: F401  fixtures
from torch import nn

import timm_paf
from hub.weights_tables import ZOO
from timm_paf.files import read_json
from timm_paf.models import timm_imagenet
from timm_paf.weights import find_weights, load_checkpoint, open_weights
from timm_paf.weights.checkpoint import read_checkpoint

pytestmark = needs_robustbench
TABLE = read_json(ZOO)
ENTRIES = TABLE['entries']
# An entry for each class, activation, data set and set of arguments.
KINDS = list({(e['class'], e['model'].partition('_')[0][:3], e['model'].rpartition('_')[2], e['dataset'],
               repr(e['model_args'])): e for e in reversed(ENTRIES)
              if e['model'].removesuffix('_in') not in timm_imagenet.NETWORKS}.values())


def entry(name: str, dataset: str = 'cifar10', threat: str = 'Linf') -> dict[str, Any]:
    (found,) = [e for e in ENTRIES if (e['name'], e['dataset'], e['threat']) == (name, dataset, threat)]
    return found


def tagged(row: dict[str, Any]) -> str:
    return f'{row["model"]}.{row["source"]}_{row["dataset"]}_{row["threat"]}'.lower()


def theirs(row: dict[str, Any], seed: int = 0) -> nn.Module:
    """RobustBench's network of an entry: a WideResNet of depth 10 and width 1, others as they are."""
    from robustbench.model_zoo import cifar10, cifar100, imagenet
    from robustbench.model_zoo.architectures import dm_wide_resnet, paf_wide_resnet

    module = {'cifar10': cifar10, 'cifar100': cifar100, 'imagenet': imagenet}[row['dataset']]
    torch.manual_seed(seed)
    if not row['model'].startswith('wrn'):
        boards = {'Linf': 'linf', 'L2': 'l2', 'corruptions': 'common_corruptions'}
        model = getattr(module, boards[row['threat']])[row['name']]['model']()
    elif row['class'] == 'PAF_WideResNet':
        model = paf_wide_resnet.PAF_WideResNet(paf_wide_resnet.PSSiLU(), depth=10, widen_factor=1)
    elif row['class'] == 'DMWideResNet':
        pre = row['dataset'].upper()
        model = dm_wide_resnet.DMWideResNet(
            row['num_classes'], 10, 1, dm_wide_resnet.Swish, getattr(dm_wide_resnet, f'{pre}_MEAN'),
            getattr(dm_wide_resnet, f'{pre}_STD'))
    elif row['class'] == 'WideResNet':
        model = module.WideResNet(depth=10, num_classes=row['num_classes'], widen_factor=1, sub_block1=True)
    else:
        model = getattr(module, row['class'])(depth=10, widen_factor=1)
    return randomise(model).eval()


def small(row: dict[str, Any]) -> dict[str, int]:
    return {'depth': 10, 'width': 1} if row['model'].startswith('wrn') else {}


def saved(model: nn.Module, path: Path, row: dict[str, Any]) -> Path:
    """A file as they are published: without a mean and std of the input, under the entry's key, in DataParallel."""
    whole = getattr(model, 'model', model)  # RobustBench adds the normalisation of ImageNet's networks
    state = {f'module.{key}': value for key, value in whole.state_dict().items()
             if key not in ('mu', 'sigma', 'mean', 'std')}
    torch.save({'last': state, 'best': {k: v * 2 for k, v in state.items()}} if 'entry' in row else
               {'state_dict': state}, path)
    return path


def assert_same(model: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        expected = other(images())
        assert expected.std() > 0.01
        torch.testing.assert_close(model(images()) / expected.std(), expected / expected.std(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('row', [
    pytest.param(row, id=f'{row["class"]}-{tagged(row)}', marks=[pytest.mark.slow] * ('resnet50' in row['model']))
    for row in KINDS])
def test_every_kind_of_entry_has_the_logits_of_robustbenchs_class(row: dict[str, Any], tmp_path: Path) -> None:
    model = theirs(row)
    file = saved(model, tmp_path / 'a.pt', row)
    ours = timm.create_model(  # the tag brings the arguments
        tagged(row), pretrained=True, pretrained_cfg_overlay={'file': str(file)}, **small(row)).eval()
    assert ours.num_classes == row['num_classes']
    assert_same(ours, model)
    with torch.no_grad():
        if row['model_args'].keys() - {'final_norm'} and row['dataset'] != 'imagenet':  # without them it is another
            plain = timm.create_model(row['model'], num_classes=row['num_classes'], **small(row)).eval()
            known = plain.state_dict()
            plain.load_state_dict({key: value for key, value in ours.state_dict().items()
                                   if key in known and value.shape == known[key].shape}, strict=False)
            assert (plain(images()) - model(images())).abs().max() > 0.01 * model(images()).std()


@pytest.mark.parametrize(('arch', 'small'), [
    ('convnext_base', {'depths': (1, 1, 1, 1), 'dims': (8, 16, 32, 64)}),
    ('convnext_large', {'depths': (1, 1, 1, 1), 'dims': (8, 16, 32, 64)}),
    ('swin_base_patch4_window7_224', {'depths': (2, 2), 'num_heads': (2, 4), 'embed_dim': 16}),
    ('swin_large_patch4_window7_224', {'depths': (2, 2), 'num_heads': (2, 4), 'embed_dim': 16}),
    ('vit_base_patch16_224', {'depth': 1, 'embed_dim': 32, 'num_heads': 2})])
def test_timms_networks_have_the_logits_of_robustbenchs(arch: str, small: dict[str, Any], tmp_path: Path) -> None:
    from robustbench.model_zoo.architectures.utils_architectures import normalize_model

    torch.manual_seed(0)
    model = normalize_model(
        timm.create_model(arch, **small), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).eval()
    torch.save(model.model.state_dict(), tmp_path / 'a.pt')
    tags = [weights.name for weights in timm_paf.list_weights(f'{arch}_in.*')]
    assert tags
    for name in (f'{arch}_in', *tags):
        ours = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay={'file': str(tmp_path / 'a.pt')}, **small).eval()
        x = images(size=(224, 224))
        with torch.no_grad():
            torch.testing.assert_close(ours(x), model(x))
            assert (ours(x) - model.model(x)).abs().max() > 0.01 * model(x).std()


def test_every_entry_of_the_package_is_named_or_refused_with_a_reason() -> None:
    from robustbench.model_zoo import model_dicts

    named = {(e['dataset'], e['threat'], e['name']): e for e in ENTRIES}
    refused = {(e['dataset'], e['threat'], e['name']): e['reason'] for e in TABLE['refused']}
    for board, threats in model_dicts.items():
        for threat, models in threats.items():
            for name, spec in models.items():
                key = (board.value, threat.value, name)
                assert (key in named) != (key in refused), key
                if key in named:
                    assert named[key]['gdrive_id'] == spec['gdrive_id']
                    assert len(timm_paf.list_weights(tagged(named[key]))) == 1
    assert len(named) > 120
    assert all(len(reason) > 10 for reason in refused.values())


def test_names_are_unique_and_timm_lists_them() -> None:
    names = [weights.name for weights in timm_paf.list_weights()]
    assert len(names) == len(set(names))
    assert set(names) <= set(timm.list_pretrained())
    assert 'wrn28_10_silu.wang2023_cifar10_linf' in timm.list_pretrained('*wang2023*linf*')
    assert timm.get_pretrained_cfg('wrn28_10_silu.wang2023_cifar100_linf').num_classes == 100


def test_an_imagenet_entry_has_its_preprocessing() -> None:
    from robustbench.model_zoo.imagenet import linf

    shapes = {'Res256Crop224': (0.875, 'bilinear', 224), 'BicubicRes256Crop224': (0.875, 'bicubic', 224),
              'Res224': (1.0, 'bilinear', 224), 'Crop288': (1.0, 'bilinear', 288)}
    for row in (row for row in ENTRIES if (row['dataset'], row['threat']) == ('imagenet', 'Linf')):
        weights = find_weights(tagged(row))
        assert weights.preprocessing == linf[row['name']]['preprocessing']
        cfg = timm.get_pretrained_cfg(weights.name)
        assert (cfg.crop_pct, cfg.interpolation, cfg.input_size[-1]) == shapes[weights.preprocessing]


LAYOUTS = [('Wang2023Better_WRN-28-10', 'Linf'), ('Carmon2019Unlabeled', 'Linf'), ('Rice2020Overfitting', 'Linf'),
           ('Ding2020MMA', 'Linf'), ('Rade2021Helper_R18_ddpm', 'Linf'), ('Andriushchenko2020Understanding', 'Linf'),
           ('Kireev2021Effectiveness_RLAT', 'corruptions'), ('Sehwag2021Proxy_R18', 'L2')]


@needs_gdown
@pytest.mark.parametrize(('name', 'threat'), LAYOUTS)
def test_the_whole_way_of_a_file_of_each_layout(
        name: str, threat: str, home: Path, certificate: Path, tmp_path: Path,  # noqa: F811
        monkeypatch: pytest.MonkeyPatch) -> None:
    row = entry(name, threat=threat)
    model = theirs(row)
    content = saved(model, tmp_path / 'theirs.pt', row).read_bytes()
    with drive_server.serve(content, row['gdrive_id'], certificate) as server:
        point(server, certificate, tmp_path, monkeypatch)
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            first = timm.create_model(tagged(row), pretrained=True, **small(row)).eval()
        assert server.elsewhere == []
    assert_same(first, model)
    again = timm.create_model(tagged(row), pretrained=True, **small(row)).eval()  # from the file that was kept
    assert_same(again, model)


def test_load_model_by_either_name(home: Path) -> None:  # noqa: F811
    from robustbench.utils import load_model

    row = entry('Rade2021Helper_R18_ddpm')
    path = Path('models/cifar10/Linf/Rade2021Helper_R18_ddpm.pt')  # where RobustBench puts its downloads
    path.parent.mkdir(parents=True)
    saved(theirs(row), path, row)
    state = torch.load(path)['state_dict']
    torch.save({'state_dict': state}, path)
    ours = load_model('preact_resnet18_silu.rade2021_ddpm', dataset='cifar10', threat_model='Linf')
    assert type(ours).__module__ == 'timm_paf.models.preact_resnet'
    assert_same(ours, load_model('Rade2021Helper_R18_ddpm', dataset='cifar10', threat_model='Linf'))


def test_a_published_silu_network_becomes_a_pssilu_network_with_the_same_logits(home: Path) -> None:  # noqa: F811
    row = entry('Rade2021Helper_R18_ddpm')
    path = Path('models/cifar10/Linf/Rade2021Helper_R18_ddpm.pt')
    path.parent.mkdir(parents=True)
    saved(theirs(row), path, row)
    weights = open_weights(tagged(row))
    assert weights.model_args == row['model_args']
    model = timm.create_model('preact_resnet18_pssilu', **weights.model_args).eval()
    print(weights.load(model))
    assert_same(model, theirs(row))
    assert timm_paf.paf_parameters(model).keys() == {'act.alpha', 'act.beta'}


@pytest.mark.parametrize('chans', [1, 3])
def test_another_head_and_other_images(chans: int, tmp_path: Path) -> None:
    row = entry('Rice2020Overfitting')
    file = saved(theirs(row), tmp_path / 'a.pt', row)
    ours = timm.create_model(tagged(row), pretrained=True, num_classes=7, in_chans=chans, **small(row),
                             pretrained_cfg_overlay={'file': str(file)})
    assert ours(images(chans=chans)).shape == (2, 7)
    assert ours.normalize.mean.shape == (chans, 1, 1)


def test_a_bare_file_is_loaded_with_a_warning_where_both_kinds_look_alike(tmp_path: Path) -> None:
    row = entry('Carmon2019Unlabeled')
    file = saved(theirs(row), tmp_path / 'a.pt', row)
    ours = timm.create_model('wrn10_1_relu')
    with pytest.warns(UserWarning, match=r'^[^\n]*normalises its input[^\n]*normalize=\(mean, std\)$'):
        found = load_checkpoint(ours, file)
    assert 'weights of sub_block1 left out' in str(found)
    assert_same(ours.eval(), theirs(row))
    with warnings.catch_warnings():  # who says how the input is normalised is not warned
        warnings.simplefilter('error', UserWarning)
        load_checkpoint(timm.create_model('wrn10_1_relu', normalize=((0.5,) * 3, (0.5,) * 3)), file)


def test_a_file_that_has_its_normalisation_brings_it(tmp_path: Path) -> None:
    from robustbench.model_zoo.cifar10 import Rice2020OverfittingNet

    torch.manual_seed(0)
    model = randomise(Rice2020OverfittingNet(10, 1)).eval()
    torch.save(nn.DataParallel(model).state_dict(), tmp_path / 'a.pt')
    with pytest.raises(ValueError, match=r'^[^\n]*normalises its input \(module\.mu is [^\n]*normalize=\(mean, std\)$'):
        load_checkpoint(timm.create_model('wrn10_1_relu'), tmp_path / 'a.pt')
    ours = timm.create_model('wrn10_1_relu', normalize=((0.1,) * 3, (1.0,) * 3)).eval()
    assert 'with its normalisation of the input' in str(load_checkpoint(ours, tmp_path / 'a.pt'))
    assert_same(ours, model)
    torch.save(ours.state_dict(), tmp_path / 'ours.pt')  # and what it saves is of no other network
    with pytest.raises(ValueError, match='normalises its input'):
        load_checkpoint(timm.create_model('wrn10_1_relu'), tmp_path / 'ours.pt')


def test_deepminds_files_want_their_network(tmp_path: Path) -> None:
    for name in ('Wang2023Better_WRN-28-10', 'Rade2021Helper_R18_ddpm'):
        row = entry(name)
        file = saved(theirs(row), tmp_path / 'a.pt', row)
        arch = 'wrn10_1_silu' if row['model'].startswith('wrn') else row['model']
        for kwargs in ({}, {'pad_type': 'same'}, {'normalize': ((0.5,) * 3, (0.2,) * 3)}):
            with pytest.raises(ValueError, match=r"^[^\n]*DeepMind's \w+, [^\n]*pad_type='same' and normalize="):
                load_checkpoint(timm.create_model(arch, **kwargs), file)


def test_another_sub_block_is_no_dead_one(tmp_path: Path) -> None:
    row = entry('Carmon2019Unlabeled')
    state = theirs(row).state_dict()
    for change in ({'sub_block1.layer.0.extra': torch.ones(1)}, {'sub_block1.layer.0.bn1.weight': torch.ones(3)}):
        torch.save({**state, **change}, tmp_path / 'a.pt')
        with pytest.raises(ValueError, match=r"^[^\n]*sub_block1 that is not TRADES' unused copy[^\n]*$"):
            read_checkpoint(tmp_path / 'a.pt', timm.create_model('wrn10_1_relu'))


@pytest.mark.parametrize('wrong', ['images', 3, [[0.5]], [[0.5] * 3, [0.0] * 3], [[0.5] * 3, [1.0]], ['a', 'b']])
def test_what_normalize_may_be(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"^normalize is [^\n]*expected None, 'image', or \(mean, std\)[^\n]*$"):
        timm.create_model('wrn10_1_relu', normalize=wrong)




@needs_gdown
def test_entries_of_one_name_on_two_boards_have_files_of_their_own(
        home: Path, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """RobustBench has one name for both; 33 of its names are on several boards."""
    for seed, threat in enumerate(('Linf', 'L2')):
        row = entry('Wang2023Better_WRN-28-10', threat=threat)
        model = theirs(row, seed)
        content = saved(model, tmp_path / 'theirs.pt', row).read_bytes()
        with drive_server.serve(content, row['gdrive_id'], certificate) as server:
            point(server, certificate, tmp_path / threat, monkeypatch)
            assert_same(timm.create_model(tagged(row), pretrained=True, **small(row)).eval(), model)
            assert len(server.downloads) == 1


@pytest.mark.parametrize(('arch', 'kwargs'), [
    ('wrn10_1_silu', {'pad_type': 'same'}), ('wrn10_1_relu', {'normalize': 'image'}),
    ('preact_resnet18_relu', {'shortcut': 'input'}), ('wrn10_1_relu', {'normalize': ((0.5,) * 3, (0.2,) * 3)})])
def test_saved_weights_of_a_variant_load_into_no_other_network(
        arch: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    variant = randomise(timm.create_model(arch, **kwargs)).eval()
    torch.save(variant.state_dict(), tmp_path / 'a.pt')
    plain = timm.create_model(arch)
    with pytest.raises(RuntimeError, match='Unexpected key'):
        plain.load_state_dict(variant.state_dict())
    with pytest.raises(ValueError, match=r'^[^\n]*(variant_|normalises its input)[^\n]*$'):
        load_checkpoint(plain, tmp_path / 'a.pt')
    again = timm.create_model(arch, **kwargs).eval()
    load_checkpoint(again, tmp_path / 'a.pt')
    with torch.no_grad():
        torch.testing.assert_close(again(images()), variant(images()), rtol=0, atol=0)


def test_timms_configuration_of_weights_brings_their_arguments(tmp_path: Path) -> None:
    row = entry('Rice2020Overfitting', threat='L2')
    file = saved(theirs(row), tmp_path / 'a.pt', row)
    cfg = timm.get_pretrained_cfg(tagged(row))
    model = timm.create_model(row['model'], pretrained_cfg=cfg, checkpoint_path=str(file)).eval()
    assert_same(model, theirs(row))
