"""KTO's mismatched completions: another prompt's response behind this prompt."""

import numpy as np
import tiny
from hypothesis import given
from hypothesis import strategies as st

from alignbench.stages.tokens import mismatch, mismatched_rows

prompts = st.lists(st.integers(0, 6), min_size=1, max_size=30)


def partners(names, seed):
    # the table is longer than the index: positions and row numbers must not be confused
    table = [{"prompt": "elsewhere"}] * 5 + [{"prompt": f"p{name}"} for name in names]
    return mismatch(table, np.arange(5, 5 + len(names)), seed)


@given(prompts, st.integers(0, 1000))
def test_partner_is_a_permutation_and_has_another_prompt_as_often_as_any_permutation_can(names, seed):
    partner = partners(names, seed)
    assert sorted(partner.tolist()) == list(range(len(names)))
    largest = max(np.bincount(names))
    same = sum(names[i] == names[p] for i, p in enumerate(partner))
    # a prompt with more than half of all pairs must meet itself, and no other one has to
    assert same == max(0, 2 * largest - len(names))


@given(prompts, st.integers(0, 1000))
def test_partner_is_a_function_of_the_seed(names, seed):
    assert np.array_equal(partners(names, seed), partners(names, seed))


def test_seeds_give_different_partners():
    assert len({tuple(partners(list(range(12)), seed)) for seed in range(8)}) > 4


def test_mismatched_rows_keep_the_prompt_and_take_the_partners_response():
    rows = tiny.rows(20, 0)
    partner = np.roll(np.arange(20), 7)
    for row, other, mixed in zip(rows, partner, mismatched_rows(rows, partner, 10**6), strict=True):
        assert mixed.prompt_length == row.prompt_length
        assert list(mixed.ids[: mixed.prompt_length]) == list(row.ids[: row.prompt_length])
        response = list(rows[other].ids[rows[other].prompt_length :])
        assert list(mixed.ids[mixed.prompt_length :]) == response


def test_mismatched_rows_are_cut_at_max_length_only():
    rows = tiny.rows(20, 1)
    partner = np.roll(np.arange(20), 3)
    whole = mismatched_rows(rows, partner, 10**6)
    limit = max(row.prompt_length for row in rows) + 2
    for full, cut in zip(whole, mismatched_rows(rows, partner, limit), strict=True):
        assert list(cut.ids) == list(full.ids)[:limit]
