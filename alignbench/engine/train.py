"""The one training loop: SFT, preference and scorer training, always through `deepspeed.initialize`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignbench.config import HardwareConfig, TrainConfig
from alignbench.engine import batching, group
from alignbench.engine.attention import PADDED, attention_of
from alignbench.engine.batching import Row
from alignbench.engine.checkpoint import Checkpoints, Layout
from alignbench.engine.compiled import compile_blocks
from alignbench.engine.logprobs import LogProbPolicy, frozen_logprobs, progress
from alignbench.engine.objectives import Objective
from alignbench.engine.packing import prepare, shared_tokens
from alignbench.engine.runtime import (
    adamw,
    deepspeed_config,
    device_of,
    import_deepspeed,
    join_process_group,
    peak_memory,
)
from alignbench.errors import ConfigError, InvariantError
from alignbench.stopping import SIGNALS, Requests

log = logging.getLogger(__name__)
Metrics = dict[str, float]
OnMetrics = Callable[[int, Mapping[str, float]], None]

#: How far the first step's loss may be from its value at policy = reference: its mean, and any one example. In either
#: layout a sequence's log-prob does not depend on its neighbours; what is left is matrix products of other heights.
STEP0_TOLERANCE = {"fp32": (1e-6, 1e-4), "bf16": (5e-3, 5e-2)}


@dataclass
class TrainResult:
    """What training leaves behind besides the weights."""

    log: list[Metrics] = field(default_factory=list)
    steps: int = 0
    resumed_at: int = 0


@dataclass(frozen=True)
class TrainJob:
    """One training run.

    Attributes:
        policy: A causal language model (full, or with LoRA adapters); trained in place.
        objective: What is minimised.
        settings: Optimiser settings.
        hardware: Device, dtype, ZeRO stage, micro-batch.
        seed: Decides the order of examples and dropout.
        pad_id: Any valid token id.
        work: Folder for checkpoints; it survives a kill.
        lora: Whether only adapters train.
        starts_at_reference: Whether the loss at step 0 must be the objective's `reference_value`: the policy is its
            reference, or the score head is fresh.
        validation: Objective on held-out examples, or None.
        evaluate_every: Optimiser steps between validations; 0 validates at the end only.
        evaluate_examples: Most examples of a validation, drawn by `seed`; None: all.
        round: Which of several trainings on these examples this is: the order goes on where the round before
            ended, so that rounds of a fraction of an epoch together see every example.
        requests: Where the loop hears that it should save what it has and stop.
        reads: What a forward pass gives: log-probs of a policy, or scores of a score model (`engine.scores`).
    """

    policy: Any
    objective: Objective
    settings: TrainConfig
    hardware: HardwareConfig
    seed: int
    pad_id: int
    work: Path
    lora: bool = False
    starts_at_reference: bool = True
    validation: Objective | None = None
    evaluate_every: int = 0
    evaluate_examples: int | None = None
    round: int = 0
    requests: Requests = SIGNALS
    reads: type[LogProbPolicy] = LogProbPolicy


def validated(steps: int, every: int) -> frozenset[int]:
    """The steps after which there is a validation: every so many, and the last, which stands for one shortly before."""
    regular = range(every, steps, every) if every else ()
    return frozenset((*(step for step in regular if 2 * (steps - step) >= every), steps))


def train(job: TrainJob, cost: dict[str, float], on_metrics: OnMetrics) -> TrainResult:
    """Run a job to its end, continuing from its checkpoint if there is one.

    Args:
        job: What to train.
        cost: Filled with trained tokens, optimiser steps, seconds and peak memory.
        on_metrics: Called with (step, metrics) after every optimiser step.

    Returns:
        The log of every step and of every validation. The trained weights are in `job.policy`.

    Raises:
        InvariantError: the loss at the start is not what theory says; or a loss, a gradient or a weight is not
            finite. No checkpoint is made of such weights, and all ranks raise the same error.
    """
    device = device_of(job.hardware)
    join_process_group(job.hardware)
    with peak_memory(cost, device):
        return _Loop(job, device).run(cost, on_metrics)


class _Loop:
    def __init__(self, job: TrainJob, device: torch.device) -> None:
        self.job, self.device = job, device
        settings, examples = job.settings, len(job.objective)
        self.batch_size = min(settings.batch_size, examples)
        self.steps = batching.total_steps(examples, settings.epochs, self.batch_size)
        self.validated = validated(self.steps, job.evaluate_every)
        earlier = job.round * self.steps
        self.order = batching.example_order(examples, earlier + self.steps, self.batch_size, job.seed)[earlier:]
        if self.batch_size % group.world():
            raise ConfigError(
                f"{self.batch_size} examples per optimiser step cannot be divided among {group.world()} processes",
                where=f"{job.objective.name}: {examples} examples, batch_size {settings.batch_size}",
                mend="choose a batch_size that hardware.processes divides, or fewer processes",
            )
        self.attention = attention_of(job.hardware, job.policy)
        self.positions = 0.0
        log.info("%s: rows are %s", job.objective.name, self.attention)
        torch.manual_seed(job.seed + group.rank())  # dropout, if the model has any
        self.engine = self._initialise()
        layout = Layout(
            zero_stage=job.hardware.zero_stage,
            world_size=group.world(),
            micro_batch=job.hardware.micro_batch,
            micro_tokens=job.hardware.micro_tokens,
            attention=self.attention,
            dtype=job.hardware.dtype,
            device=job.hardware.device,
        )
        self.checkpoints = Checkpoints(job.work / "checkpoints", layout, lora=job.lora)

    def _initialise(self) -> Any:
        job, settings = self.job, self.job.settings
        if job.hardware.activation_checkpointing:
            job.policy.activation_checkpointing_enable({"use_reentrant": False})
            if job.lora:
                job.policy.enable_input_require_grads()
        job.policy.train()
        if job.hardware.compile:
            compile_blocks(job.policy)
        self.trainable = trainable = [p for p in job.policy.parameters() if p.requires_grad]
        # decay belongs to matrices; norms and biases would only be pulled off scale
        groups = [
            {"params": [p for p in trainable if len(_shape(p)) >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in trainable if len(_shape(p)) < 2], "weight_decay": 0.0},
        ]
        optimizer = adamw([group for group in groups if group["params"]], settings, job.hardware.optimizer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule)
        engine, *_ = import_deepspeed().initialize(
            model=job.reads(job.policy, job.hardware),
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=deepspeed_config(
                job.hardware, clip=settings.max_grad_norm, trained=sum(_shape(p).numel() for p in trainable)
            ),
        )
        return engine

    def _schedule(self, step: int) -> float:
        """Learning-rate factor at an optimiser step: linear warm-up, then the chosen decay to zero."""
        settings = self.job.settings
        warmup = math.ceil(settings.warmup_ratio * self.steps)
        if step < warmup:
            return (step + 1) / warmup
        if settings.schedule == "constant":
            return 1.0
        done = (step - warmup) / max(1, self.steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1.0 - done

    def run(self, cost: dict[str, float], on_metrics: OnMetrics) -> TrainResult:
        job, started = self.job, time.perf_counter()
        result = TrainResult(steps=self.steps)
        tokens = earlier_seconds = 0.0
        state = self.checkpoints.restore(self.engine)
        if state is not None:
            result.log, result.resumed_at = state["log"], state["step"]
            tokens, earlier_seconds = state["tokens"], state["seconds"]
            self.positions = state["positions"]
            log.info("%s: continuing at step %d of %d", job.objective.name, state["step"], self.steps)
        else:
            self._check_step0()
        total = self.steps * self.batch_size
        with job.requests.heard(), progress(total, f"train {job.objective.name}", "ex") as bar:
            bar.update(result.resumed_at * self.batch_size)
            for step in range(result.resumed_at, self.steps):
                metrics, step_tokens = self._step(step)
                tokens += step_tokens
                asked = metrics.pop("asked") > 0
                saves = asked or ((step + 1) % job.hardware.checkpoint_every == 0 and step + 1 < self.steps)
                if saves or self._validates(step + 1) or step + 1 == self.steps:
                    self._refuse_broken_weights(step)
                if self._validates(step + 1):
                    metrics.update(self.validate())
                result.log.append({"step": float(step + 1), **metrics})
                on_metrics(step + 1, metrics)
                bar.update(self.batch_size)
                bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
                if saves:
                    seconds = earlier_seconds + time.perf_counter() - started
                    state = {"log": result.log, "tokens": tokens, "positions": self.positions, "seconds": seconds}
                    self.checkpoints.save(self.engine, step + 1, state)
                if asked:
                    log.info("%s: saved at step %d of %d, as asked", job.objective.name, step + 1, self.steps)
                    job.requests.done()
        cost["seconds"] = earlier_seconds + time.perf_counter() - started
        cost["trained_tokens"] = tokens
        # what the model computed for them: padding on top, prompts that are shared counted once
        cost["trained_positions"] = self.positions
        cost["optimizer_steps"] = float(self.steps)
        return result

    def _validates(self, step: int) -> bool:
        return self.job.validation is not None and step in self.validated

    def _step(self, step: int) -> tuple[Metrics, int]:
        """One optimiser step over its micro-batches."""
        objective, indices = self.job.objective, self.order[step]
        denominator = float(objective.weights(indices).sum())
        context = objective.context(indices, self._frozen_logprobs)
        examples = [objective.rows(i) for i in indices]
        parts = self._micro_batches(examples)[group.rank() :: group.world()]
        # all ranks must agree when to save, and this is where they talk
        sums: dict[str, float] = {"tokens": 0.0, "positions": 0.0, "asked": float(self.job.requests.pending())}
        broken: list[int] = []
        norm: Any = None
        for number, part in enumerate(parts, 1):
            # the number of micro-batches is the step's own: DeepSpeed is told which one is the last
            self.engine.set_gradient_accumulation_boundary(number == len(parts))
            rows = [row for k in part for row in examples[k]]
            work = prepare(rows, self.job.pad_id, self.attention)
            sums["tokens"] += sum(len(row.ids) for row in rows)
            sums["positions"] += work.positions
            logprobs = self.engine(work.to(self.device)).view(len(part), -1)
            values, metrics = objective.loss(logprobs, indices[part], context)
            broken += indices[part][~torch.isfinite(values.detach()).cpu().numpy()].tolist()
            # DeepSpeed divides by the number of ranks; the denominator is the global batch's
            self.engine.backward(values.sum() / denominator * group.world(), scale_wrt_gas=False)
            _add(sums, {"loss": values.detach()}, 1 / denominator)
            _add(sums, metrics, 1 / len(indices))
        if self.engine.zero_optimization_stage() == 0:
            # without ZeRO DeepSpeed clips but does not tell the norm
            norm = float(torch.nn.utils.get_total_norm(p.grad for p in self.trainable if p.grad is not None))
        if norm is None or math.isfinite(norm):  # ZeRO 1-3 leave out such a step by themselves
            self.engine.step()
        sums = group.summed(sums)
        tokens = int(sums.pop("tokens"))
        self.positions += sums.pop("positions")
        norm = norm or self.engine.get_global_grad_norm()
        if norm is not None:
            sums["grad_norm"] = float(norm)
        sums["learning_rate"] = float(self.job.settings.learning_rate * self._schedule(step))
        # both are the same on every rank, and so is the error
        for what, value in (("loss", sums["loss"]), ("gradient norm", sums.get("grad_norm", 0.0))):
            if not math.isfinite(value):
                raise self._divergence(step, f"the {what} of optimiser step {step + 1} is {value}", broken)
        return sums, tokens

    def _divergence(self, step: int, what: str, broken: list[int]) -> InvariantError:
        """The error of a step whose numbers are not finite; every rank must ask for it."""
        bad = sorted({int(i) for part in group.gather(broken) for i in part})
        examples = self.order[step]
        shown = ", ".join(map(str, (bad or examples.tolist())[:16])) + (", ..." if len(bad or examples) > 16 else "")
        whose = f"the loss of {len(bad)} is not finite" if bad else "every single loss is finite, what follows is not"
        kept = self.checkpoints.kept()
        last = "there is no checkpoint" if kept is None else f"the checkpoint of step {kept} is kept"
        return InvariantError(
            what,
            where=f"{self.job.objective.name}, its {len(examples)} examples: {whose} (training rows, from 0: {shown})",
            mend=f"lower the learning rate, set max_grad_norm, or look at these examples; {last}",
        )

    def _refuse_broken_weights(self, step: int) -> None:
        """Stop before a checkpoint, a validation or a result is made of weights that are not finite."""
        found = {"broken": 0.0}
        for parameter in self.trainable:
            own = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3: this rank's part
            if getattr(getattr(own, "status", None), "name", "AVAILABLE") == "AVAILABLE":  # not one on an NVMe disk
                found["broken"] += float(not bool(torch.isfinite(own.detach()).all()))
        count = int(group.summed(found)["broken"])
        if count:
            what = f"{count} weight tensors are not finite after optimiser step {step + 1}"
            raise self._divergence(step, what, [])

    def _micro_batches(self, examples: Sequence[Sequence[Row]]) -> list[np.ndarray]:
        """A step's examples by micro-batch; a multiple of the ranks, neighbours of like size."""
        hardware, padded = self.job.hardware, self.attention == PADDED
        if padded:  # to the longest row, times the rows of an example
            sizes = [max(len(row.ids) for row in rows) * len(rows) for rows in examples]
        else:
            sizes = [shared_tokens(rows) for rows in examples]
        return batching.micro_batches(
            sizes, most=hardware.micro_batch, tokens=hardware.micro_tokens, ranks=group.world(), padded=padded
        )

    def _frozen_logprobs(self, rows: Sequence[Row]) -> torch.Tensor:
        """Log-probs without gradients and without dropout, in the order of `rows`."""
        job = self.job
        self.engine.eval()
        with torch.no_grad():
            found = frozen_logprobs(self.engine, self.attention, rows, job.pad_id, job.hardware, self.device)
        self.engine.train()
        return torch.as_tensor(found, device=self.device)

    def _evaluate(self, objective: Objective, indices: np.ndarray) -> tuple[Metrics, np.ndarray]:
        """Mean loss and metrics of `indices` without gradients; also each example's loss."""
        context = objective.context(indices, self._frozen_logprobs)
        denominator = float(objective.weights(indices).sum())
        logprobs = self._frozen_logprobs([row for i in indices for row in objective.rows(i)])
        values, metrics = objective.loss(logprobs.view(len(indices), -1), indices, context)
        sums: dict[str, float] = {}
        _add(sums, {"loss": values}, 1 / denominator)
        _add(sums, metrics, 1 / len(indices))
        return sums, values.double().cpu().numpy()

    def validate(self) -> Metrics:
        """Validation metrics, prefixed; the training order and its random numbers are not touched."""
        assert self.job.validation is not None
        count = len(self.job.validation)
        drawn = np.random.default_rng(self.job.seed).permutation(count)[: self.job.evaluate_examples or count]
        looked_at = np.sort(drawn)
        metrics, losses = self._evaluate(self.job.validation, looked_at)
        if not np.isfinite(losses).all():
            bad = looked_at[~np.isfinite(losses)]
            raise InvariantError(
                f"the validation loss is {metrics['loss']}",
                where=f"{self.job.validation.name}, {len(bad)} of {len(losses)} validation rows (from 0): {bad[:16]}",
                mend="lower the learning rate, or look at these examples",
            )
        return {f"validation_{name}": value for name, value in metrics.items()}

    def _check_step0(self) -> None:
        """Refuse a start whose loss is not what theory says (DPO at its own reference, a fresh reward model: ln 2).

        A wrong reference, a stale cache, another template, a wrong mask or a head that is not zero all show here,
        before any money is spent.
        """
        objective = self.job.objective
        indices = self.order[0]
        expected = objective.reference_value(indices)
        if expected is None or not self.job.starts_at_reference:
            return
        _, found = self._evaluate(objective, indices)
        errors = abs(float(found.mean() - expected.mean())), float(np.abs(found - expected).max())
        scale = max(1.0, float(np.abs(expected).max()))
        limits = [limit * scale for limit in STEP0_TOLERANCE[self.job.hardware.dtype]]
        if not all(error <= limit for error, limit in zip(errors, limits, strict=True)):
            worst = int(indices[np.argmax(np.abs(found - expected))])
            raise InvariantError(
                f"step-0 loss is {found.mean():.8f}, but theory demands {expected.mean():.8f}",
                where=f"{objective.name}, worst example {worst}",
                mend="the cached reference log-probs do not belong to this policy: check reference, template, dtype "
                "and LoRA base (a score model has no reference: its new head is not zero)",
            )
        log.info("%s: step-0 loss %.8f (expected %.8f)", objective.name, found.mean(), expected.mean())


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Of the whole parameter, also where ZeRO-3 has left an empty one in its place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _add(sums: dict[str, float], values: Mapping[str, torch.Tensor], scale: float) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + float(value.double().sum()) * scale


def trained_state(job: TrainJob) -> dict[str, torch.Tensor]:
    """The trained weights on rank 0's CPU under the policy's own names, whatever the ZeRO stage; {} on other ranks."""
    deepspeed = import_deepspeed()
    state = {}
    for name, parameter in job.policy.named_parameters():
        if job.lora and not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=job.hardware.zero_stage == 3):
            if group.rank() == 0:
                state[name] = parameter.detach().cpu().clone()
    return state
