"""Verdicts against counts by hand and against AutoAttack's own loop."""

from __future__ import annotations

import importlib
import random
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from torch import Tensor, nn

import timm_paf  # noqa: F401
from timm_paf.attacks import ThreatModel, frozen_view, pgd
from timm_paf.data import derive_seed, load_dataset, to_float
from timm_paf.evaluation import Evaluation, engine, evaluate, worst_case
from timm_paf.evaluation.autoattack import AUTOATTACK
from timm_paf.evaluation.state import State
from timm_paf.robustbench import load_bundle
from timm_paf.speed import AnyBatch


class Scaled(nn.Module):
    """A small network on 8 x 8 images whose logits another function changes."""

    def __init__(self, change: object = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.SiLU(), nn.Flatten(), nn.Linear(72, 10))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return self.change(logits) if self.change else logits  # type: ignore[operator]


@pytest.fixture(scope='module')
def images() -> Tensor:
    return torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module')
def labels(images: Tensor) -> Tensor:
    """Those of the network but for two images, which are wrong without an attack."""
    labels = Scaled()(images).argmax(1)
    labels[[2, 7]] = (labels[[2, 7]] + 1) % 10
    return labels


THREAT = ThreatModel('Linf', Fraction(4, 255))


def test_pgd_stops_at_cycles_with_the_same_verdicts() -> None:
    model = frozen_view(load_bundle(ROOT / 'hub' / 'models' / 'wrn10_1_pssilu'))
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y, threat, sizes = model(x).argmax(1), ThreatModel(eps='1/255', steps=50), []
    expected = model(pgd(model, x, y, threat, torch.Generator().manual_seed(derive_seed(0, 0, 1)))).argmax(1) == y
    with model.register_forward_hook(lambda module, given, out: sizes.append(len(out))):
        found = evaluate(model, x, y, threat, 'pgd-50')['pgd-50']
    assert found['verdicts'] == ''.join(str(int(right)) for right in expected)
    assert sum(sizes) < 0.8 * 50 * 4


@pytest.mark.parametrize('attack', ['pgd-3', 'pgd-2x2', 'apgd'])
def test_a_batch_is_attacked_as_in_an_evaluation_of_more_images(
        attack: str, images: Tensor, labels: Tensor, tmp_path: Path) -> None:
    """Bit for bit, whatever the images before it are; as the first batch it meets other noise."""
    model, threat = Scaled().eval(), ThreatModel('Linf', Fraction(32, 255))

    def found(name: str, x: Tensor, y: Tensor, first: int) -> list[Tensor]:
        """The kept images of the last batch, part by part."""
        evaluation = Evaluation(model, x, y, threat, [attack], State(tmp_path / name, {}), 4, 3, first=first)
        for _ in evaluation.run():
            pass
        return [evaluation.state.load((attack, part, len(x) - 4), images=True).images
                for part in evaluation.parts(attack)]

    alone = found('alone', images[4:8], labels[4:8], 4)
    for name, before in (('whole', images[:4]), ('other', 1 - images[:4])):
        among = found(name, torch.cat([before, images[4:8]]), labels[:8], 0)
        assert all(torch.equal(*pair) for pair in zip(alone, among, strict=True))
    assert sum(map(len, alone)) == 3
    at_first = found('first', images[4:8], labels[4:8], 0)
    assert not all(torch.equal(*pair) for pair in zip(alone, at_first, strict=True))


def test_counts_are_those_by_hand(images: Tensor, labels: Tensor, tmp_path: Path) -> None:
    model = Scaled().eval()
    evaluation = Evaluation(model, images, labels, THREAT, ['clean', 'pgd-3', 'pgd-2@1/255', 'pgd-3x2'],
                            State(tmp_path / 's', {}), batch_size=5, seed=3)
    passes, last = [evaluation.progress() for _ in evaluation.run()][-1]
    assert passes == 12 * (2 + 6 + 1 + 4 + 1 + 12 + 1)
    found = evaluation.results()
    assert last == f'pgd-3x2 recheck: {found["pgd-3x2"]["accuracy"]:.1%} of 12 right'
    assert found['clean']['verdicts'] == '110111101111'
    assert (found['clean']['n'], found['clean']['correct'], found['clean']['accuracy']) == (12, 10, 10 / 12)
    right = []
    for start in (0, 5, 10):
        x0, y = images[start:start + 5], labels[start:start + 5]
        generator = torch.Generator().manual_seed(derive_seed(3, start, 1))
        x = pgd(model, x0, y, ThreatModel('Linf', THREAT.eps, THREAT.step, 3), generator)
        right += ((model(x).argmax(1) == y) & (model(x0).argmax(1) == y)).tolist()
    assert found['pgd-3']['verdicts'] == ''.join(str(int(v)) for v in right)
    weaker = []
    for start in (0, 5, 10):
        x0, y = images[start:start + 5], labels[start:start + 5]
        generator = torch.Generator().manual_seed(derive_seed(3, start, 1))
        x = pgd(model, x0, y, ThreatModel('Linf', Fraction(1, 255), Fraction(1, 4 * 255), 2), generator)
        weaker += ((model(x).argmax(1) == y) & (model(x0).argmax(1) == y)).tolist()
    assert found['pgd-2@1/255']['verdicts'] == ''.join(str(int(v)) for v in weaker)
    assert (found['pgd-2@1/255']['eps'], found['pgd-2@1/255']['step']) == ('1/255', '1/1020')
    assert found['pgd-3x2']['correct'] <= found['pgd-3']['correct']
    assert found['pgd-3x2']['restarts'] == 2
    columns = zip(*(result['verdicts'] for result in found.values()))
    assert worst_case(found)['verdicts'] == ''.join(min(column) for column in columns)
    for result in found.values():
        assert result['recheck']['different'] == []


