"""Evidence: the strongest image that an attack kept, inside eps by exact arithmetic, and read without trust."""

from __future__ import annotations

import errno
import io
import os
import resource
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from timm_paf.attacks import ThreatModel
from timm_paf.evaluation import Evaluation, State, worst_case
from timm_paf.evaluation.evidence import (
    Evidence,
    adversarial,
    check_evidence,
    collect,
    inside,
    load_evidence,
    save_evidence,
)
from timm_paf.losses import margin

SHAPE = (3, 6, 6)
THREATS = {'Linf': ThreatModel('Linf', '8/255'), 'L2': ThreatModel('L2', '0.5'), 'L1': ThreatModel('L1', '6')}


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(128, 10)).eval().requires_grad_(False)


def images(n: int = 24, eight_bit: bool = True) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, *SHAPE), generator=generator).float().div(255)
    x[:4] = x[:4].round()  # at the ends of the box
    if not eight_bit:
        x = torch.rand(n, *SHAPE, generator=generator)
    y = network()(x).argmax(1)
    y[::6] = (y[::6] + 1) % 10  # not right at first
    return x, y


@pytest.fixture(scope='module', params=[(norm, eight_bit) for norm in THREATS for eight_bit in (True, False)],
                ids=lambda case: f'{case[0]}-{"8 bits" if case[1] else "float32"}')
def evaluated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    norm, eight_bit = request.param
    evaluation = Evaluation(network(), *images(eight_bit=eight_bit), THREATS[norm], [
        'clean', 'pgd-3', 'pgd-20x2', f'pgd-20@{4 * THREATS[norm].eps}', 'apgd'], State(
            tmp_path_factory.mktemp('state') / 'state', {}), 10)
    for _ in evaluation.run():
        pass
    return evaluation


def exact_size(x: Tensor, x0: Tensor, norm: str) -> Fraction:
    """The size of a perturbation of two float32 images, or its square in L2, in rational numbers."""
    moved = [abs(Fraction(a) - Fraction(b)) for a, b in zip(x.flatten().tolist(), x0.flatten().tolist(), strict=True)]
    return max(moved) if norm == 'Linf' else sum(moved, Fraction()) if norm == 'L1' else sum(
        (m * m for m in moved), Fraction())


def test_every_fooled_image_has_evidence_that_fools(evaluated: Evaluation, tmp_path: Path) -> None:
    norm, x0, y = evaluated.threat.norm, evaluated.images, evaluated.labels
    found, missing = collect(evaluated)
    assert missing == []
    results = evaluated.results()
    right = worst_case({name: result for name, result in results.items() if '@' not in name})['verdicts']
    fooled = {i for i in range(len(y)) if results['clean']['verdicts'][i] == '1' and right[i] == '0'}
    assert fooled == {int(i) for rows in found.values() for i in rows.which}
    assert len(fooled) > 4
    limit = evaluated.threat.eps ** 2 if norm == 'L2' else evaluated.threat.eps
    for rows in found.values():
        x = adversarial(x0[rows.which], rows.delta)
        assert (evaluated.model(x).argmax(1) != y[rows.which]).all()
        assert x.min() >= 0
        assert x.max() <= 1
        if rows.delta.dtype == torch.int16:
            assert torch.equal(x, (x * 255).round() / 255)
            levels = [(x[i] * 255).round().long() for i in range(len(x))]
            clean = (x0[rows.which] * 255).round().long()
            size = {'Linf': lambda m: m.abs().max(), 'L1': lambda m: m.abs().sum(), 'L2': lambda m: m.square().sum()}
            sizes = [Fraction(int(size[norm](level - before)), 255 ** 2 if norm == 'L2' else 255)
                     for level, before in zip(levels, clean, strict=True)]
        else:
            sizes = [exact_size(one, before, norm) for one, before in zip(x, x0[rows.which], strict=True)]
        assert max(sizes) <= limit
    assert ('eight_bit' in found) == bool(((x0 * 255).round() / 255 == x0).all())

    save_evidence(tmp_path / 'evidence.npz', {norm: found})
    again = load_evidence(tmp_path / 'evidence.npz', len(y), SHAPE)
    assert list(again) == [norm]
    for kind, rows in found.items():
        assert rows.attack == again[norm][kind].attack
        assert all(torch.equal(a, b) for a, b in zip(rows[::2], again[norm][kind][::2], strict=True))
    checked = check_evidence(evaluated.model, x0, y, {norm: evaluated.threat}, again, batch_size=7)
    assert not checked.failed[norm]
    bound = checked.clean & ~checked.fooled[norm]
    assert ''.join(str(int(value)) for value in bound) == right


