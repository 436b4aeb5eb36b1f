"""RMSNorms with a gradient of their own: transformers' values, gradients no further from the exact, in every model."""

import copy

import pytest
import tiny
import torch
import transformers.models as families
from hypothesis import given, settings
from hypothesis import strategies as st

from alignbench.engine import packing
from alignbench.engine.logprobs import LogProbPolicy
from alignbench.models import norms
from alignbench.models import policy as policies

CLASSES = {
    "llama": families.llama.modeling_llama.LlamaRMSNorm,
    "mistral": families.mistral.modeling_mistral.MistralRMSNorm,
    "qwen2": families.qwen2.modeling_qwen2.Qwen2RMSNorm,
    "qwen3": families.qwen3.modeling_qwen3.Qwen3RMSNorm,
}


def exact(hidden, weight, eps):
    """The formula in float64, left to autograd."""
    return weight * hidden / torch.sqrt(hidden.square().mean(-1, keepdim=True) + eps)


def with_gradients(function, hidden, weight, cotangent, eps=1e-6):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    found = function(hidden, weight, eps)
    return [found.detach(), *torch.autograd.grad(found, (hidden, weight), cotangent)]


def drawn(shape, seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden, cotangent = (torch.randn(shape, generator=generator) for _ in range(2))
    return hidden * size, 1 + 0.3 * torch.randn(shape[-1], generator=generator), cotangent


def furthest(found, wanted):
    """Largest difference of each, as a share of the largest wanted number."""
    return [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True)]


@settings(max_examples=60)
@given(
    shape=st.sampled_from([(1,), (7,), (3, 5), (2, 3, 32), (1, 40, 4, 8), (2, 1, 4096), (0, 4)]),
    size=st.sampled_from([1e-6, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 10**6),
)
def test_values_and_gradients_are_the_formula_s(shape, size, seed):
    given_ = drawn(shape, seed, size)
    found = with_gradients(norms.rms_norm, *given_)
    if not given_[0].numel():
        assert found[0].shape == shape
        assert torch.equal(found[2], torch.zeros(shape[-1]))
        return
    wanted = with_gradients(exact, *(x.double() for x in given_))
    # where sizes dwarf eps, the gradient along a single number cancels but for what eps leaves of it
    if shape[-1] == 1 and size >= 1e-3:
        del found[1], wanted[1]
    assert max(furthest(found, wanted)) < 2e-6


@pytest.mark.parametrize("family", CLASSES)
def test_values_are_transformers_own_and_gradients_no_further_from_the_formula(family):
    module = CLASSES[family](256, 1e-6)
    errors = {"own": torch.zeros(3), "theirs": torch.zeros(3)}
    for seed in range(20):
        hidden, weight, cotangent = drawn((1, 300, 256), seed)
        wanted = with_gradients(exact, hidden.double(), weight.double(), cotangent.double())

        def theirs(hidden, weight, eps):
            return torch.func.functional_call(module, {"weight": weight}, (hidden,))

        assert torch.equal(norms.rms_norm(hidden, weight, 1e-6), theirs(hidden, weight, 1e-6))
        for name, function in (("own", norms.rms_norm), ("theirs", theirs)):
            found = with_gradients(function, hidden, weight, cotangent)
            errors[name] = torch.maximum(errors[name], torch.tensor(furthest(found, wanted)))
    assert (errors["own"] < 1.5 * errors["theirs"]).all(), errors


@pytest.mark.parametrize("family", CLASSES)
def test_bf16_is_transformers_own_to_the_last_bit_or_two(family):
    module = CLASSES[family](128, 1e-5).to(torch.bfloat16)
    hidden, weight, cotangent = (x.to(torch.bfloat16) for x in drawn((4, 50, 128), 0))
    module.weight.data.copy_(weight)
    hidden.requires_grad_()
    found = []
    for each in (module, norms.with_fused_norms(copy.deepcopy(module))):
        values = each(hidden)
        found.append((values, *torch.autograd.grad(values, (hidden, each.weight), cotangent)))
    assert {x.dtype for each in found for x in each} == {torch.bfloat16}
    assert max(furthest([x.detach() for x in found[1]], [x.detach().double() for x in found[0]])) < 2**-7


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen):
    hidden, weight, cotangent = drawn((3, 8), 1)
    wanted = dict(zip(("hidden", "weight"), with_gradients(norms.rms_norm, hidden, weight, cotangent)[1:], strict=True))
    inputs = {"hidden": hidden, "weight": weight}
    for name, tensor in inputs.items():
        tensor.requires_grad_(name != frozen)
    norms.rms_norm(**inputs, eps=1e-6).backward(cotangent)
    assert inputs.pop(frozen).grad is None
    ((name, other),) = inputs.items()
    assert torch.equal(other.grad, wanted[name])


def loaded(family, tmp_path):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": None}
    model = tiny.small(family.capitalize(), pad_token_id=tiny.PAD, **heads)
    return model, policies.load_policy(tiny.save(model, tmp_path / family), torch.float32, tiny.CPU)


@pytest.mark.parametrize("family", CLASSES)
def test_loaded_policies_have_them_with_equal_log_probs_and_the_same_gradients(family, tmp_path):
    plain, own = loaded(family, tmp_path)
    kinds = [[type(module) for module in model.modules()] for model in (plain, own)]
    assert kinds[0].count(CLASSES[family]) == kinds[1].count(norms.FusedRMSNorm) >= 5
    assert tiny.same_bits(plain.state_dict(), own.state_dict())
    rows = tiny.rows(6, 3)
    found = []
    for model in (plain, own):
        scorer = LogProbPolicy(model.train(), tiny.hardware())
        values = scorer(packing.prepare(rows, tiny.PAD, scorer.attention))
        values.sum().backward()
        found.append((values.detach(), {name: p.grad for name, p in model.named_parameters()}))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        assert float((gradient - found[1][1][name]).abs().max()) <= 1e-4 * float(gradient.abs().max()), name


def test_a_loaded_policy_is_saved_and_copied_as_it_was(tmp_path):
    plain, own = loaded("llama", tmp_path)
    again = policies.load_policy(tiny.save(copy.deepcopy(own), tmp_path / "again"), torch.float32, tiny.CPU)
    assert tiny.same_bits(plain.state_dict(), again.state_dict())


def test_other_norms_stay_what_they_are():
    gemma = families.gemma.modeling_gemma.GemmaRMSNorm(8)  # it adds 1 to its weight
    model = torch.nn.Sequential(gemma, torch.nn.LayerNorm(8), torch.nn.RMSNorm(8))
    before = [type(module) for module in model.modules()]
    assert [type(module) for module in norms.with_fused_norms(model).modules()] == before
