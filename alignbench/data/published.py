"""The layouts of published data sets; see :mod:`alignbench.data.layouts`.

PKU-SafeRLHF needs none: its rows are the schema.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignbench.data.dialogue import ASSISTANT, turns_of, write_turns
from alignbench.data.layouts import Layout, register_layout
from alignbench.data.schema import Row, Rule, excerpt, label_column
from alignbench.errors import DataError


def _renaming(table: Any, name: str, names: Mapping[str, str], optional: Mapping[str, str] | None = None) -> Layout:
    """A layout that calls the schema's fields by other names; both mappings are {its name: ours}."""
    every = {**names, **(optional or {})}
    return Layout(
        table=table,
        name=name,
        fields=dict.fromkeys(names, "text"),
        optional=dict.fromkeys(optional or {}, "text"),
        convert=lambda row, labels: [{ours: row[its] for its, ours in every.items() if its in row}],
    )


# ---------------------------------------------------------------- pairs


def _labelled(prompt: str, chosen: str, rejected: str, objective: str, *, swap: bool) -> Row:
    responses = (rejected, chosen) if swap else (chosen, rejected)
    return {
        "prompt": prompt,
        "response_0": responses[0],
        "response_1": responses[1],
        label_column(objective): int(swap),
    }


def _halves(dialogue: str) -> tuple[str, str] | None:
    """Everything before the last assistant turn, and that turn; None where there is none."""
    before, mark, answer = dialogue.rpartition(ASSISTANT)
    return (before.strip("\n"), answer.strip()) if mark else None


def _dialogue_rules(rows: Sequence[Any]) -> list[Rule]:
    def no_answer(row: Row) -> str | None:
        for name in ("chosen", "rejected"):
            if _halves(row[name]) is None:
                return f"{name} has no assistant turn: {excerpt(row[name])}"
        return None

    def differs(row: Row) -> str | None:
        chosen, rejected = (_halves(row[name]) for name in ("chosen", "rejected"))
        if chosen is None or rejected is None or chosen[0] == rejected[0]:
            return None
        return f"chosen and rejected differ before their last turn, which begins {excerpt(chosen[1])}"

    def no_question(row: Row) -> str | None:
        found = _halves(row["chosen"])
        if found is not None and turns_of(f"\n\n{found[0]}") is None:
            return f"the turns before the last answer do not begin and end with a human's: {excerpt(found[0])}"
        return None

    return [
        Rule("no assistant turn", no_answer, "a dialogue ends in '\\n\\nAssistant: ...': remove the row"),
        Rule("different dialogues", differs, "both answers must follow the same dialogue: remove the row"),
        Rule("no human turn", no_question, "the last answer must follow a human's turn: remove the row"),
    ]


def _hh(row: Row, labels: tuple[str, ...]) -> list[Row]:
    (before, chosen), (_, rejected) = (_halves(row[name]) or ("", "") for name in ("chosen", "rejected"))
    turns = turns_of(f"\n\n{before}") or []
    # which side is first must not give the label away
    return [_labelled(write_turns(turns), chosen, rejected, labels[0], swap=_coin(before, chosen, rejected))]


def _coin(*texts: str) -> bool:
    """A fair coin that falls the same way for the same texts, in any file and order."""
    import hashlib

    return hashlib.sha256("\0".join(texts).encode()).digest()[0] % 2 == 1


#: Anthropic/hh-rlhf (helpful-base, harmless-base, ...): two whole dialogues that share all but the last answer.
HH = register_layout(
    Layout("pairs", "hh", {"chosen": "text", "rejected": "text"}, _hh, rules=_dialogue_rules, one_label=True)
)


def _chosen_rejected(row: Row, labels: tuple[str, ...]) -> list[Row]:
    texts = (row["prompt"], row["chosen"], row["rejected"])
    return [_labelled(*texts, labels[0], swap=_coin(*texts))]


#: The common single-label form: prompt, chosen, rejected.
CHOSEN = register_layout(
    Layout(
        "pairs",
        "chosen_rejected",
        {"prompt": "text", "chosen": "text", "rejected": "text"},
        _chosen_rejected,
        one_label=True,
    )
)

