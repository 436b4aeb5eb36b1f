"""Packed rows compute what padded ones do, in every family; masks are the rule; micro-batches are bounded and whole."""

import copy

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignbench.engine import attention, batching, packing
from alignbench.engine.attention import FLEX, PADDED, SDPA
from alignbench.engine.batching import Row
from alignbench.engine.logprobs import LogProbPolicy
from alignbench.errors import ConfigError


def grouped(family, **changes):
    """A small model whose two key-value heads serve two query heads each."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return tiny.small(family, **(heads | {"bos_token_id": None, "pad_token_id": tiny.PAD} | changes))


FAMILIES = {
    "llama": tiny.llama,
    "llama-grouped": lambda: grouped("Llama", tie_word_embeddings=False),
    "qwen2": lambda: grouped("Qwen2"),
    "qwen2-window": lambda: grouped("Qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": lambda: grouped("Qwen3"),
    "mistral-window": lambda: grouped("Mistral", sliding_window=5),
    "gpt2": lambda: tiny.gpt2(),
    "gpt_neox": tiny.gpt_neox,
}


def groups(count, seed, most=4):
    """Rows in which some share their prompt, in mixed order; one has no prompt, and some answers are one token."""
    rng = np.random.default_rng(seed)
    found = [Row([5, 9, tiny.EOS], 0), Row([7, tiny.EOS], 0)]
    for _ in range(count):
        prompt = rng.integers(2, tiny.VOCABULARY, int(rng.integers(1, 9))).tolist()
        for _ in range(int(rng.integers(1, most))):
            answer = rng.integers(2, tiny.VOCABULARY, int(rng.choice([1, 2, 8, 20]))).tolist()
            found.append(Row([*prompt, *answer], len(prompt)))
    return [found[i] for i in rng.permutation(len(found))]


def values_and_gradients(model, rows, kind, **machine):
    """Log-probs and, for a weighted sum of them, every parameter's gradient."""
    model = copy.deepcopy(model)
    scorer = LogProbPolicy(model, tiny.hardware(attention=kind, **machine))
    found = scorer(packing.prepare(rows, tiny.PAD, kind))
    (found * torch.linspace(-1, 1, len(rows), dtype=torch.float64)).sum().backward()
    return found.detach().numpy(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(first, second, share=1e-4):
    np.testing.assert_allclose(first[0], second[0], atol=1e-5, rtol=0)
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        assert float((gradient - second[1][name]).abs().max()) <= share * scale, name


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_is_padded_in_values_and_gradients(name):
    model, rows = FAMILIES[name](), groups(5, 1)
    padded = values_and_gradients(model, rows, PADDED)
    assert_same(padded, values_and_gradients(model, rows, SDPA))
    assert np.std(padded[0]) > 5


@pytest.mark.parametrize("name", FAMILIES)
def test_flex_attention_gives_the_same_values(name):
    """On a CPU torch's FlexAttention has no backward pass; the mask that both passes read is tested below."""
    model, rows = FAMILIES[name](), groups(5, 1)
    found = []
    for kind in (PADDED, FLEX):
        scorer = LogProbPolicy(model, tiny.hardware(attention=kind))
        with torch.inference_mode():
            found.append(scorer(packing.prepare(rows, tiny.PAD, kind)).numpy())
    np.testing.assert_allclose(*found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 4))
def test_packed_is_padded_for_any_lengths(name, seed, count):
    model, rows = FAMILIES[name](), groups(count, seed)
    assert_same(values_and_gradients(model, rows, PADDED), values_and_gradients(model, rows, SDPA))


def test_a_row_at_the_length_limit():
    rows = [Row([3] * 63 + [9], 63), Row([3] * 63 + [4], 63), Row([2] * 64, 1)]
    model = tiny.gpt2()  # learned positions: one too many would be an index error
    assert_same(values_and_gradients(model, rows, PADDED), values_and_gradients(model, rows, SDPA))


def test_many_answers_to_one_prompt():
    prompt = [7, 8, 9, 10]
    rows = [Row([*prompt, *row.ids], 4) for row in tiny.rows(9, 3, response=(5, 25))]
    work = packing.prepare(rows, tiny.PAD, SDPA)
    assert len(work.packing.segments) == 1 + 9
    assert work.positions == 4 + sum(row.response_length for row in rows)
    for model in (tiny.llama(), FAMILIES["mistral-window"]()):
        assert_same(values_and_gradients(model, rows, PADDED), values_and_gradients(model, rows, SDPA))


