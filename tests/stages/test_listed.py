"""Listed answers: the list as responses, draws from a policy renormalised on it, and their log-probs."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file, save_file

from alignbench.engine.batching import Row
from alignbench.errors import DataError, InvariantError
from alignbench.models import policy as policies
from alignbench.stages import LOGPROBS, SAMPLE, Context, Facts, Runtime
from alignbench.stages.listed import (
    DRAW,
    LIST,
    LISTED_WORLD,
    LOOKUP,
    DrawSpec,
    ListedWorldSpec,
    ListSpec,
    LookupSpec,
    list_log_weights,
)
from alignbench.stages.measure import LogProbsSpec
from alignbench.stages.stage import Stage
from alignbench.stages.tokens import TokenSpec
from alignbench.store import Artifact, Identity, Store
from alignbench.worlds.handbook import WorldSpec

ANSWERS = 6
# the tiny tokenizer knows no words: an answer is about one token per letter
TOKENS = TokenSpec("plain", 300, 60)
SIZES = {"train_prompts": 6, "validation_prompts": 2, "test_prompts": 4, "demonstrations": 30}


class Chain:
    """Runs stages through a store of its own."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)

    def run(self, stage: Stage, spec: Any, inputs: dict[str, Artifact], seed: int = 0) -> Artifact:
        identity = Identity(stage.name, stage.version, stage.kind, spec, {r: a.key for r, a in inputs.items()}, seed)

        def produce(workspace: Any) -> None:
            runtime = Runtime(tiny.hardware(eval_batch=16))
            stage.run(
                Context(spec, inputs, seed, workspace.out, workspace.work, workspace.cost, runtime, lambda *_: None)
            )

        return self.store.obtain(identity, produce)[0]

    def made(self, kind: str, name: str, inputs: dict[str, Artifact], write: Any) -> Artifact:
        """An artifact made by hand."""
        identity = Identity(f"made {name}", 1, kind, {"name": name}, {r: a.key for r, a in inputs.items()}, 0)
        return self.store.obtain(identity, lambda workspace: write(workspace.out))[0]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("listed") / "store")


def policy(chain: Chain, seed: int) -> Artifact:
    # not enlarged: random weights of the usual size leave every answer a chance
    model = policies.build_llama(replace(tiny.SHAPE, max_positions=300), tiny.tokenizer(), seed)
    return chain.made("policy", f"policy {seed}", {}, lambda out: tiny.save(model, out / "policy"))


@pytest.fixture(scope="module")
def world(chain: Chain) -> Artifact:
    return chain.run(LISTED_WORLD, ListedWorldSpec(WorldSpec(**SIZES), ANSWERS), {})


@pytest.fixture(scope="module")
def reference(chain: Chain) -> Artifact:
    return policy(chain, 0)


@pytest.fixture(scope="module")
def listed(chain: Chain, world: Artifact, reference: Artifact) -> Artifact:
    return chain.run(LIST, ListSpec(("train", "test"), TOKENS), {"data": world, "policy": reference})


def on_list(chain: Chain, listed: Artifact, policy: Artifact) -> Artifact:
    return chain.run(LOGPROBS, LogProbsSpec("responses", TOKENS, "fp32"), {"policy": policy, "rows": listed})


@pytest.fixture(scope="module")
def real(chain: Chain, listed: Artifact, reference: Artifact) -> Artifact:
    """Log-probs of a real (random) Llama on the list."""
    return on_list(chain, listed, reference)


def logprobs(chain: Chain, listed: Artifact, values: np.ndarray, name: str) -> Artifact:
    """Log-probs of one's own for the list."""
    return chain.made(
        "logprobs",
        name,
        {"rows": listed},
        lambda out: save_file({"response": np.asarray(values, dtype=np.float64)}, out / "responses.safetensors"),
    )


@pytest.fixture(scope="module")
def smooth(chain: Chain, listed: Artifact) -> Artifact:
    """A policy with answer probabilities between a few percent and a half, and a tenth of its mass off the list."""
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.full(ANSWERS, 4.0), len(listed.jsonl("responses.jsonl")) // ANSWERS)
    return logprobs(chain, listed, np.log(0.9 * weights).reshape(-1), "smooth")


def draw(chain: Chain, listed: Artifact, policy: Artifact, spec: DrawSpec, seed: int = 0) -> Artifact:
    return chain.run(DRAW, spec, {"listed": listed, "logprobs": policy}, seed)


def values(artifact: Artifact) -> np.ndarray:
    return load_file(artifact.path("responses.safetensors"))["response"]


# ---------------------------------------------------------------- the world and its list


