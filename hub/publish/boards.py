"""RobustBench's leaderboards, and which results they take."""

from __future__ import annotations

from typing import Any, NamedTuple

from timm_paf.attacks import parse_fraction


class Board(NamedTuple):
    """A leaderboard of RobustBench: eps as its records write it, None of corruptions, and the number of its images."""

    eps: str | None
    n: int = 10_000
    robust: str = 'autoattack_acc'
    """The entry of its records that ranks."""


CORRUPTIONS = 'corruptions'
"""The threat model of the boards of common corruptions."""
BOARDS = {
    ('cifar10', 'Linf'): Board('8/255'), ('cifar10', 'L2'): Board('0.5'),
    ('cifar10', CORRUPTIONS): Board(None, robust='corruptions_acc'),
    ('cifar100', 'Linf'): Board('8/255'), ('cifar100', CORRUPTIONS): Board(None, robust='corruptions_acc'),
    ('imagenet', 'Linf'): Board('4/255', 5_000), ('imagenet', CORRUPTIONS): Board(None, 5_000, 'corruptions_acc'),
    ('imagenet', 'corruptions_3d'): Board(None, 5_000, 'corruptions_acc_3d')}
"""RobustBench's leaderboards, by data set and threat model."""
TITLES = {'cifar10': 'CIFAR-10', 'cifar100': 'CIFAR-100', 'imagenet': 'ImageNet'}
"""RobustBench's titles of their data sets; behind that of their corrupted images stands -C."""


def board_eps(dataset: str, norm: str, eps: str) -> str | None:
    """Returns RobustBench's spelling of eps ('0.5' for '1/2') if this threat model has a leaderboard, else None."""
    board = BOARDS.get((dataset, norm))
    return board.eps if board and board.eps and parse_fraction(eps) == parse_fraction(board.eps) else None


def images_of(dataset: str) -> int:
    """Returns the number of test images of a data set's boards, also for a threat model that has none."""
    return next((board.n for (name, _), board in BOARDS.items() if name == dataset), Board(None).n)


def boards_in_words() -> str:
    """Returns the boards on which a result under attack has a place."""
    return ', '.join(f'{dataset} {norm} {board.eps}' for (dataset, norm), board in BOARDS.items() if board.eps)


def corruptions_fault(evaluation: dict[str, Any]) -> str | None:
    """Returns in words why a board of RobustBench takes no result on corruptions of an evaluation; None if it does."""
    found, board = evaluation.get('corruptions'), BOARDS.get((evaluation['dataset'], CORRUPTIONS))
    if found is None:
        return 'there are none'
    if board is None:
        return f'RobustBench has no board of corruptions of {evaluation["dataset"]}'
    if not evaluation.get('standard', True):
        return 'not the standard evaluation'
    if found['generated']:
        return "generated corruptions, not the benchmark's files"
    return None if found['n'] == board.n else f'{found["n"]:,} images of each corruption and severity, not {board.n:,}'
