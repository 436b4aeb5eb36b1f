"""Every YAML, every group option and every refusal; nothing here loads a model or touches the disk."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from data_options import DATA_OPTIONS
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from alignbench.cli import CONF, register
from alignbench.config import WORLD_UTILITIES, Config, resolve, validate
from alignbench.errors import AlignbenchError, ConfigError
from alignbench.methods import METHODS
from alignbench.models.scorers import find_scorer
from alignbench.run import execute

FILES = sorted(CONF.rglob("*.yaml"))


@cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", overrides=list(overrides))


def compose(*overrides: str) -> DictConfig:
    """The configuration of `python main.py OVERRIDES`, composed once for each list of overrides."""
    return _composed(overrides)


def check(*overrides: str) -> tuple[Config, Any]:
    """Compose, resolve and validate: all that happens before a run looks at data or models."""
    config, method = resolve(compose(*overrides))
    validate(config, method)
    return config, method


@pytest.mark.parametrize(
    ("model", "reward", "safety"), [("handbook_llama", 1e-4, 2e-4), ("handbook_llama_lora", 1e-3, 1e-3)]
)
def test_adapters_have_learning_rates_of_their_own(model: str, reward: float, safety: float) -> None:
    config, method = check(f"model={model}", "method=sacpo")
    assert (method.reward_step.train.learning_rate, method.safety_step.train.learning_rate) == (reward, safety)
    assert ("lora" in str(config.tuned_by)) == (reward == 1e-3)


def refusal(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check(*overrides)
    return caught.value


# ---------------------------------------------------------------- comments


def uncommented_keys(text: str) -> list[str]:
    """Keys without a comment on the line above; the entries of a defaults list are Hydra's and need none."""
    lines = text.splitlines()

    def keys(node: yaml.Node | None, path: str = "") -> Iterator[str]:
        if isinstance(node, yaml.SequenceNode):
            for child in node.value:
                yield from keys(child, path)
        if not isinstance(node, yaml.MappingNode) or node.flow_style:
            return
        for key, value in node.value:
            name = f"{path}.{key.value}".lstrip(".")
            above = lines[key.start_mark.line - 1].strip() if key.start_mark.line else ""
            if not above.startswith("#") or above.startswith("# @package"):
                yield name
            if name != "defaults":
                yield from keys(value, name)

    return list(keys(yaml.compose(text)))


def short(path: Path) -> str:
    return str(path.relative_to(CONF))


@pytest.mark.parametrize("path", FILES, ids=short)
def test_every_key_of_every_yaml_has_a_comment_above_it(path: Path) -> None:
    assert uncommented_keys(path.read_text()) == []


@pytest.mark.parametrize("path", [path for path in FILES if yaml.compose(path.read_text())], ids=short)
def test_a_removed_comment_is_noticed(path: Path) -> None:
    lines = path.read_text().splitlines()
    in_text = yaml.compose("\n".join(lines))
    assert isinstance(in_text, yaml.MappingNode)
    first = in_text.value[0][0].start_mark.line  # the comment above the first key
    assert uncommented_keys("\n".join([*lines[: first - 1], "", *lines[first:]])) == [in_text.value[0][0].value]


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("a: 1\n", ["a"]),
        ("# said\na: 1\nb: 2\n", ["b"]),
        ("# said\n\na: 1\n", ["a"]),
        ("# outer\na:\n  b: 1\n", ["a.b"]),
        ("# outer\na:\n  # inner\n  b: 1\n", []),
        ("# @package _global_\na: 1\n", ["a"]),
        ("a: 1 # beside is not above\n", ["a"]),
        ("# groups\ndefaults:\n  - model: x\n  - _self_\n", []),
        ("# text\na: |-\n  b: not a key\n", []),
        ("# flow\na: {b: 1}\n", []),
    ],
)
def test_the_comment_checker_itself(text: str, bare: list[str]) -> None:
    assert uncommented_keys(text) == bare