def test_the_world_has_the_handbooks_columns_and_a_list(world: Artifact) -> None:
    prompts, shown, answers = (world.jsonl(f"{n}.jsonl") for n in ("prompts", "demonstrations", "answers"))
    assert {"prompt_id", "prompt", "text", "split", "kind", "harm_category", "severity"} <= set(prompts[0])
    assert len(shown) == SIZES["demonstrations"]
    assert set(shown[0]) == {"prompt_id", "prompt", "response"}
    assert [(row["prompt_id"], row["answer"]) for row in answers] == [
        (prompt["prompt_id"], k) for prompt in prompts for k in range(ANSWERS)
    ]
    assert set(answers[0]) == {"prompt_id", "prompt", "split", "answer", "response", "features"}


def test_the_list_is_a_table_of_responses(chain: Chain, world: Artifact, listed: Artifact, real: Artifact) -> None:
    rows = listed.jsonl("responses.jsonl")
    wanted = [row for row in world.jsonl("answers.jsonl") if row["split"] in ("train", "test")]
    assert [row["response"] for row in rows] == [row["response"] for row in wanted]
    tokenizer = tiny.tokenizer()
    for row in rows:
        assert {"prompt_id", "prompt", "sample", "response", "response_ids", "finished", "answer"} <= set(row)
        assert row["sample"] == row["answer"]
        assert row["finished"] is True
        assert row["response_ids"][-1] == tiny.EOS
        assert tokenizer.decode(row["response_ids"], skip_special_tokens=True) == row["response"]
    assert values(real).shape == (len(rows),)


def test_an_answer_that_does_not_fit_is_refused(chain: Chain, world: Artifact, reference: Artifact) -> None:
    with pytest.raises(DataError, match="does not fit max_length 70"):
        chain.run(LIST, ListSpec(("test",), TokenSpec("plain", 70, 60)), {"data": world, "policy": reference})
    with pytest.raises(DataError, match="no listed answer"):
        chain.run(LIST, ListSpec(("other",), TOKENS), {"data": world, "policy": reference})


# ---------------------------------------------------------------- renormalisation


