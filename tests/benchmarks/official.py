"""A training step of each recipe beside the functions of its authors' program: pixels, gradients and weights.

    python tests/benchmarks/official.py --checkouts DIR --data-dir data --output tests/benchmarks/results/official.json

DIR has clones of github.com/yaodongyu/TRADES, YisenWang/MART, wzekai99/DM-Improves-AT, dash29/robust_paf,
locuslab/robust_overfitting, locuslab/fast_adversarial, csdongxian/AWP, fzjcdt/FastAT_Benchmark,
TreeLLi/DA-Alone-Improves-AT and jiequancui/DKL, each in OWNER+NAME; torchattacks 3.5.1 is installed. Both sides get the
same network (an embedded one, in float64 and train mode), the same images (the first 8 of the test set), the same noise
and the same momenta. The programs want a GPU and apex, which are replaced here by nothing, and our losses float32,
which is replaced by float64. Augmentations are compared on 800 images each.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from official_step import BATCH, MEAN, PLAIN, STD, Program, compared, program, remembered, stand_ins, trainer
from PIL import Image
from torch import Tensor, nn

from timm_paf.data import Augmentation, load_dataset
from timm_paf.files import environment, write_json

AUGMENTED = 800
"""Number of images that an augmentation is compared on."""


def clip_beta(model: Any, most: float) -> None:
    (10 * model.act.beta.abs().sum()).backward()
    nn.utils.clip_grad_norm_(model.act.beta, most)


def rows(checkouts: Path, data_dir: str | None) -> Iterator[tuple[str, dict[str, float], dict[str, float]]]:
    """Yields a recipe, its step as it is, and the step at the options `PLAIN`, each beside the authors'."""
    def both(
            theirs: Callable[..., Tensor], of: Program, name: str, at: int, **changes: Any,
    ) -> Iterator[dict[str, float]]:
        for extra in ({}, PLAIN):
            yield compared(trainer(name, data_dir, at, **{**changes, **extra}), of, theirs)

    with program(checkouts, 'dash29+robust_paf') as load:
        nesterov = Program(nesterov=True)  # train.py
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
            yield name, *both(madry, nesterov, name, 0)

        def paper_trades(model: Any, x: Tensor, y: Tensor, optimizer: Any) -> Tensor:
            with remembered(model) as seen:
                loss = theirs.trades_loss(model, x, y, 'cpu', optimizer, 0.0078, 0.031, 10, 6.0, 0.0, 1.0)[0]
            loss.backward()
            clip_beta(model, 0.1)
            return seen[-1]

        yield 'paper_linf --objective trades', *both(
            paper_trades, nesterov, 'paper_linf', 0, objective='trades', paf_clip=0.1, attack_start='normal',
            clean_pass='none', separate_forwards=True)

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
            label_smoothing=0.1),
            # OneCycleLR's first step, watrain.py and wideresnetwithswish.py
            Program(0.2 / 25, 0.95, True, False, 0.01, {'pad_type': 'same'}, True), 'wang2023_1m', 0)
        for left in [name for name in sys.modules if name.partition('.')[0] == 'core']:
            del sys.modules[left]

    no_awp = {'awp': 0.0, 'awp_warmup_epochs': 0.0}
    with program(checkouts, 'yaodongyu+TRADES') as load:
        yield 'TRADES', *both(of_loss(
            load('trades').trades_loss, -2, step_size=2 / 255, epsilon=8 / 255, perturb_steps=10, beta=6.0),
            Program(), 'wu2020_trades_awp', 0, **no_awp)
    with program(checkouts, 'YisenWang+MART') as load:
        yield 'MART', *both(of_loss(
            load('mart').mart_loss, -1, step_size=2 / 255, epsilon=8 / 255, perturb_steps=10, beta=6.0),
            Program(), 'wu2020_trades_awp', 0, **no_awp, objective='mart')

    with program(checkouts, 'locuslab+robust_overfitting') as load:
        theirs = load('train_cifar')

        def rice(model: nn.Module, x: Tensor, y: Tensor, optimizer: Any) -> Tensor:
            delta = theirs.attack_pgd(model, x, y, 8 / 255, 2 / 255, 10, 1, 'l_inf').detach()
            x_adv = (x + delta).clamp(0, 1)
            loss = F.cross_entropy(model(theirs.normalize(x_adv)), y)
            optimizer.zero_grad()
            loss.backward()
            return x_adv

        # their clean pass comes after the optimizer's step
        yield 'rice2020', *both(rice, Program(), 'rice2020', 0, clean_pass='none')

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

    yield 'idbh2023', *both(idbh, Program(), 'idbh2023', 0, aa=None)

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
        yield 'wu2020_trades_awp', *both(wu, Program(), 'wu2020_trades_awp', 9 * 4)
        del sys.modules['utils']

    def of_loop(
            path: str, first: str, last: str, adversarial: str, before: str = '', **names: Any,
    ) -> Callable[..., Tensor]:
        """A step whose lines stand in the middle of a program, from one that has ``first`` to that before ``last``.

        ``before`` is done first: statements of ours, or the beginning of a line of theirs.
        """
        lines = (checkouts / path).read_text().splitlines()
        begin = next(i for i, line in enumerate(lines) if first in line)
        end = next(i for i, line in enumerate(lines) if i > begin and line.strip() == last)
        before = next((line.strip() for line in lines if before and line.strip().startswith(before)), before)
        body = compile(before + '\n' + textwrap.dedent('\n'.join(lines[begin:end])), path, 'exec')

        def step(model: nn.Module, x: Tensor, y: Tensor, optimizer: Any) -> Tensor:
            known = {'torch': torch, 'F': F, 'model': model, 'X': x, 'y': y, 'images': x, 'labels': y, 'opt': optimizer,
                     'self': types.SimpleNamespace(model=model, eps=8 / 255), **names}
            exec(body, known)
            return torch.as_tensor(eval(adversarial, known)).detach()
        return step

    apex = types.SimpleNamespace(scale_loss=lambda loss, _: contextlib.nullcontext(loss))
    clamp = {'clamp': lambda x, low, high: torch.max(torch.min(x, torch.as_tensor(high)), torch.as_tensor(low))}

    def start(x: Tensor) -> Tensor:  # they draw channel by channel, which is other numbers
        return (x + torch.empty_like(x).uniform_(-8 / 255, 8 / 255)).clamp(0, 1) - x

    # CyclicLR's third of 60 steps; their images, eps and bounds are normalised, not the input of their network
    yield 'wong2020_fast', *both(of_loop(
        'locuslab+fast_adversarial/CIFAR10/train_fgsm.py', 'delta.requires_grad = True', 'opt.step()',
        '(X + delta) * std + mu', 'delta = start(X) / std; X = (X - mu) / std', start=start, mu=MEAN, std=STD,
        amp=apex, epsilon=8 / 255 / STD, alpha=10 / 255 / STD, lower_limit=-MEAN / STD, upper_limit=(1 - MEAN) / STD,
        **clamp, criterion=F.cross_entropy), Program(0.2 * 2 / 30, 0.9 - 0.1 * 2 / 30), 'wong2020_fast', 2)
    smooth = nn.CrossEntropyLoss(label_smoothing=0.4)
    first = Program(0.1 / 25, 0.95)  # OneCycleLR's first step
    yield 'fastat_nfgsm', *both(of_loop(
        'fzjcdt+FastAT_Benchmark/fast_at/n_fgsm.py', 'adv_images = images.clone()', 'opt.step()', 'adv_images',
        criterion=smooth), first, 'fastat_nfgsm', 0)
    yield 'fastat_ema', *both(of_loop(
        'fzjcdt+FastAT_Benchmark/fast_at/pgd_at.py', 'adv_images = pgd_adv_images_generator(', 'opt.step()',
        'adv_images', 'pgd_adv_images_generator = PGD(', PGD=importlib.import_module('torchattacks').PGD,
        criterion=smooth), first, 'fastat_ema', 0)

    def of_dkl(file: str) -> str:  # one of their file names can't be checked out everywhere
        return subprocess.run(
            ['git', '-C', checkouts / 'jiequancui+DKL', 'show', f'HEAD:DKLv1/Adv-training-dkl/{file}'],
            capture_output=True, text=True, check=True).stdout

    source, awp = of_dkl('train_dkl_cifar10.py'), types.ModuleType('utils_awp')
    exec(of_dkl('utils_awp.py'), awp.__dict__)
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
        proxy = copy.deepcopy(model)
        adversary = awp.TradesAWP(model, proxy, torch.optim.SGD(proxy.parameters(), 0.2), 0.005)
        diff = adversary.calc_awp(x_adv, x, y, weight, 4.0, 20.0)
        adversary.perturb(diff)
        optimizer.zero_grad()
        adv, clean = model(x_adv), model(x)
        (F.cross_entropy(clean, y) + names['dkl_loss'](clean, adv, weight, 4.0, 20.0)).backward()
        optimizer.register_step_post_hook(lambda *_: adversary.restore(diff))  # their step comes before
        return x_adv

    yield 'ikl2023', *both(cui, Program(0.1), 'ikl2023', 4 * 100)  # half of the cosine is done


