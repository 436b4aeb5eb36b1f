"""Sequence log-probs equal a naive float64 computation, whatever surrounds a sequence in its batch."""

import copy

import numpy as np
import pytest
import tiny
import torch

from alignbench.engine.batching import Row
from alignbench.engine.logprobs import LogProbPolicy
from alignbench.engine.packing import prepare

MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "gpt_neox": tiny.gpt_neox}


def naive(model, row):
    """Sum of log pi(token) over the response of one sequence, without padding or batching."""
    logits = model(input_ids=torch.tensor([list(row.ids)])).logits[0].double()
    logprobs = torch.log_softmax(logits, -1)
    return sum(logprobs[t - 1, row.ids[t]] for t in range(row.prompt_length, len(row.ids)))


def batched(model, sequences, pad_id=tiny.PAD, **machine):
    scorer = LogProbPolicy(model, tiny.hardware(**machine))
    return scorer(prepare(sequences, pad_id, scorer.attention))


@pytest.mark.parametrize("name", MODELS)
def test_equals_an_independent_float64_computation(name):
    model, sequences = MODELS[name](), tiny.rows(12, 0)
    with torch.no_grad():
        exact = [float(naive(copy.deepcopy(model).double(), row)) for row in sequences]
    found = batched(model, sequences).detach().numpy()
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, exact, atol=1e-5, rtol=0)
    assert np.std(exact) > 10  # the model is far from uniform, so the comparison means something


@pytest.mark.parametrize("name", MODELS)
def test_independent_of_padding_company_and_batch_size(name):
    model, sequences = MODELS[name](), tiny.rows(12, 1)
    alone = tiny.logprobs(model, sequences, batch=1)
    for batch in (2, 5, 12, 100):
        np.testing.assert_allclose(tiny.logprobs(model, sequences, batch=batch), alone, atol=1e-5, rtol=0)
    long = Row([5] * 60, 2)
    with torch.no_grad():
        for row, value in zip(sequences, alone, strict=True):
            assert float(batched(model, [row, long])[0]) == pytest.approx(value, abs=1e-5)


def test_the_pad_id_changes_nothing_even_if_it_is_eos():
    model, sequences = tiny.llama(), tiny.rows(9, 2)
    as_pad, as_eos = (tiny.logprobs(model, sequences, pad_id=p, batch=9) for p in (tiny.PAD, tiny.EOS))
    assert np.array_equal(as_pad, as_eos)


def test_gradient_equals_the_independent_one():
    sequences = tiny.rows(7, 3)
    weights = torch.linspace(-1, 1, 7, dtype=torch.float64)
    model, other = tiny.llama(), tiny.llama()
    (batched(model, sequences) * weights).sum().backward()
    sum(w * naive(other, row) for w, row in zip(weights, sequences, strict=True)).backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        scale = float(q.grad.abs().max())
        assert scale > 0, name
        assert float((p.grad - q.grad).abs().max()) <= 1e-5 * max(1.0, scale), name


def test_prompt_tokens_and_padding_have_no_direct_share():
    model = tiny.llama()
    row = tiny.rows(1, 4, prompt=(5, 6), response=(4, 5))[0]
    whole = float(naive(model, Row(row.ids, 1)))
    prompt = float(naive(model, Row(row.ids[:5], 1)))
    assert tiny.logprobs(model, [row])[0] == pytest.approx(whole - prompt, abs=1e-4)


def test_order_is_that_of_the_rows():
    model, sequences = tiny.llama(), tiny.rows(20, 5)
    values = tiny.logprobs(model, sequences, batch=4)
    shuffled = np.random.default_rng(0).permutation(20)
    np.testing.assert_allclose(
        tiny.logprobs(model, [sequences[i] for i in shuffled], batch=3), values[shuffled], atol=1e-5, rtol=0
    )
    assert len(set(values.tolist())) == 20


def test_no_rows_give_no_values():
    assert tiny.logprobs(tiny.llama(), []).shape == (0,)
