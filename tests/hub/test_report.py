"""The tables and pictures of README.md and of hub/results: they are what the records say."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Program, assert_one_line
from PIL import Image
from scipy import stats

from hub import report, twins, weights_tables
from hub.study import convergence, one_epoch, pilots, records, tables
from timm_paf.files import read_record, sha256
from timm_paf.plots import plot_activations, plot_eps, plot_shapes
from timm_paf.weights import find_weights

RECORDS = sorted((ROOT / 'hub').glob('*/**/evaluation.json'))  # of hub/models too


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What hub.report reads and writes, in a place of its own."""
    shutil.copy(ROOT / 'README.md', tmp_path)
    page = tmp_path / 'timm_paf' / 'weights' / 'README.md'
    page.parent.mkdir(parents=True)
    shutil.copy(ROOT / 'timm_paf' / 'weights' / 'README.md', page)
    shutil.copytree(ROOT / 'hub' / 'results', tmp_path / 'hub' / 'results')
    return tmp_path


def run(program: Program, checkout: Path, *args: str):  # type: ignore[no-untyped-def]
    code = f'import os; from hub.report import main; os.chdir({str(checkout)!r}); main()'
    return program('-c', code, *args)


def test_everything_is_up_to_date(program: Program) -> None:
    done = program('-m', 'hub.report', '--check')
    assert (done.returncode, done.stdout) == (0, ''), done.stdout + done.stderr


def test_a_number_that_no_record_has_is_found_and_fixed(
        program: Program, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme, picture = checkout / 'README.md', checkout / 'hub' / 'results' / 'eps.png'
    whole = readme.read_text()
    row = next(line for line in whole.splitlines() if line.startswith('| `wrn10_1_relu`'))
    changed = row.replace(' (n = ', '9 (n = ', 1)
    readme.write_text(whole.replace(row, changed))
    other = {'x': [('0', 50.0), ('8/255', 20.0)]}
    plot_eps(other, picture, source=json.dumps(other))
    done = run(program, checkout, '--check')
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines()] == ['README.md', 'hub/results/eps.png']
    assert readme.read_text() != whole
    monkeypatch.chdir(checkout)
    assert report.run(check=False) == [Path('README.md'), Path('hub/results/eps.png')]
    assert readme.read_text() == whole
    assert report.run(check=True) == []


def test_mistakes_are_named_and_change_nothing(
        program: Program, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    readme, record = checkout / 'README.md', checkout / one_epoch.STUDY / 'silu_s0'
    whole = readme.read_text()
    for text, words in (
            (whole.replace('<!-- end -->', '', 1), 'not followed by its own'),
            (whole.replace('hub.report: weights', 'hub.report: weight'), "the mark of 'weight' is unknown"),
            (re.sub('<!-- hub.report: results.*?<!-- end -->', '', whole, flags=re.DOTALL), 'no mark of results')):
        readme.write_text(text)
        with pytest.raises(ValueError, match=words):
            report.run(check=False)
        assert readme.read_text() == text
    assert_one_line(run(program, checkout), 'hub.report:', 'no mark of results')
    readme.write_text(whole)
    record.rename(record.with_name('silu_s9'))
    with pytest.raises(ValueError, match=r'silu_s9/evaluation\.json is of no network of hub/results/study/study\.yaml'):
        report.run(check=False)
    record.with_name('silu_s9').rename(record)
    for name, keys, value, words in (
            ('run.json', ('recipe', 'lr'), 0.2, 'run.json is not of silu_s0 as the study has it: lr 0.2, now 0.1'),
            ('run.json', ('steps',), 391, 'silu_s0 in hub/results/study were made in another way'),
            ('evaluation.json', ('seed',), 1, 'silu_s0 in hub/results/study were made in another way'),
            ('evaluation.json', ('n',), 999, "images is 'first 1000' and n is 999; expected as many"),
            ('evaluation.json', ('complete',), False, 'evaluation.json is not finished'),
            ('evaluation.json', ('attacks',), {}, 'attacks is {}; expected results by attack'),
            ('evaluation.json', ('attacks', 'pgd-50'), None, 'expected 1000 and clean,pgd-50,apgd')):
        before = (record / name).read_text()
        changed = inner = json.loads(before)
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        if value is None:
            del inner[keys[-1]], changed['worst_case']
        (record / name).write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=re.escape(words)):
            report.run(check=False)
        (record / name).write_text(before)
    shutil.rmtree(record.with_name('relu_s0'))
    with pytest.raises(ValueError, match=r'has no relu_s0; run timm-paf study hub/results/study/study\.yaml'):
        report.run(check=False)


