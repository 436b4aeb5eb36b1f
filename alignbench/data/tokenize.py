"""Prompt and response to token ids, in one place.

Every stage (training, log-probs, sampling, scoring) goes through :func:`encode` or :func:`encode_prompt`, so
that a response is conditioned on the same ids wherever it is looked at. Prompt and response are tokenised
separately and
joined: no token straddles the border, and both responses of a pair share their prompt ids. Lengths are in
tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from alignbench.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Encoded:
    """One prompt with one response.

    Attributes:
        input_ids: Prompt ids, then response ids (the EOS among the latter).
        prompt_length: Number of prompt ids; the loss looks at ``input_ids[prompt_length:]``. Masks must come
            from this and the sequence's length, never from comparing with the pad id, which may be the EOS.
        truncated_prompt: The prompt lost its beginning.
        truncated_response: The response lost its end (at least its EOS).
        dropped: The row cannot be used: no response token fits (or its partner in a pair cannot be used).
    """

    input_ids: tuple[int, ...]
    prompt_length: int
    truncated_prompt: bool = False
    truncated_response: bool = False
    dropped: bool = False

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The ids of the prompt, BOS included."""
        return self.input_ids[: self.prompt_length]

    @property
    def response_ids(self) -> tuple[int, ...]:
        """The ids of the response, EOS included."""
        return self.input_ids[self.prompt_length :]


class EncodedPair(NamedTuple):
    """Both responses of a preference pair behind the same prompt ids; unpacks as ``first, second``."""

    first: Encoded
    second: Encoded

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The ids that both share."""
        return self.first.prompt_ids

    @property
    def dropped(self) -> bool:
        """Whether the pair cannot be used."""
        return self.first.dropped


def encode_prompt(tokenizer: Any, prompt_text: str, *, max_prompt_length: int | None) -> list[int]:
    """Ids of a rendered prompt: one BOS in front if the tokenizer has one, then the prompt's last tokens.

    Exactly the prompt part of :func:`encode` with the same ``max_prompt_length``.

    Args:
        tokenizer: A Hugging Face tokenizer.
        prompt_text: The output of :func:`alignbench.data.templates.render_prompt`. Special tokens written in
            it (chat templates do) become those tokens; a BOS at its start is not doubled.
        max_prompt_length: Longest prompt in tokens, BOS included; a longer one loses its beginning. None: no
            limit.

    Returns:
        At most ``max_prompt_length`` ids.

    Raises:
        ConfigError: ``max_prompt_length`` is below 1.
    """
    _check_lengths(None, max_prompt_length)
    return _prompt_ids(tokenizer, prompt_text, max_prompt_length)[0]


def encode(
    tokenizer: Any,
    prompt_text: str,
    response_text: str,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    append_eos: bool = True,
) -> Encoded:
    """Ids of a rendered prompt with a response, at most ``max_length`` of them.

    The prompt keeps its end, the response its start; too long a whole is cut at the response. Special tokens
    written out in the response are plain text, except for EOS at its very end, which is taken off: the one
    EOS that ``append_eos`` adds is the only one. A cut response has no EOS.

    Args:
        tokenizer: A Hugging Face tokenizer.
        prompt_text: The output of :func:`alignbench.data.templates.render_prompt`.
        response_text: The response alone.
        max_length: Longest sequence, prompt and response together.
        max_prompt_length: Longest prompt, below ``max_length``. None: the prompt may fill the whole sequence,
            and the row is then dropped.
        append_eos: End the response with EOS (training, official scoring); False for scorers that see bare
            text.

    Returns:
        The sequence. ``dropped`` is set where no response token remains.

    Raises:
        ConfigError: The lengths contradict each other.
        ModelError: EOS is asked for and the tokenizer has none.
    """
    _check_lengths(max_length, max_prompt_length)
    prompt, truncated_prompt = _prompt_ids(tokenizer, prompt_text, max_prompt_length or max_length)
    return _join(prompt, truncated_prompt, _response_ids(tokenizer, response_text, append_eos), max_length)


def encode_pair(
    tokenizer: Any,
    prompt_text: str,
    response_0: str,
    response_1: str,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    append_eos: bool = True,
) -> EncodedPair:
    """Both responses of a pair behind the same prompt ids; see :func:`encode` for arguments and errors.

    Returns:
        The two sequences. Both are ``dropped`` if either is, and also if truncation left them identical, for
        such a pair teaches nothing.
    """
    _check_lengths(max_length, max_prompt_length)
    prompt, truncated_prompt = _prompt_ids(tokenizer, prompt_text, max_prompt_length or max_length)
    first, second = (
        _join(prompt, truncated_prompt, _response_ids(tokenizer, text, append_eos), max_length)
        for text in (response_0, response_1)
    )
    dropped = first.dropped or second.dropped or first.input_ids == second.input_ids
    return EncodedPair(replace(first, dropped=dropped), replace(second, dropped=dropped))


def pad_batch(
    sequences: Sequence[Sequence[int]], pad_id: int, side: str = "right"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad sequences to the longest one.

    Args:
        sequences: B lists of ids, none of them empty.
        pad_id: Any valid id; it may equal the EOS, since the mask comes from the lengths.
        side: ``"right"`` for training and scoring, ``"left"`` for generation.

    Returns:
        ``input_ids`` and ``attention_mask`` (1 = real token), both int64 of shape (B, longest).

    Raises:
        ValueError: No sequences, an empty sequence, or an unknown side.
    """
    import torch

    if side not in ("left", "right"):
        raise ValueError(f"side is {side!r}, wanted 'left' or 'right'")
    if not sequences or not all(len(ids) for ids in sequences):
        raise ValueError("pad_batch needs at least one sequence, and none of them empty")
    longest = max(len(ids) for ids in sequences)
    input_ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for i, ids in enumerate(sequences):
        span = slice(0, len(ids)) if side == "right" else slice(longest - len(ids), longest)
        input_ids[i, span] = torch.as_tensor(ids, dtype=torch.long)
        attention_mask[i, span] = 1
    return input_ids, attention_mask


