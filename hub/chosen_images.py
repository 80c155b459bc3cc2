"""Which test images an evaluation is of: as ``--images`` names them, as evaluation.json has them, and in words."""

from __future__ import annotations

import re

EXPECTED = 'expected N for the first N test images, or FIRST:END as in a slice of Python, such as 1000:2000 or 1000:'


def parse_images(text: str, where: str = '--images') -> slice:
    """Returns the slice that a text names: N has no start; FIRST:END has both and FIRST: no stop.

    Raises:
        ValueError: if the text is none of these, or names no image.
    """
    found = re.fullmatch(r'(?:(\d{1,15}):)?(\d{0,15})', text, re.ASCII)
    if found is None or not (found[1] or found[2]):
        raise ValueError(f'{where} is {text[:100]!r}; {EXPECTED}')
    first, end = (int(number) if number else None for number in found.groups())
    if end is not None and (first or 0) >= end:
        raise ValueError(f'{where} is {text}, which names no image; {EXPECTED}')
    return slice(first, end)


def record_text(places: range) -> str:
    """Returns what evaluation.json says of images by their places in the data set, 'first 1000' or '1000:2000'."""
    return f'{places.start}:{places.stop}' if places.start else f'first {len(places)}'


def option_of(images: str) -> str:
    """Returns the option that names the images that an evaluation.json says, 'first 1000', '1000:2000' or 'N evenly
    spaced'."""
    return images.removeprefix('first ').removesuffix(' evenly spaced')


def in_words(images: str) -> str:
    """Returns in words which test images an evaluation.json says."""
    first, is_range, end = images.partition(':')
    return f'test images {first} to {int(end) - 1} (counted from 0)' if is_range else f'{images} test images'
