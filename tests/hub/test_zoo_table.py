"""The program that makes the table of RobustBench's zoo: small entries made anew are those of the committed table."""

from __future__ import annotations

import importlib.util

import pytest

from hub.publish import zoo
from timm_paf.files import read_json

TABLE = read_json(zoo.TABLE)


@pytest.mark.skipif(importlib.util.find_spec('robustbench') is None, reason='needs robustbench')
@pytest.mark.parametrize('name', [
    'Sehwag2021Proxy_R18', 'Wong2020Fast', 'Andriushchenko2020Understanding', 'Rade2021Helper_R18_ddpm',
    'Chen2020Adversarial', 'Debenedetti2022Light_XCiT-S12'])
def test_an_entry_is_that_of_the_table(name: str) -> None:
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    spec = model_dicts[BenchmarkDataset.cifar_10][ThreatModel.Linf][name]
    found = zoo._computed(spec, 10, {})
    (row,) = [row for row in (*TABLE['entries'], *TABLE['refused'])
              if (row['name'], row['dataset'], row['threat']) == (name, 'cifar10', 'Linf')]
    if isinstance(found, str):
        assert found == row['reason']
        return
    assert found == (row['model'], row['class'], row['model_args'])
    info = {'clean_acc': str(row['clean']), 'autoattack_acc': str(row['autoattack']), 'eps': row['eps'],
            'additional_data': 'real' in row['training_data'], 'link': row['paper'],
            'footnote': 'It uses additional 1M synthetic images in training.' if 'ddpm' in name else
            'It uses additional 10M synthetic images in training.' if 'Proxy' in name else None}
    made = zoo.row(name, 'cifar10', 'Linf', spec, info)
    assert made == {key: row[key] for key in made}


def test_sources_are_unique_and_say_what_tells_entries_apart() -> None:
    for name, expected in (('Wang2023Better_WRN-28-10', 'wang2023'), ('Jia2022LAS-AT_34_10', 'jia2022'),
                           ('Rebuffi2021Fixing_70_16_cutmix_extra', 'rebuffi2021_cutmix_extra'),
                           ('Liu2023Comprehensive_Swin-B', 'liu2023'), ('Standard', 'standard')):
        assert zoo.source(name)[0] == expected
    rows = [dict(row, source='') for row in TABLE['entries']]
    zoo._name_sources(rows)
    assert rows == TABLE['entries']
