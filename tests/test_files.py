"""Runs on files: scored responses, tables with labels of their own, prompt sets, instructions, lengths, data=show."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_files import PROMPTS, on_files, pairs, save_model, write
from tiny_runs import Run, plan, run

from alignbench.config import Config
from alignbench.data.readers import split_by_prompt
from alignbench.dataset import FilesConfig, SourceConfig, check_files
from alignbench.errors import ConfigError, DataError, ModelError
from alignbench.stages.files import ReadSpec, pairs_of
from alignbench.stages.listed import list_log_weights
from alignbench.store import Store

SHARED = Path(__file__).resolve().parents[1].parent / "shared/data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the public data files are not on this machine")
STATED = ("method=sacpo", "method.beta_over_lambda=[0.25]")
SHARES = {"train": 0.5, "validation": 0.2, "test": 0.3}
NO_PAIRS = ("dataset.files.pairs=null",)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def on(folder: Path, model: Path, dataset: str, *overrides: str) -> tuple[str, ...]:
    """Overrides of a run on another data set than dataset=files."""
    base = [o for o in on_files(folder, model) if not o.startswith(("dataset=", "dataset.files.pairs"))]
    return (*base, f"dataset={dataset}", *overrides)


def stages(done: Run) -> dict[str, Any]:
    return {stage["label"]: stage for stage in done.record["stages"]}


# ---------------------------------------------------------------- scored responses


def scored() -> list[dict[str, Any]]:
    """Four answers per prompt; detail rewards and is unsafe, and a third score."""
    return [
        {
            "prompt": prompt,
            "response": f"Take {k} spoons. {'Rub. ' * k}",
            "reward": k + (i % 3) / 8,
            "safety": -1.5 * k,
            "politeness": float((i + k) % 2),
        }
        for k in range(4)
        for i, prompt in enumerate(PROMPTS)
    ]


def test_columns_of_other_names_on_the_command_line(model: Path, tmp_path: Path) -> None:
    rows = [{("question" if k == "prompt" else k): v for k, v in row.items()} for row in pairs()]
    base = on_files(tmp_path, model, "dataset.files.pairs.columns=[prompt:question]", "method=sft", rows=rows)
    done = run(tmp_path / "store", tmp_path / "out", base=base)
    assert {row["prompt"] for row in done.artifact("data").jsonl("pairs.jsonl")} == set(PROMPTS)


def on_responses(folder: Path, model: Path, *overrides: str, rows: list[dict[str, Any]] | None = None) -> Any:
    path = write(folder / "scored.jsonl", scored() if rows is None else rows)
    return on(
        folder,
        model,
        "responses",
        f"dataset.files.responses.path={path}",
        "evaluate=data",
        "evaluate.samples_per_prompt=8",
        *overrides,
    )


SPEC = ReadSpec((), "strict", 0.2, 0.3, 0, 3)


def test_pairs_of_scored_responses_follow_the_scores() -> None:
    rows = [
        {"prompt": p, "response": f"{p}{k}", "scores": {"reward": float(k // 2), "safety": -float(k)}}
        for p in ("p", "q")
        for k in range(4)
    ]
    made = pairs_of(rows, SPEC)
    assert [row["prompt"] for row in made] == ["p"] * 3 + ["q"] * 3
    score = {row["response"]: row["scores"] for row in rows}
    for row in made:
        first, second = row["response_0"], row["response_1"]
        for name, column in (("reward", "better_response_id"), ("safety", "safer_response_id")):
            values = score[first][name], score[second][name]
            assert row["scores"][name] == list(values)
            assert row.get(column) == (None if values[0] == values[1] else int(values[1] > values[0]))
    seen = {frozenset((row["response_0"], row["response_1"])) for row in made}
    assert len(seen) == len(made)
    # each prompt's pairs depend on itself alone
    assert pairs_of(rows[4:], SPEC) == made[3:]


def test_pairs_take_both_orders_and_leave_out_those_without_a_difference() -> None:
    rows = [
        {"prompt": f"p{i}", "response": r, "scores": {"reward": s}}
        for i in range(300)
        for r, s in (("a", 0.0), ("b", 1.0))
    ] + [{"prompt": "same", "response": r, "scores": {"reward": 1.0}} for r in "ab"]
    made = pairs_of(rows, SPEC)
    assert len(made) == 300
    assert 100 < sum(row["better_response_id"] for row in made) < 200


def test_mocan_on_scored_responses_of_ones_own_with_two_utilities(model: Path, tmp_path: Path) -> None:
    problem = ("constraint.utilities=[safety,politeness]", "constraint.thresholds=[0.05,0.0]")
    base = on_responses(tmp_path, model, "method=mocan", "method.dual.scorer=data", *problem)
    done = run(tmp_path / "store", tmp_path / "out", base=base)
    record = done.record
    assert set(record["outcome"]["multipliers"]) == {"safety", "politeness"}
    assert set(record["rows"]["mocan"]["constraints"]) == {"safety", "politeness"}
    # the scores that are reported are those of the file
    expected = {(r["prompt"], r["response"]): r for r in scored()}
    answers = done.artifact("sample mocan").jsonl("responses.jsonl")
    reported = done.artifact("score mocan").jsonl("scores.jsonl")
    assert len(answers) == 8 * len({a["prompt"] for a in answers})
    for answer, found in zip(answers, reported, strict=True):
        own = expected[answer["prompt"], answer["response"]]
        assert found == {name: own[name] for name in ("reward", "safety", "politeness")}
    # prompts are held out whole
    by_split = {s: {p["prompt"] for p in part} for s, part in split_by_prompt(scored(), SHARES, 0).items()}
    assert {answer["prompt"] for answer in answers} == by_split["test"]
    trained = {row["prompt"] for row in done.artifact("data").jsonl("pairs.jsonl") if row["split"] == "train"}
    assert trained == by_split["train"]
    # they count as draws of the reference, whose mean is the plain one over prompts, and whose margin is 0
    listed = done.artifact("list answers, test").jsonl("responses.jsonl")
    exact = float(np.mean([row["scores"]["reward"] for row in listed]))
    certificate = record["rows"]["sft"]["certificate"]["test"]
    assert certificate["reward"] == pytest.approx(exact, rel=1e-12)
    assert certificate["kl"] == pytest.approx(0, abs=1e-12)
    # a policy's weights are its ratios to the reference, by a formula of its own
    ratio = loaded(done, "log-probs of mocan on the list, test") - loaded(done, "log-probs of sft on the list, test")
    prompts = [row["prompt_id"] for row in listed]
    total = {p: np.exp(ratio[[p == q for q in prompts]]).sum() for p in set(prompts)}
    weights = np.exp(ratio) / [total[p] for p in prompts]
    assert np.exp(loaded(done, "weights from log-probs of mocan on the list, test")) == pytest.approx(weights, rel=1e-9)
    reward = sum(w * row["scores"]["reward"] for w, row in zip(weights, listed, strict=True)) / len(by_split["test"])
    assert record["rows"]["mocan"]["certificate"]["test"]["reward"] == pytest.approx(reward, rel=1e-9)
    assert record["data"]["data: report"]["pairs_made"]["pairs"] == len(done.artifact("data").jsonl("pairs.jsonl"))


def loaded(done: Run, label: str) -> np.ndarray:
    from safetensors.numpy import load_file

    return load_file(done.artifact(label).path("responses.safetensors"))["response"]


def test_responses_may_be_all_that_can_be_said(model: Path, tmp_path: Path) -> None:
    overrides = ("method=sft", "dataset.files.responses_as=answers", "constraint.thresholds=[-2]")
    done = run(tmp_path / "store", tmp_path / "out", base=on_responses(tmp_path, model, *overrides))
    listed = done.artifact("list answers, test").jsonl("responses.jsonl")
    weights = np.exp(list_log_weights(listed, loaded(done, "log-probs of sft on the list, test")).log_weights)
    exact = sum(w * row["scores"]["reward"] for w, row in zip(weights, listed, strict=True))
    found = done.record["rows"]["sft"]["certificate"]["test"]["reward"]
    assert found == pytest.approx(exact / len({row["prompt_id"] for row in listed}), rel=1e-9)
    assert not [label for label in done.labels if label.startswith("weights from")]


def test_another_scorer_reports_on_a_policys_own_words(model: Path, tmp_path: Path) -> None:
    """The dual is solved on the file's scores, and what is reported is generated."""
    overrides = ("method=mocan", "method.dual.scorer=data", "evaluate=unscored", "evaluate.samples_per_prompt=2")
    done = run(tmp_path / "store", tmp_path / "out", base=on_responses(tmp_path, model, *overrides))
    used = stages(done)
    assert used["sample mocan"]["stage"] == "sample"
    assert used["dual"]["inputs"]["responses"] == done.key("list answers, train")
    assert "certificate" not in done.record["rows"]["mocan"]
    said = {row["response"] for row in done.artifact("sample mocan").jsonl("responses.jsonl")}
    assert not said & {row["response"] for row in scored()}


