"""Measure the robustness of a run, a bundle or a named model, and write it to evaluation.json.

    python -m hub.evaluate RUN|BUNDLE|MODEL-NAME --data-dir data --n 1000 --attacks clean,pgd-50,autoattack
    accelerate launch -m hub.evaluate RUN --data-dir data --images 10000 --masking              (on all GPUs)
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m hub.evaluate RUN --data-dir data     (two processes on CPUs)

What is found is kept batch by batch in evaluation.state beside evaluation.json; killed, the same command resumes from
there, with any number of processes, to the same verdicts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_paf.attacks import ThreatModel
from timm_paf.data import ImageSet, to_float
from timm_paf.data.corrupted import CorruptedImages
from timm_paf.evaluation import AUTOATTACK, Evaluation, State, check_attacks, parts_of, passes
from timm_paf.evaluation.bpda import flat_operations
from timm_paf.evaluation.corruptions import CorruptionEvaluation
from timm_paf.evaluation.masking import masking_attacks
from timm_paf.evaluation.names import keeps_to
from timm_paf.evaluation.record import evaluation_record, state_record, threat_record
from timm_paf.files import environment, read_record, write_record
from timm_paf.plots import plot_corruptions
from timm_paf.processes import RANK, WORLD, barrier, default_device, exclusive_lock, process_group
from timm_paf.speed import AnyBatch, HalfPrecision, forward_flops, keep_memory, pays_to_compile
from timm_paf.training.option import options_of
from timm_paf.training.recipe import RecipeOptions
from timm_paf.wording import split_commas

from .chosen_images import parse_images
from .cli import Parser, one_line, user_path
from .corruptions import PICTURE as CORRUPTIONS_PICTURE
from .corruptions import open_corrupted, run_corruptions
from .evaluation_text import announce, show
from .evidence import EVIDENCE, is_small, keep_evidence
from .imagenet import PREPROCESSINGS
from .masking import MASKING_IMAGES, Masking, transfer_sources
from .masking import PICTURE as MASKING_PICTURE
from .progress import run_with_progress
from .sources import add_data_options, choose_data, choose_threats, load, to_device


class Subject(NamedTuple):
    """The network and the images that are evaluated, on their device."""

    network: nn.Module
    about: dict[str, Any]
    """The facts in the network's files: architecture, dataset, threat, sha256."""
    data: ImageSet
    made: dict[str, str]
    """Which images of the data set these are, and how those of any size were made ready."""
    threat: ThreatModel
    first: int
    """The place of the first of the images in the data set."""
    images: Tensor
    labels: Tensor
    others: Sequence[ThreatModel] = ()
    """The threat models of other norms."""

    def setting(self, args: argparse.Namespace) -> dict[str, Any]:
        """Returns what the verdicts depend on, but for how the network is run."""
        data, n = self.data, len(self.labels)
        return {
            'architecture': self.about['architecture'], 'weights_sha256': self.about['sha256'], 'dataset': data.name,
            'split': 'test', **self.made, 'n': n, 'data_sha256': data.sha256(), **threat_record(self.threat),
            'batch_size': args.batch_size, 'seed': args.seed, 'device': self.images.device.type,
            'precision': 'bfloat16 autocast' if args.fast else 'float32', 'standard': not args.fast}


def open_subject(args: argparse.Namespace) -> Subject:
    """Returns the network that a user names with the images that it is attacked on.

    Raises:
        ValueError, FileNotFoundError: if network or images can't be had or do not fit.
    """
    asked = parse_images(args.images)
    model, about = load(args.source)
    data, places, made = choose_data(args, about, model)
    if asked.start is not None and (not places or asked.stop not in (None, places.stop)):
        raise ValueError(f'--images is {args.images} and {data.name} has {len(data)} test images; expected some of '
                         'these')
    threat, *others = choose_threats(args, about['threat'], data.name)
    view = to_device(args.source, model, data, args.device)
    device, chosen = torch.device(args.device), slice(places.start, places.stop)
    if device.index is not None:
        torch.cuda.set_device(device)
    return Subject(
        view, about, data, made, threat, places.start, to_float(data.images[chosen].to(device)),
        data.labels[chosen].to(device), others)


