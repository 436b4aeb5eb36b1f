"""The papers' presets: each is valid and plans offline; its values are the papers'; its twin has its structure."""

from __future__ import annotations

import math
import re
import socket
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from tiny_runs import TOP, run

from alignbench import presets
from alignbench.cli import CONF, register
from alignbench.config import resolve, run_id, validate
from alignbench.errors import AlignbenchError
from alignbench.gpus import PEAK_FLOPS, UTILISATION, added, gpu_seconds, sentence
from alignbench.lab import Node
from alignbench.methods import METHODS
from alignbench.pins import UNPINNED, plan_unpinned
from alignbench.plan import PlanLab, check_fits, graph_of, union_of
from alignbench.presets import PAPERS, plan_of, points
from alignbench.report.published import published
from alignbench.run import execute
from alignbench.stages.stage import Estimate

EXPERIMENTS = CONF / "experiment"
PRESETS = presets.preset_names()
SCALES = ("paper", "embedded")
# what a comment says of where a value comes from; the README explains the words
TAG = re.compile(r"\[[^\]]*\b(paper|figure|code|notebook|reviews|inferred|ours)\b[^\]]*\]")


@cache
def composed(preset: str, *overrides: str) -> tuple[DictConfig, dict[str, list[Any]]]:
    return presets.composed(preset, *overrides)


def at(scale: str) -> tuple[str, ...]:
    return () if scale == "paper" else (f"scale={scale}",)


def config_of(preset: str, *overrides: str) -> DictConfig:
    return composed(preset, *overrides)[0]


@cache
def plan(preset: str, scale: str) -> PlanLab:
    return plan_of(config_of(preset, *at(scale)))


# ---------------------------------------------------------------- every preset


