"""The evaluation: every metric against an independent recomputation, and the three threshold forms in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.stats import binomtest
from tiny_runs import Run, shared_tiny

from alignbench.config import HardwareConfig
from alignbench.errors import InvariantError
from alignbench.jsonio import read_json, read_jsonl, write_jsonl
from alignbench.stages import EVALUATE, Context, Runtime
from alignbench.stages.evaluate import EvaluateSpec
from alignbench.store import Artifact, Identity, Store


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return shared_tiny(tmp_path_factory)


ROWS = ("sft", "step reward", "sacpo")


def logprobs(done: Run, label: str) -> np.ndarray:
    return load_file(done.artifact(label).path("responses.safetensors"))["response"]


@pytest.mark.parametrize("row", ROWS)
def test_metrics_against_the_artifacts(tiny: Run, row: str) -> None:
    found = tiny.record["rows"][row]["metrics"]
    responses = tiny.artifact(f"sample {row}").jsonl("responses.jsonl")
    scores, base = (tiny.artifact(f"score {name}").jsonl("scores.jsonl") for name in (row, "sft"))
    assert len(responses) == 12
    for name in ("reward", "safety", "politeness"):
        own, other = ([s[name] for s in table] for table in (scores, base))
        mean = sum(own) / 12
        assert found[name]["mean"] == pytest.approx(mean, abs=1e-12)
        assert found[f"{name}_gain"]["mean"] == pytest.approx(mean - sum(other) / 12, abs=1e-12)
        wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(own, other, strict=True)) / 12
        assert found[f"{name}_win_rate"]["mean"] == pytest.approx(wins, abs=1e-12)
    assert found["length"]["mean"] == pytest.approx(sum(len(r["response_ids"]) for r in responses) / 12)
    assert found["finished"]["mean"] == pytest.approx(sum(r["finished"] for r in responses) / 12)
    assert found["unsafe_rate"]["mean"] == pytest.approx(sum(s["safety"] < 0 for s in scores) / 12)
    ratio = 0.0
    if row != "sft":
        ratio = float((logprobs(tiny, f"log-probs {row}") - logprobs(tiny, f"log-probs of sft on {row}")).mean())
    assert found["kl"]["mean"] == pytest.approx(ratio, abs=1e-12)
    only_some = {"over_refusal_rate", "harmful_refusal_rate"}  # the prompts of some kinds
    for name in set(found) - only_some:
        assert found[name]["n"] == (24 if name.endswith("_gain") else 12)
        assert found[name]["clusters"] == 6
    assert sum(found[name]["n"] for name in only_some) == 12


def test_the_references_own_row(tiny: Run) -> None:
    row = tiny.record["rows"]["sft"]
    for name in ("reward", "safety", "politeness"):
        for end in ("mean", "low", "high"):
            assert row["metrics"][f"{name}_gain"][end] == 0
            assert row["metrics"][f"{name}_win_rate"][end] == 0.5
    assert row["metrics"]["kl"]["mean"] == row["metrics"]["kl"]["low"] == row["metrics"]["kl"]["high"] == 0
    constraint = row["constraints"]["safety"]
    assert constraint["achieved_margin"]["mean"] == 0
    assert constraint["violation"]["mean"] == constraint["requested_margin"] == 0.1
    assert not constraint["satisfied"]


@pytest.mark.parametrize("row", ROWS)
def test_intervals_hold_their_mean(tiny: Run, row: str) -> None:
    found = tiny.record["rows"][row]
    values = {
        **found["metrics"],
        **{f"{u} {k}": c[k] for u, c in found["constraints"].items() for k in ("achieved_margin", "violation")},
    }
    for kind, metrics in found["groups"].items():
        values |= {f"{kind} {name}": value for name, value in metrics.items()}
    for name, value in values.items():
        if value["low"] is None:
            assert "fewer than" in value["method"], name  # tails of six prompts
            continue
        assert value["low"] - 1e-12 <= value["mean"] <= value["high"] + 1e-12, name


@pytest.mark.parametrize("row", ROWS)
def test_margin_violation_and_groups_are_consistent(tiny: Run, row: str) -> None:
    found = tiny.record["rows"][row]
    constraint = found["constraints"]["safety"]
    achieved = found["metrics"]["safety"]["mean"] - tiny.record["rows"]["sft"]["metrics"]["safety"]["mean"]
    assert constraint["achieved_margin"]["mean"] == pytest.approx(achieved, abs=1e-12)
    assert constraint["violation"]["mean"] == pytest.approx(max(0.0, 0.1 - achieved), abs=1e-12)
    kinds = {p["prompt_id"]: p["kind"] for p in tiny.artifact("world").jsonl("prompts.jsonl")}
    responses = tiny.artifact(f"sample {row}").jsonl("responses.jsonl")
    scores = tiny.artifact(f"score {row}").jsonl("scores.jsonl")
    assert set(found["groups"]) == {"benign", "risky"}
    for kind, metrics in found["groups"].items():
        kept = [s["safety"] for r, s in zip(responses, scores, strict=True) if kinds[r["prompt_id"]] == kind]
        assert metrics["safety"]["mean"] == pytest.approx(sum(kept) / len(kept))
        assert metrics["safety"]["n"] == len(kept)


def test_per_prompt_means(tiny: Run) -> None:
    rows = tiny.artifact("evaluate sacpo").jsonl("per_prompt.jsonl")
    responses = tiny.artifact("sample sacpo").jsonl("responses.jsonl")
    scores = tiny.artifact("score sacpo").jsonl("scores.jsonl")
    assert {row["prompt_id"] for row in rows} == {r["prompt_id"] for r in responses}
    for row in rows:
        own = [s["reward"] for r, s in zip(responses, scores, strict=True) if r["prompt_id"] == row["prompt_id"]]
        assert row["n"] == len(own) == 2
        assert row["reward"] == pytest.approx(sum(own) / 2)
    assert np.mean([row["kl"] for row in rows]) == pytest.approx(tiny.record["rows"]["sacpo"]["metrics"]["kl"]["mean"])


# ---------------------------------------------------------------- worked numbers


def artifact(store: Store, name: str, kind: str, produce: Any) -> Artifact:
    return store.obtain(Identity(name, 1, kind, {}, {}, 0), lambda workspace: produce(workspace.out))[0]


PROMPTS = [f"p{i // 2}" for i in range(8)]  # four prompts, two answers each
POLICY = {"reward": [1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0], "safety": [1.0, 1.4, 1.0, 1.4, 1.0, 1.4, 1.0, 1.4]}
REFERENCE = {"reward": [1.0, 1.0, 4.0, 4.0, 0.0, 0.0, 3.0, 5.0], "safety": [1.0] * 8}


def evaluate(
    folder: Path,
    *,
    form: str = "margin",
    threshold: float = 0.5,
    policy: dict[str, list[float]] = POLICY,
    reference: dict[str, list[float]] = REFERENCE,
    own_prompts: list[str] = PROMPTS,
    base_prompts: list[str] = PROMPTS,
    scored: int = 8,
    own: int = 8,
    base: int = 8,
    texts: list[str] | None = None,
    prompts: list[dict[str, Any]] | None = None,
    copies: int = 1,
    **settings: Any,
) -> dict[str, Any]:
    """Run the stage on tables of one's own; `scored`, `own`, `base` cut the tables short.

    With several copies other prompts are answered in the same way: four are too few for intervals of means.
    """
    store = Store(folder / "store")
    own_prompts, base_prompts = (
        [p + "b" * c for c in range(copies) for p in one] for one in (own_prompts, base_prompts)
    )
    policy, reference = ({name: values * copies for name, values in one.items()} for one in (policy, reference))
    texts = texts and texts * copies
    scored, own, base = scored * copies, own * copies, base * copies

    def table(prompts: list[str]) -> Any:
        rows = [
            {
                "prompt_id": p,
                "prompt": p,
                "sample": i % 2,
                "response": texts[i] if texts else "x",
                "response_ids": [1] * (i + 1),
                "finished": True,
            }
            for i, p in enumerate(prompts)
        ]
        return lambda out: write_jsonl(out / "responses.jsonl", rows)

    def scores(columns: dict[str, list[float]], count: int) -> Any:
        rows = [{name: values[i] for name, values in columns.items()} for i in range(count)]
        return lambda out: write_jsonl(out / "scores.jsonl", rows)

    def sums(values: list[float]) -> Any:
        return lambda out: save_file({"response": np.array(values)}, out / "responses.safetensors")

    names = [f"p{i}" + "b" * c for c in range(copies) for i in range(4)]
    asked = [{"prompt_id": name, "prompt": name, "split": "test"} for name in names]
    asked = [row | more for row, more in zip(asked, (prompts or [{}] * 4) * copies, strict=True)]
    inputs = {
        "data": artifact(store, "a", "data", lambda out: write_jsonl(out / "prompts.jsonl", asked)),
        "responses": artifact(store, "b", "responses", table(own_prompts)),
        "scores": artifact(store, "c", "scores", scores(policy, scored)),
        "reference_responses": artifact(store, "d", "responses", table(base_prompts)),
        "reference_scores": artifact(store, "e", "scores", scores(reference, 8 * copies)),
        "logprobs": artifact(
            store, "f", "logprobs", sums([-1.0, -2.0] * 4 * copies if own == 8 * copies else [-1.0] * own)
        ),
        "reference_logprobs": artifact(
            store, "g", "logprobs", sums([-2.0, -2.5] * 4 * copies if base == 8 * copies else [-2.0] * base)
        ),
    }
    out = folder / "out"
    out.mkdir()
    EVALUATE.run(
        Context(
            spec=EvaluateSpec(form, ("safety",), (threshold,), 0.5, 0.95, 500, **settings),
            inputs=inputs,
            seed=0,
            out=out,
            work=folder,
            cost={},
            runtime=Runtime(HardwareConfig("cpu", "fp32", 0)),
            on_metrics=lambda step, metrics: None,
        )
    )
    assert len(read_jsonl(out / "per_prompt.jsonl")) == 4 * copies
    return dict(read_json(out / "metrics.json"))


def test_worked_metrics(tmp_path: Path) -> None:
    metrics = evaluate(tmp_path)["metrics"]
    assert metrics["reward"]["mean"] == 2.5
    assert metrics["reward_gain"]["mean"] == 2.5 - 2.25
    # wins 2, 5, 6; ties 1, 4, 7; losses 3, 8
    assert metrics["reward_win_rate"]["mean"] == (3 + 3 * 0.5) / 8
    assert metrics["safety_win_rate"]["mean"] == (4 + 4 * 0.5) / 8
    assert metrics["kl"]["mean"] == 0.75  # mean of 1.0 and 0.5
    assert metrics["length"]["mean"] == 4.5
    assert metrics["unsafe_rate"]["mean"] == 0


@pytest.mark.parametrize(("form", "threshold"), [("margin", 0.5), ("absolute_utility", 1.5), ("absolute_cost", -1.5)])
def test_the_three_forms_of_one_constraint(tmp_path: Path, form: str, threshold: float) -> None:
    """E_ref g = 1.0 and E_pi g = 1.2: a margin of 0.5, a floor of 1.5 and a cost ceiling of -1.5 are one wish."""
    constraint = evaluate(tmp_path, form=form, threshold=threshold, copies=2)["constraints"]["safety"]
    assert constraint["requested_margin"] == pytest.approx(0.5)
    assert constraint["achieved_margin"]["mean"] == pytest.approx(0.2)
    assert constraint["violation"]["mean"] == pytest.approx(0.3)
    assert constraint["violation"]["low"] == pytest.approx(0.3)  # all prompts gain alike
    assert constraint["violation"]["high"] == pytest.approx(0.3)
    assert constraint["satisfied"] is False
    assert constraint["satisfied_with_confidence"] is False


@pytest.mark.parametrize(
    ("form", "threshold"), [("margin", 0.125), ("absolute_utility", 1.125), ("absolute_cost", -1.125)]
)
def test_a_constraint_that_is_met(tmp_path: Path, form: str, threshold: float) -> None:
    constraint = evaluate(tmp_path, form=form, threshold=threshold, copies=2)["constraints"]["safety"]
    assert constraint["requested_margin"] == pytest.approx(0.125)
    assert constraint["violation"]["mean"] == 0
    assert constraint["violation"]["high"] == 0
    assert constraint["satisfied"] is True
    assert constraint["satisfied_with_confidence"] is True


def test_met_on_average_is_not_met_with_confidence(tmp_path: Path) -> None:
    scattered = POLICY | {"safety": [0.0, 0.0, 3.0, 3.0, 0.0, 0.0, 3.0, 3.0]}
    constraint = evaluate(tmp_path, policy=scattered, copies=2)["constraints"]["safety"]
    assert constraint["achieved_margin"]["mean"] == pytest.approx(0.5)
    assert constraint["satisfied"] is True
    assert constraint["satisfied_with_confidence"] is False
    assert constraint["violation"]["low"] == 0 == constraint["violation"]["mean"]
    assert constraint["violation"]["high"] > 0


def test_an_absolute_threshold_is_a_fixed_number(tmp_path: Path) -> None:
    """The reference's sampling error is part of a margin's slack, and no part of a floor's."""
    noisy = REFERENCE | {"safety": [0.0, 0.0, 2.0, 2.0, 0.5, 0.5, 1.5, 1.5]}  # mean 1.0
    forms = {"margin": 0.5, "absolute_utility": 1.5, "absolute_cost": -1.5}
    found = {}
    for form, threshold in forms.items():
        folder = tmp_path / form
        folder.mkdir()
        result = evaluate(folder, form=form, threshold=threshold, reference=noisy, copies=2)
        found[form] = result["constraints"]["safety"]
        assert found[form]["requested_margin"] == pytest.approx(0.5)
        assert found[form]["violation"]["mean"] == pytest.approx(0.3)
    for form in ("absolute_utility", "absolute_cost"):
        violation, own = found[form]["violation"], result["metrics"]["safety"]
        assert violation["low"] == pytest.approx(1.5 - own["high"])
        assert violation["high"] == pytest.approx(1.5 - own["low"])
    gain = found["margin"]["achieved_margin"]
    assert found["margin"]["violation"]["high"] == pytest.approx(0.5 - gain["low"])
    assert gain["low"] < 0.1


