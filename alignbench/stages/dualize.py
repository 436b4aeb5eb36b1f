"""Stages around the dual: solve it, state a multiplier, measure the slack of a policy, step, predict."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from alignbench import dual, dual_descent, dual_intervals
from alignbench.certificate import tilted
from alignbench.engine.runtime import derive_seed
from alignbench.errors import ConfigError, DataError, InvariantError
from alignbench.jsonio import write_json
from alignbench.problem import Form, Problem, utility_from_cost
from alignbench.report.stats import cluster_bootstrap, paired_difference
from alignbench.stages.kept import Kept
from alignbench.stages.relabel import labels_of, logit_utility
from alignbench.stages.stage import Context, Estimate, Stage, register
from alignbench.store import Artifact

log = logging.getLogger(__name__)

SOLVERS = ("newton", "projected_gradient", "can-2024")


@dataclass(frozen=True)
class ProblemSpec:
    """A `Problem` as part of a spec."""

    form: str
    utilities: tuple[str, ...]
    thresholds: tuple[float, ...]
    beta: float

    @classmethod
    def of(cls, problem: Problem) -> ProblemSpec:
        """The spec of a problem."""
        return cls(problem.form.value, problem.utilities, problem.thresholds, problem.beta)

    @property
    def problem(self) -> Problem:
        """The problem of this spec."""
        return Problem(self.beta, Form(self.form), self.utilities, self.thresholds)


#: Four million numbers: 32 MB. A sweep reads the reference's bank again and again, which takes as long as solving.
_BANKS = Kept[dual.Bank](4_000_000, lambda bank: bank.log_weights.size * (2 + len(bank.names)))


def read_bank(responses: Artifact, scores: Artifact, weights: Artifact | None, names: Sequence[str]) -> dual.Bank:
    """Scored responses as one array per score.

    Args:
        responses: Responses of a policy, or the list of all answers.
        scores: Their scores.
        weights: Log-probs of listed answers under the policy that the bank stands for; None for samples.
        names: Utilities to read.
    """
    scores.require_made_from(responses, "bank: scores")
    made_of = [artifact.manifest["files"] for artifact in (responses, scores, weights) if artifact is not None]
    of = (tuple(tuple(sorted((name, file["sha256"]) for name, file in files.items())) for files in made_of), *names)
    # one of its own for everybody: what a bank finds out about its margins decides how it looks for others
    return replace(_BANKS.get(of, lambda: _bank_of(responses, scores, weights, names)))


def _bank_of(responses: Artifact, scores: Artifact, weights: Artifact | None, names: Sequence[str]) -> dual.Bank:
    rows, scored = responses.jsonl("responses.jsonl"), scores.jsonl("scores.jsonl")
    if len(rows) != len(scored):
        raise InvariantError(
            f"{len(rows)} responses but {len(scored)} scores", where="bank", mend="score these responses"
        )
    missing = [name for name in ("reward", *names) if name not in scored[0]]
    if missing:
        raise DataError(
            f"the responses have no score {', '.join(missing)}",
            where=f"scores: {', '.join(scored[0]) or 'none'}",
            mend="choose a scorer that gives it",
        )
    return dual.Bank.from_rows(
        [row["prompt_id"] for row in rows],
        np.array([row["reward"] for row in scored], dtype=np.float64),
        {name: np.array([row[name] for row in scored], dtype=np.float64) for name in names},
        None if weights is None else logprobs_of(weights, len(rows)),
    )


def logprobs_of(artifact: Artifact, count: int) -> np.ndarray:
    """Log-probs of `count` responses."""
    from safetensors.numpy import load_file

    found = load_file(artifact.path("responses.safetensors"))["response"]
    if len(found) != count:
        raise InvariantError(f"{len(found)} log-probs for {count} responses", where="bank", mend="recompute them")
    return np.asarray(found, dtype=np.float64)


def _bank(ctx: Context, names: Sequence[str], prefix: str = "") -> dual.Bank:
    return read_bank(
        ctx.inputs[f"{prefix}responses"], ctx.inputs[f"{prefix}scores"], ctx.inputs.get(f"{prefix}weights"), names
    )


@dataclass(frozen=True)
class DualSpec:
    """lambda* = argmin_{lambda >= 0} D(lambda) on scored reference responses (CAN, arXiv 2405.19544, Lemma 2).

    Attributes:
        problem: Thresholds, their form, beta.
        solver: "newton" (certified), "projected_gradient" (the papers' method) or "can-2024" (released schedule).
        level: Coverage of the intervals.
        resamples: Bootstrap draws of prompts.
    """

    problem: ProblemSpec
    solver: str
    level: float
    resamples: int


def _dual(ctx: Context) -> None:
    spec: DualSpec = ctx.spec
    problem = spec.problem.problem
    started = time.perf_counter()
    bank = _bank(ctx, problem.utilities)
    margins = np.array(list(problem.margins(bank.reference_means).values()))
    solution = dual.solve(bank, problem.beta, margins)  # also says what an unreachable margin would need
    multipliers = solution.multipliers
    found: dict[str, Any] = {"solver": spec.solver}
    if spec.solver != "newton":
        multipliers = _by_gradient(spec, bank, problem.beta, margins, found)
    prediction = dual.predict(bank, problem.beta, multipliers)
    write_json(ctx.out / "multipliers.json", {"multipliers": _named(problem, multipliers)})
    write_json(
        ctx.out / "dual.json",
        found
        | {
            "requested_margin": _named(problem, margins),
            "reference_means": dict(bank.reference_means),
            "prompts": bank.reward.shape[0],
            "responses": int(np.isfinite(bank.log_weights).sum()),
            "solution": solution.to_dict(),
            "prediction": prediction.to_dict(),
            "intervals": _intervals(ctx, spec, bank, margins),
        },
    )
    _say(problem, multipliers, prediction, solution)
    ctx.cost["seconds"] = time.perf_counter() - started


def _by_gradient(
    spec: DualSpec, bank: dual.Bank, beta: float, margins: np.ndarray, found: dict[str, Any]
) -> np.ndarray:
    """The papers' own solvers, kept for their figures and for comparisons; the trajectory is recorded."""
    if spec.solver == "can-2024":
        released = dual_descent.released_schedule(bank, beta, float(margins[0]))
        if released is None:
            raise DataError(
                "the released schedule found no multiplier within its restarts",
                where="dual, solver can-2024",
                mend="solver=newton",
            )
        return np.array([released])
    path = dual_descent.projected_gradient(bank, beta, margins)
    found |= {"trajectory": path.multipliers.tolist(), "oscillates": path.oscillates}
    if path.oscillates:
        log.warning("dual: projected gradient oscillates on this bank; the trajectory is in dual.json")
    return path.multipliers[-1]


def _intervals(ctx: Context, spec: DualSpec, bank: dual.Bank, margins: np.ndarray) -> dict[str, Any]:
    """Jackknife and bootstrap intervals of lambda* and of the predicted margin, over prompts."""
    again = dual_intervals.Reweighted(bank, spec.problem.beta, margins)
    seed = derive_seed(ctx.seed, "dual")
    return {
        "jackknife": dual_intervals.jackknife_interval(again, spec.level).to_dict(),
        "bootstrap": dual_intervals.bootstrap_interval(again, spec.resamples, spec.level, seed).to_dict(),
    }


def _named(problem: Problem, values: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in zip(problem.utilities, values, strict=True)}


def _say(problem: Problem, multipliers: np.ndarray, prediction: dual.Prediction, solution: dual.Solution) -> None:
    for j, name in enumerate(problem.utilities):
        log.info(
            "dual: lambda(%s) = %.4f predicts a margin of %+.3f; effective sample size %.1f",
            name, multipliers[j], prediction.margins[name], prediction.ess_mean,
        )  # fmt: skip
    if not solution.identified:
        log.warning("dual: the utilities do not identify every multiplier (degenerate Hessian); see dual.json")


DUAL = register(
    Stage(
        "dual",
        3,
        "multipliers",
        DualSpec,
        _dual,
        lambda spec, inputs, runtime, hints: Estimate(overhead_seconds=2.0),
    )
)


@dataclass(frozen=True)
class GivenSpec:
    """Multipliers that the configuration states."""

    multipliers: tuple[tuple[str, float], ...]


def _given(ctx: Context) -> None:
    write_json(ctx.out / "multipliers.json", {"multipliers": dict(ctx.spec.multipliers)})


GIVEN = register(
    Stage(
        "given",
        1,
        "multipliers",
        GivenSpec,
        _given,
        lambda spec, inputs, runtime, hints: Estimate(overhead_seconds=0.0),
    )
)


@dataclass(frozen=True)
class AverageSpec:
    """The mean of the multipliers of several iterates."""


def _average(ctx: Context) -> None:
    found = [artifact.json("multipliers.json")["multipliers"] for artifact in ctx.inputs.values()]
    mean = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    write_json(ctx.out / "multipliers.json", {"multipliers": mean})


AVERAGE = register(
    Stage(
        "average",
        1,
        "multipliers",
        AverageSpec,
        _average,
        lambda spec, inputs, runtime, hints: Estimate(overhead_seconds=0.0),
    )
)


@dataclass(frozen=True)
class SlackSpec:
    """How far a policy is above (or below) what is asked, from scored responses (CAID, arXiv 2505.19387, eq. 5).

    Attributes:
        problem: Thresholds, their form, beta.
        level: Coverage of the intervals.
        resamples: Bootstrap draws of prompts.
    """

    problem: ProblemSpec
    level: float
    resamples: int


def _slack(ctx: Context) -> None:
    spec: SlackSpec = ctx.spec
    problem = spec.problem.problem
    own, base = _bank(ctx, problem.utilities), _bank(ctx, problem.utilities, "reference_")
    if own.prompts != base.prompts:
        raise InvariantError(
            "policy and reference answered different prompts", where="slack", mend="sample both on one split"
        )
    requested = problem.requested_absolute(base.reference_means)
    found = {}
    for j, name in enumerate(problem.utilities):
        mine, theirs = _prompt_means(own)[:, j], _prompt_means(base)[:, j]
        # a margin shares the reference's sampling error, an absolute floor is a fixed number
        measured = mine - theirs if problem.form is Form.margin else mine
        value = _clustered(ctx, spec, measured, np.arange(len(measured)))
        floor = problem.margins({})[name] if problem.form is Form.margin else requested[name]
        found[name] = _shifted(value, floor)
    _write_slack(ctx, found, own.reference_means)


def _prompt_means(bank: dual.Bank) -> np.ndarray:
    weights = np.exp(bank.log_weights)[..., None]
    return np.where(weights > 0, weights * bank.utilities, 0.0).sum(1)


def _shifted(value: dict[str, Any], floor: float) -> dict[str, Any]:
    """An achieved value minus what is asked."""
    return value | {key: None if value[key] is None else value[key] - floor for key in ("mean", "low", "high")}


def _write_slack(ctx: Context, slack: dict[str, Any], means: dict[str, float] | None) -> None:
    write_json(ctx.out / "slack.json", {"slack": slack, "reward": None if means is None else float(means["reward"])})


SLACK = register(
    Stage(
        "slack",
        2,
        "slack",
        SlackSpec,
        _slack,
        lambda spec, inputs, runtime, hints: Estimate(overhead_seconds=1.0),
    )
)


@dataclass(frozen=True)
class CostSpec:
    """Slack from binary labels alone (PD-DPO, arXiv 2510.05703, Algorithm 1; estimators in our own derivation).

    Attributes:
        problem: Thresholds, their form, beta.
        estimator: "logit": the utility of a response is minus the empirical logit of its unsafe labels, in the units
            of the problem; "rate": minus the share of unsafe labels.
        clip: Bound of the logit estimator's values.
        rate_limits: (utility, largest unsafe share) for "rate"; empty for "logit".
        level: Coverage of the intervals.
        resamples: Bootstrap draws of prompts.
    """

    problem: ProblemSpec
    estimator: str
    clip: float
    rate_limits: tuple[tuple[str, float], ...]
    level: float
    resamples: int


def _cost(ctx: Context) -> None:
    spec: CostSpec = ctx.spec
    problem = spec.problem.problem
    own, prompts = labels_of(ctx.inputs["labels"]), _prompts(ctx.inputs["responses"])
    found = {}
    if spec.estimator == "rate":
        limits = dict(spec.rate_limits)
        for name in problem.utilities:
            safe = utility_from_cost(own[name].mean(1))
            value = _clustered(ctx, spec, safe, prompts)
            found[name] = _shifted(value, utility_from_cost(limits[name]))
        _write_slack(ctx, found, None)
        return
    base, base_prompts = labels_of(ctx.inputs["reference_labels"]), _prompts(ctx.inputs["reference_responses"])
    estimated = {name: logit_utility(own[name], spec.clip) for name in problem.utilities}
    reference = {name: logit_utility(base[name], spec.clip) for name in problem.utilities}
    floors = problem.requested_absolute({name: float(values.mean()) for name, values in reference.items()})
    for name in problem.utilities:
        if problem.form is Form.margin:
            gain = paired_difference(
                estimated[name],
                prompts,
                reference[name],
                base_prompts,
                level=spec.level,
                resamples=spec.resamples,
                seed=derive_seed(ctx.seed, "bootstrap"),
            ).to_dict()
            found[name] = _shifted(gain, problem.margins({})[name])
        else:
            found[name] = _shifted(_clustered(ctx, spec, estimated[name], prompts), floors[name])
    _write_slack(ctx, found, None)


def _clustered(
    ctx: Context, spec: SlackSpec | CostSpec | PredictSpec, values: np.ndarray, prompts: np.ndarray
) -> dict[str, Any]:
    return cluster_bootstrap(
        values, prompts, level=spec.level, resamples=spec.resamples, seed=derive_seed(ctx.seed, "bootstrap")
    ).to_dict()


def _prompts(responses: Artifact) -> np.ndarray:
    return np.array([row["prompt_id"] for row in responses.jsonl("responses.jsonl")])


COST = register(
    Stage(
        "cost",
        2,
        "slack",
        CostSpec,
        _cost,
        lambda spec, inputs, runtime, hints: Estimate(overhead_seconds=1.0),
    )
)


@dataclass(frozen=True)
class StepSpec:
    """lambda <- clip(lambda - step * slack, 0, upper): CAID eq. 6, PD-DPO's projected subgradient step.

    Attributes:
        step: Step size in (reward units per utility unit) per utility unit; None takes the curvature's.
        scale: Factor on the curvature's step.
        upper: Largest multiplier; None is unbounded (CAID).
    """

    step: float | None
    scale: float
    upper: float | None


def _step(ctx: Context) -> None:
    spec: StepSpec = ctx.spec
    before = ctx.inputs["multipliers"].json("multipliers.json")["multipliers"]
    slack = ctx.inputs["slack"].json("slack.json")["slack"]
    step = spec.step if spec.step is not None else spec.scale * curvature_step(ctx.inputs["dual"])
    after, at_bound = {}, {}
    for name, value in before.items():
        moved = value - step * slack[name]["mean"]
        after[name] = float(np.clip(moved, 0.0, np.inf if spec.upper is None else spec.upper))
        at_bound[name] = "lower" if after[name] > moved else "upper" if after[name] < moved else None
        log.info(
            "dual step: lambda(%s) %.4f -> %.4f (slack %+.3f, step %.4f)%s",
            name, value, after[name], slack[name]["mean"], step,
            f", held at its {at_bound[name]} bound" if at_bound[name] else "",
        )  # fmt: skip
    write_json(ctx.out / "multipliers.json", {"multipliers": after, "step": step, "at_bound": at_bound})


def curvature_step(solved: Artifact) -> float:
    """1 / L with L the largest eigenvalue of the dual's Hessian at lambda*, in closed form from the scored bank.

    Near lambda* the slack moves by Hessian * (lambda - lambda*), so this is the longest step of a gradient
    method that cannot overshoot in any direction (and Newton's own step with one constraint). Neither paper
    states a step size.
    """
    hessian = np.array(solved.json("dual.json")["solution"]["hessian"], dtype=np.float64)
    largest = float(np.linalg.eigvalsh(hessian)[-1])
    if largest <= 0:
        raise DataError(
            "the dual has no curvature at lambda*: the utilities do not vary among responses to one prompt",
            where="dual step",
            mend="state method.step, or sample more diverse responses",
        )
    return 1.0 / largest


STEP = register(
    Stage(
        "step",
        1,
        "multipliers",
        StepSpec,
        _step,
        lambda spec, inputs, runtime, hints: Estimate(overhead_seconds=0.1),
    )
)


@dataclass(frozen=True)
class PredictSpec:
    """What the bank says a multiplier will achieve, before anything is trained (lambda -> margin).

    Attributes:
        problem: Utilities and beta.
        level: Coverage of the margins' intervals (sampling of prompts).
        resamples: Bootstrap draws of prompts.
    """

    problem: ProblemSpec
    level: float
    resamples: int


def _predict(ctx: Context) -> None:
    problem = ctx.spec.problem.problem
    bank = _bank(ctx, problem.utilities)
    named = ctx.inputs["multipliers"].json("multipliers.json")["multipliers"]
    multipliers = np.array([named[name] for name in problem.utilities])
    found = dual.predict(bank, problem.beta, multipliers).to_dict()
    gain = _prompt_means(replace(bank, log_weights=tilted(bank, problem.beta, multipliers))) - _prompt_means(bank)
    intervals = {
        name: _clustered(ctx, ctx.spec, gain[:, j], np.arange(len(gain))) for j, name in enumerate(problem.utilities)
    }
    found["intervals"] = {name: [value["low"], value["high"]] for name, value in intervals.items()}
    write_json(ctx.out / "prediction.json", found)


PREDICT = register(
    Stage(
        "predict",
        2,
        "prediction",
        PredictSpec,
        _predict,
        lambda spec, inputs, runtime, hints: Estimate(overhead_seconds=0.5),
    )
)


def check_solver(solver: str, where: str) -> None:
    """Refuse an unknown solver."""
    if solver not in SOLVERS:
        raise ConfigError(f"solver = {solver!r}", where=where, mend=f"one of: {', '.join(SOLVERS)}")