def test_responses_may_be_there_for_pairs_alone(model: Path, tmp_path: Path) -> None:
    base = on_responses(tmp_path, model, "evaluate=unscored", "dataset.files.responses_as=pairs", *STATED)
    done = run(tmp_path / "store", tmp_path / "out", base=base)
    said = {row["response"] for row in done.artifact("sample sacpo").jsonl("responses.jsonl")}
    assert not said & {row["response"] for row in scored()}  # a policy of random weights writes its own


def test_a_preference_stage_trains_on_the_pairs_that_have_its_label(model: Path, tmp_path: Path) -> None:
    rows = scored()
    for row in rows:
        row["safety"] = 0.0 if row["reward"] < 2 else -1.0  # many ties
    done = run(
        tmp_path / "store",
        tmp_path / "out",
        base=on_responses(tmp_path, model, *STATED, "constraint.thresholds=[0.2]", rows=rows),
    )
    chosen = done.artifact("pairs labelled for safety").jsonl("pairs.jsonl")
    whole = done.artifact("data").jsonl("pairs.jsonl")
    assert 0 < len(chosen) < len(whole)
    assert chosen == [row for row in whole if row["scores"]["safety"][0] != row["scores"]["safety"][1]]
    assert len(done.artifact("pairs labelled for reward").jsonl("pairs.jsonl")) == len(whole)
    counts = done.record["data"]["data: report"]["pairs_made"]
    assert counts["labelled for safety"] == len(chosen)


