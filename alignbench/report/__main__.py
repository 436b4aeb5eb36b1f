"""Several records in one table and one picture: `python -m alignbench.report FOLDER [--out NAME]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from alignbench.errors import AlignbenchError, DataError
from alignbench.record import read_records
from alignbench.report.plot import trade_off
from alignbench.report.table import markdown_table, terminal_table


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m alignbench.report", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with run folders, for instance outputs")
    parser.add_argument(
        "--out", type=Path, default=None, help="base name of the .md, .png and .pdf (default: in FOLDER)"
    )
    options = parser.parse_args(arguments)
    try:
        _report(options.folder, options.out or options.folder / "report")
    except AlignbenchError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def _report(folder: Path, out: Path) -> None:
    records = read_records(folder)
    if not records:
        raise DataError(f"no record.json below {folder}", where=str(folder), mend="run something first: python main.py")
    for problem, group in _by_problem(records).items():
        base = out if len(_by_problem(records)) == 1 else out.with_name(f"{out.name}-{problem}")
        out.parent.mkdir(parents=True, exist_ok=True)
        Console(width=None if Console().is_terminal else 200).print(terminal_table(group, problem))
        base.with_suffix(".md").write_text(markdown_table(group), encoding="utf-8")
        utility = group[0]["config"]["constraint"]["utilities"][0]
        if utility in next(iter(group[0]["rows"].values()))["metrics"]:
            trade_off(group, base, utility=utility)
        print(f"table: {base.with_suffix('.md')}\npicture: {base.with_suffix('.png')}")


def _by_problem(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Records that may stand in one table: same data, prompts and constraint."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        config = record["config"]
        constraint = config["constraint"]
        thresholds = ",".join(
            f"{u}{t:+g}" for u, t in zip(constraint["utilities"], constraint["thresholds"], strict=True)
        )
        name = f"{config['dataset']['name']}-{config['evaluate']['split']}-{constraint['form']}-{thresholds}"
        groups.setdefault(name, []).append(record)
    return groups


if __name__ == "__main__":
    sys.exit(main())
