"""What training a score model minimises: preferences between scores and, of a cost model, the signs of costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from typing_extensions import override

from alignbench import losses
from alignbench.engine.batching import Row
from alignbench.engine.objectives import Objective, StepContext
from alignbench.errors import ConfigError
from alignbench.problem import utility_from_cost


@dataclass
class ScoreObjective(Objective):
    """A reward model's loss, or a cost model's (Safe RLHF, arXiv 2310.12773, eqs. 6 and 7).

    Reward: ``-log sigmoid(r_preferred - r_other)``. Cost: ``-log sigmoid(c_other - c_preferred)``, the preferred one
    being safer, and ``-log sigmoid(z c)`` of each, z = 1 where it is labelled unsafe and -1 where it is safe. Both with
    ``regularization`` times the mean square of the two scores.

    Attributes:
        preferred: Rows of the better (the safer) responses.
        other: Rows of the others; same prompts, same order.
        unsafe: bool (examples, 2), preferred first, for a cost model; None for a reward model.
        regularization: Weight of the squares, >= 0.
        name: For the log.

    Raises:
        ConfigError: on construction, for flags of another shape.
    """

    preferred: list[Row]
    other: list[Row]
    unsafe: np.ndarray | None = None
    regularization: float = 0.0
    name: str = "reward"

    def __post_init__(self) -> None:
        if self.unsafe is not None and self.unsafe.shape != (len(self.preferred), 2):
            raise ConfigError(
                f"unsafe has shape {self.unsafe.shape} for {len(self.preferred)} pairs",
                where="ScoreObjective",
                mend="give one flag per response",
            )

    @override
    def __len__(self) -> int:
        return len(self.preferred)

    @override
    def rows(self, index: int) -> tuple[Row, ...]:
        return self.preferred[index], self.other[index]

    @override
    def reference_value(self, indices: np.ndarray) -> np.ndarray:
        """Each pair's loss under a fresh head, whose scores are all 0: ln 2 per preference and per sign."""
        coins = 1 if self.unsafe is None else 3
        return np.full(len(indices), coins * math.log(2))

    @override
    def loss(
        self, logprobs: torch.Tensor, indices: np.ndarray, context: StepContext
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The pairs' losses; `logprobs` are scores here, (examples, 2), the preferred response's first."""
        preferred, other = logprobs[:, 0].float(), logprobs[:, 1].float()
        margin = preferred - other if self.unsafe is None else utility_from_cost(preferred) - utility_from_cost(other)
        value = losses.bradley_terry(margin)
        metrics = {
            "margin": margin.detach(),
            "accuracy": (margin > 0).float() + 0.5 * (margin == 0).float(),
            "preferred_score": preferred.detach(),
            "other_score": other.detach(),
        }
        if self.unsafe is not None:
            flags = torch.as_tensor(self.unsafe[indices], device=preferred.device)
            sides = [(preferred, flags[:, 0]), (other, flags[:, 1])]
            for cost, unsafe in sides:
                value = value + losses.unsafe_sign(cost, unsafe)
            right = [torch.where(cost == 0, 0.5, ((cost > 0) == unsafe).float()) for cost, unsafe in sides]
            metrics["sign_accuracy"] = (right[0] + right[1]) / 2
        if self.regularization:
            value = value + self.regularization * losses.score_penalty(preferred, other)
        return value, metrics
