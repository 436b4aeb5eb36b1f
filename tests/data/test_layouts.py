"""Layouts of published data sets: each against files written as published, and against wrong ones."""

import csv
import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignbench.data import layouts
from alignbench.data.dialogue import turns_of, write_turns
from alignbench.data.layouts import Layout, layout_names, read_table, register_layout
from alignbench.data.published import multiple_choice
from alignbench.data.readers import Source, read_rows
from alignbench.errors import ConfigError, DataError

SHARED = Path(__file__).resolve().parents[2].parent / "shared/data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the public data files are not on this machine")


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return Source(str(path))


# --- the registry -------------------------------------------------------------------------------------------


def test_unknown_layouts_name_those_of_their_table(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}])
    with pytest.raises(ConfigError, match="unknown layout 'messages' of prompts") as caught:
        read_table(source, "prompts", layout="messages")
    assert "rows, advbench" in caught.value.mend
    assert {"hh", "truthfulqa", "chosen_rejected", "rows"} == set(layout_names("pairs"))


def test_a_layout_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "_LAYOUTS", dict(layouts._LAYOUTS))
    mine = Layout("demonstrations", "qa", {"q": "text"}, lambda row, labels: [{"prompt": row["q"], "response": "yes"}])
    register_layout(mine)
    rows, _ = read_table(jsonl(tmp_path / "a.jsonl", [{"q": "a?"}]), "demonstrations", layout="qa")
    assert rows == [{"prompt": "a?", "response": "yes"}]
    with pytest.raises(ConfigError, match="registered twice"):
        register_layout(mine)


# --- columns of other names ---------------------------------------------------------------------------------


def test_columns_of_other_names(tmp_path):
    rows = [{"question": "q?", "a": "x", "b": "y", "best": 1, "prompt": "an id"}]
    names = {"prompt": "question", "response_0": "a", "response_1": "b", "better_response_id": "best"}
    source = jsonl(tmp_path / "a.jsonl", rows)
    kept, _ = read_table(source, "pairs", columns=names, labels=["reward"])
    assert kept == [{"prompt": "q?", "response_0": "x", "response_1": "y", "better_response_id": 1}]
    with pytest.raises(ConfigError, match="no row has the column 'wrong' that is to be 'prompt'") as caught:
        read_table(source, "pairs", columns={"prompt": "wrong"}, labels=["reward"])
    assert "columns" in caught.value.mend


def test_two_columns_can_change_places(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": "b", "response": "a"}])
    kept, _ = read_table(source, "demonstrations", columns={"prompt": "response", "response": "prompt"})
    assert kept == [{"prompt": "a", "response": "b"}]


# --- HH-RLHF ------------------------------------------------------------------------------------------------


def dialogue(*turns):
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(turns))


def test_hh_cuts_at_the_last_assistant_turn(tmp_path):
    rows = [
        {"chosen": dialogue("hi", "hello", "more?", "good"), "rejected": dialogue("hi", "hello", "more?", "bad")},
        {"chosen": dialogue("one?", " a\n\nb "), "rejected": dialogue("one?", "c")},
    ]
    kept, report = read_table(jsonl(tmp_path / "hh.jsonl", rows), "pairs", layout="hh", labels=["safety"])
    assert [row["prompt"] for row in kept] == ["\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more?", "one?"]
    chosen = [row[f"response_{row['safer_response_id']}"] for row in kept]
    rejected = [row[f"response_{1 - row['safer_response_id']}"] for row in kept]
    assert (chosen, rejected) == (["good", "a\n\nb"], ["bad", "c"])
    assert all("better_response_id" not in row for row in kept)
    assert (report["n_rows"], report["source"]["n_kept"]) == (2, 2)


HH_FAULTS = {
    "different dialogues": {"chosen": dialogue("a", "b", "c", "d"), "rejected": dialogue("a", "x", "c", "d")},
    "no assistant turn": {"chosen": "\n\nHuman: a", "rejected": dialogue("a", "b")},
    "no human turn": {"chosen": "\n\nAssistant: b", "rejected": "\n\nAssistant: c"},
    "missing field": {"chosen": dialogue("a", "b")},
    "wrong type": {"chosen": [dialogue("a", "b")], "rejected": "c"},
    "empty response": {"chosen": dialogue("a", " "), "rejected": dialogue("a", "b")},
    "equal responses": {"chosen": dialogue("a", "b"), "rejected": dialogue("a", "b")},
}


