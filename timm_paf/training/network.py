"""Creates the network of a training run, and says how it is run: compiled where that pays, in which precision."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..convert import convert_activations, create_converted, create_outline
from ..files import is_of_machine
from ..normalize import statistics_of
from ..speed import emulates_bfloat16, forward_flops, has_bfloat16_units, pays_to_compile, to_channels_last
from ..weights import InitialWeights, network_of
from ..weights.initial import Loaded
from ..weights.size_limit import SizeLimit
from ..wording import reason_of
from .optimization import freeze_norms, set_bn_momentum
from .recipe import Recipe
from .run_directory import recorded_choice

__all__ = ['adapt_network', 'chooses_to_compile', 'create_network', 'precision_advice', 'runner']


def create_network(
        recipe: Recipe, num_classes: int, sample: Tensor, images: str, init: InitialWeights | None = None,
        log: Callable[[str], None] = print) -> tuple[nn.Module, Recipe]:
    """Returns the network of a recipe, with random weights of its seed or given ones, after a try with an image.

    Args:
        recipe: the recipe, which names model and activation.
        num_classes: number of classes of the data set.
        sample: an image of the data set, (1, channels, height, width) float32 in [0, 1].
        images: name of the data set, for messages.
        init: the weights to start from; None for random ones.
        log: function that gets a line on what was loaded, and how close an activation is to what it starts as.

    Returns:
        The network, and the recipe with what the weights brought: their record, and the arguments of the network that
        they need.

    Raises:
        ValueError: if the activation lacks an argument, the weights are of another network, or the model does not take
            such images or lacks gradient checkpointing where the recipe wants it.
    """
    torch.manual_seed(recipe.seed)
    if init is not None:
        _check_arguments(recipe, init)
    name, of_tag = network_of(recipe.model)
    if name != recipe.model and init is None:
        log(f'{recipe.model} without --init: {name} with its arguments and random weights; --init pretrained for those '
            'of the name')
    given = recipe.model_kwargs
    for args in (init.model_args if init else {}, of_tag):
        recipe = replace(recipe, model_kwargs={**args, **recipe.model_kwargs})
    try:
        model, loaded = _build(recipe, num_classes, sample, init, log)
        with torch.no_grad():
            shape = model.eval()(sample).shape
    except TypeError as error:  # its message names the arguments that activation or network do not have
        unknown = re.search(r"(?:unexpected|multiple values for) keyword argument '(\w+)'", str(error))
        if unknown and init is not None and unknown[1] in recipe.model_kwargs.keys() - given.keys():
            raise ValueError(f'{init.source} is of a network with {unknown[1]}, which {recipe.model} does not take; '
                             'expected weights of the same network, or another --model') from error
        if unknown and unknown[1] in given:
            rest = {key: value for key, value in given.items() if key != unknown[1]}
            raise ValueError(f'--model-kwargs has {unknown[1]}, which {recipe.model} does not take; expected '
                             f"--model-kwargs '{json.dumps(rest)}', or another --model") from error
        raise ValueError(f'--act-kwargs {recipe.act_kwargs}, --model-kwargs {recipe.model_kwargs}: {reason_of(error)}'
                         ) from error
    # timm raises these for a wrong tag or image size. What else it raises for sizes is RuntimeError of `_build`, so
    # a fault of ours behind it is shown as one.
    except (RuntimeError, AssertionError) as error:
        if is_of_machine(error):
            raise MemoryError(f'{recipe.model} as asked for takes more memory than there is: {reason_of(error)}'
                              ) from error
        raise ValueError(f'{recipe.model} does not take images of {images}'
                         + (f' with --model-kwargs {json.dumps(given)}' if given else '')
                         + f': {reason_of(error)}') from error
    if init is not None and loaded is not None:
        recipe = replace(recipe, init={**init.record(), 'new_head': list(loaded.new_head)})
    if shape != (1, num_classes):
        raise ValueError(f'{recipe.model} gives {tuple(shape)} for an image; expected (1, {num_classes})')
    if recipe.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:
            raise ValueError(f'{recipe.model} has no gradient checkpointing; expected another model, or '
                             '--no-grad-checkpointing') from error
    return model, recipe


def adapt_network(recipe: Recipe, model: nn.Module) -> tuple[nn.Module, Sequence[nn.Module]]:
    """Returns a network as its recipe trains it, and the norms that stay in eval mode: memory format and BatchNorm."""
    if any(getattr(module, 'grad_checkpointing', False) for module in model.modules()):
        _checkpoint_without_reentry()
    frozen = freeze_norms(model) if recipe.freeze_bn else ()
    if recipe.bn_momentum is not None:
        set_bn_momentum(model, recipe.bn_momentum)
    if recipe.sync_bn:
        model = convert_sync_batchnorm(model)
    if recipe.channels_last and not recipe.fsdp:  # FSDP takes contiguous weights alone; images stay channels_last
        model = to_channels_last(model)
    return model, frozen


def _check_arguments(recipe: Recipe, init: InitialWeights) -> None:
    """Raises ValueError if arguments of the network contradict what its initial weights were trained with."""
    theirs, ours = init.model_args, recipe.model_kwargs
    if init.kind == 'file':
        cfg = timm.models.get_pretrained_cfg(recipe.model, allow_unregistered=True)
        if 'normalize' not in ours and cfg and statistics_of(cfg.to_dict()):
            raise ValueError(f'{init.source} does not say whether its network takes images in [0, 1], or normalised '
                             f"ones as timm's {recipe.model}; expected --model-kwargs '{{normalize: [[MEAN], [STD]]}}' "
                             "or '{normalize: null}'")
        return
    for name, default in (('normalize', None), ('pad_type', ''), ('shortcut', 'preact'), ('final_norm', True)):
        given, expected = (json.dumps(args.get(name, default)) for args in (ours, theirs))
        if name in ours and given != expected:
            raise ValueError(f'--model-kwargs has {name} {given} and {init.source} is of a network with {expected}; '
                             'expected the same, or none')


def _bound(init: InitialWeights | None) -> AbstractContextManager[Any]:
    """Returns the context in which a network is made by arguments that may be a stranger's."""
    return nullcontext() if init is None or init.path is None or init.kind == 'file' else SizeLimit(init.path)