# ---------------------------------------------------------------- every option of every group

PAIRS, OWN_MODEL, UNSCORED = "dataset.files.pairs.path=pairs.jsonl", "model.path=/a/model", "evaluate=unscored"
PROBLEM = ["constraint.thresholds=[0.5]", "constraint.beta=0.5"]
STATED = "method.beta_over_lambda=[0.5]"  # files have no scorer that the dual could be solved with
THRESHOLDS = (["constraint.beta", "constraint.thresholds"], ["constraint.beta=", "constraint.thresholds=["], PROBLEM)


def of_models(scorer: str) -> list[str]:
    return [f"scorers.{scorer}.columns.{column}.path=/a/model" for column in ("reward", "safety")]


# option -> (keys that the refusal names, what its mend proposes, what completes the configuration)
INCOMPLETE: dict[str, tuple[list[str], list[str], list[str]]] = {
    "constraint=margin": THRESHOLDS,
    "constraint=absolute_utility": THRESHOLDS,
    "constraint=absolute_cost": THRESHOLDS,
    "model=folder": (["model.path"], ["model.path="], [OWN_MODEL]),
    "dataset=files": (
        ["dataset.files.pairs.path"],
        ["dataset.files.pairs.path="],
        [PAIRS, "model=folder", OWN_MODEL, UNSCORED, STATED],
    ),
    "dataset=files_with_demonstrations": (
        ["dataset.files.pairs.path", "dataset.files.demonstrations.path"],
        ["dataset.files.pairs.path=", "dataset.files.demonstrations.path="],
        [PAIRS, "dataset.files.demonstrations.path=shown.jsonl", OWN_MODEL, UNSCORED, STATED],
    ),
    "judge=local": (["judge.local.path"], ["judge.local.path="], ["judge.local.path=/a/model"]),
    **{
        f"judge=gpt4_{paper}": (
            ["judge.server.url"],
            ["judge.server.url="],
            ["judge.server.url=http://localhost:8000/v1"],
        )
        for paper in ("sacpo", "can", "caid")
    },
    "judge=server": (
        ["judge.server.model", "judge.server.url"],
        ["judge.server.url="],
        ["judge.server.url=http://localhost:8000/v1", "judge.server.model=m"],
    ),
    "benchmark=truthfulqa": (["benchmark.path"], ["benchmark.path="], ["benchmark.path=TruthfulQA.csv"]),
    "hardware=gpu_8_zero3_nvme": (["offload=nvme"], ["hardware.nvme_path="], ["hardware.nvme_path=/nvme"]),
    "scorers=classifiers": (
        ["no model is given"],
        ["scorers.classifiers.columns.reward.path="],
        of_models("classifiers"),
    ),
    "scorers=judge": (["no model is given"], ["scorers.judge.columns.reward.path="], of_models("judge")),
    "dataset=pku_saferlhf_30k": (["gold scorer"], ["evaluate=unscored"], ["model=alpaca_7b", UNSCORED, STATED]),
    **DATA_OPTIONS,
}
OPTIONS = sorted(
    f"{path.relative_to(CONF).parts[0]}={'/'.join(path.relative_to(CONF).parts[1:])}".removesuffix(".yaml")
    for path in FILES
    if path.parent != CONF and path.parent.name != "parts"  # pieces of options, and none themselves
)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_with_the_default_and_is_valid(option: str) -> None:
    check(option, *INCOMPLETE.get(option, ([], [], []))[2])


@pytest.mark.parametrize("option", sorted(INCOMPLETE))
def test_an_incomplete_option_names_what_is_missing_and_how_to_give_it(option: str) -> None:
    named, mends, _ = INCOMPLETE[option]
    error = refusal(option)
    assert all(name in error.what for name in named)
    assert all(mend in error.mend for mend in mends)


def test_the_table_of_incomplete_options_lists_options_that_exist() -> None:
    assert set(INCOMPLETE) <= set(OPTIONS)


