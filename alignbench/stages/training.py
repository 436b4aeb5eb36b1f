"""What the stages that train share: from an objective to a stored policy, and what that is expected to cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignbench.config import HardwareConfig
from alignbench.engine import group
from alignbench.engine.batching import total_steps
from alignbench.engine.logprobs import LogProbPolicy
from alignbench.engine.objectives import Objective
from alignbench.engine.runtime import (
    deepspeed_config,
    derive_seed,
    device_of,
    dtype_of,
    join_process_group,
    shards,
)
from alignbench.engine.train import TrainJob, train, trained_state, validated
from alignbench.jsonio import write_jsonl
from alignbench.models import policy as policies
from alignbench.stages.stage import (
    ROW_SECONDS,
    Context,
    Estimate,
    Facts,
    Runtime,
    load_seconds,
    piece_of,
    scoring_estimate,
    training_cost,
)


def train_and_save(
    ctx: Context,
    folder: Path,
    tokenizer: Any,
    objective: Objective,
    validation: Objective | None,
    *,
    load: Callable[..., Any] = policies.load_policy,
    reads: type[LogProbPolicy] = LogProbPolicy,
    name: str = "policy",
) -> None:
    """Train the model in `folder` and write `policy/` (or another `name`) and `log.jsonl`.

    The cost gets `policies_in_memory`, the number of models that this stage holds when training starts. It is counted,
    not assumed: one, since references are cached log-probs and no second model. And `parameters_in_memory`, how many
    numbers of it rank 0 holds: under ZeRO-3 its own part.

    Args:
        ctx: The stage's context; its spec has `train` and `lora`.
        folder: Transformers folder that training starts from.
        tokenizer: The policy's tokenizer, saved beside the weights.
        objective: What is minimised.
        validation: The same on held-out examples, or None.
        load: Makes the model that training starts from: (folder, dtype, device) -> model.
        reads: What its forward pass gives to the objective.
        name: Folder of the result.

    Raises:
        InvariantError: the loss at step 0 is not the objective's `reference_value`, or a loss is not finite.
    """
    spec = ctx.spec
    lora = spec.lora if spec.lora.rank > 0 else None
    hardware = ctx.runtime.hardware
    before = policies.held()  # whoever called the stage may hold models of its own
    model = on_device(folder, hardware, load)
    if lora is not None:
        model = policies.add_lora(model, lora, derive_seed(ctx.seed, "lora"))
    job = TrainJob(
        policy=model,
        objective=objective,
        settings=spec.train,
        hardware=hardware,
        seed=derive_seed(ctx.seed, "order"),
        pad_id=policies.pad_id(tokenizer),
        work=ctx.work,
        lora=lora is not None,
        starts_at_reference="reference" not in ctx.inputs or ctx.inputs["reference"].key == ctx.inputs["start"].key,
        validation=validation,
        evaluate_every=ctx.runtime.evaluate_every,
        evaluate_examples=ctx.runtime.evaluate_examples,
        round=getattr(spec, "round", 0),
        requests=ctx.requests,
        reads=reads,
    )
    ctx.cost["policies_in_memory"] = float(policies.held(before + 1) - before)
    ctx.cost["parameters_in_memory"] = policies.own_parameters(model)
    result = train(job, ctx.cost, ctx.on_metrics)
    state = trained_state(job)
    if group.rank() == 0:  # the others' files are thrown away
        policies.save_policy(policies.restore_weights(folder, state, lora, load), tokenizer, ctx.out / name)
    write_jsonl(ctx.out / "log.jsonl", result.log)


def on_device(folder: Path, hardware: HardwareConfig, load: Callable[..., Any] = policies.load_policy) -> Any:
    """The model in `folder` on this rank's device, or this rank's part of it; all ranks call it.

    Args:
        folder: A transformers folder.
        hardware: Device, dtype, ZeRO stage.
        load: What loads it; only policies are divided as they are loaded, a score model is whole until it trains.
    """
    place = dtype_of(hardware), device_of(hardware)
    if load is not policies.load_policy or not shards(hardware):
        return load(folder, *place)
    join_process_group(hardware)
    return policies.load_policy(folder, *place, deepspeed_config(hardware))


def training_estimate(
    spec: Any, start: Facts, data: Facts, runtime: Runtime, hints: Mapping[str, Any], *, sequences: int
) -> Estimate:
    """Expected cost of training the policy `start` on the rows of `data`.

    Args:
        spec: The stage's spec: optimiser settings `train`, `lora` and lengths `tokens`.
        start: Facts of the policy that training starts from.
        data: Facts of the table it trains on.
        runtime: Device and batch sizes.
        hints: `trainable`, the trained weights where they are not all (LoRA).
        sequences: Of one example: two of a pair. Pairs are also looked at without gradients, at step 0.
    """
    examples = int(max(1, data.rows * data.trained_share))
    batch = min(spec.train.batch_size, examples)
    steps = total_steps(examples, spec.train.epochs, batch)
    shared = (sequences - 1) * data.prompt if runtime.hardware.attention != "padded" else 0.0
    lora = spec.lora if spec.lora.rank else None
    flops, memory = training_cost(
        start=start,
        trainable=hints.get("trainable") or start.parameters,
        positions=steps * batch * (data.tokens - shared),
        row_tokens=data.tokens - shared,
        batch=batch,
        runtime=runtime,
        longest=sequences * spec.tokens.max_length,
        lora=lora,
        evaluates=sequences > 1,
    )
    held_out = data.rows * (1 - data.trained_share)
    each = min(held_out, runtime.evaluate_examples or held_out) * len(validated(steps, runtime.evaluate_every))
    looked_at = replace(data, rows=each + batch, per_prompt=1.0)  # the batch at step 0
    aside = scoring_estimate(looked_at, start, runtime, sequences=sequences) if sequences > 1 else Estimate()
    step = piece_of(
        "step",
        start,
        prompt=data.prompt,
        response=data.tokens / sequences - data.prompt,
        sequences=sequences,
        rows=batch / runtime.hardware.processes,
        lora=lora,
    )
    return Estimate(
        Facts(parameters=start.parameters, shape=start.shape),
        trained_tokens=steps * batch * data.tokens,
        flops=flops + aside.flops,
        memory_bytes=memory,
        # the policy is loaded, made again at the end, and saved
        overhead_seconds=3 * load_seconds(start, runtime.hardware) + ROW_SECONDS * sequences * data.rows,
        pieces=() if step is None else ((step, float(steps) * runtime.hardware.processes), *aside.pieces),
    )
