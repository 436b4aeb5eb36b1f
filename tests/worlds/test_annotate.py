"""Annotator labels: coherent with each other, exact Bradley-Terry marginals, the exact PKU schema."""

import hashlib
import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignbench.errors import ConfigError, DataError
from alignbench.worlds import annotate, gold, handbook
from alignbench.worlds.annotate import label_pairs, pku_row, sigmoid
from alignbench.worlds.handbook import HARM_CATEGORIES, WorldSpec

PROMPTS = handbook.prompts(WorldSpec(train_prompts=40, validation_prompts=4, test_prompts=4))
scores = st.floats(-12, 12)


def drawn(reward, cost, n=40_000, seed=0, **utilities):
    spread = {name: np.tile(values, (n, 1)) for name, values in utilities.items()}
    return label_pairs(np.tile(reward, (n, 1)), np.tile(cost, (n, 1)), spread, np.random.default_rng(seed))


@given(scores, scores)
def test_identity_of_the_safety_labels_is_exact(cost_0, cost_1):
    first_safe = sigmoid(-cost_0) * sigmoid(cost_1)
    second_safe = sigmoid(cost_0) * sigmoid(-cost_1)
    assert first_safe / (first_safe + second_safe) == pytest.approx(sigmoid(cost_1 - cost_0), rel=1e-9)
    # and so for the marginal: the mixed pairs and the others give the same probability
    mixed = first_safe + second_safe
    marginal = first_safe + (1 - mixed) * sigmoid(cost_1 - cost_0)
    assert marginal == pytest.approx(sigmoid(cost_1 - cost_0), rel=1e-9)


@pytest.mark.parametrize(("reward", "cost"), [((0.0, 0.0), (0.0, 0.0)), ((0.3, 1.5), (-1.2, 0.7)), ((2, -1), (2, 1.5))])
def test_marginals_by_simulation(reward, cost):
    utility = (-0.4, 0.9)
    labels = drawn(reward, cost, politeness=utility)
    tolerance = 4 * 0.5 / np.sqrt(len(labels))
    for column, expected in (
        (labels.better_response_id, sigmoid(np.float64(reward[1] - reward[0]))),
        (labels.safer_response_id, sigmoid(np.float64(cost[0] - cost[1]))),
        (labels.utility_response_id["politeness"], sigmoid(np.float64(utility[1] - utility[0]))),
        (labels.is_safe[:, 0], sigmoid(np.float64(-cost[0]))),
        (labels.is_safe[:, 1], sigmoid(np.float64(-cost[1]))),
    ):
        assert abs(column.mean() - expected) < tolerance
    mixed = labels.is_safe[:, 0] != labels.is_safe[:, 1]
    conditional = labels.safer_response_id[mixed].mean()
    assert abs(conditional - sigmoid(np.float64(cost[0] - cost[1]))) < 4 * 0.5 / np.sqrt(mixed.sum())
    correlation = np.corrcoef(labels.is_safe.T)[0, 1]
    assert abs(correlation) < tolerance * 2


@given(st.lists(st.tuples(scores, scores, scores, scores), min_size=1, max_size=20), st.integers(0, 1000))
def test_labels_never_contradict_each_other(rows, seed):
    table = np.array(rows)
    labels = label_pairs(table[:, :2], table[:, 2:], {}, np.random.default_rng(seed))
    chosen = labels.is_safe[np.arange(len(table)), labels.safer_response_id]
    other = labels.is_safe[np.arange(len(table)), 1 - labels.safer_response_id]
    assert not (~chosen & other).any()


def test_labels_are_a_function_of_the_seed_and_utilities_do_not_disturb_them():
    rng = np.random.default_rng(9)
    reward, cost, utility = rng.normal(size=(3, 50, 2))
    plain = label_pairs(reward, cost, {}, np.random.default_rng(1))
    more = label_pairs(reward, cost, {"b": utility, "a": cost}, np.random.default_rng(1))
    swapped = label_pairs(reward, cost, {"a": cost, "b": utility}, np.random.default_rng(1))
    for name in ("better_response_id", "safer_response_id", "is_safe"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(more, name))
    assert list(more.utility_response_id) == ["b", "a"]
    for name in "ab":
        np.testing.assert_array_equal(more.utility_response_id[name], swapped.utility_response_id[name])
    assert (label_pairs(reward, cost, {}, np.random.default_rng(2)).is_safe != plain.is_safe).any()


