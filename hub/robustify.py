"""Make a network robust: from clean weights to a PAF, adversarial fine-tuning, verdicts and a bundle with its card.

    python -m hub.robustify resnet18 --data-dir imagenette --minutes 60

Each step is a command of its own, which is printed: train (recipe robustify), evaluate, bundle. Stopped or killed, the
same command resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from timm_paf.activations import list_pafs
from timm_paf.data import DATASETS
from timm_paf.evaluation import check_attacks
from timm_paf.files import read_record, write_record
from timm_paf.training.config import check, parse
from timm_paf.wording import split_commas

from .cli import Parser, call, one_line, split_options, user_path

TRIAL_STEPS = 6
"""Steps of the trial that tells how many the minutes are enough for."""


@dataclass(frozen=True)
class Plan:
    """What a user asks for, see the options of the program."""

    model: str
    data_dir: Path
    minutes: float
    output: Path
    dataset: str | None
    init: str
    act: str
    eps: str | None
    images: int
    attacks: str
    options: list[str]

    @property
    def has_paf(self) -> bool:
        """Whether the model is one of ours with a PAF in its name, so that it needs no other."""
        return any(self.model.partition('.')[0].endswith(f'_{paf}') for paf in list_pafs())

    @property
    def name(self) -> str:
        """The name of the bundle."""
        return self.model.replace('.', '-') + ('' if self.has_paf else f'-{self.act}')

    def train(self, output: Path, steps: int) -> list[str]:
        """Returns the options of a training."""
        folder = (self.data_dir / 'train').is_dir() or (self.data_dir / 'train.tar').is_file()
        dataset = self.dataset or ('folder' if folder else 'cifar10')
        eps = self.eps or ('8/255' if dataset in DATASETS else '4/255')
        return ['--config', 'robustify', '--model', self.model, '--init', self.init, '--act',
                'null' if self.has_paf else self.act, '--dataset', dataset, '--data-dir', str(self.data_dir), '--eps',
                eps, *self.options, '--max-steps', str(steps), '--output', str(output)]


def choose_steps(plan: Plan) -> int:
    """Returns the number of steps that the minutes are enough for, by a trial; the first choice is kept in a file."""
    file, trial = plan.output / 'robustify.json', plan.output / 'trial'
    if not file.is_file():
        # Without the measurement at the end of an epoch, whose time is not that of the steps.
        args = [*plan.train(trial, TRIAL_STEPS), '--val', '0', '--patience', '0', '--val-attack', 'null']
        if parse(args).swa:  # its first epoch may lie behind these steps, of which each is a little slower with it
            args += ['--swa', '1']
        call('train', *args)
        run = read_record(trial / 'run.json')
        steps = max(1, round(plan.minutes * 60 / (run['seconds'] / run['steps'])))
        write_record(file, {'minutes': plan.minutes, 'steps': steps})
    found = read_record(file)
    if found.get('minutes') != plan.minutes:
        raise ValueError(f'{plan.output} was begun with --minutes {found.get("minutes")}, now {plan.minutes}; expected '
                         'the same, or another --output')
    return int(found['steps'])


def run(plan: Plan) -> None:
    """Runs what is left of the steps, and prints the verdicts."""
    trained, bundle = plan.output / 'run', plan.output / 'bundle'
    check_attacks(split_commas(plan.attacks), check(parse(plan.train(trained, TRIAL_STEPS))).threat, sources=())
    call('train', *plan.train(trained, choose_steps(plan)))
    call('evaluate', trained, '--data-dir', plan.data_dir, '--n', plan.images, '--attacks', plan.attacks)
    if not bundle.exists():
        call('bundle', trained, '--out', bundle, '--name', plan.name)
    recipe, record = read_record(trained / 'run.json')['recipe'], read_record(trained / 'evaluation.json')
    accuracies = ', '.join(f'{attack} {found["accuracy"]:.1%}' for attack, found in record['attacks'].items())
    print(f'\n{plan.model} from {recipe["init"]["source"]}, {record["threat_model"]["norm"]} eps '
          f'{record["threat_model"]["eps"]}, {record["n"]} test images: {accuracies}\nbundle: {bundle}')


def main(args: Sequence[str] | None = None, prog: str = 'hub.robustify') -> None:
    parser = Parser(prog=prog, takes_train=True, description=(__doc__ or '').split('\n')[0],
                    usage=f'{prog} MODEL --data-dir DIR --minutes N [options] [-- options of train]',
                    epilog=f'example: {prog} resnet18 --data-dir imagenette --minutes 60 -- --image-size 160')
    parser.add_argument('model', metavar='MODEL', help='name of timm.list_models()')
    parser.add_argument('--data-dir', type=user_path, required=True, metavar='DIR',
                        help='train/CLASS/*.jpg and val/CLASS/*.jpg, or CIFAR')
    parser.add_argument('--minutes', type=float, required=True, help='of the training; verdicts take more')
    parser.add_argument('--output', type=user_path, help='directory for run and bundle (default: runs/MODEL)')
    parser.add_argument('--dataset', help='default: folder where DIR has train, else cifar10')
    parser.add_argument('--init', default='pretrained', help='weights to start from (default: those of timm)')
    parser.add_argument('--act', default='pssilu', help='the activation, which starts as that of MODEL')
    parser.add_argument('--eps', help='default: 8/255 for CIFAR and digits, else 4/255')
    parser.add_argument('--images', type=int, default=500, help='test images of the verdicts (default: 500)')
    parser.add_argument('--attacks', default='clean,pgd-50,apgd', help='of evaluate (default: clean,pgd-50,apgd)')
    own, options = split_options(args)
    with one_line(prog):
        found = vars(parser.parse_args(own))
        if not found['minutes'] > 0:
            raise ValueError(f'--minutes is {found["minutes"]:g}; expected more than 0')
        if not found['data_dir'].is_dir():
            raise ValueError(f'--data-dir {found["data_dir"]} is no directory; expected train/CLASS/*.jpg and '
                             'val/CLASS/*.jpg in it, or CIFAR')
        run(Plan(**{**found, 'options': options, 'output': found['output'] or Path('runs', found['model'])}))


if __name__ == '__main__':
    main()