def test_every_paper_has_presets() -> None:
    assert all(any(preset.startswith(f"{paper}/") for preset in PRESETS) for paper in PAPERS)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_valid_and_plans_without_network_weights_or_data(
    preset: str, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a plan went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    lab = plan(preset, scale)
    check_fits(lab)
    assert lab.nodes
    assert all(node.artifact is None for node in lab.nodes.values())
    if scale == "embedded":
        assert lab.config.hardware.device == "cpu"
        assert lab.config.model.path is None
        assert lab.config.dataset.files is None  # nothing to download
        assert sum(e.flops for e in lab.estimates.values()) < 1e14  # minutes on two cores
    else:
        gpu = union_of([graph_of(lab)])["gpu"]
        assert set(gpu) == set(PEAK_FLOPS)
        assert all(math.isfinite(s) and s > 0 for s in gpu.values())
        assert lab._shape.hidden_size == 4096  # 7B models, from the shape that the configuration states


@pytest.mark.parametrize("preset", PRESETS)
def test_a_twin_has_the_stages_of_its_preset(preset: str) -> None:
    # where the data come from, and what the embedded world makes itself
    sources = {"read", "lengths", "fit", "world", "base", "sft", "label", "select", "some_prompts", "bring_scorer"}

    def stages(scale: str) -> list[tuple[str, Any]]:
        found = []
        for node in plan(preset, scale).nodes.values():
            name = {"score_columns": "score"}.get(node.stage.name, node.stage.name)
            if name not in sources and node.label not in ("sample pairs", "score pairs"):
                found.append((name, structure(node)))
        return found

    assert stages("embedded") == stages("paper")


def structure(node: Node) -> Any:
    """What a stage's kind of work is, without its numbers."""
    spec = node.identity.spec
    if node.stage.name == "prefer":
        # pi_ref is brought in by one, and fine-tuned by the other
        from_, against = (node.inputs[role].label.replace("base", "sft") for role in ("start", "reference"))
        adapters = spec.lora if spec.lora.rank else None
        return spec.loss, spec.kto_labels, spec.soft, adapters, spec.round, from_, against
    if node.stage.name == "merge":
        return spec.weights
    if node.stage.name == "relabel":
        return spec.kind
    return None


@pytest.mark.parametrize("preset", PRESETS)
def test_a_twin_has_as_many_grid_points(preset: str) -> None:
    paper, embedded = (composed(preset, *at(scale))[1] for scale in SCALES)
    assert {key: len(values) for key, values in embedded.items()} == {key: len(v) for key, v in paper.items()}
    assert all(len(set(map(str, values))) == len(values) for values in [*paper.values(), *embedded.values()])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_first_point_of_a_grid_is_the_single_run_and_the_last_is_valid_too(preset: str, scale: str) -> None:
    config, grid = composed(preset, *at(scale))
    if scale == "paper":  # embedded values are of the same kind
        (last,) = points(config, {key: values[-1:] for key, values in grid.items()})
        validate(*resolve(last))
    for key, values in grid.items():
        single = OmegaConf.select(config, key)
        if key == "method.beta":  # null takes the problem's
            single = config.constraint.beta
        if not key.startswith("method.dual."):  # lambda* against the size of the bank: from small to large
            assert single == values[0], key


# ---------------------------------------------------------------- comments


def untagged(text: str) -> list[str]:
    """Keys with a value whose comment names no source."""
    lines = text.splitlines()
    found = []

    def comment(line: int) -> str:
        above = []
        while line and lines[line - 1].strip().startswith("#"):
            line -= 1
            above.append(lines[line])
        return " ".join(word.strip(" #") for word in reversed(above))

    def walk(node: yaml.Node, path: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            if path == "" and key.value == "defaults":
                continue
            if isinstance(value, yaml.MappingNode):
                walk(value, f"{path}{key.value}.")
            elif not TAG.search(comment(key.start_mark.line)):
                found.append(f"{path}{key.value}")

    node = yaml.compose(text)
    if node is not None:
        walk(node, "")
    return found


@pytest.mark.parametrize(
    "path",
    [p for folder in (*PAPERS, "parts") for p in sorted((EXPERIMENTS / folder).glob("*.yaml"))],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_every_value_names_its_source(path: Path) -> None:
    assert untagged(path.read_text()) == []


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("# x [paper]\na: 1\n", []),
        ("# x\na: 1\n", ["a"]),
        ("# x [of the paper, Table 3;\n# code]\na: 1\n", []),
        ("# x [paper]\na:\n  # y\n  b: 1\n", ["a.b"]),
        ("# x [0.1]\na: 1\n", ["a"]),
    ],
)
def test_the_search_for_sources_itself(text: str, bare: list[str]) -> None:
    assert untagged(text) == bare


# ---------------------------------------------------------------- the papers' values

# preset -> key below the whole configuration -> value, from the facts of the papers and their code
FACTS: dict[str, dict[str, Any]] = {
    "sacpo/table3_dpo_dpo": {
        "model.name": "alpaca_7b",
        "model.lora.rank": 0,
        "model.max_length": 512,
        "model.max_prompt_length": 128,
        "dataset.name": "pku_saferlhf_30k_test",
        "dataset.files.expected_pairs": 26873,
        "dataset.files.validation_share": 0.0,  # all rows train
        "constraint.beta": 0.1,
        "method.beta_over_lambda": [0.025],
        "method.reward_step.train.learning_rate": 2e-5,
        "method.reward_step.train.epochs": 3,
        "method.reward_step.train.batch_size": 256,
        "method.reward_step.train.warmup_ratio": 0.03,
        "method.safety_step.train.batch_size": 64,
        "grid": {"method.beta_over_lambda": [[0.025], [0.01], [0.05], [0.1]]},
    },
    "sacpo/table3_dpo_kto": {"method.safety_step.loss": "kto", "method.safety_step.kto_labels": "is_safe"},
    "sacpo/table3_kto_dpo": {"method.reward_step.loss": "kto", "method.safety_step.loss": "dpo"},
    "sacpo/table3_kto_helpful": {"method.step.loss": "kto", "constraint.beta": 0.1},
    "sacpo/table3_safe_first": {
        "method.order": "safe_first",
        "method.beta_over_lambda": [0.01],
        "method.safety_step.train.batch_size": 256,
        "method.reward_step.train.batch_size": 64,
        "grid": {"method.beta_over_lambda": [[0.01]], "constraint.beta": [0.01, 0.025, 0.05, 0.1]},
    },
    "sacpo/table3_dpo_safe": {"method.beta": 0.01},
    "sacpo/table3_p_sacpo": {"method.beta_over_lambda": [0.01], "method.q": [0.25, 0.5, 0.75]},
    "sacpo/table3_naive_merge": {"method.beta_safe": 0.01, "constraint.beta": 0.1, "method.q": [0.25, 0.5, 0.75]},
    "sacpo/appendix_h_llama2": {
        "model.sft.learning_rate": 5e-7,
        "model.sft.epochs": 0.622,  # 100,000 of 160,800 dialogues
        "method.reward_step.train.learning_rate": 5e-6,
        "method.safety_step.train.epochs": 2,
        "grid": {"method.beta_over_lambda": [[0.1], [0.05]]},
    },
    "sacpo/appendix_h_pythia": {
        "model.sft.epochs": 2,
        "constraint.beta": 0.05,
        "method.reward_step.train.learning_rate": 1e-6,
        "method.safety_step.train.learning_rate": 5e-6,
        "method.safety_step.train.epochs": 1,
    },
    "can/figure3_mocan": {
        "model.lora.rank": 8,
        "model.lora.alpha": 16.0,
        "model.lora.dropout": 0.05,
        "method.step.train.learning_rate": 5e-4,
        "method.step.train.epochs": 3,
        "method.step.train.batch_size": 16,
        "method.step.train.warmup_ratio": 0.1,
        "method.step.train.weight_decay": 0.05,
        "method.step.labels": "bernoulli",
        "method.dual.samples": 128,
        "method.dual.scorer": "beaver_v1",
        "constraint.beta": 0.1,
        "evaluate.samples_per_prompt": 2,
        "evaluate.resamples": 1000,
        "evaluate.sampling.top_p": 0.9,
        "grid": {"method.multipliers": [[0.75], [0.1], [0.35], [0.5], [0.9], [1.13], [1.25], [2.0]]},
    },
    "can/figure3_mocan_code": {
        "model.lora.dropout": 0.0,
        "method.step.train.weight_decay": 0.0,
        "method.dual.solver": "can-2024",
        "method.multipliers": [0.7547],
    },
    "can/figure3_pecan": {
        "method.compat": None,
        "method.dual.samples": 192,
        "grid": {"method.multipliers": [[1.0], [0.15], [0.32], [3.2]]},
    },
    "can/figure3_pecan_code": {"method.compat": "can-2024", "method.align.train.weight_decay": 0.0},
    "can/figure3_pecan_beta": {"constraint.beta": 0.025, "method.beta_reward": 0.1},
    "can/figure3_dpo_safe": {"grid": {"method.beta": [0.1, 0.01]}},
    "can/table4_mocan": {
        "method.multipliers": None,
        "grid": {"constraint.thresholds": [[2.8], [-1.4], [0.1], [1.2], [3.5], [4.2], [4.5], [5.4]]},
    },
    "can/figure1_dual": {
        "constraint.form": "absolute_utility",
        "grid": {"constraint.thresholds": [[0.5], [-2.0], [-0.75], [1.75], [3.0]]},
    },
    "caid/table4_mocaid": {
        "method.iterations": 4,
        "method.step.train.epochs": 1,
        "method.step.train.batch_size": 35,
        "method.step.train.learning_rate": 5e-4,
        "method.dual.prompts": 600,
        "method.dual.samples": 64,
        "method.on_policy_samples": 64,
        "constraint.beta": 0.1,
        "grid": {"constraint.thresholds": [[5.0], [3.0], [4.0], [6.0], [7.0], [8.0], [9.0]]},
    },
    "caid/table4_mocan": {"method.step.train.epochs": 4, "method.step.train.batch_size": 32},
    "caid/table6_mocaid": {
        "method.iterations": 3,
        "method.step.train.learning_rate": 5e-5,
        "method.step.train.batch_size": 15,
        "constraint.utilities": ["safety", "humor"],
        "evaluate.prompts": 2000,
        "evaluate.samples_per_prompt": 2,
        "dataset.files.prompts.split": "test",
        "dataset.files.test_share": 0.0,
    },
    "pd_dpo/figure1_fixed": {"method.initial": [5.0], "method.rounds": 1, "constraint.form": "absolute_cost"},
}


@pytest.mark.parametrize("preset", sorted(FACTS))
def test_a_preset_has_the_published_values(preset: str) -> None:
    config, grid = composed(preset)
    for key, value in FACTS[preset].items():
        if key == "grid":
            assert grid == value
            continue
        node = OmegaConf.select(config, key)
        assert (OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node) == value, key


def test_caid_s_grid_of_two_constraints_is_the_paper_s() -> None:
    pairs = composed("caid/table6_mocaid")[1]["constraint.thresholds"]
    assert len(pairs) == 14
    assert all(pair in pairs for pair in ([0.1, 0.45], [0.3, 1.2], [0.55, 0.9], [0.65, 0.35], [1.0, 1.0]))


# rows that train (all but the validation share), and the training whose warm-up the papers give as 100 steps
WARMED_UP = {
    "caid/figure1_dpo_helpful": "step",
    "caid/table4_mocaid": "step",
    "caid/table4_mocan": "step",
    "caid/table4_pecaid": "align",
    "caid/table6_mocaid": "step",
    "caid/table6_mocan": "step",
    "can/figure3_mocan_code": "step",
    "can/figure3_pecan_code": "align",
}


@pytest.mark.parametrize("preset", sorted(WARMED_UP))
def test_a_hundred_steps_of_warm_up_are_a_hundred(preset: str) -> None:
    config = config_of(preset)
    train, files = config.method[WARMED_UP[preset]].train, config.dataset.files
    rows = files.expected_pairs * (1 - files.validation_share - files.test_share)
    steps = math.ceil(rows * train.epochs / train.batch_size)
    assert train.warmup_ratio * steps == pytest.approx(100, abs=2)


def test_can_s_figure_4_has_its_grid() -> None:
    by_responses, by_prompts = composed("can/figure4_responses")[1], composed("can/figure4_prompts")[1]
    assert len(by_responses["constraint.thresholds"]) == len(by_prompts["constraint.thresholds"]) == 8
    assert by_responses["method.dual.samples"] == list(range(48, 193, 8))
    assert by_prompts["method.dual.prompts"] == list(range(100, 1401, 100))


# ---------------------------------------------------------------- scale


@pytest.mark.parametrize("method", sorted({*METHODS, "pd_dpo_v1"}))
def test_the_embedded_scale_of_a_method_is_its_own_default(method: str) -> None:
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        plain = hydra.compose("config", overrides=[f"method={method}"])
        scaled = hydra.compose("config", overrides=[f"method={method}", "scale=embedded"])
    assert OmegaConf.to_container(scaled) == OmegaConf.to_container(plain) | {"scale": "embedded"}
    assert run_id(scaled) == run_id(plain)  # only the numbers name a run


def test_every_method_of_a_preset_has_an_embedded_part() -> None:
    parts = {path.stem for path in (CONF / "scale" / "parts").glob("*.yaml")}
    assert {f"embedded_{config_of(preset).method.name}" for preset in PRESETS} <= parts


# ---------------------------------------------------------------- plans of what is not pinned, and of GPUs not here


def test_a_plan_says_what_a_run_needs_and_a_run_refuses_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [f"store_dir={tmp_path}/store", f"output_dir={tmp_path}/out"]
    assert execute(config_of("can/figure3_mocan", *own)) == 0.0
    text = capsys.readouterr().out
    assert "to be given before a run: model.revision, dataset.files.pairs.revision" in text
    assert "scorers.beaver_v1.columns.safety.revision" in text
    assert "estimate, not measured: 8 x A100-80GB" in text
    with pytest.raises(AlignbenchError, match="revision"):
        execute(config_of("can/figure3_mocan", *own, "plan=false"))
    assert not list(tmp_path.rglob("*.json"))


def test_a_given_revision_is_kept_in_a_plan() -> None:
    config, settings = resolve(config_of("sacpo/table3_dpo_dpo", "model.revision=abc"))
    assert plan_unpinned(config, settings) == ["dataset.files.pairs.revision", "dataset.files.prompts.revision"]
    assert (config.model.revision, config.dataset.files.pairs.revision) == ("abc", UNPINNED)


def test_gpu_seconds_are_flops_over_peak_and_assumed_utilisation() -> None:
    training = gpu_seconds(Estimate(trained_tokens=1.0, flops=312e12 * UTILISATION["training and log-probs"]))
    sampling = gpu_seconds(Estimate(generated_tokens=1.0, flops=989e12 * UTILISATION["sampling"]))
    assert training["A100-80GB"] == pytest.approx(1.0)
    assert sampling["H100"] == pytest.approx(1.0)
    assert added([training, sampling])["H100"] == pytest.approx(1.0 + 312 / 989)
    text = sentence({"A100-80GB": 8 * 3600.0})
    assert all(part in text for part in ("8 x A100-80GB 8.0 GPU-hours (1.0 h)", "30%", "5%"))


def test_a_preset_s_cost_is_near_what_its_paper_reports() -> None:
    # CAID's hours per policy are on eight A6000 (155e12 dense bf16): within a factor of two
    (reported_hours,) = [row.cells[1].value for row in published().table("caid/cost").rows if row.cells[1]]
    hours = union_of([graph_of(plan("caid/table4_mocaid", "paper"))])["gpu"]["A100-80GB"] / 3600
    reported = reported_hours * 8 * 155 / 312
    assert reported / 2 < hours < reported * 2


# ---------------------------------------------------------------- end to end

END_TO_END = {
    "sacpo/table3_naive_merge": ["sft", "step reward", "step safety", "naive_merge q=0.25", "naive_merge q=0.75"],
    "can/figure3_pecan_code": ["sft", "aligned reward", "aligned safety", "pecan"],
    "can/figure1_dual": ["sft"],
    "caid/table6_mocaid": ["sft", "iterate 1", "mocaid"],
    "pd_dpo/figure1_fixed": ["sft", "step reward", "pd_dpo"],
}


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted(END_TO_END))
def test_a_twin_runs_end_to_end(preset: str, tmp_path: Path) -> None:
    base = (f"experiment={preset}", "scale=embedded", "debug=tiny", "hardware.threads=1", "tracking=disabled")
    done = run(tmp_path / "store", tmp_path / "out", base=base)
    assert set(END_TO_END[preset]) <= set(done.record["rows"])
    for row in done.record["rows"].values():
        assert math.isfinite(row["metrics"]["reward"]["mean"])


def test_every_preset_stands_in_the_readme_s_table() -> None:
    text = (TOP / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## The papers' experiments") :]
    assert all(f"`{preset}`" in table for preset in PRESETS)
