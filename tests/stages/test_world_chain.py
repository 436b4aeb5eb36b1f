"""The embedded world's chain: prompts, demonstrations, sampled pairs, their labels."""

from __future__ import annotations

import hashlib
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import Run, run, shared_tiny

from alignbench.config import HardwareConfig
from alignbench.data.schema import FIELDS_16, check_pairs
from alignbench.errors import DataError
from alignbench.jsonio import read_json, read_jsonl, write_jsonl
from alignbench.stages import LABEL, Context, Runtime
from alignbench.stages.data import LabelSpec
from alignbench.store import Artifact, Identity, Store
from alignbench.worlds import gold, handbook


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return shared_tiny(tmp_path_factory)


@pytest.fixture(scope="session")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Enough pairs to look at shares, from a policy that has learned to write the world's sentences."""
    folder = tmp_path_factory.mktemp("larger")
    sizes = (
        "dataset.world.train_prompts=40",
        "dataset.world.demonstrations=400",
        "dataset.world.pairs_per_prompt=6",
        "model.architecture.hidden_size=64",
        "model.sft.epochs=4",
        "model.sft.learning_rate=1e-2",
    )
    return run(folder / "store", folder / "out", "method=dpo_helpful", *sizes)


def test_pairs_are_in_the_16_field_schema_and_one_utility_more(tiny: Run) -> None:
    rows = tiny.artifact("label pairs").jsonl("pairs.jsonl")
    assert rows
    own = {"politeness_response_id", "prompt_id", "split", "kind"}
    for row in rows:
        assert set(row) == set(FIELDS_16) | own
        assert row["politeness_response_id"] in (0, 1)
        for k in (0, 1):
            assert row[f"response_{k}_sha256"] == hashlib.sha256(row[f"response_{k}"].encode()).hexdigest()
    _, report = check_pairs(rows, where="test", objectives=("reward", "safety", "politeness"))
    assert report.n_kept == len(rows)


def test_splits_are_disjoint_in_every_table(tiny: Run) -> None:
    prompts = tiny.artifact("world").jsonl("prompts.jsonl")
    by_split: dict[str, set[str]] = {}
    for row in prompts:
        by_split.setdefault(row["split"], set()).add(row["prompt"])
    assert {split: len(part) for split, part in by_split.items()} == {"train": 12, "validation": 4, "test": 6}
    assert len(set.union(*by_split.values())) == 22
    shown = {row["prompt"] for row in tiny.artifact("world").jsonl("demonstrations.jsonl")}
    assert shown <= by_split["train"]
    pairs = tiny.artifact("label pairs").jsonl("pairs.jsonl")
    assert {row["split"] for row in pairs} == {"train", "validation"}
    assert all(row["prompt"] in by_split[row["split"]] for row in pairs)
    asked = {row["prompt"] for row in tiny.artifact("sample sacpo").jsonl("responses.jsonl")}
    assert asked == by_split["test"]


def test_labels_are_consistent(larger: Run) -> None:
    rows = larger.artifact("label pairs").jsonl("pairs.jsonl")
    mixed = 0
    for row in rows:
        flags = (row["is_response_0_safe"], row["is_response_1_safe"])
        for k in (0, 1):
            assert (row[f"response_{k}_severity_level"] == 0) == flags[k]
            assert any(row[f"response_{k}_harm_category"].values()) != flags[k]
        if flags[0] != flags[1]:
            mixed += 1
            assert flags[row["safer_response_id"]]
        assert row["response_0"].strip() != row["response_1"].strip()
    assert mixed > 10


def test_pairs_are_the_policys_own_samples(larger: Run) -> None:
    rows = larger.artifact("label pairs").jsonl("pairs.jsonl")
    drawn = {(r["prompt"], r["response"]) for r in larger.artifact("sample pairs").jsonl("responses.jsonl")}
    assert all((row["prompt"], row[f"response_{k}"]) in drawn for row in rows for k in (0, 1))


def test_the_report_says_how_much_the_objectives_conflict(larger: Run, tiny: Run) -> None:
    for done in (larger, tiny):
        rows = done.artifact("label pairs").jsonl("pairs.jsonl")
        report = read_json(done.artifact("label pairs").path("report.json"))
        conflict = np.mean([row["better_response_id"] != row["safer_response_id"] for row in rows])
        assert report["statistics"]["conflict_share"] == pytest.approx(conflict)
        assert report["n_kept"] + report["identical_or_empty"] == done.record["config"]["dataset"]["world"][
            "pairs_per_prompt"
        ] * len({r["prompt"] for r in done.artifact("sample pairs").jsonl("responses.jsonl")})
        assert done.record["data"]["label pairs: report"] == report
    assert read_json(larger.artifact("label pairs").path("report.json"))["statistics"]["conflict_share"] >= 0.2