@dataclass
class TruncationReport:
    """Counts what truncation did to a data set. A pair is one row, counted if either side is touched."""

    n: int = 0
    truncated_prompts: int = 0
    truncated_responses: int = 0
    dropped: int = 0

    @classmethod
    def of(cls, items: Iterable[Encoded | EncodedPair]) -> TruncationReport:
        """Report over ``items``."""
        report = cls()
        for item in items:
            report.add(item)
        return report

    def add(self, item: Encoded | EncodedPair) -> None:
        """Count one row."""
        sides = item if isinstance(item, EncodedPair) else (item,)
        self.n += 1
        self.truncated_prompts += any(side.truncated_prompt for side in sides)
        self.truncated_responses += any(side.truncated_response for side in sides)
        self.dropped += any(side.dropped for side in sides)

    def to_dict(self) -> dict[str, float]:
        """Counts and the dropped share (0 for no rows), as plain numbers."""
        return {
            "n": self.n,
            "truncated_prompts": self.truncated_prompts,
            "truncated_responses": self.truncated_responses,
            "dropped": self.dropped,
            "dropped_share": self.dropped / self.n if self.n else 0.0,
        }

    def summary(self) -> str:
        """One line for the log."""
        return (
            f"{self.n} rows: {self.truncated_prompts} prompts and {self.truncated_responses} responses "
            f"truncated, {self.dropped} dropped ({self.to_dict()['dropped_share']:.1%})"
        )


def _check_lengths(max_length: int | None, max_prompt_length: int | None) -> None:
    for name, value in (("max_length", max_length), ("max_prompt_length", max_prompt_length)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, wanted at least 1 token", mend=f"raise {name}")
    if max_length is not None and max_prompt_length is not None and max_prompt_length >= max_length:
        raise ConfigError(
            f"max_prompt_length ({max_prompt_length}) leaves no room for a response in {max_length} tokens",
            where="max_length",
            mend="make max_prompt_length smaller than max_length",
        )


def _ids(tokenizer: Any, text: str, split_special_tokens: bool) -> list[int]:
    # no truncation here, so the tokenizer's own warning about its maximal length says nothing: verbose=False
    encoding = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=split_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return list(encoding["input_ids"])


def _prompt_ids(tokenizer: Any, text: str, limit: int | None) -> tuple[list[int], bool]:
    ids = _ids(tokenizer, text, split_special_tokens=False)
    bos = tokenizer.bos_token_id
    head = [] if bos is None else [bos]
    body = ids[1:] if head and ids[:1] == head else ids
    if limit is None or len(head) + len(body) <= limit:
        return head + body, False
    room = limit - len(head)
    return head + body[len(body) - room :], True


def _response_ids(tokenizer: Any, text: str, append_eos: bool) -> list[int]:
    eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
    if append_eos and eos_id is None:
        raise ModelError(
            "the tokenizer has no EOS token, so a response cannot be ended",
            where=str(getattr(tokenizer, "name_or_path", "") or "tokenizer"),
            mend="set eos_token in the model folder's tokenizer_config.json, or pass another tokenizer",
        )
    while eos and text.endswith(eos):
        text = text.removesuffix(eos)
    # a response that spells a control token must not be able to end (or restart) its own sequence
    ids = _ids(tokenizer, text, split_special_tokens=True)
    return [*ids, eos_id] if append_eos else ids


def _join(prompt: list[int], truncated_prompt: bool, response: list[int], max_length: int) -> Encoded:
    room = max_length - len(prompt)
    kept = response[:room]
    return Encoded(
        input_ids=(*prompt, *kept),
        prompt_length=len(prompt),
        truncated_prompt=truncated_prompt,
        truncated_response=len(kept) < len(response),
        dropped=not kept,
    )