@pytest.mark.parametrize("rule", HH_FAULTS)
def test_hh_faults_are_named_with_the_row_of_the_file(tmp_path, rule):
    good = {"chosen": dialogue("a", "b"), "rejected": dialogue("a", "c")}
    source = jsonl(tmp_path / "hh.jsonl", [HH_FAULTS["different dialogues"], good, good, HH_FAULTS[rule], good])
    with pytest.raises(DataError, match="different dialogues: "):
        read_table(source, "pairs", layout="hh", labels=["safety"])
    kept, report = read_table(source, "pairs", layout="hh", labels=["safety"], mode="lenient")
    assert len(kept) == 3
    found = report["source"] if rule in report["source"]["dropped"] else report
    assert found["dropped"][rule] == (2 if rule == "different dialogues" else 1)
    assert found["examples"][rule][-1].startswith("row 4: ")


@pytest.mark.parametrize("labels", [[], ["reward", "safety"]])
def test_one_choice_speaks_for_one_objective(tmp_path, labels):
    source = jsonl(tmp_path / "hh.jsonl", [{"chosen": dialogue("a", "b"), "rejected": dialogue("a", "c")}])
    with pytest.raises(ConfigError, match="better in one respect") as caught:
        read_table(source, "pairs", layout="hh", labels=labels)
    assert "labels=[safety]" in caught.value.mend


def test_the_chosen_side_is_a_fair_coin_that_the_texts_decide(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(400)]
    kept, _ = read_table(jsonl(tmp_path / "a.jsonl", rows), "pairs", layout="chosen_rejected", labels=["reward"])
    again, _ = read_table(jsonl(tmp_path / "b.jsonl", rows[::-1]), "pairs", layout="chosen_rejected", labels=["reward"])
    assert kept == again[::-1]
    sides = [row["better_response_id"] for row in kept]
    assert 150 < sum(sides) < 250  # 6 standard deviations on either side would be 140 to 260
    assert all(row[f"response_{side}"] == "good" for row, side in zip(kept, sides, strict=True))


TURN = (
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
    .map(str.strip)
    .filter(lambda text: text and "Human:" not in text and "Assistant:" not in text)
)