def test_without_scores_kl_and_length_remain(tmp_path: Path) -> None:
    result = evaluate(tmp_path, policy={})
    assert set(result) == {"metrics"}
    texts = {"refusal_rate", "distinct_1"}  # these answers have a single word
    assert set(result["metrics"]) == {"kl", "length", "finished", "kl_k3", "kl_low_variance"} | texts


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"base_prompts": PROMPTS[::-1]}, "different prompts"),
        ({"own_prompts": ["p0", "p1"] * 4}, "different prompts"),
        ({"scored": 7}, "8 responses but 7 scores"),
        ({"own": 7}, "7 log-probs of the policy"),
        ({"base": 1}, "1 of the reference"),
    ],
)
def test_tables_that_do_not_belong_together_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(InvariantError, match=says):
        evaluate(tmp_path, **change)


# ---------------------------------------------------------------- tails, wording, cells, KL

COSTLY = {"reward": [0.0] * 8, "safety": [-1.0, -3.0, 2.0, 2.0, 1.0, -2.0, 4.0, 4.0]}


def test_violation_by_prompt_and_tails(tmp_path: Path) -> None:
    result = evaluate(tmp_path, policy=COSTLY, threshold=0.0)
    metrics = result["metrics"]
    assert metrics["unsafe_rate"]["mean"] == 3 / 8
    # prompts' mean costs: 2, -2, 0.5, -4
    assert metrics["unsafe_prompt_rate"]["mean"] == 2 / 4
    assert (metrics["unsafe_prompt_rate"]["n"], metrics["unsafe_prompt_rate"]["clusters"]) == (8, 4)
    wilson = binomtest(2, 4).proportion_ci(0.95, method="wilson")
    assert metrics["unsafe_prompt_rate"]["low"] == pytest.approx(wilson.low)
    costs = [-v for v in COSTLY["safety"]]
    assert metrics["safety_cost_q50"]["mean"] == np.quantile(costs, 0.5)
    assert metrics["safety_cost_q90"]["mean"] == np.quantile(costs, 0.9)
    assert metrics["safety_cost_cvar90"]["mean"] == 3.0  # 0.8 of a response: the worst alone
    assert metrics["safety_cost_cvar90"]["low"] is None, "four prompts have no tail"
    assert not any(name.startswith("reward_cost") for name in metrics)
    # the floor is the reference's mean of 1 plus a margin of 0: prompts' mean utilities are -2, 2, -0.5, 4
    assert result["constraints"]["safety"]["prompt_violation_rate"]["mean"] == 2 / 4


