"""Peak memory of a process, from the shape of the model, what runs, and the hardware's settings.

Tensors are counted as the code keeps them: what autograd saves in a Llama block of transformers, what DeepSpeed keeps
beside the weights, and what sampling holds. `tests/benchmarks/bench_memory.py` compares it with measured peaks. What is
counted for a GPU has the same terms, and has not been measured on one.
"""

from __future__ import annotations

from dataclasses import dataclass

from alignbench.architecture import GPT_NEOX
from alignbench.config import ArchitectureConfig, LoraConfig
from alignbench.hardware import HardwareConfig

#: Resident besides what is estimated, bytes. CPU: Python, torch, transformers, DeepSpeed and a process group (400 MiB
#: before a model is loaded), and what the first pass brings, measured by bench_memory.py. GPU: context and cuBLAS
#: workspace; assumed, for none was there to measure.
OVERHEAD = {"cpu": 425 * 2**20, "cuda": 1024 * 2**20}
#: What training adds to it: DeepSpeed's engine, the first backward pass (measured likewise).
_TRAINING = {"cpu": 55 * 2**20, "cuda": 0}
#: What tensors that come and go take, over their sizes. CPU: torch asks for aligned memory, and glibc (2.36) does not
#: put the next tensor of the same size into the hole that one left, so each needs its place twice (half of a hundred
#: MiB freed and asked for again makes 50 MiB more). A GPU's caching allocator is left to the margin of `hardware=auto`.
SLACK = {"cpu": 2.0, "cuda": 1.0}
#: Tensors from this size on get pages of their own from the system and leave no holes (mallopt(3): the most that its
#: M_MMAP_THRESHOLD grows to), bytes.
_OWN_PAGES = 32 * 2**20
#: Numbers that share a scale (fp32) among bitsandbytes's 8-bit moments.
_EIGHT_BIT_BLOCK = 256
#: Gradients that DeepSpeed 0.19 reduces at once, at most, and parameters that ZeRO-3 keeps gathered: its defaults.
_BUCKET, _LIVE = 500_000_000, 1e9
#: What the linear modules of a block read, where it is not what attention reads.
_INPUTS = {
    **{"o_proj": "output", "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "down"},
    **{"dense": "output", "dense_h_to_4h": "mlp", "dense_4h_to_h": "down"},
}


@dataclass(frozen=True)
class Widths:
    """Numbers per token that a model's size comes to; see `widths_of`.

    Attributes:
        layers: Transformer blocks.
        hidden: Width of the residual stream.
        inner: Width of the feed-forward layer.
        query: Heads times their width.
        value: Key-value heads times their width.
        vocabulary: Logits per position.
        neox: GPT-NeoX's blocks: a plain feed-forward layer, one matrix for query, key and value, one input for both
            norms.
    """

    layers: float
    hidden: float
    inner: float
    query: float
    value: float
    vocabulary: float
    neox: bool = False


def widths_of(shape: ArchitectureConfig | None, parameters: float) -> Widths:
    """Widths of a shape; of a usual one (64 wide per layer, 32,000 tokens) where only a number of weights is known."""
    if shape is None:
        layers = max(1.0, (parameters / (12 * 64**2)) ** (1 / 3))
        hidden = 64 * layers
        return Widths(layers, hidden, 2.7 * hidden, hidden, hidden, 32000)
    head = shape.hidden_size / shape.heads
    return Widths(
        shape.layers,
        shape.hidden_size,
        shape.intermediate_size,
        head * shape.heads,
        head * shape.kv_heads,
        shape.vocab_size,
        shape.family == GPT_NEOX,
    )


@dataclass(frozen=True)
class Work:
    """What one forward(-backward) pass holds.

    Attributes:
        positions: Tokens in it, padding included.
        answers: Tokens whose log-prob is asked for.
        accumulates: Whether gradients of an earlier pass are kept beside it.
    """

    positions: float
    answers: float
    accumulates: bool = True


def bytes_of(hardware: HardwareConfig) -> int:
    """Bytes of a parameter or activation."""
    return 2 if hardware.dtype == "bf16" else 4


def zero_of(hardware: HardwareConfig) -> int:
    """The ZeRO stage that runs: DeepSpeed has no bf16 with fp32 gradients without one (`engine.runtime`)."""
    return 2 if hardware.dtype == "bf16" and hardware.zero_stage == 0 else hardware.zero_stage


def training_peak(
    shape: ArchitectureConfig | None,
    parameters: float,
    work: Work,
    hardware: HardwareConfig,
    *,
    trainable: float | None = None,
    lora: LoraConfig | None = None,
) -> float:
    """Peak bytes of one process in training, besides `OVERHEAD`.

    Args:
        shape: The model's; None estimates with a usual one.
        parameters: Its weights.
        work: The largest pass.
        hardware: dtype, processes, ZeRO stage, offload, checkpointing, size of logits.
        trainable: Weights that get gradients; None: all.
        lora: Adapters, if only these train.
    """
    trained = parameters if trainable is None else trainable
    widths, width = widths_of(shape, parameters), bytes_of(hardware)
    gradients = gradient_bytes(trained, hardware)
    kept = saved_bytes(widths, work, hardware, lora)
    # at its start the backward pass has the logits and their head's gradient, later a block's own gradients
    first, slack = logit_bytes(widths, work.answers, hardware), SLACK[hardware.device]
    if first >= _OWN_PAGES:
        first /= slack
    head = 0.0 if lora is not None else min(widths.vocabulary * widths.hidden * width, gradients)
    later = work.positions * width * (3 * widths.inner + 2 * widths.hidden)
    if lora is not None:
        # nobody keeps an adapter's product and its scaled copy: no live memory, but holes between what is kept
        kept += (1 - 1 / slack) * work.positions * width * widths.layers * 2 * _adapted_outputs(widths, lora)
    if work.accumulates:
        moving = slack * (kept + max(first + head, later)) + gradients
    else:  # gradients come as activations go
        moving = max(slack * (kept + max(first, later) + head), gradients)
    return _TRAINING[hardware.device] + state_bytes(parameters, trained, hardware) + moving


def state_bytes(parameters: float, trained: float, hardware: HardwareConfig) -> float:
    """Bytes per process of weights and optimizer state: what is there between two steps."""
    width, stage = bytes_of(hardware), zero_of(hardware)
    weights = parameters * width
    moments = 8.0 if hardware.optimizer == "adamw" else 2 + 8 / _EIGHT_BIT_BLOCK
    if stage == 0:
        return weights + moments * trained
    if stage == 3:
        weights /= hardware.processes
        if hardware.offload != "none" and hardware.device == "cuda":
            weights = 0.0
        weights += min(parameters, _LIVE) * width  # gathered
    # ZeRO keeps fp32 master weights of its part, even of fp32 ones
    return weights + (0.0 if hardware.offload != "none" else (4 + moments) * trained / hardware.processes)


def gradient_bytes(trained: float, hardware: HardwareConfig) -> float:
    """Bytes per process of gradients at the end of a step."""
    stage = zero_of(hardware)
    if stage == 0:
        return 4 * trained
    own = 4 * trained / hardware.processes
    passing = 4 * reduce_bucket(trained)  # on their way to their owner
    if stage == 1:
        # a CPU's pages of the bucket come as gradients move into it and leave their own; a GPU has them from the start
        return 4 * trained + own + (passing if hardware.device == "cuda" else 0.0)
    return own + passing


def reduce_bucket(trained: float) -> int:
    """Elements of the buffer that ZeRO reduces gradients through: DeepSpeed's own number, or all that there are."""
    return int(min(trained, _BUCKET))


def resting_bytes(parameters: float, trained: float, hardware: HardwareConfig) -> float:
    """Bytes per process between steps of training: the state, and ZeRO-3's buffers for gradients, which stay."""
    stays = gradient_bytes(trained, hardware) if zero_of(hardware) == 3 else 0.0
    return state_bytes(parameters, trained, hardware) + stays


def saved_bytes(widths: Widths, work: Work, hardware: HardwareConfig, lora: LoraConfig | None) -> float:
    """Bytes of what autograd saves in the forward pass."""
    width = bytes_of(hardware)
    each = _saved_per_token(widths, lora)
    if hardware.activation_checkpointing:  # every block's input, and one block made again
        return work.positions * width * (widths.layers * widths.hidden + each)
    return work.positions * width * (widths.layers * each + 3 * widths.hidden)


def _saved_per_token(widths: Widths, lora: LoraConfig | None) -> float:
    """Numbers that autograd saves per token and block.

    A norm saves its normed input (`models.norms`; GPT-NeoX's its input); a linear layer its input, for its weight;
    attention query, key, value and result; a gated feed-forward layer gate, its activation, and up, a plain one what
    its activation is of. Frozen weights save nothing, adapters the input of the layers that they sit in.
    """
    repeated = widths.query if widths.value < widths.query else widths.value  # grouped keys are repeated
    attention = 2 * widths.query + 2 * repeated
    always = 2 * widths.hidden + attention + 3 * widths.inner
    if widths.neox:
        always = widths.hidden + attention + widths.inner
    inputs = {"attention": widths.hidden, "output": widths.query, "mlp": widths.hidden, "down": widths.inner}
    if lora is None:
        return always + sum(inputs.values()) + (2 * widths.hidden if widths.neox else 0)
    adapted = {_INPUTS.get(target, "attention") for target in lora.targets}
    dropped = 2 if lora.dropout else 1  # a dropped-out copy for every adapter
    return always + dropped * sum(inputs[name] for name in adapted)


def _adapted_outputs(widths: Widths, lora: LoraConfig) -> float:
    """Numbers per token and block that the layers with adapters put out."""
    outputs = {
        **{"q_proj": widths.query, "k_proj": widths.value, "v_proj": widths.value},
        **{"query_key_value": 3 * widths.query, "gate_proj": widths.inner, "up_proj": widths.inner},
        **{"dense_h_to_4h": widths.inner},
    }
    return sum(outputs.get(target, widths.hidden) for target in lora.targets)


def logit_bytes(widths: Widths, answers: float, hardware: HardwareConfig) -> float:
    """Bytes of the logits that exist at once, in fp32 or in the weights' dtype."""
    fp32 = min(4 * answers * widths.vocabulary, max(hardware.logits_mib * 2**20, 4 * widths.vocabulary))
    return fp32 * bytes_of(hardware) / 4


def forward_peak(shape: ArchitectureConfig | None, parameters: float, work: Work, hardware: HardwareConfig) -> float:
    """Peak bytes of log-probs without gradients, besides `OVERHEAD`: the whole weights, and what a pass holds."""
    return parameters * bytes_of(hardware) + forward_bytes(shape, parameters, work, hardware)


def forward_bytes(shape: ArchitectureConfig | None, parameters: float, work: Work, hardware: HardwareConfig) -> float:
    """Bytes that a pass without gradients holds: those of one block, or the last states and the logits.

    On a CPU the heap keeps the blocks' holes, in which the larger tensors of the end find no place.
    """
    widths, width = widths_of(shape, parameters), bytes_of(hardware)
    block = work.positions * width * (2 * widths.hidden + max(3 * widths.inner, 3 * widths.query + 2 * widths.hidden))
    head = work.positions * width * widths.hidden + logit_bytes(widths, work.answers, hardware)
    return SLACK["cpu"] * block + head if hardware.device == "cpu" else max(block, head)


def sampling_peak(
    shape: ArchitectureConfig | None,
    parameters: float,
    rows: float,
    prompt: float,
    new: float,
    hardware: HardwareConfig,
    samples: float = 1,
) -> float:
    """Peak bytes of sampling `rows` responses of `new` tokens at once to prompts of `prompt`, besides `OVERHEAD`.

    Weights; keys and values of every token, those of a prompt once for its `samples` responses, and one layer's of the
    responses twice, for they grow by copying and attention makes fp32 of them; the prompts' pass with its logits, or
    the distribution over the next token, which is drawn from in float64.
    """
    widths, width = widths_of(shape, parameters), bytes_of(hardware)
    prompts = rows / samples if rows > samples else 1
    cached = 2 * widths.value * width
    drawn = rows * widths.vocabulary * (8 * 4 + width)
    block = prompts * prompt * width * (2 * widths.hidden + max(3 * widths.inner, 5 * widths.query))
    logits = prompts * prompt * widths.vocabulary * width
    held = cached * widths.layers * prompts * prompt
    started = held + max(block, logits + drawn)
    ended = held + cached * (widths.layers + 4 / width) * rows * new + drawn
    return parameters * width + max(started, ended)
