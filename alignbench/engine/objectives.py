"""What a training stage minimises, as a function of response log-probs.

An objective owns its examples (token rows, labels, cached reference log-probs); the loop in
`alignbench.engine.train` knows none of that. Every example carries a weight, and the loss of an optimiser step is
sum(loss) / sum(weight) over the global batch, so neither micro-batches nor ranks change it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from alignbench import losses
from alignbench.engine.batching import Row

LogProbFunction = Callable[[Sequence[Row]], torch.Tensor]


@dataclass(frozen=True)
class StepContext:
    """Quantities of the whole optimiser step that its micro-batches share (KTO's KL estimate)."""

    kl: float = 0.0


class Objective(Protocol):
    """The interface the training loop works with."""

    name: str
    #: value of every example's loss when the policy is the reference; None where there is no reference
    reference_value: Callable[[np.ndarray], np.ndarray] | None

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def rows(self, index: int) -> tuple[Row, ...]:
        """Token rows of one example, the same number for each."""
        ...

    def weights(self, indices: np.ndarray) -> np.ndarray:
        """Denominator contribution of each example, shape (len(indices),)."""
        ...

    def context(self, indices: np.ndarray, logprobs: LogProbFunction) -> StepContext:
        """Compute what the whole step shares, without gradients."""
        ...

    def loss(
        self, logprobs: torch.Tensor, indices: np.ndarray, context: StepContext
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Losses (examples,) and metrics (examples,) from log-probs of shape (examples, rows)."""
        ...


@dataclass
class SftObjective:
    """Mean negative log-likelihood per response token."""

    examples: list[Row]
    name: str = "sft"
    reference_value: Callable[[np.ndarray], np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def rows(self, index: int) -> tuple[Row, ...]:
        return (self.examples[index],)

    def weights(self, indices: np.ndarray) -> np.ndarray:
        return np.array([self.examples[i].response_length for i in indices], dtype=np.float64)

    def context(self, indices: np.ndarray, logprobs: LogProbFunction) -> StepContext:
        return StepContext()

    def loss(
        self, logprobs: torch.Tensor, indices: np.ndarray, context: StepContext
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return losses.nll(logprobs[:, 0]), {}


@dataclass
class PairObjective:
    """DPO or IPO on chosen and rejected responses, with cached reference log-probs.

    Attributes:
        chosen: Rows of the preferred responses.
        rejected: Rows of the others; same prompts, same order.
        reference: float64 (examples, 2) reference log-probs, chosen first.
        loss_name: "dpo" or "ipo".
        beta: KL weight of this stage (SACPO's safety step: beta/lambda).
    """

    chosen: list[Row]
    rejected: list[Row]
    reference: np.ndarray
    loss_name: str
    beta: float
    label_smoothing: float = 0.0
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.loss_name
        self._reference = torch.as_tensor(self.reference, dtype=torch.float64)
        self.reference_value = lambda indices: np.full(
            len(indices), losses.reference_value(self.loss_name, self.beta)
        )

    def __len__(self) -> int:
        return len(self.chosen)

    def rows(self, index: int) -> tuple[Row, ...]:
        return self.chosen[index], self.rejected[index]

    def weights(self, indices: np.ndarray) -> np.ndarray:
        return np.ones(len(indices))

    def context(self, indices: np.ndarray, logprobs: LogProbFunction) -> StepContext:
        return StepContext()

    def loss(
        self, logprobs: torch.Tensor, indices: np.ndarray, context: StepContext
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        ratio = logprobs - self._reference[indices].to(logprobs.device)
        chosen, rejected = ratio[:, 0].float(), ratio[:, 1].float()
        if self.loss_name == "dpo":
            value = losses.dpo(chosen, rejected, self.beta, self.label_smoothing)
        else:
            value = losses.ipo(chosen, rejected, self.beta)
        with torch.no_grad():
            margin = losses.implicit_reward(chosen - rejected, self.beta)
            metrics = {
                "margin": margin,
                "accuracy": (margin > 0).float() + 0.5 * (margin == 0).float(),
                "chosen_logratio": chosen.detach(),
                "rejected_logratio": rejected.detach(),
            }
        return value, metrics


@dataclass
class KtoObjective:
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
    """

    examples: list[Row]
    desirable: np.ndarray
    reference: np.ndarray
    mismatched: list[Row]
    mismatched_reference: np.ndarray
    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    name: str = "kto"

    def __post_init__(self) -> None:
        self._reference = torch.as_tensor(self.reference, dtype=torch.float64)
        self._desirable = torch.as_tensor(self.desirable, dtype=torch.bool)
        self.reference_value = lambda indices: np.where(
            self.desirable[indices],
            losses.reference_value("kto", self.beta, weight=self.desirable_weight),
            losses.reference_value("kto", self.beta, weight=self.undesirable_weight),
        )

    def __len__(self) -> int:
        return len(self.examples)

    def rows(self, index: int) -> tuple[Row, ...]:
        return (self.examples[index],)

    def weights(self, indices: np.ndarray) -> np.ndarray:
        return np.ones(len(indices))

    def context(self, indices: np.ndarray, logprobs: LogProbFunction) -> StepContext:
        now = logprobs([self.mismatched[i] for i in indices]).double().cpu()
        ratio = now - torch.as_tensor(self.mismatched_reference[indices])
        return StepContext(kl=float(losses.kto_kl(ratio.sum(), len(indices))))

    def loss(
        self, logprobs: torch.Tensor, indices: np.ndarray, context: StepContext
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        ratio = (logprobs[:, 0] - self._reference[indices].to(logprobs.device)).float()
        desirable = self._desirable[indices].to(ratio.device)
        kl = torch.tensor(context.kl, dtype=ratio.dtype, device=ratio.device)
        value = losses.kto(ratio, desirable, kl, self.beta, self.desirable_weight, self.undesirable_weight)
        with torch.no_grad():
            reward = losses.implicit_reward(ratio, self.beta)
            sign = desirable.float() * 2 - 1
            metrics = {
                "margin": reward * sign,
                "accuracy": ((reward - self.beta * kl) * sign > 0).float(),
                "kl_estimate": kl.expand_as(reward),
            }
        return value, metrics
