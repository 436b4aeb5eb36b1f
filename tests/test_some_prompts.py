"""Some of a data set's prompts and responses, drawn for a look: which, what is said of them, what a plan counts."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from own_files import PROMPTS, on_files, save_model, write
from tiny_runs import run

from alignbench.data.readers import some_prompts
from alignbench.dataset import FilesConfig, SourceConfig
from alignbench.errors import ConfigError


def rows_of(prompts: int, responses: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"prompt {i}", "response": f"response {k}", "reward": float(k), "safety": float(-k)}
        for i in range(prompts)
        for k in range(responses)
    ]


def texts(rows: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(row["prompt"], row["response"]) for row in rows}


@given(
    shuffled=st.randoms(use_true_random=False),
    seed=st.integers(0, 2**31),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)).map(sorted),
    answers=st.tuples(st.integers(1, 6), st.integers(1, 6)).map(sorted),
)
def test_a_draw_is_of_texts_and_seed_alone_and_grows(
    shuffled: Random, seed: int, sizes: list[int], answers: list[int]
) -> None:
    rows = rows_of(12, 6)
    other = rows[:]
    shuffled.shuffle(other)
    small = some_prompts(rows, sizes[0], seed, responses=answers[0])
    large = some_prompts(other, sizes[1], seed, responses=answers[1])
    assert texts(small) <= texts(large)
    assert texts(some_prompts(other, sizes[0], seed, responses=answers[0])) == texts(small)
    assert len(small) == sizes[0] * answers[0]
    assert len({row["prompt"] for row in small}) == sizes[0]
    assert small == [row for row in rows if row in small], "in their order"


def test_zero_keeps_all_and_seeds_differ() -> None:
    rows = rows_of(30, 4)
    assert some_prompts(rows, 0, 0) == rows
    assert len(some_prompts(rows, 0, 0, responses=2)) == 60
    assert some_prompts(rows, 10, 0) != some_prompts(rows, 10, 1)
    assert some_prompts(rows, 99, 0, responses=9) == rows
    # white space about a prompt does not make two of it, as in a split
    spaced = [*rows, {"prompt": " prompt 3\n", "response": "another"}]
    assert len({row["prompt"].strip() for row in some_prompts(spaced, 30, 0)}) == 30
    assert some_prompts(spaced, 30, 0) == spaced


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def test_a_run_on_some_responses(model: Path, tmp_path: Path) -> None:
    answers = rows_of(40, 6)
    base = [o for o in on_files(tmp_path, model) if not o.startswith(("dataset=", "dataset.files.pairs"))]
    path = write(tmp_path / "scored.jsonl", answers)
    done = run(
        tmp_path / "store", tmp_path / "out",
        base=(*base, "dataset=responses", f"dataset.files.responses.path={path}", "evaluate=data", "method=sft",
              "dataset.files.most_prompts=20", "dataset.files.responses_per_prompt=3"),
    )  # fmt: skip
    kept = done.artifact("data").jsonl("answers.jsonl")
    assert texts(kept) == texts(some_prompts(answers, 20, 0, responses=3))
    assert done.record["data"]["data: report"]["drawn"] == {"prompts": "20 of 40", "rows": "60 of 240"}
    assert {row["prompt"] for row in done.artifact("data").jsonl("prompts.jsonl")} == {row["prompt"] for row in kept}


def test_a_run_on_some_pairs_and_demonstrations(model: Path, tmp_path: Path) -> None:
    """Nine prompts of each, whatever the other table has."""
    shown = [{"prompt": f"Show {i}?", "response": "Like this."} for i in range(50)]
    base = on_files(tmp_path, model, "method=sft", "dataset.files.most_prompts=9", demonstrations=shown, sft=True)
    done = run(tmp_path / "store", tmp_path / "out", base=base)
    data = done.artifact("data")
    assert len({row["prompt"] for row in data.jsonl("pairs.jsonl")}) == 9
    report = data.json("report.json")
    assert report["drawn"] == {"prompts": f"9 of {len(PROMPTS)}", "rows": f"18 of {2 * len(PROMPTS)}"}
    kept = data.jsonl("demonstrations.jsonl")
    assert len(kept) + report["demonstrations"]["held_out"] == 9
    assert {row["prompt"] for row in kept} <= {row["prompt"] for row in shown}


def test_a_plan_counts_what_is_drawn() -> None:
    pairs = FilesConfig(pairs=SourceConfig("a"), expected_pairs=1000)
    assert (pairs.counted_pairs, pairs.counted_prompts) == (1000.0, 1000.0)
    pairs.most_prompts = 50
    assert (pairs.counted_pairs, pairs.counted_prompts) == (50.0, 50.0)
    scored = FilesConfig(responses=SourceConfig("a"), expected_pairs=1600, pairs_per_prompt=16)
    assert scored.counted_prompts == 100.0
    scored.most_prompts = 50
    assert (scored.counted_pairs, scored.counted_prompts) == (800.0, 50.0)
    scored.most_prompts = 500
    assert scored.counted_pairs == 1600.0, "no more than there are"


@pytest.mark.parametrize(
    ("override", "where", "mend"),
    [
        ("dataset.files.most_prompts=0", "dataset.files.most_prompts", "at least 1"),
        ("dataset.files.responses_per_prompt=3", "dataset.files.responses_per_prompt", "most_prompts"),
        ("dataset.files.responses_per_prompt=1", "dataset.files.responses_per_prompt", "at least 2"),
    ],
)
def test_draws_that_cannot_be(model: Path, tmp_path: Path, override: str, where: str, mend: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run(tmp_path / "store", tmp_path / "out", base=on_files(tmp_path, model, "method=sft", override))
    assert refused.value.where == where
    assert mend in refused.value.mend