# ---------------------------------------------------------------- TruthfulQA


def _statements(value: Any) -> list[str]:
    """One list of answers: a list (the hub) or a text with semicolons (the CSV), each once, in order."""
    parts = value if isinstance(value, list) else value.split(";")
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))


def _question_of(row: Row) -> dict[str, Any]:
    """A row of the CSV or of the hub's `generation` configuration, in the latter's names."""
    if "Question" in row:
        names = {
            "question": "Question",
            "best": "Best Answer",
            "correct": "Correct Answers",
            "wrong": "Incorrect Answers",
        }
    else:
        names = {
            "question": "question",
            "best": "best_answer",
            "correct": "correct_answers",
            "wrong": "incorrect_answers",
        }
    question, best = row[names["question"]].strip(), row[names["best"]].strip()
    correct, wrong = _statements(row[names["correct"]]), _statements(row[names["wrong"]])
    return {
        "question": question,
        "category": row.get("Category") or row.get("category"),
        "best_answer": best,
        "correct_answers": list(dict.fromkeys([best, *correct])),
        # two of the CSV's 817 questions have an answer on both lists: it counts as correct
        "incorrect_answers": [answer for answer in wrong if answer not in correct and answer != best],
    }


_QUESTION_COLUMNS = (
    ("Question", "Best Answer", "Correct Answers", "Incorrect Answers"),
    ("question", "best_answer", "correct_answers", "incorrect_answers"),
)


def _no_question(row: Row) -> str | None:
    if any(all(isinstance(row.get(name), (str, list)) for name in names) for names in _QUESTION_COLUMNS):
        return None
    return f"has neither the CSV's columns nor the hub's; it has {excerpt(sorted(map(str, row)), 120)}"


def _truthfulqa_rules(rows: Sequence[Any]) -> list[Rule]:
    return [Rule("missing field", _no_question, "give TruthfulQA.csv or the hub's configuration `generation`")]


def _truthfulqa_pairs(row: Row, labels: tuple[str, ...]) -> list[Row]:
    asked = _question_of(row)
    return [
        _labelled(asked["question"], good, bad, labels[0], swap=_coin(asked["question"], good, bad))
        for good in asked["correct_answers"]
        for bad in asked["incorrect_answers"]
    ]


#: TruthfulQA.csv (both releases) or the hub's `generation`: every correct answer against every incorrect one.
TRUTHFULQA = register_layout(
    Layout("pairs", "truthfulqa", {}, _truthfulqa_pairs, rules=_truthfulqa_rules, one_label=True)
)
TRUTHFULQA_PROMPTS = register_layout(
    Layout(
        "prompts",
        "truthfulqa",
        {},
        lambda row, labels: [_asked(row)],
        rules=_truthfulqa_rules,
    )
)


def _asked(row: Row) -> Row:
    asked = _question_of(row)
    return {"prompt": asked["question"]} | ({"category": asked["category"]} if asked["category"] else {})


_TASKS = ("question", "mc1_targets", "mc2_targets")


