"""The ranks of one stage. A process that is not part of a group is a world of one, and pays nothing for it.

Every rank runs the stage's own function. What is worth sharing (training, log-probs, sampling, features) is divided
here and put together again on every rank, so whatever follows is the same everywhere, and only rank 0's files count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def rank() -> int:
    """This process's number, 0 to world() - 1."""
    dist = torch.distributed
    return int(dist.get_rank()) if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """Number of ranks."""
    dist = torch.distributed
    return int(dist.get_world_size()) if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1:
        torch.distributed.barrier()


def gather(value: Any) -> list[Any]:
    """Every rank's value, in order of ranks, on every rank (picklable; small: it travels through CPU memory)."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    torch.distributed.all_gather_object(found, value)
    return found


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """Sums over ranks, of the same names on every rank; float64."""
    return {name: sum(own[name] for own in parts) for parts in [gather(dict(values))] for name in values}


def spread(batches: Sequence[Sequence[int]], work: Callable[[Sequence[int]], Sequence[Result]]) -> list[Result]:
    """Run batches of items on all ranks, each batch on one, and give every rank all results.

    Every rank calls `work` equally often, with a batch of its own or a repeated one whose result is thrown away:
    under ZeRO-3 a forward pass is something that all ranks do together.

    Args:
        batches: Indices of items; each item 0 .. n - 1 in exactly one batch, the same on every rank.
        work: From a batch to one result per item of it.

    Returns:
        The n results, in order of items.
    """
    ranks, own = world(), rank()
    found: dict[int, Result] = {}
    for start in range(0, len(batches), ranks):
        batch = batches[min(start + own, len(batches) - 1)]
        results = work(batch)
        if start + own < len(batches):
            found.update(zip(map(int, batch), results, strict=True))
    merged = {index: result for part in gather(found) for index, result in part.items()}
    return [merged[index] for index in range(len(merged))]
