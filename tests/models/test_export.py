"""The networks in other programs' forms: exported, compiled, ONNX; each with the same logits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from networks import EXACT, SMALL, images, small
from test_resnet_imagenet import small as small_imagenet
from torch import Tensor, nn

import timm_paf
from timm_paf.convert import SHARES


class EveryPAF(nn.Module):
    """The same input through each of them, near 0 and where an exponential overflows."""

    def __init__(self) -> None:
        super().__init__()
        self.acts = nn.ModuleList([timm_paf.create_paf(name) for name in timm_paf.list_pafs()])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([act(scale * (x - 0.5)) for scale in (8, 400) for act in self.acts], 1)


NETWORKS = {
    'every PAF': (EveryPAF, 8),
    'wrn10_1': (lambda: small('wrn10_1'), 32),
    'resnet50': (lambda: small('resnet50'), 32),
    'resnet18_in': (lambda: small_imagenet('resnet18_in'), 64)}


@pytest.fixture(scope='module', params=NETWORKS)
def exported(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.export.ExportedProgram, int]:
    """The network, its program for batches of any size, and its images' size."""
    create, size = NETWORKS[request.param]
    model = create()
    batch = torch.export.Dim('batch', min=1, max=1024)
    program = torch.export.export(model, (images(size=(size, size)),), dynamic_shapes=({0: batch},))
    return model, program, size


def test_exported_programs(exported: tuple[nn.Module, torch.export.ExportedProgram, int], tmp_path: Path) -> None:
    model, program, size = exported
    torch.export.save(program, tmp_path / 'model.pt2')
    for batch in (1, 5):
        x = images(batch, size=(size, size))
        for module in (program.module(), torch.export.load(tmp_path / 'model.pt2').module()):
            torch.testing.assert_close(module(x), model(x), rtol=1e-5, atol=1e-5)


def test_onnx(exported: tuple[nn.Module, torch.export.ExportedProgram, int], tmp_path: Path) -> None:
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(package)
    import onnxruntime

    model, program, size = exported
    path = tmp_path / 'model.onnx'
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for batch in (2, 5):
        x = images(batch, size=(size, size))
        found, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-4, atol=1e-4)


def test_a_compiled_network_has_the_same_logits_and_gradients() -> None:
    results = []
    for compiled in (False, True):
        model, x = small_imagenet('resnet18_in').train(), images(size=(64, 64)).requires_grad_()
        # 'aot_eager' is all of it but for the machine code: no graph may break, and the backward pass is traced
        logits = (torch.compile(model, backend='aot_eager', fullgraph=True) if compiled else model)(x)
        logits.square().sum().backward()
        results.append([logits.detach(), x.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings('ignore:`torch.jit')
@pytest.mark.parametrize('name', ['wrn10_1', 'resnet50', 'resnet18_in'])
def test_what_fx_writes_is_torchscript_too(name: str) -> None:
    create, size = NETWORKS[name]
    model, x = create(), images(size=(size, size))
    for network in (model, torch.fx.symbolic_trace(model)):
        torch.testing.assert_close(torch.jit.script(network)(x), model(x), rtol=1e-5, atol=1e-5)


# ---- functional calls


def networks() -> dict[str, nn.Module]:
    found = {arch: small(arch) for arch in SMALL}
    found['frozen'] = small('wrn10_1', act_kwargs={'alpha': 1.37, 'frozen': True})
    found['resnet18_in'] = small_imagenet('resnet18_in').eval()
    for share in SHARES:
        found[share] = timm.create_model('resnet10t', num_classes=5).eval()
        timm_paf.convert_activations(found[share], 'pssilu', share, input_size=(3, 32, 32))
    return found


def members(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize('name', [*SMALL, 'frozen', 'resnet18_in', *SHARES])
def test_a_functional_call_is_the_other_network_and_changes_none(name: str) -> None:
    model, x = networks()[name], images(size=(64, 64))
    before, kept = members(model), {key: value.clone() for key, value in members(model).items()}
    values = {key: value.detach() * 1.5 if value.is_floating_point() else value for key, value in before.items()}
    other = copy.deepcopy(model)
    for key, value in members(other).items():
        value.data.copy_(values[key])
    torch.testing.assert_close(torch.func.functional_call(model, values, (x,)), other(x), **EXACT)
    after = members(model)
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)  # the tensors themselves, Parameters still
    for key, value in after.items():
        torch.testing.assert_close(value, kept[key], **EXACT)


def test_gradients_per_image_are_those_of_one_image_at_a_time() -> None:
    model, x = small('resnet18'), images(3)
    expected = model(x)
    values = {key: value.detach() for key, value in model.named_parameters()}

    def loss(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (image[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
    for index, image in enumerate(x):
        alone = torch.autograd.grad(model(image[None]).square().sum(), list(model.parameters()))
        for key, value in zip(values, alone, strict=True):
            torch.testing.assert_close(found[key][index], value, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model(x), expected, **EXACT)
    assert len(list(model.parameters())) == len(values)


def test_torch_still_restores_a_shared_module_wrongly() -> None:
    """Without a line of ours. When this fails torch is mended: `PAF.named_modules` can go with older ones."""
    act = nn.PReLU()
    model = nn.ModuleDict({'first': act, 'second': act})
    model.forward = lambda x: model['second'](model['first'](x))
    torch.func.functional_call(model, {'first.weight': torch.tensor([0.75])}, (torch.ones(1),))
    assert act.weight.item() == 0.75
    assert not isinstance(act.weight, nn.Parameter)
