"""A training step of each recipe beside the functions of its authors' program: pixels, gradients and weights.

    python tests/benchmarks/official.py --checkouts DIR --data-dir data --output tests/benchmarks/results/official.json

DIR has clones of github.com/yaodongyu/TRADES, YisenWang/MART, wzekai99/DM-Improves-AT, dash29/robust_paf,
locuslab/robust_overfitting, locuslab/fast_adversarial, csdongxian/AWP, fzjcdt/FastAT_Benchmark,
TreeLLi/DA-Alone-Improves-AT and jiequancui/DKL, each in OWNER+NAME. Both sides get the same network (an embedded one,
in float64 and train mode), the same images (the first 8 of the test set) and the same noise. The programs want a GPU
and apex, which are replaced here by nothing, and our losses float32, which is replaced by float64.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib.util
import os
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from timm_paf.data import Batches, derive_seed, load_dataset
from timm_paf.files import environment, write_json
from timm_paf.training import Trainer
from timm_paf.training.config import check, parse
from timm_paf.training.optimization import momentum

BATCH = 8


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
    'bn_momentum': None, 'no_decay': None, 'nesterov': True, 'awp_warmup_epochs': 0.0}
"""The options at which a recipe has nothing of its paper's procedure."""


def trainer(name: str, data_dir: str | None, at: int, **changes: Any) -> Trainer:
    recipe = check(parse(['--config', name, '--output', 'x']))
    act = 'pssilu' if recipe.model.endswith('pssilu') else 'relu'
    recipe = dataclasses.replace(
        recipe, batch_size=BATCH, model=f'wrn10_1_{act}', val=0, val_attack=None, channels_last=False, compile=False,
        model_kwargs={}, **changes)
    data = dataclasses.replace(load_dataset('cifar10', data_dir, train=False).take(torch.arange(4 * BATCH)), pad=0,
                               flip=False)
    model = timm.create_model(recipe.model, pretrained=True).double()
    run = Trainer(recipe, model, DoubleBatches(data, BATCH, 0, 'cpu'), Accelerator(cpu=True))
    run.step = at
    run.gradients.class_weights = torch.rand(10, 10, generator=torch.Generator().manual_seed(0))  # of IKL
    return run


def compared(run: Trainer, theirs: Callable[[nn.Module, Tensor, Tensor, Any], Tensor]) -> dict[str, float]:
    """A step of ours, and theirs: (model, x, y, optimizer) -> adversarial images, gradients in the model."""
    model = copy.deepcopy(run.unwrapped).train()
    x, y = run.batch()
    lr, seen = run.learning_rate(), list[Tensor]()
    attack = run.attack
    run.attack = lambda *args, **kwargs: seen.append(attack(*args, **kwargs)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
    recipe = run.recipe
    norms = [p for module in model.modules() if isinstance(module, nn.BatchNorm2d) for p in module.parameters()]
    kept = [p for p in model.parameters() if not recipe.no_decay or all(p is not norm for norm in norms)]
    groups = [{'params': kept}, *([{'params': norms, 'weight_decay': 0.0}] if recipe.no_decay else [])]
    now = momentum(recipe, run.step, run.batches.steps_per_epoch, run.total_steps)
    optimizer = torch.optim.SGD(groups, lr, momentum=now, weight_decay=5e-4, nesterov=recipe.nesterov)
    torch.manual_seed(derive_seed(recipe.seed, 2, run.step, 0))
    x_adv = theirs(model, x, y, optimizer)
    optimizer.step()
    run.train_step()

    def apart(a: list[Tensor], b: list[Tensor]) -> float:
        flat = [torch.cat([t.detach().double().flatten() for t in side]) for side in (a, b)]
        return float((flat[0] - flat[1]).norm() / flat[1].norm())

    ours, parameters = list(run.unwrapped.parameters()), list(model.parameters())
    return {'pixels_apart': float(((seen[0] - x_adv).abs() > 1e-6).double().mean()),
            'gradient_apart': apart([p.grad for p in ours], [p.grad for p in parameters]),
            'weights_apart': apart(ours, parameters),
            'statistics_apart': apart([b for b in run.unwrapped.buffers() if b.is_floating_point()],
                                      [b for b in model.buffers() if b.is_floating_point()])}


def clip_beta(model: Any, most: float) -> None:
    (10 * model.act.beta.abs().sum()).backward()
    nn.utils.clip_grad_norm_(model.act.beta, most)


@contextlib.contextmanager
def remembered(function: Callable[..., Any]) -> Iterator[list[Tensor]]:
    """Collects the adversarial images of a loss that does not return them: the last input of its network."""
    seen: list[Tensor] = []
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach()) if hasattr(module, 'fc') else None)
    try:
        yield seen
    finally:
        handle.remove()