@given(arrays.arrays(np.float64, (3, 4), elements=st.floats(-2000, 0)), st.permutations(range(12)))
def test_renormalisation_is_exact(raw: np.ndarray, order: list[int]) -> None:
    raw = raw - np.log(12)  # a policy: no list has more than all of it
    rows = [{"prompt_id": f"p{i // 4}", "answer": i % 4} for i in order]
    weights = list_log_weights(rows, raw.reshape(-1)[order])
    total = np.bincount(weights.prompt, np.exp(weights.log_weights))
    np.testing.assert_allclose(total, 1, rtol=1e-12)
    for n, i in enumerate(order):
        own = raw[i // 4]
        expected = own[i % 4] - (own.max() + np.log(np.exp(own - own.max()).sum()))
        assert weights.log_weights[n] == pytest.approx(expected, abs=1e-9)
        assert weights.prompt_ids[weights.prompt[n]] == rows[n]["prompt_id"]
        assert weights.answer[n] == rows[n]["answer"]
    by_name = dict(zip(weights.prompt_ids, weights.mass, strict=True))
    np.testing.assert_allclose([by_name[f"p{i}"] for i in range(3)], np.exp(raw).sum(1), rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize(
    ("rows", "given_values", "message"),
    [
        ([{"prompt_id": "a", "answer": 0}], [-1.0, -2.0], "shape"),
        ([{"prompt_id": "a", "answer": 0}] * 2, [-1.0, -2.0], "twice"),
        ([{"prompt_id": "a", "sample": 0}], [-1.0], "no list"),
        ([], [], "no list"),
        ([{"prompt_id": "a", "answer": 0}], [np.nan], "no log-prob"),
        ([{"prompt_id": "a", "answer": 0}], [0.5], "no log-prob"),
        ([{"prompt_id": "a", "answer": 0}], [-np.inf], "no probability at all"),
    ],
)
def test_what_is_no_policy_on_a_list_is_refused(rows: list[Any], given_values: list[float], message: str) -> None:
    with pytest.raises(InvariantError, match=message):
        list_log_weights(rows, np.array(given_values))


# ---------------------------------------------------------------- draws


def test_draws_look_like_samples_and_are_answers_of_their_list(
    chain: Chain, listed: Artifact, smooth: Artifact
) -> None:
    rows = draw(chain, listed, smooth, DrawSpec(("train", "test"), 3)).jsonl("responses.jsonl")
    answers = {(row["prompt_id"], row["answer"]): row for row in listed.jsonl("responses.jsonl")}
    assert len(rows) == 3 * len(answers) // ANSWERS
    for row in rows:
        assert set(row) == {"prompt_id", "prompt", "sample", "response", "response_ids", "finished", "answer"}
        source = answers[row["prompt_id"], row["answer"]]
        assert all(row[name] == source[name] for name in ("prompt", "response", "response_ids", "finished"))
    assert [row["sample"] for row in rows] == [0, 1, 2] * (len(rows) // 3)


def test_draws_are_as_frequent_as_the_renormalised_policy_says(
    chain: Chain, listed: Artifact, smooth: Artifact
) -> None:
    count = 3000
    rows = draw(chain, listed, smooth, DrawSpec(("test",), count)).jsonl("responses.jsonl")
    table = listed.jsonl("responses.jsonl")
    weights = list_log_weights(table, values(smooth))
    drawn = Counter((row["prompt_id"], row["answer"]) for row in rows)
    statistic = 0.0
    for row, log_weight in zip(table, weights.log_weights, strict=True):
        if row["split"] == "test":
            expected = count * np.exp(log_weight)
            statistic += (drawn[row["prompt_id"], row["answer"]] - expected) ** 2 / expected
    assert statistic < 45.3  # chi-square, 4 prompts x 5 degrees of freedom, 0.1%


def test_more_draws_or_splits_or_prompts_do_not_change_earlier_draws(
    chain: Chain, listed: Artifact, smooth: Artifact
) -> None:
    def answers(*spec: Any, seed: int = 0) -> dict[tuple[str, int], int]:
        rows = draw(chain, listed, smooth, DrawSpec(*spec), seed).jsonl("responses.jsonl")
        return {(row["prompt_id"], row["sample"]): row["answer"] for row in rows}

    few, many, both = answers(("test",), 5), answers(("test",), 40), answers(("train", "test"), 40)
    assert few.items() <= many.items() <= both.items()
    assert answers(("test",), 40, seed=1) != many
    own = np.array([[many[p, k] for k in range(40)] for p in dict.fromkeys(p for p, _ in many)])
    assert len({tuple(row) for row in own}) == len(own)  # prompts do not share their numbers


def test_features_are_left_out_and_the_rest_keeps_its_proportions(
    chain: Chain, listed: Artifact, smooth: Artifact
) -> None:
    table = listed.jsonl("responses.jsonl")
    rows = draw(chain, listed, smooth, DrawSpec(("train",), 2000, ("caution", "polite"))).jsonl("responses.jsonl")
    features = {(row["prompt_id"], row["answer"]): set(row["features"]) for row in table}
    assert not any(features[row["prompt_id"], row["answer"]] & {"caution", "polite"} for row in rows)
    weights = list_log_weights(table, values(smooth))
    first = rows[0]["prompt_id"]
    kept = {
        row["answer"]: float(np.exp(log_weight))
        for row, log_weight in zip(table, weights.log_weights, strict=True)
        if row["prompt_id"] == first and not set(row["features"]) & {"caution", "polite"}
    }
    assert 1 < len(kept) < ANSWERS
    drawn = Counter(row["answer"] for row in rows if row["prompt_id"] == first)
    for answer, weight in kept.items():
        share = weight / sum(kept.values())
        assert drawn[answer] / 2000 == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 2000))


def test_features_that_are_unknown_or_leave_nothing_are_refused(
    chain: Chain, listed: Artifact, smooth: Artifact
) -> None:
    with pytest.raises(DataError, match="unknown feature rude"):
        draw(chain, listed, smooth, DrawSpec(("test",), 1, ("rude",)))
    everything = ("refusal", "detail", "short", "caution", "polite", "mild", "long", "blunt")
    with pytest.raises(DataError, match="every answer to prompt"):
        draw(chain, listed, smooth, DrawSpec(("test",), 1, everything))


def test_an_answer_of_probability_zero_is_never_drawn(chain: Chain, listed: Artifact, smooth: Artifact) -> None:
    numbers = values(smooth).copy().reshape(-1, ANSWERS)
    numbers[:, [0, -1]] = -np.inf
    zero = logprobs(chain, listed, numbers.reshape(-1), "zero")
    rows = draw(chain, listed, zero, DrawSpec(("test",), 500)).jsonl("responses.jsonl")
    assert {row["answer"] for row in rows} == set(range(1, ANSWERS - 1))


def test_the_mass_on_the_list_is_reported_and_a_small_one_warned_about(
    chain: Chain, listed: Artifact, smooth: Artifact, real: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        mass = draw(chain, listed, smooth, DrawSpec(("test",), 7)).json("mass.json")
        assert not caplog.records
    assert mass == {"mean": pytest.approx(0.9), "min": pytest.approx(0.9), "prompts": SIZES["test_prompts"]}
    with caplog.at_level(logging.WARNING):
        mass = draw(chain, listed, real, DrawSpec(("test",), 7)).json("mass.json")
    assert mass["mean"] < 0.01  # a model that has learned nothing
    assert "of its probability on the listed answers" in caplog.text


# ---------------------------------------------------------------- log-probs of draws


def test_lookup_is_the_log_softmax_of_another_policy_over_the_list(
    chain: Chain, listed: Artifact, smooth: Artifact
) -> None:
    other = policy(chain, 1)
    rows = draw(chain, listed, smooth, DrawSpec(("train", "test"), 4))
    found = chain.run(LOOKUP, LookupSpec(), {"rows": rows, "listed": listed, "logprobs": on_list(chain, listed, other)})
    model = tiny.load(other.path("policy"))
    table = listed.jsonl("responses.jsonl")
    sequences = []
    for row in table:
        prompt = tiny.tokenizer()(row["prompt"] + "\n")["input_ids"]
        sequences.append(Row([*prompt, *row["response_ids"]], len(prompt)))
    own = torch.tensor(tiny.logprobs(model, sequences)).view(-1, ANSWERS).log_softmax(-1).view(-1).numpy()
    direct = {(row["prompt_id"], row["answer"]): own[i] for i, row in enumerate(table)}
    drawn = rows.jsonl("responses.jsonl")
    assert values(found).dtype == np.float64
    np.testing.assert_allclose(values(found), [direct[r["prompt_id"], r["answer"]] for r in drawn], atol=1e-4)
    assert found.kind == LOGPROBS.kind


# ---------------------------------------------------------------- what does not fit together


def test_parts_of_different_lists_are_refused(
    chain: Chain, world: Artifact, reference: Artifact, listed: Artifact, smooth: Artifact
) -> None:
    other = chain.run(LIST, ListSpec(("test",), TOKENS), {"data": world, "policy": reference})
    with pytest.raises(InvariantError, match=r"was made from .*, not from responses"):
        draw(chain, other, smooth, DrawSpec(("test",), 1))
    rows = draw(chain, listed, smooth, DrawSpec(("test",), 2))
    theirs = logprobs(chain, other, np.full(len(other.jsonl("responses.jsonl")), -3.0), "of the other list")
    with pytest.raises(InvariantError, match=r"was made from .*, not from responses"):
        chain.run(LOOKUP, LookupSpec(), {"rows": rows, "listed": other, "logprobs": theirs})
    with pytest.raises(InvariantError, match=r"was made from .*, not from responses"):
        chain.run(LOOKUP, LookupSpec(), {"rows": rows, "listed": listed, "logprobs": theirs})
    short = logprobs(chain, listed, np.full(3, -3.0), "too few")
    with pytest.raises(InvariantError, match="3 log-probs for a list of"):
        draw(chain, listed, short, DrawSpec(("test",), 1))


@pytest.mark.parametrize("splits", [("validation",), ("test", "validation"), ()])
def test_splits_that_are_not_on_the_list_are_refused(
    chain: Chain, listed: Artifact, smooth: Artifact, splits: tuple[str, ...]
) -> None:
    with pytest.raises(InvariantError, match="the list covers train, test"):
        draw(chain, listed, smooth, DrawSpec(splits, 1))


# ---------------------------------------------------------------- plans


def test_estimates_need_no_artifact_and_count_the_rows_that_there_will_be(
    chain: Chain, world: Artifact, listed: Artifact
) -> None:
    runtime, hints = Runtime(tiny.hardware()), {"prompts": 10.0, "answers": float(ANSWERS)}
    data = LISTED_WORLD.estimate(ListedWorldSpec(WorldSpec(**SIZES), ANSWERS), {}, runtime, {}).facts
    assert data.rows == len(world.jsonl("demonstrations.jsonl"))
    rows = LIST.estimate(ListSpec(("train", "test"), TOKENS), {"data": data, "policy": Facts()}, runtime, hints).facts
    assert rows.rows == len(listed.jsonl("responses.jsonl"))
    inputs = {"listed": rows, "logprobs": Facts(rows=rows.rows)}
    drawn = DRAW.estimate(DrawSpec(("train", "test"), 3), inputs, runtime, hints).facts
    assert (drawn.rows, drawn.tokens) == (30, rows.tokens)
    assert LOOKUP.estimate(LookupSpec(), inputs | {"rows": drawn}, runtime, hints).facts.rows == 30
    assert DRAW.kind == LIST.kind == SAMPLE.kind
