"""What a stage is: a name, a version, a typed spec and a pure function from inputs to files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignbench import memory
from alignbench.config import ArchitectureConfig, HardwareConfig, LoraConfig
from alignbench.errors import ConfigError
from alignbench.speed import Piece
from alignbench.stopping import SIGNALS, Requests
from alignbench.store import Artifact

OnMetrics = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Runtime:
    """How a stage runs, as opposed to what it computes: nothing here enters an artifact's key.

    Attributes:
        hardware: Device, dtype and batch sizes (`dtype` changes numbers; the lab puts it into specs).
        evaluate_every: Optimiser steps between validations during training.
        locations: Where inputs from outside the store lie on this machine (their content is in the key).
        evaluate_examples: Most held-out examples of each validation; None: all.
    """

    hardware: HardwareConfig
    evaluate_every: int = 0
    locations: Mapping[str, Any] = field(default_factory=dict)
    evaluate_examples: int | None = None


@dataclass(frozen=True)
class Context:
    """Everything a running stage may touch.

    Attributes:
        spec: The stage's own spec dataclass.
        inputs: Artifacts by role.
        seed: The run's seed; derive one per purpose with `engine.runtime.derive_seed`.
        out: Folder whose files become the artifact.
        work: Folder for checkpoints; it survives a kill.
        cost: To be filled: trained/generated/scored tokens, seconds, peak memory.
        runtime: Device, batch sizes, locations.
        on_metrics: Called with (step, metrics) while training.
        requests: Whether the stage is asked to save what it has and stop; training asks at every step.
    """

    spec: Any
    inputs: Mapping[str, Artifact]
    seed: int
    out: Path
    work: Path
    cost: dict[str, float]
    runtime: Runtime
    on_metrics: OnMetrics
    requests: Requests = SIGNALS


@dataclass(frozen=True)
class Facts:
    """What a plan knows of an artifact before it exists.

    Attributes:
        rows: Rows in its table (pairs, responses, demonstrations).
        tokens: Mean tokens of one row, all of its sequences together, each with its prompt.
        prompt: Mean tokens of a row's prompt; 0 where nobody said.
        per_prompt: Rows of one prompt.
        trained_share: Share of the rows that training sees; the others are held out.
        parameters: Weights of the model, for a policy.
        shape: Its shape, where it is known.
    """

    rows: float = 0
    tokens: float = 0
    prompt: float = 0
    per_prompt: float = 1
    trained_share: float = 1.0
    parameters: float = 0
    shape: ArchitectureConfig | None = None


@dataclass(frozen=True)
class Estimate:
    """What a stage is expected to cost.

    Attributes:
        facts: Of the artifact it makes.
        trained_tokens: Tokens with a gradient pass.
        generated_tokens: Sampled tokens.
        scored_tokens: Tokens of forward passes without gradients.
        flops: 6 per weight and trained token, 2 per weight and other token; what shares a prompt has it once.
        memory_bytes: Peak per process, on its device: the libraries, weights, gradients, optimizer, activations.
        on_host: Whether that memory is the machine's own even where the device is a GPU.
        overhead_seconds: What its pieces are not: loading, saving, tokenising, statistics.
        pieces: Pieces of work that can be timed here, and how often each comes in one process; none where the model's
            shape is not known.
    """

    facts: Facts = Facts()
    trained_tokens: float = 0
    generated_tokens: float = 0
    scored_tokens: float = 0
    flops: float = 0
    memory_bytes: float = 0
    on_host: bool = False
    overhead_seconds: float = 0.05
    pieces: tuple[tuple[Piece, float], ...] = ()


@dataclass(frozen=True)
class Stage:
    """A registered stage.

    Attributes:
        name: Unique name.
        version: Raised whenever the numbers it makes change; part of every key.
        kind: Kind of the artifact it makes.
        spec: Its spec dataclass.
        run: The work itself.
        estimate: (spec, facts of inputs by role, runtime, hints) -> Estimate; must not load anything. Hints
            are sizes that the lab knows from the configuration and that belong to no key.
        parallel: Whether several processes share its work (through `engine.group`), or a function of the spec that
            says so; the others run in place.
    """

    name: str
    version: int
    kind: str
    spec: type
    run: Callable[[Context], None]
    estimate: Callable[[Any, Mapping[str, Facts], Runtime, Mapping[str, Any]], Estimate]
    parallel: bool | Callable[[Any], bool] = False

    def shares(self, spec: Any) -> bool:
        """Whether several processes share the work of this spec."""
        return self.parallel(spec) if callable(self.parallel) else self.parallel


STAGES: dict[str, Stage] = {}


def register(stage: Stage) -> Stage:
    """Add a stage; a second one of the same name is refused."""
    if stage.name in STAGES:
        raise ConfigError(f"stage {stage.name!r} is registered twice", where="alignbench.stages", mend="rename one")
    STAGES[stage.name] = stage
    return stage


def training_cost(
    *,
    start: Facts,
    trainable: float,
    positions: float,
    row_tokens: float,
    batch: float,
    runtime: Runtime,
    longest: float = 0,
    lora: LoraConfig | None = None,
    evaluates: bool = True,
) -> tuple[float, float]:
    """(flops, peak bytes per process) of training; see `alignbench.memory`.

    Args:
        start: The policy that training starts from.
        trainable: Weights that get gradients (LoRA: the adapters only).
        positions: What the model computes in all: tokens, prompts that are shared counted once.
        row_tokens: The same of one example.
        batch: Examples of one optimiser step.
        runtime: dtype, processes, ZeRO stage, what fits in a pass.
        longest: Most tokens of the sequences in one example.
        lora: The adapters, if only these train.
        evaluates: Whether it also takes log-probs without gradients (at step 0, and in validation).
    """
    hardware, parameters = runtime.hardware, start.parameters
    backward_share = 1.0 if trainable == parameters else 2 / 3  # frozen weights need no weight gradients
    flops = 6 * parameters * positions * backward_share
    own = batch / hardware.processes
    rows = min(hardware.micro_batch, batch)
    held = max(longest, min(rows * row_tokens, hardware.micro_tokens))
    work = memory.Work(held, held, accumulates=own * row_tokens > held)
    peak = memory.training_peak(start.shape, parameters, work, hardware, trainable=trainable, lora=lora)
    if evaluates:
        frozen = _forward_work(row_tokens / 2, longest / 2, runtime, most=2 * batch)
        beside = memory.resting_bytes(parameters, trainable, hardware)
        peak = max(peak, beside + memory.forward_bytes(start.shape, parameters, frozen, hardware))
    return flops, peak + memory.OVERHEAD[hardware.device]


def _forward_work(per_row: float, longest: float, runtime: Runtime, most: float = math.inf) -> memory.Work:
    """The largest pass without gradients, of at most `most` sequences."""
    hardware = runtime.hardware
    positions = max(longest, per_row, min(min(hardware.eval_batch, most) * per_row, hardware.eval_tokens))
    return memory.Work(positions, positions)


#: Tokenising or writing a sequence, on a core.
ROW_SECONDS = 3e-5
#: Loading a small policy, and bytes of a large one that a disk gives in a second, about.
_LOAD_SECONDS, _DISK = 0.02, 1e9


def load_seconds(policy: Facts, hardware: HardwareConfig) -> float:
    """Of a policy, from its folder."""
    return _LOAD_SECONDS + policy.parameters * memory.bytes_of(hardware) / _DISK


def piece_of(
    kind: str,
    policy: Facts,
    *,
    prompt: float,
    response: float,
    sequences: float,
    rows: float,
    lora: LoraConfig | None = None,
    most: int = 0,
) -> Piece | None:
    """The piece that is timed for a stage; None of a model whose shape is not known. See `alignbench.speed.Piece`."""
    if policy.shape is None or rows < 1:
        return None
    lengths = max(1, round(prompt)), max(1, round(response))
    return Piece(kind, policy.shape, *lengths, max(1, round(sequences)), max(1, round(rows)), lora, most)


def scoring_estimate(
    table: Facts,
    policy: Facts,
    runtime: Runtime,
    *,
    sequences: int = 1,
    rows: float | None = None,
    longest: float = 0,
) -> Estimate:
    """Estimate of a stage that takes log-probs (or hidden states) of a table.

    Args:
        table: What is known of it.
        policy: The policy.
        runtime: dtype, and what fits in a pass.
        sequences: Of one of its rows: two of a pair.
        rows: Rows of what the stage makes; None: of the table.
        longest: Most tokens of a sequence.
    """
    hardware = runtime.hardware
    tokens, per_row = table.rows * table.tokens, table.tokens / sequences
    work = _forward_work(per_row, longest, runtime)
    peak = memory.forward_peak(policy.shape, policy.parameters, work, hardware)
    # sequences of one prompt share it, as far as a pass takes them
    together = min(sequences * table.per_prompt, hardware.eval_batch) if hardware.attention != "padded" else 1
    positions = table.rows * sequences * (per_row - table.prompt * (1 - 1 / together))
    each = positions / max(1.0, table.rows * sequences)
    held = min(hardware.eval_batch, hardware.eval_tokens / max(1.0, each), table.rows * sequences)
    piece = piece_of(
        "forward",
        policy,
        prompt=table.prompt,
        response=per_row - table.prompt,
        sequences=together,
        rows=max(together, held // together * together),
    )
    count = table.rows * sequences
    return Estimate(
        Facts(rows=table.rows if rows is None else rows),
        scored_tokens=tokens,
        flops=2 * policy.parameters * positions,
        memory_bytes=memory.OVERHEAD[hardware.device] + peak,
        overhead_seconds=load_seconds(policy, hardware) + ROW_SECONDS * count,
        pieces=() if piece is None else ((piece, count / piece.rows),),
    )
