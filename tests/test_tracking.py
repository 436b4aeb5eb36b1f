"""Weights & Biases: what its files hold, one run per job, and that its failures cost nothing."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from tiny_runs import STATED, Run, command, run, science, shared_tiny, started
from wandb_files import mirrors

from alignbench.config import TrackingConfig
from alignbench.errors import InvariantError
from alignbench.jsonio import read_json
from alignbench.lab import Lab
from alignbench.methods import METHODS, Method
from alignbench.methods.baselines import SftSettings
from alignbench.mirror import summary_of, tables_of
from alignbench.plan import PlanLab
from alignbench.tracking import Tracker

OFFLINE = "tracking.mode=offline"
SECRET = "s3cret" * 7


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return shared_tiny(tmp_path_factory)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_RUN_GROUP", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "alignbench.tracking" and r.levelno >= logging.WARNING]


# ---------------------------------------------------------------- a good run


@pytest.fixture(scope="module")
def mirrored(tiny: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose stages are all found: W&B shows it whole all the same."""
    return run(tiny.store, tmp_path_factory.mktemp("mirrored"), STATED, OFFLINE, "tracking.tags=[nice]")


def test_an_offline_run_lies_in_the_run_folder_and_is_finished(mirrored: Run) -> None:
    (mirror,) = mirrors(mirrored.folder.parent)
    assert mirror.folder.parent == mirrored.folder / "wandb"
    assert mirror.exit_code == 0
    assert wandb.run is None


def test_it_holds_the_curves_of_every_training_stage(mirrored: Run) -> None:
    (mirror,) = mirrors(mirrored.folder.parent)
    for label in ("sft", "prefer reward", "prefer reward -> safety"):
        log = mirrored.artifact(label).jsonl("log.jsonl")
        assert log
        assert mirror.curve(f"{label}/loss") == [row["loss"] for row in log]
        assert mirror.curve(f"{label}/step") == [row["step"] for row in log]
        assert mirror.curve(f"{label}/learning_rate") == [row["learning_rate"] for row in log]
    assert mirror.curve("prefer reward/margin")
    assert mirror.curve("prefer reward/validation_loss")


def test_it_holds_the_configuration_and_the_results(mirrored: Run) -> None:
    (mirror,) = mirrors(mirrored.folder.parent)
    assert (mirror.project, mirror.group, mirror.job_type) == ("alignbench", "handbook", "sacpo")
    assert mirror.tags == ("nice",)
    assert {name: mirror.config[name] for name in mirrored.record["config"]} == mirrored.record["config"]
    for row, found in mirrored.record["rows"].items():
        assert mirror.summary[f"{row}/reward"] == found["metrics"]["reward"]["mean"]
        assert mirror.summary[f"{row}/kl"] == found["metrics"]["kl"]["mean"]
    assert any("generations/path" in row for row in mirror.history)
    assert any("trade_off/path" in row for row in mirror.history)


def test_it_holds_everything_that_a_workspace_shows(mirrored: Run) -> None:
    """As `tests/report/test_wandb_workspace.py` asks of runs that are made again from records."""
    (mirror,) = mirrors(mirrored.folder.parent)
    for name, value in summary_of(mirrored.record).items():
        assert mirror.summary[name] == value, name
    assert "reported/safety_achieved_margin" in mirror.summary
    for name, (columns, rows) in tables_of(mirrored.record).items():
        (path,) = [row[f"{name}/path"] for row in mirror.history if f"{name}/path" in row]
        table = read_json(mirror.folder / "files" / path)
        assert (table["columns"], table["data"]) == (columns, rows)


def test_the_mirror_changes_no_result(tiny: Run, mirrored: Run) -> None:
    assert science(mirrored.record) == science(tiny.record)
    assert mirrored.record["cost"]["stages_built_now"] == 0


def test_a_run_that_trains_logs_while_it_does(tiny: Run, tmp_path: Path) -> None:
    done = run(tiny.copied(tmp_path / "store"), tmp_path / "out", OFFLINE, "method=dpo_safe", "tracking.group=mine")
    (mirror,) = mirrors(tmp_path / "out")
    assert "prefer safety" in done.built
    assert mirror.curve("prefer safety/loss") == [r["loss"] for r in done.artifact("prefer safety").jsonl("log.jsonl")]
    assert (mirror.group, mirror.job_type) == ("mine", "dpo_safe")


def test_a_multirun_gives_one_wandb_run_per_job(tiny: Run, tmp_path: Path) -> None:
    store, out = tiny.copied(tmp_path / "store"), tmp_path / "out"
    argv = command(store, out, "seed=0,1", "method=sft", OFFLINE)
    argv.insert(2, "-m")
    with started(argv, tmp_path / "log", WANDB_API_KEY=SECRET) as process:
        process.finish()
    first, second = mirrors(out)
    assert [mirror.exit_code for mirror in (first, second)] == [0, 0]
    assert first.folder.name != second.folder.name
    assert {mirror.config["seed"] for mirror in (first, second)} == {0, 1}
    records = {path.parent: read_json(path) for path in out.glob("*/record.json")}
    assert len(records) == 2
    for mirror in (first, second):
        record = records[mirror.folder.parents[1]]
        assert mirror.config["seed"] == record["seed"]
        # its own curve and nothing of the other job's
        assert len(mirror.curve("sft/loss")) == 3
        assert mirror.summary["sft/reward"] == record["rows"]["sft"]["metrics"]["reward"]["mean"]
    assert first.curve("sft/loss") != second.curve("sft/loss")
    assert first.group == second.group
    assert first.group.startswith("sweep-")
    for path in out.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


