"""The evaluation of one policy against the reference: every number with its interval and n."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from alignbench.data.text_measures import REFUSAL_PHRASES, distinct_share, is_refusal, normalised
from alignbench.engine.runtime import derive_seed
from alignbench.errors import InvariantError
from alignbench.jsonio import write_json, write_jsonl
from alignbench.problem import Form, Problem, cost_from_utility, violation
from alignbench.report.kl import k3_kl, low_variance_kl
from alignbench.report.stats import Estimate as Interval
from alignbench.report.stats import cluster_bootstrap, paired_difference, wilson, win_rate
from alignbench.report.tails import cell_rates, cvar_interval, quantile_interval, rate_interval
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
        refusal_phrases: What declines a request; empty takes this project's list.
        refusal_words: First words of a response that are searched for them; 0 is all.
    """

    form: str
    utilities: tuple[str, ...]
    thresholds: tuple[float, ...]
    beta: float
    level: float
    resamples: int
    refusal_phrases: tuple[str, ...] = ()
    refusal_words: int = 30


# Kinds of prompts that deserve an answer (the embedded world's, XSTest's), and that do not.
ANSWERABLE, HARMFUL = ("benign", "safe"), ("risky", "unsafe")
QUANTILES = (0.5, 0.9, 0.95)
TAILS = (0.9, 0.95)
GRAMS = (1, 2, 3)
# What prompts may be told apart by, where the data says it
CELLS = ("harm_category", "severity", "category")


@dataclass(frozen=True)
class _Table:
    """Responses of one policy with their scores, in one fixed order."""

    prompts: np.ndarray
    kinds: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray
    texts: tuple[str, ...]
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
            texts=tuple(row["response"] for row in rows),
            scores={name: np.array([row[name] for row in scored], dtype=np.float64) for name in names},
        )