@pytest.mark.parametrize("window", [None, 5])
def test_attention_does_not_depend_on_neighbours_to_the_last_bit(window):
    """Otherwise a cached log-prob and the first step's own would differ by who shared a row with whom."""
    prompts, lengths = [[7, 8, 9, 10], [4, 4, 4]], (5, 40, 2)
    rows = [Row([*prompt, *range(3, 3 + n)], len(prompt)) for prompt in prompts for n in lengths]
    together = packing.prepare(rows, tiny.PAD, SDPA)
    torch.manual_seed(0)
    qkv = torch.randn(3, 1, 2, together.positions, 8)
    found = attention._sdpa(*qkv, together.packing, window, 0.0, None)
    end = 0
    for row in rows:
        if row.response_length == lengths[0]:
            prompt, end = range(end, end + row.prompt_length), end + row.prompt_length
        places = [*prompt, *range(end, end + row.response_length)]
        end = places[-1] + 1
        alone = packing.prepare([row], tiny.PAD, SDPA)
        wanted = attention._sdpa(*qkv[..., places, :], alone.packing, window, 0.0, None)
        assert torch.equal(found[:, places], wanted)


@pytest.mark.parametrize("lora", [None, tiny.LORA], ids=["full", "lora"])
def test_recomputed_activations_see_the_same_packing(policy_folder, lora):
    rows, found = groups(4, 2), []
    for recompute in (False, True):
        model = tiny.load(policy_folder, lora).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        found.append(values_and_gradients(model, rows, SDPA) if not lora else _adapter_gradients(model, rows))
    assert_same(*found)


def _adapter_gradients(model, rows):
    values, gradients = values_and_gradients(model, rows, SDPA)
    return values, {name: g for name, g in gradients.items() if "lora_B" in name}  # A's are zero at the start


# ---------------------------------------------------------------- the mask


def naive_mask(rows, window=None):
    """Who sees whom, pair by pair, from the definition."""
    tokens = []  # (group, response or 0, position)
    for number, members in enumerate(packing.shared_prompts(rows)):
        length = rows[members[0]].prompt_length
        tokens += [(number, 0, t) for t in range(length)]
        for k, i in enumerate(members, 1):
            tokens += [(number, k, t) for t in range(length, len(rows[i].ids))]

    def sees(a, b):
        (ga, ra, ta), (gb, rb, tb) = tokens[a], tokens[b]
        return ga == gb and rb in (0, ra) and tb <= ta and (window is None or ta - tb < window)

    return torch.tensor([[sees(a, b) for b in range(len(tokens))] for a in range(len(tokens))])


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([None, 1, 6]))
def test_both_kernels_masks_are_the_definition(seed, window):
    rows = groups(3, seed)
    wanted = naive_mask(rows, window)
    work = packing.prepare(rows, tiny.PAD, FLEX)
    length, total = len(wanted), work.positions
    assert total % attention.FLEX_BLOCK == 0
    mod, places = work.packing.mask_mod(window), torch.arange(total)
    dense = mod(None, None, places[:, None], places[None])
    assert torch.equal(dense[:length, :length], wanted)
    assert not dense[:length, length:].any()  # nobody sees what fills the row up
    assert not dense[length:, :length].any()

    found = torch.zeros_like(wanted)
    calls = packing.prepare(rows, tiny.PAD, SDPA).packing.calls(window)
    seen, asking, asked = [], 0, 0  # by query: the keys it is given, and which of them it sees
    for call in calls.each:
        (count, queries), (_, keys) = call.queries, call.keys
        mask = torch.ones(queries, keys, dtype=torch.bool).tril().expand(count, 1, -1, -1)
        mask = mask if call.mask is None else call.mask
        given_keys = calls.keys[asked : asked + count * keys].view(count, keys)
        seen += [(given_keys[i], mask[i, 0, q]) for i, q in np.ndindex(count, queries)]
        asking, asked = asking + count * queries, asked + count * keys
    assert (asking, asked) == (len(calls.queries), len(calls.keys))
    assert torch.equal(calls.queries[calls.back], torch.arange(length))
    for token, place in enumerate(calls.back.tolist()):
        keys, own = seen[place]
        # what fills a segment up repeats a key behind what is seen
        assert len(set(keys[own].tolist())) == int(own.sum())
        found[token, keys[own]] = True
        assert own.any()
    assert torch.equal(found, wanted)