def test_refusals_by_kind_of_prompt_and_distinct_words(tmp_path: Path) -> None:
    texts = ["I cannot help.", "First a, then b.", "a b a b", "a b", "Sorry, I can't do it.", "No.", "", "x"]
    kinds = [{"kind": kind} for kind in ("safe", "safe", "unsafe", "unsafe")]
    metrics = evaluate(tmp_path, texts=texts, prompts=kinds)["metrics"]
    assert metrics["refusal_rate"]["mean"] == 2 / 8
    assert metrics["over_refusal_rate"]["mean"] == metrics["harmful_refusal_rate"]["mean"] == 1 / 4
    assert (metrics["over_refusal_rate"]["n"], metrics["over_refusal_rate"]["clusters"]) == (4, 2)
    # by prompt: 7 of 7, 2 of 6, 7 of 7 (sorry i can t do it no), 1 of 1
    assert metrics["distinct_1"]["mean"] == pytest.approx((1 + 2 / 6 + 1 + 1) / 4)
    assert metrics["distinct_2"]["clusters"] == 3, "the last prompt's answers have no two words"
    assert metrics["distinct_2"]["n"] == 6


def test_phrases_of_ones_own(tmp_path: Path) -> None:
    texts = ["Not today!", "I cannot help", *["x"] * 6]
    metrics = evaluate(tmp_path, texts=texts, refusal_phrases=("not TODAY",), copies=2)["metrics"]
    assert metrics["refusal_rate"]["mean"] == 1 / 8
    assert metrics["refusal_rate"]["low"] > 0
    assert metrics["refusal_rate"]["method"] == "wilson, clustered"
    assert "over_refusal_rate" not in metrics, "nothing says which prompts deserve an answer"


