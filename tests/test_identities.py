"""The papers' identities on random tabular worlds, reached by minimising our own losses.

A world has K prompts with Y listed responses each, so every expectation is a sum and a policy is a K x Y
table of log-probs. The population loss of a preference stage takes all ordered pairs with Bradley-Terry
probabilities.
"""

from dataclasses import dataclass
from itertools import permutations

import pytest
import torch

from alignbench.losses import PairLoss, dpo, implicit_reward, ipo
from alignbench.problem import lambda_from_ratio, ratio_from_lambda

K, Y, BETA = 3, 5, 0.1
EXACT = 1e-6


@dataclass(frozen=True)
class World:
    reference: torch.Tensor  # log-probs, (K, Y)
    reward: torch.Tensor  # (K, Y)
    utilities: tuple[torch.Tensor, ...]  # each (K, Y)
    weight: torch.Tensor  # how often each ordered pair is drawn, (K, Y, Y), symmetric and positive


@pytest.fixture(params=range(3))
def world(request):
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(request.param)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    raw = torch.rand(K, Y, Y, generator=generator, dtype=torch.float64) + 0.2
    return World(
        reference=torch.log_softmax(normal(K, Y), dim=1),
        reward=0.3 * normal(K, Y),
        utilities=tuple(0.3 * normal(K, Y) for _ in range(3)),
        weight=raw + raw.transpose(1, 2),
    )


def gibbs(reference, score, beta):
    """Log-probs of reference * exp(score / beta), normalised per prompt: the optimum of E score - beta KL."""
    return torch.log_softmax(reference + score / beta, dim=1)


def preference(score):
    """P[k, i, j]: probability that response i is preferred to j."""
    return torch.sigmoid(score[:, :, None] - score[:, None, :])


def population_loss(policy, reference, preferred, weight, beta, loss):
    """Expected loss over all ordered pairs: P loss(i, j) + (1 - P) loss(j, i), summed over i < j."""
    ratio = torch.log_softmax(policy, dim=1) - reference
    first, second = torch.triu_indices(Y, Y, offset=1)
    a, b = ratio[:, first].flatten(), ratio[:, second].flatten()
    p, w = preferred[:, first, second].flatten(), weight[:, first, second].flatten()
    run = {PairLoss.dpo: dpo, PairLoss.ipo: ipo}[loss]
    return (w * (p * run(a, b, beta) + (1 - p) * run(b, a, beta))).sum()


def minimise(start, reference, preferred, weight, beta, loss=PairLoss.dpo):
    """Newton's method on the logits; the pseudo-inverse ignores their one free constant per prompt."""

    def objective(flat):
        return population_loss(flat.view(K, Y), reference, preferred, weight, beta, loss)

    point = start.flatten().clone()
    for _ in range(30):
        gradient = torch.autograd.functional.jacobian(objective, point)
        if gradient.abs().max() < 1e-12 * beta:
            break
        hessian = torch.autograd.functional.hessian(objective, point)
        point = point - torch.linalg.pinv(hessian, rtol=1e-10, hermitian=True) @ gradient
    else:
        raise AssertionError("Newton's method did not converge")
    return torch.log_softmax(point.view(K, Y), dim=1)


def prefer(world, start, score, beta, reference=None):
    """A preference stage: start and reference are the same policy unless the reference is given."""
    reference = start if reference is None else reference
    return minimise(start, reference, preference(score), world.weight, beta)


def distance(a, b):
    return (a.exp() - b.exp()).abs().max().item()


def merge(a, b, q):
    """A linear merge of the logits, (1 - q) a + q b."""
    return torch.log_softmax((1 - q) * a + q * b, dim=1)


def mean(policy, score):
    return (policy.exp() * score).sum(1).mean()


def test_dpo_recovers_the_gibbs_policy(world):
    trained = prefer(world, world.reference, world.reward, BETA)
    assert distance(trained, gibbs(world.reference, world.reward, BETA)) < EXACT
    assert distance(trained, world.reference) > 0.05, "the world would be too tame to tell right from wrong"


def test_the_optimum_depends_neither_on_the_pair_weights_nor_on_the_start(world):
    labels = preference(world.reward)
    even = minimise(world.reference, world.reference, labels, torch.ones_like(world.weight), BETA)
    elsewhere = minimise(torch.zeros(K, Y).double(), world.reference, labels, world.weight, BETA)
    target = gibbs(world.reference, world.reward, BETA)
    assert max(distance(even, target), distance(elsewhere, target)) < EXACT


def test_smoothing_tensor_gives_the_same_optimum_as_soft_labels(world):
    target = gibbs(world.reference, world.reward, BETA)
    policy = target.clone().requires_grad_()
    ratio = (torch.log_softmax(policy, dim=1) - world.reference)[:, :, None].expand(K, Y, Y)
    soft = 1 - preference(world.reward).flatten()
    dpo(ratio.flatten(), ratio.transpose(1, 2).flatten(), BETA, soft).sum().backward()
    assert policy.grad.abs().max() < 1e-12


def test_ipo_recovers_the_gibbs_policy_of_the_win_probability(world):
    # IPO, arXiv 2310.12036, sec. 5: the score is P(y beats a response of the sampler), here uniform
    labels = preference(world.reward)
    trained = minimise(world.reference, world.reference, labels, torch.ones_like(world.weight), BETA, PairLoss.ipo)
    assert distance(trained, gibbs(world.reference, labels.mean(2), BETA)) < EXACT


