"""A step of ours beside one of an authors' program: the same network, images, noise and momenta, in float64.

What their optimizer and network have is written in a `Program`, from their code and not from our recipe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from timm_paf.data import Batches, derive_seed, load_dataset
from timm_paf.training import Trainer
from timm_paf.training.config import check, parse

BATCH = 8
MEAN, STD = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (
    (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)))
"""What the programs that normalise do it by."""


class Program(NamedTuple):
    """What an authors' program has at the step that is compared."""

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    decays_norms: bool = True
    bn_momentum: float = 0.1
    args: dict[str, Any] = {}
    normalises: bool = False  # within its network


class Front(nn.Module):
    """A network that normalises its input."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x - MEAN) / STD)


class DoubleBatches(Batches):
    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(step)
        return x.double(), y


def stand_ins() -> None:
    """Replaces what the programs want of a GPU and of apex."""
    torch.Tensor.cuda = nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    torch.FloatTensor = torch.DoubleTensor  # type: ignore[misc]
    to_float = torch.Tensor.float
    torch.Tensor.float = lambda self: self if self.requires_grad else to_float(self)  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)
    sys.modules['apex'] = types.ModuleType('apex')
    sys.modules['apex'].amp = None  # type: ignore[attr-defined]


@contextlib.contextmanager
def program(checkouts: Path, name: str, folder: str = '') -> Iterator[Callable[[str], Any]]:
    """Imports modules of a checkout, with no arguments on the command line; afterwards none of them is left."""
    path, before, argv = checkouts / name / folder, set(sys.modules), sys.argv
    sys.path.insert(0, str(path))
    sys.argv = ['program']
    try:
        yield importlib.import_module
    finally:
        sys.argv = argv
        sys.path.remove(str(path))
        for module in set(sys.modules) - before:
            if str(path) in str(getattr(sys.modules[module], '__file__', '')):
                del sys.modules[module]


PLAIN = {
    'attack_bn': 'eval', 'attack_start': 'uniform', 'separate_forwards': False, 'clean_pass': 'none',
    'model_kwargs': {}, 'bn_momentum': None, 'momentum_cycle': None, 'no_decay': None, 'nesterov': True,
    'awp_warmup_epochs': 0.0}
"""The options at which a recipe has nothing of its paper's procedure."""


def network(act: str, args: dict[str, Any]) -> nn.Module:
    """The embedded network with an activation, and of another padding or normalisation on the same weights."""
    weights = timm.create_model(f'wrn10_1_{act}', pretrained=True).state_dict()
    model = timm.create_model(f'wrn10_1_{act}', num_classes=10, **args)
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert all(name.startswith(('normalize.', 'variant_')) for name in missing), missing
    return model.double()


def trainer(name: str, data_dir: str | None, at: int, **changes: Any) -> Trainer:
    recipe = check(parse(['--config', name, '--output', 'x']))
    act = 'pssilu' if recipe.model.endswith('pssilu') else 'relu'
    args = {key: value for key, value in recipe.model_kwargs.items() if key != 'shortcut'}  # a WRN has one kind of it
    recipe = dataclasses.replace(recipe, **{
        'batch_size': BATCH, 'model': f'wrn10_1_{act}', 'val': 0, 'val_attack': None, 'aa': None,
        'channels_last': False, 'compile': False, 'model_kwargs': args, **changes})
    data = dataclasses.replace(load_dataset('cifar10', data_dir, train=False).take(torch.arange(4 * BATCH)), pad=0,
                               flip=False)
    model = network(act, recipe.model_kwargs)
    run = Trainer(recipe, model, DoubleBatches(data, BATCH, 0, 'cpu', pad_mode=recipe.pad_mode), Accelerator(cpu=True))
    run.step = at
    run.gradients.class_weights = torch.rand(10, 10, generator=torch.Generator().manual_seed(0))  # of IKL
    return run


def compared(
        run: Trainer, program: Program, theirs: Callable[[nn.Module, Tensor, Tensor, Any], Tensor]) -> dict[str, float]:
    """A step of ours, and theirs: (model, x, y, optimizer) -> adversarial images, gradients in the model."""
    net = network(run.recipe.model.rpartition('_')[2], program.args).train()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = program.bn_momentum
    kept = {id(p) for norm in norms for p in norm.parameters() if not program.decays_norms}
    groups = [{'params': [p for p in net.parameters() if (id(p) in kept) is apart],
               'weight_decay': 0.0 if apart else 5e-4} for apart in (False, True)]
    optimizer = torch.optim.SGD([group for group in groups if group['params']], program.lr, momentum=program.momentum,
                                nesterov=program.nesterov)
    ours = dict(run.unwrapped.named_parameters())
    for name, p in net.named_parameters():  # as if steps came before, or the momentum would make no difference
        for sgd, parameter in ((optimizer, p), (run.optimizer.optimizer, ours[name])):
            sgd.state[parameter]['momentum_buffer'] = p.detach() / 10
    x, y = run.batch()
    seen = list[Tensor]()
    attack = run.attack
    run.attack = lambda *args, **kwargs: seen.append(attack(*args, **kwargs)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
    torch.manual_seed(derive_seed(run.recipe.seed, 2, run.step, 0))
    x_adv = theirs(Front(net) if program.normalises else net, x, y, optimizer)
    optimizer.step()
    run.train_step()

    def apart(pairs: list[tuple[Tensor, Tensor]]) -> float:
        flat = [torch.cat([t.detach().double().flatten() for t in side]) for side in zip(*pairs)]
        return float((flat[0] - flat[1]).norm() / flat[1].norm())

    return {'pixels_apart': float(((seen[0] - x_adv).abs() > 1e-6).double().mean()),
            'gradient_apart': apart([(ours[name].grad, p.grad) for name, p in net.named_parameters()]),
            'weights_apart': apart([(ours[name], p) for name, p in net.named_parameters()]),
            'statistics_apart': apart([(run.unwrapped.get_buffer(name), b) for name, b in net.named_buffers()
                                       if 'running' in name])}


@contextlib.contextmanager
def remembered(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects a network's inputs, among them the adversarial images of a loss that does not return them."""
    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()
