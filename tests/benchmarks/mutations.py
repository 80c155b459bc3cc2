"""Makes small random changes of the core modules, one at a time, and says which the tests of the module do not notice.

    python tests/benchmarks/mutations.py --count 72 --output tests/benchmarks/results/mutations.json

A change turns a comparison, an arithmetic or a logical operator round, adds one to a number, or swaps the two values of
a conditional. It is made in a copy of the last commit. Some changes make no difference (a random seed, a message); the
rest of those that survive ask for a test.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timm_paf.files import environment, write_json

ROOT = Path(__file__).resolve().parents[2]
CONVERSION, EVALUATION, TRAINING = 'test_convert.py test_recognise.py', 'evaluation', 'training/test_training.py'
TESTS = {
    'kernels': 'test_kernels.py test_activations.py', 'attacks': 'test_attacks.py', 'norms': 'test_attacks.py',
    'objectives': f'test_objectives.py {TRAINING}', 'data/batches': f'data/test_data.py {TRAINING}',
    'data/synthetic': 'data/test_synthetic.py', 'evaluation/engine': EVALUATION, 'evaluation/state': EVALUATION,
    'evaluation/classified': EVALUATION, 'evaluation/masking': 'evaluation/test_masking.py',
    'evaluation/bpda': 'evaluation/test_bpda.py', 'evaluation/evidence': 'evaluation/test_evidence.py',
    'training/trainer': TRAINING, 'training/optimization': TRAINING,
    'training/run_directory': f'{TRAINING} training/test_run_faults.py',
    'convert': CONVERSION, 'activation_sites': CONVERSION, 'elementwise': CONVERSION, 'gate_flow': CONVERSION,
    'weights/checkpoint_entries': 'weights/test_checkpoint.py'}
"""The tests below tests/ of each module."""
TURNED: dict[type, Any] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
    ast.USub: ast.UAdd}


def places(tree: ast.Module) -> Iterator[ast.expr]:
    """The expressions that can be changed; those of annotations and raised messages are left out."""
    left_out = {id(inner) for node in ast.walk(tree) for part in (
        [node] if isinstance(node, ast.Raise) else
        [getattr(node, name, None) or ast.Pass() for name in ('annotation', 'returns')]) for inner in ast.walk(part)}
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        operator = node.ops[0] if isinstance(node, ast.Compare) else getattr(node, 'op', None)
        number = isinstance(node, ast.Constant) and type(node.value) in (int, float)
        if isinstance(node, ast.expr) and (type(operator) in TURNED or number or isinstance(node, ast.IfExp)):
            yield node


def mutate(source: str, draw: random.Random) -> tuple[str, str]:
    """Returns a changed source, and the change: 'line: before -> after'."""
    node = draw.choice(list(places(ast.parse(source))))
    before = ast.get_source_segment(source, node) or ''
    match node:
        case ast.Compare():
            node.ops[0] = TURNED[type(node.ops[0])]()
        case ast.BinOp() | ast.BoolOp() | ast.UnaryOp():
            node.op = TURNED[type(node.op)]()
        case ast.Constant(value=int() | float() as value):
            node.value = value + 1
        case ast.IfExp():
            node.body, node.orelse = node.orelse, node.body
    after, lines = f'({ast.unparse(node)})', [line.encode() for line in source.splitlines(keepends=True)]
    start = sum(map(len, lines[:node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[:(node.end_lineno or 0) - 1])) + (node.end_col_offset or 0)
    content = source.encode()
    return (content[:start] + after.encode() + content[end:]).decode(), f'{node.lineno}: {before} -> {after}'


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--count', type=int, default=72)
    parser.add_argument('--output', type=Path, help='a JSON file, written after each change')
    args = parser.parse_args()
    draw, rows = random.Random(args.seed), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        subprocess.run(['git', 'clone', '-q', str(ROOT), name], check=True)
        env = {**os.environ, 'PYTHONPATH': name, 'OMP_NUM_THREADS': '1'}
        while len(rows) < args.count:
            module = list(TESTS)[len(rows) % len(TESTS)]
            file = copy / 'timm_paf' / f'{module}.py'
            source = file.read_text()
            try:
                changed, change = mutate(source, draw)
                if ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source)):
                    continue
            except SyntaxError:  # within an f-string
                continue
            file.write_text(changed)
            tests, began = [str(copy / 'tests' / test) for test in TESTS[module].split()], time.monotonic()
            try:
                status = subprocess.run(
                    [sys.executable, '-W', 'ignore', '-m', 'pytest', '-x', '-p', 'no:cacheprovider', *tests], cwd=copy,
                    env=env, capture_output=True, timeout=900).returncode
            except subprocess.TimeoutExpired:  # it hangs, which is noticed too
                status = 1
            file.write_text(source)
            rows.append({'module': module, 'change': change, 'noticed': status != 0,
                         'seconds': round(time.monotonic() - began)})
            print(rows[-1], flush=True)
            if args.output:
                write_json(args.output, {'seed': args.seed, **environment(), 'rows': rows})


if __name__ == '__main__':
    main()
