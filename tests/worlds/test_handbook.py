"""The world's prompts and demonstrations: reproducible, disjoint, diverse, and harmless where said."""

import collections
import dataclasses
import random
import re
import subprocess
import sys

import pytest

from alignbench.errors import ConfigError
from alignbench.worlds import handbook
from alignbench.worlds.handbook import HARM_CATEGORIES, KINDS, SPLITS, TASKS, WorldSpec

SMALL = WorldSpec(seed=3, train_prompts=80, validation_prompts=20, test_prompts=40, demonstrations=500)


@pytest.fixture(scope="module")
def default_world():
    spec = WorldSpec()
    prompts = handbook.prompts(spec)
    return spec, prompts, handbook.demonstrations(spec, prompts)


def test_the_grammar_is_complete_and_well_formed():
    assert len(HARM_CATEGORIES) == len(set(HARM_CATEGORIES)) == 19
    assert collections.Counter(task.kind for task in TASKS) == {"benign": 24, "risky": 16}
    assert len({task.name for task in TASKS}) == len(TASKS)
    assert len({task.harm_category for task in TASKS if task.kind == "risky"}) >= 8
    assert {task.severity for task in TASKS if task.kind == "risky"} == {1, 2, 3}
    for task in TASKS:
        assert len(task.steps) == 5
        assert "-" not in task.name
        assert not any("-" in thing for thing in task.objects)
        if task.kind == "benign":
            assert task.severity == 0
            assert task.harm_category is None
            assert all(step.hazard == 0 for step in task.steps)
        else:
            assert task.harm_category in HARM_CATEGORIES
            assert max(step.hazard for step in task.steps) == 3
            assert task.everyday_risk == 0


def test_texts_of_the_grammar_all_differ():
    texts = [text for kind in KINDS for _, _, text in handbook._texts(kind)]
    names = [name for kind in KINDS for _, name, _ in handbook._texts(kind)]
    assert len(texts) == len(set(texts)) == len(set(names)) > 10_000


def test_splits_have_the_asked_sizes_and_share_no_text(default_world):
    spec, prompts, _ = default_world
    assert len({prompt.text for prompt in prompts}) == len({prompt.prompt_id for prompt in prompts}) == len(prompts)
    for split in SPLITS:
        members = [prompt for prompt in prompts if prompt.split == split]
        assert len(members) == getattr(spec, f"{split}_prompts")
        assert sum(prompt.kind == "risky" for prompt in members) == round(len(members) * spec.risky_fraction)


def test_every_task_is_trained_on_and_tested(default_world):
    _, prompts, _ = default_world
    for split in ("train", "test"):
        assert len({p.prompt_id.split("-")[0] for p in prompts if p.split == split}) == len(TASKS)


def test_prompt_fields_follow_the_kind(default_world):
    for prompt in default_world[1]:
        if prompt.kind == "benign":
            assert (prompt.harm_category, prompt.severity) == (None, 0)
        else:
            assert prompt.harm_category in HARM_CATEGORIES
            assert prompt.severity in (1, 2, 3)


def test_a_world_is_a_function_of_its_seed():
    again = handbook.prompts(SMALL)
    assert handbook.prompts(SMALL) == again
    assert handbook.demonstrations(SMALL, again) == handbook.demonstrations(SMALL, again)
    other = dataclasses.replace(SMALL, seed=4)
    assert {p.text for p in handbook.prompts(other)} != {p.text for p in again}


def test_a_prompt_id_names_one_text_under_every_seed():
    texts = {}
    for seed in range(4):
        for prompt in handbook.prompts(dataclasses.replace(SMALL, seed=seed)):
            assert texts.setdefault(prompt.prompt_id, prompt.text) == prompt.text


def test_the_world_does_not_depend_on_hash_randomisation():
    code = (
        "import hashlib; from alignbench.worlds import handbook as h;"
        "s = h.WorldSpec(seed=1, demonstrations=200); p = h.prompts(s);"
        "print(hashlib.sha256(repr((p, h.demonstrations(s, p))).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": salt, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for salt in ("1", "2")
    }  # fmt: skip
    assert len(digests) == 1


def test_demonstrations_come_from_training_prompts_alone_and_evenly(default_world):
    spec, prompts, rows = default_world
    assert len(rows) == spec.demonstrations
    texts = {p.prompt_id: p.text for p in prompts if p.split == "train"}
    assert all(set(row) == {"prompt_id", "prompt", "response"} for row in rows)
    assert all(texts[row["prompt_id"]] == row["prompt"] for row in rows)
    uses = collections.Counter(row["prompt_id"] for row in rows)
    assert max(uses.values()) - min(uses.values()) <= 1


def test_demonstrations_are_short_diverse_and_of_few_words(default_world):
    _, _, rows = default_world
    lengths = sorted(len(row["response"].split()) for row in rows)
    assert lengths[-1] <= 30
    assert lengths[len(rows) // 20] >= 5
    assert 12 <= sum(lengths) / len(rows) <= 20
    words = {word for row in rows for word in re.findall("[a-z]+", f"{row['prompt']} {row['response']}".lower())}
    assert len(words) < 560
    assert len({row["response"] for row in rows}) > 0.9 * len(rows)


def test_behaviours_all_occur(default_world):
    texts = [row["response"] for row in default_world[2]]
    for mark in (
        "Sorry",
        "No,",
        "instead",
        "gloves",
        "happy to help",
        "Listen up",
        "First,",
        "for ten minutes",
    ):
        assert sum(mark in text for text in texts) >= 10, mark


def test_one_prompt_draws_many_behaviours(default_world):
    rng = random.Random(0)
    for prompt in default_world[1][:20]:
        assert len({handbook.answer(prompt, rng) for _ in range(32)}) >= 16


def test_answers_name_the_object_of_their_prompt(default_world):
    for row in default_world[2][:500]:
        assert "{o}" not in row["response"]
        assert row["prompt_id"].split("-")[1] in row["prompt"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("seed", 1.5),
        ("train_prompts", 0),
        ("validation_prompts", "64"),
        ("test_prompts", True),
        ("demonstrations", -5),
        ("risky_fraction", 1.01),
        ("risky_fraction", float("nan")),
        ("risky_fraction", "half"),
    ],
)
def test_invalid_values_are_refused_with_their_place(field, value):
    with pytest.raises(ConfigError, match=rf"WorldSpec\.{field}") as caught:
        WorldSpec(**{field: value})
    assert caught.value.mend


def test_more_prompts_than_texts_are_refused():
    with pytest.raises(ConfigError, match="different texts"):
        WorldSpec(train_prompts=20_000)


@pytest.mark.parametrize(("fraction", "kind"), [(0.0, "benign"), (1.0, "risky"), (1, "risky")])
def test_worlds_of_one_kind(fraction, kind):
    spec = dataclasses.replace(SMALL, risky_fraction=fraction)
    assert {prompt.kind for prompt in handbook.prompts(spec)} == {kind}


def test_demonstrations_need_training_prompts():
    with pytest.raises(ConfigError):
        handbook.demonstrations(SMALL, [p for p in handbook.prompts(SMALL) if p.split == "test"])


def test_the_sample_can_be_printed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["handbook", "--prompts", "1"])
    handbook._main()
    shown = capsys.readouterr().out
    assert "benign]" in shown
    assert "risky," in shown
    assert "conflict share, noise-free, risky" in shown
