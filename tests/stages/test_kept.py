"""What is kept between the stages of a process: what would be made anew, in bounds, and nobody's own."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_chain import given as artifact

from alignbench import dual
from alignbench.errors import InvariantError
from alignbench.jsonio import write_jsonl
from alignbench.stages import dualize
from alignbench.stages.dualize import read_bank
from alignbench.stages.kept import Kept
from alignbench.store import Artifact, Store


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 12), max_size=60), st.integers(0, 20))
def test_the_latest_are_kept_up_to_the_bound(asked: list[int], most: int) -> None:
    made: list[int] = []

    def make(of: int) -> int:
        made.append(of)
        return of

    kept, latest = Kept[int](most, lambda value: value), []
    for of in asked:
        expected = of in latest
        before = len(made)
        assert kept.get(of, lambda of=of: make(of)) == of
        assert (len(made) == before) == expected
        latest = [each for each in latest if each != of] + [of]
        while sum(latest) > most:
            latest.pop(0)


def test_what_cannot_be_made_is_not_kept() -> None:
    kept = Kept[int](10, lambda value: value)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            kept.get("none", lambda: 1 // 0)
    assert kept.get("none", lambda: 3) == 3


@pytest.fixture(autouse=True)
def _no_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dualize._BANKS, "_values", {})


def scored(store: Store, seed: int, name: str = "") -> tuple[Artifact, Artifact]:
    """Six answers to each of four prompts, and scores of theirs that differ by the seed."""
    rows = [{"prompt_id": f"q{i // 6}", "sample": i % 6} for i in range(24)]
    values = np.random.default_rng(seed).normal(size=(24, 3))
    scores = [dict(zip(("reward", "safety", "politeness"), map(float, each), strict=True)) for each in values]
    responses = artifact(store, "responses", lambda out: write_jsonl(out / "responses.jsonl", rows))
    return responses, artifact(
        store,
        "scores",
        lambda out: write_jsonl(out / "scores.jsonl", scores),
        {"responses": responses},
        name=name or json.dumps(scores),
    )


def same(one: dual.Bank, other: dual.Bank) -> bool:
    arrays = ("reward", "utilities", "log_weights")
    return one.names == other.names and all(np.array_equal(getattr(one, a), getattr(other, a)) for a in arrays)


def test_a_bank_is_read_once_and_belongs_to_who_asked(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    responses, scores = scored(store, 0)
    first = read_bank(responses, scores, None, ["safety"])
    dual.reachable(first, [0.1])  # finds corners, which the bank remembers
    assert "_corners" in vars(first)
    monkeypatch.setattr(Artifact, "jsonl", None)  # nothing is read again
    again = read_bank(responses, scores, None, ["safety"])
    assert again is not first
    assert same(again, first)
    assert not {"_corners", "gain"} & set(vars(again))


def test_other_scores_or_utilities_are_another_bank(store: Store, tmp_path_factory: pytest.TempPathFactory) -> None:
    responses, scores = scored(store, 0)
    one = read_bank(responses, scores, None, ["safety"])
    both = read_bank(responses, scores, None, ["safety", "politeness"])
    assert both.names == ("safety", "politeness")
    assert not same(one, both)
    assert not same(one, read_bank(responses, scored(store, 1)[1], None, ["safety"]))
    # the same key in another store, other numbers
    for seed in (2, 3):
        elsewhere = Store(tmp_path_factory.mktemp("elsewhere") / "store")
        mine = scored(elsewhere, seed, name="the same")
        found = read_bank(*mine, None, ["safety"])
        assert found.reward[0, 0] == mine[1].jsonl("scores.jsonl")[0]["reward"]


def test_scores_of_other_responses_are_refused_also_when_kept(store: Store) -> None:
    responses, scores = scored(store, 0)
    read_bank(responses, scores, None, ["safety"])
    other = artifact(
        store, "responses", lambda out: write_jsonl(out / "responses.jsonl", [{"prompt_id": "q"}]), name="o"
    )
    with pytest.raises(InvariantError, match="made from"):
        read_bank(other, scores, None, ["safety"])
