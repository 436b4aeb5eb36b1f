"""RMSNorm with its gradient written out, in place of the one that transformers leaves to autograd.

The same function: y = w x / sqrt(mean(x^2) + eps), in fp32 until the weight comes, its values equal to the last bit.
Autograd takes it through a square, a mean, a root and two products one after the other, each with a pass over memory
for its gradient. Here the backward pass is the derivative itself,

    dx = (w g - x/s * mean(w g x/s)) / s,    dw = sum over tokens of g x/s,    s = sqrt(mean(x^2) + eps),

and x/s is all that is saved for it: 0.53 to 0.71 of the time on a CPU (tests/benchmarks/results/norms.json).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from typing_extensions import override

# transformers' classes that are this function, and tested to be; Gemma's, for one, adds 1 to the weight
_KNOWN = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


def with_fused_norms(model: Any) -> Any:
    """Let the RMSNorms of a transformers model run `rms_norm`; returns the model. Its parameters stay what they are."""
    for module in model.modules():
        if type(module).__name__ in _KNOWN:
            # another class, not another method of the object: that would refer to it, and keep the model in memory
            module.__class__ = FusedRMSNorm
    return model


class FusedRMSNorm(nn.Module):
    """What transformers' module becomes; it has `weight` (d,) and `variance_epsilon`."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`rms_norm` of (..., d)."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    @override
    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def rms_norm(hidden: torch.Tensor, weight: nn.Parameter | torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm (Zhang and Sennrich 2019, eq. 4) over the last dimension.

    Args:
        hidden: (..., d), of any floating dtype; its mean square is taken in fp32.
        weight: (d,).
        eps: Added to the mean square.

    Returns:
        (..., d), in the dtype of `hidden` times `weight`.
    """
    found: torch.Tensor = _RMSNorm.apply(hidden, weight, eps)
    return found


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = hidden.float()
        inverse = (wide * wide).mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = (wide * inverse).to(hidden.dtype)
        ctx.save_for_backward(normed, inverse, weight)
        return weight * normed

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        normed, inverse, weight = ctx.saved_tensors
        by_token = (gradient * normed).reshape(-1, normed.shape[-1])
        of_weight = by_token.sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        mean = torch.mv(by_token.float(), weight.float()).div_(-normed.shape[-1]).view_as(inverse)
        of_hidden = (weight * gradient).float().addcmul_(normed.float(), mean).mul_(inverse)
        return of_hidden.to(normed.dtype), of_weight, None
