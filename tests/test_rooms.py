"""Every module has its room, imports go one way, and packages of others are imported where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

ROOMS = [
    # Each may import those before it, and its own. A module has the first room that names it or a package around it.
    'timm_paf._quiet timm_paf.version timm_paf.wording timm_paf.files timm_paf.processes timm_paf.speed '
    'timm_paf.kernels timm_paf.norms timm_paf.cycles timm_paf.losses timm_paf.modes timm_paf.normalize',
    'timm_paf.activations timm_paf.second_derivative timm_paf.sharing timm_paf.elementwise timm_paf.gate_flow '
    'timm_paf.attacks timm_paf.data',
    'timm_paf.objectives timm_paf.starts timm_paf.activation_sites timm_paf.act_layers '
    'timm_paf.plots',
    'timm_paf.convert timm_paf.autoattack_import timm_paf.evaluation',
    'timm_paf.weights',
    'timm_paf.models timm_paf.training',
    'timm_paf.robustbench',
    'timm_paf timm_paf.__main__',
    'hub train_robust',
]
BASE = {'torch', 'numpy', 'timm', 'safetensors', 'huggingface_hub'}
OUTSIDE = {  # beside those of BASE, at the head of a module; all else is imported in the function that needs it
    'timm_paf.data.folders': {'PIL'},  # timm's image readers need it
    'timm_paf.data.decoding': {'PIL'}, 'timm_paf.data.indexed': {'PIL'},
    'timm_paf.data.augmentation': {'PIL', 'torchvision'}, 'timm_paf.data.idbh': {'PIL', 'torchvision'},  # as timm.data
    'timm_paf.data.timm_sets': {'PIL'},
    'timm_paf.data.corruptions': {'PIL', 'cv2', 'scipy', 'skimage'},  # which is imported where images are generated
    'timm_paf.training': {'accelerate', 'jsonargparse', 'tqdm'},
    'hub': {'accelerate', 'jsonargparse', 'tqdm', 'scipy'},
    'train_robust': {'accelerate'},
    'hub.publish.paf_networks': set(),
}
ANYWHERE = {  # the only modules that may name these at all
    'accelerate': ('timm_paf.training', 'hub', 'train_robust', 'timm_paf.files'),
    'robustbench': ('timm_paf.evaluation', 'timm_paf.robustbench', 'timm_paf.autoattack_import', 'hub'),
    'autoattack': ('timm_paf.evaluation', 'timm_paf.robustbench', 'timm_paf.autoattack_import', 'hub'),
    'pyautoattack': ('timm_paf.evaluation', 'timm_paf.robustbench', 'timm_paf.autoattack_import', 'hub'),
}
SOURCES = {
    '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): path
    for path in [*(ROOT / 'timm_paf').rglob('*.py'), *(ROOT / 'hub').rglob('*.py'), ROOT / 'train_robust.py']}


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f'{package}.')


def room(module: str) -> int:
    """Of the longest name that is the module's or of a package around it."""
    found = [(len(name), number) for number, names in enumerate(ROOMS) for name in names.split()
             if within(module, name) and (name != 'timm_paf' or module == name)]
    assert found, f'{module} has no room; add it to ROOMS'
    return max(found)[1]