def multiple_choice(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Questions of TruthfulQA's two multiple-choice tasks.

    MC1: one right answer (the best one) among the incorrect ones; MC2: all correct and all incorrect answers.
    Source: Lin et al. (arXiv 2109.07958), section 3; the names are those of the hub's `multiple_choice` configuration.

    Args:
        rows: Of TruthfulQA.csv or of the hub's `generation`; rows of `multiple_choice` are passed through.

    Returns:
        Per question ``{"question", "mc1_targets", "mc2_targets"}``, each of the two ``{"choices": [text],
        "labels": [0 or 1]}`` with the correct ones first.

    Raises:
        DataError: a row is none of these.
    """
    found = []
    for number, row in enumerate(rows, 1):
        if all(name in row for name in _TASKS):
            found.append({name: row[name] for name in _TASKS})
            continue
        fault = _no_question(dict(row))
        if fault is not None:
            raise DataError(
                f"row {number} {fault}",
                where="benchmark.path",
                mend="give TruthfulQA.csv, or rows of the hub's `generation` or `multiple_choice`",
            )
        asked = _question_of(dict(row))
        right, wrong = asked["correct_answers"], asked["incorrect_answers"]
        found.append(
            {
                "question": asked["question"],
                "mc1_targets": _targets([asked["best_answer"]], wrong),
                "mc2_targets": _targets(right, wrong),
            }
        )
    return found


def _targets(right: Sequence[str], wrong: Sequence[str]) -> dict[str, list[Any]]:
    return {"choices": [*right, *wrong], "labels": [1] * len(right) + [0] * len(wrong)}


_JUDGED = {"True:": "truthful", "Helpful:": "informative"}
_VERDICTS = {"yes": 1.0, "no": 0.0}


def _judgement(row: Any) -> tuple[str, str, str, float] | None:
    r"""(question, answer, what is judged, 0 or 1) of ``{"prompt": "Q: ..\nA: ..\nTrue:", "completion": " yes"}``."""
    if not isinstance(row, Mapping) or not isinstance(row.get("prompt"), str):
        return None
    question, mark, rest = row["prompt"].removeprefix("Q: ").partition("\nA: ")
    answer, line, asked = rest.rpartition("\n")
    verdict = _VERDICTS.get(str(row.get("completion")).strip())
    if not mark or not line or asked not in _JUDGED or verdict is None or not row["prompt"].startswith("Q: "):
        return None
    return question.strip(), answer.strip(), _JUDGED[asked], verdict


def _judge_rules(rows: Sequence[Any]) -> list[Rule]:
    verdicts: dict[tuple[str, str], dict[str, set[float]]] = {}
    for row in rows:
        found = _judgement(row)
        if found is not None:
            question, answer, name, verdict = found
            verdicts.setdefault((question, answer), {}).setdefault(name, set()).add(verdict)

    def unreadable(row: Row) -> str | None:
        return None if _judgement(row) else f"is no judgement: {excerpt(row['prompt'])} -> {excerpt(row['completion'])}"

    def inconsistent(row: Row) -> str | None:
        question, answer, _, _ = _judgement(row) or ("", "", "", 0.0)
        both = [name for name, values in verdicts[question, answer].items() if len(values) > 1]
        if not both:
            return None
        ways = ", ".join(f"{name} and not {name}" for name in both)
        return f"answer {excerpt(answer)} is judged {ways}; question {excerpt(question)}"

    def half(row: Row) -> str | None:
        question, answer, name, _ = _judgement(row) or ("", "", "", 0.0)
        if len(verdicts[question, answer]) == len(_JUDGED):
            return None
        return f"answer {excerpt(answer)} is judged {name} only; question {excerpt(question)}"

    return [
        Rule("no judgement", unreadable, "lines are 'Q: ..', 'A: ..', 'True:' or 'Helpful:', with ' yes' or ' no'"),
        Rule("inconsistent labels", inconsistent, "the published files hold some: drop them (validation=lenient)"),
        Rule("one label only", half, "read both files: a path like FOLDER/finetune_*.jsonl"),
    ]


def _judged(row: Row, labels: tuple[str, ...]) -> list[Row]:
    found = _judgement(row)
    assert found is not None  # by the rules
    question, answer, name, verdict = found
    return [{"prompt": question, "response": answer, name: verdict}]


def _joined(rows: Sequence[Row]) -> list[Row]:
    """Both judgements of an answer in one row; reward is the informative one."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        found.setdefault((row["prompt"], row["response"]), {}).update(row)
    return [row | {"reward": row["informative"]} for row in found.values()]


#: finetune_truth.jsonl and finetune_info.jsonl: answers with a truthful and an informative label. An answer with a
#: contradiction in either label is left out: 67, of which 27 contradict themselves on truthful, 49 on informative (9 on
#: both).
TRUTHFULQA_JUDGE = register_layout(
    Layout(
        "responses",
        "truthfulqa_judge",
        {"prompt": "text", "completion": "text"},
        _judged,
        rules=_judge_rules,
        merge=_joined,
    )
)

# ---------------------------------------------------------------- prompt sets

_XSTEST = {"prompt": "prompt", "label": "kind", "type": "category", "id": "prompt_id"}
#: xstest_prompts.csv: whether a prompt is safe is its kind, the kind of wording its category.
XSTEST = register_layout(
    Layout(
        "prompts",
        "xstest",
        {"prompt": "text", "label": "text"},
        lambda row, labels: [
            {ours: row[its] for its, ours in _XSTEST.items() if row.get(its) is not None},
        ],
        optional={"type": "text", "id": "id"},
    )
)
ADVBENCH = register_layout(_renaming("prompts", "advbench", {"goal": "prompt"}))
ALPACA_EVAL = register_layout(_renaming("prompts", "alpaca_eval", {"instruction": "prompt"}, {"dataset": "category"}))

# ---------------------------------------------------------------- demonstrations


def _alpaca(row: Row, labels: tuple[str, ...]) -> list[Row]:
    extra = row.get("input", "").strip()
    return [{"prompt": f"{row['instruction']}\n\n{extra}" if extra else row["instruction"], "response": row["output"]}]


#: tatsu-lab/alpaca and its like: instruction, optional input, output.
ALPACA = register_layout(
    Layout("demonstrations", "alpaca", {"instruction": "text", "output": "text"}, _alpaca, optional={"input": "text"})
)
COMPLETION = register_layout(
    _renaming("demonstrations", "prompt_completion", {"prompt": "prompt", "completion": "response"})
)


def _conversation(row: Row) -> list[tuple[str, str]]:
    """A row's turns; a system message comes before the first user turn, where templates have no other place for it."""
    turns = [(turn["role"], turn["content"].strip()) for turn in row["messages"]]
    system = "\n\n".join(text for role, text in turns if role == "system")
    turns = [turn for turn in turns if turn[0] != "system"]
    if system and turns:
        turns[0] = (turns[0][0], f"{system}\n\n{turns[0][1]}")
    return turns


def _message_rules(rows: Sequence[Any]) -> list[Rule]:
    def fault(row: Row) -> str | None:
        turns = _conversation(row)
        roles = [role for role, _ in turns]
        if len(roles) < 2 or roles != ["user", "assistant"] * (len(roles) // 2):
            return f"the turns are {excerpt(', '.join(roles) or 'none')}, wanted user and assistant in turn, to the end"
        if len(turns) > 2 and turns_of(write_turns(turns[:-1])) != turns[:-1]:
            return f"a turn is empty or holds the mark of another: {excerpt(write_turns(turns))}"
        return None

    return [Rule("no conversation", fault, "each row must end in an assistant's answer to a user's turn")]


#: Chat data: the answer is the last turn, the prompt all before it (every earlier answer is context, not a target).
MESSAGES = register_layout(
    Layout(
        "demonstrations",
        "messages",
        {"messages": "turns"},
        lambda row, labels: [
            {"prompt": write_turns(_conversation(row)[:-1]), "response": _conversation(row)[-1][1]},
        ],
        rules=_message_rules,
    )
)
#: The chosen answers of HH-RLHF as demonstrations.
HH_CHOSEN = register_layout(
    Layout(
        "demonstrations",
        "hh",
        {"chosen": "text", "rejected": "text"},
        lambda row, labels: [
            {"prompt": pair["prompt"], "response": pair[f"response_{pair['better_response_id']}"]}
            for pair in _hh(row, ("reward",))
        ],
        rules=_dialogue_rules,
    )
)
#: Its dialogues up to the last answer, as prompts to report on.
HH_PROMPTS = register_layout(
    Layout(
        "prompts",
        "hh",
        {"chosen": "text", "rejected": "text"},
        lambda row, labels: [{"prompt": pair["prompt"]} for pair in _hh(row, ("reward",))],
        rules=_dialogue_rules,
    )
)