def check_output(
        output: Path, attacks: list[str], setting: dict[str, Any], norms: dict[str, str], evidence: bool,
        sources: dict[str, dict[str, str]] | None, corrupted: CorruptedImages | None) -> dict[str, Any] | None:
    """Checks that no earlier evaluation is lost; returns the record of this one if it is complete already.

    Args:
        output: path of evaluation.json.
        attacks: the names of the attacks to run.
        setting: what the verdicts depend on, see `Subject.setting`.
        norms: the eps of each further norm.
        evidence: whether evidence was asked for.
        sources: the facts of the networks for transfer attacks, where there are to be checks for masked gradients.
        corrupted: the corrupted images to classify, if any.

    Raises:
        FileExistsError: if there is an evaluation.json that this one would not resume.
    """
    if not output.exists():
        return None
    try:
        found = read_record(output)
    except ValueError as error:
        if not output.with_suffix('.state').exists():
            raise FileExistsError(f'{error}; give another --output DIR, or --overwrite to do it again') from None
        if RANK == 0:
            print(f'{error}; it is written anew')
        return None
    lost = [name for name in found.get('attacks', {}) if name not in attacks]
    other = [key for key, value in setting.items() if found.get(key) != value] + [section for section, differs in (
        ('attacks', list(found.get('attacks', {})) != attacks), ('evidence', evidence and 'evidence' not in found),
        ('masking', sources is not None and found.get('masking', {}).get('sources') != sources),
        ('norms', norms != {
            norm: part['threat_model']['eps'] for norm, part in found.get('norms', {}).items()}),
        ('corruptions', corrupted is not None and not (
            corrupted.about.items() <= found.get('corruptions', {}).items()))) if differs]
    if found.get('complete') and not other:
        return found
    if not output.with_suffix('.state').exists():
        of_others = f' with other {", ".join(other)}' if other else ''
        raise FileExistsError(f'{output} exists{of_others}; give another --output DIR, or --overwrite')
    if lost:
        raise FileExistsError(f'{output} has {", ".join(lost)} too; add it to --attacks, or give --overwrite')
    dropped = [f'--{section}' for section, given in (
        ('masking', sources is not None), ('corruptions', corrupted is not None),
        ('norms', found.get('norms', {}).keys() <= norms.keys())) if section in found and not given]
    if dropped:
        raise FileExistsError(f'{output} has what {" and ".join(dropped)} found; give that too, or --overwrite')
    return None


def choose_compiled(args: argparse.Namespace, subject: Subject, attacks: list[str], state: Path) -> bool:
    """Returns whether to compile: the user's choice, else that of the evaluation to resume, else whether it pays."""
    if args.compile is not None:
        return bool(args.compile)
    with contextlib.suppress(FileNotFoundError, ValueError):  # a damaged record is named where the state is opened
        recorded = read_record(state / 'record.json').get('compiled')
        if recorded is not None:
            return bool(recorded)
    cost = len(subject.labels) * (1 + len(subject.others)) * sum(
        passes(attack, part) for attack in attacks for part in parts_of(attack))
    flops = forward_flops(subject.network, subject.images[:1])
    return args.fast or pays_to_compile(flops * cost, subject.images.device)