def rows(checkouts: Path, data_dir: str | None) -> Iterator[tuple[str, dict[str, float], dict[str, float]]]:
    """Yields a recipe, its step as it is, and the step at the options `PLAIN`, each beside the authors'."""
    def both(theirs: Callable[..., Tensor], name: str, at: int, **changes: Any) -> Iterator[dict[str, float]]:
        for extra in ({}, PLAIN):
            yield compared(trainer(name, data_dir, at, **{**changes, **extra}), theirs)

    with program(checkouts, 'dash29+robust_paf') as load:
        theirs = load('utils_adv')

        def madry(model: Any, x: Tensor, y: Tensor, optimizer: Any) -> Tensor:
            norm = 'linf' if 'Linf' in str(threat) else 'l2'
            model(x)
            model.eval()
            x_adv = theirs.pgd_whitebox(model, x, y, 'cpu', float(threat.eps), 10, float(threat.step), 0.0, 1.0,
                                        distance=norm).detach()
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(x_adv), y).backward()
            clip_beta(model, 0.01)
            return x_adv

        for name in ('paper_linf', 'paper_l2'):
            threat = trainer(name, data_dir, 0).recipe.threat
            yield name, *both(madry, name, 0)

        def paper_trades(model: Any, x: Tensor, y: Tensor, optimizer: Any) -> Tensor:
            with remembered(model) as seen:
                loss = theirs.trades_loss(model, x, y, 'cpu', optimizer, 0.0078, 0.031, 10, 6.0, 0.0, 1.0)[0]
            loss.backward()
            clip_beta(model, 0.1)
            return seen[-1]

        yield 'paper_linf --objective trades', *both(
            paper_trades, 'paper_linf', 0, objective='trades', paf_clip=0.1, attack_start='normal', clean_pass='none',
            separate_forwards=True)

    def of_loss(function: Callable[..., Any], last: int, **options: Any) -> Callable[..., Tensor]:
        def step(model: nn.Module, x: Tensor, y: Tensor, optimizer: Any) -> Tensor:
            with remembered(model) as seen:
                loss = function(model, x, y, optimizer, **options)
            (loss[0] if isinstance(loss, tuple) else loss).backward()
            return seen[last]
        return step

    with program(checkouts, 'wzekai99+DM-Improves-AT') as load:
        sys.modules['core'] = types.ModuleType('core')
        sys.modules['core'].__path__ = [str(checkouts / 'wzekai99+DM-Improves-AT' / 'core')]
        metrics = types.ModuleType('core.metrics')
        metrics.accuracy = lambda *_: 0.0  # type: ignore[attr-defined]
        helpers = types.ModuleType('core.utils')
        source = (checkouts / 'wzekai99+DM-Improves-AT/core/utils/utils.py').read_text()
        exec(compile(source, 'utils.py', 'exec'), helpers.__dict__)
        sys.modules |= {'core.metrics': metrics, 'core.utils': helpers}
        spec = importlib.util.spec_from_file_location(  # type: ignore[attr-defined]
            'dm_trades', checkouts / 'wzekai99+DM-Improves-AT/gowal21uncovering/utils/trades.py')
        module = importlib.util.module_from_spec(spec)  # type: ignore[attr-defined]
        spec.loader.exec_module(module)
        yield 'wang2023_1m', *both(of_loss(
            module.trades_loss, -1, step_size=2 / 255, epsilon=8 / 255, perturb_steps=10, beta=5.0,
            label_smoothing=0.1), 'wang2023_1m', 7)
        for left in [name for name in sys.modules if name.partition('.')[0] == 'core']:
            del sys.modules[left]

    with program(checkouts, 'yaodongyu+TRADES') as load:
        yield 'TRADES', *both(of_loss(
            load('trades').trades_loss, -2, step_size=2 / 255, epsilon=8 / 255, perturb_steps=10, beta=6.0),
            'wu2020_trades_awp', 0, awp=0.0)
    with program(checkouts, 'YisenWang+MART') as load:
        yield 'MART', *both(of_loss(
            load('mart').mart_loss, -1, step_size=2 / 255, epsilon=8 / 255, perturb_steps=10, beta=6.0),
            'wu2020_trades_awp', 0, awp=0.0, objective='mart')

    with program(checkouts, 'locuslab+robust_overfitting') as load:
        theirs = load('train_cifar')
        theirs.normalize = lambda x: x  # the network normalises in the recipe, and neither does here

        def rice(model: nn.Module, x: Tensor, y: Tensor, optimizer: Any) -> Tensor:
            delta = theirs.attack_pgd(model, x, y, 8 / 255, 2 / 255, 10, 1, 'l_inf').detach()
            x_adv = (x + delta).clamp(0, 1)
            loss = F.cross_entropy(model(x_adv), y)
            optimizer.zero_grad()
            loss.backward()
            return x_adv

        # their clean pass comes after the optimizer's step
        yield 'rice2020', *both(rice, 'rice2020', 0, clean_pass='none')

    source = (checkouts / 'TreeLLi+DA-Alone-Improves-AT/src/utils/adversary.py').read_text()
    theirs_pgd: dict[str, Any] = {'tc': torch, 'grad': torch.autograd.grad}
    exec(source[source.index('def input_grad'):source.index('ATTACK = ')], theirs_pgd)

    def idbh(model: nn.Module, x: Tensor, y: Tensor, optimizer: Any) -> Tensor:
        x = x.clone().requires_grad_()
        gradient = torch.autograd.grad(F.cross_entropy(model(x), y), x)[0]
        # as their train.py calls it, where the gradient takes the place of the perturbation to start at
        x_adv, _ = theirs_pgd['pgd'](x, y, model, F.cross_entropy, 8 / 255, 2 / 255, 10, gradient)
        optimizer.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        return torch.as_tensor(x_adv)

    yield 'idbh2023', *both(idbh, 'idbh2023', 0, aa=None)

    with program(checkouts, 'csdongxian+AWP', 'trades_AWP') as load:
        sys.modules['utils'] = types.ModuleType('utils')
        for name in ('Bar', 'Logger', 'AverageMeter', 'accuracy'):
            setattr(sys.modules['utils'], name, None)
        awp = load('utils_awp')

        def wu(model: nn.Module, x: Tensor, y: Tensor, optimizer: Any) -> Tensor:
            x_adv = perturb_input(model, x, 2 / 255, 8 / 255, 10)
            model.train()
            proxy = copy.deepcopy(model)
            adversary = awp.TradesAWP(model, proxy, torch.optim.SGD(proxy.parameters(), 0.1), 0.005)
            diff = adversary.calc_awp(inputs_adv=x_adv, inputs_clean=x, targets=y, beta=6.0)
            adversary.perturb(diff)
            optimizer.zero_grad()
            adv = model(x_adv)
            robust = F.kl_div(F.log_softmax(adv, 1), F.softmax(model(x), 1), reduction='batchmean')
            (F.cross_entropy(model(x), y) + 6 * robust).backward()
            optimizer.register_step_post_hook(lambda *_: adversary.restore(diff))  # their step comes before
            return x_adv

        source = (checkouts / 'csdongxian+AWP/trades_AWP/train_trades_cifar.py').read_text()
        names: dict[str, Any] = {'torch': torch, 'F': F, 'optim': torch.optim, 'Variable': torch.autograd.Variable,
                                 'device': 'cpu'}
        exec(source[source.index('def perturb_input'):source.index('def train(')], names)
        perturb_input = names['perturb_input']
        yield 'wu2020_trades_awp', *both(wu, 'wu2020_trades_awp', 9 * 4)
        del sys.modules['utils']

    def of_loop(path: str, first: str, last: str, adversarial: str, **names: Any) -> Callable[..., Tensor]:
        """A step whose lines stand in the middle of a program, from one that has ``first`` to that before ``last``."""
        lines = (checkouts / path).read_text().splitlines()
        begin = next(i for i, line in enumerate(lines) if first in line)
        end = next(i for i, line in enumerate(lines) if i > begin and line.strip() == last)
        body = compile(textwrap.dedent('\n'.join(lines[begin:end])), path, 'exec')

        def step(model: nn.Module, x: Tensor, y: Tensor, optimizer: Any) -> Tensor:
            known = {'torch': torch, 'F': F, 'model': model, 'X': x, 'y': y, 'images': x, 'labels': y, 'opt': optimizer,
                     'self': types.SimpleNamespace(model=model, eps=8 / 255), **names}
            if callable(known.get('delta')):
                known['delta'] = known['delta'](x)
            exec(body, known)
            return torch.as_tensor(eval(adversarial, known)).detach()
        return step

    apex = types.SimpleNamespace(scale_loss=lambda loss, _: contextlib.nullcontext(loss))
    clamp = {'clamp': lambda x, low, high: torch.max(torch.min(x, torch.as_tensor(high)), torch.as_tensor(low))}
    bound = torch.full((3, 1, 1), 8 / 255)

    def start(x: Tensor) -> Tensor:  # they draw channel by channel, which is other numbers
        return (x + torch.empty_like(x).uniform_(-8 / 255, 8 / 255)).clamp(0, 1) - x

    yield 'wong2020_fast', *both(of_loop(
        'locuslab+fast_adversarial/CIFAR10/train_fgsm.py', 'delta.requires_grad = True', 'opt.step()',
        'X + delta', amp=apex, epsilon=bound, alpha=10 / 255, lower_limit=0.0, upper_limit=1.0, **clamp,
        criterion=F.cross_entropy, delta=start), 'wong2020_fast', 2)
    smooth = nn.CrossEntropyLoss(label_smoothing=0.4)
    yield 'fastat_nfgsm', *both(of_loop(
        'fzjcdt+FastAT_Benchmark/fast_at/n_fgsm.py', 'adv_images = images.clone()', 'opt.step()', 'adv_images',
        criterion=smooth), 'fastat_nfgsm', 0)

    source = subprocess.run(
        ['git', '-C', checkouts / 'jiequancui+DKL', 'show', 'HEAD:DKLv1/Adv-training-dkl/train_dkl_cifar10.py'],
        capture_output=True, text=True, check=True).stdout
    names = {'torch': torch, 'F': F, 'optim': torch.optim, 'Variable': torch.autograd.Variable, 'device': 'cpu'}
    exec(source[source.index('def dkl_loss'):source.index('def cross_entropy')], names)
    exec(source[source.index('def perturb_input'):source.index('def train(')], names)
    eps = float(trainer('ikl2023', data_dir, 4 * 100).threat().eps)
    class_weights = torch.rand(10, 10, generator=torch.Generator().manual_seed(0))

    def cui(model: nn.Module, x: Tensor, y: Tensor, optimizer: Any) -> Tensor:
        of_class = F.one_hot(y, 10).double() @ class_weights
        weight = of_class.view(-1, 10, 1) @ of_class.view(-1, 1, 10)
        x_adv = names['perturb_input'](model, x, eps / 2, eps, 5, weight=weight)
        model.train()
        optimizer.zero_grad()
        adv, clean = model(x_adv), model(x)
        (F.cross_entropy(clean, y) + names['dkl_loss'](clean, adv, weight, 4.0, 20.0)).backward()
        return x_adv

    yield 'ikl2023', *both(cui, 'ikl2023', 4 * 100, awp=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--checkouts', type=Path, required=True)
    parser.add_argument('--data-dir', default=os.environ.get('CIFAR10_ROOT'))
    parser.add_argument('--output', type=Path, required=True)
    args = parser.parse_args()
    stand_ins()
    found = []
    for name, now, plain in rows(args.checkouts, args.data_dir):
        found.append({'recipe': name, 'now': now, 'plain': plain})
        for row in (now, plain):
            print(name, {key: f'{value:.1e}' for key, value in row.items()}, flush=True)
    checkouts = {path.name: subprocess.run(['git', '-C', path, 'rev-parse', 'HEAD'], capture_output=True, text=True,
                                           check=True).stdout.strip() for path in sorted(args.checkouts.iterdir())}
    about = environment()
    for path, word in ((args.checkouts, 'DIR'), (args.data_dir, 'data')):  # no path of a machine
        about['command'] = about['command'].replace(str(path), word)
    write_json(args.output, {'n': BATCH, 'steps': found, 'checkouts': checkouts, **about})


if __name__ == '__main__':
    main()
