"""What every picture test asks: both files, of their formats, and not an empty canvas."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np


def assert_picture(png: Path) -> None:
    """A PNG in which something is drawn, and its PDF beside it."""
    pixels = np.asarray(matplotlib.image.imread(png))[..., :3]
    assert min(pixels.shape[:2]) > 200
    drawn = (pixels != pixels[0, 0]).any(-1)
    assert drawn.mean() > 0.005
    # in colour: something besides axes and letters
    assert (np.ptp(pixels, axis=-1) > 0.2).any()
    assert png.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
