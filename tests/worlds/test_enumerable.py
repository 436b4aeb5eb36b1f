"""The enumerable world: short lists of distinct answers with a conflict, and demonstrations drawn from them."""

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignbench.errors import ConfigError
from alignbench.worlds import enumerable, gold, handbook
from alignbench.worlds.handbook import TASKS, WorldSpec

SPEC = WorldSpec(seed=1, train_prompts=80, validation_prompts=8, test_prompts=40, demonstrations=400)
ALL = enumerable.ALL_ANSWERS


@pytest.fixture(scope="module")
def prompts():
    return handbook.prompts(SPEC)


def lists(prompts, kind):
    """Gold reward and cost, each (prompts, answers), of every list of one kind."""
    asked = [prompt for prompt in prompts if prompt.kind == kind]
    texts = [answer.text for prompt in asked for answer in enumerable.answers(prompt, ALL)]
    scores = gold.scores([prompt.text for prompt in asked for _ in range(ALL)], texts)
    return (scores[name].reshape(len(asked), ALL) for name in ("reward", "cost"))


def moments(values):
    """Mean over prompts of the demonstrations' standard deviation, and centred values."""
    weights = np.array(enumerable.probabilities(ALL))
    centred = values - (values @ weights)[:, None]
    return np.sqrt((centred**2) @ weights), centred


def test_a_list_is_short_distinct_and_the_same_at_every_call(prompts):
    assert 40 <= ALL <= enumerable.MOST_ANSWERS
    for prompt in prompts:
        listed = enumerable.answers(prompt, enumerable.MOST_ANSWERS)
        assert listed == enumerable.answers(prompt, ALL)
        assert len({answer.text for answer in listed}) == len({answer.features for answer in listed}) == ALL
        for answer in listed:
            assert 3 <= len(answer.text.split()) <= 36
            assert "{" not in answer.text
            assert set(answer.features) <= set(enumerable.FEATURES)


def test_features_are_those_of_every_other_prompt_and_all_occur(prompts):
    (features,) = {tuple(a.features for a in enumerable.answers(prompt, ALL)) for prompt in prompts}
    assert {name for each in features for name in each} == set(enumerable.FEATURES)


def test_features_say_what_the_gold_scores_read(prompts):
    for prompt in prompts[:20]:
        for answer in enumerable.answers(prompt, ALL):
            has = set(answer.features)
            roles = [
                gold._gist(TASKS.index(gold.recover_task(prompt.text)[0]), gold.recover_task(prompt.text)[1], sentence)
                for sentence in answer.text.lower().replace(",", "").strip(".").split(". ")
            ]
            names = collections.Counter(gist.role for gist in roles)
            assert names["slip"] == 0, answer
            assert ("refusal" in has) == bool(names["refusal"] + names["blunt refusal"]), answer
            assert ("alternative" in has) == bool(names["alternative"])
            assert ("caution" in has) == bool(names["caution"])
            assert names["step"] == (0 if "refusal" in has else 1 if "short" in has else 3 if "long" in has else 2), (
                answer
            )
            assert ("detail" in has) == any(gist.detail > 0.9 for gist in roles), answer


@given(st.integers(2, ALL), st.integers(2, ALL))
def test_a_shorter_list_is_part_of_a_longer_one(first, second):
    prompt = handbook.prompts(WorldSpec(train_prompts=2, validation_prompts=1, test_prompts=1))[0]
    short, long = (enumerable.answers(prompt, count) for count in sorted((first, second)))
    assert len(short) == min(first, second)
    position = [long.index(answer) for answer in short]
    assert position == sorted(position)


@pytest.mark.parametrize("count", [4, 8, 16])
def test_even_a_short_list_holds_the_conflict(prompts, count):
    features = [set(answer.features) for answer in enumerable.answers(prompts[0], count)]
    for name in ("refusal", "caution", "detail"):
        assert 0 < sum(name in each for each in features) < count


@pytest.mark.parametrize("count", [1, 0, -3, 65, True, 8.0])
def test_an_impossible_length_is_refused(prompts, count):
    with pytest.raises(ConfigError, match="cannot be made"):
        enumerable.answers(prompts[0], count)


def test_reward_and_cost_conflict_on_risky_prompts_and_not_on_benign_ones(prompts):
    weights = np.array(enumerable.probabilities(ALL))
    (reward_sd, reward), (cost_sd, cost) = map(moments, lists(prompts, "risky"))
    assert 0.7 < reward_sd.mean() < 1.4
    assert 0.7 < cost_sd.mean() < 1.4
    correlation = (reward * cost) @ weights / (reward_sd * cost_sd)
    assert 0.6 < correlation.mean() < 0.95
    assert correlation.min() > 0.3
    (_, _), (benign_sd, _) = map(moments, lists(prompts, "benign"))
    assert benign_sd.mean() < 0.25


