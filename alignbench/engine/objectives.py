"""What a training stage minimises, as a function of response log-probs.

An objective owns its examples (token rows, labels, cached reference log-probs); the loop in
`alignbench.engine.train` knows none of that. Every example carries a weight, and the loss of an optimiser step
is sum(loss) / sum(weight) over the global batch, so neither micro-batches nor ranks change it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from typing_extensions import override

from alignbench import losses
from alignbench.engine.batching import Row
from alignbench.errors import ConfigError, InvariantError

LogProbFunction = Callable[[Sequence[Row]], torch.Tensor]


@dataclass(frozen=True)
class StepContext:
    """Quantities of the whole optimiser step that its micro-batches share (KTO's KL estimate)."""

    kl: float = 0.0


class Objective(ABC):
    """The interface the training loop works with."""

    name: str

    @abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abstractmethod
    def rows(self, index: int) -> tuple[Row, ...]:
        """Token rows of one example, the same number for each."""

    @abstractmethod
    def loss(
        self, logprobs: torch.Tensor, indices: np.ndarray, context: StepContext
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Losses (examples,) and metrics (examples,) from log-probs of shape (examples, rows)."""

    def weights(self, indices: np.ndarray) -> np.ndarray:
        """Denominator contribution of each example, shape (len(indices),)."""
        return np.ones(len(indices))

    def context(self, indices: np.ndarray, logprobs: LogProbFunction) -> StepContext:
        """What the whole step shares, computed without gradients."""
        return StepContext()

    def reference_value(self, indices: np.ndarray) -> np.ndarray | None:
        """Each example's loss where training starts: at policy = reference, or a zero score head; None if unknown."""
        return None


@dataclass
class SftObjective(Objective):
    """Mean negative log-likelihood per response token."""

    examples: list[Row]
    name: str = "sft"

    @override
    def __len__(self) -> int:
        return len(self.examples)

    @override
    def rows(self, index: int) -> tuple[Row, ...]:
        return (self.examples[index],)

    @override
    def weights(self, indices: np.ndarray) -> np.ndarray:
        return np.array([self.examples[i].response_length for i in indices], dtype=np.float64)

    @override
    def loss(
        self, logprobs: torch.Tensor, indices: np.ndarray, context: StepContext
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return losses.nll(logprobs[:, 0]), {}


@dataclass
class PairObjective(Objective):
    """DPO or IPO on chosen and rejected responses, with cached reference log-probs.

    With soft labels every example stands for both orders of its pair, in proportion to their probabilities, and so
    do the metrics `accuracy` and `margin`: each is the expectation, over the drawn label, of its hard-label form.
    With an offset both are about the logit `beta h - offset`, which is the policy's estimate of the score without
    its bonus, because that is what the labels speak of.

    Attributes:
        chosen: Rows of the preferred responses.
        rejected: Rows of the others; same prompts, same order.
        reference: float64 (examples, 2) reference log-probs, chosen first.
        name: "dpo" or "ipo".
        beta: KL weight of this stage (SACPO's safety step: beta/lambda).
        wrong: float64 (examples,) probability in [0, 1] that the *rejected* side is the better one; None for hard
            labels. DPO only.
        offset: float64 (examples,) bonus(chosen) - bonus(rejected) (online PD-DPO), in units of the score that the
            labels follow; None for none. DPO only.

    Raises:
        ConfigError: on construction, for soft labels or an offset with another loss than DPO, of another length than
            the examples, or with values that are no probabilities or not finite.
        InvariantError: on construction, if a reference log-prob is not finite.
    """

    chosen: list[Row]
    rejected: list[Row]
    reference: np.ndarray
    name: str
    beta: float
    wrong: np.ndarray | None = None
    offset: np.ndarray | None = None

    def __post_init__(self) -> None:
        _refuse_broken(self.name, self.reference)
        for what, values, low, high in (
            ("wrong (soft labels)", self.wrong, 0.0, 1.0),
            ("offset", self.offset, -np.inf, np.inf),
        ):
            if values is None:
                continue
            if self.name != losses.PairLoss.dpo:
                raise ConfigError(f"{what} with the loss {self.name!r}", where="PairObjective", mend="use the loss dpo")
            if values.shape != (len(self.chosen),):
                raise ConfigError(
                    f"{what} has shape {values.shape} for {len(self.chosen)} pairs",
                    where="PairObjective",
                    mend="give one number per pair",
                )
            if not (np.isfinite(values) & (values >= low) & (values <= high)).all():
                raise ConfigError(
                    f"{what} has values that are not finite or outside [{low:g}, {high:g}]",
                    where="PairObjective",
                    mend="check the labels or the bonus they were computed from",
                )

    @override
    def __len__(self) -> int:
        return len(self.chosen)

    @override
    def rows(self, index: int) -> tuple[Row, ...]:
        return self.chosen[index], self.rejected[index]

    @override
    def reference_value(self, indices: np.ndarray) -> np.ndarray:
        count = len(indices)
        wrong = np.zeros(count) if self.wrong is None else self.wrong[indices]
        offset = np.zeros(count) if self.offset is None else self.offset[indices]
        return np.array(
            [
                losses.reference_value(self.name, self.beta, label_smoothing=float(w), offset=float(o))
                for w, o in zip(wrong, offset, strict=True)
            ]
        )

    @override
    def loss(
        self, logprobs: torch.Tensor, indices: np.ndarray, context: StepContext
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        ratio = logprobs - _like(self.reference[indices], logprobs)
        chosen, rejected = ratio[:, 0].float(), ratio[:, 1].float()
        margin = losses.implicit_reward(chosen - rejected, self.beta)
        offset = None if self.offset is None else _like(self.offset[indices], logprobs).float()
        wrong = None if self.wrong is None else _like(self.wrong[indices], logprobs).float()
        if self.name == losses.PairLoss.dpo:
            value = losses.dpo(chosen, rejected, self.beta, 0.0 if wrong is None else wrong, offset)
        else:
            value = losses.ipo(chosen, rejected, self.beta)
        margin = margin if offset is None else margin - offset
        accuracy = (margin > 0).float() + 0.5 * (margin == 0).float()
        if wrong is not None:
            accuracy = (1 - wrong) * accuracy + wrong * (1 - accuracy)
            margin = (1 - 2 * wrong) * margin
        return value, {
            "margin": margin,
            "accuracy": accuracy,
            "chosen_logratio": chosen.detach(),
            "rejected_logratio": rejected.detach(),
        }


@dataclass
class KtoObjective(Objective):
    """KTO on single responses, with its KL estimated on mismatched (prompt, response) rows.

    The estimate is the mean over the whole optimiser step, taken before its gradients, so that micro-batching
    cannot change it (SACPO eq. 7; TRL's own estimate is per micro-batch).

    Attributes:
        examples: Rows of labelled responses.
        desirable: bool (examples,) labels.
        reference: float64 (examples,) reference log-probs.
        mismatched: The same prompts with another prompt's response.
        mismatched_reference: float64 (examples,) reference log-probs of those.
        beta: KL weight of this stage.
        undesirable_weight: Weight of undesirable examples; the released SACPO code takes
            n_desirable / n_undesirable.

    Raises:
        InvariantError: on construction, if a reference log-prob is not finite.
    """

    examples: list[Row]
    desirable: np.ndarray
    reference: np.ndarray
    mismatched: list[Row]
    mismatched_reference: np.ndarray
    beta: float
    undesirable_weight: float = 1.0
    name: str = "kto"

    def __post_init__(self) -> None:
        _refuse_broken(self.name, self.reference)
        _refuse_broken(self.name, self.mismatched_reference)

    @override
    def __len__(self) -> int:
        return len(self.examples)

    @override
    def rows(self, index: int) -> tuple[Row, ...]:
        return (self.examples[index],)

    @override
    def context(self, indices: np.ndarray, logprobs: LogProbFunction) -> StepContext:
        now = logprobs([self.mismatched[i] for i in indices])
        ratio = now - _like(self.mismatched_reference[indices], now)
        return StepContext(kl=float(losses.kto_kl(ratio.sum(), len(indices))))

    @override
    def reference_value(self, indices: np.ndarray) -> np.ndarray:
        weight = np.where(self.desirable[indices], 1.0, self.undesirable_weight)
        return losses.reference_value("kto", self.beta) * weight

    @override
    def loss(
        self, logprobs: torch.Tensor, indices: np.ndarray, context: StepContext
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        ratio = (logprobs[:, 0] - _like(self.reference[indices], logprobs)).float()
        desirable = torch.as_tensor(self.desirable[indices], device=ratio.device)
        value = losses.kto(ratio, desirable, context.kl, self.beta, undesirable_weight=self.undesirable_weight)
        reward = losses.implicit_reward(ratio, self.beta)
        sign = desirable.float() * 2 - 1
        return value, {
            "margin": reward * sign,
            "accuracy": ((reward - self.beta * context.kl) * sign > 0).float(),
            "kl_estimate": torch.full_like(reward, context.kl),
        }


def _refuse_broken(name: str, reference: np.ndarray) -> None:
    """Refuse cached log-probs that would make a loss NaN in some later step."""
    bad = np.flatnonzero(~np.isfinite(reference).reshape(len(reference), -1).all(1))
    if len(bad):
        raise InvariantError(
            f"{len(bad)} of {len(reference)} examples have a reference log-prob that is not finite",
            where=f"{name}, training rows (from 0): {bad[:16].tolist()}",
            mend="the reference policy's weights have diverged or are damaged: use another one, or train it anew",
        )


def _like(values: np.ndarray, tensor: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64, device=tensor.device)