def test_it_is_the_strongest_of_all_that_attacks_kept(evaluated: Evaluation) -> None:
    """No kept image, rounded as it may be, has another class further ahead."""
    x0, y, norm = evaluated.images, evaluated.labels, evaluated.threat.norm
    found, _ = collect(evaluated)
    lead: dict[int, float] = {}
    for start in evaluated.starts():
        for attack in ('pgd-3', 'pgd-20x2', 'apgd'):
            for part in evaluated.parts(attack)[:-1]:
                kept = evaluated.state.load((attack, part, start), images=True)
                for i, x in zip((kept.which + start).tolist(), kept.images, strict=True):
                    rounded = (x * 255).round() / 255
                    delta = ((rounded - x0[i]) * 255).round().to(torch.int16)[None]
                    if inside(x0[i][None], delta, norm, evaluated.threat.eps):
                        ahead = margin(evaluated.model(rounded[None]), y[i][None]).item()
                        lead[i] = max(lead.get(i, 0.0), ahead)
    for rows in (found[kind] for kind in found if kind == 'eight_bit'):
        got = margin(evaluated.model(adversarial(x0[rows.which], rows.delta)), y[rows.which])
        assert all(value >= lead.get(i, 0.0) - 1e-5 for i, value in zip(rows.which.tolist(), got.tolist(), strict=True))


class Tie(nn.Module):
    """Says 1 of images darker than a middle grey; of brighter ones both logits are 0, which is class 0."""

    def forward(self, x: Tensor) -> Tensor:
        dark = (0.5 - x.flatten(1).mean(1)).relu()
        return torch.stack([torch.zeros_like(dark), dark], 1)


def test_two_classes_that_tie_are_evidence(tmp_path: Path) -> None:
    x0, y = torch.full((2, *SHAPE), 126 / 255), torch.ones(2, dtype=torch.long)
    evaluation = Evaluation(Tie(), x0, y, THREATS['Linf'], ['clean', 'pgd-5'], State(tmp_path / 'state', {}))
    for _ in evaluation.run():
        pass
    assert evaluation.results()['pgd-5']['verdicts'] == '00'
    found, missing = collect(evaluation)
    assert not missing
    checked = check_evidence(Tie(), x0, y, {'Linf': THREATS['Linf']}, {'Linf': found})
    assert checked.fooled['Linf'].all()
    assert not checked.failed['Linf']


@settings(max_examples=60)
@given(norm=st.sampled_from(sorted(THREATS)), seed=st.integers(0, 10 ** 6), eps=st.integers(1, 40),
       exact=st.booleans())
def test_the_budget_is_checked_in_integers(norm: str, seed: int, eps: int, exact: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (1, 1, 2, 2), generator=generator)
    delta = torch.randint(-eps, eps + 1, (1, 1, 2, 2), generator=generator)
    squares = int(delta.square().sum())
    size = {'Linf': int(delta.abs().max()), 'L1': int(delta.abs().sum()), 'L2': squares}[norm]
    # An eps at the size itself and one a hair below.
    limit = Fraction(size, 255) if norm != 'L2' else Fraction(int(squares ** 0.5), 255)
    if not exact:
        limit -= Fraction(1, 10 ** 9)
    bounds = bool(((levels + delta >= 0) & (levels + delta <= 255)).all())
    expected = bounds and (Fraction(size, 255 ** 2) <= limit ** 2 if norm == 'L2' else Fraction(size, 255) <= limit)
    if limit >= 0:
        assert bool(inside(levels / 255, delta.to(torch.int16), norm, limit)) == expected


