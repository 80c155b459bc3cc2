"""What `hub.evaluate` prints: what it begins, and what it found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from timm_paf.attacks import ThreatModel
from timm_paf.data.corrupted import CorruptedImages
from timm_paf.processes import WORLD
from timm_paf.speed import emulates_bfloat16, has_bfloat16_units

from .chosen_images import in_words
from .corruptions import PICTURE as CORRUPTIONS_PICTURE
from .corruptions import show_corruptions
from .evidence import EVIDENCE
from .masking import PICTURE as MASKING_PICTURE


def announce(setting: dict[str, Any], threats: Sequence[ThreatModel], corrupted: CorruptedImages | None,
             device: torch.device) -> None:
    """Prints which evaluation begins.

    Args:
        setting: what the verdicts depend on.
        threats: the threat model of each norm.
        corrupted: the corrupted images to classify, if any.
        device: where the network is.
    """
    fast, words = not setting['standard'], ', '.join(f'{threat.norm} eps {threat.eps}' for threat in threats)
    print(f'{in_words(setting["images"])} of {setting["dataset"]}, {words}, on {device}, '
          + ('compiled (--no-compile turns it off)' if setting['compiled'] else 'not compiled (--compile turns it on)')
          + (', bfloat16: not standard' if fast else '') + (f', {WORLD} processes' if WORLD > 1 else ''), flush=True)
    if corrupted is not None:
        print(f'corrupted images: {corrupted.name}', flush=True)
    if setting['compiled'] and not fast and has_bfloat16_units(device):  # a long one
        print(f'the {device.type} has units for bfloat16 and the evaluation is in float32: --fast is faster, with a '
              'result that is not standard', flush=True)
    if fast and emulates_bfloat16(device):
        print(f'the {device.type} has no units for bfloat16, which it only emulates: it is faster without --fast, and '
              'the result is standard', flush=True)


def show(found: dict[str, Any], output: Path) -> None:
    """Prints a complete record."""
    norms = found.get('norms', {})
    for norm, part in ((found['threat_model']['norm'], found), *norms.items()):
        if norms:
            print(f'{norm} eps {part["threat_model"]["eps"]}')
        for attack, result in part['attacks'].items():
            print(f'{attack:15s} {result["accuracy"]:7.2%}  {result["correct"]} of {result["n"]}')
            for line in (*result.get('flags', ()), *(
                    f'{name} was not run: {why}' for name, why in result.get('not_run', {}).items())):
                print(f'{"":15s} {line}')
        if 'worst_case' in part:
            print(f'worst case      {part["worst_case"]["accuracy"]:7.2%}')
    if 'union' in found:
        print(f'{" and ".join(found["union"]["norms"])}: {found["union"]["accuracy"]:.2%} withstand all')
    print(f'{found["recheck"]["kept"]} adversarial images classified anew, {found["recheck"]["different"]} differ')
    if 'masking' in found:
        print(f'{found["masking"]["verdict"]} (picture: {output.with_name(MASKING_PICTURE)})')
    if 'corruptions' in found:
        show_corruptions(found['corruptions'], output.with_name(CORRUPTIONS_PICTURE))
    if 'evidence' in found:
        print(f'{output.with_name(EVIDENCE)}: timm-paf verify checks it')
    print(output)