@pytest.mark.parametrize(('version', 'norm'), [
    ('standard', 'Linf'), ('rand', 'Linf'),
    *(pytest.param(version, norm, marks=pytest.mark.slow) for version, norm in
      (('plus', 'Linf'), ('standard', 'L2'), ('standard', 'L1'), ('rand', 'L2'), ('plus', 'L2')))])
def test_autoattack_is_the_package_s_own(images: Tensor, labels: Tensor, version: str, norm: str) -> None:
    """The parts one by one give the adversarial images that its versions give in one call."""
    from autoattack import AutoAttack
    name = 'autoattack' if version == 'standard' else f'autoattack-{version}'
    model = Scaled().eval()
    threat = ThreatModel(norm, {'Linf': Fraction(6, 255), 'L2': Fraction(1, 4), 'L1': Fraction(2)}[norm])
    found = evaluate(model, images, labels, threat, [name], batch_size=12, seed=5)[name]
    attack = AutoAttack(model, norm=norm, eps=float(threat.eps), seed=derive_seed(5, 0) % 2**31, device='cpu',
                        verbose=False, version=version)
    assert tuple(attack.attacks_to_run) == AUTOATTACK[name] == tuple(found['after'])
    x = attack.run_standard_evaluation(images, labels, bs=12)
    right = model(x).argmax(1) == labels
    assert found['verdicts'] == ''.join(str(int(v)) for v in right)
    assert 0 < found['correct'] < 10  # some fall and some stand, or the comparison would say little
    after = list(found['after'].values())
    assert after == sorted(after, reverse=True)
    assert after[-1] == found['accuracy']
    assert [part['accuracy'] for part in found['parts'].values()] == after
    assert found['recheck'] == {'kept': 10 - found['correct'], 'different': []}


def test_autoattack_s_warnings_are_kept(images: Tensor, labels: Tensor) -> None:
    bad = Scaled(lambda z: z.softmax(1).round(decimals=2)).eval()
    flags = evaluate(bad, images[:2], labels[:2], THREAT, ['autoattack'])['autoattack']['flags']
    assert any('zero gradient' in flag for flag in flags)
    assert len(flags) == len(set(flags))


def test_verdicts_do_not_depend_on_later_images(images: Tensor, labels: Tensor) -> None:
    model = Scaled().eval()
    few = evaluate(model, images[:8], labels[:8], THREAT, ['pgd-3'], batch_size=4)
    many = evaluate(model, images, labels, THREAT, ['pgd-3'], batch_size=4)
    assert many['pgd-3']['verdicts'].startswith(few['pgd-3']['verdicts'])


def test_unknown_attacks_are_named(images: Tensor, labels: Tensor) -> None:
    for name in ('pgd', 'pgd-0', 'fgsm', '', 'pgd-3x0', 'autoattack-best'):
        with pytest.raises(ValueError, match='expected clean, pgd-N'):
            evaluate(Scaled(), images, labels, THREAT, [name])
    for names, message in ((['clean', 'clean'], 'given twice'), (['pgd-3@eight'], 'is not a number'),
                           (['transfer-pgd-3'], 'expected source in Python')):
        with pytest.raises(ValueError, match=message):
            evaluate(Scaled(), images, labels, THREAT, names)