@given(st.lists(TURN, min_size=1, max_size=7).filter(lambda turns: len(turns) % 2 == 1))
def test_turns_survive_being_one_string(texts):
    turns = [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    written = write_turns(turns)
    if len(turns) == 1:
        assert written == texts[0]
        return
    assert turns_of(written) == turns


def test_neighbouring_turns_of_one_role_are_one():
    assert turns_of("\n\nHuman: a\n\nHuman: b") == [("user", "a\n\nb")]
    assert turns_of("\n\nHuman: a\n\nAssistant: b") is None  # ends in an answer
    assert turns_of("Human: a") is None


@real
def test_the_harmless_test_split_as_published():
    source = Source(str(SHARED / "hh_rlhf/harmless-base-test.jsonl.gz"))
    with pytest.raises(DataError, match="5 of 2312 pairs in the layout 'hh' break the schema"):
        read_table(source, "pairs", layout="hh", labels=["safety"])
    kept, report = read_table(source, "pairs", layout="hh", labels=["safety"], mode="lenient")
    assert report["source"]["dropped"] == {"different dialogues": 5}
    assert report["dropped"] == {"empty response": 4}
    assert len(kept) == 2312 - 5 - 4
    # an independent way to the same texts
    raw = [json.loads(line) for line in gzip.decompress(Path(source.path).read_bytes()).splitlines()]
    expected = {row["chosen"].rsplit("\n\nAssistant:", 1)[1].strip() for row in raw}
    assert {row[f"response_{row['safer_response_id']}"] for row in kept} <= expected
    assert all(row["prompt"].count("\n\nHuman:") != 1 for row in kept)  # one turn is written without its mark
    dialogues = [row["prompt"] for row in kept if row["prompt"].startswith("\n\nHuman:")]
    assert all(turns_of(text)[-1][0] == "user" for text in dialogues)
    assert len(dialogues) > 1000
    # the same dialogues as prompts, those with an empty answer among them
    prompts, _ = read_table(source, "prompts", layout="hh", mode="lenient")
    assert len(prompts) == 2312 - 5
    assert {row["prompt"] for row in kept} <= {row["prompt"] for row in prompts}


# --- TruthfulQA ---------------------------------------------------------------------------------------------

QUESTION = {
    "Type": "Adversarial",
    "Category": "Myths",
    "Question": "What if?",
    "Best Answer": "Nothing happens",
    "Correct Answers": "Nothing happens; Little; ",
    "Incorrect Answers": "You die; Little; You fly",
    "Source": "x",
}
HUB = {
    "type": "Adversarial",
    "category": "Myths",
    "question": "What if?",
    "best_answer": "Nothing happens",
    "correct_answers": ["Nothing happens", "Little"],
    "incorrect_answers": ["You die", "Little", "You fly"],
    "source": "x",
}


def written_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return Source(str(path))


def test_truthfulqa_from_the_csv_and_from_the_hub_is_one_table(tmp_path):
    revised = QUESTION | {"Best Incorrect Answer": "You die"}  # the release of 2025 has a further column
    sources = [
        written_csv(tmp_path / "old.csv", [QUESTION]),
        written_csv(tmp_path / "new.csv", [revised]),
        jsonl(tmp_path / "hub.jsonl", [HUB]),
    ]
    tables = [read_table(s, "pairs", layout="truthfulqa", labels=["truthful"])[0] for s in sources]
    assert tables[0] == tables[1] == tables[2]
    found = {
        (r[f"response_{r['truthful_response_id']}"], r[f"response_{1 - r['truthful_response_id']}"]) for r in tables[0]
    }
    # an answer on both lists counts as correct
    assert found == {(good, bad) for good in ("Nothing happens", "Little") for bad in ("You die", "You fly")}
    prompts = [read_table(s, "prompts", layout="truthfulqa")[0] for s in sources]
    assert prompts[0] == prompts[1] == prompts[2] == [{"prompt": "What if?", "category": "Myths"}]


def test_truthfulqa_refuses_other_columns(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [HUB, {"question": "What?"}])
    with pytest.raises(DataError, match="row 2: has neither the CSV's columns nor the hub's"):
        read_table(source, "pairs", layout="truthfulqa", labels=["truthful"])


def test_multiple_choice_targets(tmp_path):
    (mine,) = multiple_choice([QUESTION])
    assert mine == multiple_choice([HUB])[0]
    assert mine["mc1_targets"] == {"choices": ["Nothing happens", "You die", "You fly"], "labels": [1, 0, 0]}
    assert mine["mc2_targets"]["labels"] == [1, 1, 0, 0]
    # the hub's own configuration passes through
    assert multiple_choice([mine | {"more": 1}]) == [mine]


def judged(question, answer, truthful, informative):
    return [
        {"prompt": f"Q: {question}\nA: {answer}\n{asked}", "completion": f" {verdict}"}
        for asked, verdict in (("True:", truthful), ("Helpful:", informative))
    ]


def test_both_judgements_of_an_answer_are_one_row(tmp_path):
    truth, info = zip(
        judged("q1", "a\nb", "yes", "no"), judged("q1", "c", "no", "yes"), judged("q1", "c", "no", "yes"), strict=True
    )
    (tmp_path / "finetune_truth.jsonl").write_text("".join(json.dumps(r) + "\n" for r in truth))
    (tmp_path / "finetune_info.jsonl").write_text("".join(json.dumps(r) + "\n" for r in info))
    (tmp_path / "other.jsonl").write_text("{}")
    source = Source(str(tmp_path / "finetune_*.jsonl"))
    rows, report = read_table(source, "responses", layout="truthfulqa_judge", labels=["reward", "truthful"])
    assert [(r["prompt"], r["response"], r["scores"]) for r in rows] == [
        ("q1", "a\nb", {"reward": 0.0, "truthful": 1.0}),
        ("q1", "c", {"reward": 1.0, "truthful": 0.0}),
    ]
    assert report["statistics"]["mean_truthful"] == 0.5


def test_judgement_faults(tmp_path):
    rows = [
        *judged("q1", "good", "yes", "no"),
        *judged("q1", "both ways", "yes", "no"),
        *judged("q1", "both ways", "no", "no"),
        judged("q1", "half", "yes", "no")[0],
        {"prompt": "Q: q2\nA: a\nFunny:", "completion": " yes"},
        {"prompt": "Q: q2\nA: a\nTrue:", "completion": " maybe"},
    ]
    source = jsonl(tmp_path / "a.jsonl", rows)
    options = {"layout": "truthfulqa_judge", "labels": ["reward", "truthful"]}
    with pytest.raises(DataError, match="one label only: 1 row") as caught:
        read_table(source, "responses", **options)
    assert "'both ways' is judged truthful and not truthful;" in str(caught.value)
    kept, report = read_table(source, "responses", mode="lenient", **options)
    assert [row["response"] for row in kept] == ["good"]
    assert report["source"]["dropped"] == {"inconsistent labels": 4, "one label only": 1, "no judgement": 2}


@real
def test_the_answers_with_two_labels_as_published():
    source = Source(str(SHARED / "truthfulqa/finetune_*.jsonl"))
    rows, report = read_table(
        source, "responses", layout="truthfulqa_judge", labels=["reward", "truthful"], mode="lenient"
    )
    # 18,311 distinct answers; 67 of them are labelled both ways, 42 of the others are empty
    assert report["n_rows"] == 18_311 - 67
    assert report["dropped"] == {"empty response": 42}
    assert len(rows) == 18_311 - 67 - 42
    assert len({row["prompt"] for row in rows}) == 817
    # an independent count
    seen = {}
    for name, label in (("finetune_truth", "truthful"), ("finetune_info", "reward")):
        for line in (SHARED / f"truthfulqa/{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            text = row["prompt"].rsplit("\n", 1)[0]
            seen.setdefault(text, {}).setdefault(label, set()).add(row["completion"].strip())
    # the 67 are those of the truthful label and those of the informative one together
    both = {label: {text for text, v in seen.items() if len(v[label]) > 1} for label in ("truthful", "reward")}
    assert len(seen) == 18_311
    assert [len(both["truthful"]), len(both["reward"]), len(both["truthful"] & both["reward"])] == [27, 49, 9]
    assert len(both["truthful"] | both["reward"]) == 67
    clean = [v for text, v in seen.items() if all(len(x) == 1 for x in v.values()) and text.split("\nA: ", 1)[1]]
    expected = Counter((min(v["truthful"]) == "yes", min(v["reward"]) == "yes") for v in clean)
    found = Counter((row["scores"]["truthful"] == 1, row["scores"]["reward"] == 1) for row in rows)
    assert found == expected


@real
def test_the_questions_as_published():
    source = Source(str(SHARED / "truthfulqa/TruthfulQA.csv"))
    pairs, report = read_table(source, "pairs", layout="truthfulqa", labels=["truthful"])
    assert (report["source"]["n_rows"], len(pairs)) == (817, 12_343)
    questions = multiple_choice(read_rows(source))
    assert len(questions) == 817
    assert all(sum(q["mc1_targets"]["labels"]) == 1 for q in questions)
    assert all(0 < sum(q["mc2_targets"]["labels"]) < len(q["mc2_targets"]["labels"]) for q in questions)


# --- prompt sets --------------------------------------------------------------------------------------------

PROMPT_SETS = {
    "hh": (
        {"chosen": dialogue("hi", "hello", "more?", "good"), "rejected": dialogue("hi", "hello", "more?", "bad")},
        {"prompt": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more?"},
    ),
    "advbench": ({"goal": "g", "target": "Sure"}, {"prompt": "g"}),
    "alpaca_eval": (
        {"instruction": "i", "output": "o", "generator": "m", "dataset": "helpful_base"},
        {"prompt": "i", "category": "helpful_base"},
    ),
    "xstest": (
        {"id": "7", "prompt": "p", "type": "homonyms", "label": "safe", "focus": "kill", "note": ""},
        {"prompt": "p", "kind": "safe", "category": "homonyms", "prompt_id": "7"},
    ),
    "rows": (  # BeaverTails-Evaluation, and the 83 and 129 prompts
        {"prompt": "p", "category": "privacy_violation", "category_id": 11},
        {"prompt": "p", "category": "privacy_violation", "category_id": 11},
    ),
}


@pytest.mark.parametrize("layout", PROMPT_SETS)
def test_prompt_sets(tmp_path, layout):
    row, expected = PROMPT_SETS[layout]
    assert read_table(jsonl(tmp_path / "a.jsonl", [row]), "prompts", layout=layout)[0] == [expected]
    assert read_table(written_csv(tmp_path / "a.csv", [{k: str(v) for k, v in row.items()}]), "prompts", layout=layout)
    with pytest.raises(DataError, match="missing field"):
        read_table(jsonl(tmp_path / "b.jsonl", [{"text": "p"}]), "prompts", layout=layout)


@real
@pytest.mark.parametrize(
    ("name", "layout", "count", "kinds"),
    [
        ("safety_problem.json", "rows", 83, 8),
        ("helpful_problem.json", "rows", 129, 1),
        ("xstest_prompts.csv", "xstest", 450, 18),
    ],
)
def test_prompt_sets_as_published(name, layout, count, kinds):
    rows, _ = read_table(Source(str(SHARED / "prompts" / name)), "prompts", layout=layout)
    assert (len(rows), len({row["category"] for row in rows})) == (count, kinds)
    if layout == "xstest":
        assert Counter(row["kind"] for row in rows) == {"safe": 250, "unsafe": 200}


# --- demonstrations -----------------------------------------------------------------------------------------


def test_instruction_data(tmp_path):
    rows = [{"instruction": "Sum.", "input": "1 2", "output": "3"}, {"instruction": "Hi", "input": "", "output": "Ho"}]
    kept, _ = read_table(jsonl(tmp_path / "a.jsonl", rows), "demonstrations", layout="alpaca")
    assert kept == [{"prompt": "Sum.\n\n1 2", "response": "3"}, {"prompt": "Hi", "response": "Ho"}]
    rows = [{"prompt": "a", "completion": "b"}]
    kept, _ = read_table(jsonl(tmp_path / "b.jsonl", rows), "demonstrations", layout="prompt_completion")
    assert kept == [{"prompt": "a", "response": "b"}]


def chat(*turns):
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def test_chat_messages(tmp_path):
    rows = [
        chat(("user", "a"), ("assistant", "b")),
        chat(("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
    ]
    kept, _ = read_table(jsonl(tmp_path / "a.jsonl", rows), "demonstrations", layout="messages")
    assert kept == [
        {"prompt": "a", "response": "b"},
        {"prompt": "\n\nHuman: Be kind.\n\na\n\nAssistant: b\n\nHuman: c", "response": "d"},
    ]
    wrong = [
        chat(("user", "a")),
        chat(("assistant", "a"), ("user", "b")),
        chat(("user", "a"), ("assistant", "b"), ("user", "c\n\nHuman: d"), ("assistant", "e")),
        {"messages": [{"role": "robot", "content": "a"}]},
        {"messages": "hi"},
    ]
    _, report = read_table(
        jsonl(tmp_path / "b.jsonl", rows + wrong), "demonstrations", layout="messages", mode="lenient"
    )
    assert report["source"]["dropped"] == {"no conversation": 3, "wrong type": 2}


def test_hh_chosen_answers_as_demonstrations(tmp_path):
    rows = [{"chosen": dialogue("a", "b"), "rejected": dialogue("a", "c")}]
    kept, _ = read_table(jsonl(tmp_path / "a.jsonl", rows), "demonstrations", layout="hh")
    assert kept == [{"prompt": "a", "response": "b"}]


# --- scored responses ---------------------------------------------------------------------------------------


def scored(prompt, response, **scores):
    return {"prompt": prompt, "response": response, **scores}


def test_scored_responses_of_ones_own(tmp_path):
    rows = [
        scored("p", "a", reward=1, safety=-0.5, id="x"),
        scored("p", "b", reward=0, safety=True),
        scored("p", "a ", reward=1.0, safety=-0.5),
    ]
    kept, report = read_table(jsonl(tmp_path / "a.jsonl", rows), "responses", labels=["reward", "safety"])
    assert kept == [
        {"prompt": "p", "response": "a", "id": "x", "scores": {"reward": 1.0, "safety": -0.5}},
        {"prompt": "p", "response": "b", "scores": {"reward": 0.0, "safety": 1.0}},
    ]
    assert report["statistics"] == {
        "distinct_prompts": 1,
        "repeated_responses": 1,
        "responses": 2,
        "mean_reward": 0.5,
        "mean_safety": 0.25,
    }


def test_scored_responses_that_are_wrong(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [
        scored("p", "ok", reward=1, safety=0),
        scored("p", "a", reward=1, safety=0),
        scored("p", "a", reward=2, safety=0),
        scored("p", "b", reward="high", safety=0),
        scored("p", "c", reward=1),
        scored("p", " ", reward=1, safety=0),
        scored("p", "d", reward=float("nan"), safety=0),
    ]
    jsonl(path, rows)
    with pytest.raises(DataError, match="6 of 7 scored responses break the schema"):
        read_table(Source(str(path)), "responses", labels=["reward", "safety"])
    kept, report = read_table(Source(str(path)), "responses", labels=["reward", "safety"], mode="lenient")
    assert [row["response"] for row in kept] == ["ok"]
    assert report["dropped"] == {"missing field": 1, "wrong type": 2, "empty response": 1, "contradictory scores": 2}
