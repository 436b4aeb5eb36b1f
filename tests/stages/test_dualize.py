"""The stages around the dual, on small banks with known answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pair_chain import given as artifact
from pair_chain import stage
from safetensors.numpy import save_file
from scipy.optimize import minimize_scalar
from scipy.special import expit, logsumexp, softmax

from alignbench.errors import AlignbenchError, DataError, InvariantError
from alignbench.jsonio import write_json, write_jsonl
from alignbench.stages.dualize import (
    AVERAGE,
    COST,
    DUAL,
    GIVEN,
    PREDICT,
    SLACK,
    STEP,
    AverageSpec,
    CostSpec,
    DualSpec,
    GivenSpec,
    PredictSpec,
    ProblemSpec,
    SlackSpec,
    StepSpec,
)
from alignbench.store import Artifact, Store

BETA = 0.5
NAMES = ("safety", "politeness")


def problem(form: str, *thresholds: float, beta: float = BETA) -> ProblemSpec:
    return ProblemSpec(form, NAMES[: len(thresholds)], thresholds, beta)


class Scores:
    """Random scores (prompts, responses) of a policy, as the inputs of a stage."""

    def __init__(self, store: Store, seed: int, prompts: int = 5, each: int = 6, *, listed: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.store = store
        self.values = {name: rng.normal(seed, 1.0, (prompts, each)) for name in ("reward", *NAMES)}
        self.logprobs = rng.normal(-3, 1, (prompts, each)).astype(np.float32) if listed else None
        self.ids = np.array([[f"q{k}"] * each for k in range(prompts)])

    @property
    def weights(self) -> np.ndarray:
        return softmax(np.zeros(self.ids.shape) if self.logprobs is None else self.logprobs.astype(float), axis=1)

    def mean(self, name: str) -> float:
        return float((self.weights * self.values[name]).sum(1).mean())

    def rows(self) -> list[dict[str, float]]:
        flat = {name: v.ravel() for name, v in self.values.items()}
        return [{name: float(v[i]) for name, v in flat.items()} for i in range(self.ids.size)]

    def inputs(self, prefix: str = "", rows: list[dict[str, float]] | None = None) -> dict[str, Artifact]:
        answers = [{"prompt_id": str(i), "sample": n} for n, i in enumerate(self.ids.ravel())]
        scored = self.rows() if rows is None else rows
        responses = artifact(
            self.store, "responses", lambda o: write_jsonl(o / "responses.jsonl", answers), name=str(answers)
        )
        write = lambda o: write_jsonl(o / "scores.jsonl", scored)  # noqa: E731
        scores = artifact(self.store, "scores", write, {"responses": responses}, name=str(scored))
        found = {f"{prefix}responses": responses, f"{prefix}scores": scores}
        if self.logprobs is None:
            return found
        values = self.logprobs.ravel()
        weights = artifact(
            self.store,
            "logprobs",
            lambda o: save_file({"response": values}, o / "responses.safetensors"),
            name=str(values.tolist()),
        )
        return found | {f"{prefix}weights": weights}


def multipliers(store: Store, **values: float) -> Artifact:
    return stage(store, GIVEN, GivenSpec(tuple(values.items())), {})


def equivalent(margin: float, reference: float) -> list[tuple[str, float]]:
    """One request in the three forms."""
    floor = reference + margin
    return [("margin", margin), ("absolute_utility", floor), ("absolute_cost", -floor)]


# ---------------------------------------------------------------- the dual


@pytest.mark.parametrize("listed", [False, True])
def test_one_request_in_three_forms_has_one_multiplier_and_it_minimises_the_dual(store: Store, listed: bool) -> None:
    bank = Scores(store, 1, listed=listed)
    reward, safety, base = bank.values["reward"], bank.values["safety"], np.log(bank.weights)

    def value(lam: float) -> float:
        inner = logsumexp(base + (reward + lam * safety) / BETA, axis=1).mean()
        return float(BETA * inner - lam * (bank.mean("safety") + 0.4))

    expected = minimize_scalar(value, bounds=(0, 50), method="bounded", options={"xatol": 1e-10}).x
    assert expected > 0.05
    for form, threshold in equivalent(0.4, bank.mean("safety")):
        solved = stage(store, DUAL, DualSpec(problem(form, threshold), "newton", 0.95, 100), bank.inputs())
        found = solved.json("multipliers.json")["multipliers"]["safety"]
        assert found == pytest.approx(expected, abs=1e-5), form
        diagnosed = solved.json("dual.json")
        assert diagnosed["requested_margin"]["safety"] == pytest.approx(0.4)
        tilted = softmax(base + (reward + found * safety) / BETA, axis=1)
        assert (tilted * safety).sum(1).mean() - bank.mean("safety") == pytest.approx(0.4, abs=1e-9)
        variance = (tilted * safety**2).sum(1) - (tilted * safety).sum(1) ** 2
        assert diagnosed["solution"]["hessian"][0][0] == pytest.approx(variance.mean() / BETA, rel=1e-8)


@pytest.mark.parametrize("solver", ["projected_gradient", "can-2024"])
def test_the_papers_solvers_end_where_newton_does(store: Store, solver: str) -> None:
    bank = Scores(store, 1, prompts=20)
    found = {
        name: stage(store, DUAL, DualSpec(problem("margin", 0.3), name, 0.95, 100), bank.inputs())
        for name in ("newton", solver)
    }
    own, newton = (found[name].json("multipliers.json")["multipliers"]["safety"] for name in (solver, "newton"))
    assert own == pytest.approx(newton, abs=1e-3)
    diagnosed = found[solver].json("dual.json")
    assert diagnosed["solver"] == solver
    if solver == "projected_gradient":
        assert diagnosed["trajectory"][-1] == pytest.approx([own])
        assert not diagnosed["oscillates"]


def test_a_margin_out_of_reach_is_refused_with_what_is_in_reach(store: Store) -> None:
    with pytest.raises(AlignbenchError, match="safety"):
        stage(store, DUAL, DualSpec(problem("margin", 99.0), "newton", 0.95, 100), Scores(store, 1).inputs())


def test_a_met_constraint_has_multiplier_zero(store: Store) -> None:
    solved = stage(store, DUAL, DualSpec(problem("margin", -9.0), "newton", 0.95, 100), Scores(store, 1).inputs())
    assert solved.json("multipliers.json")["multipliers"] == {"safety": 0.0}


def test_a_prediction_is_the_tilted_bank_s(store: Store) -> None:
    bank, lam = Scores(store, 2, listed=True), {"safety": 0.7, "politeness": 0.3}
    inputs = bank.inputs() | {"multipliers": multipliers(store, **lam)}
    made = stage(store, PREDICT, PredictSpec(problem("margin", 0.1, 0.1), 0.95, 200), inputs).json("prediction.json")
    score = bank.values["reward"] + sum(value * bank.values[name] for name, value in lam.items())
    tilted = softmax(np.log(bank.weights) + score / BETA, axis=1)
    for name in NAMES:
        margin = (tilted * bank.values[name]).sum(1).mean() - bank.mean(name)
        assert made["margins"][name] == pytest.approx(margin, abs=1e-9)
        low, high = made["intervals"][name]
        assert low < margin < high
    assert made["reward"] == pytest.approx((tilted * bank.values["reward"]).sum(1).mean(), abs=1e-9)
    kl = (tilted * (np.log(tilted) - np.log(bank.weights))).sum(1).mean()
    assert made["kl"] == pytest.approx(kl, abs=1e-9)


# ---------------------------------------------------------------- slack


@pytest.mark.parametrize("listed", [False, True])
def test_slack_is_the_same_in_three_forms_and_weighs_listed_answers(store: Store, listed: bool) -> None:
    own, base = Scores(store, 3, listed=listed), Scores(store, 1, listed=listed)
    if listed:  # the weights matter here
        assert own.mean("safety") != pytest.approx(own.values["safety"].mean(), abs=1e-2)
    inputs = own.inputs() | base.inputs("reference_")
    for form, threshold in equivalent(0.4, base.mean("safety")):
        made = stage(store, SLACK, SlackSpec(problem(form, threshold), 0.95, 200), inputs).json("slack.json")
        slack = made["slack"]["safety"]
        assert slack["mean"] == pytest.approx(own.mean("safety") - base.mean("safety") - 0.4, abs=1e-9), form
        assert slack["low"] < slack["mean"] < slack["high"]
        assert slack["clusters"] == 5
        assert made["reward"] == pytest.approx(own.mean("reward"), abs=1e-9)


def test_the_slack_of_the_reference_itself_is_minus_the_margin_without_doubt(store: Store) -> None:
    same = Scores(store, 1)
    inputs = same.inputs() | same.inputs("reference_")
    slack = stage(store, SLACK, SlackSpec(problem("margin", 0.4), 0.95, 200), inputs).json("slack.json")["slack"]
    assert [slack["safety"][key] for key in ("mean", "low", "high")] == pytest.approx([-0.4] * 3)


def test_misaligned_banks_are_refused(store: Store) -> None:
    own, base = Scores(store, 3), Scores(store, 1, prompts=4)
    spec = SlackSpec(problem("margin", 0.4), 0.95, 200)
    with pytest.raises(InvariantError, match="different prompts"):
        stage(store, SLACK, spec, own.inputs() | base.inputs("reference_"))
    with pytest.raises(InvariantError, match="30 responses but 29 scores"):
        stage(store, DUAL, DualSpec(problem("margin", 0.1), "newton", 0.95, 100), own.inputs(rows=own.rows()[1:]))
    with pytest.raises(InvariantError, match=r"bank: scores .* was made from"):
        stage(store, DUAL, DualSpec(problem("margin", 0.1), "newton", 0.95, 100), own.inputs() | {
            "responses": Scores(store, 3, prompts=6, each=5).inputs()["responses"]
        })  # fmt: skip
    listed = Scores(store, 4, listed=True)
    fewer = Scores(store, 4, prompts=4, listed=True).inputs()["weights"]
    with pytest.raises(InvariantError, match="24 log-probs for 30 responses"):
        stage(store, SLACK, spec, listed.inputs() | {"weights": fewer} | listed.inputs("reference_"))


@pytest.mark.parametrize("name", ["reward", "safety"])
def test_scores_that_are_not_numbers_are_refused_with_their_rows(store: Store, name: str) -> None:
    bank = Scores(store, 1)
    rows: list[dict[str, Any]] = bank.rows()
    rows[7][name] = None
    with pytest.raises(DataError) as refused:
        stage(store, DUAL, DualSpec(problem("margin", 0.1), "newton", 0.95, 100), bank.inputs(rows=rows))
    assert name in refused.value.what
    assert "row 7" in refused.value.where


def test_a_bank_without_the_utility_is_refused_by_name(store: Store) -> None:
    bank = Scores(store, 1)
    rows = [{"reward": row["reward"]} for row in bank.rows()]
    with pytest.raises(DataError, match="no score safety"):
        stage(store, DUAL, DualSpec(problem("margin", 0.1), "newton", 0.95, 100), bank.inputs(rows=rows))


# ---------------------------------------------------------------- the cost from binary labels


def annotated(store: Store, seed: int, level: float, prefix: str = "") -> tuple[dict[str, Artifact], np.ndarray]:
    """Labels (8 prompts x 5 responses x 8 annotators), and the inputs that a stage reads them from."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((40, 8)) < expit(level)).astype(np.uint8)
    rows = [{"prompt_id": f"q{i // 5}"} for i in range(40)]
    made = artifact(store, "labels", lambda o: save_file({"safety": labels}, o / "binary.safetensors"), name=f"{seed}")
    answers = artifact(store, "responses", lambda o: write_jsonl(o / "responses.jsonl", rows), name=f"{seed}")
    return {f"{prefix}labels": made, f"{prefix}responses": answers}, labels


