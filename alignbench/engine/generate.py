"""Sampling responses. Each response is a function of (policy, prompt, seed, sample index) alone.

Randomness comes from one uniform number per (prompt, sample, position), drawn by a counter-based generator
and put through the inverse cumulative distribution: batch size and order do not change what is drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alignbench.config import SamplingConfig
from alignbench.engine import group
from alignbench.engine.batching import length_sorted
from alignbench.engine.logprobs import progress


@dataclass(frozen=True)
class Request:
    """One prompt to answer: its token ids, a name that seeds it, and which of its samples this is."""

    prompt_id: str
    ids: tuple[int, ...]
    sample: int


def generate(
    policy: Any,
    requests: Sequence[Request],
    *,
    sampling: SamplingConfig,
    eos_id: int,
    pad_id: int,
    seed: int,
    batch: int,
    device: torch.device,
) -> list[list[int]]:
    """Sample one response per request.

    Args:
        policy: A causal language model in evaluation mode on `device`.
        requests: What to answer.
        sampling: Temperature, top-p and the most new tokens.
        eos_id: The token that ends a response; it is kept as the response's last id.
        pad_id: Any valid token id.
        seed: Together with a request's prompt_id and sample it decides the response.
        batch: Requests per batch.
        device: Where the policy is.

    Returns:
        Response ids in the order of `requests`; one without `eos_id` at its end was cut at max_new_tokens.
    """

    def answer(indices: Sequence[int]) -> list[list[int]]:
        found = _sample(policy, [requests[i] for i in indices], sampling, eos_id, pad_id, seed, device)
        bar.update(min(len(indices) * group.world(), len(requests) - bar.n))
        return found

    with torch.inference_mode(), progress(len(requests), "sample", "resp") as bar:
        return group.spread(length_sorted(requests, batch, group.world()), answer)


def _sample(
    policy: Any,
    requests: Sequence[Request],
    sampling: SamplingConfig,
    eos_id: int,
    pad_id: int,
    seed: int,
    device: torch.device,
) -> list[list[int]]:
    longest = max(len(r.ids) for r in requests)
    input_ids = torch.full((len(requests), longest), pad_id, dtype=torch.long)
    attention = torch.zeros((len(requests), longest + sampling.max_new_tokens), dtype=torch.long)
    for i, request in enumerate(requests):  # left padding: the last position is the prompt's last token
        input_ids[i, longest - len(request.ids) :] = torch.tensor(request.ids)
        attention[i, longest - len(request.ids) :] = 1
    numbers = torch.from_numpy(
        np.stack([uniforms(f"{seed}/{r.prompt_id}/{r.sample}", sampling.max_new_tokens) for r in requests])
    ).to(device)
    attention = attention.to(device)
    lengths = attention[:, :longest].sum(1)
    positions = (attention[:, :longest].cumsum(1) - 1).clamp(min=0)
    tokens = input_ids.to(device)
    drawn = torch.full((len(requests), sampling.max_new_tokens), -1, device=device)
    active = torch.arange(len(requests), device=device)  # rows of `drawn` still in the batch
    done = torch.zeros_like(active, dtype=torch.bool)
    cache = None
    for step in range(sampling.max_new_tokens):
        out = policy(
            input_ids=tokens,
            attention_mask=attention[:, : longest + step],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        token = draw(out.logits[:, -1], numbers[:, step], sampling.temperature, sampling.top_p)
        drawn[active[~done], step] = token[~done]
        done |= token == eos_id
        if bool(done.all()):
            break
        if int(done.sum()) * 2 >= len(done):  # half the batch is waiting for the other half: let it go
            kept = (~done).nonzero()[:, 0]
            cache.batch_select_indices(kept)
            active, token, done = active[kept], token[kept], done[kept]
            attention, numbers, lengths = attention[kept], numbers[kept], lengths[kept]
        tokens, positions = token.unsqueeze(1), (lengths + step).unsqueeze(1)
    return [[t for t in row if t >= 0] for row in drawn.cpu().tolist()]


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Inverse-CDF sampling, shape (batch, vocab) and (batch,) -> (batch,) token ids.

    With `top_p` < 1 only the smallest set of likeliest tokens with at least that mass is kept.
    """
    probabilities = torch.softmax(logits.double() / temperature, -1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        kept = ordered.cumsum(-1) - ordered < top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered * kept)
    cumulative = probabilities.cumsum(-1)
    target = (uniform.double() * cumulative[:, -1]).unsqueeze(-1)
    # strictly greater: a token of probability zero is never drawn, not even at uniform = 0
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def uniforms(name: str, count: int) -> np.ndarray:
    """The first `count` uniform numbers of the stream of that name, shape (count,): a longer stream begins alike."""
    key = hashlib.sha256(name.encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big"))).random(count)
