"""Our results among those that RobustBench has published: a table and a picture for each of its leaderboards.

    python -m hub.leaderboard BUNDLE... --out boards
    python -m hub.leaderboard BUNDLE... --robustbench CHECKOUT --out boards
    python -m hub.leaderboard                                           (all boards, as published)

The published numbers are those of the tables in the description of the installed robustbench (its model zoo), or all
records of a checkout, in RobustBench's order. A result of ours that RobustBench would not take as it is has no rank.
"""

from __future__ import annotations

import html
import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from timm_paf.attacks import parse_fraction
from timm_paf.files import atomic_directory, read_json, read_record

from .chosen_images import in_words
from .cli import Parser, one_line, user_path
from .publish.boards import BOARDS, CORRUPTIONS, TITLES, board_eps, boards_in_words, corruptions_fault
from .publish.networks import architecture_name
from .record_check import check_evaluation
from .wording import interval

Board = tuple[str, str]
"""A leaderboard as its data set and threat model, a key of `BOARDS`."""

CLONE = 'git clone https://github.com/RobustBench/robustbench, then --robustbench robustbench'


class Result(NamedTuple):
    """A row of the table, with accuracies in percent."""

    name: str
    clean: float
    robust: float
    architecture: str
    venue: str = ''
    note: str = ''
    n: int | None = None
    """The number of test images of a result of ours; None for a published one."""
    ranked: bool = True


def words(board: Board) -> str:
    """Returns a board in words: data set, threat model, eps."""
    return f'{board[0]} {board[1]} {BOARDS[board].eps or ""}'.rstrip()


def of_package(board: Board) -> list[Result]:
    """Returns the models in the table of the installed robustbench's description.

    Raises:
        ValueError: if robustbench is not installed or has no such table.
    """
    eps = BOARDS[board].eps
    below = f'{board[1]}, eps={re.escape(eps)}' if eps else r'(Common )?Corruptions( \(.*\))?'
    try:
        text = str(importlib.metadata.metadata('robustbench').get_payload())  # type: ignore[attr-defined]
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f'no robustbench is installed to give its published results; {CLONE}') from None
    section = re.search(rf'^### {TITLES[board[0]]}$.*?(?=^###? |\Z)', text, re.MULTILINE | re.DOTALL)
    table = section and board[1] != 'corruptions_3d' and re.search(
        rf'^#### {below}[^\S\n]*$(?P<rows>.*?)(?=^#|\Z)', section[0], re.MULTILINE | re.DOTALL)
    results = []
    for line in table['rows'].splitlines() if table else ():
        cells = [plain(cell).replace('*', '') for cell in line.strip('| ').split('|')]
        if len(cells) == 7 and cells[3].endswith('%'):
            results.append(Result(cells[1], float(cells[3][:-1]), float(cells[4][:-1]), cells[5], cells[6]))
    if not results:
        raise ValueError(f'the installed robustbench has no table of {words(board)}; {CLONE}')
    return results


def of_checkout(board: Board, checkout: Path) -> tuple[list[Result], list[str]]:
    """Returns the records of a checkout, and the names of those without numbers.

    Raises:
        FileNotFoundError: if there are no records.
        ValueError: if a record is no JSON.
    """
    folder = checkout / 'model_info' / board[0] / board[1].removesuffix('_3d')
    facts = BOARDS[board]
    results, empty = [], []
    for path in sorted(folder.glob('*.json')):
        record = read_json(path)
        try:
            robust, clean = float(record[facts.robust]), float(record['clean_acc'])
            # A lower number by somebody else's attack takes precedence, as in RobustBench's own ranking.
            external = float(robust if facts.eps is None or record.get('external') is None else record['external'])
        except (AttributeError, KeyError, TypeError, ValueError):
            empty.append(path.stem)
            continue
        notes = [note for note, holds in (
            (f'by another attack, {robust:.2f} by AutoAttack', external < robust),
            ('more real data', record.get('additional_data')), ('unreliable', record.get('unreliable')),
            (f'eps {record.get("eps")}', facts.eps and not _is_eps(record.get('eps'), facts.eps))) if holds]
        results.append(Result(path.stem, clean, min(robust, external), plain(record.get('architecture') or ''),
                              plain(record.get('venue') or ''), ', '.join(notes)))
    if not results:
        raise FileNotFoundError(f'{folder} has no records; expected a checkout of RobustBench: {CLONE}')
    return results, empty