def augmentations(checkouts: Path, data_dir: str | None) -> Iterator[dict[str, Any]]:
    """Yields of how many images an augmentation differs from the authors' with their generator at the same seed."""
    images = load_dataset('cifar10', data_dir, train=False).images[:AUGMENTED].numpy()
    theirs: dict[str, Any] = {}
    exec((checkouts / 'TreeLLi+DA-Alone-Improves-AT/src/data/idbh.py').read_text(), theirs)
    for name in ('weak', 'strong'):
        ours, layers, differ = Augmentation(32, f'idbh-{name}'), theirs['IDBH'](f'cifar10-{name}'), 0
        for seed, pixels in enumerate(images):
            torch.manual_seed(seed)
            expected = (layers(Image.fromarray(pixels)) * 255).round().byte().permute(1, 2, 0).numpy()
            differ += not np.array_equal(ours(pixels, seed), expected)
        yield {'aa': f'idbh-{name}', 'n': len(images), 'differ': differ}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--checkouts', type=Path, required=True)
    parser.add_argument('--data-dir', default=os.environ.get('CIFAR10_ROOT'))
    parser.add_argument('--output', type=Path, required=True)
    args = parser.parse_args()
    if importlib.util.find_spec('torchattacks') is None:
        parser.error('the attack of PGD-AT-WA is not installed: pip install torchattacks==3.5.1')
    augmented = list(augmentations(args.checkouts, args.data_dir))
    print(augmented, flush=True)
    stand_ins()
    found = []
    for name, now, plain in rows(args.checkouts, args.data_dir):
        found.append({'recipe': name, 'now': now, 'plain': plain})
        for row in (now, plain):
            print(name, {key: f'{value:.1e}' for key, value in row.items()}, flush=True)
    checkouts = {path.name: subprocess.run(['git', '-C', path, 'rev-parse', 'HEAD'], capture_output=True, text=True,
                                           check=True).stdout.strip() for path in sorted(args.checkouts.iterdir())}
    about = environment()
    about['versions']['torchattacks'] = importlib.metadata.version('torchattacks')
    for path, word in ((args.checkouts, 'DIR'), (args.data_dir, 'data')):  # no path of a machine
        about['command'] = about['command'].replace(str(path), word)
    write_json(args.output, {'n': BATCH, 'steps': found, 'augmentations': augmented, 'checkouts': checkouts, **about})


if __name__ == '__main__':
    main()