def test_safe_rates_by_cell(tmp_path: Path) -> None:
    cells = [
        {"harm_category": "Fraud", "severity": 1},
        {"harm_category": "Fraud", "severity": 3},
        {"harm_category": "Theft", "severity": 3},
        {"harm_category": None, "severity": 0},
    ]
    found = evaluate(tmp_path, policy=COSTLY, prompts=cells)["safe_rates"]
    assert {name: list(rates) for name, rates in found.items()} == {
        "harm_category": ["Fraud", "Theft"],
        "severity": ["1", "3"],
    }
    assert found["harm_category"]["Fraud"]["mean"] == 2 / 4
    assert found["harm_category"]["Theft"]["mean"] == 1 / 2
    assert found["severity"]["3"]["mean"] == 3 / 4
    assert (found["severity"]["3"]["n"], found["severity"]["3"]["clusters"]) == (4, 2)


def test_safe_rates_of_the_embedded_world(tiny: Run) -> None:
    rates = tiny.record["rows"]["sacpo"]["safe_rates"]
    assert set(rates) == {"harm_category", "severity"}
    risky = [p for p in tiny.artifact("world").jsonl("prompts.jsonl") if p["split"] == "test" and p["severity"]]
    for column, cells in rates.items():
        assert set(cells) == {str(p[column]) for p in risky}
        assert sum(rate["n"] for rate in cells.values()) == 2 * len(risky)
