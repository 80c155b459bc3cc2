"""Nothing imports upwards: the layers of the package, read from its source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import timm_paf

PACKAGE = Path(timm_paf.__file__).parent
LAYERS = {  # modules that are not written yet may stand here
    'activations': 0, 'kernels': 0, 'attacks': 0, 'objectives': 0, 'data': 0, 'synthetic': 0, 'array_pickle': 0,
    'folders': 0, 'files': 0, 'speed': 0, 'version': 0, 'download': 0,
    'cifar_net': 1, 'resnet_cifar': 1, 'wide_resnet': 1, 'zoo': 1, 'convert': 1, 'bundle': 1, 'checkpoint': 1,
    'training': 2, 'optimization': 2, 'sharding': 2, 'run_directory': 2, 'evaluation': 2, 'robustbench': 2, 'plots': 2,
    '__init__': 2,
}
# What a module may import when it is imported itself; all else belongs inside the function that needs it.
OUTSIDE = {
    0: {'torch', 'numpy'},
    1: {'torch', 'numpy', 'timm', 'safetensors'},
    2: {'torch', 'numpy', 'timm', 'safetensors', 'huggingface_hub'}}
SIBLINGS = {0: set(), 1: {0, 1}, 2: {0, 1, 2}}
WITHIN = {('activations', 'kernels')}  # the one sibling that an L0 module imports: the PAFs and their arithmetic
PROGRAMS = {'hub', 'train_robust'}
MODULES = sorted(path.relative_to(PACKAGE).with_suffix('').as_posix() for path in PACKAGE.rglob('*.py'))


def top_level(node: ast.AST) -> Iterator[ast.AST]:
    """Every node outside of a function: those under if, try, with and class too."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from top_level(child)


def type_checking(tree: ast.AST) -> set[int]:
    """Lines that only a type checker reads: they may name another package, but no sibling above."""
    return {line for node in ast.walk(tree) if isinstance(node, ast.If)
            and ast.unparse(node.test) in ('TYPE_CHECKING', 'typing.TYPE_CHECKING')
            for line in range(node.body[0].lineno, node.body[-1].end_lineno + 1)}


def imported(nodes: Iterator[ast.AST]) -> Iterator[tuple[str, str, int]]:
    """(outer package, '') or ('timm_paf', sibling), and the line."""
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(filter(None, ['timm_paf' if node.level else '', node.module]))
            names = [f'{base}.{alias.name}' for alias in node.names] if base == 'timm_paf' else [base]
        else:
            continue
        for name in names:
            outer, _, rest = name.partition('.')
            yield outer, rest.partition('.')[0] if outer == 'timm_paf' else '', node.lineno


def violations(module: str, source: str) -> list[str]:
    layer, found, tree = LAYERS[module], [], ast.parse(source)
    typing_only, allowed = type_checking(tree), OUTSIDE[layer] | PROGRAMS | sys.stdlib_module_names
    for outer, sibling, line in imported(top_level(tree)):
        if outer == 'timm_paf':
            if LAYERS.get(sibling or '__init__', 3) not in SIBLINGS[layer] and (module, sibling) not in WITHIN:
                found.append(f'{module}.py:{line} is in L{layer} and imports the sibling {sibling or "timm_paf"}')
        elif outer not in allowed and line not in typing_only:
            found.append(f'{module}.py:{line} is in L{layer} and imports {outer}; import that inside a function')
    for outer, _, line in imported(ast.walk(tree)):
        if outer in PROGRAMS:
            found.append(f'{module}.py:{line} imports the program {outer}, not even a function may')
    return found


def test_every_module_has_a_layer() -> None:
    unknown = [module for module in MODULES if module not in LAYERS]
    assert not unknown, f'add {", ".join(unknown)} with a layer, 0 to 2, to LAYERS in {Path(__file__).name}'


@pytest.mark.parametrize('module', [module for module in MODULES if module in LAYERS])
def test_nothing_imports_upwards(module: str) -> None:
    assert not violations(module, (PACKAGE / f'{module}.py').read_text())


@pytest.mark.parametrize(('module', 'source', 'count'), [
    ('attacks', 'import os\nimport torch.nn as nn\nfrom numpy import array', 0),
    ('attacks', 'import timm', 1),
    ('attacks', 'from . import data', 1),
    ('attacks', 'from . import kernels', 1),
    ('kernels', 'from . import activations', 1),
    ('attacks', 'from timm_paf.data import x', 1),
    ('attacks', 'if True:\n    import yaml', 1),
    ('attacks', 'try:\n    import yaml\nexcept ImportError:\n    import pandas', 2),
    ('attacks', 'class A:\n    from .data import x', 1),
    ('attacks', 'def f():\n    import yaml\n    from .training import x', 0),
    ('attacks', 'def f():\n    import train_robust', 1),
    ('zoo', 'import timm.models\nfrom .activations import PAF\nfrom . import cifar_net', 0),
    ('zoo', 'from .training import x', 1),
    ('zoo', 'import timm_paf', 1),
    ('training', 'from .zoo import x\nfrom .evaluation import y', 0),
    ('training', 'from accelerate import Accelerator', 1),
    ('training', 'if TYPE_CHECKING:\n    from accelerate import Accelerator\nelse:\n    import accelerate', 1),
    ('attacks', 'if TYPE_CHECKING:\n    from .training import x', 1),
    ('evaluation', 'import robustbench', 1),
    ('evaluation', 'from hub.evaluate import main', 1),
    ('__init__', 'from . import wide_resnet, robustbench\nfrom .nowhere import x', 1),
])
def test_the_rule_itself(module: str, source: str, count: int) -> None:
    assert len(violations(module, source)) == count


def test_importing_the_package_imports_no_optional_one() -> None:
    optional = ('accelerate', 'robustbench', 'matplotlib', 'sklearn', 'pandas', 'gdown', 'requests')
    code = f'import sys, timm_paf; print("imported:", *sorted(set({optional}) & set(sys.modules)))'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, timeout=300)
    assert result.stdout.splitlines()[-1] == 'imported:'