# ---------------------------------------------------------------- when it fails


def test_disabled_writes_nothing(tiny: Run) -> None:
    assert not list(tiny.folder.rglob("*wandb*"))


def test_init_that_fails_costs_one_warning(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: Any) -> None:
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", refuse)
    done = run(tiny.store, tmp_path / "out", STATED, OFFLINE)
    assert science(done.record) == science(tiny.record)
    (warning,) = warnings_of(caplog)
    assert "no network" in warning
    assert "the run goes on" in warning


@pytest.mark.parametrize("missing", ["summary", "log", "define_metric"])
def test_a_call_that_fails_costs_one_warning_and_the_run_is_still_closed(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, missing: str
) -> None:
    class Broken:
        """A W&B run in which one thing fails."""

        def __init__(self) -> None:
            self.calls: list[str] = []
            self.summary = self

        def _call(self, name: str) -> None:
            self.calls.append(name)
            if name == missing:
                raise OSError("No space left on device")

        def define_metric(self, *_: Any, **__: Any) -> None:
            self._call("define_metric")

        def log(self, *_: Any, **__: Any) -> None:
            self._call("log")

        def update(self, *_: Any) -> None:
            self._call("summary")

        def finish(self, exit_code: int) -> None:
            self.calls.append(f"finish {exit_code}")

    broken = Broken()
    monkeypatch.setattr(wandb, "init", lambda **_: broken)
    done = run(tiny.store, tmp_path / "out", STATED, OFFLINE)
    assert science(done.record) == science(tiny.record)
    assert broken.calls.count(missing) == 1  # after a failure it is left in peace
    assert broken.calls[-1] == "finish 0"
    (warning,) = warnings_of(caplog)
    assert "No space left" in warning


def test_a_folder_that_wandb_cannot_write_to_costs_no_result(
    tiny: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    (out / tiny.folder.name).mkdir(parents=True)
    (out / tiny.folder.name / "wandb").write_text("a file is in the way")
    done = run(tiny.store, out, STATED, OFFLINE)
    assert science(done.record) == science(tiny.record)
    assert len(warnings_of(caplog)) <= 1
    assert wandb.run is None


@pytest.fixture
def read_only(tiny: Run, tmp_path: Path) -> Iterator[Path]:
    """A folder of runs in which W&B's own is a file system that takes no writes, root's neither."""
    folder = tmp_path / "out" / tiny.folder.name / "wandb"
    folder.mkdir(parents=True)
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a read-only file system needs root and mount")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    with pytest.raises(OSError, match="Read-only"):
        (folder / "probe").touch()
    yield tmp_path / "out"
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_read_only_wandb_folder_costs_no_result(tiny: Run, read_only: Path, caplog: pytest.LogCaptureFixture) -> None:
    done = run(tiny.store, read_only, STATED, OFFLINE)
    assert science(done.record) == science(tiny.record)
    assert len(warnings_of(caplog)) <= 1
    assert wandb.run is None
    assert not list((done.folder / "wandb").iterdir())


def test_an_import_that_fails_costs_one_warning(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = run(tiny.store, tmp_path / "out", STATED, OFFLINE)
    assert science(done.record) == science(tiny.record)
    assert len(warnings_of(caplog)) == 1


def test_a_recipe_that_raises_still_finishes_its_wandb_run(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, labs = METHODS["sft"].recipe, []

    def raising(lab: Lab, problem: Any, settings: Any) -> Any:
        labs.append(lab)
        outcome = recipe(lab, problem, settings)
        if not isinstance(lab, PlanLab):
            raise InvariantError("it broke", where="here", mend="mend it")
        return outcome

    monkeypatch.setitem(METHODS, "sft", Method("sft", SftSettings, raising))
    with pytest.raises(InvariantError, match="it broke"):
        run(tiny.store, tmp_path / "out", OFFLINE, "method=sft")
    assert len(labs) == 2
    (mirror,) = mirrors(tmp_path / "out")
    assert mirror.exit_code == 1
    assert mirror.curve("sft/loss")
    assert wandb.run is None
    assert not list((tmp_path / "out").glob("*/record.json"))


def test_a_closed_or_disabled_tracker_takes_everything_silently(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = TrackingConfig(mode="disabled")
    with Tracker(settings, run_id="r", group="g", job_type="j", config={}, folder=tmp_path / "no") as tracker:
        tracker.log("sft", 1, {"loss": 1.0})
    tracker.log("sft", 2, {"loss": 1.0})
    tracker.summary({"x": 1})
    tracker.table("t", ["a"], [[1]])
    tracker.image("i", tmp_path / "no.png")
    assert not warnings_of(caplog)
    assert not (tmp_path / "no").exists()
