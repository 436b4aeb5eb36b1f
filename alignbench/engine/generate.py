"""Sampling responses. Each response is a function of (policy, prompt, seed, sample index) alone.

Randomness comes from one uniform number per (prompt, sample, position), drawn by a counter-based generator
and put through the inverse cumulative distribution: batch size and order do not change what is drawn.
"""

from __future__ import annotations

import contextlib
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

#: Tokens among which the nucleus is looked for first: most often it has far fewer.
_LIKELIEST = 256


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
    memory: float | None = None,
) -> list[list[int]]:
    """Sample one response per request. Samples of one prompt share its forward pass where they are neighbours.

    Args:
        policy: A causal language model in evaluation mode on `device`.
        requests: What to answer.
        sampling: Temperature, top-p and the most new tokens.
        eos_id: The token that ends a response; it is kept as the response's last id.
        pad_id: Any valid token id.
        seed: Together with a request's prompt_id and sample it decides the response.
        batch: Most requests per batch.
        device: Where the policy is.
        memory: Bytes there are for what a batch needs beside the policy; None: unknown, batches are not bounded by it.

    Returns:
        Response ids in the order of `requests`; one without `eos_id` at its end was cut at max_new_tokens.
    """

    def answer(indices: Sequence[int]) -> list[list[int]]:
        found = _sample(policy, [requests[i] for i in indices], sampling, eos_id, pad_id, seed, device)
        bar.update(min(len(indices) * group.world(), len(requests) - bar.n))
        return found

    from alignbench.engine import shared

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if shared.shares_prompts(policy):
            stack.enter_context(shared.sharing_prompts(policy))
        bar = stack.enter_context(progress(len(requests), "sample", "resp"))
        batches = length_sorted(requests, batch, group.world())
        if memory is not None:
            # ranks go through the same batches, so the one with the least memory decides
            batches = _within(batches, requests, min(group.gather(memory)), policy, sampling.max_new_tokens)
        return group.spread(batches, answer)


def _within(
    batches: list[list[int]], requests: Sequence[Request], memory: float, policy: Any, new_tokens: int
) -> list[list[int]]:
    """Cut batches into pieces that fit into `memory` bytes; one request is never too many."""
    found: list[list[int]] = []
    for batch in batches:
        longest = len(requests[batch[-1]].ids)  # they are sorted
        prompts: set[tuple[int, ...]] = set()
        found.append([])
        for i in batch:
            prompts.add(requests[i].ids)
            if found[-1] and held_bytes(policy, len(prompts), len(found[-1]) + 1, longest, new_tokens) > memory:
                found.append([])
                prompts = {requests[i].ids}
            found[-1].append(i)
    return found


def held_bytes(policy: Any, prompts: int, samples: int, longest: int, new_tokens: int) -> float:
    """Bytes that sampling a batch needs: its keys and values, and drawing from its logits.

    One layer's block is copied at a time when blocks grow, and attention makes fp32 of one layer: that share more.
    Drawing takes at most some four float64 numbers per token of the vocabulary beside the logits in fp32.
    """
    from alignbench.engine import kv, shared  # they load transformers, which a run that finds everything has no use for

    width = next(policy.parameters()).element_size()
    config = policy.config.get_text_config(decoder=True)
    token = kv.token_bytes(policy.config, width)
    copied = 1 + 4 / width / config.num_hidden_layers
    own = samples * (new_tokens + kv.GROWTH)
    kept = longest * (prompts if shared.shares_prompts(policy) else samples)
    return token * (kept + own) * copied + samples * 36 * config.vocab_size


