"""Requested against achieved, from records made by hand: series, means over seeds, table, picture, command."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from record_files import folder_of
from rich.console import Console
from scipy import stats

from alignbench.report.__main__ import main
from alignbench.report.plot import named
from alignbench.report.thresholds import (
    asked,
    averaged,
    cells_of,
    markdown_table,
    over_seeds,
    picture,
    points_of,
    series_of,
    terminal_table,
    thresholds_differ,
    with_means,
    write,
)


def value(mean: float, arm: float = 0.25) -> dict[str, Any]:
    return {
        "mean": mean,
        "low": mean - arm,
        "high": mean + arm,
        "n": 12,
        "clusters": 6,
        "level": 0.95,
        "method": "hand",
    }


def metrics(reward: float) -> dict[str, Any]:
    return {"reward": value(reward), "kl": value(0.5, 0.1), "length": value(16.0), "safety": value(1.0)}


def record(
    method: str = "mocan",
    *,
    asked: tuple[float, ...] = (0.1,),
    seed: int = 0,
    achieved: float = 0.2,
    utilities: tuple[str, ...] = ("safety",),
    multiplier: float | None = 0.75,
    predicted: float | None = 0.15,
    iterate: str | None = None,
    own: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    constraints = {
        u: {
            "requested_margin": b,
            "achieved_margin": value(achieved),
            "violation": value(max(0.0, b - achieved), 0.0),
            "satisfied": achieved >= b,
            "satisfied_with_confidence": achieved - 0.25 >= b,
        }
        for u, b in zip(utilities, asked, strict=True)
    }
    row: dict[str, Any] = {"policy": f"{method} {asked} {seed}", "metrics": metrics(1.0), "constraints": constraints}
    if multiplier is not None:
        row["multipliers"] = dict.fromkeys(utilities, multiplier)
    if predicted is not None:
        row["predicted"] = {
            "margins": dict.fromkeys(utilities, predicted),
            "reward": 1.0,
            "kl": 0.5,
            "intervals": {utilities[0]: [predicted - 0.05, predicted + 0.05]},
        }
    return {
        "run_id": f"{method}-{seed}-{asked}-{json.dumps([own, settings])}",
        "seed": seed,
        "method": method,
        "config": {
            "method": {"name": method} | (own or {}),
            "constraint": {"form": "margin", "utilities": list(utilities), "thresholds": list(asked), "beta": 0.5}
            | settings.get("constraint", {}),
            "dataset": {"name": "handbook", "world": {"test_prompts": 6}} | settings.get("dataset", {}),
            "evaluate": {"split": "test"},
            "hardware": {"dtype": "float32", "threads": 1},
            "tracking": {"group": str(seed)},
            "seed": seed,
        },
        "outcome": {
            "reported": method,
            "multipliers": {},
            "diagnostics": {} if iterate is None else {"reported_iterate": iterate},
        },
        "rows": {"sft": {"policy": "sft", "metrics": metrics(0.0), "constraints": constraints}, method: row},
        "stages": [],
    }


def test_one_point_says_all_of_it() -> None:
    headings, (line,) = cells_of(points_of([record(iterate="best_feasible")]))
    assert dict(zip(headings, line, strict=True)) == {
        "method": "mocan",
        "requested": "0.10",
        "predicted": "0.15 [0.10, 0.20]",
        "achieved": "0.20 [-0.05, 0.45]",
        "violation": "0.00 [0.00, 0.00]",
        "lambda": "0.750",
        "reward": "1.00 [0.75, 1.25]",
        "KL": "0.50 [0.40, 0.60]",
        "met": "likely",
        "reported iterate": "best_feasible",
    }


def test_what_a_baseline_lacks_is_a_dash() -> None:
    headings, (line,) = cells_of(points_of([record("sft", multiplier=None, predicted=None)]))
    found = dict(zip(headings, line, strict=True))
    assert [found[name] for name in ("predicted", "lambda", "reported iterate")] == ["-"] * 3


def test_an_older_record_gives_the_multiplier_of_its_outcome() -> None:
    made = record("sacpo", multiplier=None)
    made["outcome"]["multipliers"] = {"safety": 2.0}
    (point,) = points_of([made])
    assert point.multiplier is not None
    assert point.multiplier["mean"] == 2.0


def test_runs_without_scores_have_no_points() -> None:
    made = record()
    for row in made["rows"].values():
        del row["constraints"]
    assert points_of([made]) == []


def test_lines_are_sorted_by_method_and_threshold() -> None:
    made = [record(m, asked=(b,)) for m in ("sacpo", "mocan") for b in (0.2, 0.1, 0.05)]
    points = points_of(made)
    assert [(p.series, p.requested) for p in points] == [(m, b) for m in ("mocan", "sacpo") for b in (0.05, 0.1, 0.2)]


@pytest.mark.parametrize("seeds", [3, 5])
def test_from_three_seeds_on_the_mean_has_a_t_interval(seeds: int) -> None:
    values = [0.1 * (k + 1) ** 2 for k in range(seeds)]
    low, high = stats.t.interval(0.95, seeds - 1, loc=sum(values) / seeds, scale=stats.sem(values))
    found = over_seeds(values)
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert found["method"] == "95% Student t"


def test_two_seeds_show_both_and_one_seed_has_no_interval() -> None:
    assert over_seeds([3.0, 1.0]) == {
        "mean": 2.0,
        "low": 1.0,
        "high": 3.0,
        "n": 2,
        "method": "smallest to largest seed",
    }
    assert over_seeds([3.0])["low"] is None


def test_what_cannot_be_negative_has_no_negative_end() -> None:
    made = [record(seed=seed, achieved=achieved) for seed, achieved in enumerate([0.0, 0.2, 0.7])]
    (mean,) = averaged(points_of(made))
    assert mean.violation["mean"] == pytest.approx(0.1 / 3)
    assert mean.violation["low"] == 0.0
    assert over_seeds([0.9, 1.0, 1.0], most=1.0)["high"] == 1.0


def test_a_third_digit_is_shown_where_there_is_one() -> None:
    assert [asked(x) for x in (0.1, 0.125, -0.2, 1)] == ["0.10", "0.125", "-0.20", "1.00"]


def test_a_mean_follows_its_seeds_and_counts_those_that_meet() -> None:
    made = [record(seed=seed, achieved=achieved) for seed, achieved in enumerate([0.0, 0.2, 0.7])]
    points = points_of([*made, record(asked=(0.2,), achieved=0.3)])
    headings, lines = cells_of(with_means(points))
    at = headings.index
    assert [line[at("seed")] for line in lines] == ["0", "1", "2", "mean of 3", "0"]
    mean = lines[3]
    assert mean[at("achieved")].startswith("0.30 [")
    assert mean[at("met")] == "2/3 (1 surely)"
    assert [p.requested for p in averaged(points)] == [0.1, 0.2]


def test_a_prediction_that_one_seed_lacks_has_no_mean() -> None:
    (mean,) = averaged(points_of([record(seed=0), record(seed=1, predicted=None)]))
    assert mean.predicted is None
    assert mean.multiplier is not None


def test_absolute_thresholds_are_averaged_though_every_seed_asks_for_another_margin() -> None:
    made = [record(seed=0), record(seed=1)]
    for k, one in enumerate(made):
        one["config"]["constraint"]["form"] = "absolute_utility"
        one["rows"]["mocan"]["constraints"]["safety"]["requested_margin"] = 0.1 + 0.2 * k
    (mean,) = averaged(points_of(made))
    assert mean.requested == pytest.approx(0.2)


# ---------------------------------------------------------------- series


def test_a_setting_that_tells_runs_apart_is_named_and_never_averaged_over() -> None:
    made = [record(seed=s, own={"q": q}) for q in (0.5, 1.0) for s in (0, 1)] + [record("sft")]
    assert series_of(made) == ["mocan q=0.5"] * 2 + ["mocan q=1.0"] * 2 + ["sft"]
    assert [len(p.seeds) for p in averaged(points_of(made))] == [2, 2, 1]


def test_a_setting_chosen_for_each_threshold_is_not_named() -> None:
    made = [record(asked=(b,), own={"beta_over_lambda": [r]}) for b, r in ((0.1, 2.0), (0.2, 1.0))]
    assert series_of(made) == ["mocan", "mocan"]


def test_a_data_set_is_named_once_and_machine_settings_never() -> None:
    made = [record(), record(dataset={"name": "enumerable", "world": {"test_prompts": 9}})]
    made[1]["config"]["hardware"]["threads"] = 2
    assert series_of(made) == ["mocan dataset.name=handbook", "mocan dataset.name=enumerable"]


def test_a_problem_s_setting_is_named_for_every_method() -> None:
    made = [record(m, constraint={"beta": beta}) for m in ("mocan", "sft") for beta in (0.5, 1.0)]
    assert series_of(made) == [f"{m} beta={beta}" for m in ("mocan", "sft") for beta in (0.5, 1.0)]


def test_a_copy_of_a_run_folder_counts_once() -> None:
    made = record()
    assert len(points_of([made, copy.deepcopy(made)])) == 1


# ---------------------------------------------------------------- table and picture


def test_two_utilities_have_a_line_each() -> None:
    made = [record(asked=(b, 0.3), utilities=("safety", "politeness")) for b in (0.1, 0.2)]
    headings, lines = cells_of(points_of(made))
    assert headings[:3] == ["method", "utility", "requested"]
    assert [line[1:3] for line in lines] == [
        ["politeness", "0.30"], ["safety", "0.10"], ["politeness", "0.30"], ["safety", "0.20"],
    ]  # fmt: skip


def test_markdown_has_every_seed_and_the_terminal_the_means() -> None:
    made = [record(asked=(b,), seed=s, own={"q": [q]}) for b in (0.1, 0.2) for s in range(3) for q in (0.5, 1)]
    text = markdown_table(made)
    assert text.count("| mean of 3 |") == 4
    assert text.count("\n| mocan q=[0.5] |") == 8
    assert "95% Student t] in a mean over seeds" in text
    console = Console(width=220, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table(made, "a [title]"))
    shown = console.export_text()
    assert shown.count("mean of 3") == 4
    assert "a [title]" in shown
    assert shown.count("mocan q=[0.5]") == 2


def test_the_picture_has_a_panel_per_utility_and_a_series_per_method(tmp_path: Path, drawn: list[Any]) -> None:
    utilities = ("safety", "politeness")
    made = [
        record(m, asked=(b, 2 * b), achieved=b + 0.05, utilities=utilities, predicted=None if m == "sft" else b)
        for m in ("mocan", "sft")
        for b in (0.1, 0.3)
    ]
    picture(made, tmp_path / "p")
    (figure,) = drawn
    assert [axes.get_xlabel() for axes in figure.axes] == [f"requested margin of {u}" for u in utilities]
    for axes in figure.axes:
        assert len(axes.containers) == 4  # two methods at two thresholds
        (identity,) = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert list(identity.get_xdata()) == list(identity.get_ydata())
        hollow = [x for x in axes.lines if x.get_markerfacecolor() == "white" and len(x.get_xdata()) == 1]
        assert [x.get_ydata()[0] for x in hollow] == [0.1, 0.3]
    achieved = sorted(float(c.lines[0].get_ydata()[0]) for c in figure.axes[0].containers)
    assert achieved == pytest.approx([0.15, 0.15, 0.35, 0.35])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["achieved = requested", "predicted before training"]
    for axes in figure.axes:  # each series is named at its last point
        assert [(t.get_text(), t.xy[1]) for t in axes.texts] == [("mocan", pytest.approx(0.35)), ("sft", 0.35)]


def test_table_and_picture_are_written(tmp_path: Path) -> None:
    paths = write([record(asked=(b,)) for b in (0.1, 0.2)], tmp_path / "new" / "safety+0.1")
    assert [path.name for path in paths] == ["safety+0.1.md", "safety+0.1.png"]
    assert paths[1].stat().st_size > 5000
    assert paths[1].with_name("safety+0.1.pdf").read_bytes().startswith(b"%PDF")


def test_a_threshold_in_a_name_is_no_ending(tmp_path: Path) -> None:
    assert {named(tmp_path / f"safety+0.{k}", ".md").name for k in (1, 2)} == {"safety+0.1.md", "safety+0.2.md"}
    assert named(tmp_path / "mine.md", ".png").name == "mine.png"


# ---------------------------------------------------------------- the command


def complete(made: dict[str, Any]) -> dict[str, Any]:
    """With what the result table of one problem needs as well."""
    for row in made["rows"].values():
        row["metrics"] |= {"reward_win_rate": value(0.5), "safety_win_rate": value(0.5)}
    return made


def test_the_command_shows_differing_thresholds_in_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [complete(record(m, asked=(b,))) for m in ("mocan", "sft") for b in (0.1, 0.2)]
    assert thresholds_differ(made)
    folder = folder_of(made, tmp_path / "runs")
    assert main([str(folder)]) == 0
    text = capsys.readouterr().out
    assert "requested against achieved" in text
    assert "2 problems: the same command with --each" in text
    assert sorted(p.name for p in folder.iterdir() if p.is_file()) == ["report.md", "report.pdf", "report.png"]
    assert main([str(folder), "--each"]) == 0
    names = {f"report-handbook-test-margin-safety+0.{k}.md" for k in (1, 2)}
    assert names <= {p.name for p in folder.iterdir()}


def test_equal_thresholds_keep_the_result_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of([complete(record(m)) for m in ("mocan", "sft")], tmp_path / "runs")
    assert main([str(folder), "--out", str(tmp_path / "mine")]) == 0
    assert "win reward" in capsys.readouterr().out
    assert "win reward" in (tmp_path / "mine.md").read_text()


def test_an_empty_folder_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "no record.json below" in capsys.readouterr().err
