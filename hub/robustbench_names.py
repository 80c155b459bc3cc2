"""Loads networks of RobustBench's model zoo that have no name in timm, by RobustBench's own program."""

from __future__ import annotations

import importlib
import re
from typing import Any, NamedTuple

from torch import nn

from timm_paf.files import is_of_machine
from timm_paf.robustbench import zoo_entries
from timm_paf.weights.server_fault import is_of_server, server_fault
from timm_paf.wording import causes, reason_of

from .publish.boards import BOARDS


class Entry(NamedTuple):
    """An entry of RobustBench's model zoo, and the preprocessing of its images, None for those of one size."""

    name: str
    dataset: str
    threat: str
    preprocessing: str | None


def find_entry(source: str) -> Entry | None:
    """Returns an entry of the installed RobustBench; None if that has none of the name, or there is no RobustBench.

    Args:
        source: its name, where that is of one data set and threat model, or DATASET/THREAT/NAME, the place of its file
            in RobustBench's models/.

    Raises:
        ValueError: if several entries have the name.
        ImportError: if RobustBench is there and does not start: a package is missing, or of another version.
    """
    where, _, name = source.rpartition('/')
    found = [(dataset, threat, entries[name]) for dataset, threat, entries in zoo_entries() or () if name in entries]
    found = [each for each in found if where in ('', f'{each[0]}/{each[1]}')]
    if len(found) > 1:
        raise ValueError(f'{name} is several networks of RobustBench; expected one of '
                         + ', '.join(f'{dataset}/{threat}/{name}' for dataset, threat, _ in found))
    for dataset, threat, entry in found:
        preprocessing = entry.get('preprocessing')
        return Entry(name, dataset, threat, preprocessing if isinstance(preprocessing, str) else None)
    return None


def may_be_entry(source: str) -> bool:
    """Returns whether a source can be the name of an entry; a path can't."""
    return re.fullmatch(r'(\w+/\w+/)?[\w-]+', source) is not None


def entry_names() -> list[str] | None:
    """Returns the names of all entries, alone and as DATASET/THREAT/NAME; None if there is no RobustBench.

    Raises:
        ImportError: if RobustBench is there and does not start.
    """
    found = zoo_entries()
    return found if found is None else [each for dataset, threat, entries in found for name in entries
                                        for each in (name, f'{dataset}/{threat}/{name}')]


def load_entry(entry: Entry) -> tuple[nn.Module, dict[str, Any]]:
    """Returns the network of an entry, for images in [0, 1] and in eval mode, and what the zoo says of it.

    RobustBench takes the weights from models/, or downloads them to there.

    Raises:
        ValueError: if the weights can't be had.
        ModuleNotFoundError, MemoryError, OSError: for what is of this machine: a package, memory, files.
    """
    try:
        model: nn.Module = importlib.import_module('robustbench.utils').load_model(
            entry.name, dataset=entry.dataset, threat_model=entry.threat)
    except Exception as error:  # of its many packages and of the servers that it asks
        of_server = any(map(is_of_server, causes(error)))
        if not of_server and (isinstance(error, ModuleNotFoundError) or is_of_machine(error)):
            raise
        raise ValueError(f'robustbench.utils.load_model does not give {entry.name}: ' + (
            server_fault(error) if of_server else f'{type(error).__name__}: {reason_of(error)}')) from error
    board = BOARDS.get((entry.dataset, entry.threat))
    return model.eval(), {
        'architecture': re.sub(r'\W', '_', entry.name), 'dataset': entry.dataset,
        'threat': {'norm': entry.threat, 'eps': board.eps} if board and board.eps else {},
        'preprocessing': entry.preprocessing}