@pytest.mark.parametrize('path', RECORDS, ids=lambda path: path.parent.name)
def test_counts_are_those_of_the_verdicts(path: Path) -> None:
    found = json.loads(path.read_text())
    for result in found['attacks'].values():
        assert len(result['verdicts']) == result['n'] == found['n']
        assert result['verdicts'].count('1') == result['correct'] == round(result['accuracy'] * result['n'])


def test_the_reason_to_leave_fab_t_and_square_out() -> None:
    for path in (ROOT / 'hub' / 'models').glob('*/evaluation.json'):
        after = json.loads(path.read_text())['attacks']['autoattack']['after']
        assert after['apgd-t'] == after['fab-t'] == after['square'], path


def verdicts(path: Path, attack: str) -> list[int]:
    return [*map(int, json.loads((path / 'evaluation.json').read_text())['attacks'][attack]['verdicts'])]


def test_the_twins_against_arithmetic_on_the_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """McNemar's exact test: of the images that one alone has right, half would be PSSiLU's if neither were better."""
    monkeypatch.chdir(ROOT)
    first, later = (ROOT / 'hub' / 'models' / 'resnet18_w16_pssilu', twins.TWIN), (*twins.LATER.values(),)
    alike = ('clean', 'Clean'), ('pgd-50', 'PGD-50')
    lines = {tuple(line.strip('| ').split(' | ')[:2]): line for line in twins.twins().splitlines()[2:]}
    of_first, of_later = (*alike, ('autoattack', 'AutoAttack')), (*alike, ('apgd', 'APGD-CE + APGD-T'))
    for images, directories, (attack, name) in [
            *(('first 1000 test images', first, each) for each in of_first),
            *(('test images 1000 to 1999 (counted from 0)', later, each) for each in of_later)]:
        ours, theirs = (verdicts(path, attack) for path in directories)
        assert len(ours) == len(theirs) == 1000
        gained = sum(a > b for a, b in zip(ours, theirs))
        lost = sum(a < b for a, b in zip(ours, theirs))
        n, most = gained + lost, max(gained, lost)
        p = min(1.0, 2 * sum(math.comb(n, k) for k in range(most, n + 1)) / 2 ** n)
        both = f'{sum(ours) / 10:.1f} and {sum(theirs) / 10:.1f} %'
        row = images, name, *both.removesuffix(' %').split(' and '), f'{gained} and {lost}', f'{p:.1g}'
        assert lines.pop((images, name)) == f'| {" | ".join(row)} |'
        if attack in ('autoattack', 'apgd'):
            sentence = report.claim().splitlines()[2]
            said = (f'one seed each: {both} AutoAttack accuracy on the first 1000 test images. PSSiLU alone is '
                    f'right on {gained} of them, ReLU alone on {lost} (McNemar p = {p:.1g} over images)'
                    if directories == first else f'. Under {name} on {images}: {both}, PSSiLU alone right on {gained}, '
                    f'ReLU alone on {lost} (p = {p:.1g}).')
            assert said in sentence
    assert not lines
    assert twins.mcnemar('1100', '1100') == (0, 0, 1.0)
    assert twins.mcnemar('1' * 6, '0' * 6) == (6, 0, pytest.approx(2 / 64))


def test_the_claim_has_the_differences_of_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    table, line = one_epoch.study_table().splitlines(), report.claim().splitlines()[0]
    assert line.startswith('- **1 epoch**')
    assert ', 3 seeds,' in line
    found = re.findall(r'(?:PSSiLU|PSoftplus) ([+-][\d.]+ ± [\d.]+)', line)
    cells = {row.split(' | ')[0].strip('| '): row.strip('| ').split(' | ')[-2:] for row in table if row.startswith('|')}
    expected = [re.sub(r' \(.*?\)', '', cells[act][column]) for column in (0, 1) for act in ('pssilu', 'psoftplus')]
    assert found == expected