def test_every_method_has_a_yaml_of_its_name_and_the_other_way_round() -> None:
    files = [path.stem for path in (CONF / "method").glob("*.yaml")]
    presets = {"pd_dpo_v1": "pd_dpo"}  # other settings of a method
    assert sorted(files) == sorted([*METHODS, *presets])
    assert all(check(f"method={name}")[1].name == presets.get(name, name) for name in files)


def test_the_default_run_is_sacpo_on_the_embedded_world_on_a_cpu() -> None:
    config, method = check()
    assert (method.name, config.dataset.name, config.hardware.device) == ("sacpo", "handbook", "cpu")
    assert config.model.path is None
    assert config.dataset.files is None


def test_zero_stages_on_a_cpu_differ_from_the_default_in_the_stage_alone() -> None:
    for stage in (1, 2, 3):
        config = OmegaConf.to_container(compose(f"hardware=cpu_zero{stage}").hardware)
        assert config == OmegaConf.to_container(compose().hardware) | {"zero_stage": stage}


# ---------------------------------------------------------------- the paper's settings


@pytest.mark.parametrize("table", ["table3_dpo_dpo", "table3_p_sacpo"])
def test_sacpo_experiments_carry_the_published_hyper_parameters(table: str) -> None:
    config, method = check(f"experiment=sacpo/{table}")
    for step, batch in ((method.reward_step, 256), (method.safety_step, 64)):
        assert step.loss == "dpo"
        train = step.train
        assert (train.learning_rate, train.epochs, train.batch_size) == (2e-5, 3, batch)
        assert (train.schedule, train.warmup_ratio, train.weight_decay) == ("cosine", 0.03, 0.0)
        assert (train.adam_beta1, train.adam_beta2, train.adam_eps) == (0.9, 0.999, 1e-8)
    assert method.order == "helpful_first"
    assert config.constraint.beta == 0.1
    assert (config.constraint.form, config.constraint.thresholds) == ("absolute_utility", [0.0])
    assert (config.model.name, config.model.template, config.model.lora.rank) == ("alpaca_7b", "pku", 0)
    assert (config.model.max_length, config.model.max_prompt_length) == (512, 128)
    assert (config.dataset.name, config.hardware.dtype) == ("pku_saferlhf_30k_test", "bf16")
    assert config.model.sft is None


def test_table_3_has_beta_over_lambda_of_0_025() -> None:
    assert check("experiment=sacpo/table3_dpo_dpo")[1].beta_over_lambda == [0.025]


def test_p_sacpo_merges_three_weights_of_a_conservative_policy() -> None:
    _, method = check("experiment=sacpo/table3_p_sacpo")
    assert method.beta_over_lambda == [0.01]
    assert (method.q, method.reported_q) == ([0.25, 0.5, 0.75], 0.75)


def test_a_paper_s_experiment_is_not_credited_to_the_embedded_search() -> None:
    assert check("experiment=sacpo/table3_dpo_dpo")[0].tuned_by is None
    assert check("debug=tiny")[0].tuned_by is None


# ---------------------------------------------------------------- unknown names, wrong types


def test_an_unknown_setting_of_a_method_is_refused_with_the_known_ones() -> None:
    error = refusal("+method.foo=1")
    assert "foo" in error.what
    assert all(name in error.mend for name in ("order", "beta_over_lambda", "reward_step", "safety_step"))


def test_an_unknown_setting_deep_inside_a_method_is_refused() -> None:
    assert "lr" in refusal("+method.reward_step.train.lr=1").what


@pytest.mark.parametrize("override", ["hardware.zero=3", "dataset.world.prompts=3", "foo=1"])
def test_hydra_refuses_an_unknown_key_of_a_group(override: str) -> None:
    with pytest.raises(ConfigCompositionException):
        compose(override)


