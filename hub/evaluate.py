"""Measure the robustness of a run, a bundle or a named model, and write it to evaluation.json.

    python -m hub.evaluate RUN|BUNDLE|MODEL-NAME --data-dir data --n 1000 --attacks clean,pgd-50,autoattack
    accelerate launch -m hub.evaluate RUN --data-dir data --images 10000 --masking              (on all GPUs)
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m hub.evaluate RUN --data-dir data     (two processes on CPUs)

What is found is kept batch by batch in evaluation.state beside evaluation.json; killed, the same command goes on from
there, with any number of processes, to the same verdicts.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from timm_paf.attacks import ThreatModel, frozen_view, parse_fraction
from timm_paf.autoattack_parts import AUTOATTACK
from timm_paf.data import DATASETS, ImageSet, load_dataset, to_float
from timm_paf.evaluation import Evaluation, check_attacks, parts_of, passes, worst_case
from timm_paf.evaluation_state import State
from timm_paf.files import environment, read_json, write_json
from timm_paf.folders import open_folder
from timm_paf.masking import masking_attacks, masking_report, same_twice
from timm_paf.plots import plot_masking
from timm_paf.speed import AnyBatch, HalfPrecision, forward_flops, keep_memory, pays_to_compile

from .sources import load

RANK, WORLD = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
"""Of this process, as torchrun and accelerate launch say it."""

MASKING_IMAGES = 256
"""The first of those that are attacked; masking shows on few."""


def choose_threat(args: argparse.Namespace, trained: dict[str, Any]) -> ThreatModel:
    """The one asked for, else the one of the training.

    Raises:
        ValueError: if neither says an eps for the norm, or it is none.
    """
    norm = args.norm or trained.get('norm', 'Linf')
    eps = args.eps
    if eps is None and norm == trained.get('norm') and trained.get('eps') != '0':
        eps = trained['eps']
    if eps is None and norm == 'Linf':
        eps = '8/255'
    if eps is None:
        raise ValueError(f'{args.source} says no eps for {norm}; expected --eps, such as 0.5')
    step = None if args.attack_step is None else parse_fraction(args.attack_step)
    return ThreatModel(norm, parse_fraction(eps), step)


def choose_data(args: argparse.Namespace, about: dict[str, Any]) -> ImageSet:
    """The test images.

    Raises:
        ValueError, FileNotFoundError: if there are none, or nothing says which.
    """
    dataset = args.dataset or about['dataset']
    if dataset is None:
        raise ValueError(f'{args.source} does not say its data set; expected --dataset {"|".join(DATASETS)}')
    if dataset != 'folder':
        return load_dataset(dataset, args.data_dir, train=False)
    folder = open_folder(args.data_dir or '.', train=False).spread(args.n)
    return ImageSet('folder', folder.centres(about.get('image_size') or 224), folder.labels, folder.num_classes)


def place(source: str, model: nn.Module, data: ImageSet, device: str) -> nn.Module:
    """The network for attacks on its device.

    Raises:
        ValueError: if there is no such device, or the network has other classes than the data.
    """
    if getattr(model, 'num_classes', data.num_classes) != data.num_classes:
        raise ValueError(f'{source} has {model.num_classes} classes; expected the {data.num_classes} of {data.name}')
    try:
        return frozen_view(model.to(device, memory_format=torch.channels_last))  # type: ignore[call-overload]
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'--device {device} is not to be had here: {str(error).splitlines()[0]}') from error


def check_output(output: Path, attacks: list[str], overwrite: bool) -> None:
    """See that nothing is lost.

    Raises:
        FileExistsError: if there is an evaluation.json that this one would not go on with.
    """
    if overwrite or not output.exists():
        return
    if not output.with_suffix('.state').exists():
        raise FileExistsError(f'{output} exists; give another --output DIR, or --overwrite')
    lost = [name for name in read_json(output)['attacks'] if name not in attacks]
    if lost:
        raise FileExistsError(f'{output} has {", ".join(lost)} too; add it to --attacks, or give --overwrite')


@contextlib.contextmanager
def alone(output: Path) -> Iterator[None]:
    """No other evaluation, of one process or many, works on the same output.

    Raises:
        ValueError: if one does.
    """
    lock = output.with_name(f'.{output.name}.lock')
    with open(lock, 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f'another evaluation is at work on {output}; wait for it, or give --output DIR') from None
        for part in output.parent.glob(f'.{output.name}.*.part'):
            part.unlink()  # of a process that was killed
        try:
            yield
        finally:
            lock.unlink()


def together() -> None:
    """Wait for all processes to come here.

    Raises:
        ValueError: if one of them has ended.
    """
    if WORLD > 1:
        try:
            dist.barrier()
        except RuntimeError as error:
            raise ValueError(f'process {RANK} of {WORLD} cannot go on: another one has ended') from error


def follow(evaluation: Evaluation, what: str, report: Callable[[], None]) -> None:
    """Do the work; the first process shows how far all are, and reports whenever a part of an attack is complete."""
    total = sum(passes(*work[:2]) * len(evaluation.labels[work[2]:work[2] + evaluation.batch_size])
                for work in evaluation.work())
    said, again = None, time.monotonic()
    with tqdm(total=total, initial=evaluation.progress()[0], desc=what, disable=RANK > 0, dynamic_ncols=True,
              mininterval=1 if sys.stderr.isatty() else 30,
              bar_format='{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}') as bar:
        for _ in evaluation.run():
            if RANK > 0 or time.monotonic() < again:
                continue
            again = time.monotonic() + 1  # on fast networks not after every batch
            done, last = evaluation.progress()
            bar.set_postfix_str(last, refresh=False)
            bar.update(done - bar.n)
            bounds = evaluation.bounds()
            if (list(evaluation.results()), bounds) != said:
                said = list(evaluation.results()), bounds
                for attack, bound in bounds.items():
                    bar.write(f'{attack} after {bound["after"]}: at most {bound["accuracy"]:.1%}')
                report()
        done, last = evaluation.progress()
        bar.set_postfix_str(last, refresh=False)
        bar.update(done - bar.n)


def run(args: argparse.Namespace) -> None:
    attacks = args.attacks.split(',')
    check_attacks(attacks)
    if args.n < 1 or args.batch_size < 1:
        raise ValueError(f'--n is {args.n} and --batch-size {args.batch_size}; expected at least 1')
    model, about = load(args.source)
    data = choose_data(args, about)
    threat = choose_threat(args, about['threat'])
    # a bundle stays as its checksums have it
    is_run = Path(args.source, 'run.json').is_file() and not Path(args.source, 'config.json').is_file()
    output = Path(args.output or (args.source if is_run else '.')) / 'evaluation.json'
    if RANK == 0:
        check_output(output, attacks, args.overwrite)
    view, plain = place(args.source, model, data, args.device), None
    if args.transfer_from:
        other, other_about = load(args.transfer_from)
        plain = place(args.transfer_from, other, data, args.device)
    checks = masking_attacks(threat, plain is not None) if args.masking or plain is not None else []

    # full float32: the numbers are those of the weights, not of a faster format; and the same whenever they are made
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    keep_memory()
    device, n = torch.device(args.device), min(args.n, len(data))
    if device.index is not None:
        torch.cuda.set_device(device)
    images, labels = to_float(data.images[:n].to(device)), data.labels[:n].to(device)
    path, made_by = output.with_suffix('.state'), environment()
    setting = {
        'architecture': about['architecture'], 'weights_sha256': about['sha256'], 'dataset': data.name,
        'split': 'test', 'images': f'{n} evenly spaced' if data.name == 'folder' else f'first {n}', 'n': n,
        'data_sha256': data.sha256(), 'threat_model': {'norm': threat.norm, 'eps': str(threat.eps)},
        'batch_size': args.batch_size, 'seed': args.seed, 'device': device.type,
        'precision': 'bfloat16 autocast' if args.fast else 'float32', 'standard': not args.fast}

    output.parent.mkdir(parents=True, exist_ok=True)
    with alone(output) if RANK == 0 else contextlib.nullcontext():
        if RANK > 0:
            together()  # the first process has made the directory
            if not (path / 'record.json').is_file():
                raise ValueError(f'{path} of the first process is not to be seen here; processes share a file system')
        compiled = args.compile
        if compiled is None and (path / 'record.json').is_file():
            compiled = read_json(path / 'record.json').get('compiled')  # as it was begun
        if compiled is None:
            cost = n * sum(passes(attack, part) for attack in attacks for part in parts_of(attack))
            compiled = args.fast or pays_to_compile(forward_flops(view, images[:1]) * cost, device)
        setting['compiled'] = compiled
        record = {**setting, 'pgd_step': str(threat.step), 'versions': {
            name: made_by['versions'][name] for name in ('timm-paf', 'torch', 'autoattack', 'pyautoattack')
            if name in made_by['versions']}}
        discard = args.overwrite and RANK == 0
        state = State(path, record, discard)
        if state.discarded:
            print(f'{path} was of another evaluation ({state.discarded}) and is given up')
        used = AnyBatch(view) if compiled else view
        used = HalfPrecision(used) if args.fast else used
        common = {'batch_size': args.batch_size, 'seed': args.seed, 'fresh': view}
        evaluation = Evaluation(used, images, labels, threat, attacks, state, **common)
        m = min(n, MASKING_IMAGES)
        masking = None
        if checks:
            origin = None if plain is None else {
                'architecture': other_about['architecture'], 'weights_sha256': other_about['sha256']}
            masking = Evaluation(
                used, images[:m], labels[:m], threat, checks,
                State(path / 'masking', {**record, 'n': m, 'transfer_from': origin}, discard), source=plain,
                **common)
        if RANK == 0:
            together()
            print(f'{n} images of {data.name}, {threat.norm} eps {threat.eps}, on {device}, '
                  f'{"compiled (--no-compile for the other)" if compiled else "not compiled (--compile for the other)"}'
                  f'{", bfloat16: not standard" if args.fast else ""}'
                  f'{f", {WORLD} processes" if WORLD > 1 else ""}', flush=True)

        def write(complete: bool = False, **more: Any) -> dict[str, Any]:
            results, bounds = evaluation.results(), evaluation.bounds()
            rechecks = [result['recheck'] for result in results.values()]
            found = {
                **setting, 'order': 'as in the files of the data', 'complete': complete, 'attacks': results,
                **({'worst_case': worst_case(results)} if results else {}), **({'bounds': bounds} if bounds else {}),
                'recheck': {'kept': sum(recheck['kept'] for recheck in rechecks),
                            'different': sum(len(recheck['different']) for recheck in rechecks)},
                **more, 'processes': WORLD, 'seconds': round(sum(r['seconds'] for r in results.values()), 2), **made_by}
            write_json(output, found)
            return found

        follow(evaluation, 'attacks', write)
        more = {}
        if masking is not None:
            follow(masking, 'masking', write)
            if RANK == 0:
                flags = [flag for result in evaluation.results().values() for flag in result.get('flags', ())]
                report = masking_report(masking.results(), threat, same_twice(used, images[:m]), flags)
                if origin is not None:
                    report['transfer_from'] = origin
                plot_masking(report, threat.norm, output.with_name('masking.png'))
                more['masking'] = report
        if RANK == 0:
            found = write(complete=True, **more)
        together()
        if RANK == 0 and not args.keep_state:
            state.remove()
    if RANK > 0:
        return
    for attack, result in found['attacks'].items():
        print(f'{attack:15s} {result["accuracy"]:7.2%}  {result["correct"]} of {result["n"]}')
    print(f'worst case      {found["worst_case"]["accuracy"]:7.2%}\n'
          f'{found["recheck"]["kept"]} adversarial images classified anew, {found["recheck"]["different"]} differ')
    if masking is not None:
        print(f'{found["masking"]["verdict"]} (picture: {output.with_name("masking.png")})')
    print(output)


def default_device() -> str:
    if os.environ.get('ACCELERATE_USE_CPU', 'false').lower() in ('true', '1', 'yes') or not torch.cuda.is_available():
        return 'cpu'
    return f'cuda:{os.environ.get("LOCAL_RANK", 0)}'


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog='hub.evaluate', description=(__doc__ or '').split('\n')[0])
    parser.add_argument('source', metavar='RUN|BUNDLE|MODEL-NAME')
    parser.add_argument('--data-dir', help='directory with the data set')
    parser.add_argument('--dataset', help='default: the one that it was trained on')
    # launchers take --n for the beginning of an option of theirs
    parser.add_argument('--images', '--n', dest='n', type=int, default=1000, metavar='N',
                        help='the first N test images (default: 1000)')
    parser.add_argument('--attacks', default='clean,pgd-50,autoattack',
                        help='of clean, pgd-STEPS, pgd-STEPSxRESTARTS, pgd-STEPS@EPS, '
                        f'{", ".join(AUTOATTACK)} (default: clean,pgd-50,autoattack)')
    parser.add_argument('--norm', help='default: the one that it was trained for')
    parser.add_argument('--eps', help='exact, such as 8/255; default: that of the training, 8/255 after plain training')
    parser.add_argument('--attack-step', help='of PGD; default: a quarter of eps')
    parser.add_argument('--batch-size', type=int, default=250, help='images attacked together (default: 250)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--masking', action='store_true',
                        help=f'look for masked gradients too, on {MASKING_IMAGES} images')
    parser.add_argument('--transfer-from', metavar='RUN|BUNDLE|MODEL-NAME',
                        help='with images made on this network, plainly trained, among the checks of --masking')
    parser.add_argument('--compile', action=argparse.BooleanOptionalAction,
                        help='torch.compile the network; default: where that pays')
    parser.add_argument('--fast', action='store_true', help='bfloat16, compiled; the result is marked as not standard')
    parser.add_argument('--device', default=default_device())
    parser.add_argument('--output', help='directory for evaluation.json; default: the run, else here')
    parser.add_argument('--overwrite', action='store_true',
                        help='replace an evaluation.json that is there, or an evaluation.state of another evaluation')
    parser.add_argument('--keep-state', action='store_true',
                        help='leave evaluation.state, which has the adversarial images, when all is done')
    try:
        if WORLD > 1:
            with contextlib.suppress(AttributeError, OSError):  # Linux: end with the launcher, however that ends
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            dist.init_process_group('gloo')
        run(parser.parse_args(args))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get('TIMM_PAF_DEBUG'):
            raise
        sys.exit(f'hub.evaluate: {error}')
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    main()
