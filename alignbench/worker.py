"""One rank of a stage: started by `alignbench.launch`, never by hand.

    python -m alignbench.worker FOLDER      (under torchrun's environment: RANK, WORLD_SIZE, ...)

FOLDER holds the frozen job. Every rank runs the stage's own function; rank 0 writes the artifact's files, the others
write theirs to a folder that is thrown away. What a rank leaves in FOLDER: its log, and `failed_K.json` if it failed.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignbench.cli import quieten
from alignbench.engine import group
from alignbench.errors import AlignbenchError
from alignbench.jsonio import atomic_write_json
from alignbench.launch import COST, JOB, METRICS, PARENT, die_with_parent, failure_file, log_file
from alignbench.stages import STAGES


def main(arguments: list[str] | None = None) -> int:
    """Run this rank's part; returns the exit status. An error ends the process with status 1, and is written down."""
    (given,) = sys.argv[1:] if arguments is None else arguments
    folder, rank = Path(given), int(os.environ["RANK"])
    die_with_parent(int(os.environ[PARENT]))
    _open_log(folder, rank)
    quieten()
    sys.excepthook = lambda kind, error, trace: _confess(folder, rank, error)
    _work(folder, rank)
    return 0


def _work(folder: Path, rank: int) -> None:
    import torch
    import torch.distributed as dist

    name, context = pickle.loads((folder / JOB).read_bytes())
    if context.runtime.hardware.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before the group: NCCL takes the current device
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")
    with tempfile.TemporaryDirectory(prefix="alignbench-rank-") as scratch:
        own = replace(context, on_metrics=lambda step, metrics: None, out=Path(scratch))
        if rank == 0:
            own = replace(own, on_metrics=_writer(folder / METRICS), out=context.out)
        STAGES[name].run(own)
        costs = group.gather(dict(own.cost))
    if rank == 0:
        atomic_write_json(folder / COST, together(costs))
    dist.destroy_process_group()


def together(costs: list[dict[str, float]]) -> dict[str, float]:
    """The cost of all ranks: peaks are the worst rank's, and what else is counted every rank counts for all."""
    return {
        name: max(cost.get(name, value) for cost in costs) if name.startswith("peak_") else value
        for name, value in costs[0].items()
    }


def _writer(path: Path) -> Any:
    stream = path.open("a", encoding="utf-8", buffering=1)

    def write(step: int, metrics: Mapping[str, float]) -> None:
        import json

        stream.write(json.dumps([step, dict(metrics)]) + "\n")

    return write


def _open_log(folder: Path, rank: int) -> None:
    """Log lines of every rank to its file; rank 0's to the terminal too, other ranks' whole output to the file."""
    stream = log_file(folder, rank).open("a", encoding="utf-8", buffering=1)
    handlers: list[logging.Handler] = [logging.StreamHandler(stream)]
    if rank == 0:
        handlers.append(logging.StreamHandler(sys.stderr))
    else:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    logging.basicConfig(
        level=logging.INFO, format=f"[%(asctime)s][%(name)s][%(levelname)s][rank {rank}] - %(message)s",
        handlers=handlers, force=True,
    )  # fmt: skip


def _confess(folder: Path, rank: int, error: BaseException) -> None:
    told = {"what": str(error), "where": "", "mend": ""}
    if isinstance(error, AlignbenchError):
        told = {"what": error.what, "where": error.where, "mend": error.mend}
    text, kind = "".join(traceback.format_exception(error)), type(error).__name__
    # to the file only: the terminal gets the launching process's words
    with log_file(folder, rank).open("a", encoding="utf-8") as stream:
        stream.write(text)
    # the earliest failure is the cause, the later ones its echo; this clock is one for all local ranks and never jumps
    atomic_write_json(
        failure_file(folder, rank), {"rank": rank, "time": time.monotonic(), "type": kind, "traceback": text, **told}
    )


if __name__ == "__main__":
    sys.exit(main())