def _is_eps(found: Any, expected: str) -> bool:
    try:
        return parse_fraction(found) == parse_fraction(expected)
    except ValueError:
        return False


def ours(path: Path) -> list[tuple[Board, Result]]:
    """Returns the leaderboards and results of ours in a run, a bundle or an ``evaluation.json``.

    Raises:
        FileNotFoundError: if there is no evaluation.json.
        ValueError: if the evaluation was changed, has neither corruptions nor AutoAttack, or is of a threat model
            without a leaderboard.
    """
    file = path if path.is_file() else path / 'evaluation.json'
    found = read_record(file)
    if not {'architecture', 'dataset', 'threat_model', 'attacks'} <= found.keys():
        raise ValueError(f'{file} is not of timm-paf evaluate; expected an evaluation.json')
    check_evaluation(found, file)
    attacks, threat, dataset = found['attacks'], found['threat_model'], found['dataset']
    results: list[tuple[Board, Result]] = []

    def add(threat_model: str, robust: float, n: int, faults: list[str]) -> None:
        note = 'ours' + (f', not ranked: {", ".join(faults)}' if faults else '')
        results.append(((dataset, threat_model), Result(
            plain(file.absolute().parent.name), 100 * attacks['clean']['accuracy'], 100 * robust,
            architecture_name(found['architecture']), '', note, n, not faults)))

    if {'clean', 'autoattack'} <= attacks.keys() and board_eps(dataset, threat['norm'], threat['eps']):
        n, faults = min(attacks[name]['n'] for name in ('clean', 'autoattack')), []
        # As RobustBench takes `external` where that is lower: what another attack found counts too.
        lowest = min(attacks['autoattack'], found.get('worst_case', attacks['autoattack']), key=lambda r: r['accuracy'])
        if found['images'] != f'first {BOARDS[dataset, threat["norm"]].n}':
            low, high = interval(lowest['correct'], n)
            which = f'{in_words(found["images"])}, ' if ':' in found['images'] else ''
            faults.append(f'{which}n = {n:,}, 95 % interval {100 * low:.2f} to {100 * high:.2f}')
        if not found.get('standard', True):
            faults.append('not the standard evaluation')
        add(threat['norm'], lowest['accuracy'], n, faults)
    if found.get('corruptions') and 'clean' in attacks and (dataset, CORRUPTIONS) in BOARDS:
        n, fault = min(attacks['clean']['n'], found['corruptions']['n']), corruptions_fault(found)
        if fault is None and n < BOARDS[dataset, CORRUPTIONS].n:
            fault = f'{n:,} clean images'
        add(CORRUPTIONS, found['corruptions']['accuracy'], n, [fault] if fault else [])
    if results:
        return results
    if board_eps(dataset, threat['norm'], threat['eps']) is None:
        raise ValueError(f'{file} is of {dataset} {threat["norm"]} {threat["eps"]}; RobustBench has '
                         f'{boards_in_words()}, and corruptions')
    raise ValueError(f'{file} has {", ".join(attacks)}; run timm-paf evaluate with --attacks clean,autoattack '
                     '--overwrite')


def plain(text: str) -> str:
    """Returns the words of a text of a record, which may be anybody's and HTML: one line, without tags."""
    text = html.unescape(str(text))
    while (shorter := re.sub(r'</?[A-Za-z!][^<>]*>', ' ', text)) != text:
        text = shorter
    return ' '.join(''.join(c if c.isprintable() else ' ' for c in text).split())


def cell(text: str) -> str:
    """Returns a plain text for a cell of the table, where no character of it is markup."""
    return re.sub(r'([\\`*\[\]<~])', r'\\\1', text).replace('|', '/')


