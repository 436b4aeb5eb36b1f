"""Features, bonuses and joined tables as stages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from pair_chain import TOKENS, Chain, given, pair_table, stage, weights
from safetensors.numpy import load_file, save_file

from alignbench.errors import ConfigError, DataError, InvariantError
from alignbench.models import policy as policies
from alignbench.stages import STAGES
from alignbench.stages.explore import BONUS, FEATURES, JOIN, BonusSpec, FeaturesSpec, JoinSpec, reduce_states
from alignbench.stages.stage import Facts, Runtime
from alignbench.stages.tokens import TokenSpec, encode_pairs
from alignbench.store import Artifact, read_json, write_jsonl

HIDDEN = tiny.SHAPE.hidden_size


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("explore") / "store")


def features(chain: Chain, pairs: Artifact | None = None, **changes: Any) -> Artifact:
    spec = FeaturesSpec(**({"table": "pairs", "dimension": 8, "tokens": TOKENS, "dtype": "fp32"} | changes))
    return stage(chain.store, FEATURES, spec, {"policy": chain.policy, "rows": pairs or chain.pairs})


def sides(artifact: Artifact) -> tuple[np.ndarray, np.ndarray]:
    table = load_file(artifact.path("features.safetensors"))
    return table["response_0"], table["response_1"]


def states(chain: Chain, pooling: str) -> np.ndarray:
    """Both responses of every pair, by one forward pass per sequence: (2 * pairs, hidden)."""
    folder = chain.policy.path("policy")
    model, tokenizer = tiny.load(folder), policies.load_tokenizer(folder)
    pairs = encode_pairs(chain.rows, range(len(chain.rows)), tokenizer, TOKENS)
    result = []
    for row in [*pairs.responses[0], *pairs.responses[1]]:
        with torch.no_grad():
            out = model(torch.tensor([list(row.ids)]), output_hidden_states=True)
        response = out.hidden_states[-1][0, row.prompt_length :].double().numpy()
        result.append(response[-1] if pooling == "last" else response.mean(0))
    return np.stack(result)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_features_are_scaled_hidden_states_where_nothing_else_is_asked(chain: Chain, pooling: str) -> None:
    found = np.concatenate(sides(features(chain, dimension=HIDDEN, pooling=pooling, centre="none")))
    expected = states(chain, pooling)
    expected /= np.linalg.norm(expected, axis=1).max()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.linalg.norm(found, axis=1).max() == pytest.approx(1.0, abs=1e-12)


def test_centring_takes_out_what_a_prompts_responses_share(chain: Chain) -> None:
    prompts = np.array([row["prompt"] for row in chain.rows] * 2)
    plain, by_prompt, by_table = (
        np.concatenate(sides(features(chain, dimension=HIDDEN, centre=centre))) for centre in ("none", "prompt", "all")
    )
    for prompt in set(prompts):
        np.testing.assert_allclose(by_prompt[prompts == prompt].mean(0), 0, atol=1e-12)
        assert np.abs(by_table[prompts == prompt].mean(0)).max() > 1e-3
    np.testing.assert_allclose(by_table.mean(0), 0, atol=1e-12)
    # up to the scale the difference of a pair's features is the same under any centring
    count = len(chain.rows)
    one, other = (found[:count] - found[count:] for found in (plain, by_prompt))
    ratio = np.linalg.norm(other) / np.linalg.norm(one)
    np.testing.assert_allclose(other, ratio * one, atol=1e-9)


def test_projection_is_seeded_and_nearly_keeps_angles(chain: Chain) -> None:
    first, again, other = (
        np.concatenate(sides(features(chain, **changes)))
        for changes in ({"dimension": 8}, {"dimension": 8, "pooling": "last"}, {"dimension": 8, "projection_seed": 1})
    )
    assert first.shape == (24, 8)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(40, 400))
    spec = FeaturesSpec("pairs", 200, TOKENS, "fp32", centre="none")
    narrow, scale = reduce_states(wide, ["p"] * 40, spec)
    lengths = np.linalg.norm(narrow / scale, axis=1) / np.linalg.norm(wide, axis=1)
    np.testing.assert_allclose(lengths, 0.5**0.5, rtol=0.2)  # sqrt(200 / 400)
    assert reduce_states(wide, ["p"] * 40, FeaturesSpec("pairs", 256, TOKENS, "fp32"))[0].shape == (40, 256)


def test_identical_states_give_zero_features() -> None:
    found, scale = reduce_states(np.ones((4, 6)), ["p"] * 4, FeaturesSpec("pairs", 3, TOKENS, "fp32"))
    np.testing.assert_array_equal(found, 0)
    assert scale == 1.0


def test_rows_that_truncation_drops_get_zeros_and_are_counted(chain: Chain) -> None:
    rows = pair_table(count=8, seed=2)
    same = "the quick brown fox jumps over the lazy dog"
    rows[3] |= {"response_0": same + " one", "response_1": same + " two"}  # cut to the same tokens
    artifact = features(chain, chain.table(rows), tokens=TokenSpec("plain", 14, 8))
    first, second = sides(artifact)
    assert first.shape == second.shape == (8, 8)
    dropped = read_json(artifact.path("summary.json"))["dropped"]
    assert dropped == read_json(artifact.path("truncation.json"))["dropped"] >= 1
    zero = ~(first.any(1) | second.any(1))
    assert zero[3]
    assert zero.sum() == dropped < 8
    found = bonus(chain, chain.table(rows), artifact)
    assert found[zero].max() == 0
    assert found[~zero].min() > 0


def responses(chain: Chain) -> tuple[Artifact, list[dict[str, Any]]]:
    rng = np.random.default_rng(4)
    rows = [
        {
            "prompt_id": f"p{i // 3}",
            "prompt": ["a small kettle", "jumps over"][i // 3],
            "response_ids": [] if i == 4 else [int(t) for t in rng.integers(2, tiny.VOCABULARY, 1 + i)],
        }
        for i in range(6)
    ]
    return given(chain.store, "responses", lambda out: write_jsonl(out / "responses.jsonl", rows)), rows


def test_responses_have_features_of_their_own(chain: Chain) -> None:
    artifact = features(chain, responses(chain)[0], table="responses")
    table = load_file(artifact.path("features.safetensors"))
    assert list(table) == ["response"]
    assert table["response"].shape == (6, 8)
    assert table["response"].any(1).tolist() == [True] * 4 + [False, True]  # an empty one says nothing
    assert read_json(artifact.path("summary.json"))["dropped"] == 1
    assert artifact.manifest["cost"]["scored_tokens"] > 0


@pytest.mark.parametrize("change", [{"table": "rows"}, {"pooling": "max"}, {"centre": "x"}, {"dimension": 257}])
def test_unknown_settings_are_refused(chain: Chain, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        features(chain, **change)


def test_one_pair_per_prompt_is_warned_of(chain: Chain, caplog: pytest.LogCaptureFixture) -> None:
    table = chain.table(pair_table(count=4, seed=6))
    found = bonus(chain, table, features(chain, table))
    assert "every prompt has one pair" in caplog.text
    np.testing.assert_allclose(found[:, 0], found[:, 1])
    spread = bonus(chain, table, features(chain, table, centre="all"))
    assert np.abs(spread[:, 0] - spread[:, 1]).max() > 1e-3


# ---------------------------------------------------------------- bonuses


def bonus_artifact(chain: Chain, pairs: Artifact, of: Artifact, ridge: float = 0.1) -> Artifact:
    return stage(chain.store, BONUS, BonusSpec(ridge), {"pairs": pairs, "features": of})


def bonus(chain: Chain, pairs: Artifact, of: Artifact, ridge: float = 0.1) -> np.ndarray:
    table = load_file(bonus_artifact(chain, pairs, of, ridge).path("bonus.safetensors"))
    return np.stack([table["bonus_0"], table["bonus_1"]], 1)


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_bonus_is_the_formula_on_the_training_split(chain: Chain, ridge: float) -> None:
    made = features(chain)
    first, second = sides(made)
    train = np.array([row["split"] == "train" for row in chain.rows])
    assert 0 < train.sum() < len(train)
    difference = (first - second)[train]
    inverse = np.linalg.inv(ridge * np.eye(8) + difference.T @ difference)
    expected = np.stack([np.sqrt(np.einsum("nd,de,ne->n", side, inverse, side)) for side in (first, second)], 1)
    np.testing.assert_allclose(bonus(chain, chain.pairs, made, ridge), expected, rtol=1e-8)
    summary = read_json(bonus_artifact(chain, chain.pairs, made, ridge).path("summary.json"))
    assert summary["pairs_in_sigma"] == train.sum()
    assert summary["mean"] == pytest.approx(expected[train].mean())
    assert summary["quantiles"]["0.5"] == pytest.approx(np.median(expected[train]))
    assert expected.max() <= summary["largest_possible"] == ridge**-0.5


def test_bonus_of_other_pairs_features_is_refused(chain: Chain) -> None:
    with pytest.raises(InvariantError, match="not from these pairs"):
        bonus(chain, chain.table(pair_table(count=12, seed=9)), features(chain))


def test_bonus_reaches_training(chain: Chain) -> None:
    made = {"bonus": bonus_artifact(chain, chain.pairs, features(chain))}
    assert weights(chain.prefer(made, bonus_weight=0.5)) != weights(chain.prefer(made))


def test_features_that_are_not_finite_are_refused(chain: Chain) -> None:
    table = {f"response_{k}": np.full((12, 2), np.nan) for k in (0, 1)}
    broken = given(
        chain.store,
        "features",
        lambda out: save_file(table, out / "features.safetensors"),
        {"rows": chain.pairs},
    )
    with pytest.raises(DataError, match="not finite"):
        bonus(chain, chain.pairs, broken)


# ---------------------------------------------------------------- joined tables


def joined(chain: Chain, spec: JoinSpec, **inputs: Artifact) -> Artifact:
    return stage(chain.store, JOIN, spec, inputs)


def parts(chain: Chain, count: int) -> dict[str, Artifact]:
    tables = [[row | {"round": n, "split": "train"} for row in pair_table(count=4, seed=n)] for n in range(count)]
    return {f"part_{n}": chain.table(table) for n, table in enumerate(tables)}


def test_join_is_the_parts_in_order(chain: Chain) -> None:
    inputs = parts(chain, 12)  # part_10 comes after part_9
    made = joined(chain, JoinSpec(), **dict(sorted(inputs.items())))
    rows = made.jsonl("pairs.jsonl")
    assert rows == [row for n in range(12) for row in inputs[f"part_{n}"].jsonl("pairs.jsonl")]
    assert [row["round"] for row in rows] == [n for n in range(12) for _ in range(4)]
    assert made.json("report.json") == {"n_rows": 48, "parts": [4] * 12}
    assert made.kind == "pairs"


def test_joined_labels_serve_a_prefer_stage(chain: Chain) -> None:
    inputs = parts(chain, 2)
    rng = np.random.default_rng(0)
    labels = {
        f"labels_{n}": chain.labels(rng.uniform(0, 1, 4), rng.integers(0, 2, 4), pairs=inputs[f"part_{n}"])
        for n in range(2)
    }
    made = joined(chain, JoinSpec(labels=True), **inputs, **labels)
    table = load_file(made.path("labels.safetensors"))
    one, other = (load_file(labels[f"labels_{n}"].path("labels.safetensors")) for n in range(2))
    for name in ("preferred", "probability"):
        np.testing.assert_array_equal(table[name], np.concatenate([one[name], other[name]]))
    swapped = {"labels_0": labels["labels_1"], "labels_1": labels["labels_0"]}
    with pytest.raises(InvariantError, match=r"labels_0 .* are not those of part_0"):
        joined(chain, JoinSpec(labels=True), **inputs, **swapped)
    trained = chain.on(made).prefer({"labels": made}, soft=True, train=tiny.settings(2, 8, batch_size=8))
    assert weights(trained) != weights(chain.policy)


def test_a_prompt_in_two_splits_is_refused(chain: Chain) -> None:
    first, second = (
        [row | {"split": split} for row in pair_table(4, seed)] for seed, split in ((0, "train"), (1, "v"))
    )
    with pytest.raises(InvariantError, match="split train of one part and v of another"):
        joined(chain, JoinSpec(), part_0=chain.table(first), part_1=chain.table(second))


def test_parts_are_numbered_without_a_gap(chain: Chain) -> None:
    inputs = parts(chain, 2)
    for wrong in ({"part_0": inputs["part_0"], "part_2": inputs["part_1"]}, {"other": inputs["part_0"]}):
        with pytest.raises(ConfigError, match="without a gap"):
            joined(chain, JoinSpec(), **wrong)
    with pytest.raises(ConfigError, match="without a gap: labels_0"):
        joined(chain, JoinSpec(labels=True), **inputs)


# ---------------------------------------------------------------- registration and plans


def test_stages_are_registered_and_estimate_without_data() -> None:
    runtime = Runtime(tiny.hardware())
    facts = {"policy": Facts(parameters=1e4), "rows": Facts(rows=100, tokens=50)}
    assert {STAGES[name] for name in ("features", "bonus", "join")} == {FEATURES, BONUS, JOIN}
    found = FEATURES.estimate(FeaturesSpec("pairs", 8, TOKENS, "fp32"), facts, runtime, {})
    assert found.scored_tokens == 5000
    assert found.flops == 2 * 1e4 * 5000
    assert found.facts.rows == 100
    assert BONUS.estimate(BonusSpec(1.0), {"pairs": Facts(rows=7)}, runtime, {}).facts.rows == 7
    inputs = {"part_0": Facts(rows=10, tokens=30), "part_1": Facts(rows=30, tokens=50), "labels_0": Facts(rows=99)}
    assert JOIN.estimate(JoinSpec(), inputs, runtime, {}).facts == Facts(rows=40, tokens=45)
