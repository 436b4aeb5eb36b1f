"""Keys and values of sequences that are being sampled.

transformers' own cache is concatenated anew for every token, which on a CPU took three fifths of the time of sampling.
Here a layer's keys and values lie in one block with room to grow: a new token is written into it, and a finished
sequence's place is taken by the last one.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

#: Tokens by which a block grows: its copying is spread over as many steps.
GROWTH = 64


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, of shape (rows, heads, tokens, width): views of blocks with room for more tokens."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, room: int) -> None:
        """Copy `keys` and `values` into blocks with `room` more tokens."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self._rows, self._length = keys.shape[0], keys.shape[2]
        self._blocks = (_roomy(keys, room), _roomy(values, room))
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (block[: self._rows, :, : self._length] for block in self._blocks)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens; returns all keys and values."""
        end = self._length + key_states.shape[2]
        if end > self._blocks[0].shape[2]:
            keys, values = self.keys, self.values
            assert keys is not None
            assert values is not None
            self._blocks = (_roomy(keys, end - self._length + GROWTH), _roomy(values, end - self._length + GROWTH))
        for block, states in zip(self._blocks, (key_states, value_states), strict=True):
            block[: self._rows, :, self._length : end] = states
        self._length = end
        self._show()
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, no more than there are, in that order; rows that stay in place cost nothing."""
        places = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        for block in self._blocks:
            block[places, :, : self._length] = block[indices[places], :, : self._length]
        self._rows = len(indices)
        self._show()


def _roomy(tensor: torch.Tensor, room: int) -> torch.Tensor:
    rows, heads, tokens, width = tensor.shape
    block = tensor.new_empty(rows, heads, tokens + room, width)
    block[:, :, :tokens] = tensor
    return block


def spread_prompts(cache: Any, owner: torch.Tensor, most: int) -> Any:
    """From the prompts' cache to that of their samples, in place.

    Args:
        cache: transformers' cache of the prompts' forward pass.
        owner: (samples,) which prompt each sample continues.
        most: Most new tokens.
    """
    cache.batch_select_indices(owner)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:  # sliding windows keep their own, which is bounded
            cache.layers[i] = RoomyLayer(layer.keys, layer.values, min(most, GROWTH))
    return cache


def remaining_order(done: torch.Tensor) -> torch.Tensor:
    """Rows that are not done, (rows,) bool -> (remaining,): as many as possible in place, the last ones in the gaps."""
    count = int((~done).sum())
    order = torch.arange(count, device=done.device)
    order[done[:count]] = count + (~done[count:]).nonzero()[:, 0]
    return order


def token_bytes(config: Any, width: int) -> int:
    """Bytes of one token's keys and values: layers x key-value heads x head width x 2 x bytes of a number."""
    config = config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(config.num_hidden_layers * shared * head_width * 2 * width)
