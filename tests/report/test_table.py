"""The result table from records made by hand: cells, verdicts, columns, and Markdown that reads back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from rich.console import Console

from alignbench.report.measures import measures
from alignbench.report.table import (
    caption_of,
    cell,
    columns_of,
    markdown_table,
    rows_of,
    table_cells,
    terminal_table,
)


def value(mean: float | None, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"mean": mean, "low": low, "high": high, "n": 12, "clusters": 6, "level": 0.95, "method": "by hand"}


def row(policy: str, reward: float, safety: float, *, satisfied: bool, sure: bool) -> dict[str, Any]:
    return {
        "policy": policy,
        "metrics": {
            "kl": value(0.125, 0.1, 0.15),
            "length": value(16.25, 16.0, 16.5),
            "finished": value(1.0, 1.0, 1.0),
            "reward": value(reward, reward - 0.5, reward + 0.5),
            "safety": value(safety, safety - 0.25, safety + 0.25),
            "reward_win_rate": value(0.5, 0.5, 0.5),
            "safety_win_rate": value(0.625, 0.5, 0.75),
        },
        "constraints": {
            "safety": {
                "requested_margin": 0.5,
                "achieved_margin": value(safety - 1.0, safety - 1.25, safety - 0.75),
                "violation": value(max(0.0, 1.5 - safety), 0.0, None),
                "satisfied": satisfied,
                "satisfied_with_confidence": sure,
            }
        },
    }


@pytest.fixture
def record() -> dict[str, Any]:
    return {
        "seed": 0,
        "method": "sacpo",
        "config": {
            "constraint": {"utilities": ["safety"]},
            "dataset": {"name": "handbook"},
            "evaluate": {"split": "test"},
        },
        "outcome": {"reported": "sacpo"},
        "rows": {
            "sft": row("a" * 32, 0.0, 1.0, satisfied=False, sure=False),
            "step reward": row("b" * 32, 1.0, 1.5, satisfied=True, sure=False),
            "sacpo": row("c" * 32, -0.001, 2.0, satisfied=True, sure=True),
        },
    }


def column(records: list[dict[str, Any]], heading: str) -> list[str]:
    headings, cells = table_cells(records)
    return [line[headings.index(heading)] for line in cells]


def test_a_cell() -> None:
    assert cell(value(1.005, -0.5, 2.25)) == "1.00 [-0.50, 2.25]"
    assert cell(value(16.25, 16.0, 16.5), 1) == "16.2 [16.0, 16.5]"
    assert cell(value(3.0)) == "3.00"
    assert cell(value(3.0, 2.0, None)) == "3.00"
    assert cell(None) == "-"
    assert cell(value(None)) == "-"
    assert cell(value(-0.001, -0.004, 0.0)) == "0.00 [0.00, 0.00]"  # and not -0.00


def test_headings_and_cells(record: dict[str, Any]) -> None:
    headings, cells = table_cells([record])
    assert headings == [
        "policy", "reward", "safety", "win reward", "win safety", "KL", "tokens",
        "safety margin (asked)", "violation", "met",
    ]  # fmt: skip
    assert cells[2] == [
        "sacpo *", "0.00 [-0.50, 0.50]", "2.00 [1.75, 2.25]", "0.50 [0.50, 0.50]", "0.62 [0.50, 0.75]",
        "0.12 [0.10, 0.15]", "16.2 [16.0, 16.5]", "1.00 [0.75, 1.25] (0.50)", "0.00", "yes",
    ]  # fmt: skip
    assert all(len(line) == len(headings) for line in cells)


def test_verdicts(record: dict[str, Any]) -> None:
    assert column([record], "met") == ["no", "likely", "yes"]


def test_the_reported_row_is_marked(record: dict[str, Any]) -> None:
    assert column([record], "policy") == ["sft", "step reward", "sacpo *"]


def test_what_is_missing_is_a_dash(record: dict[str, Any]) -> None:
    del record["rows"]["step reward"]["metrics"]["safety_win_rate"]
    del record["rows"]["step reward"]["constraints"]["safety"]
    assert column([record], "win safety")[1] == "-"
    assert [column([record], name)[1] for name in ("safety margin (asked)", "violation", "met")] == ["-"] * 3


def test_without_scores_kl_and_length_remain(record: dict[str, Any]) -> None:
    for found in record["rows"].values():
        del found["constraints"]
        found["metrics"] = {name: found["metrics"][name] for name in ("kl", "length", "finished")}
    assert columns_of(record) == [("KL", "kl"), ("tokens", "length")]
    headings, cells = table_cells([record])
    assert headings == ["policy", "KL", "tokens"]
    assert cells[0] == ["sft", "0.12 [0.10, 0.15]", "16.2 [16.0, 16.5]"]


def test_two_utilities_have_their_columns(record: dict[str, Any]) -> None:
    record["config"]["constraint"]["utilities"] = ["safety", "politeness"]
    headings, cells = table_cells([record])
    assert headings.count("met") == 2
    assert cells[0][headings.index("politeness")] == "-"
    assert cells[0][-1] == "-"


def test_records_side_by_side_show_every_policy_once(record: dict[str, Any]) -> None:
    other = copy.deepcopy(record)
    other["outcome"]["reported"] = "dpo_helpful"
    other["rows"] = {"sft": other["rows"]["sft"], "dpo_helpful": other["rows"]["step reward"] | {"policy": "d" * 32}}
    assert [name for name, _, _ in rows_of([record, other])] == ["sft", "step reward", "sacpo", "dpo_helpful"]
    assert column([record, other], "policy") == ["sft", "step reward", "sacpo *", "dpo_helpful *"]
    assert "seed" not in table_cells([record, other])[0]


def test_several_seeds_are_named(record: dict[str, Any]) -> None:
    other = copy.deepcopy(record) | {"seed": 1}
    assert column([record, other], "seed") == ["0"] * 3 + ["1"] * 3


def test_markdown_reads_back(record: dict[str, Any]) -> None:
    text = markdown_table([record])
    table, _, caption = text.partition("\n\n")
    lines = [[part.strip() for part in line.strip("|").split("|")] for line in table.splitlines()]
    headings, cells = table_cells([record])
    assert lines[0] == headings
    assert set(lines[1]) == {"---"}
    assert lines[2:] == cells
    assert caption.strip() == caption_of([record])


def test_the_caption_says_what_the_numbers_are(record: dict[str, Any]) -> None:
    caption = caption_of([record])
    assert caption.startswith("6 test prompts, 12 responses per policy; [95% prompt-clustered]")
    assert "ties half" in caption
    assert "* reported by the method" in caption


def test_the_terminal_shows_all_of_it(record: dict[str, Any]) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table([record], "a title"))
    text = console.export_text()
    assert "a title" in text
    for line in table_cells([record])[1]:
        for part in line:
            assert part in text


def test_all_measures_of_a_run(record: dict[str, Any]) -> None:
    record["rows"]["sacpo"]["safe_rates"] = {"severity": {"3": value(0.5, 0.25, 0.75)}}
    record["rows"]["sacpo"]["metrics"]["safety_cost_cvar90"] = value(1.5)
    section = measures(record)
    lines = {str(line[0]): [str(cell) for cell in line[1:]] for line in section.lines}
    assert list(section.headings) == ["measure", "sft", "step reward", "sacpo"]
    assert set(record["rows"]["sacpo"]["metrics"]) < set(lines)
    assert lines["kl"] == ["0.125 [0.100, 0.150]"] * 3
    assert lines["safety_cost_cvar90"] == ["-", "-", "1.500"]
    assert lines["safe rate, severity 3 (6 prompts)"] == ["-", "-", "0.500 [0.250, 0.750]"]
    assert "| kl | 0.125 [0.100, 0.150]" in section.markdown()