def test_an_attack_that_breaks_its_budget_is_an_error(
        images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    for broken in (lambda m, x0, *_, **__: (x0 + 5 / 255).clamp(0, 1), lambda m, x0, *_, **__: x0 - 4 / 255):
        monkeypatch.setattr(engine, 'pgd', broken)
        with pytest.raises(ValueError, match=r'pgd-2 gave images in .* expected \[0, 1\] and at most 4/255'):
            evaluate(Scaled(), images, labels, THREAT, ['pgd-2'])


@pytest.mark.parametrize(('attacks', 'n'), [
    (['clean', 'pgd-20'], 128), pytest.param(['autoattack'], 32, marks=pytest.mark.slow)])
def test_a_compiled_model_has_the_verdicts_of_the_eager_one(cifar10_root: Path, attacks: list[str], n: int) -> None:
    """Of a trained network on real images, whose logits may be near to each other."""
    data = load_dataset('cifar10', cifar10_root, train=False)
    x, y = to_float(data.images[:n]), data.labels[:n]
    view = frozen_view(load_bundle(ROOT / 'hub' / 'models' / 'wrn10_1_pssilu').to(memory_format=torch.channels_last))
    eager, compiled = (evaluate(model, x, y, ThreatModel(), attacks, batch_size=32) for model in (view, AnyBatch(view)))
    for attack in attacks:
        assert compiled[attack]['verdicts'] == eager[attack]['verdicts']
        assert 0 < compiled[attack]['correct'] < n


@pytest.fixture
def parity(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark that compares us with RobustBench."""
    monkeypatch.syspath_prepend(str(ROOT / 'tests' / 'benchmarks'))
    return importlib.import_module('parity')


def test_verdicts_are_those_of_robustbench_s_benchmark(images: Tensor, labels: Tensor, parity: ModuleType) -> None:
    model = Scaled().eval()
    theirs = parity.benchmark_verdicts(model, images, labels, 6 / 255, derive_seed(4, 0) % 2**31)
    ours = evaluate(model, images, labels, ThreatModel(eps=Fraction(6, 255)), ['autoattack'], batch_size=12, seed=4)
    assert ours['autoattack']['verdicts'] == theirs
    assert 0 < ours['autoattack']['correct'] < 10


@pytest.mark.slow
def test_verdicts_of_a_trained_network_are_those_of_robustbench_s_benchmark(
        cifar10_root: Path, parity: ModuleType) -> None:
    """RobustBench's class of it, eager, against ours, compiled as `hub.evaluate` does."""
    data = load_dataset('cifar10', cifar10_root, train=False)
    x, y = to_float(data.images[:64]), data.labels[:64]
    model = load_bundle(ROOT / 'hub' / 'models' / 'wrn10_1_pssilu')
    peer = importlib.import_module('peers').same_weights('wrn10_1_pssilu', model)
    theirs = parity.benchmark_verdicts(peer, x, y, 8 / 255, derive_seed(4, 0) % 2**31)
    view = frozen_view(model.to(memory_format=torch.channels_last))
    ours = evaluate(AnyBatch(view), x, y, ThreatModel(), ['autoattack'], 64, 4, fresh=view)['autoattack']
    assert ours['verdicts'] == theirs
    assert 0 < ours['correct'] < 64
    assert ours['recheck']['different'] == []


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    network = timm.create_model('wrn10_1_pssilu')
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that those of no batch are like
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
    return network


def test_a_network_in_train_mode_is_evaluated_like_one_in_eval_mode(model: nn.Module) -> None:
    x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    y = torch.arange(8) % 10
    expected = evaluate(model.eval(), x, y, ThreatModel(eps=Fraction(4, 255)), ['clean', 'pgd-3'])
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = evaluate(model, x, y, '4/255', 'clean,pgd-3')
    for results in (expected, found):
        for result in results.values():
            del result['seconds']
    assert found == expected
    assert [module.training for module in model.modules()] == modes
    assert not frozen.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(('arguments', 'message'), [
    ({'attacks': 'clean,nothing'}, "unknown attack 'nothing'"),
    ({'attacks': 'clean, PGD20'}, "unknown attack 'PGD20'.*did you mean pgd-20"),
    ({'threat': 'eight'}, 'is not a number'),
    ({'threat': '8'}, 'write 8/255')])
def test_mistakes_of_a_notebook_leave_the_network_as_it_was(
        model: nn.Module, arguments: dict[str, str], message: str) -> None:
    model.train()
    with pytest.raises(ValueError, match=message):
        evaluate(model, torch.rand(2, 3, 32, 32), torch.zeros(2, dtype=torch.long), **arguments)
    assert all(module.training for module in model.modules())


def test_arrays_are_told_from_tensors(model: nn.Module) -> None:
    x, y = torch.rand(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)
    for images, labels in ((x.numpy(), y), (x, y.numpy()), (x, [0, 0])):
        with pytest.raises(ValueError, match=r'are of type (ndarray|list); expected tensors of torch'):
            evaluate(model, images, labels, '4/255', 'clean')  # type: ignore[arg-type]


def test_an_evaluation_leaves_the_random_numbers_of_its_caller(model: nn.Module) -> None:
    x, y = torch.rand(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
    states = [torch.get_rng_state(), *np.random.get_state()[1:3], random.getstate()]
    evaluate(model, x.requires_grad_(), y, '4/255', 'clean,pgd-1,autoattack')
    after = [torch.get_rng_state(), *np.random.get_state()[1:3], random.getstate()]
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else np.all(a == b) for a, b in zip(states, after))


@pytest.mark.parametrize('size', [0, -1])
def test_a_batch_has_an_image(model: nn.Module, size: int) -> None:
    with pytest.raises(ValueError, match=rf'^the batch size is {size}; expected at least 1$'):
        evaluate(model, torch.rand(2, 3, 32, 32), torch.zeros(2, dtype=torch.long), batch_size=size)