@pytest.mark.parametrize("override", ["+dataset.foo=1", "+constraint.lambda=1", "+model.sft.lr=1", "+foo=1"])
def test_an_unknown_key_that_is_forced_in_is_refused_by_name(override: str) -> None:
    error = refusal(override)
    assert override[1:].split("=")[0] in error.what + error.where


@pytest.mark.parametrize(
    "override",
    [
        "constraint.beta=abc",
        "constraint.thresholds=1",
        "constraint.utilities=safety",
        "constraint.thresholds=[a]",
        "seed=one",
        "seed=0.5",
        "plan=perhaps",
        "hardware.micro_batch=many",
        "model.sft.epochs=x",
    ],
)
def test_a_wrong_type_is_refused_when_composing_and_named(override: str) -> None:
    with pytest.raises(ConfigCompositionException, match=override.split("=")[0]):
        compose(override)


@pytest.mark.parametrize(
    "override", ["method.reward_step.train.epochs=x", "method.beta_over_lambda=0.5", "method.order=[a]"]
)
def test_a_wrong_type_in_a_method_is_refused_by_name(override: str) -> None:
    error = refusal(override)
    assert "method 'sacpo'" in error.what
    assert "conf/method/sacpo.yaml" in error.where


def test_an_unknown_option_lists_the_group_s_options() -> None:
    with pytest.raises(hydra.errors.MissingConfigException) as caught:
        compose("method=sacpoo")
    assert all(name in str(caught.value) for name in METHODS)


UNKNOWN = [
    ("method.name=foo", "method.name", ["dpo_helpful", "p_sacpo", "sacpo", "sft"]),
    ("evaluate.scorer=foo", "evaluate.scorer", ["gold", "none"]),
    ("model.template=foo", "model.template", ["chat", "pku", "plain"]),
    ("method.reward_step.loss=foo", "loss", ["dpo", "ipo", "kto"]),
    ("method.safety_step.loss=foo", "loss", ["dpo", "ipo", "kto"]),
    ("method.safety_step.kto_labels=foo", "method.safety_step.kto_labels", ["preferred", "is_safe"]),
    ("method.safety_step.train.schedule=foo", "method.safety_step.train.schedule", ["cosine", "linear"]),
    ("constraint.form=foo", "constraint.form", ["margin", "absolute_utility", "absolute_cost"]),
    ("method.order=foo", "method.order", ["helpful_first", "safe_first"]),
    ("hardware.zero_stage=4", "hardware.zero_stage", ["0", "1", "2", "3"]),
    ("hardware.dtype=fp16", "hardware.dtype", ["fp32", "bf16"]),
    ("hardware.device=tpu", "hardware.device", ["cpu", "cuda"]),
    ("hardware.offload=tape", "hardware.offload", ["none", "cpu"]),
    ("hardware.generator=hf", "hardware.generator", ["built_in", "vllm"]),
    ("tracking.mode=shared", "tracking.mode", ["online", "offline", "disabled"]),
    ("model.sft.schedule=foo", "model.sft.schedule", ["cosine", "linear", "constant"]),
    ("constraint.utilities=[honesty]", "constraint.utilities", ["safety", "politeness"]),
]


@pytest.mark.parametrize(("override", "where", "known"), UNKNOWN)
def test_an_unknown_name_is_refused_with_the_known_ones(override: str, where: str, known: list[str]) -> None:
    error = refusal(override)
    assert where in error.where
    assert all(name in error.mend for name in known)


def test_the_world_s_utilities_are_what_its_scorer_scores() -> None:
    assert {"reward", *WORLD_UTILITIES} == set(find_scorer("gold")(["how do I wash the hat?"], ["fill a bucket."]))


# ---------------------------------------------------------------- settings that contradict each other

OWN = ["dataset=files", PAIRS, "model=folder", OWN_MODEL, UNSCORED, STATED]
SHOWN = ["dataset=files_with_demonstrations", PAIRS, "dataset.files.demonstrations.path=shown.jsonl", UNSCORED, STATED]

