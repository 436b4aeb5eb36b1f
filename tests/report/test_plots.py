"""Every picture of a sweep from records made by hand, what it shows, and why one is not drawn."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import assert_picture
from sweep_records import ASKED, METHODS, geometry, write_sweep

from alignbench.report.__main__ import main
from alignbench.report.calibration import pooled, reliability
from alignbench.report.cost_plot import costs
from alignbench.report.course_plot import courses
from alignbench.report.direct import apart, readable
from alignbench.report.dual_plot import dual_function, duals_of
from alignbench.report.plot import COLOURS, REFERENCE, looks
from alignbench.report.plots import PLOTS
from alignbench.report.rating_plot import ratings
from alignbench.report.training_plot import running_mean, training


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("sweep")
    return out, write_sweep(out)


# ---------------------------------------------------------------- the command


def test_one_command_draws_all_that_the_records_allow(
    sweep: tuple[Path, list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plots", str(sweep[0]), "--out", str(tmp_path / "p")]) == 0
    text = capsys.readouterr().out
    drawn = sorted(path.stem for path in (tmp_path / "p").glob("*.png"))
    assert drawn == sorted([*(set(PLOTS) - {"dual", "proxy_gold"}), "dual-1", "dual-2"])  # a bank per seed
    for name in drawn:
        assert_picture(tmp_path / "p" / f"{name}.png")
    assert "proxy_gold:  not drawn: no run used a score model" in text
    assert text.count("not drawn") == 1


def test_records_of_an_earlier_version_say_what_they_lack(
    sweep: tuple[Path, list[dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {k: v for k, v in sweep[1][0].items() if k not in ("duals", "training", "judging", "labels", "per_prompt")}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "record.json").write_text(json.dumps(record))
    assert main(["plots", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    lines = {line.split(":")[0]: line for line in captured.out.splitlines() if "not drawn" in line}
    assert set(lines) == set(PLOTS) - {"margins", "cost"}
    assert "1 record(s) solved a dual, before records held its course; the same commands add it" in lines["dual"]
    assert "the same command writes them" in lines["training"]
    assert "judge=gold" in lines["ratings"]
    assert sorted(p.name for p in (tmp_path / "plots").glob("*.png")) == ["cost.png", "margins.png"]


def test_only_some_are_drawn_and_old_ones_of_that_name_go(sweep: tuple[Path, list[Any]], tmp_path: Path) -> None:
    for name in ("dual.png", "dual-9.pdf", "front.png"):
        (tmp_path / name).write_text("old")
    assert main(["plots", str(sweep[0]), "--out", str(tmp_path), "--only", "dual"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "dual-1.pdf", "dual-1.png", "dual-2.pdf", "dual-2.png", "front.png",
    ]  # fmt: skip
    assert (tmp_path / "front.png").read_text() == "old"


def test_an_unknown_picture_is_refused(
    sweep: tuple[Path, list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plots", str(sweep[0]), "--out", str(tmp_path), "--only", "pie"]) == 2
    assert "one of: front, margins" in capsys.readouterr().err


def test_a_damaged_curve_is_left_out_and_said(sweep: tuple[Path, list[Any]], tmp_path: Path, capsys: Any) -> None:
    record = sweep[1][0]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "record.json").write_text(json.dumps(record))
    (tmp_path / "one" / "training.jsonl").write_text('{"stage": "sft", "step": 1, "loss": 0.1}\n')
    assert main(["plots", str(tmp_path), "--only", "training"]) == 0
    assert "training.jsonl is damaged or of another run" in capsys.readouterr().out


# ---------------------------------------------------------------- what they show


def test_the_dual_has_its_minimiser_on_its_course(tmp_path: Path, drawn: list[Any]) -> None:
    duals = [geometry(0, asked) for asked in ASKED]
    dual_function(duals, "a title", tmp_path / "p")
    (figure,) = drawn
    value, slack, _, fewer = figure.axes
    for dual, course in zip(duals, [line for line in value.lines if len(line.get_xdata()) > 2], strict=True):
        x, y = map(np.asarray, course.get_data())
        at = dual["multipliers"]["safety"]
        assert x[np.argmin(y)] == at
        assert y.min() == pytest.approx(dual["value"], abs=1e-12)
    markers = [c.lines[0].get_data() for c in slack.containers]
    assert [float(y[0]) for _, y in markers] == pytest.approx([0.0, 0.0], abs=1e-8)
    assert [t.get_text() for t in value.texts] == ["safety 0.30", "safety 0.10"]
    assert len(fewer.containers) == 2 * 2  # 4 and 8 of 16 responses


def test_duals_of_one_bank_share_a_picture(sweep: tuple[Path, list[dict[str, Any]]]) -> None:
    found = duals_of(sweep[1])
    assert list(found) == [f"mocaid, mocan, sacpo, seed {seed}, beta 0.5" for seed in (0, 1)]
    for duals in found.values():  # each once, though three methods solved it
        assert [dual["requested_margin"]["safety"] for dual in duals] == list(ASKED)


def test_courses_show_the_gap_with_its_interval(
    sweep: tuple[Path, list[Any]], tmp_path: Path, drawn: list[Any]
) -> None:
    one_seed = [record for record in sweep[1] if record["seed"] == 0]
    assert courses(one_seed, tmp_path / "p") == ["safety"]
    (figure,) = drawn
    (above, _), (below, other) = np.array(figure.axes).reshape(2, 2)
    assert [float(y) for y in above.lines[0].get_ydata()] == pytest.approx([1.2, 1.4, 1.6])
    gap = next(line for line in below.lines if len(line.get_xdata()) == 3)
    assert [float(y) for y in gap.get_ydata()] == pytest.approx([0.0, -0.1, -0.2], abs=1e-12)
    band = below.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((-0.25, 0.05))
    assert other.get_ylim() == below.get_ylim()


def test_a_gap_that_was_not_measured_leaves_its_iteration_in_place(
    sweep: tuple[Path, list[Any]], tmp_path: Path, drawn: list[Any]
) -> None:
    one_seed = copy.deepcopy([record for record in sweep[1] if record["seed"] == 0])
    for record in one_seed:
        for entry in record["outcome"]["trajectory"][-1:]:
            entry |= {"slack": {}, "reward": None}
    assert courses(one_seed, tmp_path / "p") == ["safety"]
    (figure,) = drawn
    (above, _), (below, _) = np.array(figure.axes).reshape(2, 2)
    assert [len(line.get_xdata()) for line in above.lines] == [3]
    assert [float(y) for y in below.lines[0].get_ydata()] == pytest.approx([0.0, -0.1], abs=1e-12)
    assert below.get_xlim() == above.get_xlim()


def test_ratings_join_a_policys_seeds(sweep: tuple[Path, list[Any]], tmp_path: Path, drawn: list[Any]) -> None:
    assert ratings(sweep[1], tmp_path / "p") == ["p"]
    (figure,) = drawn
    forest = figure.axes[1]
    names = [t.get_text() for t in forest.get_yticklabels()]
    assert sorted(names) == sorted(["sft", *(f"{m} @ {a}" for m in METHODS for a in ASKED)])
    assert sorted(t.get_text() for t in figure.axes[0].texts) == sorted(["sft", *METHODS])


def test_costs_are_means_and_their_range(sweep: tuple[Path, list[Any]], tmp_path: Path, drawn: list[Any]) -> None:
    records = [json.loads(json.dumps(record)) for record in sweep[1]]
    records[0]["cost"]["total"]["seconds"] = 72.5
    assert costs(records, tmp_path / "p")
    times = drawn[0].axes[1]
    assert sorted(bar.get_width() * 60 for bar in times.patches) == pytest.approx([12.5, 12.5, 27.5])
    assert [float(x) * 60 for x in times.lines[0].get_xdata()] == pytest.approx([12.5, 72.5])
    assert not costs([{**records[0], "cost": {}}], tmp_path / "q")


def test_training_stages_follow_each_other(tmp_path: Path, drawn: list[Any]) -> None:
    rows = [{"step": 1.0, "loss": 3.0}, {"step": 2.0, "loss": 1.0, "validation_loss": 2.0}]
    assert training([("m", {"sft": rows, "prefer a": rows, "prefer b": rows})], tmp_path / "p")
    alone, both = drawn[0].axes[:2]
    assert alone.get_title() == "sft (1 run)"
    xs = [list(map(float, line.get_xdata())) for line in both.lines]
    assert [1.0, 2.0] in xs
    assert [3.0, 4.0] in xs
    assert [t.get_text() for t in both.texts] == ["a", "b"]
    assert not training([("m", {})], tmp_path / "q")


# ---------------------------------------------------------------- parts


@given(st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=8), st.floats(0.01, 0.1))
def test_names_never_overlap_and_stay_inside(wanted: list[float], gap: float) -> None:
    places = apart(np.sort(wanted), gap)
    assert (np.diff(places) >= gap - 1e-12).all()
    assert places.min() >= -1e-12
    assert places.max() <= 1 + 1e-12


def test_names_that_have_room_stay_where_they_are() -> None:
    assert apart(np.array([0.1, 0.5, 0.9]), 0.1).tolist() == pytest.approx([0.1, 0.5, 0.9])
    assert apart(np.array([0.5, 0.5]), 0.1).tolist() == pytest.approx([0.45, 0.55])


@pytest.mark.parametrize("colour", COLOURS)
def test_names_are_dark_enough_to_read(colour: str) -> None:
    rgb = np.array(readable(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    assert 1.05 / (linear @ (0.2126, 0.7152, 0.0722) + 0.05) > 2.9  # contrast with white, as WCAG counts it


def test_a_series_looks_alike_in_every_picture() -> None:
    assert looks(["b", "a"]) == looks([REFERENCE, "a", "b"])
    assert looks(["b", "a"])[REFERENCE][1] == COLOURS[0]


def test_pooled_reliability_is_that_of_all_examples() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(300)
    happened = rng.random(300) < p
    parts = [reliability(p[a:z], happened[a:z], 10) for a, z in ((0, 50), (50, 300))]
    whole, joined = reliability(p, happened, 10), pooled(parts)
    assert joined["ece"] == pytest.approx(whole["ece"])
    assert joined["brier"] == pytest.approx(whole["brier"])
    assert [b["n"] for b in joined["bins"]] == [b["n"] for b in whole["bins"]]


def test_a_running_mean_keeps_a_line() -> None:
    assert running_mean(np.arange(50.0)).tolist()[2:-2] == pytest.approx(np.arange(50.0).tolist()[2:-2])
    assert running_mean(np.ones(3)).tolist() == [1.0, 1.0, 1.0]