def run(args: argparse.Namespace) -> None:
    attacks = split_commas(args.attacks)
    check_attacks(attacks, sources=())
    if fault := options_of(RecipeOptions)['seed'][1].fault('seed', args.seed):
        raise ValueError(fault)
    if args.batch_size < 1:
        raise ValueError(f'--batch-size is {args.batch_size}; expected at least 1')
    if args.corruptions and parse_images(args.images).start:
        raise ValueError(f'--images is {args.images} and --corruptions is of the first images; expected their number')
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        raise NotADirectoryError(f'--output {args.output} is a file; expected a directory')
    # In full float32 the numbers are those of the weights, not of a faster format, and can be repeated.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    keep_memory()
    subject = open_subject(args)
    inside = [attack for attack in attacks if attack != 'clean' and keeps_to(attack, subject.threat.eps)]
    if args.evidence and not inside:
        raise ValueError(f'--evidence is of fooled images and {args.attacks} has no attack within eps '
                         f'{subject.threat.eps}; expected one such as pgd-50')
    corrupted = open_corrupted(args, subject.data, len(subject.labels)) if args.corruptions else None
    # A bundle stays as its checksums have it, so only a run gets the evaluation beside its files.
    is_run = Path(args.source, 'run.json').is_file() and not Path(args.source, 'config.json').is_file()
    output = Path(args.output or (args.source if is_run else '.')) / 'evaluation.json'
    look, sources = args.masking or bool(args.transfer_from), {}
    if look:
        sources = transfer_sources(args, subject.data, subject.about['sha256'])
    origins = {name: source.about for name, source in sources.items()}
    wanted = subject.setting(args)  # the data are hashed for it
    complete = None if args.overwrite else check_output(
        output, attacks, wanted, {threat.norm: str(threat.eps) for threat in subject.others},
        bool(args.evidence), origins if look else None, corrupted)
    if complete is not None:
        if RANK == 0:
            show(complete, output)
            left = output.with_suffix('.state')
            print(f'it was complete already{f", and {left} is not needed any more" if left.exists() else ""}')
        return
    path, made_by = output.with_suffix('.state'), environment()

    output.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(output, 'evaluation') if RANK == 0 else contextlib.nullcontext():
        if RANK > 0:
            barrier()  # the first process has made the directory
            if not (path / 'record.json').is_file():
                raise ValueError(f'{path} of the first process is not to be seen here; processes share a file system')
        compiled = choose_compiled(args, subject, attacks, path)
        setting = {**wanted, 'compiled': compiled}
        discard = args.overwrite and RANK == 0
        record, *of_others = (state_record(setting, threat, made_by['versions'])
                              for threat in (subject.threat, *subject.others))
        hardware = made_by['hardware']
        state = State(path, record, discard, hardware)
        if state.discarded:
            print(f'{path} was of another evaluation ({state.discarded}) and is given up')
        network = AnyBatch(subject.network) if compiled else subject.network
        network = HalfPrecision(network) if args.fast else network
        common = {'batch_size': args.batch_size, 'seed': args.seed, 'fresh': subject.network, 'first': subject.first}
        evaluation = Evaluation(
            network, subject.images, subject.labels, subject.threat, attacks, state, **common)
        others = [Evaluation(network, subject.images, subject.labels, threat, attacks,
                             State(path / threat.norm, of_other, discard, hardware), **common)
                  for threat, of_other in zip(subject.others, of_others)]
        masking = None
        if look:
            m = min(len(subject.labels), MASKING_IMAGES)
            flat = flat_operations(subject.network, subject.images[:1])
            masking = Masking(Evaluation(
                network, subject.images[:m], subject.labels[:m], subject.threat,
                masking_attacks(subject.threat, sources, bool(flat)),
                State(path / 'masking', {**record, 'n': m, 'sources': origins}, discard),
                source={name: source.network for name, source in sources.items()}, **common), sources, flat)
        corruptions = None if corrupted is None else CorruptionEvaluation(
            network if args.fast else subject.network, corrupted,
            State(path / 'corruptions', {**record, **corrupted.about}, discard), subject.images.device, args.batch_size)
        if RANK == 0:
            barrier()
            announce(setting, [subject.threat, *subject.others], corrupted, torch.device(args.device))

        def write(complete: bool = False, **more: Any) -> dict[str, Any]:
            found = evaluation_record(setting, evaluation, made_by, WORLD, complete, others, **more)
            write_record(output, found)
            return found

        run_with_progress(evaluation, 'attacks', write)
        for each in others:
            run_with_progress(each, each.threat.norm, write)
        more: dict[str, Any] = {}
        if masking is not None:
            run_with_progress(masking.evaluation, 'masking', write)
            if RANK == 0:
                more['masking'] = masking.report(evaluation.results(), output.with_name(MASKING_PICTURE))
        if corruptions is not None:
            more['corruptions'] = run_corruptions(corruptions)
            if RANK == 0:
                clean = evaluation.results().get('clean')
                plot_corruptions(more['corruptions'], clean and clean['accuracy'],
                                 output.with_name(CORRUPTIONS_PICTURE))
        if RANK == 0:
            if inside and (args.evidence or (args.evidence is None and not args.fast and is_small(subject.images))):
                more['evidence'] = keep_evidence(output.parent, [evaluation, *others], subject.data.label_names)
            found = write(complete=True, **more)
        barrier()
        if RANK == 0 and not args.keep_state:
            state.remove()
    if RANK == 0:
        show(found, output)


