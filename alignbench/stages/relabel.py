"""Stages that make labels and implicit scores: implicit, relabel, annotate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignbench.engine.runtime import derive_seed
from alignbench.errors import DataError, InvariantError
from alignbench.jsonio import write_json, write_jsonl
from alignbench.problem import cost_from_utility, utility_from_cost
from alignbench.stages.stage import Context, Estimate, Facts, Stage, register
from alignbench.worlds.annotate import sigmoid

#: How a pair's label is made from a score difference.
LABEL_KINDS = ("bernoulli", "argmax", "soft")
LAGRANGIAN = "lagrangian"


@dataclass(frozen=True)
class ImplicitSpec:
    """Scores implied by preference-aligned policies: KL weight times log-ratio to the reference.

    Source: CAN (arXiv 2405.19544, eq. 7 and Algorithm 3; DPO's implicit reward). A policy's inputs have its
    objective as role; the reference has the role "reference".

    Attributes:
        table: "pairs" or "responses".
        kl_weights: (objective, KL weight that its policy was aligned with), reward first.
    """

    table: str
    kl_weights: tuple[tuple[str, float], ...]


def _implicit(ctx: Context) -> None:
    """Per response {objective: score}, per pair {objective: [score_0, score_1]}; null where truncation dropped it."""
    spec: ImplicitSpec = ctx.spec
    tables = {role: _logprob_table(artifact, spec.table) for role, artifact in ctx.inputs.items() if role != "rows"}
    name = "pairs.jsonl" if spec.table == "pairs" else "responses.jsonl"
    count = len(ctx.inputs["rows"].jsonl(name))
    index, base = tables["reference"]
    scores: dict[str, np.ndarray] = {}
    kl = {}
    for objective, weight in spec.kl_weights:
        own_index, own = tables[objective]
        if not np.array_equal(own_index, index):
            raise InvariantError(
                f"log-probs of the {objective} policy and of the reference are not of the same rows",
                where="implicit scores",
                mend="remove the log-probs that were edited; template and lengths of both must agree",
            )
        values = np.full((count, base.shape[1]), np.nan)
        values[index] = weight * (own - base)
        scores[objective] = values
        kl[objective] = float(np.mean(base - own))
    rows = [{objective: _plain(values[i], spec.table) for objective, values in scores.items()} for i in range(count)]
    write_jsonl(ctx.out / "scores.jsonl", rows)
    # on responses drawn from the reference this is d_j = KL(pi_ref || pi_gj) of Algorithm 2, line 4
    write_json(ctx.out / "summary.json", {"mean_log_ratio_reference_over_policy": kl})


def _plain(values: np.ndarray, table: str) -> Any:
    found = [None if np.isnan(v) else float(v) for v in values]
    return found if table == "pairs" else found[0]


def _logprob_table(artifact: Any, table: str) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (n,) and log-probs (n, 2) of pairs or (n, 1) of responses."""
    from safetensors.numpy import load_file

    if table == "responses":
        found = load_file(artifact.path("responses.safetensors"))["response"]
        return np.arange(len(found)), found[:, None]
    files = [f for f in ("train.safetensors", "validation.safetensors") if f in artifact.manifest["files"]]
    parts = [load_file(artifact.path(f)) for f in files]
    index = np.concatenate([part["index"] for part in parts])
    return index, np.concatenate([np.stack([part["response_0"], part["response_1"]], 1) for part in parts])


IMPLICIT = register(
    Stage(
        "implicit",
        1,
        "scores",
        ImplicitSpec,
        _implicit,
        lambda spec, inputs, runtime, hints: Estimate(inputs["rows"], overhead_seconds=1.0),
    )
)


@dataclass(frozen=True)
class RelabelSpec:
    """Pseudo-preferences from scores: P(response 1 better) = sigmoid(scale * (s_1 - s_0)).

    Source: CAN (arXiv 2405.19544, eq. 5), CAID (arXiv 2505.19387, eq. 13): the label is *drawn*, and no KL
    weight stands inside the sigmoid.

    Attributes:
        objective: "lagrangian" for s = r + <lambda, g>, or the name of one score.
        kind: "bernoulli" draws the label, "argmax" takes the larger score, "soft" draws it and keeps the
            probability for the loss.
        scale: 1; the released PeCAN code has 1/beta here (its labels are 1/beta times too sharp).
        draw: Which of several independent draws of the labels: an iteration's own.
    """

    objective: str
    kind: str
    scale: float = 1.0
    draw: int = 0


def _relabel(ctx: Context) -> None:
    from safetensors.numpy import save_file

    spec: RelabelSpec = ctx.spec
    rows = ctx.inputs["scores"].jsonl("scores.jsonl")
    ctx.inputs["scores"].require_made_from(ctx.inputs["pairs"], "relabel: scores")
    count = len(ctx.inputs["pairs"].jsonl("pairs.jsonl"))
    if len(rows) != count:
        raise InvariantError(f"{len(rows)} scored pairs for {count} pairs", where="relabel", mend="score these pairs")
    if spec.objective == LAGRANGIAN:
        multipliers = ctx.inputs["multipliers"].json("multipliers.json")["multipliers"]
        weights = {"reward": 1.0, **multipliers}
    else:
        weights = {spec.objective: 1.0}
    missing = [name for name in weights if name not in rows[0]]
    if missing:
        raise DataError(
            f"the pairs have no score {', '.join(missing)}",
            where=f"relabel by {spec.objective}; scores: {', '.join(rows[0])}",
            mend="choose a scorer that gives it",
        )
    values = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in weights}  # None becomes NaN
    score = sum(weight * values[name] for name, weight in weights.items())
    difference = spec.scale * (score[:, 1] - score[:, 0])
    known = np.isfinite(difference)
    # a pair that truncation dropped has no score; every training stage drops it as well
    probability = np.where(known, sigmoid(np.where(known, difference, 0.0)), 0.5)
    draws = np.random.default_rng(derive_seed(ctx.seed, "relabel", spec.draw)).random(count)
    larger = (difference > 0).astype(np.int64)
    preferred = larger if spec.kind == "argmax" else (draws < probability).astype(np.int64)
    save_file({"preferred": preferred, "probability": probability}, ctx.out / "labels.safetensors")
    write_json(
        ctx.out / "summary.json",
        {
            "pairs": count,
            "without_score": int((~known).sum()),
            "weights": weights,
            "against_the_larger_score": float((preferred != larger)[known].mean()),
            "mean_absolute_difference": float(np.abs(difference[known]).mean()),
        },
    )


