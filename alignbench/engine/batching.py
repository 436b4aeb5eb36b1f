"""Which examples make up each optimiser step, and how sequences become tensors.

The order is a pure function of (number of examples, steps, seed): a resumed run, another micro-batch size
or another number of ranks sees the same examples in the same optimiser step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from alignbench.data.tokenize import pad_batch


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence: token ids, and how many of them are the prompt (which is never scored)."""

    ids: Sequence[int]
    prompt_length: int

    @property
    def response_length(self) -> int:
        """Number of response tokens (the end-of-sequence token counts)."""
        return len(self.ids) - self.prompt_length


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences: ids and masks of shape (rows, longest)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    response_mask: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return Batch(*(x.to(device, non_blocking=True) for x in self.tensors()))

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three tensors in forward's order."""
        return self.input_ids, self.attention_mask, self.response_mask


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Right-pad `rows`; masks come from lengths, never from the pad id (which may equal EOS)."""
    input_ids, attention_mask = pad_batch([list(row.ids) for row in rows], pad_id)
    positions = torch.arange(input_ids.shape[1]).unsqueeze(0)
    prompt = torch.tensor([row.prompt_length for row in rows]).unsqueeze(1)
    response_mask = (positions >= prompt) & attention_mask.bool()
    return Batch(input_ids, attention_mask, response_mask)


def total_steps(examples: int, epochs: float, batch_size: int) -> int:
    """Optimiser steps for `epochs` passes; at least one, and the last partial batch of all is left out."""
    return max(1, math.floor(examples * epochs / batch_size + 1e-9))


def example_order(examples: int, steps: int, batch_size: int, seed: int) -> np.ndarray:
    """Example indices of every step, shape (steps, batch_size): one permutation per epoch, end to end."""
    needed = steps * batch_size
    rng = np.random.default_rng([seed, 0x0DE2])
    epochs = [rng.permutation(examples) for _ in range(math.ceil(needed / examples))]
    return np.concatenate(epochs)[:needed].reshape(steps, batch_size)


def micro_batches(indices: np.ndarray, micro_batch: int) -> list[np.ndarray]:
    """Split one step's examples into equal micro-batches.

    `micro_batch` is lowered to the largest divisor of the batch, so that every micro-batch has the same
    size and gradient accumulation has the same count at each step.
    """
    size = fitting_micro_batch(len(indices), micro_batch)
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def fitting_micro_batch(batch_size: int, micro_batch: int) -> int:
    """Largest divisor of `batch_size` that is at most `micro_batch`."""
    return next(size for size in range(min(batch_size, micro_batch), 0, -1) if batch_size % size == 0)


class Sequenced(Protocol):
    """Anything with token ids."""

    @property
    def ids(self) -> Sequence[int]:
        """Token ids."""


def length_sorted(rows: Sequence[Sequenced], batch: int, ranks: int = 1) -> list[list[int]]:
    """Indices of `rows` in batches of similar length (least padding); the order is deterministic.

    Args:
        rows: What is to be batched.
        batch: Most rows in a batch.
        ranks: How many processes share the batches: they are made small enough for each to get one.
    """
    order = np.argsort([len(row.ids) for row in rows], kind="stable").tolist()
    size = max(1, min(batch, -(-len(rows) // ranks)))
    return [order[start : start + size] for start in range(0, len(order), size)]
