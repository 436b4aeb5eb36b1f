"""Sequence log-probabilities: the one quantity that every loss and every KL estimate is made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from alignbench.engine import group
from alignbench.engine.batching import Row, collate, length_sorted
from alignbench.errors import InvariantError


class LogProbPolicy(nn.Module):
    """A causal language model whose forward pass returns response log-probabilities.

    Wrapping the model (instead of reading its logits outside) keeps DeepSpeed's parameter-gathering hooks
    around everything that touches weights, the output head included.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, response_mask: torch.Tensor
    ) -> torch.Tensor:
        """Sum of log pi(token) over response tokens.

        Args:
            input_ids: (batch, length) right-padded token ids.
            attention_mask: (batch, length), 1 on real tokens.
            response_mask: (batch, length), True on response tokens.

        Returns:
            (batch,) float64 sums; float64 because a sum over hundreds of fp32 terms is compared with a
            cached one at 1e-6.
        """
        logits = self.policy(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        # log-softmax over every position: on a CPU a boolean selection's backward costs more than it saves
        logprobs = torch.log_softmax(logits[:, :-1], dim=-1, dtype=torch.float32)
        chosen = logprobs.gather(-1, input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        return torch.where(response_mask[:, 1:], chosen, 0.0).double().sum(-1)


def sequence_logprobs(
    policy: nn.Module, rows: Sequence[Row], *, pad_id: int, batch: int, device: torch.device, label: str
) -> np.ndarray:
    """Log-probabilities of many sequences without gradients, batched by length.

    Args:
        policy: A causal language model in evaluation mode.
        rows: Sequences to score.
        pad_id: Any valid token id; padded positions are masked by length.
        batch: Sequences per forward pass.
        device: Where the policy is.
        label: Text of the progress bar.

    Returns:
        float64 array of shape (len(rows),), in the order of `rows`.

    Raises:
        InvariantError: one of them is not finite.
    """
    scorer = LogProbPolicy(policy)

    def score(indices: Sequence[int]) -> list[float]:
        tensors = collate([rows[i] for i in indices], pad_id).to(device).tensors()
        found: list[float] = scorer(*tensors).tolist()
        bar.update(min(len(indices) * group.world(), len(rows) - bar.n))
        return found

    with torch.inference_mode(), progress(len(rows), label, "seq") as bar:
        found = np.array(group.spread(length_sorted(rows, batch, group.world()), score), dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(found))
    if len(bad):  # cached, such a number would spoil whatever trains or is measured against it
        raise InvariantError(
            f"{len(bad)} of {len(found)} log-probs are not finite (the first is {found[bad[0]]})",
            where=f"{label}, sequences (from 0): {bad[:16].tolist()}",
            mend="the policy's weights have diverged or are damaged: look at the training that made it, lower its "
            "learning rate, or use another policy",
        )
    return found


def progress(total: int, label: str, unit: str) -> tqdm:
    """A progress bar with a rate, of rank 0; silent where standard error is not a terminal."""
    silent = True if group.rank() else None
    return tqdm(total=total, desc=label, unit=unit, disable=silent, leave=False, dynamic_ncols=True)
