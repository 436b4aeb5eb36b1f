"""The workspace against what offline runs hold, rebuilt from records; nothing here has an account."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from sweep_records import METHODS, write_sweep
from wandb_files import Mirror, mirrors

from alignbench.mirror import summary_of
from alignbench.report import wandb_workspace
from alignbench.report.__main__ import main
from alignbench.report.plot import trade_off
from alignbench.report.runs import collect

pytest.importorskip("wandb_workspaces", reason="the extra [wandb] is not installed")


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_API_KEY", "WANDB_ENTITY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A sweep of which the command has made offline runs and a workspace, and its records."""
    folder = tmp_path_factory.mktemp("sweep")
    records = [
        record
        for record in write_sweep(folder)
        if record["seed"] == 0 and record["config"]["constraint"]["thresholds"] == [0.1]
    ]
    kept = {record["run_id"] for record in records}
    for path in folder.iterdir():
        if path.name not in kept:
            (path / "record.json").unlink()
    for record in records:
        trade_off([record], folder / record["run_id"] / "trade_off", utility="safety")
    assert main(["wandb", str(folder), "--project", "p", "--runs", "offline"]) == 0
    return folder, records


@pytest.fixture(scope="module")
def logged(reported: tuple[Path, list[dict[str, Any]]]) -> list[Mirror]:
    return mirrors(reported[0] / "wandb-report" / "runs")


def panels_of(spec: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {s["name"]: s["panels"] for s in spec["spec"]["section"]["panelBankConfig"]["sections"]}


def test_offline_runs_are_made_of_records_alone(
    reported: tuple[Path, list[dict[str, Any]]], logged: list[Mirror]
) -> None:
    folder, records = reported
    assert [mirror.exit_code for mirror in logged] == [0] * len(METHODS)
    for mirror in logged:
        (record,) = [r for r in records if r["method"] == mirror.job_type]
        assert (mirror.project, mirror.group) == ("p", folder.name)
        assert mirror.config["constraint"] == record["config"]["constraint"]
        for name, value in summary_of(record).items():
            assert mirror.summary[name] == pytest.approx(value), name
        assert mirror.summary["reported/safety_requested_margin"] == 0.1
        assert mirror.curve("sft/loss") == pytest.approx([0.7 - 0.01 * t for t in range(1, 9)])
        assert any("trade_off/path" in row for row in mirror.history)
    (iterated,) = [mirror for mirror in logged if mirror.job_type == "mocaid"]
    assert iterated.curve("dual/step") == [1, 2, 3]
    assert iterated.curve("dual/multiplier/safety") == pytest.approx([1.2, 1.4, 1.6])
    assert iterated.curve("dual/gap/safety") == pytest.approx([0.0, -0.1, -0.2])


def test_every_panels_metric_is_in_the_offline_runs(reported: tuple[Path, Any], logged: list[Mirror]) -> None:
    spec = json.loads((reported[0] / "wandb-report" / "workspace.json").read_text())
    summaries = set().union(*(mirror.summary for mirror in logged))
    steps = {name for mirror in logged for row in mirror.history for name in row}
    sections, seen = panels_of(spec), []
    assert list(sections) == ["Trade-off", "Duals", "Training", "Cost", "Pictures"]
    for panel in (panel for panels in sections.values() for panel in panels):
        config, kind = panel["config"], panel["viewType"]
        seen.append(kind)
        if kind == "Scatter Plot":
            for axis in ("xAxis", "yAxis"):
                assert config[axis].removeprefix("summary:") in summaries
        elif kind == "Run History Line Plot":
            assert {config["xAxis"], *config["metrics"]} <= steps
        elif kind == "Bar Chart":
            assert set(config["metrics"]) <= summaries
        elif kind == "Media Browser":
            assert {f"{key}/path" for key in config["mediaKeys"]} <= steps
        else:
            assert kind == "Vega2"
            _check_chart(config, logged)
    assert set(seen) == {"Scatter Plot", "Run History Line Plot", "Bar Chart", "Media Browser", "Vega2"}


def _check_chart(config: dict[str, Any], logged: list[Mirror]) -> None:
    """The table of a custom chart is logged by a run, and has the columns that the chart draws."""
    (fields,) = [field["fields"] for field in config["userQuery"]["queryFields"]]
    (key,) = [arg["value"] for field in fields if field["name"] == "summaryTable" for arg in field["args"]]
    found = [
        mirror.folder / "files" / row[f"{key}/path"]
        for mirror in logged
        for row in mirror.history
        if f"{key}/path" in row
    ]
    assert found
    for path in found:
        assert set(config["fieldSettings"].values()) <= set(json.loads(path.read_text())["columns"])
    assert config["panelDefId"] in ("wandb/scatter/v0", "wandb/line/v0")


def test_runs_are_grouped_by_method_and_threshold(reported: tuple[Path, Any], logged: list[Mirror]) -> None:
    spec = json.loads((reported[0] / "wandb-report" / "workspace.json").read_text())
    (runs,) = spec["spec"]["section"]["runSets"]
    assert [(g["section"], g["name"]) for g in runs["grouping"]] == [
        ("config", "method.value.name"), ("config", "constraint.value.thresholds"),
    ]  # fmt: skip
    for mirror in logged:
        assert mirror.config["method"]["name"] in METHODS
        assert mirror.config["constraint"]["thresholds"] == [0.1]


def test_without_a_login_saving_says_what_to_do(
    reported: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(reported[0])
    assert main(["wandb", folder, "--out", str(tmp_path / "w"), "--save"]) == 2
    assert "--entity NAME" in capsys.readouterr().err
    assert main(["wandb", folder, "--out", str(tmp_path / "w"), "--save", "--entity", "me"]) == 2
    assert "wandb login, or set WANDB_API_KEY" in capsys.readouterr().err
    assert (tmp_path / "w" / "workspace.json").is_file()


def test_without_the_extra_it_is_named(
    reported: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert main(["wandb", str(reported[0]), "--out", str(tmp_path)]) == 2
    assert "pip install wandb-workspaces" in capsys.readouterr().err


def test_records_without_duals_have_no_panels_for_them(reported: tuple[Path, Any]) -> None:
    runs = collect(reported[0])
    runs.records[:] = [
        {k: v for k, v in record.items() if k not in ("duals", "training")}
        | {"outcome": {"reported": record["method"]}}
        for record in runs.records
    ]
    space = wandb_workspace.workspace(runs, entity="me", project="p", name="n")
    assert list(panels_of(wandb_workspace.spec_of(space))) == ["Trade-off", "Cost", "Pictures"]
