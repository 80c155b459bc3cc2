"""What is kept of an evaluation: interrupted, shared, tampered with."""

from __future__ import annotations

import errno
import itertools
import os
import random
import re
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from test_evaluation import THREAT, Scaled, images, labels  # noqa: F401
from torch import Tensor, nn

from timm_paf.evaluation import Evaluation
from timm_paf.evaluation.record import evaluation_record
from timm_paf.evaluation.state import PartResult, State

ATTACKS = ['clean', 'pgd-3', 'autoattack-rand']


def evaluation(path: Path, images: Tensor, labels: Tensor, model: nn.Module | None = None) -> Evaluation:  # noqa: F811
    """Of seven images in two batches."""
    return Evaluation(model or Scaled().eval(), images[:7], labels[:7], THREAT, ATTACKS, State(path, {'seed': 7}),
                      batch_size=5, seed=7)


def without_seconds(results: object) -> object:
    return re.sub(r"'seconds': [\d.]+", '', str(results))


class Noisy(Scaled):
    """Random itself: what it answers depends on the state of torch's generator."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.02 * torch.randn_like(x))


def test_an_interrupted_evaluation_ends_as_one_that_was_not(
        images: Tensor, labels: Tensor, tmp_path: Path) -> None:  # noqa: F811
    """After every single piece of work it is left, and begun anew with other numbers drawn in between."""
    whole = evaluation(tmp_path / 'whole', images, labels, Noisy().eval())
    pieces = sum(1 for _ in whole.run())
    assert pieces == len(whole.work()) == 2 * (2 + 2 + 3)
    expected = without_seconds(whole.results())
    times: dict[Path, int] = {}
    for done in range(pieces):
        part = evaluation(tmp_path / 'parts', images, labels, Noisy().eval())
        torch.manual_seed(done)
        next(part.run())
        files = {path: path.stat().st_mtime_ns for path in (tmp_path / 'parts').glob('*.safetensors')}
        assert len(files) == done + 1
        assert times.items() <= files.items()  # none was made again
        times = files
    last = evaluation(tmp_path / 'parts', images, labels, Noisy().eval())
    assert not list(last.run())
    assert without_seconds(last.results()) == expected
    # the check meets other noise than the attack did, and says so
    assert sum(len(result['recheck']['different']) for result in last.results().values()) > 0


def test_results_of_other_hardware_are_told_with_their_seconds(
        images: Tensor, labels: Tensor, tmp_path: Path) -> None:  # noqa: F811
    machines = [{'cpu': name, 'threads': 1} for name in ('one', 'two')]
    for machine, pieces in zip(machines, (4, 99)):
        part = evaluation(tmp_path / 's', images, labels)
        part.state = State(tmp_path / 's', {'seed': 7}, hardware=machine)
        for _ in itertools.islice(part.run(), pieces):
            pass
    found = evaluation_record({}, part, {'hardware': machines[1]}, 1)
    work = part.work()
    expected = sum(part.state.load(each).seconds for each in work[:4])
    assert found['earlier'] == [{'hardware': machines[0], 'seconds': round(expected, 2)}]
    assert found['seconds'] == pytest.approx(sum(part.state.load(each).seconds for each in work), abs=0.02)
    part.state = State(tmp_path / 's', {'seed': 7}, hardware=machines[0])
    assert evaluation_record({}, part, {}, 1)['earlier'][0]['hardware'] == machines[1]


def test_results_come_as_they_are_complete(images: Tensor, labels: Tensor, tmp_path: Path) -> None:  # noqa: F811
    found = evaluation(tmp_path / 's', images, labels)
    seen = [(list(found.results()), {k: v['after'] for k, v in found.bounds().items()}) for _ in found.run()]
    assert seen[:3] == [([], {})] * 3
    assert seen[3:7] == [(['clean'], {})] * 4
    assert seen[7:9] == [(['clean', 'pgd-3'], {})] * 2
    assert seen[9:11] == [(['clean', 'pgd-3'], {'autoattack-rand': 'apgd-ce'})] * 2
    assert seen[11:13] == [(['clean', 'pgd-3'], {'autoattack-rand': 'apgd-dlr'})] * 2
    assert seen[13:] == [(ATTACKS, {})]
    assert found.results()['autoattack-rand']['parts']['apgd-dlr']['verdicts'].count('1') == \
        found.results()['autoattack-rand']['correct']


def test_the_check_looks_at_the_images_on_the_disk(images: Tensor, labels: Tensor, tmp_path: Path) -> None:  # noqa: F811
    first = evaluation(tmp_path / 's', images, labels)
    for _ in first.run():
        pass
    before, work = first.results()['pgd-3'], ('pgd-3', 'attack', 0)
    kept = first.state.load(work, images=True)
    assert before['recheck']['different'] == []
    fallen = next(i for i in range(5) if before['verdicts'][i] == '0' and i != 2)

    def put(images: Tensor) -> None:
        first.state.save(work, kept._replace(images=images))
        (tmp_path / 's' / 'pgd-3.recheck.000000.safetensors').unlink()

    harmless = kept.images.clone()
    harmless[kept.which.tolist().index(fallen)] = images[fallen]
    put(harmless)
    again = evaluation(tmp_path / 's', images, labels)
    assert len(list(again.run())) == 1
    after = again.results()['pgd-3']
    assert after['recheck']['different'] == [fallen]
    assert after['verdicts'] == before['verdicts']  # fooled by either is fooled

    put((kept.images + 0.1).clamp(0, 1))
    with pytest.raises(ValueError, match=r'pgd-3 as kept gave images in .* expected \[0, 1\] and at most 4/255'):
        list(evaluation(tmp_path / 's', images, labels).run())


def test_what_is_damaged_is_done_again(
        images: Tensor, labels: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    first = evaluation(tmp_path / 's', images, labels)
    for _ in first.run():
        pass
    verdicts = {name: result['verdicts'] for name, result in first.results().items()}
    cut, flipped, record = (tmp_path / 's' / name for name in (
        'pgd-3.attack.000000.safetensors', 'clean.attack.000000.safetensors', 'record.json'))
    cut.write_bytes(cut.read_bytes()[:-9])
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    record.write_text(record.read_text().replace('"', "'", 1))
    again = evaluation(tmp_path / 's', images, labels)
    assert len(list(again.run())) == 2
    assert {name: result['verdicts'] for name, result in again.results().items()} == verdicts
    said = capsys.readouterr().out.splitlines()
    assert [line.split('/s/')[1].split(' (')[0] for line in said] == [
        'record.json is not JSON', 'clean.attack.000000.safetensors is damaged and is done again',
        'pgd-3.attack.000000.safetensors is damaged and is done again']


def test_no_flipped_bit_changes_a_result(tmp_path: Path) -> None:
    state, work, kept = State(tmp_path / 's', {'seed': 0}), ('clean', 'attack', 0), found()
    state.save(work, kept)
    file = next((tmp_path / 's').glob('*.safetensors'))
    whole, refused = file.read_bytes(), 0
    draw = random.Random(0)
    for _ in range(400):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        state = State(tmp_path / 's', {'seed': 0})
        if work not in state:
            refused += 1
            continue
        again = state.load(work, images=True)
        assert all(torch.equal(a, b) for a, b in zip(again[:3], kept[:3]))
        assert again[3:] == kept[3:]
    assert refused > 350  # the others changed white space of the header


def damage(file: Path, draw: random.Random) -> None:
    """Flips up to three bits of a file, cuts it short, empties it, or puts a directory or another file in its place."""
    kind = draw.choice(['flip', 'flip', 'flip', 'cut', 'empty', 'directory', 'other'])
    content = bytearray(file.read_bytes())
    if kind == 'flip':
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == 'cut':
        del content[draw.randrange(len(content)):]
    elif kind == 'empty':
        content.clear()
    elif kind == 'other':
        content[:] = draw.choice(sorted(file.parent.glob('*.safetensors'))).read_bytes()
    if kind == 'directory':
        file.unlink()
        (file / 'in').mkdir(parents=True)
    else:
        file.write_bytes(content)


@pytest.mark.parametrize('seed', range(3))
def test_no_damage_to_a_file_changes_an_accuracy(
        images: Tensor, labels: Tensor, tmp_path: Path, seed: int) -> None:  # noqa: F811
    def run() -> str:
        state = State(tmp_path / 's', {'seed': 7})
        found = Evaluation(Scaled().eval(), images[:4], labels[:4], THREAT, ['clean', 'pgd-3'], state, 2, 7)
        for _ in found.run():
            pass
        return without_seconds(found.results())

    expected, draw = run(), random.Random(seed)
    files = sorted((tmp_path / 's').iterdir())
    assert len(files) == 2 * 8 + 1  # those of locks too
    for _ in range(60):
        for file in draw.sample(files, draw.randint(1, 3)):
            if file.is_file() and file.stat().st_size:
                damage(file, draw)
            elif file.suffix == '.lock' and file.is_file() and draw.random() < 0.2:
                file.unlink()
                file.mkdir()
        assert run() == expected  # at most three files are damaged, so a result that names the record is left


def test_a_result_in_the_place_of_another_is_done_again(tmp_path: Path) -> None:
    state = State(tmp_path / 's', {})
    for start in (0, 2):
        state.save(('clean', 'attack', start), found())
    first, second = sorted((tmp_path / 's').glob('*.safetensors'))
    second.write_bytes(first.read_bytes())
    again = State(tmp_path / 's', {})
    assert ('clean', 'attack', 0) in again
    assert ('clean', 'attack', 2) not in again


def test_a_file_in_the_place_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / 's').touch()
    with pytest.raises(ValueError, match='s is a file; expected the directory'):
        State(tmp_path / 's', {})


def found() -> PartResult:
    return PartResult(torch.ones(2, dtype=torch.bool), torch.tensor([1]), torch.rand(1, 3, 4, 4), 1.5, ['flag'])


def test_another_record_is_refused_or_given_up(tmp_path: Path) -> None:
    state = State(tmp_path / 's', {'eps': '8/255', 'seed': 0})
    work, kept = ('clean', 'attack', 0), found()
    state.save(work, kept)
    again = State(tmp_path / 's', {'eps': '8/255', 'seed': 0})
    assert work in again
    assert torch.equal(again.load(work, images=True).images, kept.images)
    assert again.load(work)[3:] == (1.5, ['flag'], '')
    with pytest.raises(ValueError, match=r'is of another evaluation \(seed 0, now 1\); repeat that one'):
        State(tmp_path / 's', {'eps': '8/255', 'seed': 1})
    assert work in State(tmp_path / 's', {'eps': '8/255', 'seed': 0})
    other = State(tmp_path / 's', {'eps': '8/255', 'seed': 1}, discard=True)
    assert other.discarded == 'seed 0, now 1'
    assert work not in other


def test_a_directory_whose_making_or_removal_was_cut_short(tmp_path: Path) -> None:
    (tmp_path / 's').mkdir()
    (tmp_path / 's' / '.record.json.123.part').touch()
    (tmp_path / '.s.123.old').mkdir()
    (tmp_path / '.s.123.old' / 'clean.attack.000000.safetensors').touch()
    state = State(tmp_path / 's', {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ['s']
    state.remove()
    assert not list(tmp_path.iterdir())


def test_work_is_claimed_once_and_free_again_when_its_process_dies(tmp_path: Path) -> None:
    state, work = State(tmp_path / 's', {}), ('clean', 'attack', 0)
    child = os.fork()
    if not child:
        with State(tmp_path / 's', {}).claim(work) as mine:
            (tmp_path / 'claimed').write_text(str(mine))
            time.sleep(100)
        os._exit(0)
    try:
        while not (tmp_path / 'claimed').exists() or not (tmp_path / 'claimed').read_text():
            time.sleep(0.01)
        with state.claim(work) as mine:
            assert not mine
        with state.claim(('clean', 'attack', 5)) as mine:
            assert mine
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (tmp_path / 'claimed').read_text() == 'True'
    with state.claim(work) as mine:
        assert mine
        state.save(work, found())
    with state.claim(work) as mine:
        assert not mine  # it is done


def test_too_many_open_files_give_up_no_result(tmp_path: Path) -> None:
    work = ('clean', 'attack', 0)
    State(tmp_path / 's', {}).save(work, found())
    state = State(tmp_path / 's', {})
    limits, free = resource.getrlimit(resource.RLIMIT_NOFILE), os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            assert work not in state
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert work in state
