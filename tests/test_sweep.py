"""The end of a multirun: one table, what was shared, what failed; nothing in a plan or a single run."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from tiny_runs import PATIENCE_S, TINY, TOP, compose, environment, science

from alignbench.config import run_id
from alignbench.errors import DataError
from alignbench.jsonio import read_json
from alignbench.sweep import SweepTable, _expected, sharing, sharing_text

TITLE = "requested against achieved"
SWEEP = ("constraint.beta=0.5", "debug=tiny", "hardware.threads=1", "method=sft,dpo_helpful")


def multirun(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    argv = [
        sys.executable,
        str(TOP / "main.py"),
        "-m",
        *overrides,
        f"output_dir={folder}/out",
        f"store_dir={folder}/store",
    ]
    kept = {name: text for name, text in environment().items() if name != "COLUMNS"}
    return subprocess.run(argv, cwd=folder, env=kept, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def written(folder: Path) -> tuple[Path, dict[str, Any]]:
    (path,) = (folder / "out").glob("sweep-*/sweep.json")
    return path.parent, read_json(path)


# ---------------------------------------------------------------- whole multiruns


def test_a_multirun_with_a_failing_job_ends_in_one_table_of_the_others(tmp_path: Path) -> None:
    done = multirun(tmp_path, *SWEEP, "constraint.thresholds=[0.1],[0.1,0.2],[0.2]")
    assert done.returncode == 1  # Hydra raises the first failure
    assert "Error executing job" in done.stderr
    text = done.stdout
    assert text.count(TITLE) == 1
    table = text.partition(TITLE)[2]
    assert [table.count(f"│ {method} ") for method in ("sft", "dpo_helpful")] == [2, 2]
    assert "sweep: 4 run(s) finished, 2 failed\n" in text  # every job ended
    assert text.count("failed: ") == 2  # Hydra itself tells of the first only
    assert text.count("constraint.thresholds=[0.1,0.2]") >= 2
    folder, summary = written(tmp_path)
    records = [read_json(path) for path in (tmp_path / "out").glob("*/record.json")]
    assert len(records) == 4
    assert sorted(summary["runs"]) == sorted(record["run_id"] for record in records)
    assert len(summary["failed"]) == 2
    assert summary["missing"] == 0
    assert not summary["complete"]
    assert text.count(f"retry:   python -m alignbench.retry {folder}/sweep.json\n") == 1
    stages = [stage for record in records for stage in record["stages"]]
    built = sum(stage["built"] for stage in stages)
    # the store was empty: every artifact was built by exactly one of these runs
    assert built == len({stage["key"] for stage in stages}) == summary["stages"]["built"]
    assert summary["stages"]["saved"] == len(stages) - built > built
    assert f"{len(stages)} uses of {built} artifacts; {built} built now, {len(stages) - built} saved" in text
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "sweep.json",
        "dashboard.html",
        *(f"requested_achieved.{ending}" for ending in ("md", "png", "pdf")),
    }
    assert (folder / "requested_achieved.png").stat().st_size > 5000
    assert (folder / "requested_achieved.md").read_text().count("\n| dpo_helpful |") == 2


@pytest.mark.slow
def test_the_same_sweep_twice_at_a_time_in_one_folder_and_store(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    assert multirun(tmp_path / "alone", *SWEEP, "constraint.thresholds=[0.1]").returncode == 0
    found: list[subprocess.CompletedProcess[str]] = []
    both = tmp_path / "both"
    both.mkdir()
    threads = [
        threading.Thread(target=lambda: found.append(multirun(both, *SWEEP, "constraint.thresholds=[0.1]")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    seen = 0
    while any(thread.is_alive() for thread in threads):
        for path in both.glob("out/*/*.json"):  # whole at every moment, whoever writes it
            assert json.loads(path.read_text())
            seen += 1
        time.sleep(0.01)
    assert seen
    assert [done.returncode for done in found] == [0, 0], [done.stderr for done in found]
    for done in found:
        assert "sweep: 2 run(s) finished, 0 failed" in done.stdout
        assert done.stdout.count(TITLE) == 1
        assert "raised" not in done.stderr  # Hydra's warning of a callback's error
    folder, summary = written(both)
    alone, expected = written(tmp_path / "alone")
    assert summary["complete"]
    assert summary["runs"] == expected["runs"]
    # neither has left notes or temporary files
    assert {path.name for path in folder.iterdir()} == {path.name for path in alone.iterdir()}
    assert not list(both.rglob(".*.tmp"))
    for path in (tmp_path / "alone").glob("out/*/record.json"):
        twin = both / path.relative_to(tmp_path / "alone")
        assert science(read_json(twin)) == science(read_json(path))
        for name in ("table.md", "generations.jsonl", "trade_off.png"):
            assert twin.with_name(name).read_bytes() == path.with_name(name).read_bytes()
    for name in ("requested_achieved.md", "requested_achieved.png"):
        assert (folder / name).read_bytes() == (alone / name).read_bytes()
    assert not list((both / "store/damaged").iterdir())
    assert not list((both / "store/building").iterdir())


def test_a_planned_multirun_leaves_no_table(tmp_path: Path) -> None:
    done = multirun(tmp_path, *SWEEP, "constraint.thresholds=[0.1],[0.2]", "plan=true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("to run: ") == 4
    # what the four share counts once: two thresholds differ in their evaluations alone
    union = done.stdout.partition("plan of the sweep: 4 run(s)")[2]
    cells = [[cell.strip() for cell in line.split("│")] for line in union.splitlines() if line.startswith("│")]
    rows = {row[1]: [int(cell) for cell in row[2:5]] for row in cells}
    assert rows["sft"] == [4, 1, 1]
    assert rows["prefer"] == [2, 1, 1]
    assert rows["evaluate"] == [6, 4, 4]
    assert "0 of " in union
    assert "longest path" in union
    assert TITLE not in done.stdout
    assert "finished" not in done.stdout
    assert "raised" not in done.stderr  # Hydra's warning of a callback's error
    assert not list((tmp_path / "out").glob("sweep-*"))


# ---------------------------------------------------------------- the callback itself


def config_of(folder: Path, number: int, *, plan: bool = False) -> Any:
    return OmegaConf.create(
        {
            "plan": plan,
            "output_dir": str(folder),
            "hydra": {"sweep": {"dir": str(folder)}, "overrides": {"task": ["seed=0,1"]}, "job": {"num": number}},
        }
    )


def ended(seed: int, error: Exception | None = None) -> JobReturn:
    return JobReturn(
        overrides=[f"seed={seed}"],
        cfg=compose(*TINY, f"seed={seed}"),
        status=JobStatus.FAILED if error else JobStatus.COMPLETED,
        _return_value=error or 0.0,
    )


def record_of(job: JobReturn, folder: Path) -> None:
    """A finished run that was not scored: the table has nothing to say about it."""
    identity = run_id(job.cfg)
    (folder / identity).mkdir()
    made = {
        "run_id": identity,
        "seed": job.cfg.seed,
        "method": "sacpo",
        "config": {"constraint": {"utilities": ["safety"], "thresholds": [0.5]}},
        "outcome": {"reported": "sacpo"},
        "rows": {"sacpo": {"policy": "p", "metrics": {}}},
        "stages": [{"key": "a", "built": job.cfg.seed == 0, "cost": {"seconds": 7.0}}],
    }
    (folder / identity / "record.json").write_text(json.dumps(made))


@pytest.fixture(autouse=True)
def unnamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGNBENCH_SWEEP", raising=False)


def test_jobs_in_other_processes_and_a_second_multirun_on_the_same_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = SweepTable(), SweepTable()
    for callback in (first, second):
        callback.on_multirun_start(config_of(tmp_path, 0))
    for seed in range(2):
        job = ended(seed)
        record_of(job, tmp_path)
        # as submitit and joblib do
        pickle.loads(pickle.dumps(first)).on_job_end(config_of(tmp_path, seed), job)
    second.on_job_end(config_of(tmp_path, 0), ended(7, DataError("row 3 is empty", where="x.jsonl", mend="fill it")))
    first.on_multirun_end(config_of(tmp_path, 0))
    text = capsys.readouterr().out
    assert "sweep: 2 run(s) finished, 0 failed\n" in text
    assert "2 uses of 1 artifacts; 1 built now, 1 saved (7 s" in text
    second.on_multirun_end(config_of(tmp_path, 0))
    text = capsys.readouterr().out
    assert "sweep: 0 run(s) finished, 1 failed\n" in text
    assert "failed: seed=7\n  DataError: row 3 is empty" in text
    (folder,) = tmp_path.glob("sweep-*")
    assert f"retry:   python -m alignbench.retry {folder}/sweep.json\n" in text
    assert [path.name for path in folder.iterdir()] == ["sweep.json"]  # no notes are left


def test_a_record_that_vanished_is_a_failure_and_hides_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = SweepTable()
    callback.on_multirun_start(config_of(tmp_path, 0))
    jobs = [ended(seed) for seed in range(2)]
    record_of(jobs[1], tmp_path)
    for seed, job in enumerate(jobs):
        callback.on_job_end(config_of(tmp_path, seed), job)
    callback.on_multirun_end(config_of(tmp_path, 0))
    text = capsys.readouterr().out
    assert "1 run(s) finished, 1 failed" in text
    assert "its record cannot be read" in text


def test_single_runs_and_plans_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SweepTable().on_job_end(config_of(tmp_path, 0), ended(0))
    callback = SweepTable()
    callback.on_multirun_start(config_of(tmp_path, 0))
    callback.on_job_end(config_of(tmp_path, 0, plan=True), ended(0, ValueError("no plan")))
    callback.on_multirun_end(config_of(tmp_path, 0))
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_sharing_counts_every_use() -> None:
    def stage(key: str, built: bool, seconds: float) -> dict[str, Any]:
        return {"key": key, "built": built, "cost": {"seconds": seconds}}

    runs = [
        {"stages": [stage("a", True, 10.0), stage("b", True, 1.0)]},
        {"stages": [stage("a", False, 10.0), stage("c", False, 5.0)]},
        {"stages": [stage("a", False, 10.0), {"key": "d", "built": True, "cost": {}}]},
    ]
    used = sharing(runs)
    assert used == {"uses": 6, "distinct": 4, "built": 3, "saved": 3, "saved_seconds": 25.0}
    assert sharing_text(used).startswith("stages: 6 uses of 4 artifacts; 3 built now, 3 saved (25 s")


def test_the_module_imports_nothing_heavy() -> None:
    heavy = ("torch", "matplotlib", "scipy", "numpy")
    code = f"import sys, alignbench.sweep; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"


def test_a_preset_s_grid_counts_among_the_expected_jobs_unless_the_command_line_says_otherwise() -> None:
    sweeper = {
        "_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        "params": {"a": "1,2,3", "b": "[1],[2]"},
    }
    for task, jobs in (([], 6), (["seed=0,1"], 12), (["b=[1]", "seed=0,1"], 6), (["a=7,8"], 4)):
        config = OmegaConf.create({"hydra": {"sweeper": sweeper, "overrides": {"task": task}}})
        assert _expected(config) == jobs