@pytest.mark.parametrize("clip", [4.0, 1.0])
def test_costs_from_labels_give_one_slack_in_three_forms(store: Store, clip: float) -> None:
    (own, unsafe), (base, usual) = annotated(store, 0, -0.5), annotated(store, 1, 0.8, "reference_")

    def cost(labels: np.ndarray) -> float:
        yes = labels.sum(1, dtype=float)
        return float(np.clip(np.log((yes + 0.5) / (8.5 - yes)), -clip, clip).mean())

    assert cost(unsafe) < cost(usual)
    for form, threshold in equivalent(0.4, -cost(usual)):
        spec = CostSpec(problem(form, threshold), "logit", clip, (), 0.95, 200)
        made = stage(store, COST, spec, own | base).json("slack.json")
        assert made["slack"]["safety"]["mean"] == pytest.approx(cost(usual) - cost(unsafe) - 0.4, abs=1e-9), form
        assert made["reward"] is None


def test_a_rate_is_compared_with_its_limit(store: Store) -> None:
    (own, unsafe), (base, _) = annotated(store, 0, -0.5), annotated(store, 1, 0.8, "reference_")
    spec = CostSpec(problem("margin", 99.0), "rate", 4.0, (("safety", 0.25),), 0.95, 200)
    slack = stage(store, COST, spec, own | base).json("slack.json")["slack"]["safety"]
    assert slack["mean"] == pytest.approx(0.25 - unsafe.mean(), abs=1e-12)
    assert slack["low"] < slack["mean"] < slack["high"]


