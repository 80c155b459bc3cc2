"""Keeps what an evaluation has found so far, in a directory that any number of processes fill and that survives them.

There is one whole file for each part of an attack on each batch. A process claims such an item of work with a lock that
the system releases with the process, however that ends, so that another process can take it up.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import atomic_write, is_of_machine, read_record, record_sha256, write_record

__all__ = ['PartResult', 'State', 'WorkItem']

WorkItem = tuple[str, str, int]
"""An attack, a part of it, and the first image of a batch."""

_RECORD = 'record.json'


class PartResult(NamedTuple):
    """The result of one part of an attack on one batch, on the CPU."""

    right: Tensor
    """(batch,) bool: whether an image is still classified right."""
    which: Tensor
    """(k,) int64: the positions in the batch of the images with a kept adversarial one."""
    images: Tensor
    """(k, channels, height, width) float32: the kept adversarial images, as ``which``; empty if not asked for."""
    seconds: float
    flags: list[str]
    hardware: str = ''
    """What it was made on, as JSON; '' where that was not kept."""


class State:
    """The results in a directory.

    Args:
        path: the directory, which is made unless it is there.
        record: all that the results depend on, for JSON.
        discard: whether to give up results of another record.
        hardware: what the results of this process are made on, for JSON.

    Raises:
        ValueError: if the directory is of another record; the message has the first difference.
    """

    def __init__(self, path: str | Path, record: dict[str, Any], discard: bool = False,
                 hardware: dict[str, Any] | None = None) -> None:
        self.path, self.hardware = Path(path), json.dumps(hardware) if hardware else ''
        self._record_sha256 = record_sha256(json.loads(json.dumps(record)))
        self._verdicts: dict[WorkItem, PartResult] = {}
        for old in self.path.parent.glob(f'.{self.path.name}.*.old'):
            shutil.rmtree(old)  # a process was killed while it removed the directory
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f'{self.path} is a file; expected the directory of an evaluation, or none: remove it')
        for path in (*self.path.glob('*.safetensors'), *self.path.glob('*.lock'), self.path / _RECORD):
            if path.is_dir():  # other programs make such a thing, and no file can take its place
                print(f'{path} is a directory and is removed; what was in its place is done again')
                shutil.rmtree(path, ignore_errors=True)  # another process may be at it too
        difference = self._difference(record)
        self.discarded = difference if any(self.path.glob('*.safetensors')) else None
        """The difference in the record of given-up results, if there were any."""
        if difference is None:
            return
        if not discard and self.discarded:
            raise ValueError(f'{self.path} is of another evaluation ({difference}); repeat that one, or give '
                             '--overwrite to give it up, or another --output DIR')
        self.remove()
        self.path.mkdir(parents=True)
        write_record(self.path / _RECORD, record)

    def _difference(self, record: dict[str, Any]) -> str | None:
        try:
            there = read_record(self.path / _RECORD)
        except (FileNotFoundError, ValueError) as error:
            # A result's checksum names its record.
            if any(self._read(file) is not None for file in self.path.glob('*.safetensors')):
                print(f'{error}; it is written anew')
                write_record(self.path / _RECORD, record)
                return None
            return f'it has no {_RECORD}, or a damaged one'
        return next((f'{key} {there.get(key)!r}, now {record.get(key)!r}' for key in (record | there)
                     if there.get(key) != record.get(key)), None)

    def _file(self, work: WorkItem) -> Path:
        attack, part, start = work
        return self.path / f'{attack}.{part}.{start:06d}.safetensors'.replace('/', '_')

    def __contains__(self, work: WorkItem) -> bool:
        return work in self._verdicts or self._whole(work) is not None

    def _whole(self, work: WorkItem) -> PartResult | None:
        """Returns the result of an item of work, None where there is none or it is damaged."""
        found = self._read(self._file(work)) if self._file(work).is_file() else None
        if found is not None:
            self._verdicts[work] = found._replace(images=torch.empty(0))
        return found

    def _read(self, file: Path) -> PartResult | None:
        """Returns the result in a file, None where it is damaged, of another record or of another item of work."""
        try:
            file.read_bytes()  # for its errno: safe_open calls a missing file what a lack of handles or a disk fault is
            with safe_open(file, framework='pt') as content:
                about = content.metadata()
                right, which, images = (content.get_tensor(name) for name in ('right', 'which', 'images'))
                found = PartResult(right, which, images, float(about['seconds']), json.loads(about['flags']),
                                   about.get('hardware', ''))
            return found if about['sha256'] == self._sha256(file, found) else None
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            if is_of_machine(error):  # hours of attack are not done again for it
                raise
            return None

    def _sha256(self, file: Path, found: PartResult) -> str:
        """Returns the SHA-256 of a result, of its file's name and of the record that it belongs to."""
        about = f'{self._record_sha256} {file.name} {found.seconds} {json.dumps(found.flags)}{found.hardware}'
        digest = hashlib.sha256(about.encode())
        for tensor in found[:3]:
            digest.update(f'{tensor.dtype} {tuple(tensor.shape)}'.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @contextlib.contextmanager
    def claim(self, work: WorkItem) -> Iterator[bool]:
        """Yields whether this process is to do an item of work: it is not done, and no other process is at it.

        A damaged result is named and given up.
        """
        lock = os.open(self._file(work).with_suffix('.lock'), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = work not in self
                if mine and self._file(work).is_file():
                    print(f'{self._file(work)} is damaged and is done again')
                    self._file(work).unlink()
            except BlockingIOError:
                mine = False
            yield mine
        finally:
            os.close(lock)

    def share(self, items: Iterable[WorkItem], do: Callable[[WorkItem], PartResult],
              ready: Callable[[WorkItem], bool] = lambda work: True) -> Iterator[None]:
        """Does the items of work that nobody has done or is doing, and waits for the rest; yields whenever there may be
        news.

        Args:
            items: the items of work of all processes.
            do: does one of them.
            ready: whether the results that an item of work needs are there.
        """
        todo = dict.fromkeys(items)
        while todo:
            for work in list(todo):
                if work in self:
                    del todo[work]
                elif ready(work):
                    with self.claim(work) as mine:
                        if mine:
                            self.save(work, do(work))
                    if mine:
                        yield
                        break
            else:
                if todo:  # other processes are at all of it
                    time.sleep(0.2)
                    yield

    def save(self, work: WorkItem, found: PartResult) -> None:
        """Writes the result of an item of work, whole."""
        tensors = {name: getattr(found, name).contiguous() for name in ('right', 'which', 'images')}
        file, found = self._file(work), found._replace(hardware=self.hardware)
        with atomic_write(file) as part:
            save_file(tensors, part, {
                'seconds': str(found.seconds), 'flags': json.dumps(found.flags), 'hardware': found.hardware,
                'sha256': self._sha256(file, found)})

    def load(self, work: WorkItem, images: bool = False) -> PartResult:
        """Loads the result of an item of work, with the adversarial images or without.

        Raises:
            ValueError: if the file is damaged.
        """
        if work in self._verdicts and not images:
            return self._verdicts[work]
        found = self._whole(work)
        if found is None:
            raise ValueError(f'{self._file(work)} was damaged since the start; the same command does it again')
        return found if images else self._verdicts[work]

    def elsewhere(self, items: Iterable[WorkItem]) -> dict[str, float]:
        """Returns the seconds of the results so far that other hardware than this process's made, by hardware."""
        found: dict[str, float] = {}
        for work in items:
            if work in self and (each := self.load(work)).hardware not in ('', self.hardware):
                found[each.hardware] = found.get(each.hardware, 0) + each.seconds
        return found

    def remove(self) -> None:
        """Removes the whole directory, so that none of it counts if the removal is cut short."""
        if self.path.exists():
            old = self.path.with_name(f'.{self.path.name}.{os.getpid()}.old')
            self.path.rename(old)
            shutil.rmtree(old)
