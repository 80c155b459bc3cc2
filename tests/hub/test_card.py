"""The model card: what it says is in the bundle's records, and the Hub can read it."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import timm
from conftest import ROOT
from huggingface_hub import ModelCard

from hub import card
from timm_paf.weights.bundle_files import check_checksums

MODELS = ROOT / 'hub' / 'models'
PSSILU = MODELS / 'wrn10_1_pssilu'


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PSSILU, tmp_path / 'bundle'))


def read(bundle: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    run, evaluation = (json.loads((bundle / name).read_text()) for name in ('run.json', 'evaluation.json'))
    return run, evaluation


def text(run: dict[str, Any], evaluation: dict[str, Any] | None, model: str = 'wrn10_1_pssilu', **kwargs: Any) -> str:
    return card.card('name', run, evaluation, timm.create_model(model), 'their class', **kwargs)


@pytest.mark.parametrize('path', sorted(MODELS.iterdir()), ids=lambda path: path.name)
def test_committed_cards_are_what_the_code_writes(path: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(path, tmp_path / 'bundle'))
    card.main([str(copied)])
    assert (copied / 'README.md').read_text() == (path / 'README.md').read_text()
    evaluation = read(path)[1]
    assert evaluation['images'] == f'first {evaluation["n"]}'  # as pages say of the weights in the package
    for place in (copied, path):
        checked = subprocess.run(['sha256sum', '-c', 'SHA256SUMS'], cwd=place, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
        check_checksums(place)
        assert ('(activation.png)' in (place / 'README.md').read_text()) == (place / 'activation.png').is_file()


def test_metadata_comes_back_from_huggingface_hub(bundle: Path) -> None:
    run, evaluation = read(bundle)
    found = ModelCard.load(bundle / 'README.md').data
    assert (found.library_name, found.pipeline_tag, found.metrics) == ('timm', 'image-classification', ['accuracy'])
    assert found.datasets == ['uoft-cs/cifar10']
    assert found.license == 'apache-2.0'
    assert len(found.eval_results) == len(evaluation['attacks']) == 3
    assert found.model_name == run['architecture']
    for result, (attack, measured) in zip(found.eval_results, evaluation['attacks'].items(), strict=True):
        assert result.metric_value == measured['accuracy'] == measured['correct'] / measured['n']
        assert (result.task_type, result.metric_type, result.dataset_split) == (
            'image-classification', 'accuracy', 'test')
        assert result.metric_name.lower().startswith(f'{attack} accuracy')
        assert 'first 1000 test images, seed 0' in result.metric_name
        assert ('Linf eps 8/255' in result.metric_name) == (attack != 'clean')
    again = card.metadata('wrn10_1_pssilu', 'cifar10', evaluation, None)
    assert again.eval_results == found.eval_results


def test_every_number_of_the_table_is_measured(bundle: Path) -> None:
    from scipy.stats import binomtest

    _, evaluation = read(bundle)
    rows = re.findall(r'^\| (\S+) \| ([\d.]+)% \| (\d+) of (\d+) \| ([\d.]+)% to ([\d.]+)% \|$',
                      (bundle / 'README.md').read_text(), re.MULTILINE)
    assert [row[0] for row in rows] == list(evaluation['attacks'])
    for attack, accuracy, correct, n, low, high in rows:
        measured = evaluation['attacks'][attack]
        assert (int(correct), int(n)) == (measured['verdicts'].count('1'), len(measured['verdicts']))
        assert float(accuracy) == pytest.approx(100 * int(correct) / int(n), abs=0.005)
        interval = binomtest(int(correct), int(n)).proportion_ci(method='wilson')
        assert [float(low), float(high)] == pytest.approx([100 * interval.low, 100 * interval.high], abs=0.051)


def test_what_was_not_measured_is_not_claimed(bundle: Path) -> None:
    run, evaluation = read(bundle)
    nothing = text(run, None)
    assert 'Nothing has been measured.' in nothing
    assert 'AutoAttack has not been run' in nothing
    assert ModelCard(nothing).data.eval_results is None
    del evaluation['attacks']['autoattack']
    assert 'AutoAttack has not been run' in text(run, evaluation)
    plain = copy.deepcopy(run)
    plain['recipe']['threat']['eps'] = '0'
    assert 'against no attack' in text(plain, None)
    assert 'Trained without an attack.' in text(plain, None)


def test_a_result_that_is_not_standard_is_called_that(bundle: Path) -> None:
    run, evaluation = read(bundle)
    assert 'standard' not in text(run, evaluation).lower()
    part = copy.deepcopy(evaluation)
    part['attacks']['autoattack']['standard'] = False
    for marked in ({**evaluation, 'standard': False}, part):
        found = text(run, marked)
        assert '**Not a standard evaluation**' in found
        assert all('not standard' in result.metric_name for result in ModelCard(found).data.eval_results)
    assert '**Not a standard' not in text(run, {**evaluation, 'standard': True})


def test_warnings_generated_images_and_chosen_weights_are_told(bundle: Path) -> None:
    run, evaluation = read(bundle)
    evaluation['attacks']['autoattack'] |= {
        'flags': ['the gradients may be masked'], 'not_run': {'apgd-t': 'its loss compares 4 classes'}}
    run['recipe']['synthetic'] = {'name': 'ddpm', 'n': 1_000_000, 'fraction': 0.7}
    run['recipe']['act_kwargs'], run['steps'] = {'alpha': 2.0}, 6 * (50_000 // 38)  # 90 of 128 are generated
    run['weights'] = {'of': 'ema', 'epoch': 4, 'chosen_by': '1024 held-out images'}
    found = text(run, evaluation)
    assert '- AutoAttack warns: the gradients may be masked' in found
    assert '- AutoAttack is without apgd-t: its loss compares 4 classes' in found
    assert '710,100 of 1,000,000 generated images (ddpm, 70% of each batch)' in found
    assert "num_classes=10, act_kwargs={'alpha': 2.0})" in found
    assert 'weights of epoch 5 (chosen by 1024 held-out images, averaged), seed 0' in found


@pytest.mark.parametrize(('changes', 'steps', 'words'), [
    ({}, 2340, ['6 epochs, weights of epoch 6', '(50,000 images)']),
    ({'epochs': 1}, 390, ['\n1 epoch, weights', '(49,920 of 50,000 images)']),
    ({'epochs': 200, 'max_steps': 60}, 60, [
        '60 steps, 0.154 of the 200 epochs of the recipe: it was to end after so many steps, weights of step 60 (',
        '(7,680 of 50,000 images)']),
    ({'epochs': 200, 'max_steps': 1}, 1, ['\n1 step, 0.00256 of the 200 epochs', '(128 of 50,000 images)']),
    ({'epochs': 200, 'patience': 3}, 3900, [
        '3,900 steps, 10 of the 200 epochs of the recipe: 3 epochs had brought no better one', 'weights of epoch 6 (']),
    ({'epochs': 200, 'eps_warmup_epochs': 10}, 39, [
        'of at most 8/255, of which the last step had 1.0%', 'ended while eps was still growing to 8/255']),
    ({'paf_lr': 0.0}, 2340, ['Its activation is PSSiLU, without learned parameters', 'One run with one seed'])])
def test_a_card_says_what_was_done_not_what_was_asked_for(
        bundle: Path, changes: dict[str, Any], steps: int, words: list[str]) -> None:
    run, evaluation = read(bundle)
    run['recipe'] |= changes
    run['steps'] = steps
    run['weights'] = {'of': 'model', 'epoch': min(5, (steps - 1) // 390), 'chosen_by': 'being the last'}
    found = text(run, evaluation)
    for each in words:
        assert each in found
    assert ('that it learned' in found) == ('paf_lr' not in changes)


def test_a_card_names_the_processors_that_were_used(bundle: Path) -> None:
    run, evaluation = read(bundle)
    run['hardware'] |= {'gpu': '8 x NVIDIA H100', 'cpu': 'AMD EPYC', 'threads': 1}
    assert '1 process, 1 x NVIDIA H100, torch' in text(run, evaluation)
    assert '8 processes, 8 x NVIDIA H100, torch' in text({**run, 'processes': 8}, evaluation)
    assert '1 process, AMD EPYC, 1 thread, torch' in text({**run, 'device': 'cpu'}, evaluation)


def test_metadata_say_what_the_attack_was(bundle: Path) -> None:
    run, evaluation = read(bundle)
    attacks = evaluation['attacks']
    whole = next(name for name in attacks if name.startswith('pgd-'))
    attacks['pgd-2@16/255'] = {**attacks[whole], 'eps': '16/255'}
    attacks['autoattack']['not_run'] = {'apgd-t': 'of three classes'}
    found = {result.metric_name for result in ModelCard(text(run, evaluation)).data.eval_results}
    assert 'PGD-2 accuracy (Linf eps 16/255, first 1000 test images, seed 0)' in found
    assert 'AutoAttack accuracy (Linf eps 8/255, without apgd-t, first 1000 test images, seed 0)' in found


def test_a_card_says_which_images_were_attacked(bundle: Path) -> None:
    run, evaluation = read(bundle)
    evaluation['images'] = '1000:2000'
    found = text(run, evaluation)
    assert 'The test images 1000 to 1999 (counted from 0) of CIFAR-10, Linf eps 8/255, seed 0;' in found
    assert 'AutoAttack accuracy (Linf eps 8/255, test images 1000 to 1999 (counted from 0), seed 0)' in [
        result.metric_name for result in ModelCard(found).data.eval_results]
    assert '1,000 images were attacked' in found
    assert 'first 1000' not in found


def test_other_data_than_cifar(bundle: Path) -> None:
    run, _ = read(bundle)
    for name, words in (('digits', "scikit-learn's digits"), ('folder', "A folder of images of the author's own")):
        run['data']['name'] = name
        found = text(run, None)
        assert words in found
        assert f'RobustBench knows no {name}' in found
        assert ModelCard(found).data.datasets is None


def test_a_licence_is_stated_on_request_and_kept(bundle: Path) -> None:
    assert 'has not been stated' in text(*read(bundle))
    for licence, found in (('MIT', 'mit'), ('https://example.org/terms', 'other')):
        for args in (['--licence', licence], []):
            card.main([str(bundle), *args])
            data = ModelCard.load(bundle / 'README.md').data
            assert data.license == found
            assert data.get('license_link') == (licence if found == 'other' else None)
            assert f'The weights: {licence.lower()}.' in (bundle / 'README.md').read_text()
            check_checksums(bundle)


def test_a_network_without_a_paf_has_no_picture(bundle: Path) -> None:
    run, evaluation = read(MODELS / 'wrn10_1_relu')
    found = text(run, evaluation, 'wrn10_1_relu')
    assert 'Its activation is ReLU' in found
    assert '![' not in found
    assert '![The activation' in text(*read(bundle))


def test_the_card_of_a_damaged_bundle_stays(bundle: Path) -> None:
    before = (bundle / 'README.md').read_bytes()
    (bundle / 'evaluation.json').write_text((bundle / 'evaluation.json').read_text().replace('271', '272'))
    with pytest.raises(SystemExit, match=r'^hub\.card: [^\n]*evaluation\.json: sha256 is [^\n]*$'):
        card.main([str(bundle)])
    assert (bundle / 'README.md').read_bytes() == before
