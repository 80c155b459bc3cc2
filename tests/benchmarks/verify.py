"""What evidence costs: bytes, seconds to verify against seconds of the attacks, and what of it a flipped bit passes.

    python tests/benchmarks/verify.py --data-dir data --output tests/benchmarks/results/verify.json

`timm-paf verify` runs on each bundle of hub/models in a process of its own, then on copies of which one bit of one file
is flipped, without and with checksums that are written anew.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # hub is of the clone, which need not be where this is started

from hub import verify  # noqa: E402
from hub.evidence import EVIDENCE  # noqa: E402
from hub.wording import markdown  # noqa: E402
from timm_paf.files import environment, read_json, write_json  # noqa: E402
from timm_paf.weights.bundle_files import write_checksums  # noqa: E402

FORGED = ('evaluation.json', EVIDENCE, 'model.safetensors', 'config.json')
"""Files that verify reads; a forger writes SHA256SUMS anew."""


def cost(name: str, data_dir: Path) -> dict[str, Any]:
    """The seconds of one program from start to end, beside those that the attacks took."""
    bundle = ROOT / 'hub' / 'models' / name
    record, before, started = read_json(bundle / 'evaluation.json'), resource.getrusage(
        resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-m', 'timm_paf', 'verify', bundle, '--data-dir', data_dir], cwd=ROOT,
        capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {'network': name, 'n': record['n'], 'bytes': (bundle / EVIDENCE).stat().st_size,
            **record['evidence']['norms']['Linf'], 'attack_seconds': record['seconds'],
            'seconds': round(time.monotonic() - started, 2),
            'cpu_seconds': round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
            'said': done.stdout.splitlines()[1:]}


def passes(bundle: Path, data_dir: Path) -> bool:
    """Whether verify confirms a bundle."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            verify.main([str(bundle), '--data-dir', str(data_dir)])
        except SystemExit:
            return False
    return True


def flips(name: str, data_dir: Path, count: int) -> list[dict[str, Any]]:
    """How many single flipped bits of each file are found."""
    draw, rows = random.Random(0), []
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(shutil.copytree(ROOT / 'hub' / 'models' / name, Path(folder, name)))
        assert passes(bundle, data_dir)
        sums = (bundle / 'SHA256SUMS').read_bytes()
        for path in sorted(path for path in bundle.rglob('*') if path.is_file()):
            content, found = path.read_bytes(), {'as it is': 0, 'checksums anew': 0}
            for _ in range(count):
                changed = bytearray(content)
                changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
                path.write_bytes(changed)
                found['as it is'] += not passes(bundle, data_dir)
                if path.name in FORGED:
                    write_checksums(bundle)
                    found['checksums anew'] += not passes(bundle, data_dir)
                path.write_bytes(content)
                (bundle / 'SHA256SUMS').write_bytes(sums)
            rows.append({'file': path.relative_to(bundle).as_posix(), 'flips': count, 'found': found['as it is'],
                         **({'found_with_checksums_anew': found['checksums anew']} if path.name in FORGED else {})})
    return rows


def table(result: dict[str, Any]) -> str:
    """The tables of the page."""
    rows = [(f'`{row["network"]}`', f'{row["eight_bit"] + row.get("float32", 0)}', f'{row["eight_bit"]}',
             f'{row["bytes"]:,}', f'{row["cpu_seconds"]:.0f}', f'{row["attack_seconds"] / 60:.0f}')
            for row in result['cost']]
    found = [(f'`{row["file"]}`', f'{row["found"]} of {row["flips"]}',
              f'{row["found_with_checksums_anew"]} of {row["flips"]}' if 'found_with_checksums_anew' in row else '')
             for flips in result['flips'].values() for row in flips]
    return markdown(
        ('network', 'fooled images', 'in units of 1/255', 'bytes', 'CPU seconds to verify', 'minutes of the attacks'),
        rows) + '\n\n' + markdown(('one bit flipped in', 'found', 'found where the checksums are written anew'), found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--data-dir', type=Path, required=True)
    parser.add_argument('--flips', type=int, default=20, help='of each file (default: 20)')
    parser.add_argument('--output', type=Path, required=True)
    args = parser.parse_args()
    data_dir = args.data_dir.absolute()
    names = sorted(path.name for path in (ROOT / 'hub' / 'models').iterdir() if (path / EVIDENCE).is_file())
    found = {'cost': [cost(name, data_dir) for name in names], 'load_average': os.getloadavg(),
             'flips': {names[-1]: flips(names[-1], data_dir, args.flips)}}
    write_json(args.output, {**found, **environment()})


if __name__ == '__main__':
    main()
