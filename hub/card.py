"""The model card of a bundle, README.md and its picture, made from the bundle's records alone.

    python -m hub.card BUNDLE [--licence ID]

writes the card of a bundle anew, with its checksums; `hub.bundle` writes the first one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

import timm_paf
from timm_paf.activations import PAF
from timm_paf.convert import normalizes_by_hook
from timm_paf.evaluation import AUTOATTACK
from timm_paf.evaluation.evidence import KINDS
from timm_paf.files import atomic_write
from timm_paf.plots import plot_activations
from timm_paf.weights import load_bundle
from timm_paf.weights.bundle_files import check_checksums, write_checksums

from .chosen_images import in_words
from .cli import Parser, one_line, user_path
from .corruptions import corruptions_text
from .datasets import title_of
from .evidence import PICTURE as EVIDENCE_PICTURE
from .paths import publish_record
from .publish.boards import images_of
from .publish.networks import describe, zoo_class
from .record_check import check_command, check_licence, check_name, check_run, read_evaluation
from .sources import read_run
from .training_summary import hardware_of, training_summary
from .wording import escape_markdown, interval, is_standard, label, plural

PICTURE = 'activation.png'
REPO = 'ORG/NAME'
"""The placeholder in the card for the repository's name, which `hub.upload` puts in."""

CARD = Path(__file__).with_name('card_template.md').read_text(encoding='utf-8')

USE = """With timm:

```python
import timm, timm_paf  # the second import registers the architecture

model = timm.create_model('hf-hub:{repo}', pretrained=True).eval()
```"""
# timm alone would make the network with its own activations, and refuse the weights.
USE_CONVERTED = """timm's own network is not this one: its activations were replaced, or it normalises its input. So:

```python
import timm_paf

model = timm_paf.load_bundle('{repo}')
```"""

ROBUSTBENCH = """With RobustBench:

```python
from timm_paf.robustbench import register
from robustbench.utils import load_model

register('{repo}', '{name}')
model = load_model('{name}', dataset='{dataset}', threat_model='{norm}')
```

`robustbench/{name}.pt` holds the same weights for {their_class}."""

ACTIVATION = """
## The activation that it learned

`{act}`, one for the whole network, {curvature}:

![The activation that the network learned, beside ReLU]({picture})
"""

EVIDENCE = """
`timm-paf verify {repo} --data-dir DIR` checks this in seconds, without an attack: `evidence.npz` has for {n} fooled
images a perturbation inside eps that fools the network.
{picture}"""
PICTURED = """
![Test images, their adversarial twins and ten times the difference, with what the network says]({picture})
"""


def measured(evaluation: dict[str, Any] | None) -> str:
    """Returns the card's table, from evaluation.json alone."""
    if evaluation is None:
        return 'Nothing has been measured.'
    threat, others = evaluation['threat_model'], evaluation.get('norms', {})
    results = dict(evaluation['attacks'])
    for norm, part in others.items():
        results |= {f'{name}, {norm} eps {part["threat_model"]["eps"]}': result
                    for name, result in part['attacks'].items() if name != 'clean'}
    if 'union' in evaluation:
        results['all of ' + ', '.join(evaluation['union']['norms'])] = evaluation['union']
    rows = []
    for name, result in results.items():
        low, high = interval(result['correct'], result['n'])
        rows.append(f'| {name} | {result["accuracy"]:.2%} | {result["correct"]} of {result["n"]} | '
                    f'{low:.1%} to {high:.1%} |')
    warning = '' if is_standard(evaluation) else (
        '**Not a standard evaluation**, as `evaluation.json` marks it: not to be compared with numbers of RobustBench.'
        '\n\n')
    return (f'{warning}The {in_words(evaluation["images"])} of {title_of(evaluation["dataset"]).title}, '
            f'{threat["norm"]} eps {threat["eps"]}, seed {evaluation["seed"]}; `evaluation.json` has the verdict of '
            'every image, versions and hardware.\n\n'
            '| attack | accuracy | right | 95 % interval |\n|---|---|---|---|\n' + '\n'.join(rows)
            + (f'\n\n{corruptions_text(evaluation["corruptions"])}' if 'corruptions' in evaluation else ''))