def test_levels_of_images_that_have_none_are_outside() -> None:
    x0 = torch.full((1, 1, 2, 2), 100.4 / 255)
    delta = torch.full((1, 1, 2, 2), 8, dtype=torch.int16)  # from the image itself 7.6 away, of 255
    assert bool(inside((x0 * 255).round() / 255, delta, 'Linf', Fraction(8, 255)))
    assert not bool(inside(x0, delta, 'Linf', Fraction(8, 255)))


def written(tmp_path: Path, **changes: Any) -> Path:
    arrays: dict[str, Any] = {
        'index': np.array([1, 4]), 'attack': np.array(['apgd', 'pgd-3']), 'delta': np.zeros((2, *SHAPE), np.int16)}
    name = changes.pop('name', 'Linf.eight_bit')
    np.savez(tmp_path / 'evidence.npz', **{f'{name}.{key}': value for key, value in (arrays | changes).items()})
    return tmp_path / 'evidence.npz'


@pytest.mark.parametrize('changes', [
    {'index': np.array([4, 1])}, {'index': np.array([4, 4])}, {'index': np.array([-1, 4])}, {'index': np.array([1, 9])},
    {'index': np.array([1.0, 4.0])}, {'index': np.array([1])}, {'attack': np.array([1, 2])},
    {'attack': np.array([None, {}], dtype=object)}, {'attack': np.array(['apgd'])}, {'name': 'L3.eight_bit'},
    {'name': 'Linf.other'}, {'name': 'Linf'}, {'delta': np.zeros((2, *SHAPE))},
    {'delta': np.zeros((2, 3, 6, 7), np.int16)},
    {'delta': np.zeros((2, *SHAPE), np.float32)}, {'delta': np.zeros((10 ** 4, 3, 6, 6), np.int16)},
    {'index': np.array(7)}])
def test_what_is_no_evidence_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    assert load_evidence(written(tmp_path), 8, SHAPE)['Linf']['eight_bit'].attack == ['apgd', 'pgd-3']
    with pytest.raises(ValueError, match=r'evidence\.npz is no evidence of 8 images') as info:
        load_evidence(written(tmp_path, **changes), 8, SHAPE)
    assert '\n' not in str(info.value)


@settings(max_examples=200)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_is_evidence(
        data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = written(tmp_path_factory.mktemp('evidence'))
    content = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[:data.draw(st.integers(0, len(content)))])
    found, refused = dict[str, dict[str, Evidence]](), ''
    try:
        found = load_evidence(path, 8, SHAPE)
    except ValueError as error:
        refused = str(error)
    assert '\n' not in refused
    assert all(isinstance(rows, Evidence) for kinds in found.values() for rows in kinds.values())


def test_members_that_numpy_does_not_write_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    content = {name: zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist()}
    for method, changes in ((zipfile.ZIP_LZMA, {}), (zipfile.ZIP_BZIP2, {}),
                            (zipfile.ZIP_DEFLATED, {'Linf.eight_bit.attack.npy': b'apgd'})):
        with zipfile.ZipFile(path, 'w', method) as archive:
            for name, data in (content | changes).items():
                archive.writestr(name, data)
        with pytest.raises(ValueError, match='is no evidence'):
            load_evidence(path, 8, SHAPE)


def test_too_many_open_files_are_no_damage(tmp_path: Path) -> None:
    path = written(tmp_path)
    expected = load_evidence(path, 8, SHAPE)
    limits, free = resource.getrlimit(resource.RLIMIT_NOFILE), os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            load_evidence(path, 8, SHAPE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert load_evidence(path, 8, SHAPE).keys() == expected.keys()


def test_a_header_that_lies_takes_no_memory(tmp_path: Path) -> None:
    path = written(tmp_path)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {'descr': '<i2', 'fortran_order': False, 'shape': (2 ** 60, *SHAPE)})
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('Linf.eight_bit.index.npy', header.getvalue())
    with pytest.raises(ValueError, match='is no evidence'):
        load_evidence(path, 8, SHAPE)
