"""The programs of timm_paf by one name: ``timm-paf train ...``, also as ``accelerate launch -m timm_paf train ...``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from .files import hub_directory
from .version import __version__
from .wording import did_you_mean

PROGRAMS = {
    'train': 'adversarial training of a network with a parametric activation',
    'robustify': 'clean weights, a PAF, adversarial fine-tuning, verdicts and bundle in one',
    'evaluate': 'accuracy of a run, a bundle or a named model, clean and under attack',
    'verify': 'check what an evaluation says, without an attack',
    'study': 'a grid of networks from a YAML: trained, attacked, compared image by image',
    'bundle': 'pack a finished run: weights, model card, checksums, submission to RobustBench',
    'card': 'the model card of a bundle anew',
    'upload': 'put a bundle on the Hugging Face Hub',
    'leaderboard': 'results among those that RobustBench has published',
    'quickstart': 'the whole way in a few minutes, offline, on two CPU cores'}


def main(args: Sequence[str] | None = None) -> None:
    """Runs the program that the first argument names."""
    words = list(sys.argv[1:] if args is None else args)
    name, rest = (words or [''])[0], words[1:]
    if name not in PROGRAMS:
        usage = 'usage: timm-paf PROGRAM ... (timm-paf PROGRAM --help says more)\n\n' + ''.join(
            f'  {program:12s} {about}\n' for program, about in PROGRAMS.items())
        if name in ('', '-h', '--help'):
            print(usage, end='')
            sys.exit(0 if name else 2)
        if name == '--version':
            print(f'timm-paf {__version__}')
            return
        sys.exit(f'timm-paf: unknown program {name!r}; expected one of {", ".join(PROGRAMS)}'
                 + did_you_mean(name, PROGRAMS))
    hub = hub_directory()
    clone = hub.parent.name != 'timm_paf'
    if clone and str(hub.parent) not in sys.path:
        sys.path.insert(0, str(hub.parent))
    module = 'train_robust' if name == 'train' else f'{"hub" if clone else "timm_paf.hub"}.{name}'
    try:
        program = importlib.import_module(module)
    except ModuleNotFoundError as error:
        sys.exit(f"timm-paf {name}: {error}; pip install 'timm-paf[train]'")
    except KeyboardInterrupt:  # the imports take seconds
        sys.exit(f'timm-paf {name}: stopped')
    program.main(rest, prog=f'timm-paf {name}')


if __name__ == '__main__':
    main()