def test_a_packed_row_holds_each_prompt_once_and_no_padding():
    chosen, rejected = tiny.pair_rows(6, 0)
    work = packing.prepare([row for pair in zip(chosen, rejected, strict=True) for row in pair], tiny.PAD, SDPA)
    lengths = [c.prompt_length + c.response_length + r.response_length for c, r in zip(chosen, rejected, strict=True)]
    assert work.positions == sum(lengths) == sum(map(packing.shared_tokens, zip(chosen, rejected, strict=True)))
    assert int(work.position_ids.max()) == max(len(row.ids) for row in [*chosen, *rejected]) - 1


def test_calls_of_the_model_itself_stay_what_they_were():
    model, ids = tiny.llama(), torch.tensor([[5, 6, 7, 1], [8, 9, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    before = model(input_ids=ids, attention_mask=mask).logits
    LogProbPolicy(model, tiny.hardware(attention=SDPA))
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)


# ---------------------------------------------------------------- which layout


def test_auto_packs_the_tested_families_and_pads_others():
    gemma = grouped("Gemma2")
    assert attention.attention_of(tiny.hardware(), tiny.llama()) == SDPA
    assert attention.attention_of(tiny.hardware(device="cuda"), tiny.gpt2()) == SDPA
    assert attention.attention_of(tiny.hardware(device="cuda", attention=FLEX), tiny.gpt2()) == FLEX
    assert attention.attention_of(tiny.hardware(attention=PADDED), tiny.llama()) == PADDED
    assert attention.attention_of(tiny.hardware(), gemma) == PADDED
    with pytest.raises(ConfigError, match=r"(?s)family gemma2.*padded or auto"):
        attention.attention_of(tiny.hardware(attention=SDPA), gemma)


def test_flex_refuses_attention_dropout():
    model = tiny.gpt2().train()
    scorer = LogProbPolicy(model, tiny.hardware(attention=FLEX, device="cuda"))
    with pytest.raises(ConfigError, match="no dropout"):
        scorer(packing.prepare(tiny.rows(2, 0), tiny.PAD, FLEX))


# ---------------------------------------------------------------- the head


HEADS = {
    "llama": tiny.llama,
    "untied": lambda: grouped("Llama", tie_word_embeddings=False),
    "gpt_neox": tiny.gpt_neox,
    "gemma2-softcap": lambda: grouped("Gemma2", final_logit_softcapping=4.0, query_pre_attn_scalar=8),
    "cohere-scale": lambda: grouped("Cohere", logit_scale=0.5),
    "granite-divisor": lambda: grouped("Granite", logits_scaling=3.0),
    "unknown-head": lambda: grouped("Olmo2"),
}


def through_own_forward(model, rows):
    """Log-probs and gradients from the logits of the model's own forward pass, one row at a time."""
    model = copy.deepcopy(model)
    found = []
    for row in rows:
        every = torch.log_softmax(model(input_ids=torch.tensor([list(row.ids)])).logits[0].double(), -1)
        found.append(sum(every[t - 1, row.ids[t]] for t in range(max(1, row.prompt_length), len(row.ids))))
    (torch.stack(found) * torch.linspace(-1, 1, len(rows), dtype=torch.float64)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return torch.stack(found).detach().numpy(), gradients


@pytest.mark.parametrize("name", HEADS)
def test_chunked_is_whole_is_the_models_own_forward_pass(name, monkeypatch):
    model, rows = HEADS[name](), groups(4, 5)
    wanted = through_own_forward(model, rows)
    calls = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, out: calls.append(len(inputs[0])))
    assert_same(wanted, values_and_gradients(model, rows, PADDED))
    calls.clear()
    with monkeypatch.context() as patched:
        _logits_bytes(patched, 7 * 4 * tiny.VOCABULARY)
        assert_same(wanted, values_and_gradients(model, rows, PADDED))
    if name != "unknown-head":
        assert max(calls) == 7  # no more logits than that at a time
        assert len(calls) == 2 * -(
            -len(packing.prepare(rows, tiny.PAD, PADDED).index) // 7
        )  # again in the backward pass


def _logits_bytes(monkeypatch, count):
    """Bytes above which logits are made in chunks: less than the configuration's unit, for tiny models."""
    whole = LogProbPolicy.__init__

    def initialise(self, policy, hardware):
        whole(self, policy, hardware)
        self._logits_bytes = count

    monkeypatch.setattr(LogProbPolicy, "__init__", initialise)


def test_adapters_on_the_head_take_part_in_chunks(policy_folder, monkeypatch):
    from dataclasses import replace

    lora = replace(tiny.LORA, targets=["q_proj", "lm_head"])
    model, rows = tiny.load(policy_folder, lora), groups(4, 6)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    whole = values_and_gradients(model, rows, SDPA)
    assert any("lm_head" in name for name in whole[1])
    _logits_bytes(monkeypatch, 5 * 4 * tiny.VOCABULARY)
    assert_same(whole, values_and_gradients(model, rows, SDPA))


@pytest.mark.parametrize("stage", range(4))
def test_chunks_and_packing_train_as_whole_padded_rows_do(
    policy_folder, tmp_path, stage, monkeypatch, split_parameters
):
    goal = tiny.preference("dpo", tiny.load(policy_folder))
    changes = {"steps": 6, "train_settings": {"max_grad_norm": 1.0}}
    machine = {"zero_stage": stage, "attention": PADDED, "micro_batch": 8}
    plain = tiny.run(tiny.job(tiny.load(policy_folder), goal, tmp_path / "a", machine=machine, **changes))
    _logits_bytes(monkeypatch, 20 * 4 * tiny.VOCABULARY)
    machine |= {"attention": SDPA, "micro_tokens": 90}  # micro-batches of several sizes, more in some steps than others
    packed = tiny.run(tiny.job(tiny.load(policy_folder), goal, tmp_path / "b", machine=machine, **changes))
    np.testing.assert_allclose(tiny.losses(packed[0]), tiny.losses(plain[0]), atol=1e-5)
    for one, other in zip(plain[0].log, packed[0].log, strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert tiny.distance(packed[1], plain[1]) < 1e-4


def test_half_precision_logits_are_summed_in_single():
    torch.manual_seed(0)
    logits = (torch.randn(50, 3000) * 4).bfloat16().requires_grad_()
    targets = torch.randint(0, 3000, (50,))
    from alignbench.engine.logprobs import _chosen

    exact = torch.log_softmax(logits.detach().double(), -1).gather(1, targets[:, None])[:, 0]
    found = _chosen(logits * 1, targets)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.detach(), exact, atol=1e-5)
    found.sum().backward()
    wanted = -torch.softmax(logits.detach().double(), -1)
    wanted[range(50), targets] += 1
    assert logits.grad.dtype == torch.bfloat16
    np.testing.assert_allclose(logits.grad.double(), wanted, atol=4e-3)


# ---------------------------------------------------------------- micro-batches and passes


@settings(max_examples=80)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=24), st.integers(1, 9), st.integers(10, 200), st.booleans())
def test_micro_batches_partition_the_step_within_their_bounds(sizes, most, tokens, padded):
    for ranks in (r for r in (1, 2, 3) if len(sizes) % r == 0):
        parts = batching.micro_batches(sizes, most=most, tokens=tokens, ranks=ranks, padded=padded)
        again = batching.micro_batches(sizes, most=most, tokens=tokens, ranks=ranks, padded=padded)
        assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(sizes)))
        assert len(parts) % ranks == 0
        assert min(map(len, parts)) >= 1
        assert max(map(len, parts)) <= most
        for part in parts:
            load = len(part) * max(sizes[i] for i in part) if padded else sum(sizes[i] for i in part)
            assert load <= tokens or len(part) == 1 or len(parts) == len(sizes)