def _check_heads(recipe: Recipe, model: nn.Module, init: InitialWeights) -> None:
    """Raises ValueError if the initial weights are of other numbers of heads, of which their shapes say nothing."""
    def heads(network: nn.Module) -> dict[str, int]:
        return {name: vars(module)[key] for name, module in network.named_modules()
                for key in ('num_heads', 'heads') if isinstance(vars(module).get(key), int)}

    ours, name = heads(model), init.architecture
    same = network_of(recipe.model)[0] == name and all(
        recipe.model_kwargs.get(key) == init.model_args.get(key) for key in ('num_heads', 'depths'))
    if not ours or same or name is None or not timm.is_model(name):
        return
    theirs = heads(create_outline(name, within=_bound(init), **init.model_args))
    for part, count in ours.items():
        if theirs.get(part, count) != count:
            raise ValueError(f'{part} has {count} heads and {init.source} is of a network with {theirs[part]}; '
                             f'expected --model {name}, with the num_heads of the weights')


def _build(
        recipe: Recipe, num_classes: int, sample: Tensor, init: InitialWeights | None, log: Callable[[str], None],
) -> tuple[nn.Module, Loaded | None]:
    """Returns the network, converted where the recipe says so, and what was loaded into it."""
    def create(act: str | None, start: str | None = None) -> nn.Module:
        own = recipe.act_kwargs if act or not recipe.act else None
        try:
            return create_converted(recipe.model, act, recipe.act_share if act else None, own, start,
                                    within=_bound(init), num_classes=num_classes, **recipe.model_kwargs)
        except (LookupError, AttributeError, ArithmeticError) as error:  # as timm raises for sizes that do not fit
            raise RuntimeError(reason_of(error)) from error

    if init is None:
        return create(recipe.act, recipe.act_start), None
    size, given = tuple(sample.shape[1:]), recipe.act_kwargs.keys()
    model, fault = create(None), None
    _check_heads(recipe, model, init)
    try:
        loaded = init.load(model, recipe.act_start, given, size)
    except ValueError as error:  # the weights may be of a network that was converted in the same way
        if recipe.act is None:
            raise
        fault = error
    if fault is not None:
        torch.manual_seed(recipe.seed)
        model = create(recipe.act)
        try:
            loaded = init.load(model, recipe.act_start, given, size)
        except ValueError:
            raise fault from None
    log(f'starts from {loaded}')
    if recipe.act is not None and fault is None:
        log(str(convert_activations(
            model, recipe.act, recipe.act_share, start=recipe.act_start or 'same',  # type: ignore[arg-type]
            input_size=size, **recipe.act_kwargs)))
    return model, loaded