# lengths of the embedded model, given here so that the refusals below do not hang on its defaults
LENGTHS = ["model.max_length=112", "model.max_prompt_length=40"]
SHAPE = ["model.architecture.hidden_size=128", "model.architecture.max_positions=256"]

CONTRADICTIONS: list[tuple[list[str], str, str]] = [
    # the constrained problem
    (["constraint.thresholds=[0.5,0.5]"], "constraint.thresholds", "one threshold per utility"),
    (
        ["constraint.utilities=[safety,politeness]", "constraint.thresholds=[1]"],
        "constraint.thresholds",
        "one threshold per utility",
    ),
    (["constraint.utilities=[safety,safety]", "constraint.thresholds=[1,1]"], "constraint.utilities", "once"),
    (["constraint.utilities=[]", "constraint.thresholds=[]"], "constraint.utilities", "at least one"),
    (["constraint.thresholds=[nan]"], "constraint.thresholds", "finite"),
    (["constraint.thresholds=[inf]"], "constraint.thresholds", "finite"),
    (["constraint.beta=0"], "constraint.beta", "> 0"),
    (["constraint.beta=-0.1"], "constraint.beta", "> 0"),
    (["constraint.beta=nan"], "constraint.beta", "> 0"),
    # hardware
    (["hardware.offload=cpu"], "hardware.offload", "hardware=gpu_zero3"),
    (["hardware.offload=cpu", "hardware.zero_stage=3"], "hardware.offload", "hardware.offload=none"),
    (["hardware=gpu", "hardware.offload=cpu"], "hardware.offload", "hardware.offload=none"),
    (["hardware.micro_batch=0"], "hardware.micro_batch", "raise"),
    (["hardware.attention=packed"], "hardware.attention", "packed_sdpa"),
    (["hardware.attention=packed_flex"], "hardware.attention", "packed_sdpa"),
    (["hardware.micro_tokens=0"], "hardware.micro_tokens", "raise"),
    (["hardware.generation_batch=0"], "hardware.generation_batch", "raise"),
    (["hardware.flops_per_second=0"], "hardware", "flops_per_second > 0"),
    (["hardware.memory_gib=0"], "hardware", "memory_gib > 0"),
    (["hardware.threads=-1"], "hardware", "threads >= 0"),
    # data
    (["dataset=files", PAIRS, "model=folder", OWN_MODEL], "evaluate.scorer", "evaluate=unscored"),
    (["dataset=files", PAIRS, UNSCORED], "model", "model=folder"),
    (["dataset=files", "dataset.files=null"], "dataset", "dataset=files"),
    ([*OWN, "debug=tiny"], "dataset", "debug=tiny"),
    (["dataset=files", PAIRS, OWN_MODEL, UNSCORED], "dataset.files.demonstrations", "model.sft=null"),
    (["dataset=files", PAIRS, OWN_MODEL, UNSCORED], "dataset.files.demonstrations", "files_with_demonstrations"),
    ([*OWN, "dataset.files.test_share=0.95"], "dataset.files", "0.05"),
    ([*OWN, "dataset.files.validation=loose"], "dataset.files.validation", "lenient"),
    (["dataset.world.test_prompts=0"], "dataset.world.test_prompts", "raise"),
    (["dataset.world.pairs_per_prompt=0"], "dataset.world.pairs_per_prompt", "raise"),
    # methods
    (["method.beta_over_lambda=[0.5,0.5]"], "method.beta_over_lambda", "one positive number per utility"),
    (["method.beta_over_lambda=[]"], "method.beta_over_lambda", "one positive number per utility"),
    (["method.beta_over_lambda=[0]"], "method.beta_over_lambda", "one positive number per utility"),
    (["method.beta_over_lambda=[-1]"], "method.beta_over_lambda", "one positive number per utility"),
    (["method=p_sacpo", "method.order=safe_first"], "method.order", "helpful_first"),
    (["method=p_sacpo", "method.reported_q=0.6"], "method.reported_q", "one of them"),
    (["method=p_sacpo", "method.q=[0.5,1.5]", "method.reported_q=0.5"], "method.q", "[0, 1]"),
    (["method=p_sacpo", "method.q=[-0.5]", "method.reported_q=-0.5"], "method.q", "[0, 1]"),
    (["method=p_sacpo", "method.q=[]"], "method.q", "[0, 1]"),
    (["method=dpo_helpful", "method.beta=0"], "method.beta", "positive"),
    (["method=dpo_safe", "method.beta=-1"], "method.beta", "positive"),
    # optimiser
    (["method.reward_step.train.learning_rate=0"], "method.reward_step.train.learning_rate", "positive"),
    (["method.safety_step.train.epochs=0"], "method.safety_step.train.epochs", "positive"),
    (["method=dpo_safe", "method.step.train.batch_size=0"], "method.step.train.batch_size", "positive"),
    (["model.sft.learning_rate=0"], "model.sft.learning_rate", "positive"),
    (["model.sft.learning_rate=inf"], "model.sft.learning_rate", "positive"),
    (["model.sft.learning_rate=nan"], "model.sft.learning_rate", "positive"),
    (["model.sft.warmup_ratio=1"], "model.sft.warmup_ratio", "[0, 1)"),
    (["model.sft.weight_decay=-1"], "model.sft.weight_decay", "not negative"),
    (["model.sft.adam_beta2=1"], "model.sft.adam_beta2", "[0, 1)"),
    # model and lengths
    ([*LENGTHS, "model.max_prompt_length=112"], "model.max_prompt_length", "room"),
    (["model.max_prompt_length=0"], "model.max_prompt_length", "room"),
    ([*LENGTHS, "model.max_prompt_length=111"], "sampling.max_new_tokens", "raise model.max_length"),
    ([*LENGTHS, "evaluate.sampling.max_new_tokens=73"], "evaluate.sampling.max_new_tokens", "raise model.max_length"),
    (
        [*LENGTHS, "dataset.world.sampling.max_new_tokens=73"],
        "dataset.world.sampling.max_new_tokens",
        "lower max_new_tokens",
    ),
    ([*SHAPE, "model.max_length=257"], "model.max_length", "max_positions"),
    ([*SHAPE, "model.architecture.heads=3", "model.architecture.kv_heads=3"], "model.architecture", "multiple"),
    ([*SHAPE, "model.architecture.heads=4", "model.architecture.kv_heads=3"], "model.architecture", "multiple"),
    (["model.sft=null"], "model.path", "keep model.sft"),
    (["model.lora.rank=4"], "model.lora", "at least one target"),
    (["model=handbook_llama_lora", "model.lora.targets=[]"], "model.lora", "at least one target"),
    (["model=handbook_llama_lora", "model.lora.dropout=1"], "model.lora", "dropout < 1"),
    (["model=handbook_llama_lora", "model.lora_for_sft=true"], "model.lora_for_sft", "model.lora_for_sft=false"),
    # sampling and evaluation
    (["evaluate.sampling.temperature=0"], "evaluate.sampling", "temperature > 0"),
    (["dataset.world.sampling.temperature=0"], "dataset.world.sampling", "temperature > 0"),
    (["evaluate.sampling.top_p=0"], "evaluate.sampling", "top_p"),
    (["evaluate.sampling.top_p=1.1"], "evaluate.sampling", "top_p"),
    (["evaluate.sampling.max_new_tokens=0"], "evaluate.sampling", "max_new_tokens >= 1"),
    (["evaluate.split=train"], "evaluate.split", "evaluate.split=test"),
    (["evaluate.level=1"], "evaluate", "level < 1"),
    (["evaluate.resamples=10"], "evaluate", "100 resamples"),
    (["evaluate.samples_per_prompt=0"], "evaluate", "one sample per prompt"),
    (["evaluate.every_steps=-1"], "evaluate", "every_steps >= 0"),
    (["evaluate.every_examples=0"], "evaluate.every_examples", "null: all"),
]