def metadata(name: str, dataset: str, evaluation: dict[str, Any] | None, licence: str | None) -> ModelCardData:
    """Returns the metadata that the Hub reads of a card, with evaluation.json's accuracies as shares."""
    results = None
    if evaluation is not None:
        data, threat = title_of(evaluation['dataset']), evaluation['threat_model']
        how = f'{in_words(evaluation["images"])}, seed {evaluation["seed"]}'
        if not is_standard(evaluation):
            how += ', not standard'
        results = [EvalResult(
            task_type='image-classification', task_name='Image Classification',
            dataset_type=data.hub_id or evaluation['dataset'], dataset_name=data.title, dataset_split='test',
            metric_type='accuracy', metric_value=result['accuracy'],
            metric_name=f'{label(attack.partition("@")[0])} accuracy (' + ('' if attack == 'clean' else (
                f'{threat["norm"]} eps {attack.partition("@")[2] or threat["eps"]}, '
                + ''.join(f'without {part}, ' for part in AUTOATTACK.get(attack, ())
                          if part in (result.get('not_run') or ())))) + f'{how})')
            for attack, result in evaluation['attacks'].items()]
    trained_on = title_of(dataset).hub_id
    linked = licence if licence is not None and licence.startswith('http') else None
    return ModelCardData(
        library_name='timm', license='other' if linked else licence, license_name='linked' if linked else None,
        license_link=linked, pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_paf', 'adversarial-robustness', 'robustbench'],
        datasets=[trained_on] if trained_on else None, metrics=['accuracy'] if results else None,
        model_name=name if results else None, eval_results=results)


def threat_text(norm: str, eps: str) -> str:
    if eps == '0':
        return 'Trained without an attack.'
    exact = '' if '/' not in eps else f' (about {float(Fraction(eps)):.4f})'
    return (f'{norm} perturbations of at most {eps}{exact} of images that stay in [0, 1], by an attacker who '
            'knows the weights and is content with any wrong class. The network has no random part.')