def main(args: Sequence[str] | None = None, prog: str = 'hub.evaluate') -> None:
    parser = Parser(prog=prog, description=(__doc__ or '').split('\n')[0], epilog=(
        f'example: {prog} runs/r18 --data-dir data --n 1000 --attacks clean,pgd-50,autoattack'))
    parser.add_argument('source', type=os.path.expanduser, metavar='RUN|BUNDLE|MODEL-NAME')
    group = parser.add_argument_group('data')
    add_data_options(group)
    group.add_argument('--dataset', help='default: the one that it was trained on')
    group.add_argument('--preprocessing', choices=tuple(PREPROCESSINGS),
                       help="RobustBench's name of how images of any size are resized and cut; default: as timm's "
                            'configuration of the weights says')
    # Launchers take --n for the beginning of one of their own options, so there is --images too.
    group.add_argument('--images', '--n', default='1000', metavar='N|FIRST:END',
                       help='the first N test images, or a range counted from 0 as in a slice of Python, such as '
                            '1000:2000 (default: 1000)')
    group = parser.add_argument_group('attacks')
    group.add_argument('--attacks', default='clean,pgd-50,autoattack',
                       help='of clean, pgd-STEPS, pgd-STEPSxRESTARTS, pgd-STEPS@EPS, bpda-pgd-STEPS, '
                       f'{", ".join(AUTOATTACK)} (default: clean,pgd-50,autoattack)')
    group.add_argument('--norm', help='default: the one that it was trained for')
    group.add_argument('--eps', help='exact, such as 8/255; default: that of the training, after plain training 8/255, '
                            'of imagenet 4/255')
    group.add_argument('--norms', metavar='NORM=EPS,...', help='several norms and their union, in place of --norm and '
                                                               '--eps: Linf=8/255,L2=0.5,L1=12')
    group.add_argument('--attack-step', help='of PGD; default: a quarter of eps')
    group.add_argument('--batch-size', type=int, default=250, help='images attacked together (default: 250)')
    group.add_argument('--seed', type=int, default=0)
    group.add_argument('--masking', action=argparse.BooleanOptionalAction, default=False,
                       help=f'look for masked gradients too, on {MASKING_IMAGES} images')
    group.add_argument('--transfer-from', metavar='RUN|BUNDLE|MODEL-NAME',
                       help='with images made on this network too, such as one plainly trained, among the checks of '
                            '--masking; those in the package of the same data set are among them anyway')
    group.add_argument('--corruptions', action=argparse.BooleanOptionalAction, default=False,
                       help='accuracy on CIFAR-10-C, CIFAR-100-C or ImageNet-C too, of the directory of that name in '
                            '--data-dir; those of CIFAR are made here where there is none')
    group = parser.add_argument_group('the run and its files')
    group.add_argument('--compile', action=argparse.BooleanOptionalAction,
                       help='torch.compile the network; default: where that pays')
    group.add_argument('--fast', action=argparse.BooleanOptionalAction, default=False,
                       help='bfloat16, compiled; the result is marked as not standard')
    group.add_argument('--device', default=default_device())
    group.add_argument('--output', type=user_path,
                       help='directory for evaluation.json; default: the run, else here')
    group.add_argument('--evidence', action=argparse.BooleanOptionalAction,
                       help=f'keep a perturbation for every fooled image in {EVIDENCE}, for timm-paf verify; '
                            'default: where the images are small, and not with --fast')
    group.add_argument('--overwrite', action=argparse.BooleanOptionalAction, default=False,
                       help='replace an evaluation.json that is there, or an evaluation.state of another evaluation')
    group.add_argument('--keep-state', action=argparse.BooleanOptionalAction, default=False,
                       help='leave evaluation.state, which has the adversarial images, when all is done')
    with one_line(prog, 'robustbench'), process_group():
        run(parser.parse_args(args))


if __name__ == '__main__':
    main()
