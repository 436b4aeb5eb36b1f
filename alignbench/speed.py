"""Seconds of a plan's stages on this machine: short pieces of their work, run by the engine itself and timed.

A stage's time is its pieces' times, each as often as it comes: optimiser steps, log-probs, batches of answers. A piece
runs on a model of random weights and the stage's shape, in a process of its own; what it took is kept per machine in
the user's cache (`ALIGNBENCH_CACHE`), so a second plan measures nothing. Of a piece that is large a part is run (of a
batch of answers two), and of a model that is large the first two blocks; what is missing is made up for in proportion.

    python -m alignbench.speed < REQUEST.json   (what `Speed` calls)
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from alignbench.architecture import ArchitectureConfig, block_weights, matrices, parameter_count, transformers_config
from alignbench.config import HardwareConfig, LoraConfig, SamplingConfig, TrainConfig
from alignbench.errors import ConfigError

log = logging.getLogger(__name__)
#: Arithmetic of a piece that is timed, at most, and of its repetitions together, about: half a second on two cores; a
#: thousand times as much on a GPU.
_MOST, _ENOUGH = {"cpu": 3e10, "cuda": 3e13}, {"cpu": 2e10, "cuda": 2e13}
#: Weights from which on two blocks stand for all.
LARGE = 1e8
#: Settings of the hardware that a piece's time depends on.
_SETTINGS = (
    *("device", "dtype", "zero_stage", "offload", "attention", "micro_batch", "micro_tokens", "eval_batch"),
    *("eval_tokens", "logits_mib", "activation_checkpointing", "threads", "compile", "optimizer"),
)


@dataclass(frozen=True)
class Piece:
    """A piece of work that is timed.

    Attributes:
        kind: "step" (an optimiser step), "forward" (log-probs without gradients), or "sample".
        shape: The model's.
        prompt: Tokens of a prompt.
        response: Tokens of a response; of "sample" on average.
        sequences: Responses to each prompt; of a step: two for pairs, one for demonstrations.
        rows: Examples of a step, sequences, or answers.
        lora: Adapters, if only these train.
        most: Tokens of the longest response; "sample" alone: a batch goes on until its last response ends.
    """

    kind: str
    shape: ArchitectureConfig
    prompt: int
    response: int
    sequences: int
    rows: int
    lora: LoraConfig | None = None
    most: int = 0

    def key(self, hardware: HardwareConfig) -> str:
        """What its time on a machine is kept under."""
        settings = {name: getattr(hardware, name) for name in _SETTINGS}
        return _digest([dataclasses.asdict(self), settings, _machine(hardware.device)])

    @property
    def flops(self) -> float:
        """About what it takes, prompts counted once."""
        weights = self.shape.layers * block_weights(self.shape) + self.shape.hidden_size * self.shape.vocab_size
        examples = self.rows if self.kind == "step" else self.rows / self.sequences
        tokens = examples * (self.prompt + self.sequences * self.response)
        return (6 if self.kind == "step" else 2) * weights * tokens

    @property
    def memory_bytes(self) -> float:
        """About what trying it takes: weights, gradients, optimizer and as much again, all in fp32."""
        head = (1 if self.shape.tied_embeddings else 2) * self.shape.hidden_size * self.shape.vocab_size
        whole = self.shape.layers * block_weights(self.shape) + head
        return 32 * (whole if whole <= LARGE else min(2, self.shape.layers) * block_weights(self.shape) + head)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


@cache
def _machine(device: str) -> list[Any]:
    """What tells one machine from another, and the versions that run on it."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line for line in lines if line.startswith("model name")), name)
    found: list[Any] = [name, len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")]
    if device == "cuda":
        import torch

        found += [torch.cuda.get_device_name(), torch.version.cuda]
    return [*found, *(metadata.version(package) for package in ("torch", "transformers", "deepspeed"))]


@dataclass
class Speed:
    """Times of pieces on this machine, measured when asked for the first time."""

    hardware: HardwareConfig

    def __post_init__(self) -> None:
        if self.hardware.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise ConfigError(
                    "times are to be measured on a GPU, and torch sees none here",
                    where="hardware.flops_per_second=null",
                    mend="state a rate, as hardware=gpu does (hardware.flops_per_second=3e14), or plan on that machine",
                )
        self.known: dict[str, float] = _read()
        self.start = self.known.get(self._start, 0.0)

    @property
    def _start(self) -> str:
        return _digest(["start", _machine(self.hardware.device)])

    def learn(self, pieces: Sequence[Piece]) -> None:
        """Measure those of `pieces` that are not known yet; all of them in one process."""
        missing = {piece.key(self.hardware): piece for piece in pieces if piece.key(self.hardware) not in self.known}
        if not missing:
            return
        log.info("timing %d piece(s) of work on this machine, for the plan", len(missing))
        request = {"hardware": dataclasses.asdict(self.hardware), "pieces": [_plain(p) for p in missing.values()]}
        done = subprocess.run(
            [sys.executable, "-m", "alignbench.speed"],
            input=json.dumps(request),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ConfigError(
                f"the plan's pieces of work could not be timed: {done.stderr.strip().splitlines()[-1:]}",
                where="hardware.flops_per_second=null",
                mend="state a rate instead of measuring: hardware.flops_per_second=6e10",
            )
        found = json.loads(done.stdout.splitlines()[-1])
        new = dict(zip(missing, found["seconds"], strict=True)) | {self._start: found["start"]}
        self.known = _read() | new
        self.start = found["start"]
        _write(self.known)

    def seconds(self, piece: Piece) -> float:
        """Of a piece that was learnt."""
        return self.known[piece.key(self.hardware)]


def _file() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignbench"
    return Path(os.environ.get("ALIGNBENCH_CACHE") or default) / "speed.json"


def _read() -> dict[str, float]:
    try:
        return {str(key): float(value) for key, value in json.loads(_file().read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # nothing there, or not ours: it is measured again


def _write(known: dict[str, float]) -> None:
    from alignbench.jsonio import atomic_write_json

    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(_file(), known)
    except OSError as error:
        log.warning("times cannot be kept (%s); the next plan measures again", error)


def _plain(piece: Piece) -> dict[str, Any]:
    return dataclasses.asdict(piece)


# ---------------------------------------------------------------- in the process that measures


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """`seconds` of every piece of a request, and `start`: what loading the libraries takes."""
    started = time.perf_counter()

    from alignbench.engine.runtime import device_of, join_process_group

    hardware = HardwareConfig(**request["hardware"] | {"processes": 1, "nodes": 1})
    join_process_group(hardware)
    start = time.perf_counter() - started
    device_of(hardware)  # sets threads
    pieces = [
        Piece(
            **each | {"shape": ArchitectureConfig(**each["shape"]), "lora": each["lora"] and LoraConfig(**each["lora"])}
        )
        for each in request["pieces"]
    ]
    return {"start": start, "seconds": [seconds_of(piece, hardware) for piece in pieces]}


def seconds_of(piece: Piece, hardware: HardwareConfig) -> float:
    """Time of a piece, from a part of it and of the model's blocks where all would take long."""
    if parameter_count(piece.shape) > LARGE and piece.shape.layers > 2:
        one, two = (
            seconds_of(replace(piece, shape=replace(piece.shape, layers=layers)), hardware) for layers in (1, 2)
        )
        return two + (piece.shape.layers - 2) * max(0.0, two - one)
    group = 1 if piece.kind == "step" else piece.sequences
    part = max(1, min(piece.rows, int(piece.rows * _MOST[hardware.device] / piece.flops) // group * group))
    run = {"step": _steps, "forward": _forward, "sample": _sample}[piece.kind]
    took = run(replace(piece, rows=part), hardware)
    fewer = part // 2 // group * group
    if piece.kind == "sample" and part < piece.rows and fewer:
        # a batch takes as many passes as its longest response, however few there are in it: only the rest grows
        each = (took - run(replace(piece, rows=fewer), hardware)) / (part - fewer)
        return took + (piece.rows - part) * max(0.0, each)
    return took * piece.rows / part


def _model(piece: Piece, hardware: HardwareConfig) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from alignbench.engine.runtime import device_of, dtype_of
    from alignbench.models.policy import add_lora

    positions = max(piece.shape.max_positions, piece.prompt + piece.response)
    config = transformers_config(
        replace(piece.shape, max_positions=positions), bos_token_id=None, eos_token_id=None, pad_token_id=0
    )
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config).to(device_of(hardware), dtype_of(hardware)).eval()
    if piece.lora is None:
        return policy
    own = {name.rsplit(".", 1)[-1] for name, _ in policy.named_modules()}
    # a family that is counted as another names its layers otherwise; theirs are taken for attention's
    other = next(iter(matrices(piece.shape)))
    targets = sorted({name if name in own else other for name in piece.lora.targets})
    return add_lora(policy, replace(piece.lora, targets=targets), 0)


def _rows(piece: Piece, count: int) -> list[list[Any]]:
    """Random sequences: `count` prompts with `piece.sequences` responses each."""
    import numpy as np

    from alignbench.engine.batching import Row

    rng = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        found: list[int] = rng.integers(1, piece.shape.vocab_size, length).tolist()
        return found

    prompts = [ids(piece.prompt) for _ in range(count)]
    return [[Row(p + ids(piece.response), piece.prompt) for _ in range(piece.sequences)] for p in prompts]


def _repeated(piece: Piece, hardware: HardwareConfig) -> int:
    """How often a piece is timed."""
    return int(min(8, max(3, _ENOUGH[hardware.device] // piece.flops)))


def _steps(piece: Piece, hardware: HardwareConfig) -> float:
    import numpy as np
    import torch

    from alignbench.engine.objectives import PairObjective, SftObjective
    from alignbench.engine.train import TrainJob, train

    times = _repeated(piece, hardware)
    rows = _rows(piece, piece.rows)
    goal = (
        PairObjective([r[0] for r in rows], [r[1] for r in rows], np.zeros((len(rows), 2)), "dpo", 0.1)
        if piece.sequences > 1
        else SftObjective([r[0] for r in rows])
    )
    settings = TrainConfig(learning_rate=0.0, epochs=times + 1, batch_size=len(rows), schedule="constant")
    stamps: list[float] = []

    def on_metrics(step: int, metrics: Any) -> None:
        if hardware.device == "cuda":
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as work:
        job = TrainJob(
            policy=_model(piece, hardware),
            objective=goal,
            settings=settings,
            hardware=replace(hardware, checkpoint_every=10**9),
            seed=0,
            pad_id=0,
            work=Path(work),
            lora=piece.lora is not None,
            starts_at_reference=False,
        )
        train(job, {}, on_metrics)
    # the first step has made the optimizer's state
    return statistics.median(after - before for before, after in itertools.pairwise(stamps))


def _timed(work: Callable[[], Any], piece: Piece, hardware: HardwareConfig) -> float:
    work()  # the first has memory to ask for
    found = []
    for _ in range(_repeated(piece, hardware)):
        started = time.perf_counter()
        work()  # its result lies on the host: it has ended
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def _forward(piece: Piece, hardware: HardwareConfig) -> float:
    from alignbench.engine.logprobs import sequence_logprobs
    from alignbench.engine.runtime import device_of

    policy = _model(piece, hardware)
    rows = [row for group in _rows(piece, -(-piece.rows // piece.sequences)) for row in group][: piece.rows]

    def run() -> Any:
        return sequence_logprobs(policy, rows, pad_id=0, hardware=hardware, device=device_of(hardware), label="time")

    return _timed(run, piece, hardware)


def _end_at(policy: Any, mean: float, most: int) -> None:
    """Let token 0 end responses by chance, which are cut at `most` tokens and have `mean` on average."""
    import torch

    chance = 1 / mean
    for _ in range(100):  # a response cut at `most` has (1 - (1 - chance) ** most) / chance tokens on average
        chance = (1 - (1 - chance) ** most) / mean
    head = policy.lm_head  # its own weights, all zero: every other token is as likely as the next
    head.weight = torch.nn.Parameter(torch.zeros_like(head.weight))
    head.bias = torch.nn.Parameter(torch.zeros_like(head.weight[:, 0]))
    with torch.no_grad():
        odds = max(chance, 1e-9) / max(1 - chance, 1e-9)
        head.bias[0] = math.log((len(head.bias) - 1) * odds)


def _sample(piece: Piece, hardware: HardwareConfig) -> float:
    from alignbench.engine.generate import Request, generate
    from alignbench.engine.runtime import device_of

    most = max(piece.most, piece.response)
    policy = _model(piece, hardware)
    _end_at(policy, piece.response, most)
    groups = _rows(piece, -(-piece.rows // piece.sequences))
    requests = [
        Request(str(i), tuple(group[0].ids[: piece.prompt]), k)
        for i, group in enumerate(groups)
        for k in range(piece.sequences)
    ][: piece.rows]

    def run() -> Any:
        return generate(
            policy,
            requests,
            sampling=SamplingConfig(most),
            eos_id=0,
            pad_id=0,
            seed=0,
            batch=len(requests),
            device=device_of(hardware),
        )

    return _timed(run, piece, hardware)


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    print(json.dumps(measure(json.load(sys.stdin))))