def limits(run: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    threat = run['recipe']['threat']
    norms = ' and '.join([threat['norm'], *(evaluation or {}).get('norms', {})])
    found = ['Robustness here is what attacks left standing, an upper bound and no certificate.',
             f'Nothing is said of other perturbations than {norms}'
             f'{" and common corruptions" if "corruptions" in (evaluation or {}) else ""}, of larger ones, or of other '
             'data.'
             if threat['eps'] != '0' else 'It was not trained to withstand any attack.']
    if evaluation is None or 'autoattack' not in evaluation['attacks']:
        found.append('AutoAttack has not been run; weaker attacks overrate a network.')
    whole = images_of(run['data']['name'])
    if evaluation is not None and evaluation['n'] < whole:
        found.append(f'{evaluation["n"]:,} images were attacked; the intervals say how far chance reaches. Numbers of '
                     f'RobustBench are of {whole:,}.')
    if training_summary(run).eps_share < 1 and threat['eps'] != '0':
        found.append(f'The training ended while eps was still growing to {threat["eps"]}.')
    found.append('One run with one seed.')
    for attack, result in (evaluation or {'attacks': {}})['attacks'].items():
        found += [f'{label(attack)} warns: {escape_markdown(flag)}' for flag in result.get('flags') or ()]
        found += [f'{label(attack)} is without {escape_markdown(part)}: {escape_markdown(why)}'
                  for part, why in (result.get('not_run') or {}).items()]
    return '\n'.join(f'- {line}' for line in found)


def pafs_of(model: nn.Module) -> list[PAF]:
    """Returns the PAFs of a network, each once."""
    return [module for module in model.modules() if isinstance(module, PAF)]


def learns(run: dict[str, Any], model: nn.Module) -> bool:
    """Returns whether the parameters of a network's activations were trained: neither frozen nor at a rate of 0."""
    return bool(timm_paf.paf_parameters(model)) and run['recipe'].get('paf_lr') != 0


def of(used: int, n: int) -> str:
    """Returns how many images of ``n`` were used: '128 of 50,000', '50,000'."""
    return f'{n:,}' if used == n else f'{used:,} of {n:,}'


def about_activation(model: nn.Module, learned: list[PAF]) -> str:
    """Returns a sentence on the activation that a network has."""
    if not learned:
        act = getattr(model, 'act', None)
        return f'Its activation is {type(act).__name__}, without learned parameters' if act is not None \
            else 'No activation has learned parameters'
    what = f'One {type(learned[0]).__name__} with learned parameters acts in the whole network' if len(learned) == 1 \
        else f'{len(learned)} {learned[0].kernel} activations have learned parameters'
    return f'{what} ([Dai, Mahloujifar and Mittal, 2021](https://arxiv.org/abs/2110.05626))'


def about_curvature(act: PAF) -> str:
    """Returns the words of a card on the curvature of an activation."""
    largest = timm_paf.curvature(act)
    return 'with a kink' if math.isinf(largest) else f"whose largest second derivative, max |f''|, is {largest:.3g}"


def about_evidence(evaluation: dict[str, Any] | None, picture: str | None) -> str:
    """Returns what a card says of the evidence."""
    if evaluation is None or not evaluation.get('evidence'):
        return ''
    n = sum(part.get(kind, 0) for part in evaluation['evidence']['norms'].values() for kind in KINDS)
    return EVIDENCE.format(repo=REPO, n=f'{n:,}', picture='' if picture is None else PICTURED.format(picture=picture))


def card(name: str, run: dict[str, Any], evaluation: dict[str, Any] | None, model: Any, their_class: str,
         licence: str | None = None, picture: str | None = None) -> str:
    """Returns the text of the model card, README.md; ``picture`` is that of the evidence."""
    recipe, threat, dataset = run['recipe'], run['recipe']['threat'], run['data']['name']
    if check_licence(licence) is not None and not str(licence).startswith('http'):
        licence = str(licence).lower()  # the Hub's ids are in lower case
    usable = dataset in ('cifar10', 'cifar100', 'imagenet')  # the data sets of RobustBench's load_model
    learned, pafs = learns(run, model), pafs_of(model)
    act, kwargs = recipe.get('act'), recipe['act_kwargs']
    network_kwargs = dict(recipe.get('model_kwargs') or {})
    ours = bool(act) or normalizes_by_hook(run['architecture'], network_kwargs)  # which timm alone does not do
    words = ''.join(f', {key}={value!r}' for key, value in {
        'num_classes': run['num_classes'], **({'act_kwargs': kwargs} if kwargs and not act else {}),
        **network_kwargs}.items())
    about_data = title_of(dataset).about
    done, n, eps = training_summary(run), run['data']['n'], threat['eps']
    if recipe.get('synthetic'):
        generated = recipe['synthetic']
        about_data += (f' Beside them {of(done.generated, generated["n"])} generated images '
                       f'({escape_markdown(generated["name"])}, {done.share:.0%} of each batch), under the terms of '
                       'who made them.')
    began = f' started from weights ({escape_markdown(recipe["init"]["source"])}) and was' if recipe.get('init') else ''
    return CARD.format(
        metadata=metadata(name, dataset, evaluation, licence).to_yaml(), name=name, repo=REPO,
        architecture=run['architecture'], converted=(
            f' with one {act} per {recipe["act_share"]},' if act else '') + began,
        use=(USE_CONVERTED if ours else USE).format(repo=REPO),
        imports='from timm_paf.convert import create_converted\n' if ours else '',
        create=(f'create_converted({run["architecture"]!r}, {act!r}, {recipe["act_share"]!r}, '
                f'{kwargs if act else None!r}{words})')
        if ours else f'timm.create_model({run["architecture"]!r}{words})',
        title=title_of(dataset).title, n_train=of(done.images, n),
        threat='no attack' if eps == '0' else f'{threat["norm"]} perturbations of at most {eps}' + (
            '' if done.eps_share == 1 else f', of which the last step had {float(done.eps_share):.1%}'),
        version=run['versions'].get('timm-paf', timm_paf.__version__), size=model.pretrained_cfg['input_size'][1],
        about_activation=about_activation(model, pafs if learned else []),
        parameters=sum(p.numel() for p in model.parameters()), num_classes=run['num_classes'],
        measured=measured(evaluation), evidence=about_evidence(evaluation, picture),
        threat_model=threat_text(threat['norm'], threat['eps']),
        robustbench=ROBUSTBENCH.format(name=name, dataset=dataset, norm=threat['norm'], repo=REPO,
                                       their_class=their_class)
        if usable else f'RobustBench knows no {dataset}; `timm_paf.robustbench.load_bundle` loads this directory too.',
        course=done.text, seed=recipe['seed'], processes=plural(run['processes'], 'process', 'processes'),
        hardware=hardware_of(run), weights=done.weights(run.get('weights')),
        torch=run['versions']['torch'], minutes=run['seconds'] / 60, command=check_command(run['command']),
        recipe=json.dumps(recipe, indent=2), data=about_data,
        activation=ACTIVATION.format(act=pafs[0], picture=PICTURE, curvature=about_curvature(pafs[0]))
        if learned and len(pafs) == 1 else '',
        licence='The licence of the weights has not been stated.' if licence is None else
        f'The weights: {licence}.', limits=limits(run, evaluation))


def write_card(bundle: Path, name: str, run: dict[str, Any], evaluation: dict[str, Any] | None, model: nn.Module,
               their_class: str, licence: str | None = None) -> None:
    """Writes README.md and, where the network learned its one activation, the picture of it.

    Args:
        bundle: the bundle's directory.
        name: name of the model.
        run: the content of run.json.
        evaluation: the content of evaluation.json, if there is one.
        model: the network with its weights.
        their_class: the class of RobustBench that loads the weights in its layout.
        licence: licence of the weights, an id of the Hub's such as apache-2.0 or a URL; None where it is not known.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    pafs = pafs_of(model)
    if learns(run, model) and len(pafs) == 1:
        plot_activations({f'{pafs[0]}': pafs[0]}, bundle / PICTURE)
    picture = EVIDENCE_PICTURE if (bundle / EVIDENCE_PICTURE).is_file() else None
    with atomic_write(bundle / 'README.md') as part:
        part.write_text(card(name, run, evaluation, model, their_class, licence, picture), encoding='utf-8')


def rewrite(bundle: Path, licence: str | None) -> None:
    """Writes the card of a bundle anew, and takes paths of a machine out of its records.

    A licence that the old card states stays unless another is given.

    Raises:
        FileNotFoundError, ValueError: if the bundle is not whole.
    """
    check_checksums(bundle, besides=('README.md', PICTURE))
    for name in ('run.json', 'evaluation.json'):
        publish_record(bundle / name)
    write_checksums(bundle)  # so that a bundle whose card fails is whole
    run, model = check_run(read_run(bundle), bundle / 'run.json', for_card=True), load_bundle(bundle)
    evaluation, measured_file = None, bundle / 'evaluation.json'
    if measured_file.is_file():
        evaluation = read_evaluation(measured_file)
    weights = sorted((bundle / 'robustbench').glob('*.pt'))
    if len(weights) != 1:
        raise ValueError(f'{bundle}/robustbench has {len(weights)} .pt files; expected one, named as the model is')
    old = bundle / 'README.md'
    if licence is None and old.is_file():
        import yaml

        try:
            stated = ModelCard.load(old).data
        except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f'{old}: its metadata can not be read ({type(error).__name__}); give --licence') from None
        licence = stated.get('license_link') or stated.license
    write_card(bundle, check_name(weights[0].stem), run, evaluation, model, describe(zoo_class(run)), licence)
    write_checksums(bundle)


def main(args: Sequence[str] | None = None, prog: str = 'hub.card') -> None:
    parser = Parser(prog=prog, description=(__doc__ or '').split('\n')[0],
                    epilog=f'example: {prog} bundles/mine --licence apache-2.0')
    parser.add_argument('bundle', type=user_path, metavar='BUNDLE', help='a directory that timm-paf bundle wrote')
    parser.add_argument('--licence', help="of the weights, such as apache-2.0, or its URL; default: as before")
    found = parser.parse_args(args)
    with one_line(prog, 'train,robustbench'):
        rewrite(found.bundle, found.licence)
    print(f'{found.bundle}/README.md: written anew')


if __name__ == '__main__':
    main()
