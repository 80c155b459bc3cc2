"""The networks as timm and its users see them: by name, forward, features, head."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
from networks import EXACT, SMALL, images, paf_keys, pafs, small
from timm.models import group_parameters
from torch import nn

import timm_paf
from timm_paf.models.cifar_net import conv3x3

ARCHS = ['wrn10_1', 'wrn10_2', 'wrn16_1', 'wrn16_2', 'wrn16_4', 'wrn28_4', 'wrn28_10', 'wrn34_10', 'wrn34_20',
         'wrn70_16', 'wrn34_15', 'wrn40_2', 'wrn82_8', 'wrn94_16', 'wrn106_16', 'resnet18_w8', 'resnet18_w16',
         'resnet18_w32', 'resnet18', 'resnet34', 'resnet50', 'preact_resnet18', 'preact_resnet34']


# ---- registry and constructors


def test_every_arch_with_every_activation_is_registered() -> None:
    names = {f'{arch}_{act}' for arch in ARCHS for act in timm_paf.list_pafs(plain=True)}
    assert len(names) == 23 * 13
    assert names <= set(timm.list_models())
    assert len(timm.list_models('*_pssilu', exclude_filters='*_in_*')) == 23
    with_weights = {f'{w.model}_{w.dataset}_{w.norm}'.lower() for w in timm_paf.list_weights()
                    if w.dataset != 'imagenet'}
    assert set(timm.list_models(module=['wide_resnet', 'resnet_cifar', 'preact_resnet'])) == names | with_weights
    for name in names:
        entrypoint = timm.models.model_entrypoint(name)
        assert (entrypoint.__name__, entrypoint.__module__.split('.')[0]) == (name, 'timm_paf')
        cfg = timm.models.get_pretrained_cfg(name)
        assert (cfg.input_size, cfg.mean, cfg.std, cfg.crop_pct) == ((3, 32, 32), (0, 0, 0), (1, 1, 1), 1)
        assert (cfg.first_conv, cfg.classifier, cfg.num_classes) == ('conv1', 'fc', 10)


@pytest.mark.parametrize(('arch', 'count'), [
    ('wrn28_10', 36479194), ('wrn34_10', 46160474), ('wrn70_16', 266796506), ('wrn16_4', 2748890),
    ('resnet18_w16', 701466), ('resnet18', 11173962), ('preact_resnet18', 11172170), ('resnet50', 23520842)])
def test_parameter_counts(arch: str, count: int) -> None:
    for act in timm_paf.list_pafs(plain=True) if arch == 'wrn16_4' else ('relu', 'psilu', 'ssilu', 'pssilu'):
        model = timm.create_model(f'{arch}_{act}', device='meta')
        extra = {'pssilu': 2, 'ssilu': 0}.get(act, int(act in timm_paf.list_pafs()))
        assert sum(p.numel() for p in model.parameters()) == count + extra, act
        assert len(timm_paf.paf_parameters(model)) == extra
        assert all(p.is_meta for p in model.parameters())
        assert len({id(p) for p in pafs(model)}) == int(act in timm_paf.list_pafs())


def test_arguments() -> None:
    with pytest.raises(TypeError, match='no_such'):
        timm.create_model('wrn10_1_pssilu', no_such=1)
    with pytest.raises(TypeError, match='PSSiLU has no parameter gamma'):
        timm.create_model('wrn10_1_pssilu', act_kwargs={'gamma': 1})
    with pytest.raises(ValueError, match=r"'mish'.*pssilu"):
        timm.create_model('wrn10_1_pssilu', act_layer='mish')
    with pytest.raises(ValueError, match='depth is 11; expected 6 n'):
        timm.create_model('wrn10_1_pssilu', depth=11)
    with pytest.raises(ValueError, match='num_classes=0'):
        timm.create_model('wrn10_1_pssilu', global_pool='')
    model = timm.create_model('resnet18_pssilu', base_width=8, act_kwargs={'beta': 0.25, 'frozen': 'beta'})
    assert set(timm_paf.paf_parameters(model)) == {'act.alpha'}
    assert model.state_dict()['act.beta'].tolist() == [0.25]
    assert {p.beta.item() for p in pafs(model)} == {0.25}
    for dtype in (torch.bfloat16, torch.float64):
        model = timm.create_model('wrn10_1_pssilu', dtype=dtype).eval()
        assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {dtype}
        assert model(images(dtype=dtype)).dtype == dtype


# ---- what timm asks of a model


@pytest.mark.parametrize('arch', SMALL)
def test_forward_in_every_shape(arch: str) -> None:
    x = images()
    model = small(arch).train()
    logits = model(x)
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())
    model = small(arch)
    logits = model(x)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, *(32 // model.feature_info[-1]['reduction'],) * 2)
    torch.testing.assert_close(model.forward_head(features), logits, **EXACT)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(model.fc(pooled), logits, **EXACT)
    assert pooled.shape[1] == model.num_features == model.head_hidden_size
    for size in ((40, 24), (64, 64), (32, 17)):
        assert model(images(size=size)).shape == (2, 10)
    assert small(arch, num_classes=7)(x).shape == (2, 7)
    assert small(arch, in_chans=1)(images(chans=1)).shape == (2, 10)
    for pool, expected in {'avg': pooled, 'max': features.amax((2, 3)), '': features}.items():
        bare = small(arch, num_classes=0, global_pool=pool)
        bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith('fc.')}, strict=True)
        torch.testing.assert_close(bare(x), expected, **EXACT)
    assert small(arch, global_pool='catavgmax')(x).shape == (2, 10)


def test_same_padding_is_that_of_tensorflow() -> None:
    """In all max((ceil(n / 2) - 1) 2 + 3 - n, 0) rows, the smaller half of them before the image."""
    conv = conv3x3(3, 4, 2, 'same', {})
    for height, width in itertools.product(range(3, 9), repeat=2):
        x = images(size=(height, width))
        down, across = (max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in (height, width))
        padded = nn.functional.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        torch.testing.assert_close(conv(x), nn.functional.conv2d(padded, conv.weight, stride=2), **EXACT)
    model = small('wrn10_1', pad_type='same')
    for side in (28, 30, 33):
        assert model(images(size=(side, side))).shape == (2, 10)


def test_dropout_acts_before_the_classifier_in_training_alone() -> None:
    model, plain, x = small('wrn10_1', drop_rate=0.5), small('wrn10_1'), images(8)
    torch.testing.assert_close(model(x), plain(x), **EXACT)
    features = model.forward_features(x)
    dropped = model.train().forward_head(features, pre_logits=True) == 0
    assert 0.4 < dropped.double().mean() < 0.6


@pytest.mark.parametrize('arch', SMALL)
def test_intermediates_and_features_only(arch: str) -> None:
    model, x = small(arch), images()
    count = len(model.stages)
    final, every = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x), **EXACT)
    assert [f.shape[1] for f in every] == [i['num_chs'] for i in model.feature_info]
    assert [32 // f.shape[2] for f in every] == [i['reduction'] for i in model.feature_info]
    torch.testing.assert_close(model.forward_norm(every[-1]), final, **EXACT)
    normed = model.forward_intermediates(x, indices=[0, -1], norm=True, intermediates_only=True)
    torch.testing.assert_close(normed, [every[0], final], **EXACT)
    torch.testing.assert_close(model.forward_intermediates(x, indices=2, intermediates_only=True), every[-2:], **EXACT)
    last, early = model.forward_intermediates(x, indices=[1], stop_early=True)
    torch.testing.assert_close([last, *early], [every[1], every[1]], **EXACT)
    with pytest.raises(ValueError, match='NLC'):
        model.forward_intermediates(x, output_fmt='NLC')
    for indices in (tuple(range(count)), (0, 2), (1,), (-1,), (0, 1)):
        wrapped = small(arch, features_only=True, out_indices=indices)
        result = wrapped.load_state_dict({f'model.{k}': v for k, v in model.state_dict().items()}, strict=False)
        assert not result.missing_keys
        torch.testing.assert_close(wrapped(x), [every[i] for i in indices], **EXACT)
        assert wrapped.feature_info.channels() == [every[i].shape[1] for i in indices]
        assert wrapped.feature_info.reduction() == [32 // every[i].shape[2] for i in indices]
        assert paf_keys(wrapped.state_dict()) == ['model.act.alpha', 'model.act.beta']


@pytest.mark.parametrize('arch', SMALL)
def test_pruning_leaves_the_intermediates_as_they_were(arch: str) -> None:
    x = images()
    for indices in ([0], [1], [0, 1], 1):
        model = small(arch)
        before = model.forward_intermediates(x, indices=indices, intermediates_only=True)
        size = sum(p.numel() for p in model.parameters())
        taken = model.prune_intermediate_layers(indices, prune_norm=True)
        assert taken == ([len(model.stages) - 1] if indices == 1 else indices)
        assert isinstance(model.get_classifier(), nn.Identity)
        after = model.forward_intermediates(x, indices=indices, intermediates_only=True)
        torch.testing.assert_close(after, before, **EXACT)
        assert sum(p.numel() for p in model.parameters()) < size
        # it ends where the last of them does, also with checkpointing, and every parameter that is left is needed
        width = model.feature_info[taken[-1]]['num_chs']
        assert (model.num_features, model.head_hidden_size) == (width, width)
        for _ in range(2):
            torch.testing.assert_close(model.forward_features(x), after[-1], **EXACT)
            model.set_grad_checkpointing()
        kept = small(arch)
        kept.prune_intermediate_layers(indices)
        sum(f.sum() for f in kept.forward_intermediates(x, taken, norm=True, intermediates_only=True)).backward()
        assert all(p.grad is not None for p in kept.parameters())
        assert paf_keys(model.state_dict()) == ['act.alpha', 'act.beta']
        assert len({id(p) for p in pafs(model)}) == 1


def test_reset_classifier_keeps_device_dtype_and_mode() -> None:
    for arch in SMALL:
        model = small(arch).to(torch.bfloat16)
        assert model.get_classifier() is model.fc
        model.reset_classifier(5)
        assert (model.fc.weight.dtype, model.fc.training, model.num_classes) == (torch.bfloat16, False, 5)
        assert model(images(dtype=torch.bfloat16)).shape == (2, 5)
        model.train().reset_classifier(0, 'max')
        assert model.fc.training
        assert model(images(dtype=torch.bfloat16)).shape == (2, model.num_features)
        model.reset_classifier(4)
        assert model.global_pool.pool_type == 'max'
        assert model(images(dtype=torch.bfloat16)).shape == (2, 4)
        model.reset_classifier(0, 'catavgmax')
        assert model(images(dtype=torch.bfloat16)).shape == (2, model.head_hidden_size) == (2, 2 * model.num_features)
        model.reset_classifier(0, '')
        model.reset_classifier(0)
        assert model(images(dtype=torch.bfloat16)).ndim == 4
        model.reset_classifier(4)  # timm's own then can't run (1.0.31), or has 'avg' (1.0.9)
        assert model.global_pool.pool_type == 'avg'
        assert model(images(dtype=torch.bfloat16)).shape == (2, 4)
        model.prune_intermediate_layers([0])
        model.reset_classifier(3)
        assert model(images(dtype=torch.bfloat16)).shape == (2, 3)
    model = timm.create_model('wrn10_1_pssilu', device='meta')
    model.reset_classifier(5)
    assert model.fc.weight.is_meta


@pytest.mark.parametrize('arch', SMALL)
def test_groups_and_weight_decay(arch: str) -> None:
    model = small(arch)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert len(groups) > len(model.stages)
        assert sorted(n for names in groups.values() for n in names) == sorted(n for n, _ in model.named_parameters())
        stem, *_, head = (groups[key] for key in sorted(groups))
        assert 'conv1.weight' in stem
        assert {'fc.weight', 'act.alpha'} <= set(head)  # the shared values learn at the rate of the last layer
    assert model.no_weight_decay() == set()


@pytest.mark.parametrize('arch', SMALL)
def test_gradient_checkpointing_changes_no_number(arch: str) -> None:
    results = []
    for enable in (False, True):
        model = small(arch).train()
        model.set_grad_checkpointing(enable)
        x = images().requires_grad_()
        logits = model(x)
        logits.square().sum().backward()
        results.append([logits.detach(), x.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