@pytest.mark.parametrize("beta_over_lambda", [0.4, 0.1, 0.04])
def test_sacpo_in_either_order_is_one_step_of_the_lagrangian(world, beta_over_lambda):
    # SACPO, arXiv 2404.11049, Theorem 1 and Remark 2
    multiplier = lambda_from_ratio(BETA, beta_over_lambda)
    safety = world.utilities[0]
    helpful = prefer(world, world.reference, world.reward, BETA)
    helpful_then_safe = prefer(world, helpful, safety, beta_over_lambda)
    safe = prefer(world, world.reference, safety, beta_over_lambda)
    safe_then_helpful = prefer(world, safe, world.reward, BETA)
    target = gibbs(world.reference, world.reward + multiplier * safety, BETA)
    assert distance(helpful_then_safe, target) < EXACT
    assert distance(safe_then_helpful, target) < EXACT


def test_relabelled_pairs_reach_the_same_policy_in_one_stage(world):
    # MoCAN, arXiv 2405.19544, Algorithm 1; a utility's prompt-dependent part cancels in the labels
    multiplier, safety = 1.7, world.utilities[0]
    shifted = safety + torch.arange(K, dtype=torch.float64)[:, None]
    one_stage = prefer(world, world.reference, world.reward + multiplier * shifted, BETA)
    assert distance(one_stage, gibbs(world.reference, world.reward + multiplier * safety, BETA)) < EXACT


def test_the_base_as_second_reference_forgets_the_reward(world):
    multiplier, safety = 2.5, world.utilities[0]
    ratio = ratio_from_lambda(BETA, multiplier)
    helpful = prefer(world, world.reference, world.reward, BETA)
    wrong = prefer(world, helpful, safety, ratio, reference=world.reference)
    target = gibbs(world.reference, world.reward + multiplier * safety, BETA)
    assert distance(wrong, target) > 0.05
    assert distance(wrong, gibbs(world.reference, multiplier * safety, BETA)) < EXACT


def test_a_wrong_multiplier_or_sign_misses_the_target(world):
    safety = world.utilities[0]
    helpful = prefer(world, world.reference, world.reward, BETA)
    target = gibbs(world.reference, world.reward + 2.0 * safety, BETA)
    assert distance(prefer(world, helpful, safety, BETA / 2.2), target) > 1e-3
    assert distance(prefer(world, helpful, -safety, BETA / 2.0), target) > 0.05
    assert distance(prefer(world, helpful, safety, BETA * 2.0), target) > 1e-2


def test_several_constraints_in_any_order(world):
    # SACPO, arXiv 2404.11049, Theorem 4
    multipliers = (0.8, 1.7, 0.4)
    target_score = world.reward + sum(lam * g for lam, g in zip(multipliers, world.utilities, strict=True))
    target = gibbs(world.reference, target_score, BETA)
    helpful = prefer(world, world.reference, world.reward, BETA)
    for order in list(permutations(range(3)))[::2]:
        policy = helpful
        for j in order:
            policy = prefer(world, policy, world.utilities[j], ratio_from_lambda(BETA, multipliers[j]))
        assert distance(policy, target) < EXACT


@pytest.mark.parametrize("q", [0.25, 0.5, 0.75])
def test_psacpo_merge_is_a_smaller_multiplier(world, q):
    # P-SACPO, arXiv 2404.11049, sec. 6: exact for a log-linear family, lambda = q lambda_bar
    safety, conservative = world.utilities[0], lambda_from_ratio(BETA, 0.02)
    helpful = prefer(world, world.reference, world.reward, BETA)
    safest = prefer(world, helpful, safety, 0.02)
    target = gibbs(world.reference, world.reward + q * conservative * safety, BETA)
    assert distance(merge(helpful, safest, q), target) < EXACT
    assert distance(merge(safest, helpful, 1 - q), target) < EXACT
    halfway = (helpful.exp() + safest.exp()) / 2
    assert distance(halfway.log(), target) > 1e-3, "a mixture of policies is not a merge of their logits"


@pytest.mark.parametrize("q", [0.25, 0.5, 0.75])
def test_naive_merge_weakens_the_reward_too(world, q):
    # with an independently trained safety policy: beta / (1 - q) and lambda = q beta / ((1 - q) beta_safety)
    safety, beta_safety = world.utilities[0], 0.05
    helpful = prefer(world, world.reference, world.reward, BETA)
    safe = prefer(world, world.reference, safety, beta_safety)
    multiplier = q * BETA / ((1 - q) * beta_safety)
    merged = merge(helpful, safe, q)
    assert distance(merged, gibbs(world.reference, world.reward + multiplier * safety, BETA / (1 - q))) < EXACT
    assert distance(merged, gibbs(world.reference, world.reward + multiplier * safety, BETA)) > 1e-3


def test_implicit_reward_is_the_reward_up_to_the_prompt(world):
    trained = prefer(world, world.reference, world.reward, BETA)
    ratio = (trained - world.reference).flatten()
    difference = implicit_reward(ratio, BETA).view(K, Y) - world.reward
    assert (difference - difference.mean(1, keepdim=True)).abs().max() < EXACT


def test_kl_of_the_utility_model_replaces_the_reference_mean(world):
    # PeCAN, arXiv 2405.19544, sec. 4.2: g - E_ref g = beta log(pi_g / ref) + beta KL(ref || pi_g), in the
    # mean
    safety, margin = world.utilities[0], 0.15
    aligned = prefer(world, world.reference, safety, BETA)
    ratio = aligned - world.reference
    offset = -BETA * mean(world.reference, ratio)
    policy = gibbs(world.reference, world.reward, BETA)
    by_model = mean(policy, implicit_reward(ratio.flatten(), BETA).view(K, Y)) + offset - margin
    exact = mean(policy, safety) - mean(world.reference, safety) - margin
    assert abs(by_model - exact) < EXACT
