"""The prefer stage's optional inputs: labels, bonuses and multipliers from artifacts."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import tiny
from pair_chain import Chain, given, pair_table, weights
from safetensors.numpy import save_file

from alignbench.errors import AlignbenchError, ConfigError, DataError, InvariantError
from alignbench.models import policy as policies


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("prefer") / "store")


@pytest.fixture(scope="module")
def plain(chain: Chain) -> Any:
    """Trained on the table's own labels."""
    return chain.prefer()


def own_labels(chain: Chain) -> np.ndarray:
    return np.array([row["better_response_id"] for row in chain.rows])


def draws(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.05, 0.95, count)


# ---------------------------------------------------------------- labels


def test_labels_replace_the_column(chain: Chain, plain: Any) -> None:
    own = own_labels(chain)
    probability = draws(len(own))
    assert weights(chain.prefer({"labels": chain.labels(probability, own)})) == weights(plain)
    assert weights(chain.prefer({"labels": chain.labels(probability, 1 - own)})) != weights(plain)


def test_labels_stand_in_for_a_column_that_is_not_there(chain: Chain, plain: Any) -> None:
    own = own_labels(chain)
    artifact = chain.prefer({"labels": chain.labels(draws(len(own)), own)}, objective="lagrangian")
    assert weights(artifact) == weights(plain)
    with pytest.raises(DataError, match="a pair has no label lagrangian_response_id"):
        chain.prefer(objective="lagrangian")


def test_soft_labels_are_a_function_of_the_probabilities_alone(chain: Chain, plain: Any) -> None:
    own = own_labels(chain)
    probability = draws(len(own))
    one, other = (
        chain.prefer({"labels": chain.labels(probability, drawn)}, soft=True) for drawn in (own, np.zeros_like(own))
    )
    assert weights(one) == weights(other) != weights(plain)
    assert one.jsonl("log.jsonl") == other.jsonl("log.jsonl")


def test_certain_soft_labels_are_hard_labels(chain: Chain, plain: Any) -> None:
    own = own_labels(chain)
    soft = chain.prefer({"labels": chain.labels(own.astype(float), 1 - own)}, soft=True)
    for one, other in zip(soft.jsonl("log.jsonl"), plain.jsonl("log.jsonl"), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_labels_of_other_pairs_are_refused(chain: Chain) -> None:
    """Of as many pairs: positions would fit, and nothing else would tell."""
    labels = chain.labels(draws(12), own_labels(chain), pairs=chain.table(pair_table(count=12, seed=5)))
    with pytest.raises(InvariantError, match=r"prefer: labels .* was made from .*, not from pairs"):
        chain.prefer({"labels": labels})


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"preferred": np.zeros(11, dtype=np.int64), "probability": np.zeros(11)}, "shapes .* for 12 pairs"),
        ({"preferred": np.zeros(12, dtype=np.int64)}, "lacks probability"),
        ({"preferred": np.full(12, 2), "probability": np.zeros(12)}, "other than 0 and 1"),
        ({"preferred": np.zeros(12, dtype=np.int64), "probability": np.full(12, 1.5)}, "outside"),
        ({"preferred": np.zeros(12, dtype=np.int64), "probability": np.full(12, np.nan)}, "probability .* not finite"),
    ],
)
def test_misaligned_or_broken_labels_are_refused(chain: Chain, columns: dict[str, np.ndarray], says: str) -> None:
    labels = given(
        chain.store,
        "labels",
        lambda out: save_file(columns, out / "labels.safetensors"),
        {"pairs": chain.pairs},
        name=says,
    )
    with pytest.raises(AlignbenchError, match=says):
        chain.prefer({"labels": labels})


# ---------------------------------------------------------------- bonuses


def test_bonus_changes_training_in_proportion_to_its_weight(chain: Chain, plain: Any) -> None:
    values = np.random.default_rng(1).uniform(0, 1, (12, 2))
    bonus = {"bonus": chain.bonus(values)}
    assert weights(chain.prefer(bonus, bonus_weight=0.0)) == weights(plain)
    doubled = {"bonus": chain.bonus(2 * values)}
    assert weights(chain.prefer(bonus, bonus_weight=1.0)) == weights(chain.prefer(doubled, bonus_weight=0.5))
    assert weights(chain.prefer(bonus, bonus_weight=1.0)) != weights(plain)


