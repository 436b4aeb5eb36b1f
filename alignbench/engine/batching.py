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


def micro_batches(sizes: Sequence[int], *, most: int, tokens: int, ranks: int, padded: bool) -> list[np.ndarray]:
    """Divide one step's examples into micro-batches: as few as the bounds allow, and of like sizes.

    Every rank takes the same number of them (`[rank::ranks]`), because each pass is something that ranks do together;
    neighbours in the list are of like size. Which micro-batch an example is in changes no sum of the step.

    Args:
        sizes: Tokens of each example; with `padded`, those of its longest row.
        most: Most examples in a micro-batch.
        tokens: Most tokens in one, padding included; an example that is longer than that gets one of its own.
        ranks: How many processes share the step; it divides the number of examples.
        padded: Whether rows are padded to the longest of their micro-batch: rows of like length then belong together.

    Returns:
        Positions of the examples, each in exactly one micro-batch; their number is a multiple of `ranks`.
    """
    longest_first = np.argsort(-np.asarray(sizes), kind="stable")
    fewest = max(-(-len(sizes) // most), 1 if padded else -(-sum(sizes) // tokens))
    for count in range(-(-min(fewest, len(sizes)) // ranks) * ranks, len(sizes) + 1, ranks):
        if padded:
            parts = np.array_split(longest_first, count)
            loads = [len(part) * sizes[part[0]] for part in parts]
        else:
            bins: list[list[int]] = [[] for _ in range(count)]
            loads = [0] * count
            for i in longest_first:  # into the least filled one that takes another
                lightest = min((k for k in range(count) if len(bins[k]) < most), key=loads.__getitem__)
                bins[lightest].append(int(i))
                loads[lightest] += sizes[i]
            order = sorted(range(count), key=lambda k: -loads[k])
            parts, loads = [np.array(bins[k]) for k in order], [loads[k] for k in order]
        if max(loads) <= tokens:
            break
    return parts


def forward_passes(rows: Sequence[Row], *, most: int, tokens: int, ranks: int, padded: bool) -> list[list[int]]:
    """Indices of `rows` by forward pass without gradients; the order is deterministic.

    Padded, rows of like length share a pass; packed, rows of one prompt do, and the prompt is counted once.

    Args:
        rows: What is to be scored.
        most: Most sequences in a pass.
        tokens: Most tokens in one, padding included; a longer row gets a pass of its own.
        ranks: How many processes share the passes: they are made small enough for each to get one.
        padded: Which of the two layouts.
    """
    prompts = [() if padded else tuple(row.ids[: row.prompt_length]) for row in rows]
    first: dict[tuple[int, ...], int] = {}
    for i, prompt in enumerate(prompts):
        first.setdefault(prompt, i)
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].ids) if padded else first[prompts[i]], i))
    most = max(1, min(most, -(-len(rows) // ranks)))
    passes: list[list[int]] = []
    load = 0
    for i in order:
        size = len(rows[i].ids)
        if padded:  # ascending: this row is the longest so far
            grown = size * (len(passes[-1]) + 1 if passes else 1)
        else:
            known = bool(passes) and prompts[passes[-1][-1]] == prompts[i]
            grown = load + (size - rows[i].prompt_length if known else size)
        if not passes or len(passes[-1]) == most or grown > tokens:
            passes.append([])
            grown = size
        passes[-1].append(i)
        load = grown
    return passes


class Sequenced(Protocol):
    """Anything with token ids."""

    @property
    def ids(self) -> Sequence[int]:
        """Token ids."""


def length_sorted(rows: Sequence[Sequenced], batch: int, ranks: int = 1) -> list[list[int]]:
    """Indices of `rows` in batches of similar length (least padding); the order is deterministic.

    Equal rows are neighbours: samples of one prompt fall into one batch, or into as few as possible.

    Args:
        rows: What is to be batched.
        batch: Most rows in a batch.
        ranks: How many processes share the batches: they are made small enough for each to get one.
    """
    first: dict[tuple[int, ...], int] = {}
    for i, row in enumerate(rows):
        first.setdefault(tuple(row.ids), i)
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].ids), first[tuple(rows[i].ids)], i))
    size = max(1, min(batch, -(-len(rows) // ranks)))
    return [order[start : start + size] for start in range(0, len(order), size)]
