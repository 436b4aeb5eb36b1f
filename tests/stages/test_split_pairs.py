"""Tokenised pairs are kept between the stages of a process: the same as made anew, and only of the same inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
from pair_chain import TOKENS, Chain, given, pair_table, weights

from alignbench.errors import DataError
from alignbench.models import policy as policies
from alignbench.stages import tokens
from alignbench.stages.tokens import PairRows, TokenSpec, encode_pairs, split_pairs


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("split") / "store")


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens._KEPT, "_values", {})


def asked(chain: Chain, split: str = "train", spec: TokenSpec = TOKENS, policy: Any = None) -> Any:
    policy = policy or chain.policy
    return split_pairs(chain.pairs, chain.rows, split, policy, policies.load_tokenizer(policy.path("policy")), spec)


def same(one: PairRows, other: PairRows) -> bool:
    return np.array_equal(one.index, other.index) and one.responses == other.responses and one.report == other.report


def test_kept_pairs_are_those_made_anew(chain: Chain) -> None:
    tokenizer = policies.load_tokenizer(chain.policy.path("policy"))
    for split in ("train", "validation"):
        found = asked(chain, split)
        wanted = [i for i, row in enumerate(chain.rows) if row["split"] == split]
        assert same(found, encode_pairs(chain.rows, wanted, tokenizer, TOKENS))
        assert asked(chain, split) is found
    assert asked(chain, "test") is None


def test_other_pairs_lengths_or_tokenizers_are_tokenised_anew(chain: Chain) -> None:
    found = asked(chain)
    assert asked(chain, spec=replace(TOKENS, max_length=TOKENS.max_length - 1)) is not found
    assert asked(chain.on(chain.table(pair_table(seed=1)))) is not found

    def other_tokenizer(out: Any) -> None:
        tiny.save(tiny.llama(), out / "policy")
        tokenizer = policies.load_tokenizer(out / "policy")
        tokenizer.chat_template = "{{ messages[0].content }}"
        tokenizer.save_pretrained(out / "policy")

    assert asked(chain, policy=given(chain.store, "policy", other_tokenizer, name="template")) is not found
    # policies trained from one have other weights and the same tokenizer
    trained, harder = chain.prefer(), chain.prefer(beta=0.05)
    assert weights(trained) != weights(harder)
    assert asked(chain, policy=trained) is asked(chain, policy=harder)


def test_no_more_tokens_are_kept_than_stated(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    def size(found: PairRows) -> int:
        return sum(len(row.ids) for side in found.responses for row in side)

    train, validation = asked(chain), asked(chain, "validation")
    monkeypatch.setattr(tokens._KEPT, "most", size(train) + size(validation) - 1)
    assert asked(chain) is train  # asked for last; the other one goes
    assert asked(chain) is train
    assert asked(chain, "validation") is not validation
    monkeypatch.setattr(tokens._KEPT, "most", size(train) - 1)
    assert same(asked(chain), train)
    assert not any(size(found) == size(train) for found, _ in tokens._KEPT._values.values())


def test_pairs_that_teach_nothing_are_refused_every_time(chain: Chain) -> None:
    rows = [{**row, "response_1": row["response_0"]} for row in chain.rows]
    pairs, tokenizer = chain.table(rows), policies.load_tokenizer(chain.policy.path("policy"))
    for _ in range(2):
        with pytest.raises(DataError, match="lose an answer"):
            split_pairs(pairs, rows, "train", chain.policy, tokenizer, TOKENS)
