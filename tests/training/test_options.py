"""Every option of train_robust.py through the program: each value of each with each value of every other."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.state import AcceleratorState

import train_robust
from timm_paf.objectives import OBJECTIVES, ONE_STEP
from timm_paf.training.config import Config
from timm_paf.training.option import options_of

VALUES: dict[str, tuple[object, ...]] = {
    'objective': tuple(OBJECTIVES), 'model': ('wrn10_1_pssilu', 'resnet18_w8_relu', 'resnet10t'), 'act': (None, 'pelu'),
    'cutmix': (0, 1), 'mixup': (None, 0.8), 'val': (0, 20), 'robust_weight': (6, 1), 'awp': (0, 0.005),
    'label_smoothing': (0, 0.1),
    'clean_ratio': (0, 0.5), 'paf_penalty': (10, 0), 'attack_bn': ('eval', 'train'), 'eps_warmup_epochs': (0, 1),
    'optimizer': ('sgd', 'adamw'), 'momentum': (0.9, 0), 'weight_decay': (5e-4, 0),
    'schedule': ('cosine', 'constant', 'piecewise', 'one-cycle'),
    'warmup_epochs': (0, 0.5), 'accumulate': (1, 2), 'clip_grad': (0, 1), 'ema': (0, 0.9), 'paf_lr': (None, 0.01),
    'paf_weight_decay': (None, 0.1), 'paf_clip': (0.01, 0), 'mixed_precision': ('no', 'bf16'),
    'grad_checkpointing': (False, True), 'channels_last': (True, False), 'norm': ('Linf', 'L2', 'L1'),
    'eps': ('8/255', '0.5'), 'attack_step': (None, '0.1'), 'attack_steps': (1, 2), 'synthetic': (None, True),
    'seed': (0, 2 ** 40), 'patience': (0, 1), 'lr': (0.01, 0.02), 'min_lr': (0, 0.001), 'batch_size': (20, 24),
    'head_lr': (None, 0.005), 'layer_decay': (None, 0.8), 'freeze_bn': (False, True), 'act_start': (None, 'relu'),
    'model_kwargs': ('{}', '{drop_rate: 0.1}'), 'act_kwargs': ('{}', '{alpha: 0.7}'),
    'act_share': ('network', 'layer', 'channel'), 'nesterov': (True, False), 'no_decay': (None, 'bn', 'bias,paf'),
    'bn_momentum': (None, 0.01), 'milestones': (None, '0.5,1.5'), 'pct_start': (None, 0.2),
    'attack_start': ('uniform', 'unclipped', 'normal'), 'clean_pass': ('none', 'before', 'after'),
    'separate_forwards': (False, True), 'ema_warmup': ('power', 'ratio', 'none'), 'ema_bn': ('average', 'copy'),
    'swa': (0, 1), 'momentum_cycle': (None, '0.5,0.9'),
    'awp_warmup_epochs': (0, 0.1), 'val_attack': (None, 'ce-2', 'cw-1'), 'ikl_mse': (20, 1),
    'ikl_temperature': (4, 1),
    'aa': (None, 'cifar10', 'idbh-weak', 'rand-m9-mstd0.5-inc1'), 'color_jitter': (0, 0.4), 'reprob': (0, 0.5),
    'pad_mode': ('zeros', 'reflect'), 'synthetic_augment': (True, False), 'drop_last': (True, False),
}
ELSEWHERE = {  # the tests that run them
    'dataset', 'image_size', 'epochs', 'compile', 'fsdp', 'sync_bn', 'max_steps',  # test_train_robust, test_processes
    'cuda_graphs',  # test_training, tests/gpu
    'data_dir', 'download', 'skip_unreadable', 'output', 'max_minutes', 'checkpoint_steps', 'keep', 'resume',
    'resume_anyway', 'trackers', 'init',
}
Row = dict[str, object]
OPTIONS = {name: option for name, (_, option) in options_of(Config).items()}
NEEDY = [name for name, option in OPTIONS.items() if option.needs]


def possible(row: Row) -> bool:
    """Whether the program takes such a combination; it names the others in one line (test_train_robust)."""
    plain = row['model'] == 'resnet18_w8_relu' and row['act'] is None
    return not (
        (row['act_kwargs'] != '{}' and row['act'] is None and row['model'] != 'wrn10_1_pssilu')
        or (row['act'] is not None and row['model'] != 'resnet10t')
        or (row['act_share'] != 'network' and row['act'] is None)
        or (row['act_start'] is not None and row['act'] is None)
        or (row['freeze_bn'] and (row['attack_bn'] != 'eval' or row['clean_pass'] != 'none' or row['bn_momentum']))
        or (row['milestones'] is not None and row['schedule'] != 'piecewise')
        or ((row['pct_start'] is not None or row['momentum_cycle'] is not None) and row['schedule'] != 'one-cycle')
        or (row['momentum_cycle'] is not None and row['optimizer'] != 'sgd')
        or (row['warmup_epochs'] and row['schedule'] in ('one-cycle', 'triangular'))
        or (row['swa'] and row['ema'])
        # takes minutes where bfloat16 is emulated, for it is looked at with PGD
        or (row['objective'] in ONE_STEP and row['mixed_precision'] == 'bf16' and row['model'] != 'wrn10_1_pssilu')
        or (row['objective'] == 'n-fgsm' and row['norm'] != 'Linf')
        or ((row['patience'] or row['val_attack']) and not row['val'])
        or (row['aa'] == 'idbh-weak' and row['pad_mode'] == 'reflect')
        # of 1,418 images two are left, one for each part
        or (not row['drop_last'] and row['val'] and row['batch_size'] == 24 and row['accumulate'] == 2)
        or (plain and (row['paf_lr'] is not None or row['paf_weight_decay'] is not None)))


def covering_rows(draw: random.Random) -> list[Row]:
    """Rows, chosen greedily, that have every possible pair of values of two options."""
    def pairs(row: Row) -> set[object]:
        return set(itertools.combinations(sorted((name, str(value)) for name, value in row.items()), 2))

    def drawn() -> Row:
        while not possible(row := {name: draw.choice(values) for name, values in VALUES.items()}):
            pass
        # What has no effect without another is refused.
        options = SimpleNamespace(**row)
        row |= {name: VALUES[name][0] for name in NEEDY if not OPTIONS[name].has_effect(options)}
        return row if row['synthetic'] else {**row, 'synthetic_augment': True}

    wanted = set().union(*(pairs(drawn()) for _ in range(400)))
    rows: list[Row] = []
    while wanted:
        best = max((drawn() for _ in range(60)), key=lambda row: len(wanted & pairs(row)))
        rows.append(best)
        wanted -= pairs(best)
    return rows


ROWS = covering_rows(random.Random(0))


def test_a_configuration_has_nothing_of_those_before() -> None:
    """They come from one parser."""
    first, faulty = train_robust.parse(['--output', 'x']), ['--output', 'x', '--lr', 'much']
    first.act_kwargs['alpha'] = 1
    first.model_kwargs['drop_rate'] = 1
    with pytest.raises(ValueError, match='--lr is'):
        train_robust.parse(faulty)
    assert train_robust.parse(['--config', 'fastat_ema', '--output', 'y', '--lr', '0.7']).epochs == 100
    again = train_robust.parse(['--output', 'x'])
    assert (again.act_kwargs, again.model_kwargs, again.lr, again.epochs) == ({}, {}, first.lr, first.epochs)


def test_no_option_is_forgotten() -> None:
    assert set(options_of(Config)) == set(VALUES) | ELSEWHERE


@pytest.mark.parametrize('number', [
    pytest.param(i, marks=() if i < 3 else pytest.mark.slow) for i in range(len(ROWS))])
def test_options_run_together(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = dict(ROWS[number])
    if row['synthetic']:
        np.savez(tmp_path / 'made.npz', image=np.zeros((40, 32, 32, 3), np.uint8), label=np.arange(40) % 10)
        row['synthetic'] = f'{tmp_path}/made.npz'
    words = [word for name, value in row.items() if value is not None
             for word in (f'--{name.replace("_", "-")}', str(value))]
    config = train_robust.parse([*words, '--dataset', 'digits', '--max-steps', '2', '--no-compile', '--output',
                                 str(tmp_path / 'run')])
    AcceleratorState._reset_state()  # which holds one precision
    monkeypatch.setattr(train_robust, 'Interruption', lambda minutes: SimpleNamespace(reason=lambda *_: None))
    assert train_robust.run(config) == 0
    assert json.loads((tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()[-1])['step'] == 2
    AcceleratorState._reset_state()  # or the tests that come later in this process would find that precision
