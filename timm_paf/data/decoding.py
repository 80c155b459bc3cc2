"""Decodes a file of an image of any format to RGB with 8 bits, and says in a line why one can't be decoded."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..files import is_of_machine
from ..wording import reason_of

__all__ = ['read_image', 'reading']


def read_image(source: Path | bytes | Image.Image, quick: bool = False) -> Image.Image:
    """Returns an image as RGB, its first frame if it has several.

    Args:
        source: the image: its file, what that holds, or pixels.
        quick: whether a small form of the image will do; all of its bytes are read even so.

    Raises:
        ValueError: for a file that can't be decoded; the message is the reason alone.
    """
    if isinstance(source, Image.Image):
        with reading():
            source.load()
        return _to_rgb(source)
    with reading(), Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        if quick:
            image.draft(image.mode, (1, 1))  # a JPEG is decoded at an eighth of its size
        image.load()
    return _to_rgb(image)


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Makes a ValueError, with the reason alone, of what is raised while an image is read."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError('Pillow knows no such format') from error
    except Exception as error:  # PIL's decoders raise exceptions of many kinds for a damaged file
        if isinstance(error, ImportError | NameError) or is_of_machine(error):
            raise
        of_system = error.strerror if isinstance(error, OSError) else None
        raise ValueError(of_system or reason_of(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to RGB with 8 bits. More bits are scaled, because Pillow would cut them off at 255.

    Raises:
        ValueError: for values of which nothing says what white is.
    """
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
        white = 65535
    elif image.mode in ('I', 'F'):
        white = 1 if image.mode == 'F' else 0
    else:
        return image.convert('RGB')
    values = np.asarray(image)
    if not (white and values.min() >= 0 and values.max() <= white):
        raise ValueError(f'it has values of 32 bits in [{values.min():g}, {values.max():g}]; expected 8 or 16 bits, or '
                         'floats in [0, 1]')
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8)).convert('RGB')