def test_the_claim_has_the_differences_at_convergence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    line = report.claim().splitlines()[1]
    assert line.startswith('- **15 epochs**')
    gpu = Path('hub/results/convergence/gpu')
    seeds = sorted(int(path.parent.name.removeprefix('relu_s')) for path in gpu.glob('relu_s*/evaluation.json'))
    rows = {legend: name for name, legend in report.LEGEND.items()}
    rest = line.partition('correction: ')[2].partition('. Beside SiLU')[0]
    said = dict(re.findall(r'(P?S?SiLU[a-z0-9 ]*?) ([+-][\d.]+) ', rest))
    assert said.keys() == rows.keys()
    tests = []
    for words, name in rows.items():
        pairs = [[json.loads((gpu / f'{each}_s{seed}' / 'evaluation.json').read_text())['attacks']['apgd']['correct']
                  for each in (name, 'relu')] for seed in seeds if (gpu / f'{name}_s{seed}/evaluation.json').exists()]
        gains = [ours - theirs for ours, theirs in pairs]
        assert said[words] == f'{sum(gains) / len(gains) / 10:+.1f}'
        tests.append((stats.ttest_1samp(gains, 0).pvalue, len(gains), words))
    order = sorted(tests)
    holm = [max(min(1, (4 - rank) * p) for rank, (p, *_) in enumerate(order[:i + 1])) for i in range(4)]
    parts = rest.split('; ')
    for (_, count, words), p in zip(order, holm):
        part, = (part for part in parts if part.startswith(f'{words} +'))
        assert part.endswith(f', {count} seeds, p {p:.2g}')