# ---------------------------------------------------------------- steps


def stepped(store: Store, spec: StepSpec, before: dict[str, float], slack: dict[str, float], **extra: Artifact) -> Any:
    measured = {"slack": {name: {"mean": value} for name, value in slack.items()}, "reward": None}
    made = artifact(store, "slack", lambda o: write_json(o / "slack.json", measured), name=str(measured))
    inputs = {"multipliers": multipliers(store, **before), "slack": made} | extra
    return stage(store, STEP, spec, inputs).json("multipliers.json")


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=st.floats(0, 5),
    slack=st.floats(-5, 5),
    step=st.floats(0.01, 5),
    upper=st.none() | st.floats(5, 8),
)
def test_a_step_goes_against_the_slack_within_its_bounds(
    tmp_path_factory: pytest.TempPathFactory, value: float, slack: float, step: float, upper: float | None
) -> None:
    store = Store(tmp_path_factory.mktemp("s"))
    found = stepped(store, StepSpec(step, 1.0, upper), {"safety": value}, {"safety": slack})
    after, moved = found["multipliers"]["safety"], value - step * slack
    assert after == pytest.approx(min(max(moved, 0.0), np.inf if upper is None else upper), abs=1e-12)
    assert after >= value if slack < 0 else after <= value  # a violation never lowers the multiplier
    assert found["at_bound"]["safety"] == ("lower" if moved < 0 else "upper" if upper and moved > upper else None)