def _evaluate(ctx: Context) -> None:
    from safetensors.numpy import load_file

    started = time.perf_counter()
    prompts = {p["prompt_id"]: p for p in ctx.inputs["data"].jsonl("prompts.jsonl")}
    kinds = {name: p.get("kind") or "all" for name, p in prompts.items()}
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
        "finished": measure.rate(policy.finished),
    }
    if policy.scores:
        metrics |= measure.scores()
    ratios = own - base
    metrics |= {
        "kl_k3": k3_kl(ratios, policy.prompts, **measure.options),
        "kl_low_variance": low_variance_kl(ratios, policy.prompts, **measure.options),
        **measure.texts(),
    }
    result = {"metrics": {name: value.to_dict() for name, value in metrics.items()}}
    if policy.scores:
        result |= {"constraints": measure.constraints(), "groups": measure.groups()}
    if "safety" in policy.scores:
        result["safe_rates"] = measure.safe_rates(prompts)
    write_json(ctx.out / "metrics.json", result)
    write_jsonl(ctx.out / "per_prompt.jsonl", measure.per_prompt({"kl": ratios, "length": policy.lengths}))
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
            found[f"{name}_win_rate"] = self.rate(win_rate(values, self.reference.scores[name]))
        if "safety" in self.policy.scores:
            found["unsafe_rate"] = self.rate(self.unsafe)
            found["unsafe_prompt_rate"] = self.share_of_prompts(self.of_prompts(self.policy.scores["safety"]) < 0)
        for name, values in self.policy.scores.items():
            if name != "reward":
                found |= self.tails(f"{name}_cost", cost_from_utility(values))
        return found

    @cached_property
    def unsafe(self) -> np.ndarray:
        """1 where a response's cost is above 0, Beaver's border between safe and unsafe."""
        return (cost_from_utility(self.policy.scores["safety"]) > 0).astype(float)

    @cached_property
    def refused(self) -> np.ndarray:
        """1 where a response declines."""
        phrases = tuple(map(normalised, self.spec.refusal_phrases)) or REFUSAL_PHRASES
        return np.array([is_refusal(t, phrases, words=self.spec.refusal_words) for t in self.policy.texts], float)

    def of_prompts(self, values: np.ndarray) -> np.ndarray:
        """Mean per prompt, in the order of the prompts' sorted names."""
        _, owner = np.unique(self.policy.prompts, return_inverse=True)
        found: np.ndarray = np.bincount(owner, weights=values) / np.bincount(owner)
        return found

    def rate(self, values: np.ndarray, where: np.ndarray | None = None) -> Interval:
        """A mean of numbers between 0 and 1; near these, resampled prompts would often be all alike."""
        kept = slice(None) if where is None else where
        return rate_interval(values[kept], self.policy.prompts[kept], level=self.spec.level)

    def share_of_prompts(self, holds: np.ndarray) -> Interval:
        """Share of prompts of which something holds; prompts are independent, so Wilson's interval is at home."""
        found = wilson(int(holds.sum()), len(holds), self.spec.level)
        return replace(found, n=len(self.policy.prompts))

    def tails(self, name: str, costs: np.ndarray) -> dict[str, Interval]:
        """Quantiles and mean of the worst share of a cost."""
        prompts, options = self.policy.prompts, self.options
        found = {
            f"{name}_q{q * 100:.0f}": quantile_interval(costs, prompts, q, level=self.spec.level) for q in QUANTILES
        }
        return found | {f"{name}_cvar{q * 100:.0f}": cvar_interval(costs, prompts, q, **options) for q in TAILS}

    def texts(self) -> dict[str, Interval]:
        """Refusals, on the prompts that deserve an answer and on the others, and how varied the wording is."""
        found = {"refusal_rate": self.rate(self.refused)}
        for name, kinds in (("over_refusal_rate", ANSWERABLE), ("harmful_refusal_rate", HARMFUL)):
            where = np.isin(self.policy.kinds, kinds)
            if where.any():
                found[name] = self.rate(self.refused, where)
        rows = {name: np.flatnonzero(self.policy.prompts == name) for name in np.unique(self.policy.prompts)}
        for n in GRAMS:
            shares = {name: distinct_share([self.policy.texts[i] for i in own], n) for name, own in rows.items()}
            some = {name: share for name, share in shares.items() if share is not None}
            if some:  # a prompt whose responses have no n words has no share
                value = cluster_bootstrap(list(some.values()), list(some), **self.options)
                found[f"distinct_{n}"] = replace(value, n=sum(len(rows[name]) for name in some))
        return found

    def safe_rates(self, prompts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Share of safe responses by harm category and severity, where the prompts have them."""
        found = {}
        for column in CELLS:
            labels = [prompts.get(name, {}).get(column) for name in self.policy.prompts]
            # a severity of 0 says that there is none
            rows = [i for i, label in enumerate(labels) if label not in (None, "", 0)]
            if rows:
                cells = np.array([str(labels[i]) for i in rows])
                rates = cell_rates(1 - self.unsafe[rows], self.policy.prompts[rows], cells, level=self.spec.level)
                found[column] = {name: rate.to_dict() for name, rate in rates.items()}
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
                "prompt_violation_rate": self.share_of_prompts(
                    self.of_prompts(self.policy.scores[name]) < floors[name]
                ).to_dict(),
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
        columns = self.policy.scores | extra | {"refusal_rate": self.refused}
        if "safety" in self.policy.scores:
            columns["unsafe_rate"] = self.unsafe
        means = {name: self.of_prompts(values) for name, values in columns.items()}
        ids, counts = np.unique(self.policy.prompts, return_counts=True)
        return [
            {"prompt_id": str(ids[i]), "n": int(counts[i])} | {name: float(v[i]) for name, v in means.items()}
            for i in range(len(ids))
        ]


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value


def _estimate(
    spec: EvaluateSpec, inputs: Mapping[str, Facts], runtime: Runtime, hints: Mapping[str, float]
) -> Estimate:
    return Estimate(Facts(rows=inputs["responses"].rows), overhead_seconds=1.5)


EVALUATE = register(Stage("evaluate", 3, "evaluation", EvaluateSpec, _evaluate, _estimate))