@pytest.mark.parametrize(("overrides", "where", "mend"), CONTRADICTIONS, ids=lambda value: str(value)[:60])
def test_a_contradiction_is_refused_with_its_place_and_its_mend(overrides: list[str], where: str, mend: str) -> None:
    error = refusal(*overrides)
    assert where in error.where
    assert mend in error.mend
    assert error.what


@pytest.mark.parametrize(
    "overrides",
    [
        OWN,
        [*SHOWN, "model=folder", OWN_MODEL],
        [*SHOWN, "model=handbook_llama", OWN_MODEL, "model.sft.learning_rate=1e-5", "model.max_length=2048"],
        ["constraint.utilities=[politeness]"],
        ["constraint.utilities=[safety,politeness]", "constraint.thresholds=[0.5,0]", "method.beta_over_lambda=[1,1]"],
        ["method=p_sacpo", "method.q=[0,1]", "method.reported_q=1"],
        ["hardware=gpu_zero3", "hardware.zero_stage=1"],
        ["constraint.thresholds=[-0.5]"],
        [*LENGTHS, "evaluate.sampling.max_new_tokens=72"],
        [*SHAPE, "model.max_length=256"],
        ["model.lora_for_sft=true"],
        ["evaluate=unscored"],
    ],
    ids=str,
)
def test_what_is_unusual_but_sound_passes(overrides: list[str]) -> None:
    check(*overrides)


