"""A sweep as one self-contained page: filters, front, calibration, courses of the multipliers, tables, responses."""

from __future__ import annotations

from pathlib import Path

from alignbench.report.dashboard.content import content_of
from alignbench.report.dashboard.page import page_of
from alignbench.report.runs import collect

__all__ = ["write"]


def write(folder: Path, path: Path, store: Path | None = None) -> Path:
    """Write the dashboard of the records below a folder (of a sweep's own folder: of its runs).

    The same records give the same bytes.

    Args:
        folder: As `collect` takes it.
        path: The .html file.
        store: Where artifacts lie; those that are there are linked.

    Raises:
        DataError: No record can be used.
        ConfigError: The plotting library is not installed.
    """
    content = content_of(collect(folder), path.parent, store)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page_of(content, folder.resolve().name), encoding="utf-8", errors="replace")
    return path