def test_bonus_prefers_the_response_that_has_it(chain: Chain, plain: Any) -> None:
    own = own_labels(chain)
    values = np.zeros((12, 2))
    values[np.arange(12), own] = 3.0  # on the chosen side: its log-ratio must rise further than without
    with_bonus = chain.prefer({"bonus": chain.bonus(values)}, bonus_weight=1.0)
    gap = [log[-1]["chosen_logratio"] - log[-1]["rejected_logratio"] for log in logs(with_bonus, plain)]
    assert gap[0] > gap[1]
    first = with_bonus.jsonl("log.jsonl")[0]
    assert first["loss"] == pytest.approx(np.logaddexp(0, 3.0), abs=1e-5)


def logs(*artifacts: Any) -> list[list[dict[str, float]]]:
    return [artifact.jsonl("log.jsonl") for artifact in artifacts]


# ---------------------------------------------------------------- multipliers


@pytest.mark.parametrize("multiplier", [0.7, 3.0])
def test_ratio_from_an_artifact_gives_the_same_bits_as_the_ratio_itself(chain: Chain, multiplier: float) -> None:
    by_artifact = chain.prefer(
        {"multipliers": chain.multipliers(safety=multiplier, brevity=9.0)}, beta=0.5, ratio_of="safety"
    )
    direct = chain.prefer(beta=0.5 / multiplier)
    assert weights(by_artifact) == weights(direct)
    assert by_artifact.jsonl("log.jsonl") == direct.jsonl("log.jsonl")


@pytest.mark.parametrize("multiplier", [0.0, 1e-3])
def test_lambda_of_zero_hands_the_reference_on(
    chain: Chain, plain: Any, caplog: pytest.LogCaptureFixture, multiplier: float
) -> None:
    """From another start as well: the optimum does not depend on where training would have begun."""
    roles = {"start": plain, "multipliers": chain.multipliers(safety=multiplier)}
    with caplog.at_level(logging.INFO):
        made = chain.prefer(roles, ratio_of="safety")
    assert weights(made) == weights(chain.policy) != weights(plain)
    names = {name for name in chain.policy.manifest["files"] if name.startswith("policy/")}
    assert {name for name in made.manifest["files"] if name.startswith("policy/")} == names
    assert made.jsonl("log.jsonl") == []
    assert made.manifest["cost"]["trained_tokens"] == 0
    assert "nothing is trained" in caplog.text
    assert tiny.load(made.path("policy")) is not None
    above = chain.prefer(roles, ratio_of="safety", smallest_multiplier=-1.0) if multiplier else made
    assert (weights(above) != weights(made)) == bool(multiplier)


# ---------------------------------------------------------------- refusals and costs


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"soft": True}, "soft labels need probabilities"),
        ({"bonus_weight": 1.0}, "there is no bonus"),
        ({"bonus_weight": -1.0, "bonus": True}, "bonus_weight = -1.0"),
        ({"ratio_of": "safety"}, "without an input multipliers"),
        ({"multipliers": {"safety": 1.0}}, "with an input multipliers"),
        ({"multipliers": {"brevity": 1.0}, "ratio_of": "safety"}, "no multiplier of safety"),
        ({"multipliers": {"safety": -1.0}, "ratio_of": "safety"}, "the multiplier of safety is -1.0"),
        ({"loss": "ipo", "soft": True, "labels": True}, "defined for dpo, not for ipo"),
        ({"loss": "kto", "bonus_weight": 1.0, "bonus": True}, "defined for dpo, not for kto"),
    ],
)
def test_settings_without_their_inputs_are_refused(chain: Chain, changes: dict[str, Any], says: str) -> None:
    roles = {}
    if changes.pop("labels", None):
        roles["labels"] = chain.labels(draws(12), own_labels(chain))
    if changes.pop("bonus", None):
        roles["bonus"] = chain.bonus(np.ones((12, 2)))
    if "multipliers" in changes:
        roles["multipliers"] = chain.multipliers(**changes.pop("multipliers"))
    with pytest.raises((ConfigError, InvariantError), match=says):
        chain.prefer(roles, **changes)


def test_kto_takes_labels_from_an_artifact(tmp_path: Any) -> None:
    chain = Chain(tmp_path / "store", mismatched=True)
    own = own_labels(chain)
    found = chain.prefer({"labels": chain.labels(draws(12), own)}, loss="kto")
    assert weights(found) == weights(chain.prefer(loss="kto"))


@pytest.mark.parametrize("lora", [None, tiny.LORA], ids=["full", "lora"])
def test_one_policy_is_in_memory_while_training(chain: Chain, lora: Any) -> None:
    before = policies.held()  # what other tests of this process have left
    made = chain.prefer(**({} if lora is None else {"lora": lora}), beta=0.31)
    assert made.manifest["cost"]["policies_in_memory"] == 1
    assert policies.held() == before
    another = tiny.llama(seed=1)
    assert policies.held() == before + 1
    del another
    assert policies.held() == before
