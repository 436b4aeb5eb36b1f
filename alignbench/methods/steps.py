"""What recipes share: a preference step, the bank that a dual is solved on, iterates and which one is reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from alignbench import dual_descent
from alignbench.config import SamplingConfig, TrainConfig, check_train
from alignbench.errors import ConfigError
from alignbench.lab import Bank, PreferSettings
from alignbench.losses import pair_loss
from alignbench.methods.recipe import Outcome
from alignbench.models.scorers import find_scorer
from alignbench.stages.dualize import check_solver
from alignbench.stages.relabel import LABEL_KINDS, LAGRANGIAN

if TYPE_CHECKING:
    from alignbench.config import Config
    from alignbench.lab import Lab, Node
    from alignbench.problem import Problem

DATASET = "dataset"


@dataclass
class StepSettings:
    """One preference step as a YAML states it.

    Attributes:
        loss: "dpo", "ipo" or "kto".
        labels: "dataset" (the pairs' own), or labels from scores: "bernoulli", "argmax", "soft".
        scorer: Who scores the pairs, where labels come from scores.
        kto_labels: "preferred" or "is_safe" (KTO only).
        kto_balance: Weight undesirable responses by n_desirable / n_undesirable (KTO only).
        train: Optimiser settings.
    """

    loss: str = "dpo"
    labels: str = DATASET
    scorer: str = "gold"
    kto_labels: str = "preferred"
    kto_balance: bool = True
    train: TrainConfig = field(default_factory=TrainConfig)

    def check(self, where: str, config: Config, *, from_scores: bool = False) -> None:
        """Refuse what cannot train; `where` is the step's configuration key.

        Args:
            where: For messages.
            config: The whole configuration.
            from_scores: Whether the method relabels, so that the pairs' own labels are no choice.
        """
        pair_loss(self.loss)
        check_train(self.train, f"{where}.train")
        if self.kto_labels not in ("preferred", "is_safe"):
            raise ConfigError(
                f"kto_labels = {self.kto_labels!r}", where=f"{where}.kto_labels", mend="preferred or is_safe"
            )
        known = LABEL_KINDS if from_scores else (DATASET, *LABEL_KINDS)
        if self.labels not in known:
            raise ConfigError(f"labels = {self.labels!r}", where=f"{where}.labels", mend=f"one of: {', '.join(known)}")
        if self.labels == "soft" and self.loss != "dpo":
            raise ConfigError(
                f"soft labels have no {self.loss} loss", where=f"{where}.labels", mend="labels=bernoulli, or loss=dpo"
            )
        if self.loss == "kto" and self.kto_labels == "is_safe" and self.labels != DATASET:
            raise ConfigError(
                "kto_labels=is_safe reads the data set's own flags, which labels from scores replace",
                where=f"{where}.kto_labels",
                mend="kto_labels=preferred, or labels=dataset",
            )
        if self.labels != DATASET and not from_scores:
            check_scorer(self.scorer, f"{where}.scorer", config)

    def prefer(self) -> PreferSettings:
        """The lab's form of these settings."""
        return PreferSettings(self.loss, self.train, self.kto_labels, self.kto_balance, self.labels == "soft")


def check_scorer(name: str, where: str, config: Config) -> None:
    """Refuse a scorer that is unknown, scores nothing, or does not know the data."""
    find_scorer(name)
    if name == "none" or (name == "gold" and config.dataset.world is None):
        raise ConfigError(
            f"the scorer {name!r} cannot score these data",
            where=where,
            mend="register a score model (README, 'Adding a scorer'); gold belongs to the embedded worlds",
        )


def train(
    lab: Lab, start: Node, reference: Node, pairs: Node, *, objective: str, beta: float, step: StepSettings,
    label: str, **extra: Any,
) -> Node:  # fmt: skip
    """`lab.prefer` on the labels that the step's settings ask for: the pairs' own, or labels from scores."""
    if step.labels != DATASET:
        extra["labels"] = lab.relabel(
            pairs,
            lab.pair_scores(pairs, step.scorer),
            objective=objective,
            kind=step.labels,
            label=f"{step.labels} labels for {label}",
        )
    return lab.prefer(
        start, reference, pairs, objective=objective, beta=beta, settings=step.prefer(), label=label, **extra
    )


def relabel_and_train(
    lab: Lab, problem: Problem, start: Node, scores: Node, multipliers: Node, step: StepSettings, name: str,
    *, scale: float = 1.0, round: int = 0,
) -> Node:  # fmt: skip
    """Pseudo-preferences by r + <lambda, g>, then preference training against pi_ref at the problem's beta.

    A later round draws its own labels and goes on with the pairs where the round before ended.

    Source: CAN Algorithm 1 lines 5 and 6 (arXiv 2405.19544), CAID Algorithm 2 line 7 (arXiv 2505.19387).
    """
    pairs = lab.pairs()
    labels = lab.relabel(
        pairs,
        scores,
        objective=LAGRANGIAN,
        kind=step.labels,
        multipliers=multipliers,
        scale=scale,
        draw=round,
        label=f"{step.labels} labels for {name}",
    )
    return lab.prefer(
        start,
        lab.reference(),
        pairs,
        objective=LAGRANGIAN,
        beta=problem.beta,
        settings=step.prefer(),
        label=f"prefer {name}",
        labels=labels,
        round=round,
    )


@dataclass
class DualSettings:
    """The bank of scored reference responses that the dual is solved on, and how.

    Attributes:
        scorer: Who scores it (model-based methods).
        splits: Prompts it is made for; never the ones that results are reported on.
        samples: Responses per prompt; listed worlds use every answer with its exact weight.
        sampling: How they are drawn.
        solver: "newton", "projected_gradient" or "can-2024".
    """

    scorer: str = "gold"
    splits: list[str] = field(default_factory=lambda: ["train"])
    samples: int = 64
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    solver: str = "newton"

    def check(self, config: Config, *, scored: bool) -> None:
        """Refuse a bank that nothing can be estimated on."""
        check_splits(self.splits, "method.dual.splits")
        check_solver(self.solver, "method.dual.solver")
        if self.samples < 2:
            raise ConfigError(
                f"{self.samples} response(s) per prompt leave nothing to reweight",
                where="method.dual.samples",
                mend="64 or more; the estimate of lambda is biased upwards with few (CAN, Fig. 4)",
            )
        if self.solver == "can-2024" and len(config.constraint.utilities) > 1:
            raise ConfigError(
                "the released schedule knows one constraint", where="method.dual.solver", mend="solver=newton"
            )
        if scored:
            check_scorer(self.scorer, "method.dual.scorer", config)

    def answers(self, lab: Lab, policy: Node, label: str, samples: int | None = None) -> tuple[Node, Node | None]:
        """Responses (and weights) of a policy, not scored."""
        return lab.answers(
            policy,
            splits=tuple(self.splits),
            samples=self.samples if samples is None else samples,
            sampling=self.sampling,
            label=label,
        )

    def bank(self, lab: Lab, policy: Node, label: str, samples: int | None = None) -> Bank:
        """Scored responses of a policy."""
        responses, weights = self.answers(lab, policy, label, samples)
        return Bank(responses, lab.score(responses, self.scorer, label=responses.label), weights)


def check_splits(splits: Sequence[str], where: str) -> None:
    """Refuse prompts that results are reported on."""
    if not splits or set(splits) - {"train", "validation"}:
        raise ConfigError(
            f"splits = {list(splits)}: multipliers are chosen on prompts that no result is reported on",
            where=where,
            mend="[train], [validation] or both",
        )


def check_multipliers(values: Sequence[float], config: Config, where: str) -> None:
    """Refuse multipliers that do not fit the constraints."""
    utilities = config.constraint.utilities
    if len(values) != len(utilities) or not all(np.isfinite(v) and v >= 0 for v in values):
        raise ConfigError(
            f"multipliers {list(values)} for the utilities {list(utilities)}",
            where=where,
            mend="one number >= 0 per utility, for instance [1.0]",
        )


@dataclass
class CostSettings:
    """How the cost of a policy is estimated from binary labels.

    Attributes:
        annotator: Scorer behind the labels: gold, a cost model, a judge.
        splits: Prompts that are sampled; never the reported ones.
        samples: Responses per prompt (their number over all prompts is N^CE).
        sampling: How they are drawn.
        labels: M^CE, labels per response.
        draw: "bernoulli" (independent annotators, P(unsafe) = sigmoid(cost)) or "sign" (a judge: cost > 0).
        estimator: "logit" (cost units, the problem's thresholds) or "rate" (share of unsafe labels).
        rate_limits: Largest unsafe share of each utility, for "rate".
        clip: C_max, bound of an estimated cost ("logit").
    """

    annotator: str = "gold"
    splits: list[str] = field(default_factory=lambda: ["train"])
    samples: int = 4
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    labels: int = 16
    draw: str = "bernoulli"
    estimator: str = "logit"
    rate_limits: list[float] | None = None
    clip: float = 4.0

    def check(self, config: Config) -> None:
        """Refuse what estimates nothing."""
        where = "method.cost"
        check_scorer(self.annotator, f"{where}.annotator", config)
        check_splits(self.splits, f"{where}.splits")
        if self.draw not in ("bernoulli", "sign") or self.estimator not in ("logit", "rate"):
            raise ConfigError(
                f"draw = {self.draw!r}, estimator = {self.estimator!r}",
                where=where,
                mend="draw: bernoulli or sign; estimator: logit or rate",
            )
        if self.estimator == "logit" and (self.draw == "sign" or self.labels < 2):
            raise ConfigError(
                "one opinion per response has no logit",
                where=f"{where}.estimator",
                mend="several bernoulli labels per response, or estimator=rate with rate_limits",
            )
        limits, utilities = self.rate_limits, config.constraint.utilities
        if self.estimator == "rate" and (
            limits is None or len(limits) != len(utilities) or not all(0 < v < 1 for v in limits)
        ):
            raise ConfigError(
                f"rate_limits = {limits} for the utilities {list(utilities)}",
                where=f"{where}.rate_limits",
                mend="the largest unsafe share of each utility, for instance [0.2]",
            )
        if self.samples < 1 or self.labels < 1 or self.clip <= 0:
            raise ConfigError(
                f"samples {self.samples}, labels {self.labels}, clip {self.clip}",
                where=where,
                mend="at least one of each, and a positive clip",
            )


def annotated(lab: Lab, problem: Problem, cost: CostSettings, policy: Node, name: str) -> tuple[Node, Node]:
    """Responses of a policy with their binary labels."""
    responses = lab.sample(
        policy, tuple(cost.splits), samples=cost.samples, sampling=cost.sampling, label=f"cost {name}"
    )
    scores = lab.score(responses, cost.annotator, label=f"cost {name}")
    return responses, lab.annotate(scores, problem, labels=cost.labels, draw=cost.draw, label=name)


REPORTED = ("last", "best_feasible", "average")


@dataclass(frozen=True)
class Iterate:
    """One iterate of a dual method: its policy, the multipliers it was trained at, and its measured slack."""

    policy: Node
    multipliers: Node
    slack: Node


def report_iterates(
    lab: Lab,
    name: str,
    iterates: Sequence[Iterate],
    reported: str,
    averaged: Node | None,
    mean: Node | None,
    *,
    every: bool,
) -> Outcome:
    """All iterates as an outcome: which one is reported, the trajectory, whether the dual oscillated.

    Args:
        lab: The lab.
        name: Row of the reported iterate.
        iterates: In order.
        reported: "last", "best_feasible" (largest reward among those whose measured slack is not negative, or
            where the reward is not measured the smallest slack; the least violated if none is feasible) or
            "average" (a further policy, at the mean multiplier).
        averaged: That policy, for "average".
        mean: Its multiplier.
        every: Whether every iterate gets a row; otherwise the first and the reported one.
    """
    trajectory = [_entry(lab, t, one) for t, one in enumerate(iterates, 1)]
    known = [entry for entry in trajectory if entry is not None]
    chosen = len(iterates) - 1
    if reported == "best_feasible" and len(known) == len(iterates):
        chosen = max(range(len(known)), key=lambda t: _merit(known[t]))
    rows = {f"iterate {t}": t - 1 for t in range(1, len(iterates) + 1)}
    if reported != "average":
        rows = {(name if t == chosen else row): t for row, t in rows.items()}
    kept = {row: t for row, t in rows.items() if every or t in (0, chosen)}
    policies = {row: iterates[t].policy for row, t in kept.items()}
    duals = {row: iterates[t].multipliers for row, t in kept.items()}
    if averaged is not None and mean is not None:
        policies[name], duals[name] = averaged, mean
    for entry in known:
        entry["policy"] = next((row for row, t in kept.items() if t == entry["iteration"] - 1), None)
    values = np.array([list(entry["multipliers"].values()) for entry in known])
    return Outcome(
        policies,
        name,
        trajectory=known,
        duals=duals,
        diagnostics={
            "reported_iterate": reported,
            "reported_iteration": None if reported == "average" else chosen + 1,
            "oscillates": bool(len(known) > 2 and (dual_descent.oscillation(values) or _swings(known))),
        },
    )


def _swings(entries: Sequence[dict[str, Any]]) -> bool:
    """Whether some slack changes its sign at each of the last three steps, never within its interval of zero.

    Few iterations show no settled pattern, so only swings that sampling cannot explain count.
    """
    for utility in entries[0]["slack"] if len(entries) >= 4 else ():
        late = [entry["slack"][utility] for entry in entries[-4:]]
        clear = all(s["low"] is not None and (s["low"] > 0 or s["high"] < 0) for s in late)
        if clear and all(a["mean"] * b["mean"] < 0 for a, b in pairwise(late)):
            return True
    return False


def _entry(lab: Lab, iteration: int, one: Iterate) -> dict[str, Any] | None:
    stated, measured = lab.peek(one.multipliers, "multipliers.json"), lab.peek(one.slack, "slack.json")
    if stated is None or measured is None:
        return None
    return {
        "iteration": iteration,
        "artifact": one.policy.key,
        "multipliers": stated["multipliers"],
        "at_bound": stated.get("at_bound", dict.fromkeys(stated["multipliers"])),
        "slack": measured["slack"],
        "reward": measured["reward"],
    }


def _merit(entry: dict[str, Any]) -> tuple[float, float]:
    slack = [value["mean"] for value in entry["slack"].values()]
    violated = sum(min(0.0, value) for value in slack)
    return violated, sum(slack) * -1.0 if entry["reward"] is None else entry["reward"]
