"""What a stage is: a name, a version, a typed spec and a pure function from inputs to files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignbench.config import HardwareConfig
from alignbench.errors import ConfigError
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
    """

    hardware: HardwareConfig
    evaluate_every: int = 0
    locations: Mapping[str, Any] = field(default_factory=dict)


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
        tokens: Mean tokens of one row, all of its sequences together.
        parameters: Weights of the model, for a policy.
    """

    rows: float = 0
    tokens: float = 0
    parameters: float = 0


@dataclass(frozen=True)
class Estimate:
    """What a stage is expected to cost.

    Attributes:
        facts: Of the artifact it makes.
        trained_tokens: Tokens with a gradient pass.
        generated_tokens: Sampled tokens.
        scored_tokens: Tokens of forward passes without gradients.
        flops: 6 per weight and trained token, 2 per weight and other token.
        memory_bytes: Peak per process: weights, gradients, optimizer, activations.
        overhead_seconds: Start-up that does not scale (loading, first batches, statistics).
    """

    facts: Facts = Facts()
    trained_tokens: float = 0
    generated_tokens: float = 0
    scored_tokens: float = 0
    flops: float = 0
    memory_bytes: float = 0
    overhead_seconds: float = 0.5


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
    estimate: Callable[[Any, Mapping[str, Facts], Runtime, Mapping[str, float]], Estimate]
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
    *, parameters: float, trainable: float, tokens: float, row_tokens: float, rows: float, runtime: Runtime
) -> tuple[float, float]:
    """(flops, peak bytes per process) of training; memory is the larger part's sum, see docs in `Estimate`.

    Args:
        parameters: Weights of the model.
        trainable: Weights that get gradients (LoRA: the adapters only).
        tokens: Trained tokens in all.
        row_tokens: Tokens of the sequences in one example.
        rows: Examples in one micro-batch.
        runtime: dtype, ZeRO offload, activation checkpointing.
    """
    hardware = runtime.hardware
    width = 2 if hardware.dtype == "bf16" else 4
    # fp32 master copy and fp32 gradients come on top of bf16 weights
    state = trainable * (4 + 8 + (8 if width == 2 else 0))
    if hardware.offload != "none":
        state = trainable * width
    backward_share = 1.0 if trainable == parameters else 2 / 3  # frozen weights need no weight gradients
    flops = 6 * parameters * tokens * backward_share
    in_flight = min(rows * row_tokens, max(row_tokens, hardware.micro_tokens))
    return flops, parameters * width + state + activation_bytes(parameters, in_flight, runtime, train=True)


def activation_bytes(parameters: float, tokens: float, runtime: Runtime, *, train: bool) -> float:
    """Rough activation memory of `tokens` in flight in one process.

    A transformer of P weights keeps about 24 * sqrt(P) numbers per token and layer group with gradients; a
    tenth of it without, or with activation checkpointing. Measured factors, not theory.
    """
    width = 2 if runtime.hardware.dtype == "bf16" else 4
    kept = 1.0 if train and not runtime.hardware.activation_checkpointing else 0.15
    return 90 * parameters**0.5 * tokens * width * kept


def inference_memory(parameters: float, tokens: float, runtime: Runtime) -> float:
    """Peak bytes of a forward-only stage."""
    width = 2 if runtime.hardware.dtype == "bf16" else 4
    return parameters * width + activation_bytes(parameters, tokens, runtime, train=False)


def scoring_estimate(tokens: float, per_row: float, rows: float, parameters: float, runtime: Runtime) -> Estimate:
    """Estimate of a stage that runs `tokens` through a policy, forward only, `per_row` of them in a sequence."""
    hardware = runtime.hardware
    in_flight = min(hardware.eval_batch * per_row, max(per_row, hardware.eval_tokens))
    return Estimate(
        Facts(rows=rows),
        scored_tokens=tokens,
        flops=2 * parameters * tokens,
        memory_bytes=inference_memory(parameters, in_flight, runtime),
        overhead_seconds=1.0,
    )