def _checkpoint_without_reentry() -> None:
    """Makes timm's networks checkpoint as newer timm's do by default; the older call torch's function without a choice.

    A reentrant checkpoint gives no gradient of the images alone, which an attack asks for.
    """
    quiet = functools.partial(checkpoint, use_reentrant=False)
    for name, module in list(sys.modules.items()):
        if name.startswith('timm.'):
            for key, value in list(vars(module).items()):  # the function, or its module under a name of its own
                if value is checkpoint:
                    setattr(module, key, quiet)
                elif value is torch.utils.checkpoint:
                    setattr(module, key, SimpleNamespace(**{**vars(value), 'checkpoint': quiet}))


def runner(recipe: Recipe, same_size: bool, processes: int) -> Callable[[Any], Any]:
    """Returns what makes of a network the one that is run: compiled as the recipe says, or itself.

    Each network that it is given has a compiled program of its own, so that none is compiled again when the mode
    changes. So has a smaller last batch: by default torch makes a program for both sizes when it sees the second, and a
    run that is resumed would be without it until then.

    Args:
        same_size: whether all batches have one size.
        processes: number of processes of the run.

    Raises:
        ValueError: for CUDA graphs of several processes, whose gradients DDP would add up while a graph runs.
    """
    if not (recipe.compile or recipe.cuda_graphs):
        return lambda network: network
    if recipe.cuda_graphs and processes > 1:
        raise ValueError(f'--cuda-graphs works on one GPU, and there are {processes} processes; expected one, or no '
                         '--cuda-graphs')
    return functools.partial(torch.compile, dynamic=None if same_size else False,
                             mode='reduce-overhead' if recipe.cuda_graphs else None)


def chooses_to_compile(
        recipe: Recipe, model: nn.Module, sample: Tensor, steps_per_epoch: int, device: torch.device,
        output: Path) -> bool:
    """Returns whether to compile: the recipe's choice, else that of the run in ``output``, else whether it pays."""
    if recipe.cuda_graphs:
        return True
    if recipe.compile is not None:
        return recipe.compile
    chosen = recorded_choice(output, 'compile')  # a run is resumed as it began
    if chosen is not None:
        return bool(chosen)
    steps = recipe.total_steps(steps_per_epoch)
    passes = 2 * recipe.threat.steps + 3  # an attack step is a forward and a backward pass, training counts as three
    return pays_to_compile(forward_flops(model, sample) * passes * recipe.batch_size * steps, device)


def precision_advice(mixed_precision: str, device: torch.device) -> list[str]:
    """Returns what to say at the start of a training in a precision, a line each: that another one is faster, or asked
    for of Accelerate, whose configuration does not count.

    Args:
        mixed_precision: 'no', 'bf16' or 'fp16', as the recipe has it.
        device: where the training runs.
    """
    found = []
    if mixed_precision == 'no' and has_bfloat16_units(device):
        found.append(f'the {device.type} has units for bfloat16 and the run is in float32: --mixed-precision bf16 is '
                     'faster, with other weights')
    if mixed_precision == 'bf16' and emulates_bfloat16(device):
        found.append(f'the {device.type} has no units for bfloat16, which it only emulates: --mixed-precision no is '
                     'faster, with other weights')
    asked = os.environ.get('ACCELERATE_MIXED_PRECISION', 'no').lower()
    if asked not in ('no', mixed_precision):
        found.append(f'mixed_precision {asked} of accelerate does not count, the recipe has {mixed_precision}' + (
            f': --mixed-precision {asked} takes it' if asked in ('bf16', 'fp16') else ''))
    return found
