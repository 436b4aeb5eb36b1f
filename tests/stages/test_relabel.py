"""Pseudo-preferences from scores, binary labels, and scores implied by aligned policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pair_chain import Chain, pair_table, stage
from pair_chain import given as artifact
from safetensors.numpy import load_file, save_file
from scipy.special import expit

from alignbench.errors import DataError, InvariantError
from alignbench.jsonio import write_json, write_jsonl
from alignbench.stages.relabel import ANNOTATE, IMPLICIT, RELABEL, AnnotateSpec, ImplicitSpec, RelabelSpec
from alignbench.store import Artifact, Store


class Scored:
    """Pairs with scores, and a multiplier of each utility."""

    def __init__(self, store: Store, rows: list[dict[str, Any]], multipliers: dict[str, float]) -> None:
        self.store = store
        pairs = [{"prompt": f"p{i}"} for i in range(len(rows))]
        self.pairs = artifact(store, "pairs", lambda out: write_jsonl(out / "pairs.jsonl", pairs), name=str(len(rows)))
        self.scores = self.scored(rows)
        self.multipliers = artifact(
            store,
            "multipliers",
            lambda out: write_json(out / "multipliers.json", {"multipliers": multipliers}),
            name=str(multipliers),
        )

    def scored(self, rows: list[dict[str, Any]]) -> Artifact:
        write = lambda out: write_jsonl(out / "scores.jsonl", rows)  # noqa: E731
        return artifact(self.store, "scores", write, {"responses": self.pairs}, name=str(rows))

    def relabel(self, kind: str, objective: str = "lagrangian", seed: int = 0, **spec: Any) -> Artifact:
        inputs = {"pairs": self.pairs, "scores": self.scores}
        inputs |= {"multipliers": self.multipliers} if objective == "lagrangian" else {}
        return stage(self.store, RELABEL, RelabelSpec(objective, kind, **spec), inputs, seed)

    def labels(self, *args: Any, **spec: Any) -> tuple[np.ndarray, np.ndarray]:
        found = load_file(self.relabel(*args, **spec).path("labels.safetensors"))
        return found["preferred"], found["probability"]


def pair_scores(reward: np.ndarray, safety: np.ndarray) -> list[dict[str, Any]]:
    return [{"reward": r.tolist(), "safety": s.tolist()} for r, s in zip(reward, safety, strict=True)]


# ---------------------------------------------------------------- labels from scores


def test_drawn_labels_have_the_sigmoid_of_the_score_difference_as_frequency(store: Store) -> None:
    """No KL weight stands inside: a beta of 0.1 there would turn 0.62 into 0.99."""
    each, differences = 3000, np.array([-2.0, -0.5, 0.0, 0.5, 3.0])
    wanted = np.repeat(differences, each)
    safety = np.stack([np.full(len(wanted), 1.0), np.full(len(wanted), 1.2)], 1)
    reward = np.stack([np.zeros(len(wanted)), wanted - 2.5 * 0.2], 1)  # r + 2.5 g differs by `wanted`
    scored = Scored(store, pair_scores(reward, safety), {"safety": 2.5})
    preferred, probability = scored.labels("bernoulli")
    for difference, drawn, p in zip(differences, preferred.reshape(5, each), probability.reshape(5, each), strict=True):
        expected = 1 / (1 + np.exp(-difference))
        np.testing.assert_allclose(p, expected, atol=1e-12)
        assert abs(drawn.mean() - expected) < 4.5 * np.sqrt(expected * (1 - expected) / each), difference
    # drawn anew for another iteration and for another seed, and the same again for the same
    again, _ = scored.labels("bernoulli")
    np.testing.assert_array_equal(again, preferred)
    for other, p in (scored.labels("bernoulli", draw=1), scored.labels("bernoulli", seed=1)):
        np.testing.assert_array_equal(p, probability)
        assert 0.1 < (other != preferred).mean() < 0.5
    soft, p = scored.labels("soft")
    np.testing.assert_array_equal(p, probability)
    np.testing.assert_array_equal(soft, preferred)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), multiplier=st.floats(0, 20), scale=st.sampled_from([1.0, 2.0, 10.0]))
def test_every_label_follows_from_the_weighted_scores(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, multiplier: float, scale: float
) -> None:
    number = st.floats(-8, 8).map(lambda v: round(v, 3))
    values = np.array(data.draw(st.lists(st.tuples(number, number, number, number), min_size=1, max_size=6)))
    reward, safety = values[:, :2], values[:, 2:]
    scored = Scored(Store(tmp_path_factory.mktemp("s")), pair_scores(reward, safety), {"safety": multiplier})
    difference = scale * ((reward[:, 1] - reward[:, 0]) + multiplier * (safety[:, 1] - safety[:, 0]))
    larger, probability = scored.labels("argmax", scale=scale)
    np.testing.assert_allclose(probability, expit(difference), rtol=1e-9, atol=1e-12)
    clear = np.abs(difference) > 1e-9
    np.testing.assert_array_equal(larger[clear], difference[clear] > 0)
    # responses change places: so do the labels
    turned = Scored(scored.store, pair_scores(reward[:, ::-1], safety[:, ::-1]), {"safety": multiplier})
    other, mirrored = turned.labels("argmax", scale=scale)
    np.testing.assert_allclose(mirrored, 1 - probability, atol=1e-9)
    np.testing.assert_array_equal(other[clear], 1 - larger[clear])
    # one objective alone knows no multiplier
    _, alone = scored.labels("soft", objective="safety")
    np.testing.assert_allclose(alone, expit(safety[:, 1] - safety[:, 0]), rtol=1e-9, atol=1e-12)


def test_the_summary_counts_labels_against_the_larger_score(store: Store) -> None:
    rng = np.random.default_rng(0)
    scored = Scored(store, pair_scores(rng.normal(size=(400, 2)), np.zeros((400, 2))), {"safety": 1.0})
    made = scored.relabel("bernoulli")
    preferred = load_file(made.path("labels.safetensors"))["preferred"]
    larger, _ = scored.labels("argmax")
    summary = made.json("summary.json")
    assert summary["against_the_larger_score"] == pytest.approx((preferred != larger).mean())
    assert 0.1 < summary["against_the_larger_score"] < 0.5
    assert summary["weights"] == {"reward": 1.0, "safety": 1.0}
    assert scored.relabel("argmax").json("summary.json")["against_the_larger_score"] == 0


def test_scores_of_other_pairs_are_refused(store: Store) -> None:
    rows = pair_scores(np.zeros((4, 2)), np.zeros((4, 2)))
    scored = Scored(store, rows, {"safety": 1.0})
    scored.scores = scored.scored(rows[:3])
    with pytest.raises(InvariantError, match="3 scored pairs for 4 pairs"):
        scored.relabel("bernoulli")


def test_a_utility_that_nobody_scored_is_refused_by_name(store: Store) -> None:
    scored = Scored(store, pair_scores(np.zeros((2, 2)), np.zeros((2, 2))), {"honesty": 1.0})
    with pytest.raises(DataError, match="no score honesty"):
        scored.relabel("soft")


# ---------------------------------------------------------------- scores implied by policies


def test_implied_scores_are_weighted_log_ratios_and_leave_out_what_truncation_dropped(tmp_path: Path) -> None:
    rows = pair_table(8)
    rows[2] |= {f"response_{k}": "kettle " * 100 + end for k, end in ((0, "one"), (1, "two"))}  # equal once cut
    chain = Chain(tmp_path / "store", rows)
    other = artifact(chain.store, "policy", lambda out: tiny.save(tiny.llama(seed=3), out / "policy"), name="other")
    own, base = (
        {
            int(i): (float(a), float(b))
            for file in ("train", "validation")
            for found in [load_file(cache.path(f"{file}.safetensors"))]
            for i, a, b in zip(found["index"], found["response_0"], found["response_1"], strict=True)
        }
        for cache in (chain.logprobs(other), chain.cached)
    )
    dropped = sorted(set(range(8)) - set(base))
    inputs = {"rows": chain.pairs, "reference": chain.cached, "reward": chain.logprobs(other), "safety": chain.cached}
    spec = ImplicitSpec("pairs", (("reward", 0.25), ("safety", 0.1)))
    made = stage(chain.store, IMPLICIT, spec, inputs)
    scores = made.jsonl("scores.jsonl")
    assert dropped == [2]
    for i, row in enumerate(scores):
        if i in dropped:
            assert row == {"reward": [None, None], "safety": [None, None]}
            continue
        expected = [0.25 * (mine - theirs) for mine, theirs in zip(own[i], base[i], strict=True)]
        assert row["reward"] == pytest.approx(expected, abs=1e-6)
        assert row["safety"] == [0.0, 0.0]  # the reference against itself
    # d of Algorithm 2: ln reference minus ln policy
    ratios = [theirs - mine for i in base for mine, theirs in zip(own[i], base[i], strict=True)]
    found = made.json("summary.json")["mean_log_ratio_reference_over_policy"]
    assert found == {"reward": pytest.approx(np.mean(ratios), abs=1e-5), "safety": 0.0}

    # the dropped pair has an even chance, counts as such, and is not trained on
    multipliers = chain.multipliers(safety=1.0)
    labelled = stage(
        chain.store,
        RELABEL,
        RelabelSpec("lagrangian", "soft"),
        {"pairs": chain.pairs, "scores": made, "multipliers": multipliers},
    )
    assert load_file(labelled.path("labels.safetensors"))["probability"][2] == 0.5
    assert labelled.json("summary.json")["without_score"] == 1
    chain.prefer({"labels": labelled}, objective="lagrangian", soft=True)
    other_rows = chain.on(chain.table(rows[:2] + rows[3:])).logprobs(other)
    with pytest.raises(InvariantError, match="not of the same rows"):
        stage(chain.store, IMPLICIT, spec, inputs | {"reward": other_rows})


def test_implied_scores_of_responses(store: Store) -> None:
    rng = np.random.default_rng(0)
    values = {name: rng.normal(-20, 3, 6).astype(np.float32) for name in ("reference", "reward")}
    tables = {
        name: artifact(
            store,
            "logprobs",
            lambda out, v=v: save_file({"response": v}, out / "responses.safetensors"),
            name=name,
        )
        for name, v in values.items()
    }
    rows = artifact(store, "responses", lambda out: write_jsonl(out / "responses.jsonl", [{}] * 6))
    made = stage(store, IMPLICIT, ImplicitSpec("responses", (("reward", 0.3),)), {"rows": rows} | tables)
    expected = 0.3 * (values["reward"].astype(float) - values["reference"])
    assert [row["reward"] for row in made.jsonl("scores.jsonl")] == pytest.approx(expected.tolist(), abs=1e-5)


# ---------------------------------------------------------------- binary labels


def binary(store: Store, utility: np.ndarray, draw: str, labels: int = 16, seed: int = 0) -> np.ndarray:
    rows = [{"reward": 0.0, "safety": float(u), "politeness": -float(u)} for u in utility]
    scores = artifact(store, "scores", lambda out: write_jsonl(out / "scores.jsonl", rows), name=str(utility.tolist()))
    made = stage(store, ANNOTATE, AnnotateSpec(("safety", "politeness"), labels, draw), {"scores": scores}, seed)
    found = load_file(made.path("binary.safetensors"))
    assert made.manifest["cost"]["binary_labels"] == len(utility) * labels * 2
    assert found["safety"].shape == found["politeness"].shape == (len(utility), labels)
    return np.stack([found["safety"], found["politeness"]])


def test_annotators_call_unsafe_what_costs(store: Store) -> None:
    """P(unsafe) = sigmoid(cost), and the cost is minus the utility."""
    utility = np.repeat([-3.0, -0.5, 0.0, 1.0, 2.0], 200)
    found = binary(store, utility, "bernoulli")
    for labels, sign in zip(found, (1, -1), strict=True):
        for value in np.unique(utility):
            expected, n = expit(-sign * value), 200 * 16
            assert abs(labels[utility == value].mean() - expected) < 4.5 * np.sqrt(expected * (1 - expected) / n)
    # independent of each other, within a response and between utilities, and of another seed's
    even = found[0][utility == 0].astype(float)
    assert abs(np.corrcoef(even[:, 0], even[:, 1])[0, 1]) < 0.25
    assert (found[0][utility == 0] != found[1][utility == 0]).mean() == pytest.approx(0.5, abs=0.05)
    assert (binary(store, utility, "bernoulli", seed=1) != found).any()


def test_a_judge_says_the_same_every_time(store: Store) -> None:
    found = binary(store, np.array([-1.0, 0.5, -0.1, 2.0]), "sign", labels=3)
    np.testing.assert_array_equal(found[0], np.repeat([[1], [0], [1], [0]], 3, axis=1))
    np.testing.assert_array_equal(found[1], np.repeat([[0], [1], [0], [1]], 3, axis=1))
