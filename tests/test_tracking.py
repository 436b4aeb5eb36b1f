"""Weights & Biases: what its files hold, one run per job, and that its failures cost nothing."""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import wandb
from tiny_runs import PATIENCE_S, STATED, Run, command, run, science, shared_tiny, started
from wandb.proto import wandb_internal_pb2 as proto

from alignbench.config import TrackingConfig
from alignbench.errors import InvariantError
from alignbench.jsonio import read_json
from alignbench.lab import Lab
from alignbench.methods import METHODS, Method
from alignbench.methods.baselines import SftSettings
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


# ---------------------------------------------------------------- reading W&B's own file


def records_of(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format behind a header of seven bytes."""
    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] in (b":W&B", b"")
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into the block's rest
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0:
            break
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = proto.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@dataclass
class Mirror:
    """What one W&B run was told."""

    folder: Path
    group: str = ""
    job_type: str = ""
    project: str = ""
    tags: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    def curve(self, name: str) -> list[float]:
        return [row[name] for row in self.history if name in row]


def mirrors(out: Path) -> list[Mirror]:
    """Every W&B run below a folder of runs, once W&B's own service has written the end of each."""
    until = time.monotonic() + PATIENCE_S
    while True:
        found = _read(out)
        if all(mirror.exit_code is not None for mirror in found):
            return found
        assert time.monotonic() < until, "a W&B run was never finished"
        time.sleep(0.05)


def _read(out: Path) -> list[Mirror]:
    found = []
    for path in sorted(out.rglob("*.wandb")):
        mirror = Mirror(path.parent)
        for record in records_of(path):
            if record.HasField("run"):
                mirror.group, mirror.job_type = record.run.run_group, record.run.job_type
                mirror.project, mirror.tags = record.run.project, tuple(record.run.tags)
                mirror.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.HasField("history"):
                row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                mirror.history.append(row)
            elif record.HasField("summary"):
                mirror.summary |= {
                    i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update
                }
            elif record.HasField("exit"):
                mirror.exit_code = record.exit.exit_code
        found.append(mirror)
    return found


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
