"""Pack a finished run: weights, timm's config, model card, checksums, and the same weights for RobustBench.

    python -m hub.bundle RUN --out DIR
    python -m hub.bundle RUN --out DIR --name Dai2021Parameterizing --title ... (and more: a submission to RobustBench)

A bundle that does not load back to the same logits, bit for bit, is not written.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import nn

import timm_paf
from timm_paf.files import atomic_directory, read_record, save_torch, sha256
from timm_paf.training.option import flag_of
from timm_paf.weights import load_bundle
from timm_paf.weights.bundle_files import write_checksums

from . import corruptions, masking
from .card import write_card
from .cli import Parser, one_line, user_path
from .evidence import EVIDENCE, PICTURE
from .paths import publish_record
from .publish import networks, submission
from .record_check import check_evaluation, check_name, check_run
from .sources import load_run, read_run


def write(source: Path, out: Path, name: str, fields: dict[str, str] | None = None) -> None:
    """Writes the bundle of a run.

    Args:
        source: the run directory.
        out: directory to make.
        name: name of the model.
        fields: what a submission to RobustBench needs beside the records, see `publish.submission.FIELDS`; or None.

    Raises:
        FileExistsError: if ``out`` exists.
        ValueError: if the run is not finished or damaged, its evaluation is of other weights, the submission is not
            complete, or the bundle does not load back to the same logits.
    """
    check_name(name)
    run, model = check_run(read_run(source), source / 'run.json', for_card=True), load_run(source)
    recipe, threat = run['recipe'], run['recipe']['threat']
    evaluation = None
    if (source / 'evaluation.json').is_file():
        evaluation = read_record(source / 'evaluation.json')
        if not {'weights_sha256', 'attacks', 'threat_model'} <= evaluation.keys():
            raise ValueError(f'{source}/evaluation.json is not of timm-paf evaluate; run it with --overwrite')
        if evaluation['weights_sha256'] != sha256(source / 'model.safetensors'):
            raise ValueError(f'{source}/evaluation.json is of other weights; run timm-paf evaluate --overwrite again')
        if evaluation.get('complete') is False:
            raise ValueError(f'{source}/evaluation.json is not finished; run its command again, it resumes')
        check_evaluation(evaluation, source / 'evaluation.json')
        if evaluation.get('evidence') and sha256(source / EVIDENCE) != evaluation['evidence']['sha256']:
            raise ValueError(f'{source / EVIDENCE} is not the one that evaluation.json names; run timm-paf evaluate '
                             '--overwrite again')
    if fields is not None:
        submission.check(name, run, evaluation, fields)
    found = networks.zoo_class(run)
    theirs = networks.robustbench_model(found) if found else None
    with atomic_directory(out) as part:
        weights = {k: v.contiguous() for k, v in model.state_dict().items()}
        save_file(weights, part / 'model.safetensors', {'format': 'pt'})
        about = {'version': timm_paf.__version__, 'dataset': run['data']['name'],
                 'threat_model': {'norm': threat['norm'], 'eps': threat['eps']}}
        model_args = dict(recipe.get('model_kwargs') or {})
        if recipe.get('act'):  # timm does not know the conversion, so it finds that the weights do not fit
            about |= {key: recipe[key] for key in ('act', 'act_share', 'act_kwargs')}
        elif recipe['act_kwargs']:
            model_args['act_kwargs'] = recipe['act_kwargs']
        save_config_for_hf(
            model, part / 'config.json', model_config={'timm_paf': about}, model_args=model_args or None)
        made = {'masking': (masking.PICTURE,), 'corruptions': (corruptions.PICTURE,), 'evidence': (EVIDENCE, PICTURE)}
        for file in ('run.json', 'metrics.jsonl', 'evaluation.json', *(
                file for part_of, files in made.items() if (evaluation or {}).get(part_of) for file in files)):
            if (source / file).is_file():
                shutil.copy(source / file, part)
        run, evaluation = publish_record(part / 'run.json') or run, publish_record(part / 'evaluation.json')
        (part / 'robustbench').mkdir()
        save_torch(networks.robustbench_state(model, theirs), part / 'robustbench' / f'{name}.pt')
        submission.write(part / 'robustbench', name, run, evaluation, fields)
        write_card(part, name, run, evaluation, model, networks.describe(found), (fields or {}).get('licence'))
        write_checksums(part)
        verify(part, model, theirs)


@torch.no_grad()
def verify(bundle: Path, model: Any, theirs: nn.Module | None) -> None:
    """Loads the files back and checks the logits: bit for bit with our class, to rounding with RobustBench's formula.

    Raises:
        ValueError: if the logits differ.
    """
    size = model.pretrained_cfg['input_size']
    x = torch.rand(8, *size, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    if not torch.equal(load_bundle(bundle)(x), expected):
        raise ValueError('the bundle loads back to other logits; nothing was written')
    if theirs is not None:
        theirs.load_state_dict(torch.load(next((bundle / 'robustbench').glob('*.pt')), weights_only=True))
        difference = (theirs.eval()(x) - expected).abs().max().item()
        if not difference <= 1e-4 * max(1.0, expected.abs().max().item()):
            raise ValueError(f"RobustBench's class gives logits that differ by {difference:.2g}; nothing was written")


def main(args: Sequence[str] | None = None, prog: str = 'hub.bundle') -> None:
    parser = Parser(prog=prog, description=(__doc__ or '').split('\n')[0],
                    epilog=f'example: {prog} runs/r18 --out bundles/mine')
    parser.add_argument('run', type=user_path, metavar='RUN', help='a finished run of train_robust.py')
    parser.add_argument('--out', type=user_path, required=True, metavar='DIR', help='directory to make')
    parser.add_argument('--name', help='of the model; default: the name of DIR')
    group = parser.add_argument_group('submission to RobustBench', 'Any of these asks for one, and it needs them all.')
    for key, meaning in submission.FIELDS.items():
        group.add_argument(flag_of(key), metavar='TEXT', help=meaning)
    found = parser.parse_args(args)
    fields = {key: getattr(found, key) for key in submission.FIELDS if getattr(found, key) is not None} or None
    with one_line(prog, 'train,robustbench', (SafetensorError,)):
        write(found.run, found.out, found.name or found.out.absolute().name, fields)
    print(f'{found.out}: loads back to the same logits')
    if fields is not None:
        folder = found.out / 'robustbench'
        print(f'{folder / "new_model.md"}: the text of a RobustBench issue "New Model(s)"')
        print(f'{folder / "zoo_entry.py"}: what a pull request for its model zoo changes')


if __name__ == '__main__':
    main()