RELABEL = register(
    Stage(
        "relabel",
        1,
        "labels",
        RelabelSpec,
        _relabel,
        lambda spec, inputs, runtime, hints: Estimate(Facts(rows=inputs["pairs"].rows), overhead_seconds=0.5),
    )
)


@dataclass(frozen=True)
class AnnotateSpec:
    """Binary labels of responses: M per response and utility, 1 = unsafe, P(1) = sigmoid(cost).

    Source: PD-DPO (arXiv 2510.05703, Algorithm 1 line 4): M^CE binary answers on each of N^CE responses.

    Attributes:
        utilities: Which utilities are asked about.
        labels: M, labels per response.
        draw: "bernoulli": independent annotators; "sign": a judge that always says the same (cost > 0).
    """

    utilities: tuple[str, ...]
    labels: int
    draw: str


def _annotate(ctx: Context) -> None:
    from safetensors.numpy import save_file

    spec: AnnotateSpec = ctx.spec
    rows = ctx.inputs["scores"].jsonl("scores.jsonl")
    found: dict[str, np.ndarray] = {}
    for utility in spec.utilities:
        cost = cost_from_utility(np.array([row[utility] for row in rows], dtype=np.float64))
        rng = np.random.default_rng(derive_seed(ctx.seed, "annotate", utility))
        unsafe = rng.random((len(cost), spec.labels)) < sigmoid(cost)[:, None]
        found[utility] = (
            unsafe if spec.draw == "bernoulli" else np.repeat((cost > 0)[:, None], spec.labels, 1)
        ).astype(np.uint8)
    save_file(found, ctx.out / "binary.safetensors")
    ctx.cost["binary_labels"] = float(len(rows) * spec.labels * len(spec.utilities))


ANNOTATE = register(
    Stage(
        "annotate",
        1,
        "labels",
        AnnotateSpec,
        _annotate,
        lambda spec, inputs, runtime, hints: Estimate(Facts(rows=inputs["scores"].rows), overhead_seconds=0.5),
    )
)


def logit_utility(unsafe: np.ndarray, clip: float) -> np.ndarray:
    """Each response's utility from its M binary labels, shape (n, M) -> (n,): minus the empirical logit of unsafe.

    P(unsafe) = sigmoid(cost), so the cost is its logit. Half a label is added on both sides (Haldane, Anscombe):
    the plain logit is infinite where all annotators agree. The bounded-cost class of the paper is the clip.
    """
    count = unsafe.sum(1).astype(np.float64)
    cost = np.log((count + 0.5) / (unsafe.shape[1] - count + 0.5))
    return utility_from_cost(np.clip(cost, -clip, clip))


def labels_of(artifact: Any) -> Mapping[str, np.ndarray]:
    """Binary labels by utility, (n, M)."""
    from safetensors.numpy import load_file

    return dict(load_file(artifact.path("binary.safetensors")))