def test_ranks_get_like_shares_of_a_step():
    sizes = np.random.default_rng(0).integers(20, 400, 64).tolist()
    parts = batching.micro_batches(sizes, most=64, tokens=10**6, ranks=4, padded=False)
    loads = [sum(sizes[i] for i in part) for part in parts]
    assert len(parts) == 4
    assert max(loads) < 1.02 * np.mean(loads)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(5, 120), st.integers(1, 3), st.booleans())
def test_forward_passes_visit_every_row_once_within_their_bounds(seed, most, tokens, ranks, padded):
    rows = groups(6, seed)
    passes = batching.forward_passes(rows, most=most, tokens=tokens, ranks=ranks, padded=padded)
    assert sorted(i for part in passes for i in part) == list(range(len(rows)))
    assert len(passes) >= min(ranks, len(rows))
    for part in passes:
        assert len(part) <= most
        work = packing.prepare([rows[i] for i in part], tiny.PAD, PADDED if padded else SDPA)
        assert work.positions <= tokens or len(part) == 1


def test_answers_to_one_prompt_share_a_pass():
    rows = [Row([9 - k, 5, 5, *range(10, 12 + i)], 3) for i in range(4) for k in range(3)]
    passes = batching.forward_passes(rows, most=4, tokens=10**4, ranks=1, padded=False)
    assert [{tuple(rows[i].ids[:3]) for i in part} for part in passes] == [{(9, 5, 5)}, {(8, 5, 5)}, {(7, 5, 5)}]


def test_no_rows_need_no_pass():
    assert batching.forward_passes([], most=4, tokens=10, ranks=2, padded=False) == []
