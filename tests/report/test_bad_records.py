"""One damaged run among good ones, in every subcommand: told, left out or shown without a number, never a crash."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compare_records import write_run

from alignbench.record import PER_PROMPT
from alignbench.report.__main__ import main

BAD = "a-0-0.2-0.5"
Record = dict[str, Any]


def judged(method: str) -> Record:
    """Ten judged prompts, six won."""
    triples = [[1.0, 0.0, 0.0]] * 6 + [[0.0, 0.0, 1.0]] * 4
    share = {"mean": 0.6, "low": 0.5, "high": 0.7, "n": 10, "clusters": 10, "level": 0.95}
    contest = {
        "row": method, "opponent": "sft", "criterion": "safety", "artifact": method, "cost": {},
        "win_rate": share, "win": share, "tie": share, "loss": share, "repeat_std": None, "order_bias": None,
        "longer_preferred": share, "counts": {"comparisons": 10, "judgements": 10, "judgements_missing": {}},
        "per_prompt": {"prompt_id": [f"p{i}" for i in range(10)], "verdicts": triples, "games": triples},
    }  # fmt: skip
    protocol = {"name": "choice", "source": "ours", "rule": "each", "tie": 0.5}
    return {"judge": "gold", "backend": "scorer", "protocol": protocol, "contests": [contest], "ratings": {}}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two methods, three seeds: measured, certified round by round, and judged."""
    for method in ("a", "b"):
        for seed in range(3):
            record = write_run(tmp_path, method, seed=seed, safety=0.5, prompts=12)
            path = tmp_path / record["run_id"] / "record.json"
            record["config"]["evaluate"]["level"] = 0.95
            certificate = {"gain_share": 0.9, "constraint_gap_share": 0.1, "margins": {"safety": 0.3}}
            for name in ("sft", method, "iterate 1"):
                row = record["rows"].setdefault(name, dict(record["rows"][method], policy=f"{name}-{seed}"))
                row["certificate"] = {"test": certificate | {"lagrangian_gap": 0.1}}
            record["outcome"]["trajectory"] = [
                {"iteration": 1, "policy": "iterate 1"},
                {"iteration": 2, "policy": method},
            ]
            path.write_text(json.dumps(record | {"judging": judged(method)}))
    return tmp_path


def edited(change: Callable[[Record], Any]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        path = folder / BAD / "record.json"
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    return damage


def file_of(content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / BAD / "record.json").write_bytes(content)


LEFT_OUT = {
    "half-written": (file_of(b'{"schema": 1, "rows": {'), "half-written or damaged"),
    "empty": (file_of(b""), "half-written or damaged"),
    "binary": (file_of(b"\xff\xfe\x00\x01"), "half-written or damaged"),
    "a list": (file_of(b"[]"), "no record but a JSON list"),
    "another schema": (edited(lambda r: r.update(schema=99)), "schema 99"),
    "an older schema": (edited(lambda r: r.pop("schema")), "schema None"),
    "still running": (edited(lambda r: r.update(status="running")), "status 'running'"),
    "no settings": (edited(lambda r: r.update(config={})), "no usable config"),
    "no rows": (edited(lambda r: r.update(rows={})), "its reported row 'a' is not there"),
    "a row that is nothing": (edited(lambda r: r["rows"].update(a=None)), "no usable rows.a"),
    "a seed in words": (edited(lambda r: r.update(seed="0")), "no usable seed"),
}
# faults that only some subcommands need to mind
ODD = {
    "no thresholds": edited(lambda r: r["config"]["constraint"].update(thresholds=None)),
    "a threshold too few": edited(lambda r: r["config"]["constraint"].update(thresholds=[])),
    "no evaluation settings": edited(lambda r: r["config"].pop("evaluate")),
    "no metrics": edited(lambda r: r["rows"]["a"].pop("metrics")),
    "no policy": edited(lambda r: r["rows"]["a"].pop("policy")),
    "a metric null": edited(lambda r: r["rows"]["a"]["metrics"].update(safety=None)),
    "a metric in words": edited(lambda r: r["rows"]["a"]["metrics"].update(safety="high")),
    "a metric NaN": edited(lambda r: r["rows"]["a"]["metrics"].update(safety={"mean": math.nan})),
    "a margin NaN": edited(lambda r: r["rows"]["a"]["constraints"]["safety"]["achieved_margin"].update(mean=math.nan)),
    "half a constraint": edited(lambda r: r["rows"]["a"]["constraints"]["safety"].pop("violation")),
    "no constraints": edited(lambda r: r["rows"]["a"].pop("constraints")),
    "a trajectory of nothing": edited(lambda r: r["outcome"].update(trajectory=[{"iteration": 1}])),
    "nothing judged": edited(lambda r: r.update(judging=None)),
    "judged nothing": edited(lambda r: r.update(judging={})),
    "no costs": edited(lambda r: r.update(cost={"total": None})),
    "no certificate": edited(lambda r: r["rows"]["a"].pop("certificate")),
    "no values per prompt": lambda folder: (folder / BAD / PER_PROMPT).unlink(),
    "a folder for a record": lambda folder: (
        (folder / BAD / "record.json").unlink(),
        (folder / BAD / "record.json").mkdir(),
    ),
}
COMMANDS: dict[str, list[str]] = {
    "summary": [], "each": ["--each"], "compare": ["compare"], "certificates": ["certificates"], "rounds": ["rounds"],
    "judging": ["judging"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, and not written: a hundred of them are the slow part."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda *args, **kwargs: None)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_cannot_be_used_is_told_and_left_out(
    sweep: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for damage, says in LEFT_OUT.values():
        whole = (sweep / BAD / "record.json").read_bytes()
        damage(sweep)
        assert main([*COMMANDS[command], str(sweep)]) == 0, says
        shown = capsys.readouterr()
        (line,) = [line for line in (shown.out + shown.err).splitlines() if f"left out: {BAD}" in line]
        assert says in line
        (sweep / BAD / "record.json").write_bytes(whole)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("fault", ODD)
def test_no_fault_of_one_run_stops_the_others(sweep: Path, command: str, fault: str) -> None:
    ODD[fault](sweep)
    assert main([*COMMANDS[command], str(sweep)]) == 0


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "judging"])
def test_missing_seeds_and_copies_are_told(sweep: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(sweep / BAD)
    shutil.copytree(sweep / "b-1-0.2-0.5", sweep / "copy")
    assert main([*COMMANDS[command], str(sweep)]) == 0
    shown = capsys.readouterr()
    text = shown.out + shown.err
    assert "copy is a copy of b-1-0.2-0.5" in text or "b-1-0.2-0.5 is a copy of copy" in text
    (line,) = [line for line in text.splitlines() if "a @ 0.2" in line and "missing" in line]
    assert "seed 0 missing, seeds 1, 2 there" in line
