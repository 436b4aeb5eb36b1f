"""Every notebook runs from top to bottom on records that are made here, and is kept without outputs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from sweep_records import write_sweep

from alignbench.report.published import published

TOP = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((TOP / "notebooks").glob("*.ipynb"))
TRAINING = "adding_a_method"


def executed(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The notebook with its outputs, run in a process of its own beside nothing but the package."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TOP), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("ALIGNBENCH_RUNS", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return book


def shown(book: Any) -> str:
    """All text that a reader sees."""
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.get("text", "") + str(output.get("data", {}).get("text/markdown", "")) for output in outputs]
    return "\n".join(texts)


def pictures(book: Any) -> int:
    return sum(
        "image/png" in output.get("data", {})
        for cell in book.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    write_sweep(tmp_path)
    return tmp_path


def test_there_are_notebooks() -> None:
    assert TRAINING in [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    for cell in book.cells:
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_the_head_to_head_figure(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = executed(TOP / "notebooks" / "head_to_head.ipynb", sweep, monkeypatch)
    text = shown(book)
    assert "12 runs in 1 comparable group(s)" in text
    assert "| mocan | 0.1 |" in text
    assert pictures(book) == 2
    assert (sweep / "plots" / "front-handbook-test-margin.pdf").is_file()


def test_the_duals_geometry(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = executed(TOP / "notebooks" / "dual_geometry.ipynb", sweep, monkeypatch)
    text = shown(book)
    assert "effective sample size: mean" in text
    assert "no reweighting reaches it" in text
    assert pictures(book) == 2  # a bank per seed


def test_a_papers_table_beside_ours(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in sweep.glob("mocan*/record.json"):
        record = json.loads(path.read_text())
        record["experiments"] = ["can/table4_mocan"]
        record["config"] |= {"scale": "embedded", "model": {"name": "tiny"}}
        path.write_text(json.dumps(record))
    book = executed(TOP / "notebooks" / "published_table.ipynb", sweep, monkeypatch)
    text = shown(book)
    table = published().table("can/table4")
    assert table.title in text
    for row in table.rows:  # the paper's numbers, as it states them
        assert all(str(number) in text for number in row.cells if number is not None)
    assert "our run" in text
    assert "row(s) of ours; no run of: none" in text
    assert pictures(book) == 1


@pytest.mark.slow
def test_adding_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = executed(TOP / "notebooks" / f"{TRAINING}.ipynb", tmp_path, monkeypatch)
    text = shown(book)
    assert "soup 0.25" in text
    assert "soup 0.75*" in text or "soup 0.75 *" in text
    assert pictures(book) == 2
    assert len(list(tmp_path.glob("alignbench-*/outputs/*/record.json"))) == 1