def _sample(
    policy: Any,
    requests: Sequence[Request],
    sampling: SamplingConfig,
    eos_id: int,
    pad_id: int,
    seed: int,
    device: torch.device,
) -> list[list[int]]:
    from alignbench.engine import kv

    logits, lengths, state = _start(policy, requests, sampling.max_new_tokens, pad_id, device)
    numbers = torch.from_numpy(
        np.stack([uniforms(f"{seed}/{r.prompt_id}/{r.sample}", sampling.max_new_tokens) for r in requests])
    ).to(device)
    drawn = torch.full((len(requests), sampling.max_new_tokens), -1, device=device)
    active = torch.arange(len(requests), device=device)  # rows of `drawn` still in the batch
    for step in range(sampling.max_new_tokens):
        token = draw(logits, numbers[:, step], sampling.temperature, sampling.top_p)
        drawn[active, step] = token
        order = kv.remaining_order(token == eos_id)
        if step + 1 == sampling.max_new_tokens or not len(order):
            break
        if len(order) < len(active):  # finished ones leave at once
            state.keep(order)
            active, token, numbers, lengths = (x[order] for x in (active, token, numbers, lengths))
        out = policy(
            input_ids=token.unsqueeze(1),
            position_ids=(lengths + step).unsqueeze(1),
            use_cache=True,
            logits_to_keep=1,
            **state.arguments(step + 1),
        )
        logits = out.logits[:, -1]
    return [[t for t in row if t >= 0] for row in drawn.cpu().tolist()]


def _start(
    policy: Any, requests: Sequence[Request], most: int, pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """The prompts' forward pass: logits (samples, vocabulary), prompt lengths (samples,), and the keys and values."""
    from transformers.cache_utils import DynamicCache

    from alignbench.engine import kv, shared

    prompts = list(dict.fromkeys(r.ids for r in requests))
    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    attention = torch.zeros((len(prompts), longest), dtype=torch.long)
    for i, ids in enumerate(prompts):  # left padding: the last position is the prompt's last token
        input_ids[i, longest - len(ids) :] = torch.tensor(ids)
        attention[i, longest - len(ids) :] = 1
    attention = attention.to(device)
    together = shared.shares_prompts(policy)
    out = policy(
        input_ids=input_ids.to(device),
        attention_mask=attention,
        position_ids=(attention.cumsum(1) - 1).clamp(min=0),
        # without a configuration it keeps what is behind a sliding window, which the next token may still see
        past_key_values=DynamicCache() if together else None,
        use_cache=True,
        logits_to_keep=1,
    )
    place = {ids: i for i, ids in enumerate(prompts)}
    owner = torch.tensor([place[r.ids] for r in requests], device=device)
    kept = (shared.SharedPrompts if together else kv.OwnPrompts)(out.past_key_values, owner, attention, most)
    return out.logits[owner, -1], attention.sum(1)[owner], kept


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Inverse-CDF sampling, shape (batch, vocab) and (batch,) -> (batch,) token ids.

    With `top_p` < 1 only the smallest set of likeliest tokens with at least that mass is kept.
    """
    scaled = logits if temperature == 1 else logits.float() / temperature
    if top_p < 1:
        probabilities = torch.softmax(scaled, -1, dtype=torch.float64)
        probabilities = probabilities * nucleus(probabilities, top_p)
    else:  # rounded like the logits themselves; it is sums over a vocabulary that fp32 is too coarse for
        probabilities = torch.softmax(scaled, -1, dtype=torch.float32)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    target = (uniform.double() * cumulative[:, -1]).unsqueeze(-1)
    # strictly greater: a token of probability zero is never drawn, not even at uniform = 0
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Which tokens are kept, bool (batch, vocab): the likeliest until their mass reaches `top_p`; of equals, the first.

    The likeliest few are taken without sorting the vocabulary; rows that need more are sorted.
    """
    few = min(_LIKELIEST, probabilities.shape[-1])
    ordered = probabilities.topk(few, dim=-1).values
    inside = ordered.cumsum(-1) - ordered < top_p
    if few < probabilities.shape[-1] and bool(inside[:, -1].any()):
        ordered = probabilities.sort(dim=-1, descending=True).values
        inside = ordered.cumsum(-1) - ordered < top_p
    count = inside.sum(-1, keepdim=True)
    last = ordered.gather(-1, count - 1)
    above, equal = probabilities > last, probabilities == last
    return above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def uniforms(name: str, count: int) -> np.ndarray:
    """The first `count` uniform numbers of the stream of that name, shape (count,): a longer stream begins alike."""
    key = hashlib.sha256(name.encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big"))).random(count)