def test_the_order_of_the_file_does_not_matter_to_the_list(model: Path, tmp_path: Path) -> None:
    _, _, _, nodes = plan(tmp_path / "store", base=on_responses(tmp_path, model, "method=sft"))
    done = run(tmp_path / "store", tmp_path / "out", base=on_responses(tmp_path, model, "method=sft"))
    listed = done.artifact("list answers, test").jsonl("responses.jsonl")
    ids = [row["prompt_id"] for row in listed]
    assert ids == sorted(ids, key=list(dict.fromkeys(ids)).index)  # a prompt's answers lie together
    assert "data" in nodes


@pytest.mark.parametrize(
    ("overrides", "where", "mend"),
    [
        (("dataset.files.responses_as=pairs",), "evaluate.scorer", "dataset.files.responses_as=samples"),
        (("dataset.files.responses_as=list",), "dataset.files.responses_as", "answers"),
        (("dataset.files.pairs_per_prompt=0",), "dataset.files.pairs_per_prompt", "at least 1"),
        (("dataset.files.responses.labels=[reward]",), "dataset.files.responses.labels", "else null"),
        (("dataset.files.responses.layout=hh",), "dataset.files.responses.layout", "truthfulqa_judge"),
        (("dataset.files.prompts.path=a.jsonl",), "dataset.files.prompts", "test_share=0"),
        (("dataset.files.responses.columns=[prompt]",), "dataset.files.responses.columns", "[prompt:question]"),
        (("evaluate=gold",), "evaluate.scorer", "evaluate=data"),
    ],
)
def test_settings_of_scored_responses_that_cannot_be(
    model: Path, tmp_path: Path, overrides: tuple[str, ...], where: str, mend: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        run(tmp_path / "store", tmp_path / "out", base=on_responses(tmp_path, model, "method=sft", *overrides))
    assert where in refused.value.where
    assert mend in refused.value.mend


def test_pairs_beside_scored_responses_are_refused() -> None:
    files = FilesConfig(
        SourceConfig("a.jsonl"), responses=SourceConfig("b.jsonl"), validation_share=0.1, test_share=0.1
    )
    with pytest.raises(ConfigError, match="pairs are made from the scored responses") as refused:
        check_files(files, Config(method=None))
    assert "null" in refused.value.mend


def test_the_scores_of_the_data_need_data_with_scores(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scorer 'data'"):
        run(tmp_path / "s", tmp_path / "o", base=on_files(tmp_path, model, "method=mocan", "method.dual.scorer=data"))


# ---------------------------------------------------------------- tables with labels of their own


def hh(path: Path, names: list[str]) -> Path:
    def text(name: str, answer: str) -> str:
        return f"\n\nHuman: Hello.\n\nAssistant: Hi!\n\nHuman: {name}\n\nAssistant: {answer}"

    rows = [{"chosen": text(name, "Gladly."), "rejected": text(name, "Leave me.")} for name in names]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def on_hh(folder: Path, model: Path, *overrides: str) -> tuple[str, ...]:
    harmless, helpful = PROMPTS[::2], PROMPTS[1::2]
    no_config = [f"dataset.files.{t}.{k}=null" for t in ("pairs", "more_pairs.helpful") for k in ("config", "split")]
    return on(
        folder,
        model,
        "hh_rlhf",
        f"dataset.files.pairs.path={hh(folder / 'harmless.jsonl.gz', harmless)}",
        f"dataset.files.more_pairs.helpful.path={hh(folder / 'helpful.jsonl.gz', helpful)}",
        *no_config,
        "model.template=hh",
        *overrides,
    )


def test_each_step_of_sacpo_trains_on_the_table_that_has_its_labels(model: Path, tmp_path: Path) -> None:
    done = run(tmp_path / "store", tmp_path / "out", base=on_hh(tmp_path, model, *STATED))
    helpful = done.artifact("pairs labelled for reward").jsonl("pairs.jsonl")
    harmless = done.artifact("pairs labelled for safety").jsonl("pairs.jsonl")
    assert {row["prompt"].rsplit("Human: ", 1)[1] for row in helpful} == set(PROMPTS[1::2])
    assert {row["prompt"].rsplit("Human: ", 1)[1] for row in harmless} == set(PROMPTS[::2])
    used = stages(done)
    assert used["prefer reward"]["inputs"]["pairs"] == done.key("pairs labelled for reward")
    assert used["prefer reward -> safety"]["inputs"]["pairs"] == done.key("pairs labelled for safety")
    report = done.record["data"]["data: report"]
    assert report["n_kept"] == len(PROMPTS[::2])
    assert report["more_pairs.helpful"]["n_kept"] == len(PROMPTS[1::2])


def test_each_learned_score_model_trains_on_the_table_that_has_its_labels(model: Path, tmp_path: Path) -> None:
    learned = ("scorers=learned", "evaluate=learned", "scorers.learned.columns.safety.larger_is=better")
    done = run(tmp_path / "store", tmp_path / "out", base=on_hh(tmp_path, model, *learned, "method=sft"))
    used = {label: stage for label, stage in stages(done).items() if stage["stage"] == "train_scorer"}
    trained = {stage["spec"]["objective"]: stage["inputs"]["pairs"] for stage in used.values()}
    assert trained == {name: done.key(f"pairs labelled for {name}") for name in ("reward", "safety")}
    assert set(done.record["rows"]["sft"]["metrics"]) >= {"reward", "safety"}


def test_labels_that_no_table_carries_are_refused_before_anything_runs(model: Path, tmp_path: Path) -> None:
    alone = ("dataset.files.more_pairs.helpful.labels=[safety]",)
    base = on_hh(tmp_path, model, *alone, "method=dpo_helpful")
    with pytest.raises(ConfigError, match="no pairs are labelled for 'reward': the tables carry safety; safety"):
        run(tmp_path / "store", tmp_path / "out", base=base)
    assert made(tmp_path / "store") == set()


def test_pairs_with_a_mixed_label_alone(model: Path, tmp_path: Path) -> None:
    """PKU-SafeRLHF-single-dimension."""
    rows = [{k: v for k, v in row.items() if "safe" not in k} for row in pairs()]
    base = on_files(tmp_path, model, "dataset.files.pairs.labels=[reward]", rows=rows)
    done = run(tmp_path / "store", tmp_path / "out", "method=dpo_helpful", base=base)
    assert "pairs labelled for reward" not in done.labels  # all have it
    with pytest.raises(ConfigError, match="no pairs are labelled for 'safety'"):
        run(tmp_path / "store", tmp_path / "out", "method=dpo_safe", base=base)


@real
def test_the_harmless_split_is_parsed_validated_and_trained_on(model: Path, tmp_path: Path) -> None:
    base = on(
        tmp_path,
        model,
        "hh_rlhf_harmless",
        f"dataset.files.pairs.path={SHARED / 'hh_rlhf/harmless-base-test.jsonl.gz'}",
        "dataset.files.pairs.config=null",
        "dataset.files.pairs.split=null",
        "dataset.files.validation_share=0.01",
        "dataset.files.test_share=0.96",
        "dataset.files.over_long=drop",
        "model.template=hh",
        "model.max_length=192",
        "evaluate.split=validation",
        "method=dpo_safe",
        "method.step.train.epochs=1",
    )
    record = run(tmp_path / "store", tmp_path / "out", base=base).record
    report = record["data"]["data: report"]
    assert report["source"]["n_rows"] == 2312
    assert report["n_kept"] == 2303
    assert record["data"]["lengths: report"]["pairs"]["left_out"] > 0
    assert record["data"]["prefer safety: truncation"]["truncated_responses"] == 0
    assert record["cost"]["total"]["optimizer_steps"] >= 1


# ---------------------------------------------------------------- prompt sets


def test_a_prompt_set_is_what_results_are_reported_on(model: Path, tmp_path: Path) -> None:
    asked = [{"prompt": PROMPTS[0], "category": "a"}, {"prompt": "Something new?", "category": "b"}]
    prompts = write(tmp_path / "set.jsonl", asked)
    # and all other prompts train, with none held back, as in SACPO's presets
    shares = ("dataset.files.test_share=0", "dataset.files.validation_share=0")
    overrides = (f"dataset.files.prompts.path={prompts}", *shares, "method=dpo_helpful")
    done = run(tmp_path / "store", tmp_path / "out", base=on_files(tmp_path, model, *overrides))
    answered = done.artifact("sample dpo_helpful").jsonl("responses.jsonl")
    assert {row["prompt"] for row in answered} == {row["prompt"] for row in asked}
    data = done.artifact("data")
    pairs = data.jsonl("pairs.jsonl")
    assert {row["prompt"] for row in pairs} == set(PROMPTS) - {PROMPTS[0]}
    assert {row["split"] for row in pairs} == {"train"}
    assert data.json("report.json")["reported_prompts_left_out"] == 2
    reported = [p for p in data.jsonl("prompts.jsonl") if p["split"] == "test"]
    assert {p["kind"] for p in reported} == {p["category"] for p in reported} == {"a", "b"}


# ---------------------------------------------------------------- instructions


def test_a_base_model_is_fine_tuned_on_instructions_alone(model: Path, tmp_path: Path) -> None:
    rows = [{"instruction": p, "input": "", "output": "Wash it twice."} for p in PROMPTS]
    base = on(
        tmp_path,
        model,
        "instructions",
        f"dataset.files.demonstrations.path={write(tmp_path / 'alpaca.jsonl', rows)}",
        "dataset.files.demonstrations.layout=alpaca",
        "model=handbook_llama",
        f"model.path={model}",
        "model.sft.epochs=3",
        "model.sft.batch_size=4",
    )
    done = run(tmp_path / "store", tmp_path / "out", "method=sft", base=base)
    expected = [
        {"prompt": r["instruction"], "response": r["output"]}
        for r in split_by_prompt([{"prompt": r["instruction"], **r} for r in rows], SHARES, 0)["train"]
    ]
    assert done.artifact("data").jsonl("demonstrations.jsonl") == expected
    losses = [row["loss"] for row in done.artifact("sft").jsonl("log.jsonl") if "loss" in row]
    assert losses[-1] < losses[0]
    with pytest.raises(ConfigError, match="demonstrations only"):
        run(tmp_path / "store", tmp_path / "out", "method=dpo_helpful", base=base)


# ---------------------------------------------------------------- lengths


def made(store: Path) -> set[str]:
    """The stages that a store has artifacts of."""
    return {artifact.manifest["stage"] for artifact in Store(store).artifacts()}


def long_rows() -> list[dict[str, Any]]:
    rows = pairs()
    rows[0] |= {"response_0": "Go on. " * 100}
    return rows


def test_rows_that_are_too_long_are_reported_before_a_model_loads(model: Path, tmp_path: Path) -> None:
    base = on_files(tmp_path, model, "method=dpo_helpful", "dataset.files.over_long=refuse", rows=long_rows())
    with pytest.raises(DataError) as refused:
        run(tmp_path / "store", tmp_path / "out", base=base)
    assert "1 of 32 pairs" in str(refused.value)
    assert "tokens; prompt 'How do I clean the oven?'" in str(refused.value)
    assert "over_long=drop" in refused.value.mend
    # the rows and the tokenizer, and no policy that was trained or run
    assert made(tmp_path / "store") == {"read", "base"}


def test_rows_that_are_too_long_are_dropped_on_request(model: Path, tmp_path: Path) -> None:
    rows = long_rows()
    seed = next(s for s in range(20) if rows[0] in split_by_prompt(rows, SHARES, s)["train"])
    overrides = ("method=dpo_helpful", "dataset.files.over_long=drop", f"dataset.seed={seed}")
    record = run(tmp_path / "store", tmp_path / "out", base=on_files(tmp_path, model, *overrides, rows=rows)).record
    lengths = record["data"]["lengths: report"]
    assert (lengths["pairs"]["too_long"], lengths["pairs"]["left_out"], lengths["prompts"]["left_out"]) == (1, 1, 0)
    assert record["data"]["prefer reward: truncation"]["truncated_responses"] == 0
    assert record["data"]["prefer reward: truncation"]["n"] == len(split_by_prompt(rows, SHARES, seed)["train"]) - 1
    assert lengths["pairs"]["response_tokens"]["max"] > 96


def test_a_scored_response_that_is_too_long_is_no_answer_of_the_list(model: Path, tmp_path: Path) -> None:
    rows = scored()
    rows[0]["response"] = "Rub. " * 100
    seed = next(s for s in range(20) if rows[0] in split_by_prompt(rows, SHARES, s)["test"])
    base = on_responses(tmp_path, model, "method=sft", f"dataset.seed={seed}", rows=rows)
    with pytest.raises(DataError, match="a listed answer does not fit") as refused:
        run(tmp_path / "store", tmp_path / "out", base=base)
    assert "over_long=drop" in refused.value.mend
    done = run(tmp_path / "store", tmp_path / "out", "dataset.files.over_long=drop", base=base)
    listed = done.artifact("list answers, test").jsonl("responses.jsonl")
    assert len(listed) == len(split_by_prompt(rows, SHARES, seed)["test"]) - 1
    assert rows[0]["response"] not in {row["response"] for row in listed}


# ---------------------------------------------------------------- models


def test_a_lora_target_that_matches_nothing_is_refused_in_the_plan(model: Path, tmp_path: Path) -> None:
    lora = ("model.lora.rank=2", "model.lora.targets=[q_proj,query_key_value]")
    with pytest.raises(ModelError, match="query_key_value match no weight matrix") as refused:
        plan(tmp_path / "store", base=on_files(tmp_path, model, "method=dpo_helpful", *lora))
    assert "q_proj" in refused.value.mend


def test_the_record_describes_a_model_that_was_brought_in(model: Path, tmp_path: Path) -> None:
    record = run(tmp_path / "store", tmp_path / "out", base=on_files(tmp_path, model, "method=sft")).record
    found = record["data"]["base: report"]
    assert (found["family"], found["eos"], found["pad"], found["pads_with"]) == ("llama", "</s>", None, "</s>")
    assert found["weights_set_to_zero"] == {}


# ---------------------------------------------------------------- data=show


def test_show_prints_rows_lengths_and_what_was_dropped(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiny_runs import compose

    from alignbench.run import execute

    rows = pairs()
    rows[5]["response_1"] = rows[5]["response_0"]
    # neither a scorer nor a method's settings are asked for
    base = on_files(tmp_path, model, "dataset.files.validation=lenient", "evaluate=gold", "data=show", rows=rows)
    execute(compose(*base, f"store_dir={tmp_path}/store", f"output_dir={tmp_path}/out"))
    said = capsys.readouterr().out
    assert said.count("masked") == 3
    assert said.count("trained 0") == said.count("trained 1") == 3
    assert "</s>" in said
    assert "equal responses 1" in said
    assert "row 6: both responses are" in said
    assert "conflict_rows" in said
    assert "p99" in said
    assert made(tmp_path / "store") == {"read", "base", "fit"}
    assert not (tmp_path / "out").exists()


def test_show_on_the_embedded_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tiny_runs import TINY, compose

    from alignbench.run import execute

    execute(compose(*TINY, "data=show", f"store_dir={tmp_path}/store", f"output_dir={tmp_path}/out"))
    said = capsys.readouterr().out
    assert "pairs: none yet" in said
    assert said.count("masked") == 3
    assert "<|end|>" in said