def test_what_the_pages_say_of_the_rows_is_what_every_seed_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentences stand in pages by hand, and are to go when a seed says otherwise."""
    monkeypatch.chdir(ROOT)
    gpu = ROOT / 'hub' / 'results' / 'convergence' / 'gpu'
    found: dict[str, dict[str, int]] = {}
    for path in gpu.glob('*/evaluation.json'):
        name, _, seed = path.parent.name.rpartition('_s')
        found.setdefault(name, {})[seed] = sum(verdicts(path.parent, 'apgd'))
    relu, silu = found['relu'], found['silu']
    others = {name: seeds for name, seeds in found.items() if name != 'relu'}
    assert all(points > relu[seed] for seeds in others.values() for seed, points in seeds.items())
    assert all(points > silu[seed] for name, seeds in others.items() if name != 'silu'
               for seed, points in seeds.items() if seed in silu)
    assert {name: len(seeds) for name, seeds in found.items()} == {
        'relu': 5, 'pssilu': 5, 'pssilu_free': 3, 'psilu_curvature8': 3, 'silu': 3}
    again = gpu.parent / 'images_1000_1999' / 'gpu'
    later = {path.parent.name: sum(verdicts(path.parent, 'apgd')) for path in again.glob('*/evaluation.json')}
    pairs = [(points, later[f'relu{name.removeprefix("pssilu")}'])
             for name, points in later.items() if name.startswith('pssilu_s')]
    assert len(pairs) == 4
    assert all(ours > theirs for ours, theirs in pairs)
    pages = [' '.join((ROOT / page).read_text().split()) for page in (
        'README.md', 'hub/results/README.md', 'hub/results/convergence/README.md')]
    assert 'which nothing was chosen by, with each of the four seeds that were attacked on them' in pages[1]
    for page in pages[:2]:
        assert 'PSSiLU is ahead of ReLU with each of five seeds, beyond what seeds do' in page
        assert ('other smooth activations that were tried are ahead with each of three seeds; nothing is claimed of '
                'them') in page
        assert 'against SiLU, which learns nothing, PSSiLU is ahead with each of three seeds, which is too few' in page
    assert 'behind the three that ended at 1.8 to 2.2, with every seed' in pages[2]
    claimed = convergence.comparisons(convergence.rows_of_test())
    assert [name for name, each in claimed.items() if 2 * each.p < 0.05] == ['pssilu']
    assert '**PSSiLU makes this network more robust than ReLU.**' in pages[2]

    def gain(ours: str, theirs: str) -> float:
        return statistics.mean(found[ours][seed] - found[theirs][seed] for seed in found[ours].keys() & found[theirs])

    assert 0 < gain('pssilu', 'pssilu_free') < 4
    assert 'are within 0.4 points under APGD in the mean of seeds 0 to 2' in pages[2]
    for name in ('silu', 'pssilu'):
        found[name] = {seed: points for seed, points in found[name].items() if seed in found['silu']}
    said = [f'{gain(name, "relu") / 10:.1f}' for name in ('silu', 'pssilu')]
    assert 'SiLU is {} points ahead of ReLU, PSSiLU {} with the same seeds;'.format(*said) in pages[2]
    assert all(points > found['silu'][seed] for seed, points in found['pssilu'].items())
    assert convergence.interval_of_seeds(convergence.differences(
        *(convergence.rows_of_test()[name] for name in ('pssilu', 'silu'))))[2] > 0.05


def test_what_the_pages_say_of_recipes_is_what_the_records_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arms: dict[str, dict[int, int]] = {}
    for record in records.records_of(pilots.RECIPES):
        if not record.case.name.startswith(pilots.APART):
            arms.setdefault(Path(record.case.network).name, {})[record.case.seed] = sum(
                1 for each in record.evaluation['attacks']['pgd-50']['verdicts'] if each == '1')
    assert {name: len(seeds) for name, seeds in arms.items()} == dict.fromkeys(pilots.RECIPE_ARMS, 3)
    on_gpu = {(Path(record.case.network).name, record.case.seed) for record in records.records_of(pilots.RECIPES)
              if 'H100' in record.run['hardware'].get('gpu', '')}
    assert on_gpu == {*((name, 2) for name in ('pgd', 'pgd_ema_ls', 'n_fgsm')), ('ikl', 0), ('trades', 0)}
    means = {name: statistics.mean(seeds.values()) for name, seeds in arms.items()}
    assert max(means, key=means.__getitem__) == 'n_fgsm'
    assert all(points < arms['trades'][seed] for seed, points in arms['ikl'].items())
    cells = {name: cells for _, name, *cells in (
        row.strip('| ').split(' | ') for row in twins.strongest().splitlines()[2:] if 'resnet18_w16, seed 0' in row)}
    strong = {name: [ROOT / convergence.CONVERGENCE / f'strongest/resnet18_w16_{act}_s0' for act in ('pssilu', 'relu')]
              for name in ('Clean', 'PGD-50', 'APGD-CE + APGD-T')}
    found = {name: [verdicts(path, attack) for path in strong[name]]
             for name, attack in zip(strong, ('clean', 'pgd-50', 'apgd'))}
    for name, (ours, theirs) in found.items():
        only = [sum(a > b for a, b in zip(*pair)) for pair in ((ours, theirs), (theirs, ours))]
        assert cells[name] == [f'{sum(ours) / 10:.1f}', f'{sum(theirs) / 10:.1f}', f'{only[0]} and {only[1]}',
                               f'{stats.binomtest(only[0], sum(only)).pvalue:.1g}']
    for path in strong['Clean']:
        record = read_record(path / 'evaluation.json')
        assert [sha256(path / name) for name in ('model.safetensors', 'evidence.npz')] == [
            record['weights_sha256'], record['evidence']['sha256']]
    every = records.records_of(convergence.CONVERGENCE)
    monkeypatch.setattr(twins, 'records_of', lambda _: [record for record in every if record.act != 'relu'])
    assert len(twins.strongest().splitlines()) == 2  # a network without its twin is no row
    monkeypatch.setattr(twins, 'records_of', lambda _: every)
    alone = next(record for record in every if record.case.name == 'strongest/resnet18_w16_pssilu_s0')
    alone.evaluation = {**alone.evaluation, 'attacks': {'clean': alone.evaluation['attacks']['clean']}}
    with pytest.raises(ValueError, match='resnet18_w16, seed 0 have clean and clean,pgd-50,apgd; expected the same'):
        twins.strongest()
    package = twins.Twins()
    lost = [(sum(a) - sum(b)) / 10 for a, b in zip(found['PGD-50'], found['APGD-CE + APGD-T'])]
    before = [a - b for a, b in zip(package.accuracies('pgd-50'), package.accuracies('autoattack'))]
    said = '{:.1f} and {:.1f} % clean accuracy, and {:.1f} and {:.1f} % AutoAttack.'.format(
        *package.accuracies('clean'), *package.accuracies('autoattack'))
    page = ' '.join((ROOT / convergence.CONVERGENCE / 'README.md').read_text().split())
    assert said in page
    assert 'lose {:.1f} and {:.1f} points, those {:.1f} and {:.1f} to AutoAttack:'.format(*lost, *before) in page


@pytest.mark.parametrize(('file', 'keys', 'value', 'words'), [
    ('run.json', ('recipe', 'lr'), 0.2, 'other lr'), ('run.json', ('recipe', 'seed'), 1, 'other seed'),
    ('run.json', ('architecture',), 'resnet18_w16_silu', 'other architecture'),
    ('evaluation.json', ('threat_model', 'eps'), '4/255', 'other threat_model'),
    ('evaluation.json', ('seed',), 1, 'other seed'), ('evaluation.json', ('n',), 999, 'n is 999; expected as many'),
    ('evaluation.json', ('attacks', 'pgd-50'), None, 'other attacks'),
    ('evaluation.json', ('complete',), False, 'not finished')])
def test_a_twin_that_is_none_is_refused(
        file: str, keys: tuple[str, ...], value: object, words: str, checkout: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    path = twins.TWIN / file
    changed = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    if value is None:
        del inner[keys[-1]], changed['worst_case']
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=words):
        twins.twins()


def test_the_table_of_weights_has_six_columns_and_says_who_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    header, _, *rows = (line.strip('| ').split(' | ') for line in weights_tables.weights_table().splitlines())
    assert header == ['name', 'trained on', 'threat model', 'clean %', 'AutoAttack %', 'where']
    for row in rows:
        assert len(row) == 6
        weights = find_weights(row[0].strip('`'))
        assert row[2] == f'{weights.norm} {weights.eps}'
        for cell, attack in ((row[3], 'clean'), (row[4], 'autoattack')):
            if weights.bundle:
                found = verdicts(weights.bundle, attack)
                assert cell == f'{100 * sum(found) / len(found):.1f} (n = {len(found):,})'
            else:
                assert cell == '; '.join(f'{m.accuracy:.2f} ({m.by})' for m in weights.measured if m.attack == attack)


def test_differences_against_arithmetic_on_the_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    groups = one_epoch.activations()
    table = one_epoch.study_table()
    for act in ('silu', 'psoftplus', 'pssilu_free'):
        pairs = []
        for mine in groups[act]:
            base = next(r for r in groups['relu'] if r.case.seed == mine.case.seed)
            pairs.append([int(a) - int(b) for a, b in zip(mine.evaluation['attacks']['pgd-50']['verdicts'],
                                                          base.evaluation['attacks']['pgd-50']['verdicts'])])
        seeds = [100 * statistics.mean(pair) for pair in pairs]
        images = [statistics.mean(column) for column in zip(*pairs)]
        expected = [statistics.mean(seeds), *((min(seeds), max(seeds)) if len(seeds) > 1 else ()),
                    200 * statistics.stdev(images) / math.sqrt(len(images))]
        text = tables.difference(groups[act], groups['relu'], 'pgd-50')
        assert [float(number) for number in re.findall(r'-?\d+\.\d', text)] == pytest.approx(expected, abs=0.0501)
        assert text in table


def test_pictures_show_their_numbers_and_carry_them(tmp_path: Path) -> None:
    curves = {'a': [('0', 60.0), ('8/255', 30.0)], 'b': [('0', 50.0), ('4/255', 40.0)]}
    points = [('relu', math.inf, 0.0, 20.0), ('silu', 0.5, -0.27, 25.0)]
    for plot, numbers, others in (
            (plot_eps, curves, {**curves, 'b': [('0', 50.0), ('4/255', 41.0)]}),
            (plot_shapes, points, [points[0], ('silu', 0.5, -0.27, 24.0)]),
            (plot_activations, {'f': torch.nn.SiLU()}, {'f': torch.nn.ELU()})):
        pixels = []
        for given in (numbers, others, numbers):
            plot(given, tmp_path / 'a.png', source=f'{given}')
            with Image.open(tmp_path / 'a.png') as picture:
                assert picture.info['Description'] == f'{given}'
                pixels.append(picture.convert('L').tobytes())
        assert pixels[0] == pixels[2] != pixels[1]
