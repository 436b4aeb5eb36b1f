"""Attention over packed rows: who sees whom, and the kernels that compute it.

A packed row holds groups one after the other; a group is a prompt, once, and the responses to it. A token sees the
tokens before it in its own group that belong to the prompt or to its own response, and no others; positions go on from
the prompt's end in every response. So each response is computed exactly as if it stood behind its prompt alone.

Two kernels compute the same: `packed_sdpa` runs torch's SDPA on prompts and responses of about the same length
together, and `packed_flex` runs FlexAttention with a block mask on the whole row (what pays on a GPU).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from alignbench.config import HardwareConfig
from alignbench.errors import ConfigError, ModelError

PADDED, SDPA, FLEX = "padded", "packed_sdpa", "packed_flex"

#: Families whose packed log-probs and gradients are tested equal to the padded ones. Others (state-space layers, ALiBi,
#: soft-capped attention) could let one response look into another, so they are padded.
FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")

# FlexAttention's block size: rows are filled up to a multiple of it.
FLEX_BLOCK = 128

# Segments that see up to LONGEST tokens are filled up to a multiple of STEP and computed with others of the same shape:
# each call costs tens of microseconds whatever it holds, which is more than such a segment's own arithmetic.
STEP, LONGEST = 16, 256

Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Segment:
    """A stretch of a packed row that attends in one call: a prompt, or one response to it.

    Attributes:
        length: Its tokens.
        prompt: Tokens of the prompt before it, which it sees; 0 where a group begins.
    """

    length: int
    prompt: int

    def shape(self, window: int | None) -> tuple[int, int, bool]:
        """Queries and keys of its call, and whether the plain causal mask does; it decides by its own lengths alone."""
        total = self.prompt + self.length
        causal = not self.prompt and (window is None or total <= window)
        if total > LONGEST:
            return self.length, total, causal
        return -(-self.length // STEP) * STEP, -(-total // STEP) * STEP, causal


class Call(NamedTuple):
    """Segments of one shape, which attend together.

    Attributes:
        queries: (B, Q), how many segments there are and their queries, filled up to one length.
        keys: (B, K), likewise.
        mask: (B, 1, Q, K), True where a query sees a key; None where that is the plain causal mask.
    """

    queries: tuple[int, int]
    keys: tuple[int, int]
    mask: torch.Tensor | None


class Calls(NamedTuple):
    """The calls that cover a row, in order.

    Attributes:
        each: What their shapes and masks are.
        queries: (sum of B Q,) places in the row of all calls' queries; those that fill up repeat their segment's last.
        keys: (sum of B K,), likewise.
        back: (T,) where among the queries each token is.
    """

    each: tuple[Call, ...]
    queries: torch.Tensor
    keys: torch.Tensor
    back: torch.Tensor


def _sees(query: Sequence[Any], key: Sequence[Any], window: int | None) -> Any:
    """The rule itself, for a query and a key of one group, each given as (place, owner, position)."""
    seen = (query[0] >= key[0]) & ((key[1] == 0) | (query[1] == key[1]))
    return seen if window is None else seen & (query[2] - key[2] < window)


@dataclass(frozen=True)
class Packing:
    """What the kernels know of a packed row of T tokens.

    Attributes:
        segments: The row's prompts and responses, in order; together they cover every real token.
        group: (T,) number of each token's group; -1 where the row was filled up.
        owner: (T,) 0 in prompts, k in a group's k-th response.
        position: (T,) position behind the prompt's start.
    """

    segments: tuple[Segment, ...]
    group: torch.Tensor
    owner: torch.Tensor
    position: torch.Tensor
    _masks: dict[Any, Any] = field(default_factory=dict, compare=False)

    def to(self, device: torch.device) -> Packing:
        """The same packing with its tensors on `device`."""
        group, owner, position = (x.to(device, non_blocking=True) for x in (self.group, self.owner, self.position))
        return Packing(self.segments, group, owner, position)

    def calls(self, window: int | None) -> Calls:
        """The calls that cover the row: arranged once, for all layers."""
        if ("sdpa", window) not in self._masks:
            self._masks["sdpa", window] = self._arranged(window)
        found: Calls = self._masks["sdpa", window]
        return found

    def _arranged(self, window: int | None) -> Calls:
        alike: dict[tuple[int, int, bool], list[tuple[int, int, int, int]]] = {}
        start = prompt_start = 0
        for part in self.segments:
            prompt_start = prompt_start if part.prompt else start
            alike.setdefault(part.shape(window), []).append((start, part.length, prompt_start, part.prompt))
            start += part.length
        device, back, used = self.group.device, np.empty(start, np.int64), 0
        each: list[Call] = []
        places: tuple[list[Places], list[Places]] = ([], [])
        for (queries, keys, causal), parts in alike.items():
            start_of, length, prompt_of, prompt = np.array(parts).T[:, :, None]
            query, key = np.arange(queries), np.arange(keys)
            asking = start_of + np.minimum(query, length - 1)
            last = np.minimum(key, prompt + length - 1)
            asked = np.where(last < prompt, prompt_of + last, start_of + last - prompt)
            seen = None if causal else torch.from_numpy(_seen(prompt, length, query, key, window)).to(device)
            each.append(Call((len(parts), queries), (len(parts), keys), seen))
            for side, found in zip(places, (asking, asked), strict=True):
                side.append(found.reshape(-1))
            real = query < length
            back[asking[real]] = used + np.flatnonzero(real)
            used += real.size
        return Calls(tuple(each), *(torch.from_numpy(x).to(device) for x in (*map(np.concatenate, places), back)))

    def mask_mod(self, window: int | None) -> Callable[..., torch.Tensor]:
        """FlexAttention's form of the mask."""
        group, owner, position = self.group, self.owner, self.position

        def mod(batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
            seeing, seen = ((i, owner[i], position[i]) for i in (query, key))
            found: torch.Tensor = _sees(seeing, seen, window) & (group[query] == group[key])
            return found

        return mod

    def block_mask(self, window: int | None) -> Any:
        """FlexAttention's block mask, made once per pass."""
        from torch.nn.attention.flex_attention import create_block_mask

        if ("flex", window) not in self._masks:
            length = len(self.group)
            self._masks["flex", window] = create_block_mask(
                self.mask_mod(window), None, None, length, length, device=str(self.group.device)
            )
        return self._masks["flex", window]


def _seen(prompt: Places, length: Places, query: Places, key: Places, window: int | None) -> npt.NDArray[np.bool_]:
    """The mask of a call; queries that fill a segment up see the first key, for a softmax over nothing is NaN.

    Args:
        prompt: (B, 1) tokens of each segment's prompt.
        length: (B, 1) its own tokens.
        query: (Q,) numbers of queries.
        key: (K,) of keys.
        window: Tokens that a token sees, itself included; None: all.
    """
    place = (prompt + query)[:, :, None]  # a segment is one sequence: of one owner, and places are positions
    seen = _sees((place, 1, place), (key, 1, key), window)
    return np.where((query < length)[:, :, None], seen, key == 0)[:, None]


def segments_of(prompt: int, responses: Sequence[int]) -> list[Segment]:
    """One group's attention calls, in order: what has no tokens needs none."""
    every = [Segment(prompt, 0), *(Segment(length, prompt) for length in responses)]
    return [part for part in every if part.length]


def attention_of(hardware: HardwareConfig, policy: Any) -> str:
    """The layout and kernel that `policy` runs with: PADDED, SDPA or FLEX.

    Raises:
        ConfigError: a packed layout is asked for, and the model is of a family that it is not tested for.
    """
    family = getattr(policy.config, "model_type", type(policy).__name__)
    if hardware.attention != "auto":
        if hardware.attention != PADDED and family not in FAMILIES:
            raise ConfigError(
                f"packed rows are not known to be right for models of the family {family}",
                where="hardware.attention",
                mend=f"hardware.attention=padded or auto; packed ones are tested for {', '.join(FAMILIES)}",
            )
        return hardware.attention
    if family not in FAMILIES:
        return PADDED
    return SDPA  # FlexAttention's backward pass exists on GPUs only, where it has not been run yet: by request


def use_attention(model: Any, attention: str) -> None:
    """Let a transformers model run `attention`; a call without a packing is computed by SDPA as before."""
    if attention == PADDED:
        return
    _register()
    model.set_attn_implementation(f"alignbench_{attention}")


def unused_mask(like: torch.Tensor) -> torch.Tensor:
    """What stands in the place of an attention mask: transformers hands a 4-d mask on to the kernel as it is."""
    return torch.empty((1, 1, 1, 0), device=like.device)


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for name, kernel in ((SDPA, _sdpa), (FLEX, _flex)):
        # compiled blocks call it as it is: its list of calls is another in every pass
        AttentionInterface.register(f"alignbench_{name}", torch.compiler.disable(_kernel(kernel)))
        AttentionMaskInterface.register(f"alignbench_{name}", sdpa_mask)


def _kernel(packed: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """A transformers attention function around `packed`; the rest of the interface is the same for all kernels."""
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if packing is None:
            if attention_mask is not None and not attention_mask.numel():
                raise ModelError(
                    f"{type(module).__name__} does not hand its keyword arguments on to attention",
                    where="hardware.attention",
                    mend="hardware.attention=padded",
                )
            plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
            return plain
        repeats = getattr(module, "num_key_value_groups", 1)
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
        return packed(query, key, value, packing, kwargs.get("sliding_window"), dropout, scaling), None

    return attention


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    window: int | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """(1, heads, T, d) three times -> (1, T, heads, d), an SDPA call for all segments of one shape.

    A response attends in a call that holds its prompt and itself, and whose shape and mask depend on their lengths
    alone: a sequence's numbers do not depend, not even in their last bit, on what it shares a row with.
    """
    heads, width = query.shape[1], query.shape[3]
    calls = packing.calls(window)
    # gathered for all calls at once: the gradient then goes back in one piece, not in one of the row's size per call
    gathered = [
        x.transpose(1, 2).reshape(-1, heads * width).index_select(0, places).split([math.prod(n) for n in shapes])
        for x, places, shapes in (
            (query, calls.queries, [call.queries for call in calls.each]),
            (key, calls.keys, [call.keys for call in calls.each]),
            (value, calls.keys, [call.keys for call in calls.each]),
        )
    ]
    found = []
    for call, *parts in zip(calls.each, *gathered, strict=True):
        q, k, v = (
            x.view(*shape, heads, width).transpose(1, 2)
            for x, shape in zip(parts, (call.queries, call.keys, call.keys), strict=True)
        )
        part = F.scaled_dot_product_attention(
            q, k, v, attn_mask=call.mask, dropout_p=dropout, scale=scaling, is_causal=call.mask is None
        )
        found.append(part.transpose(1, 2).reshape(-1, heads * width))
    return torch.cat(found).index_select(0, calls.back).view(1, -1, heads, width)


@cache
def _flex_compiled(device: str) -> Any:
    """FlexAttention; compiled on a GPU, torch's own reference elsewhere (its CPU kernel has no backward pass)."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    window: int | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """(1, heads, T, d) three times -> (1, T, heads, d) by FlexAttention, which has no dropout."""
    if dropout:
        raise ConfigError(
            f"FlexAttention has no dropout, and the model's attention has {dropout}",
            where="hardware.attention",
            mend="hardware.attention=packed_sdpa, or set the model's attention dropout to 0",
        )
    kernel = _flex_compiled(query.device.type)
    found: torch.Tensor = kernel(query, key, value, block_mask=packing.block_mask(window), scale=scaling)
    return found.transpose(1, 2).contiguous()