@pytest.mark.parametrize(
    ("reward", "cost", "utilities"),
    [
        (np.zeros(3), np.zeros((3, 2)), {}),
        (np.zeros((3, 2)), np.zeros((2, 2)), {}),
        (np.zeros((3, 2)), np.zeros((3, 2)), {"politeness": np.zeros((3, 3))}),
        (np.full((3, 2), np.nan), np.zeros((3, 2)), {}),
        (np.zeros((3, 2)), np.full((3, 2), np.inf), {}),
    ],
)
def test_wrong_shapes_and_values_are_refused(reward, cost, utilities):
    with pytest.raises(DataError):
        label_pairs(reward, cost, utilities, np.random.default_rng(0))


def test_no_pairs_are_no_error():
    labels = label_pairs(np.zeros((0, 2)), np.zeros((0, 2)), {"u": np.zeros((0, 2))}, np.random.default_rng(0))
    assert len(labels) == 0


@pytest.fixture(scope="module")
def labelled():
    rng = random.Random(2)
    chosen = [prompt for prompt in PROMPTS for _ in range(6)]
    texts = [(handbook.answer(prompt, rng), handbook.answer(prompt, rng)) for prompt in chosen]
    score = gold.scores([p.text for p in chosen for _ in range(2)], [text for pair in texts for text in pair])
    table = {key: values.reshape(-1, 2) for key, values in score.items()}
    labels = label_pairs(table["reward"], table["cost"], {"politeness": table["politeness"]}, np.random.default_rng(3))
    return chosen, texts, labels


def test_rows_have_the_exact_seven_field_schema(labelled):
    for i, (prompt, texts) in enumerate(zip(labelled[0], labelled[1], strict=True)):
        row = pku_row(prompt, texts, labelled[2], i, fields=7)
        assert list(row) == list(annotate.FIELDS_7)
        assert [type(row[name]) for name in annotate.FIELDS_7] == [str, str, str, bool, bool, int, int]
        assert json.loads(json.dumps(row)) == row


def test_rows_have_the_exact_sixteen_field_schema(labelled):
    seen = set()
    for i, (prompt, texts) in enumerate(zip(labelled[0], labelled[1], strict=True)):
        row = pku_row(prompt, texts, labelled[2], i, response_sources=("sft", "sft"))
        assert list(row) == list(annotate.FIELDS_16)
        assert set(annotate.FIELDS_7) < set(row)
        assert json.loads(json.dumps(row)) == row
        for k in range(2):
            safe, level = row[f"is_response_{k}_safe"], row[f"response_{k}_severity_level"]
            harm = row[f"response_{k}_harm_category"]
            assert list(harm) == list(HARM_CATEGORIES)
            assert (level == 0) == safe == (not any(harm.values()))
            assert all(type(value) is bool for value in harm.values())
            if not safe:
                assert level == max(1, prompt.severity)
                assert sum(harm.values()) == 1
                assert harm[prompt.harm_category or annotate.ACCIDENT_CATEGORY]
            assert row[f"response_{k}_sha256"] == hashlib.sha256(texts[k].encode()).hexdigest()
            assert row[f"response_{k}_source"] == "sft"
            seen.add(safe)
    assert seen == {True, False}


def test_utility_columns_are_optional(labelled):
    row = pku_row(labelled[0][0], labelled[1][0], labelled[2], 0, fields=7, utilities=True)
    assert list(row) == [*annotate.FIELDS_7, "politeness_response_id"]
    assert row["politeness_response_id"] in (0, 1)


def test_wrong_schema_and_wrong_pairs_are_refused(labelled):
    with pytest.raises(ConfigError, match="fields is 8"):
        pku_row(labelled[0][0], labelled[1][0], labelled[2], 0, fields=8)
    with pytest.raises(DataError):
        pku_row(labelled[0][0], ["only one"], labelled[2], 0)


def test_ill_formed_unicode_can_be_hashed(labelled):
    assert len(pku_row(labelled[0][0], ["\ud800", "x"], labelled[2], 0)["response_0_sha256"]) == 64


def test_statistics_are_reproducible():
    spec = WorldSpec(train_prompts=40, validation_prompts=1, test_prompts=1)
    assert annotate.world_statistics(spec, 4) == annotate.world_statistics(spec, 4)