def test_the_curvature_s_step_is_one_over_the_largest_eigenvalue(store: Store) -> None:
    bank = Scores(store, 1, prompts=8, each=12)
    solved = stage(store, DUAL, DualSpec(problem("margin", 0.2, 0.1), "newton", 0.95, 100), bank.inputs())
    lam = solved.json("multipliers.json")["multipliers"]
    score = bank.values["reward"] + sum(lam[name] * bank.values[name] for name in NAMES)
    tilted = softmax(score / BETA, axis=1)
    g = np.stack([bank.values[name] for name in NAMES], -1)
    centred = g - (tilted[..., None] * g).sum(1, keepdims=True)
    hessian = np.einsum("ki,kia,kib->ab", tilted, centred, centred) / len(g) / BETA
    step = 0.5 / np.linalg.eigvalsh(hessian)[-1]
    slack = {"safety": -0.3, "politeness": 0.05}
    found = stepped(store, StepSpec(None, 0.5, None), {"safety": 1.0, "politeness": 2.0}, slack, dual=solved)
    assert found["step"] == pytest.approx(step, rel=1e-6)
    assert found["multipliers"]["safety"] == pytest.approx(1.0 + 0.3 * step, rel=1e-6)
    assert found["multipliers"]["politeness"] == pytest.approx(2.0 - 0.05 * step, rel=1e-6)


def test_a_dual_without_curvature_gives_no_step(store: Store) -> None:
    flat = artifact(store, "multipliers", lambda o: write_json(o / "dual.json", {"solution": {"hessian": [[0.0]]}}))
    with pytest.raises(DataError, match="no curvature"):
        stepped(store, StepSpec(None, 1.0, None), {"safety": 1.0}, {"safety": 0.1}, dual=flat)


def test_the_average_is_of_each_utility(store: Store) -> None:
    parts = [multipliers(store, safety=s, politeness=p) for s, p in ((1.0, 0.0), (2.0, 0.0), (6.0, 3.0))]
    made = stage(store, AVERAGE, AverageSpec(), {f"multipliers_{i:02d}": part for i, part in enumerate(parts)})
    assert made.json("multipliers.json")["multipliers"] == {"safety": 3.0, "politeness": 1.0}