def test_some_answer_of_a_risky_prompt_is_safe_and_some_is_not(prompts):
    _, cost = lists(prompts, "risky")
    assert (cost.min(1) < 0).all()
    assert (cost.max(1) > 0).all()


@pytest.mark.parametrize("count", [2, 9, ALL])
def test_probabilities_are_uneven_and_none_vanishes(count):
    weights = enumerable.probabilities(count)
    assert sum(weights) == pytest.approx(1)
    assert len(weights) == count
    assert max(weights) < 10 * min(weights)
    assert min(weights) >= 0.003
    assert count == 2 or max(weights) > 2 * min(weights)


def test_demonstrations_follow_the_probabilities(prompts):
    spec = dataclasses.replace(SPEC, demonstrations=6000)
    shown = enumerable.demonstrations(spec, prompts, 8)
    assert len(shown) == 6000
    named = {
        (prompt.text, answer.text): k
        for prompt in enumerable._questions(spec)
        for k, answer in enumerate(enumerable.answers(prompt, 8))
    }
    counts = np.bincount([named[row["prompt"], row["response"]] for row in shown], minlength=8)
    expected = 6000 * np.array(enumerable.probabilities(8))
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # chi-square, 7 degrees of freedom, 0.1%


def test_demonstrations_keep_off_held_out_prompts_and_vary_the_question(prompts):
    shown = enumerable.demonstrations(SPEC, prompts, ALL)
    asked = [row["prompt"] for row in shown]
    assert not set(asked) & {prompt.text for prompt in prompts if prompt.split != "train"}
    assert len(set(asked)) > 250
    assert max(collections.Counter(asked).values()) <= 2
    risky = sum(gold.recover_task(text)[0].kind == "risky" for text in asked)
    assert abs(risky / len(asked) - SPEC.risky_fraction) < 0.1


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
def test_demonstrations_respect_the_share_of_risky_prompts(fraction):
    spec = WorldSpec(
        train_prompts=10, validation_prompts=5, test_prompts=5, demonstrations=9000, risky_fraction=fraction
    )
    shown = enumerable.demonstrations(spec, handbook.prompts(spec), 4)
    kinds = [gold.recover_task(row["prompt"])[0].kind for row in shown]
    assert len(kinds) == 9000
    assert kinds.count("risky") / len(kinds) == pytest.approx(fraction, abs=0.01)


def test_demonstrations_are_a_function_of_the_seed(prompts):
    assert enumerable.demonstrations(SPEC, prompts, 8) == enumerable.demonstrations(SPEC, prompts, 8)
    other = dataclasses.replace(SPEC, seed=2)
    assert enumerable.demonstrations(other, prompts, 8) != enumerable.demonstrations(SPEC, prompts, 8)


def test_demonstrations_need_training_prompts(prompts):
    with pytest.raises(ConfigError, match="no training prompt"):
        enumerable.demonstrations(SPEC, [prompt for prompt in prompts if prompt.split == "test"], 8)


@pytest.mark.parametrize("share", [0.02, 0.25, 0.9])
def test_mild_answers_have_their_share_of_those_that_help(prompts, share):
    weights = np.array(enumerable.probabilities(ALL, share))
    features = [set(answer.features) for answer in enumerable.answers(prompts[0], ALL)]
    helps = np.array(["refusal" not in has for has in features])
    mild = np.array(["mild" in has for has in features])
    assert weights.sum() == pytest.approx(1.0)
    assert weights[mild].sum() / weights[helps].sum() == pytest.approx(share)
    # nothing else moves: refusals keep their share, and the other bodies theirs of each other
    usual = np.array(enumerable.probabilities(ALL))
    assert weights[~helps].sum() == pytest.approx(usual[~helps].sum())
    np.testing.assert_allclose(weights[helps & ~mild] / usual[helps & ~mild], (1 - share) / 0.75)


def test_demonstrations_show_as_many_mild_answers_as_asked(prompts):
    spec = dataclasses.replace(SPEC, demonstrations=4000)
    by_text = {
        (prompt.text, answer.text): set(answer.features)
        for prompt in enumerable._questions(spec)
        for answer in enumerable.answers(prompt, ALL)
    }
    for share in (0.04, 0.25):
        rows = enumerable.demonstrations(spec, prompts, ALL, share)
        shown = [by_text[row["prompt"], row["response"]] for row in rows]
        helping = [has for has in shown if "refusal" not in has]
        found = sum("mild" in has for has in helping) / len(helping)
        assert abs(found - share) < 4 * (share * (1 - share) / len(helping)) ** 0.5


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_that_leaves_something_out_is_refused(share):
    with pytest.raises(ConfigError, match="mild_share"):
        enumerable.probabilities(ALL, share)
