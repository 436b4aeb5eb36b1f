"""The course of an iterative method: what is drawn, what is marked, and when there is nothing to draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pictures import assert_picture

from alignbench.report.trajectory import trajectory

UTILITIES = ("safety", "politeness")


def entry(t: int, *, bound: str | None = None, reward: float | None = 1.0) -> dict[str, Any]:
    return {
        "iteration": t,
        "policy": None if t == 0 else f"iterate {t}",
        "multipliers": dict.fromkeys(UTILITIES, 0.5 * t),
        "slack": {u: {"mean": 0.1 * t - 0.2, "low": 0.1 * t - 0.3, "high": 0.1 * t - 0.1} for u in UTILITIES},
        "reward": None if reward is None else reward - 0.1 * t,
        "at_bound": {"safety": bound, "politeness": None},
    }


def record(entries: list[dict[str, Any]], **diagnostics: Any) -> dict[str, Any]:
    return {
        "method": "mocaid",
        "seed": 2,
        "config": {"dataset": {"name": "enumerable"}},
        "outcome": {"reported": "mocaid", "trajectory": entries, "diagnostics": diagnostics},
        "rows": {f"iterate {k}": {"policy": str(k)} for k in (1, 2, 3)} | {"mocaid": {"policy": "2"}},
    }


def test_three_panels_show_the_course_of_both_utilities(tmp_path: Path, drawn: list[Any]) -> None:
    assert trajectory(record([entry(t) for t in (1, 3, 2)], reported_iterate="best_feasible"), tmp_path / "t")
    (figure,) = drawn
    multipliers, slack, reward = figure.axes
    courses = [line.get_ydata() for line in multipliers.lines if len(line.get_xdata()) == 3]
    assert [list(y) for y in courses] == [[0.5, 1.0, 1.5]] * 2
    assert len(slack.collections) == 2  # a band each
    assert [line.get_ydata()[0] for line in slack.lines if line.get_linestyle() == "--"] == [0.0]
    assert list(reward.lines[0].get_ydata()) == pytest.approx([0.9, 0.8, 0.7])
    # the reported row is iterate 2 under another name
    assert [line.get_xdata()[0] for line in reward.lines if line.get_linestyle() == ":"] == [2]
    title = figure.get_suptitle()
    assert title == "mocaid on enumerable, seed 2, reported: best feasible"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(UTILITIES)


def test_bounds_and_oscillation_are_said(tmp_path: Path, drawn: list[Any]) -> None:
    entries = [entry(1, bound="lower"), entry(2), entry(3, bound="upper")]
    trajectory(record(entries, oscillates=True), tmp_path / "t")
    (figure,) = drawn
    assert figure.get_suptitle().endswith("; the dual oscillates")
    triangles = [(line.get_marker(), *line.get_xdata()) for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    assert triangles == [("v", 1), ("^", 3)]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[2:] == ["at its lower bound", "at its upper bound"]


def test_without_rewards_and_slack_the_rest_is_drawn(tmp_path: Path, drawn: list[Any]) -> None:
    entries = [entry(t, reward=None) for t in (0, 1)]
    entries[0]["slack"] = {}
    del entries[1]["at_bound"]
    assert trajectory(record(entries), tmp_path / "t")
    assert len(drawn[0].axes) == 2


@pytest.mark.parametrize("entries", [[], [entry(1)]], ids=["none", "one"])
def test_fewer_than_two_iterations_draw_nothing(tmp_path: Path, entries: list[dict[str, Any]]) -> None:
    assert not trajectory(record(entries), tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_files_are_written(tmp_path: Path) -> None:
    trajectory(record([entry(t) for t in range(5)]), tmp_path / "t")
    assert_picture(tmp_path / "t.png")
