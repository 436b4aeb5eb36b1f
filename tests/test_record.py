"""The record: complete, adding up, and free of this machine's folders and secrets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from tiny_runs import STATED, TOP, Run, run, shared_tiny

from alignbench import __version__
from alignbench.record import SCHEMA, git_commit, portable, read_records, write_record, write_training
from alignbench.report.runs import collect, per_prompt, training_curves
from alignbench.store import Store


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return shared_tiny(tmp_path_factory)


def test_training_curves_lie_beside_it(tiny: Run) -> None:
    curves, fault = training_curves(tiny.record, tiny.folder)
    assert fault == ""
    assert curves is not None
    assert list(curves) == ["sft", "prefer reward", "prefer reward -> safety"]
    for stage, rows in curves.items():  # short ones are whole
        assert rows == tiny.artifact(stage).jsonl("log.jsonl")


def test_a_long_curve_is_thinned_but_keeps_its_end_and_what_was_validated(tmp_path: Path) -> None:
    log = [{"step": float(t), "loss": 1.0 / t} | ({"validation_loss": 0.5} if t == 333 else {}) for t in range(1, 1002)]

    class Result:
        manifest: ClassVar = {"files": ["log.jsonl"]}

        def jsonl(self, _: str) -> list[dict[str, float]]:
            return log

    node = SimpleNamespace(label="sft", result=Result())
    record = {"training": write_training(tmp_path, {"k": node})}  # type: ignore[dict-item]
    curves, _ = training_curves(record, tmp_path)
    assert curves is not None
    steps = [row["step"] for row in curves["sft"]]
    assert steps == sorted({*map(float, range(5, 1002, 5)), 333.0, 1001.0})


def test_what_is_in_it(tiny: Run) -> None:
    record = tiny.record
    assert record["schema"] == SCHEMA
    assert record["status"] == "finished"
    assert record["alignbench"] == __version__
    assert record["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", record["commit"])
    assert (record["commit"] is None) == (git_commit() is None)
    assert {"python", "torch", "transformers", "deepspeed", "alignbench"} <= set(record["versions"])
    assert all(record["versions"].values())
    config = record["config"]
    groups = {"method", "model", "dataset", "constraint", "hardware", "evaluate", "judge", "scorers", "benchmark"}
    # all of it, but for Hydra's part and local folders
    assert set(config) == groups | {"tracking", "scale", "seed", "plan", "data", "tuned_by"}
    assert config["constraint"]["thresholds"] == [0.1]
    assert (config["hardware"]["dtype"], config["hardware"]["zero_stage"]) == ("fp32", 0)
    assert (record["method"], record["seed"]) == ("sacpo", 0)
    assert record["run_id"] == tiny.folder.name
    assert record["tuned_by"] is None
    assert list(record["rows"]) == ["sft", "step reward", "sacpo"]
    assert (
        record["rows"]["sacpo"]["policy"]
        == record["outcome"]["policies"]["sacpo"]
        == tiny.key("prefer reward -> safety")
    )
    assert record["rows"]["sft"]["policy"] == tiny.key("sft")
    assert record["data"]["sft: truncation"]["n"] == 48
    assert record["data"]["label pairs: report"]["n_kept"] > 0


def test_it_is_json_and_reads_back(tiny: Run, tmp_path: Path) -> None:
    assert json.loads(json.dumps(tiny.record, allow_nan=False)) == tiny.record
    path = write_record(tmp_path / "b", tiny.record)
    write_record(tmp_path / "a" / "c", tiny.record | {"seed": 1})
    assert path.name == "record.json"
    assert [record["seed"] for record in read_records(tmp_path)] == [1, 0]
    assert not list(tmp_path.rglob("*.tmp"))


def test_values_per_prompt_lie_beside_it(tiny: Run) -> None:
    runs = collect(tiny.folder)
    assert runs.notes == []
    found, fault = per_prompt(tiny.record, runs.folders[tiny.record["run_id"]])
    assert fault == ""
    assert found is not None
    assert list(found) == list(tiny.record["rows"])
    for name, table in found.items():
        metrics = tiny.record["rows"][name]["metrics"]
        for metric in ("reward", "safety", "politeness", "kl", "length", "unsafe_rate", "refusal_rate"):
            assert table[metric].mean() == pytest.approx(metrics[metric]["mean"], abs=1e-12)


def test_costs_add_up(tiny: Run) -> None:
    cost = tiny.record["cost"]
    manifests = [Store(tiny.store).find(stage["key"]).manifest["cost"] for stage in tiny.record["stages"]]
    for name in ("trained_tokens", "generated_tokens", "scored_tokens", "optimizer_steps", "seconds"):
        assert cost["total"][name] == pytest.approx(sum(m.get(name, 0.0) for m in manifests)), name
        assert cost["total"][name] > 0
    assert cost["peak"]["peak_rss_bytes"] == max(m.get("peak_rss_bytes", 0.0) for m in manifests)
    assert [stage["cost"] for stage in tiny.record["stages"]] == manifests
    assert cost["stages"] == len(tiny.record["stages"]) == cost["stages_built_now"]
    assert cost["policies_trained"] == 3


def test_tokens_are_those_of_the_tables(tiny: Run) -> None:
    costs = {stage["label"]: stage["cost"] for stage in tiny.record["stages"]}
    answers = tiny.artifact("sample sacpo").jsonl("responses.jsonl")
    assert costs["sample sacpo"]["generated_tokens"] == sum(len(r["response_ids"]) for r in answers)
    assert costs["sft"]["optimizer_steps"] == 3  # one pass over 48 demonstrations in batches of 16
    # every batch is all training pairs: a step trains their tokens, which the reference's pass scored once
    steps = int(tiny.record["config"]["method"]["reward_step"]["train"]["epochs"])
    assert costs["prefer reward"]["optimizer_steps"] == steps
    splits = [r["split"] for r in tiny.artifact("label pairs").jsonl("pairs.jsonl")]
    per_step = costs["reference log-probs for prefer reward"]["scored_tokens"] * splits.count("train") / len(splits)
    assert costs["prefer reward"]["trained_tokens"] == pytest.approx(steps * per_step, rel=0.2)


def test_a_second_runs_cost_counts_from_nothing(tiny: Run, tmp_path: Path) -> None:
    again = run(tiny.store, tmp_path / "out", STATED).record
    assert again["cost"]["total"] == tiny.record["cost"]["total"]
    assert again["cost"]["stages_built_now"] == 0


def test_no_folder_and_no_secret_of_this_machine(tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secretvalue")
    monkeypatch.setenv("HF_TOKEN", "secretvalue")
    done = run(tiny.copied(tmp_path / "store"), tmp_path / "out", "method=dpo_safe")
    files = [path for path in done.folder.rglob("*") if path.is_file()]
    assert {"record.json", "table.md", "generations.jsonl", "trade_off.png"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert b"secretvalue" not in content, path
        for folder in (str(tmp_path), str(TOP), str(Path.home()) + "/"):
            assert folder.encode() not in content, f"{folder} in {path}"
    for manifest in (tmp_path / "store").rglob("manifest.json"):
        text = manifest.read_text()
        assert "secretvalue" not in text
        assert str(tmp_path) not in text


def test_of_an_absolute_path_only_the_name_stays() -> None:
    config = {"a": {"path": "/home/me/data/pairs.jsonl", "n": 1}, "b": ["/x/y", "z/w"], "c": None, "d": "owner/name"}
    assert portable(config) == {"a": {"path": "pairs.jsonl", "n": 1}, "b": ["y", "z/w"], "c": None, "d": "owner/name"}
    assert config["a"] == {"path": "/home/me/data/pairs.jsonl", "n": 1}


def test_generations_show_every_policy_on_the_same_prompts(tiny: Run) -> None:
    rows = [json.loads(line) for line in (tiny.folder / "generations.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert {"prompt", "sft", "step reward", "sacpo", "sacpo safety"} <= set(row)
    first = tiny.artifact("sample sacpo").jsonl("responses.jsonl")[0]
    assert {row["prompt"]: row["sacpo"] for row in rows}[first["prompt"]] == first["response"]


@pytest.mark.parametrize(("beta", "followed"), [(0.5, True), (0.1, False)])
def test_a_named_search_goes_into_the_record(tiny: Run, tmp_path: Path, beta: float, followed: bool) -> None:
    search = {"what": "a search", "chosen": {"sacpo": {"constraint.beta": beta}}, "rows": [{"kl": 1.0}]}
    (tmp_path / "search.json").write_text(json.dumps(search))
    done = run(tiny.store, tmp_path / "out", STATED, f"tuned_by={tmp_path / 'search.json'}")
    assert done.record["tuned_by"] == {"file": "search.json", "followed": followed, **search}
    assert done.record["run_id"] == tiny.record["run_id"]
