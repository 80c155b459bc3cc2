"""CIFAR-10's generated corruptions beside their authors' functions, with the same random draws.

    python tests/benchmarks/corruptions.py --checkouts DIR --data-dir data \
        --output tests/benchmarks/results/corruptions.json

DIR has a clone of github.com/hendrycks/robustness as hendrycks+robustness. Its program wants Wand with ImageMagick 6
(pip install wand, apt install libmagickwand-6.q16-6). Its functions draw from numpy's global generator; here they draw
from the one that ours get, and names that numpy, scipy and scikit-image have dropped since are those of today.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import types
from pathlib import Path
from typing import Any

import numpy as np
import skimage.color
import skimage.util
from PIL import Image

from timm_paf.data import load_dataset
from timm_paf.data.corrupted import CORRUPTIONS, SEVERITIES
from timm_paf.data.corruptions import corrupt
from timm_paf.files import environment, write_json

RENAMED = {'from scipy.ndimage.interpolation import': 'from scipy.ndimage import',
           'multichannel=True': 'channel_axis=-1', 'np.float_': 'np.float64', 'np.fromstring': 'np.frombuffer'}


class Draws:
    """numpy.random's functions of the program, which draw from ``rng``."""

    rng: np.random.Generator

    def normal(self, loc: float = 0.0, scale: float = 1.0, size: Any = None) -> Any:
        return self.rng.normal(loc, scale, size)

    def uniform(self, low: float, high: float, size: Any = None) -> Any:
        return self.rng.uniform(low, high, size)

    def randint(self, low: int, high: int | None = None, size: Any = None) -> Any:
        return self.rng.integers(low, high, size)

    def poisson(self, lam: Any) -> Any:
        return self.rng.poisson(lam)


class Numpy:
    """numpy, but for its random numbers."""

    def __init__(self, random: Draws) -> None:
        self.random = random

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def official(program: Path, draws: Draws) -> types.ModuleType:
    """The functions of make_cifar_c.py, without the lines that make the files."""
    source = program.read_text().partition('# /////////////// End Distortions')[0]
    for old, new in RENAMED.items():
        source = source.replace(old, new)
    module = types.ModuleType('make_cifar_c')
    exec(compile(source, str(program), 'exec'), module.__dict__)

    def random_noise(*args: Any, **kwargs: Any) -> Any:
        return skimage.util.random_noise(*args, rng=draws.rng, **kwargs)

    scikit = types.SimpleNamespace(color=skimage.color, util=types.SimpleNamespace(random_noise=random_noise))
    module.__dict__.update(np=Numpy(draws), sk=scikit)
    return module


def compare(name: str, theirs: Any, draws: Draws, images: np.ndarray) -> dict[str, Any]:
    """How many corrupted images are the same to the bit, and the largest difference of a pixel."""
    same, largest = 0, 0
    for severity in SEVERITIES:
        for i, image in enumerate(images):
            draws.rng = np.random.default_rng((severity, i))
            expected = np.uint8(getattr(theirs, name)(Image.fromarray(image), severity))
            found = corrupt(image, name, severity, np.random.default_rng((severity, i)))
            largest = max(largest, int(np.abs(expected.astype(int) - found).max()))
            same += np.array_equal(expected, found)
    return {'corruption': name, 'images': len(SEVERITIES) * len(images), 'same': same, 'largest': largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--checkouts', type=Path, required=True)
    parser.add_argument('--data-dir', type=Path, required=True)
    parser.add_argument('--images', type=int, default=50, help='of each severity (default: 50)')
    parser.add_argument('--output', type=Path, required=True)
    args = parser.parse_args()
    folder, draws = args.checkouts / 'hendrycks+robustness', Draws()
    images = load_dataset('cifar10', args.data_dir, train=False).images[:args.images].numpy()
    with contextlib.chdir(folder / 'ImageNet-C' / 'create_c'):  # the pictures of frost are there
        theirs = official(Path('make_cifar_c.py'), draws)
        rows = [compare(name, theirs, draws, images) for name in CORRUPTIONS]
    for row in rows:
        print('{corruption}: {same} of {images} images are the same, largest difference {largest}'.format(**row))
    commit = subprocess.run(['git', '-C', folder, 'rev-parse', 'HEAD'], capture_output=True, text=True, check=True)
    write_json(args.output, {'rows': rows, 'checkout': commit.stdout.strip(), **environment()})


if __name__ == '__main__':
    main()