def test_half_given_fine_tuning_of_an_own_model_says_how_to_leave_it_out() -> None:
    error = refusal("model=folder", OWN_MODEL, "debug=tiny")
    assert "model.sft.learning_rate" in error.what
    assert "model.sft=null" in error.mend


def attempt(folder: Path, *overrides: str) -> AlignbenchError:
    """The error of a whole run, which must have left nothing in the store."""
    paths = (f"output_dir={folder}/outputs", f"store_dir={folder}/store", "tracking=disabled")
    with pytest.raises(AlignbenchError) as caught:
        execute(compose(*overrides, *paths))
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    return caught.value


def test_a_missing_search_file_is_refused_before_anything_runs(tmp_path: Path) -> None:
    error = attempt(tmp_path, "debug=tiny", "tuned_by=sweeps/no_such_search.json")
    assert "no_such_search.json" in error.what
    assert error.where == "tuned_by"
    assert error.mend.startswith("tuned_by=null")


def test_a_hub_model_without_a_revision_is_refused_before_anything_runs(tmp_path: Path) -> None:
    pinned = [f"dataset.files.{table}.revision=v1" for table in ("pairs", "prompts")]
    error = attempt(tmp_path, "experiment=sacpo/table3_dpo_dpo", *pinned)
    assert error.where == "model.revision"
    assert "model.revision=" in error.mend


def test_a_hub_data_set_without_a_revision_is_refused_before_anything_runs(tmp_path: Path) -> None:
    error = attempt(tmp_path, "experiment=sacpo/table3_dpo_dpo", f"model.revision={'0' * 40}")
    assert "PKU-SafeRLHF-30K" in error.what
    assert "revision" in error.mend


def test_a_model_folder_that_is_not_there_is_refused_before_anything_runs(tmp_path: Path) -> None:
    error = attempt(tmp_path, "model=folder", f"model.path={tmp_path}/nothing")
    assert error.where == "model.path"


@pytest.mark.parametrize(
    "override",
    ["dataset.world.risky_fraction=2", "dataset.world.validation_prompts=-1", "dataset.world.train_prompts=1000000"],
)
def test_a_world_that_cannot_be_is_refused_before_anything_runs(tmp_path: Path, override: str) -> None:
    error = attempt(tmp_path, override)
    assert override.split("=")[0].rsplit(".", 1)[1] in error.where
    assert error.mend