# ---------------------------------------------------------------- the stage alone


def artifact(store: Store, kind: str, files: dict[str, list[dict[str, Any]]]) -> Artifact:
    identity = Identity(kind, 1, kind, {"files": files}, {}, 0)

    def produce(workspace: Any) -> None:
        for name, rows in files.items():
            write_jsonl(workspace.out / name, rows)

    return store.obtain(identity, produce)[0]


def label(tiny: Run, folder: Path, responses: list[dict[str, Any]], *, seed: int, per_prompt: int) -> Path:
    """Run the stage on responses of one's own; its output folder."""
    store = Store(folder / "store")
    scores = gold.scores([r["prompt"] for r in responses], [r["response"] for r in responses])
    scored = [
        {"reward": float(r), "safety": float(-c), "politeness": float(p)}
        for r, c, p in zip(scores["reward"], scores["cost"], scores["politeness"], strict=True)
    ]
    out = folder / "out"
    out.mkdir(parents=True)
    LABEL.run(
        Context(
            spec=LabelSpec(("politeness",), per_prompt),
            inputs={
                "data": tiny.artifact("world"),
                "responses": artifact(store, "responses", {"responses.jsonl": responses}),
                "scores": artifact(store, "scores", {"scores.jsonl": scored}),
            },
            seed=seed,
            out=out,
            work=folder,
            cost={},
            runtime=Runtime(HardwareConfig("cpu", "fp32", 0)),
            on_metrics=lambda step, metrics: None,
        )
    )
    return out


def answers(tiny: Run, texts: list[str]) -> list[dict[str, Any]]:
    """The same answers to each of six training prompts."""
    chosen = [p for p in tiny.artifact("world").jsonl("prompts.jsonl") if p["split"] == "train"][:6]
    return [
        {"prompt_id": p["prompt_id"], "prompt": p["prompt"], "sample": k, "response": text}
        for p in chosen
        for k, text in enumerate(texts)
    ]


def test_identical_and_empty_pairs_are_left_out_and_counted(tiny: Run, tmp_path: Path) -> None:
    texts = ["Take it out. Wear gloves.", "Rinse it.", "Same.", "Same. ", "", "Rinse it."]
    out = label(tiny, tmp_path, answers(tiny, texts), seed=0, per_prompt=3)
    rows, report = read_jsonl(out / "pairs.jsonl"), read_json(out / "report.json")
    assert [(row["response_0"], row["response_1"]) for row in rows] == [tuple(texts[:2])] * 6
    assert report["identical_or_empty"] == 12
    assert report["n_kept"] == 6


def test_nothing_to_compare_is_refused(tiny: Run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pair of different answers"):
        label(tiny, tmp_path, answers(tiny, ["Same.", "Same."]), seed=0, per_prompt=1)


def test_labels_are_a_function_of_the_seed(tiny: Run, tmp_path: Path) -> None:
    texts = ["Take it out. Wear gloves.", "Rinse it.", "Thank you. Wait.", "Ask a friend."]

    def rows(name: str, seed: int) -> list[dict[str, Any]]:
        return read_jsonl(label(tiny, tmp_path / name, answers(tiny, texts), seed=seed, per_prompt=2) / "pairs.jsonl")

    assert rows("a", 0) == rows("b", 0)
    assert rows("c", 1) != rows("d", 0)


def test_labels_follow_the_scores_as_often_as_bradley_terry_says(tiny: Run, tmp_path: Path) -> None:
    names = [f.name for f in fields(handbook.Prompt)]
    rng = random.Random(0)
    responses = [
        {"prompt_id": p["prompt_id"], "prompt": p["prompt"], "sample": k, "response": text}
        for p in tiny.artifact("world").jsonl("prompts.jsonl")
        if p["split"] == "train"
        for k, text in enumerate(handbook.answer(handbook.Prompt(**{n: p[n] for n in names}), rng) for _ in range(100))
    ]
    rows = read_jsonl(label(tiny, tmp_path, responses, seed=0, per_prompt=50) / "pairs.jsonl")
    scores = [gold.scores([r["prompt"] for r in rows], [r[f"response_{k}"] for r in rows]) for k in (0, 1)]
    for column, score, sign in (("better", "reward", 1), ("safer", "cost", -1), ("politeness", "politeness", 1)):
        gap = sign * (scores[1][score] - scores[0][score])
        chosen = np.array([row[f"{column}_response_id"] for row in rows])[gap != 0]
        gap = gap[gap != 0]
        probability = 1 / (1 + np.exp(-np.abs(gap)))
        tolerance = 4 * float(np.sqrt((probability * (1 - probability)).sum())) / len(gap)
        assert probability.mean() - 0.5 > tolerance  # a flipped sign would show
        assert abs(float((chosen == (gap > 0)).mean()) - probability.mean()) < tolerance, column
