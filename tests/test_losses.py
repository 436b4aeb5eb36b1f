"""The losses against formulas written independently in float64 numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from alignbench import losses
from alignbench.errors import ConfigError

finite = st.floats(-200.0, 200.0, width=32)
betas = st.sampled_from([0.01, 0.05, 0.1, 0.5, 1.0, 3.0])
batches = st.integers(1, 9)


@st.composite
def ratio_pairs(draw):
    size = draw(batches)
    return tuple(draw(hnp.arrays(np.float64, size, elements=finite)) for _ in range(2))


def tensor(values):
    return torch.as_tensor(np.asarray(values), dtype=torch.float64)


def log1pexp(x):
    return np.logaddexp(0.0, x)


def sigmoid_numpy(x):
    return np.exp(-log1pexp(-x))


@settings(deadline=None, max_examples=60)
@given(ratio_pairs(), betas, st.floats(0.0, 1.0))
def test_dpo_is_the_written_formula(pair, beta, smoothing):
    chosen, rejected = pair
    margin = beta * (chosen - rejected)
    expected = (1 - smoothing) * log1pexp(-margin) + smoothing * log1pexp(margin)
    got = losses.dpo(tensor(chosen), tensor(rejected), beta, smoothing).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(ratio_pairs(), betas, st.booleans(), st.integers(0, 1000))
def test_ipo_is_the_written_formula_in_both_forms(pair, beta, normalise, seed):
    chosen, rejected = pair
    lengths = np.random.default_rng(seed).integers(1, 600, size=(2, len(chosen)))
    divisor = lengths if normalise else np.ones_like(lengths)
    expected = (chosen / divisor[0] - rejected / divisor[1] - 1 / (2 * beta)) ** 2
    extra = [torch.as_tensor(row) for row in lengths] if normalise else []
    got = losses.ipo(tensor(chosen), tensor(rejected), beta, *extra).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(ratio_pairs(), betas, st.floats(0.0, 50.0), st.floats(0.0, 4.0), st.floats(0.0, 4.0))
def test_kto_is_the_written_formula(pair, beta, kl, plus, minus):
    ratio, other = pair
    desirable = other > 0
    r, z = beta * ratio, beta * kl
    expected = np.where(desirable, plus * (1 - sigmoid_numpy(r - z)), minus * (1 - sigmoid_numpy(z - r)))
    got = losses.kto(tensor(ratio), torch.as_tensor(desirable), kl, beta, plus, minus).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(ratio_pairs(), betas)
def test_float32_agrees_with_float64(pair, beta):
    chosen, rejected = (torch.as_tensor(side, dtype=torch.float32) for side in pair)
    for loss in (losses.dpo, losses.ipo):
        exact = loss(chosen.double(), rejected.double(), beta)
        torch.testing.assert_close(loss(chosen, rejected, beta).double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dpo_survives_log_ratios_of_very_long_sequences(dtype):
    far = torch.tensor([1e4, -1e4, 1e4], dtype=dtype, requires_grad=True)
    near = torch.tensor([-1e4, 1e4, 1e4], dtype=dtype)
    got = losses.dpo(far, near, 0.5)
    torch.testing.assert_close(got, torch.tensor([0.0, 1e4, math.log(2)], dtype=dtype))
    (gradient,) = torch.autograd.grad(got.sum(), far)
    torch.testing.assert_close(gradient, torch.tensor([0.0, -0.5, -0.25], dtype=dtype))


def test_dpo_with_smoothing_survives_extremes():
    got = losses.dpo(torch.tensor([1e4, -1e4]), torch.tensor([0.0, 0.0]), 1.0, 0.1)
    torch.testing.assert_close(got, torch.tensor([1e3, 9e3]))


def test_kto_and_ipo_survive_extremes():
    ratio = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    desirable = torch.tensor([True, True, False, False])
    got = losses.kto(ratio, desirable, 3.0, 1.0)
    torch.testing.assert_close(got.detach(), torch.tensor([0.0, 1.0, 1.0, 0.0]))
    (gradient,) = torch.autograd.grad(got.sum(), ratio)
    assert torch.isfinite(gradient).all()
    assert torch.isfinite(losses.ipo(ratio, -ratio, 0.01)).all()


def test_well_fitted_kto_example_keeps_a_relative_precision():
    # 1 - sigmoid(40) is 0 in float32; the loss and its gradient are not
    got = losses.kto(torch.tensor([40.0]), torch.tensor([True]), 0.0, 1.0)
    assert got.item() == pytest.approx(math.exp(-40), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    chosen, rejected = torch.tensor([3.0, 100.0], dtype=dtype), torch.tensor([1.0, -50.0], dtype=dtype)
    flags = torch.tensor([True, False])
    for got, exact in [
        (losses.dpo(chosen, rejected, 0.1), losses.dpo(chosen.double(), rejected.double(), 0.1)),
        (losses.ipo(chosen, rejected, 0.1), losses.ipo(chosen.double(), rejected.double(), 0.1)),
        (losses.kto(chosen, flags, 0.5, 0.1), losses.kto(chosen.double(), flags, 0.5, 0.1)),
        (losses.nll(chosen), losses.nll(chosen.double())),
    ]:
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 5])
def test_losses_are_per_example(size):
    a, b = torch.randn(size), torch.randn(size)
    whole = torch.stack([losses.dpo(a, b, 0.3), losses.ipo(a, b, 0.3), losses.kto(a, b > 0, 0.2, 0.3)])
    parts = [
        torch.cat([losses.dpo(x, y, 0.3), losses.ipo(x, y, 0.3), losses.kto(x, y > 0, 0.2, 0.3)])
        for x, y in zip(a.split(1), b.split(1), strict=True)
    ]
    assert whole.shape == (3, size)
    torch.testing.assert_close(whole, torch.stack(parts, dim=1))


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_reference_value_is_the_loss_at_equal_policies(beta):
    zero, lengths = torch.zeros(4, dtype=torch.float64), torch.tensor([1, 7, 30, 512])
    flags = torch.tensor([True, True, False, False])
    kl = losses.kto_kl(zero.sum(), 4)
    expected = {name: losses.reference_value(name, beta) for name in losses.PairLoss}
    cases = [
        (losses.dpo(zero, zero, beta), expected["dpo"]),
        (losses.dpo(zero, zero, beta, 0.2), expected["dpo"]),
        (losses.ipo(zero, zero, beta), expected["ipo"]),
        (losses.ipo(zero, zero, beta, lengths, lengths.flip(0)), expected["ipo"]),
        (losses.kto(zero, flags, kl, beta), expected["kto"]),
        (losses.kto(zero, flags, kl, beta, 3.0, 3.0), losses.reference_value("kto", beta, weight=3.0)),
    ]
    for got, value in cases:
        torch.testing.assert_close(got, torch.full_like(got, value), rtol=1e-12, atol=0)
    assert expected["dpo"] == math.log(2)
    assert expected["kto"] == 0.5


def test_reference_value_worked_numbers():
    assert losses.reference_value("ipo", 0.1) == pytest.approx(25.0)
    assert losses.reference_value("ipo", 0.5) == pytest.approx(1.0)


@settings(deadline=None, max_examples=40)
@given(ratio_pairs(), betas)
def test_dpo_symmetries(pair, beta):
    a, b = (tensor(side) for side in pair)
    forward, swapped = losses.dpo(a, b, beta), losses.dpo(b, a, beta)
    torch.testing.assert_close(forward - swapped, -beta * (a - b), rtol=1e-9, atol=1e-9)
    assert bool((forward + swapped >= 2 * math.log(2) - 1e-12).all())
    torch.testing.assert_close(losses.dpo(a, b, beta, 1.0), swapped)
    torch.testing.assert_close(losses.dpo(a, b, beta, 0.5), (forward + swapped) / 2)
    torch.testing.assert_close(losses.dpo(a, b, beta, 0.0), forward)
    # a function of the prompt added to both log-ratios changes nothing
    torch.testing.assert_close(losses.dpo(a + 3.5, b + 3.5, beta), forward)


def test_soft_labels_are_the_expected_loss():
    a, b = torch.randn(2, 6, dtype=torch.float64)
    better = torch.rand(6, dtype=torch.float64)
    expected = better * losses.dpo(a, b, 0.7) + (1 - better) * losses.dpo(b, a, 0.7)
    torch.testing.assert_close(losses.dpo(a, b, 0.7, label_smoothing=1 - better), expected)


@settings(deadline=None, max_examples=40)
@given(ratio_pairs(), betas, st.integers(0, 1000))
def test_dpo_with_an_offset_is_the_written_formula(pair, beta, seed):
    chosen, rejected = pair
    rng = np.random.default_rng(seed)
    wrong, offset = rng.uniform(0, 1, len(chosen)), rng.normal(0, 5, len(chosen))
    z = beta * (chosen - rejected) - offset
    got = losses.dpo(tensor(chosen), tensor(rejected), beta, tensor(wrong), tensor(offset)).numpy()
    np.testing.assert_allclose(got, (1 - wrong) * log1pexp(-z) + wrong * log1pexp(z), rtol=1e-6, atol=1e-6)
    got = losses.dpo(tensor(chosen), tensor(rejected), beta, offset=tensor(offset)).numpy()
    np.testing.assert_allclose(got, log1pexp(-z), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1.5, -3.0, 800.0, -800.0])
@pytest.mark.parametrize("wrong", [0.0, 0.25, 1.0])
def test_reference_value_with_soft_labels_and_an_offset(wrong, offset):
    zero = torch.zeros(1, dtype=torch.float64)
    got = losses.dpo(zero, zero, 0.3, tensor([wrong]), tensor([offset]))
    expected = losses.reference_value("dpo", 0.3, label_smoothing=wrong, offset=offset)
    assert got.item() == pytest.approx(expected, rel=1e-12, abs=1e-300)


def test_offset_moves_the_minimiser_by_the_bonus():
    # one prompt, three answers, every pair with its Bradley-Terry probability: beta log(pi/ref) = r + bonus + const
    beta = 0.4
    reference = torch.log_softmax(torch.tensor([0.3, -0.8, 0.5], dtype=torch.float64), 0)
    score = torch.tensor([0.2, -0.5, 0.9], dtype=torch.float64)
    bonus = torch.tensor([0.7, 0.1, -0.3], dtype=torch.float64)
    first, second = torch.triu_indices(3, 3, offset=1)

    def loss(logits):
        ratio = torch.log_softmax(logits, 0) - reference
        wrong = torch.sigmoid(score[second] - score[first])
        return losses.dpo(ratio[first], ratio[second], beta, wrong, bonus[first] - bonus[second]).sum()

    point = reference.clone()
    for _ in range(30):
        gradient = torch.autograd.functional.jacobian(loss, point)
        point = point - torch.linalg.pinv(torch.autograd.functional.hessian(loss, point), rtol=1e-9) @ gradient
    assert gradient.abs().max() < 1e-10
    implied = beta * (torch.log_softmax(point, 0) - reference) - (score + bonus)
    torch.testing.assert_close(implied, implied.mean().expand(3), rtol=0, atol=1e-8)
    without = beta * (torch.log_softmax(point, 0) - reference) - score
    assert (without - without.mean()).abs().max() > 0.1


def test_ipo_is_smallest_at_its_target():
    target = 1 / (2 * 0.25)
    h = torch.linspace(-6, 6, 97, dtype=torch.float64)
    got = losses.ipo(h, torch.zeros_like(h), 0.25)
    assert h[got.argmin()].item() == pytest.approx(target)
    torch.testing.assert_close(losses.ipo(h, h * 0, 0.25), losses.ipo(h * 0, -h, 0.25))


def test_ipo_normalised_ignores_the_length_at_equal_density():
    # the same log-ratio per token gives the same loss whatever the number of tokens
    lengths = torch.tensor([10, 200])
    got = losses.ipo(0.3 * lengths, -0.1 * lengths, 0.1, lengths, lengths)
    torch.testing.assert_close(got, torch.full((2,), (0.4 - 5.0) ** 2))


def test_kto_weights_and_direction():
    ratio = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    flags = torch.tensor([True, False, True, False])
    plain, weighted = losses.kto(ratio, flags, 0.3, 0.5), losses.kto(ratio, flags, 0.3, 0.5, 2.0, 0.25)
    torch.testing.assert_close(weighted, plain * torch.tensor([2.0, 0.25, 2.0, 0.25], dtype=torch.float64))
    assert plain[0] < plain[2], "a desirable response gains from a higher log-ratio"
    assert plain[1] > plain[3], "an undesirable response loses from it"
    both = losses.kto(ratio, flags, 0.3, 0.5) + losses.kto(ratio, ~flags, 0.3, 0.5)
    torch.testing.assert_close(both, torch.ones_like(both))


def test_kto_kl_is_clamped_and_detached():
    ratios = torch.tensor([2.0, 4.0, 0.0], requires_grad=True)
    kl = losses.kto_kl(ratios.sum(), 3)
    assert kl.item() == 2.0
    assert kl.shape == ()
    assert not kl.requires_grad
    assert losses.kto_kl(torch.tensor([-8.0]), torch.tensor(4)).item() == 0.0
    assert losses.kto_kl(torch.tensor(8.0, dtype=torch.bfloat16), 3).dtype == torch.float32


def test_kto_does_not_differentiate_its_reference_point():
    kl = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    ratio = torch.randn(3, dtype=torch.float64, requires_grad=True)
    loss = losses.kto(ratio, torch.tensor([True, False, True]), kl, 0.4).sum()
    (to_kl,) = torch.autograd.grad(loss, kl, allow_unused=True)
    assert to_kl is None


def test_gradients():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(5, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    soft = torch.rand(5, dtype=torch.float64, generator=generator)
    lengths = torch.tensor([1, 3, 9, 27, 81])
    flags = torch.tensor([True, False, True, False, True])
    assert torch.autograd.gradcheck(lambda x, y: losses.dpo(x, y, 0.7), (a, b))
    assert torch.autograd.gradcheck(lambda x, y: losses.dpo(x, y, 0.7, 0.2), (a, b))
    assert torch.autograd.gradcheck(lambda x, y: losses.dpo(x, y, 0.7, soft), (a, b))
    assert torch.autograd.gradcheck(lambda x, y: losses.dpo(x, y, 0.7, soft, 3 * soft), (a, b))
    assert torch.autograd.gradcheck(lambda x, y: losses.ipo(x, y, 0.7), (a, b))
    assert torch.autograd.gradcheck(lambda x, y: losses.ipo(x, y, 0.7, lengths, lengths.flip(0)), (a, b))
    assert torch.autograd.gradcheck(lambda x: losses.kto(x, flags, 0.3, 0.7, 2.0, 0.5), (a,))
    assert torch.autograd.gradcheck(losses.nll, (a,))


def test_nll_and_implicit_reward():
    logprob = torch.tensor([-1.5, -300.0], requires_grad=True)
    torch.testing.assert_close(losses.nll(logprob), torch.tensor([1.5, 300.0]))
    reward = losses.implicit_reward(logprob, 0.1)
    torch.testing.assert_close(reward, torch.tensor([-0.15, -30.0]))
    assert not reward.requires_grad


def test_nan_reaches_the_loss():
    assert torch.isnan(losses.dpo(torch.tensor([math.nan]), torch.tensor([0.0]), 0.1)).all()
    assert torch.isnan(losses.kto(torch.tensor([math.nan]), torch.tensor([True]), 0.0, 0.1)).all()


def test_registry():
    assert {loss.value: loss.paired for loss in losses.PairLoss} == {"dpo": True, "ipo": True, "kto": False}
    assert losses.pair_loss("ipo") is losses.PairLoss.ipo
    with pytest.raises(ConfigError, match="dpo, ipo, kto"):
        losses.pair_loss("DPO")
    with pytest.raises(ConfigError, match="dpo, ipo, kto"):
        losses.reference_value("simpo", 0.1)


TWO, THREE, YES = torch.zeros(2), torch.zeros(3), torch.tensor([True, False])


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_beta_must_be_positive(beta):
    for call in (
        lambda: losses.dpo(TWO, TWO, beta),
        lambda: losses.ipo(TWO, TWO, beta),
        lambda: losses.kto(TWO, YES, 0.0, beta),
        lambda: losses.implicit_reward(TWO, beta),
        lambda: losses.reference_value("dpo", beta),
    ):
        with pytest.raises(ConfigError, match="beta is"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.dpo(TWO, THREE, 0.1), r"rejected_logratio has shape \(3,\), expected \(2,\)"),
        (lambda: losses.dpo(torch.zeros(2, 2), torch.zeros(2, 2), 0.1), "chosen_logratio has shape"),
        (lambda: losses.dpo(torch.zeros(()), torch.zeros(()), 0.1), "chosen_logratio has shape"),
        (lambda: losses.dpo(TWO, TWO, 0.1, 1.5), "label_smoothing is 1.5"),
        (lambda: losses.dpo(TWO, TWO, 0.1, torch.tensor([0.2, -0.1])), "label_smoothing has values"),
        (lambda: losses.dpo(TWO, TWO, 0.1, THREE), "label_smoothing has shape"),
        (lambda: losses.dpo(TWO, TWO, 0.1, offset=THREE), "offset has shape"),
        (lambda: losses.ipo(TWO, TWO, 0.1, torch.ones(2)), "only one of the two"),
        (
            lambda: losses.ipo(TWO, TWO, 0.1, torch.ones(2), torch.tensor([3, 0])),
            "rejected_length has values",
        ),
        (lambda: losses.ipo(TWO, TWO, 0.1, torch.ones(1), torch.ones(2)), "chosen_length has shape"),
        (lambda: losses.kto(TWO, torch.tensor([1, 0]), 0.0, 0.1), "desirable has dtype"),
        (lambda: losses.kto(THREE, YES, 0.0, 0.1), "desirable has shape"),
        (lambda: losses.kto(TWO, YES, -0.1, 0.1), "kl is -0.1"),
        (lambda: losses.kto(TWO, YES, torch.tensor(-0.1), 0.1), "kl has values"),
        (lambda: losses.kto(TWO, YES, torch.zeros(2), 0.1), "kl has shape"),
        (lambda: losses.kto(TWO, YES, 0.0, 0.1, -1.0), "desirable_weight is -1.0"),
        (lambda: losses.kto(TWO, YES, 0.0, 0.1, 1.0, math.nan), "undesirable_weight is nan"),
        (lambda: losses.kto_kl(torch.zeros(3), 3), "mismatched_logratio_sum has shape"),
        (lambda: losses.kto_kl(torch.tensor(0.0), 0), "0 mismatched completions"),
        (lambda: losses.nll(torch.zeros(2, 3)), "logprob_sum has shape"),
        (lambda: losses.reference_value("kto", 0.1, weight=-1.0), "weight is -1.0"),
        (lambda: losses.reference_value("kto", 0.1, offset=0.5), "kto has neither soft labels nor an offset"),
        (lambda: losses.reference_value("ipo", 0.1, label_smoothing=0.5), "ipo has neither"),
        (lambda: losses.reference_value("dpo", 0.1, label_smoothing=1.5), "label_smoothing is 1.5"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
