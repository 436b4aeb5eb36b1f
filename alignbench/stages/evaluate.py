"""The evaluation of one policy against the reference: every number with its interval and n."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignbench.engine.runtime import derive_seed
from alignbench.errors import InvariantError
from alignbench.jsonio import write_json, write_jsonl
from alignbench.problem import Form, Problem, cost_from_utility, violation
from alignbench.report.stats import Estimate as Interval
from alignbench.report.stats import cluster_bootstrap, paired_difference, win_rate
from alignbench.stages.stage import Context, Estimate, Facts, Runtime, Stage, register
from alignbench.store import Artifact


@dataclass(frozen=True)
class EvaluateSpec:
    """What is asked of the policy, and how its numbers get their intervals.

    Attributes:
        form: Threshold form.
        utilities: Constrained utilities.
        thresholds: One per utility.
        beta: KL weight of the problem.
        level: Two-sided coverage.
        resamples: Bootstrap draws.
    """

    form: str
    utilities: tuple[str, ...]
    thresholds: tuple[float, ...]
    beta: float
    level: float
    resamples: int


@dataclass(frozen=True)
class _Table:
    """Responses of one policy with their scores, in one fixed order."""

    prompts: np.ndarray
    kinds: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray
    scores: dict[str, np.ndarray]

    @classmethod
    def read(cls, responses: Artifact, scores: Artifact, kinds: Mapping[str, str]) -> _Table:
        rows, scored = responses.jsonl("responses.jsonl"), scores.jsonl("scores.jsonl")
        if len(rows) != len(scored):
            raise InvariantError(
                f"{len(rows)} responses but {len(scored)} scores",
                where="evaluate",
                mend="score these responses",
            )
        names = list(scored[0])
        return cls(
            prompts=np.array([row["prompt_id"] for row in rows]),
            kinds=np.array([kinds.get(row["prompt_id"], "all") for row in rows]),
            lengths=np.array([len(row["response_ids"]) for row in rows], dtype=np.float64),
            finished=np.array([row["finished"] for row in rows], dtype=np.float64),
            scores={name: np.array([row[name] for row in scored], dtype=np.float64) for name in names},
        )


def _evaluate(ctx: Context) -> None:
    from safetensors.numpy import load_file

    started = time.perf_counter()
    kinds = {p["prompt_id"]: p.get("kind", "all") for p in ctx.inputs["data"].jsonl("prompts.jsonl")}
    policy = _Table.read(ctx.inputs["responses"], ctx.inputs["scores"], kinds)
    reference = _Table.read(ctx.inputs["reference_responses"], ctx.inputs["reference_scores"], kinds)
    if not np.array_equal(policy.prompts, reference.prompts):
        raise InvariantError(
            "policy and reference answered different prompts",
            where="evaluate",
            mend="sample both on one split",
        )
    own, base = (
        load_file(ctx.inputs[name].path("responses.safetensors"))["response"]
        for name in ("logprobs", "reference_logprobs")
    )
    if not len(own) == len(base) == len(policy.prompts):
        raise InvariantError(
            f"{len(policy.prompts)} responses, but {len(own)} log-probs of the policy and {len(base)} of the reference",
            where="evaluate",
            mend="take the log-probs of these responses",
        )
    measure = _Measure(ctx.spec, policy, reference, derive_seed(ctx.seed, "bootstrap"))
    metrics = {
        "kl": measure.mean(own - base),
        "length": measure.mean(policy.lengths),
        "finished": measure.mean(policy.finished),
    }
    if policy.scores:
        metrics |= measure.scores()
    result = {"metrics": {name: value.to_dict() for name, value in metrics.items()}}
    if policy.scores:
        result |= {"constraints": measure.constraints(), "groups": measure.groups()}
    write_json(ctx.out / "metrics.json", result)
    write_jsonl(ctx.out / "per_prompt.jsonl", measure.per_prompt({"kl": own - base, "length": policy.lengths}))
    ctx.cost["seconds"] = time.perf_counter() - started


class _Measure:
    """The metrics of one policy; all intervals share one seed, so the same prompts are drawn for each."""

    def __init__(self, spec: EvaluateSpec, policy: _Table, reference: _Table, seed: int) -> None:
        self.spec, self.policy, self.reference = spec, policy, reference
        self.options: dict[str, Any] = {"level": spec.level, "resamples": spec.resamples, "seed": seed}

    def mean(self, values: np.ndarray, where: np.ndarray | None = None) -> Interval:
        kept = slice(None) if where is None else where
        return cluster_bootstrap(values[kept], self.policy.prompts[kept], **self.options)

    def gain(self, name: str, where: np.ndarray | None = None) -> Interval:
        kept = slice(None) if where is None else where
        return paired_difference(
            self.policy.scores[name][kept],
            self.policy.prompts[kept],
            self.reference.scores[name][kept],
            self.reference.prompts[kept],
            **self.options,
        )

    def scores(self) -> dict[str, Interval]:
        """Mean, gain over the reference and win rate of the reward and of every utility."""
        found = {}
        for name, values in self.policy.scores.items():
            found[name] = self.mean(values)
            found[f"{name}_gain"] = self.gain(name)
            found[f"{name}_win_rate"] = self.mean(win_rate(values, self.reference.scores[name]))
        if "safety" in self.policy.scores:
            found["unsafe_rate"] = self.mean((cost_from_utility(self.policy.scores["safety"]) > 0).astype(float))
        return found

    def constraints(self) -> dict[str, dict[str, Any]]:
        """Requested and achieved margin of each utility; the violation's interval follows the slack's."""
        spec = self.spec
        problem = Problem(spec.beta, Form(spec.form), spec.utilities, spec.thresholds)
        margins = problem.margins({u: float(self.reference.scores[u].mean()) for u in spec.utilities})
        floors = problem.requested_absolute({u: float(self.reference.scores[u].mean()) for u in spec.utilities})
        found = {}
        for name in problem.utilities:
            achieved = self.gain(name)
            # An absolute threshold is a fixed number: the reference's sampling error is no part of its slack.
            if problem.form is Form.margin:
                measured, asked = achieved, margins[name]
            else:
                measured, asked = self.mean(self.policy.scores[name]), floors[name]
            found[name] = {
                "requested_margin": margins[name],
                "achieved_margin": achieved.to_dict(),
                "violation": {
                    **measured.to_dict(),
                    "mean": violation(measured.mean, asked),
                    "low": _or_none(violation(measured.high, asked)),
                    "high": _or_none(violation(measured.low, asked)),
                },
                "satisfied": bool(measured.mean >= asked),
                "satisfied_with_confidence": bool(measured.low >= asked),
            }
        return found

    def groups(self) -> dict[str, dict[str, Any]]:
        """Mean reward and utilities by kind of prompt, where there is more than one kind."""
        kinds = np.unique(self.policy.kinds)
        if len(kinds) < 2:
            return {}
        return {
            str(kind): {
                name: self.mean(values, self.policy.kinds == kind).to_dict()
                for name, values in self.policy.scores.items()
            }
            for kind in kinds
        }

    def per_prompt(self, extra: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        """Means per prompt: what later comparisons between policies are paired on."""
        ids, owner = np.unique(self.policy.prompts, return_inverse=True)
        counts = np.bincount(owner)
        columns = {
            name: np.bincount(owner, weights=values) / counts for name, values in (self.policy.scores | extra).items()
        }
        return [
            {"prompt_id": str(ids[i]), "n": int(counts[i])} | {name: float(v[i]) for name, v in columns.items()}
            for i in range(len(ids))
        ]


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value


def _estimate(
    spec: EvaluateSpec, inputs: Mapping[str, Facts], runtime: Runtime, hints: Mapping[str, float]
) -> Estimate:
    return Estimate(Facts(rows=inputs["responses"].rows), overhead_seconds=1.5)


EVALUATE = register(Stage("evaluate", 1, "evaluation", EvaluateSpec, _evaluate, _estimate))
