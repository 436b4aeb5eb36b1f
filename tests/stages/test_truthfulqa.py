"""MC1 and MC2: by formula, by transformers' own logits, and beside lm-evaluation-harness on the same model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import STATED, TINY, compose, run

from alignbench.data.published import multiple_choice
from alignbench.data.readers import Source, read_rows
from alignbench.errors import DataError
from alignbench.jsonio import read_json, read_jsonl
from alignbench.run import execute
from alignbench.stages import TRUTHFULQA, Context, Runtime
from alignbench.stages.tokens import TokenSpec
from alignbench.stages.truthfulqa import Questions, TruthfulQASpec, mc1, mc2, rows_of
from alignbench.store import Artifact

ROWS = [
    {
        "question": "What do kettles do?",
        "best_answer": "They whistle",
        "correct_answers": ["They whistle", "They boil water", "Nothing"],
        "incorrect_answers": ["They jump over dogs", "They fly"],
    },
    {
        "question": "Is the dog lazy?",
        "best_answer": "Yes",
        "correct_answers": ["Yes"],
        "incorrect_answers": ["No, the dog is quick", "The fox is", "Never"],
    },
]
CSV = Path(__file__).resolve().parents[3] / "shared" / "data" / "truthfulqa" / "TruthfulQA.csv"


def spec(form="qa", preamble="", **lengths):
    tokens = TokenSpec("plain", **({"max_length": 64, "max_prompt_length": 48} | lengths))
    return TruthfulQASpec("x", form, preamble, tokens, "fp32", 0.95)


def measured(tmp_path, rows, the_spec, seed=0, positions=64):
    """What the stage writes for a tiny model: (metrics.json, questions.jsonl, its policy's folder)."""
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = tmp_path / "artifact"
    tiny.save(tiny.llama(seed, max_positions=positions), made / "policy")
    out = tmp_path / "out"
    out.mkdir()
    context = Context(
        spec=the_spec,
        inputs={"policy": Artifact("k" * 32, "policy", made, {"files": {"policy/config.json": {}}})},
        seed=0,
        out=out,
        work=tmp_path,
        cost={},
        runtime=Runtime(tiny.hardware(), 0, {"truthfulqa": Questions(Source(path=str(file)), the_spec.preamble)}),
        on_metrics=lambda step, metrics: None,
    )
    TRUTHFULQA.run(context)
    return read_json(out / "metrics.json"), read_jsonl(out / "questions.jsonl"), made / "policy"


def test_the_scores_by_hand():
    assert mc1([-1.0, -2.0], [1, 0]) == 1
    assert mc1([-2.0, -1.0], [1, 0]) == 0
    assert mc2(np.log([0.2, 0.1, 0.1]), [1, 1, 0]) == pytest.approx(0.75)


@given(st.lists(st.floats(-30, 0), min_size=2, max_size=8), st.floats(-5000, 0))
def test_mc2_is_the_plain_formula_and_does_not_underflow(values, shift):
    labels = [1] + [0] * (len(values) - 1)
    plain = math.exp(values[0]) / sum(map(math.exp, values))
    assert mc2(values, labels) == pytest.approx(plain, rel=1e-9)
    assert mc2(np.array(values) + shift, labels) == pytest.approx(plain, rel=1e-6)


def test_against_transformers_own_logits(tmp_path):
    metrics, questions, folder = measured(tmp_path, ROWS, spec())
    model, tokenizer = tiny.load(folder), tiny.tokenizer()
    expected = {"mc1": [], "mc2": []}
    for row, kept in zip(multiple_choice(ROWS), questions, strict=True):
        for name in ("mc1", "mc2"):
            choices, labels = row[f"{name}_targets"]["choices"], row[f"{name}_targets"]["labels"]
            sums = []
            for choice in choices:
                prompt = tokenizer(f"Q: {row['question']}\nA:")["input_ids"]
                ids = tokenizer(f"Q: {row['question']}\nA: {choice}")["input_ids"]
                with torch.no_grad():
                    found = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
                sums.append(sum(float(found[t - 1, ids[t]]) for t in range(len(prompt), len(ids))))
            np.testing.assert_allclose(kept[f"{name}_logprobs"], sums, rtol=1e-5)
            if name == "mc1":
                expected[name].append(float(labels[sums.index(max(sums))]))
            else:
                top = max(sums)
                weights = [math.exp(s - top) for s in sums]
                true = sum(w for w, label in zip(weights, labels, strict=True) if label)
                expected[name].append(true / sum(weights))
    for name, values in expected.items():
        assert metrics["metrics"][name]["mean"] == pytest.approx(np.mean(values), abs=1e-5)
        assert metrics["metrics"][name]["n"] == 2


def test_the_policy_s_own_form_ends_answers_with_its_end_token():
    tokenizer = tiny.tokenizer()
    rows, cut = rows_of(tokenizer, "Is the dog lazy?", ["Yes"], spec("policy"))
    prompt = tokenizer("Is the dog lazy?\n")["input_ids"]
    assert list(rows[0].ids) == [*prompt, *tokenizer("Yes")["input_ids"], tiny.EOS]
    assert (rows[0].prompt_length, cut) == (len(prompt), 0)


def test_a_preamble_stands_before_the_question_and_loses_its_beginning_first():
    tokenizer = tiny.tokenizer()
    (row,), cut = rows_of(tokenizer, "Is the dog lazy?", ["Yes"], spec(preamble="Q: a\nA: b\n", max_length=999))
    assert tokenizer.decode(row.ids) == "Q: a\nA: b\n\nQ: Is the dog lazy?\nA: Yes"
    assert cut == 0
    (short,), cut = rows_of(tokenizer, "Is the dog lazy?", ["Yes"], spec(preamble="Q: a\nA: b\n", max_length=12))
    assert (list(short.ids), cut) == (list(row.ids)[-12:], 1)
    assert len(short.ids) - short.prompt_length == len(row.ids) - row.prompt_length


@pytest.mark.parametrize("form", ["qa", "policy"])
def test_an_answer_that_does_not_fit_is_told(form):
    with pytest.raises(DataError, match=r"does not fit into 4 tokens"):
        rows_of(tiny.tokenizer(), "Why?", ["zyx" * 20], spec(form, max_length=4, max_prompt_length=2))


def test_an_answer_that_does_not_fit_is_told_before_anything_trains(tmp_path):
    """By a run and by its plan; the tokenizer alone has been read, or made, by then."""
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1] | {"best_answer": "Yes " * 90}) + "\n")
    asked = (STATED, "benchmark=truthfulqa", f"benchmark.path={file}")
    store = tmp_path / "store"
    with pytest.raises(DataError, match=r"'Is the dog lazy\?' does not fit into 112 tokens"):
        run(store, tmp_path / "out", *asked)
    built = [read_json(path)["stage"] for path in store.glob("artifacts/*/manifest.json")]
    assert sorted(built) == ["base", "world"]
    # of a model that is brought in the plan knows
    tiny.save(tiny.llama(max_positions=128), tmp_path / "model")
    brought = (f"model.path={tmp_path}/model", "plan=true")
    with pytest.raises(DataError, match="does not fit into 112 tokens"):
        execute(compose(*TINY, *asked, *brought, f"store_dir={tmp_path}/none", f"output_dir={tmp_path}/out"))