def table(results: list[Result]) -> str:
    """Returns a Markdown table with aligned columns, by robust accuracy; with ranks where there are, ours in bold."""
    rows, rank = [['#', 'model', 'clean', 'robust', 'architecture', 'venue', 'note']], 0
    for result in sorted(results, key=lambda result: -result.robust):
        rank += result.ranked
        name = cell(result.name) if result.n is None else f'**{cell(result.name)}**'
        rows.append([str(rank) if result.ranked else '-', name, f'{result.clean:.2f}', f'{result.robust:.2f}',
                     *(cell(text) for text in (result.architecture, result.venue, result.note))])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ['-' * width for width in widths])
    return ''.join('| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths)) + ' |\n' for row in rows)


def plot(results: list[Result], title: str, whole: int, path: Path) -> None:
    """Draws clean against robust accuracy; ours have names, and 95 % intervals where of less than ``whole`` images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=120, layout='constrained')
    axes = figure.subplots()
    published = [result for result in results if result.n is None]
    axes.scatter([result.clean for result in published], [result.robust for result in published], s=22, color='0.65',
                 label=f'published ({len(published)})')
    for i, result in enumerate(result for result in results if result.n is not None):
        n, colour = result.n or 0, f'C{i % 10}'
        bars: dict[str, Any] = {}
        for axis, value in (('xerr', result.clean), ('yerr', result.robust)):
            low, high = (100 * end for end in interval(round(value / 100 * n), n))
            bars[axis] = [[max(value - low, 0.0)], [max(high - value, 0.0)]]
        axes.errorbar(result.clean, result.robust, **(bars if n < whole else {}), fmt='D', color=colour, capsize=2,
                      markerfacecolor=colour if result.ranked else 'white', label=f'{result.name} ({result.note})')
    axes.set(xlabel='clean accuracy (%)', ylabel='robust accuracy (%)', title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', fontsize='small')
    figure.savefig(path, format='png')


def run(sources: list[Path], names: Sequence[Board], checkout: Path | None, out: Path | None) -> None:
    if not sources and not names:  # the description of a package has no table of corruptions in 3D
        names = [board for board in BOARDS if checkout is not None or board[1] != 'corruptions_3d']
    boards: dict[Board, list[Result]] = {name: [] for name in names}
    for source in sources:
        for board, result in ours(source):
            boards.setdefault(board, []).append(result)
    made = []
    for board, results in boards.items():
        empty: list[str] = []
        if checkout is None:
            published = of_package(board)
            origin = f'{len(published)} models of the zoo of robustbench {importlib.metadata.version("robustbench")}'
        else:
            published, empty = of_checkout(board, checkout)
            origin = f'{len(published)} records of a checkout of RobustBench'
        title, results = f'{words(board)}{", beside" if results else ":"} {origin}', published + results
        left_out = f'; without numbers and left out: {", ".join(empty)}' if empty else ''
        made.append(('_'.join(board), BOARDS[board].n, title, f'{title}{left_out}\n\n{table(results)}', results))
    for *_, text, _ in made:
        print(text)
    if out is not None:
        with atomic_directory(out) as part:
            for name, whole, title, text, results in made:
                (part / f'{name}.md').write_text(text)
                plot(results, title, whole, part / f'{name}.png')
        print(f'{out}: {", ".join(f"{name}.md, {name}.png" for name, *_ in made)}')


def main(args: Sequence[str] | None = None, prog: str = 'hub.leaderboard') -> None:
    parser = Parser(prog=prog, description=(__doc__ or '').split('\n')[0],
                    epilog=f'example: {prog} hub/models/* --out boards')
    parser.add_argument('sources', nargs='*', type=user_path, metavar='RUN|BUNDLE|evaluation.json',
                        help='results of ours; with neither these nor --board: all boards')
    parser.add_argument('--board', action='append', default=[], choices=['/'.join(board) for board in BOARDS],
                        help='show this one too, with or without a result of ours')
    parser.add_argument('--robustbench', type=user_path, metavar='DIR',
                        help="a checkout of RobustBench; default: the installed package's tables, which are of its zoo")
    parser.add_argument('--out', type=user_path, metavar='DIR',
                        help='directory to make, for the tables and their pictures')
    found = parser.parse_args(args)
    with one_line(prog):
        run(found.sources, [tuple(name.split('/')) for name in found.board], found.robustbench, found.out)


if __name__ == '__main__':
    main()
