"""torch.compile for a policy's blocks: the same numbers up to rounding, after a compilation that must pay for itself.

By request only (`hardware.compile`). On a CPU, beside other work, compiling took 75 s for a Llama of 1M weights, whose
training passes then took half as long again; log-probs without gradients gained a third, which would have paid after
1,500 passes (tests/benchmarks/results/compile.json). On a GPU neither the gain nor that it computes the same is known.

Every block of the model is compiled in place, so names of modules and parameters stay what they are (DeepSpeed,
adapters and checkpoints see no difference). Blocks are alike: one compilation serves them all, for every number of
tokens. Attention over packed rows is left out: what it does is another list of calls in every pass, and each would be
compiled anew.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

log = logging.getLogger(__name__)


def compile_blocks(policy: Any, backend: str = "inductor") -> int:
    """Compile the blocks of a transformers model, with adapters or without, in place; returns how many there are."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
    torch._dynamo.reset()  # what other models left would count against the limit of recompilations
    for block in blocks:
        block.compile(dynamic=True, backend=backend)
    log.info("%d blocks are compiled (torch.compile), at the first pass", len(blocks))
    return len(blocks)