def test_other_rows_are_no_questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"prompt": "p"}) + "\n")
    with pytest.raises(DataError, match=r"row 2 has neither the CSV's columns nor the hub's; it has \['prompt'\]"):
        multiple_choice(read_rows(Source(path=str(file))))


def test_a_preamble_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="preamble cannot be read"):
        Questions.of("x.csv", str(tmp_path / "none.txt"))


@pytest.mark.parametrize("questions", ["invented", "real"])
def test_beside_lm_evaluation_harness(tmp_path, questions):
    """Its own tasks, its own `hf` backend, opening the policy's folder as it is."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not here (pip install '.[lm-eval]')")
    if questions == "real" and not CSV.exists():
        pytest.skip("the real questions are not here (shared/data/truthfulqa)")
    import yaml

    rows = multiple_choice(ROWS if questions == "invented" else read_rows(Source(path=str(CSV)))[:12])
    where = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa" / "truthfulqa_mc1.yaml"
    template = yaml.safe_load(where.read_text())["doc_to_text"]
    from jinja2 import Template

    preamble = Template(template).render(question="@").removesuffix("\n\nQ: @\nA:")
    assert preamble.startswith("Q: ")
    assert "@" not in preamble
    metrics, _, folder = measured(
        tmp_path, rows, spec(preamble=preamble, max_length=2048, max_prompt_length=1024), positions=2048
    )
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name in ("mc1", "mc2"):  # theirs in every respect but where the questions lie
        (tasks / f"{name}.yaml").write_text(
            f"include: {where.with_name(f'truthfulqa_{name}.yaml')}\ntask: local_{name}\ndataset_path: json\n"
            f"dataset_name: null\ndataset_kwargs:\n  data_files:\n    validation: {data}\n"
        )
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32", "max_length": 2048},
        tasks=["local_mc1", "local_mc2"],
        task_manager=TaskManager(include_path=str(tasks)),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )["results"]
    for name in ("mc1", "mc2"):
        assert metrics["metrics"][name]["mean"] == pytest.approx(found[f"local_{name}"]["acc,none"], abs=1e-6)
