"""The ranks of one stage. A process that is not part of a group is a world of one, and pays nothing for it.

Every rank runs the stage's own function. What is worth sharing (training, log-probs, sampling, features) is divided
here and put together again on every rank, so whatever follows is the same everywhere, and only rank 0's files count.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

#: Bytes of a file that travel at a time.
_CHUNK = 1 << 25
_beat: Callable[[], None] = lambda: None  # noqa: E731 - a process that is no rank counts for nobody
_apart: list[bool] = [False]


def on_beat(beat: Callable[[], None]) -> None:
    """Have `beat` called whenever this rank makes progress."""
    global _beat
    _beat = beat


def set_apart(apart: bool) -> None:
    """Tell the group whether this rank's machine has storage of its own; all ranks call it."""
    global _apart
    _apart = gather(apart)


def any_apart() -> bool:
    """Whether some machine does not see rank 0's files."""
    return any(_apart)


def keeper() -> bool:
    """Whether this rank looks after files on its storage: rank 0, and the first rank of a machine with its own."""
    import os

    return rank() == 0 or (_apart[rank()] and os.environ.get("LOCAL_RANK") == "0")


def hand_out(folder: Path, target: Path | None) -> None:
    """Send a folder's files from rank 0 to the machines that have it not; all ranks call it.

    Args:
        folder: On rank 0.
        target: Where it goes on this rank's machine; None where nothing is needed. One that is there is left alone.
    """
    wanted = target is not None and not target.exists()
    if not any(gather(wanted)):
        return
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    growing = None if target is None else target.with_name(f"{target.name}.part")
    writes = wanted and keeper()
    for name in gather(names if rank() == 0 else [])[0]:
        with contextlib.ExitStack() as opened:
            stream = opened.enter_context((folder / name).open("rb")) if rank() == 0 else None
            sink = None
            if writes and growing is not None:
                (growing / name).parent.mkdir(parents=True, exist_ok=True)
                sink = opened.enter_context((growing / name).open("wb"))
            while True:
                chunk = [stream.read(_CHUNK) if stream else None]
                torch.distributed.broadcast_object_list(chunk)
                _beat()
                if not chunk[0]:
                    break
                if sink is not None:
                    sink.write(chunk[0])
    if writes and growing is not None and target is not None:
        growing.rename(target)
    barrier()


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
    _beat()
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
        _beat()
        if start + own < len(batches):
            found.update(zip(map(int, batch), results, strict=True))
    merged = {index: result for part in gather(found) for index, result in part.items()}
    return [merged[index] for index in range(len(merged))]
