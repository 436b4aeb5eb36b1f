"""Tables from records, on a terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from alignbench.report.stats import FEW_PROMPTS, MAY_BE_SHORT

Record = Mapping[str, Any]
Row = tuple[str, Record, Mapping[str, Any]]


def rows_of(records: Sequence[Record]) -> list[Row]:
    """(name, record, row) of every policy, each once: the reference stands in every record."""
    found: dict[tuple[str, int], Row] = {}
    for record in records:
        for name, row in record["rows"].items():
            found.setdefault((row["policy"], record["seed"]), (name, record, row))
    return list(found.values())


def columns_of(record: Record) -> list[tuple[str, str]]:
    """(heading, metric) of the table of one record's problem."""
    utilities = record["config"]["constraint"]["utilities"]
    scored = "reward" in next(iter(record["rows"].values()))["metrics"]
    columns = []
    if scored:
        columns += [("reward", "reward"), *((u, u) for u in utilities)]
        columns += [("win reward", "reward_win_rate"), *((f"win {u}", f"{u}_win_rate") for u in utilities)]
    measured = next(iter(record["rows"].values()))["metrics"]
    columns += [("KL", "kl"), ("tokens", "length")]
    return columns + [(name.upper(), name) for name in ("mc1", "mc2") if name in measured]


def cell(value: Mapping[str, Any] | None, digits: int = 2) -> str:
    """A value as `mean [low, high]`.

    Where there is no interval the mean stands alone, with the number of prompts if they are too few for one; an
    interval that may be too short has a mark.
    """
    if value is None or value["mean"] is None or math.isnan(value["mean"]):
        return "-"
    text = f"{value['mean']:z.{digits}f}"  # z: -0.00 is 0.00
    method = str(value.get("method"))
    if value.get("low") is None or value.get("high") is None:
        return f"{text} (no interval: n={value['clusters']})" if method == FEW_PROMPTS else text
    mark = " (!)" if method.endswith(MAY_BE_SHORT) else ""
    return f"{text} [{value['low']:z.{digits}f}, {value['high']:z.{digits}f}]{mark}"


def _verdict(constraint: Mapping[str, Any]) -> str:
    if constraint["satisfied_with_confidence"]:
        return "yes"
    return "likely" if constraint["satisfied"] else "no"


def table_cells(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the result table."""
    first = records[0]
    utilities = first["config"]["constraint"]["utilities"]
    columns = columns_of(first)
    scored = any(metric == "reward" for _, metric in columns)
    several_seeds = len({record["seed"] for record in records}) > 1
    headings = ["policy", *(["seed"] if several_seeds else []), *(heading for heading, _ in columns)]
    if scored:
        for utility in utilities:
            headings += [f"{utility} margin (asked)", "violation", "met"]
    cells = []
    for name, record, row in rows_of(records):
        reported = name == record["outcome"]["reported"]
        line = [f"{name} *" if reported else name, *([str(record["seed"])] if several_seeds else [])]
        line += [cell(row["metrics"].get(metric), 1 if metric == "length" else 2) for _, metric in columns]
        for utility in utilities if scored else ():
            constraint = (row.get("constraints") or {}).get(utility)
            if constraint is None:
                line += ["-"] * 3
                continue
            asked = constraint["requested_margin"]
            line += [f"{cell(constraint['achieved_margin'])} ({asked:z.2f})", cell(constraint["violation"])]
            line.append(_verdict(constraint))
        cells.append(line)
    return headings, cells


def caption_of(records: Sequence[Record]) -> str:
    """What the numbers are: prompts, samples, interval, the meaning of the marks."""
    record = records[0]
    metric = next(iter(record["rows"].values()))["metrics"].get("length") or {}
    if not {"clusters", "n", "level"} <= set(metric):
        return f"{record['config']['evaluate']['split']} prompts; * reported by the method"
    return (
        f"{metric['clusters']} {record['config']['evaluate']['split']} prompts, {metric['n']} responses per policy; "
        f"[{metric['level']:.0%} prompt-clustered]; win rates against sft, ties half; "
        "met: yes = with confidence, likely = the point estimate only; * reported by the method"
    )


def terminal_table(records: Sequence[Record], title: str) -> Table:
    """The result table for a terminal."""
    headings, cells = table_cells(records)
    table = Table(title=title, caption=caption_of(records))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right", overflow="fold")
    for line in cells:
        table.add_row(*line, style="bold" if line[0].endswith("*") else "")
    return table


def markdown_table(records: Sequence[Record]) -> str:
    """The result table as Markdown, with its caption below."""
    headings, cells = table_cells(records)
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    lines += ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join(lines) + f"\n\n{caption_of(records)}\n"
