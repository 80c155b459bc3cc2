"""Data sets in words: their titles, their ids on the Hub, and where they come from."""

from __future__ import annotations

import re
from typing import NamedTuple


class Data(NamedTuple):
    """The words of a card on a data set."""

    title: str
    hub_id: str | None
    about: str


TINY = ('A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; <https://www.cs.toronto.edu/~kriz/'
        'cifar.html> states no licence. Its images are of the 80 Million Tiny Images, which their authors withdrew in '
        '2020.')
DATA = {
    'cifar10': Data('CIFAR-10', 'uoft-cs/cifar10', f'CIFAR-10: {TINY}'),
    'cifar100': Data('CIFAR-100', 'uoft-cs/cifar100', f'CIFAR-100: {TINY}'),
    'digits': Data('digits', None, "scikit-learn's digits, enlarged from 8 x 8 to 32 x 32 pixels: a part of UCI's "
                                   'Optical Recognition of Handwritten Digits, <https://archive.ics.uci.edu/dataset/80>.'),
    'imagenet': Data('ImageNet-1k', 'ILSVRC/imagenet-1k', (
        'O. Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, 2015: ILSVRC2012, for research and '
        'education that is not commercial, <https://image-net.org>.')),
    'folder': Data('a folder of images', None, "A folder of images of the author's own; `run.json` has its sha256.")}


def title_of(dataset: str) -> Data:
    """Returns the words on a data set by the name that a run has of it."""
    kind, _, name = dataset.partition('/')
    if kind == 'hfds' and re.fullmatch(r'[\w-][\w.-]*/[\w-][\w.-]*', name):
        return Data(name, name, f'`{name}` of the Hugging Face Hub, under the terms there.')
    return DATA.get(dataset, Data(dataset, None, f'{dataset}: see `run.json`.'))
