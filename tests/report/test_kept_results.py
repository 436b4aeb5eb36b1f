"""sweeps/results: what is kept of a sweep is what its records, kept beside it, say."""

from __future__ import annotations

import csv
import re
import tarfile
from pathlib import Path

import pytest
from tiny_runs import TOP

from alignbench.report.__main__ import main

RESULTS = TOP / "sweeps" / "results"
LAST = 0.0101  # of two decimals
NUMBER = re.compile(r"<?-?\d+\.\d+")


def split(text: str) -> tuple[list[str], list[float]]:
    """What stands around the numbers, and the numbers: another processor may round a last digit the other way."""
    return NUMBER.sub("#", text).splitlines(), [float(each.lstrip("<")) for each in NUMBER.findall(text)]


def unpacked(name: str, folder: Path) -> Path:
    with tarfile.open(RESULTS / name / "records.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def cells(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_the_kept_claims_are_what_their_records_say(tmp_path: Path) -> None:
    main(["claims", str(unpacked("claims", tmp_path))])
    found, kept = (cells(folder / "claims.csv") for folder in (tmp_path, RESULTS / "claims"))
    assert [(row["table"], row["row"], row["column"], row["n"]) for row in found] == [
        (row["table"], row["row"], row["column"], row["n"]) for row in kept
    ]
    for name in ("mean", "low", "high"):
        ours, theirs = ([float(row[name] or "nan") for row in rows] for rows in (found, kept))
        assert ours == pytest.approx(theirs, abs=1e-9, nan_ok=True)
    ours, theirs = (split("\n".join(row["text"] for row in rows)) for rows in (found, kept))
    assert ours[0] == theirs[0]
    assert ours[1] == pytest.approx(theirs[1], abs=LAST)
    verdicts = [row["text"] for row in kept if row["column"] == "verdict"]
    assert len(verdicts) == 31
    assert not [text for text in verdicts if "not run" in text]


def test_the_kept_head_to_head_is_what_its_records_say(tmp_path: Path) -> None:
    main(["compare", str(unpacked("head_to_head", tmp_path))])
    (path,) = tmp_path.glob("compare*.md")
    ours, theirs = (split(each.read_text("utf-8")) for each in (path, RESULTS / "head_to_head" / "table.md"))
    assert ours[0] == theirs[0]
    assert ours[1] == pytest.approx(theirs[1], abs=LAST)
    assert len(ours[1]) > 1000