def imports(module: str, source: str, packages: set[str]) -> Iterator[tuple[str, int, bool]]:
    """The modules that one imports, the line, and whether that happens when it is imported itself."""
    tree = ast.parse(source)
    at_head = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                at_head.add(child)
                walk(child)

    walk(tree)
    typing_only = {line for node in ast.walk(tree) if isinstance(node, ast.If)
                   and ast.unparse(node.test) in ('TYPE_CHECKING', 'typing.TYPE_CHECKING')
                   for line in range(node.body[0].lineno, (node.body[-1].end_lineno or 0) + 1)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module.split('.') if module in packages else module.split('.')[:-1]
            start = base[:len(base) - node.level + 1] if node.level else []
            full = '.'.join([*start, *([node.module] if node.module else [])])
            # of `from package import name` the name may be a module
            names = [f'{full}.{alias.name}' if f'{full}.{alias.name}' in SOURCES else full for alias in node.names]
        else:
            continue
        for name in names:
            yield name, node.lineno, node in at_head and node.lineno not in typing_only


PACKAGES = {name for name, path in SOURCES.items() if path.name == '__init__.py'}


def violations(module: str, source: str) -> list[str]:
    found = []
    extra = next((OUTSIDE[name] for name in sorted(OUTSIDE, key=len, reverse=True) if within(module, name)), set())
    allowed = BASE | extra | sys.stdlib_module_names
    for name, line, at_head in imports(module, source, PACKAGES):
        outer = name.partition('.')[0]
        if outer in ('timm_paf', 'hub', 'train_robust'):
            if name not in SOURCES:
                found.append(f'{module}:{line} imports {name}, which is no module')
            elif room(name) > room(module):
                found.append(f'{module}:{line} imports {name} of a later room')
        elif at_head and outer not in allowed:
            found.append(f'{module}:{line} imports {outer}; import that inside the function that needs it')
        if outer in ANYWHERE and not any(within(module, place) for place in ANYWHERE[outer]):
            found.append(f'{module}:{line} imports {outer}; expected that in {", ".join(ANYWHERE[outer])} alone')
    return found


@pytest.mark.parametrize('module', sorted(SOURCES))
def test_a_module_imports_what_its_room_may(module: str) -> None:
    assert not violations(module, SOURCES[module].read_text())


@pytest.mark.parametrize('module', sorted(module for module in SOURCES if within(module, 'hub')))
def test_the_programs_import_one_another_by_relative_names(module: str) -> None:
    """A wheel has them as timm_paf.hub."""
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [
            node.module or ''] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not [name for name in named if within(name, 'hub')], f'{module}:{getattr(node, "lineno", 0)}'


def cycle(graph: dict[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def test_the_imports_have_no_circle() -> None:
    """Also not among those in functions and those for type checkers alone."""
    graph = {module: {name for name, *_ in imports(module, path.read_text(), PACKAGES) if name in SOURCES} - {module}
             for module, path in SOURCES.items()}
    assert cycle(graph) is None
    graph['timm_paf.files'].add('timm_paf.weights.zoo')
    assert cycle(graph) is not None, 'the check finds none'


@pytest.mark.parametrize(('module', 'source', 'count'), [
    ('timm_paf.attacks', 'import os\nimport torch.nn as nn\nfrom numpy import array\nimport timm', 0),
    ('timm_paf.attacks', 'from . import data', 0),
    ('timm_paf.attacks', 'from .objectives import x', 1),
    ('timm_paf.attacks', 'from timm_paf.objectives import x', 1),
    ('timm_paf.attacks', 'from .nothing import x', 1),
    ('timm_paf.kernels', 'from . import activations', 1),
    ('timm_paf.attacks', 'if True:\n    import yaml', 1),
    ('timm_paf.attacks', 'try:\n    import yaml\nexcept ImportError:\n    import pandas', 2),
    ('timm_paf.attacks', 'class A:\n    from .convert import x', 1),
    ('timm_paf.attacks', 'def f():\n    import yaml', 0),
    ('timm_paf.attacks', 'def f():\n    from .training import x', 1),
    ('timm_paf.attacks', 'def f():\n    import train_robust', 1),
    ('timm_paf.attacks', 'def f():\n    import accelerate', 1),
    ('timm_paf.attacks', 'if TYPE_CHECKING:\n    from .training import x', 1),
    ('timm_paf.weights.zoo', 'from ..activations import PAF\nfrom ..models import cifar_net', 1),
    ('timm_paf.weights.zoo', 'import timm_paf', 1),
    ('timm_paf.training.trainer', 'from ..weights import x\nfrom ..evaluation import y', 0),
    ('timm_paf.training.trainer', 'from .recipe import x\nfrom accelerate import Accelerator', 0),
    ('timm_paf.evaluation', 'import robustbench', 1),
    ('timm_paf.evaluation', 'def f():\n    import robustbench', 0),
    ('timm_paf.evaluation.engine', 'from hub.evaluate import main', 1),
    ('timm_paf', 'from . import models, robustbench\nfrom .nowhere import x', 1),
    ('hub.evaluate', 'from timm_paf.training.config import x\nfrom .cli import y\nimport scipy', 0),
    ('hub.publish.paf_networks', 'import scipy', 1),
])
def test_the_rule_itself(module: str, source: str, count: int) -> None:
    assert len(violations(module, source)) == count


def test_importing_the_package_imports_no_optional_one() -> None:
    optional = ('accelerate', 'robustbench', 'matplotlib', 'sklearn', 'scipy', 'jsonargparse', 'pandas', 'gdown',
                'requests')
    code = f'import sys, timm_paf; print("imported:", *sorted(set({optional}) & set(sys.modules)))'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, timeout=300)
    assert result.stdout.splitlines()[-1] == 'imported:'
