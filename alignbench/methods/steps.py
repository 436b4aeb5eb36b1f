"""What recipes share: one preference step, on the data's labels or on labels from scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from alignbench.config import TrainConfig, check_train
from alignbench.errors import ConfigError
from alignbench.lab import PreferSettings
from alignbench.losses import pair_loss
from alignbench.methods.estimates import check_scorer
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
