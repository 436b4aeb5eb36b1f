"""Names at the lines and points that they belong to, instead of a legend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Named = tuple[str, float, float, str]
_LARGEST, _SMALLEST = 8.5, 5.0
_SPACING = 1.3
_INCH = 72.0


def name_beside(axes: Any, items: Sequence[Named], *, share: float = 0.8) -> None:
    """Write names right of the axes, each at the height of its point and joined to it by a thin line.

    Names never overlap: they are moved as little as possible (least squares), and shrink where they are many. Limits
    of the axes are fixed by this, so it comes last.

    Args:
        axes: Matplotlib axes with everything drawn.
        items: (name, x, y, colour) of each.
        share: The axes' height as a share of the figure's, where the layout is not known yet.
    """
    if not items:
        return
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    height = axes.figure.get_figheight() * _INCH * share
    size = float(np.clip(height / len(items) / _SPACING, _SMALLEST, _LARGEST))
    ordered = sorted(items, key=lambda item: item[2])
    to_axes = (axes.transData + axes.transAxes.inverted()).transform
    wanted = np.array([to_axes((x, y))[1] for _, x, y, _ in ordered])
    for (name, x, y, colour), at in zip(ordered, apart(wanted, _SPACING * size / height), strict=True):
        axes.annotate(
            name, xy=(x, y), xycoords="data", xytext=(1.03, at), textcoords="axes fraction", fontsize=size,
            color=readable(colour), va="center", ha="left", annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.5, "shrinkB": 4, "relpos": (0, 0.5),
            },
        )  # fmt: skip


def readable(colour: str) -> tuple[float, float, float]:
    """A colour dark enough for letters on white: of a light one its shade with a relative luminance of 0.3."""
    from matplotlib.colors import to_rgb

    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)  # sRGB, as WCAG reads it
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    red, green, blue = (float(part) for part in rgb * min(1.0, (0.3 / max(luminance, 0.3)) ** (1 / 2.2)))
    return red, green, blue


def apart(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Places at least `gap` apart and as near as possible (least squares) to ascending wanted ones, within [0, 1].

    Args:
        wanted: Ascending, shape (n,).
        gap: Least distance; where n of them do not fit, they begin at 0 and go beyond 1.
    """
    steps = gap * np.arange(len(wanted))
    # p_i - i gap must ascend: isotonic regression, by pooling neighbours that violate it
    pools: list[list[float]] = []
    for value in np.asarray(wanted, float) - steps:
        pools.append([value, 1.0])
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (a, n), (b, m) = pools[-2], pools.pop()
            pools[-1] = [(a * n + b * m) / (n + m), n + m]
    level = np.concatenate([np.full(int(n), value) for value, n in pools])
    # of places for the first alone the bounds are 0 and what leaves room for the rest
    return np.asarray(np.clip(level, 0.0, max(0.0, 1.0 - steps[-1])) + steps)
