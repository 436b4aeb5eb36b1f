"""Batches: the order of examples is a pure function, micro-batches partition it, masks come from lengths."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignbench.engine import batching
from alignbench.engine.batching import Row

sizes = st.tuples(st.integers(1, 40), st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**40))


@given(sizes)
def test_order_is_a_pure_function_of_its_arguments(case):
    examples, steps, batch, seed = case
    np.random.seed(1)  # noqa: NPY002 - the global generator must not matter
    first = batching.example_order(examples, steps, batch, seed)
    np.random.seed(2)  # noqa: NPY002
    assert np.array_equal(first, batching.example_order(examples, steps, batch, seed))
    assert first.shape == (steps, batch)


@given(sizes)
def test_every_epoch_is_a_permutation(case):
    examples, steps, batch, seed = case
    flat = batching.example_order(examples, steps, batch, seed).reshape(-1)
    for start in range(0, len(flat), examples):
        epoch = flat[start : start + examples]
        assert len(set(epoch.tolist())) == len(epoch)
        if len(epoch) == examples:
            assert set(epoch.tolist()) == set(range(examples))


def test_a_longer_run_begins_with_the_shorter_ones_order():
    short, long = (batching.example_order(13, steps, 4, 7) for steps in (3, 20))
    assert np.array_equal(short, long[:3])


def test_epochs_and_seeds_have_different_orders():
    first, second = batching.example_order(50, 2, 50, 0)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, batching.example_order(50, 2, 50, 1)[0])


@pytest.mark.parametrize(
    ("examples", "epochs", "batch", "steps"),
    [(10, 1, 4, 2), (8, 1, 4, 2), (3, 1, 8, 1), (10, 3, 10, 3), (10, 0.1, 1, 1), (7, 0.3, 1, 2), (30, 1.1, 11, 3)],
)
def test_total_steps_leaves_out_the_last_partial_batch(examples, epochs, batch, steps):
    assert batching.total_steps(examples, epochs, batch) == steps


lengths = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), min_size=1, max_size=8)


@given(lengths, st.integers(0, 3))
def test_masks_come_from_lengths_whatever_the_pad_id(shape, pad_id):
    # the ids repeat the pad id on purpose: as a pad id that is also EOS or a common token would
    sequences = [Row([pad_id, *range(prompt + response - 1)], prompt) for prompt, response in shape]
    batch = batching.collate(sequences, pad_id)
    assert batch.input_ids.shape[1] == max(len(row.ids) for row in sequences)
    for i, row in enumerate(sequences):
        size = len(row.ids)
        assert batch.input_ids[i, :size].tolist() == list(row.ids)
        assert set(batch.input_ids[i, size:].tolist()) <= {pad_id}
        assert batch.attention_mask[i].tolist() == [1] * size + [0] * (batch.input_ids.shape[1] - size)
        assert torch.nonzero(batch.response_mask[i]).flatten().tolist() == list(range(row.prompt_length, size))


@settings(max_examples=50)
@given(lengths, st.integers(1, 9))
def test_length_sorted_visits_every_row_once_by_length(shape, batch):
    sequences = [Row([0] * (prompt + response), prompt) for prompt, response in shape]
    parts = list(batching.length_sorted(sequences, batch))
    flat = np.concatenate(parts)
    assert sorted(flat.tolist()) == list(range(len(sequences)))
    assert np.all(np.diff([len(sequences[i].ids) for i in flat]) >= 0)
    assert max(map(len, parts)) <= batch
