"""The plan: the stages of a real run, nothing computed, estimates that move the right way, refusals in time."""

from __future__ import annotations

import copy
import math
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig
from rich.console import Console

from alignbench.cli import CONF, register
from alignbench.config import problem_of, resolve, run_id, validate
from alignbench.errors import ConfigError
from alignbench.lab import Lab
from alignbench.methods import METHODS, find_method
from alignbench.plan import START_SECONDS, PlanLab, check_fits, graph_of, memory_limit, seconds_of, show_union, union_of
from alignbench.record import read_records
from alignbench.run import _geometries, execute
from alignbench.stages.policies import PreferSpec
from alignbench.stages.stage import Estimate, Facts, Runtime, training_cost
from alignbench.store import Store
from alignbench.tracking import Tracker

PINNED = ["model.revision=" + "0" * 40, "dataset.files.pairs.revision=v1", "dataset.files.prompts.revision=v1"]


@cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", overrides=[*overrides, "tracking=disabled"])


def compose(folder: Path, *overrides: str) -> DictConfig:
    """The configuration of `python main.py OVERRIDES` with its files below `folder`."""
    composed = copy.deepcopy(_composed(overrides))
    composed.output_dir, composed.store_dir = f"{folder}/outputs", f"{folder}/store"
    return composed


def plan(folder: Path, *overrides: str) -> PlanLab:
    """A planning lab that has gone through the method and the evaluation of all its policies."""
    return walk(PlanLab, compose(folder, *overrides))


def walk(kind: type[PlanLab], composed: DictConfig) -> PlanLab:
    config, method = resolve(composed)
    validate(config, method)
    folder = Path(config.output_dir)
    tracker = Tracker(config.tracking, run_id=run_id(composed), group="", job_type="", config={}, folder=folder)
    lab = kind(config, Store(Path(config.store_dir)), tracker)
    problem = problem_of(config.constraint)
    outcome = find_method(method.name).recipe(lab, problem, method)
    for name, policy in ({"sft": lab.reference()} | outcome.policies).items():
        lab.evaluate(policy, problem, label=name)
    _geometries(lab)
    return lab


@dataclass
class Totals:
    """Sums over a plan's stages, and the largest memory."""

    trained: float
    generated: float
    scored: float
    flops: float
    memory: float
    sampling_memory: float


def totals(lab: PlanLab) -> Totals:
    parts = lab.estimates.values()
    return Totals(
        sum(e.trained_tokens for e in parts),
        sum(e.generated_tokens for e in parts),
        sum(e.scored_tokens for e in parts),
        sum(e.flops for e in parts),
        max(e.memory_bytes for e in parts),
        memory_of(lab, "sample"),
    )


def memory_of(lab: PlanLab, *stages: str) -> float:
    """The largest memory among the stages of these names."""
    return max(lab.estimates[key].memory_bytes for key, node in lab.nodes.items() if node.stage.name in stages)


def training_memory(lab: PlanLab) -> float:
    return memory_of(lab, "sft", "prefer")


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# ---------------------------------------------------------------- a plan computes nothing


def test_a_plan_lists_every_stage_as_to_run_and_computes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert execute(compose(tmp_path, "debug=tiny", "plan=true")) == 0.0
    text = capsys.readouterr().out
    lab = plan(tmp_path, "debug=tiny")
    assert text.count("to run") == len(lab.nodes) + 1  # every stage, and the line of totals
    assert f"to run: {len(lab.nodes)} of {len(lab.nodes)}" in text
    assert text.count("cached") == 1  # the caption
    assert all(f" {node.label} " in text for node in lab.nodes.values())
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_can_be_planned_and_names_its_policies(tmp_path: Path, method: str) -> None:
    lab = plan(tmp_path, "debug=tiny", f"method={method}")
    labels = [node.label for node in lab.nodes.values()]
    assert labels[:3] == ["world", "base", "sft"]
    assert "evaluate sft" in labels
    assert len(set(labels)) == len(labels)
    assert files_below(tmp_path) == []


def test_inputs_of_a_stage_are_rows_above_it(tmp_path: Path) -> None:
    lab = plan(tmp_path, "debug=tiny", "method=p_sacpo")
    order = list(lab.nodes)
    for key, node in lab.nodes.items():
        assert all(order.index(source.key) < order.index(key) for source in node.inputs.values())


def test_sacpo_s_second_step_starts_from_and_is_referenced_to_the_first(tmp_path: Path) -> None:
    lab = plan(tmp_path, "debug=tiny", "constraint.beta=0.5", "method.beta_over_lambda=[0.25]")
    first, second = (node for node in lab.nodes.values() if node.stage.name == "prefer")
    assert first.inputs["start"] is first.inputs["reference"] is lab.reference()
    assert second.inputs["start"] is second.inputs["reference"] is first
    assert [n.identity.spec.objective for n in (first, second)] == ["reward", "safety"]
    assert [n.identity.spec.beta for n in (first, second)] == [0.5, 0.25]


def test_methods_share_the_stages_that_they_have_in_common(tmp_path: Path) -> None:
    helpful, stepwise = plan(tmp_path, "debug=tiny", "method=dpo_helpful"), plan(tmp_path, "debug=tiny")
    shared = {node.label for key, node in helpful.nodes.items() if key in stepwise.nodes}
    assert {"world", "sft", "label pairs", "prefer reward", "evaluate sft"} <= shared


def test_a_sweep_over_thresholds_repeats_only_what_hangs_on_them(tmp_path: Path) -> None:
    def repeated(*overrides: str) -> list[str]:
        lab = [plan(tmp_path, "debug=tiny", f"constraint.thresholds=[{t}]", *overrides) for t in (0.5, 0.75)]
        return [node.label for key, node in lab[1].nodes.items() if key not in lab[0].nodes]

    rows = ["evaluate sft", "evaluate step reward", "evaluate sacpo"]
    assert repeated("method.beta_over_lambda=[0.5]") == rows
    # with the dual's multiplier the second step hangs on them too; the bank and the first step do not
    own = [f"{what} sacpo" for what in ("predict", "sample", "score", "log-probs", "log-probs of sft on")]
    assert sorted(repeated()) == sorted(["dual", "geometry of dual", "prefer reward -> safety", *own, *rows])


@pytest.mark.parametrize(
    "override", ["hardware.micro_batch=4", "hardware=cpu_zero2", "plan=true", "hardware.threads=1"]
)
def test_what_changes_no_number_changes_no_key(tmp_path: Path, override: str) -> None:
    assert list(plan(tmp_path, "debug=tiny", override).nodes) == list(plan(tmp_path, "debug=tiny").nodes)


@pytest.mark.parametrize(
    ("override", "unchanged"),
    [
        ("seed=11", {"world"}),
        ("dataset.seed=11", set()),
        ("hardware.dtype=bf16", {"world", "base"}),
        ("model.architecture.layers=3", {"world"}),
        ("model=handbook_llama_lora", {"world", "base", "sft", "sample pairs", "label pairs", "evaluate sft"}),
        ("evaluate.samples_per_prompt=3", {"world", "base", "sft", "prefer reward", "prefer reward -> safety"}),
    ],
)
def test_what_changes_numbers_changes_the_keys_that_it_touches(
    tmp_path: Path, override: str, unchanged: set[str]
) -> None:
    before, after = plan(tmp_path, "debug=tiny"), plan(tmp_path, "debug=tiny", override)
    kept = {node.label for key, node in after.nodes.items() if key in before.nodes}
    assert unchanged <= kept
    assert not {"evaluate sacpo", "log-probs sacpo"} & kept
    if unchanged <= {"world", "base"}:
        assert kept == unchanged


# ---------------------------------------------------------------- estimates


def test_estimates_are_finite_and_not_negative(tmp_path: Path) -> None:
    lab = plan(tmp_path, "method=p_sacpo")
    for key, node in lab.nodes.items():
        e = lab.estimates[key]
        for value in (e.trained_tokens, e.generated_tokens, e.scored_tokens, e.flops, e.memory_bytes):
            assert math.isfinite(value)
            assert value >= 0
        assert seconds_of(e, lab.config.hardware) > 0
        if node.stage.name in ("sft", "prefer"):
            assert min(e.trained_tokens, e.flops, e.memory_bytes) > 0
        if node.stage.name == "sample":
            assert min(e.generated_tokens, e.flops, e.memory_bytes) > 0
        if node.stage.name == "logprobs":
            assert min(e.scored_tokens, e.flops, e.memory_bytes) > 0


MORE: list[tuple[str, str, Callable[[Totals], float]]] = [
    ("method.reward_step.train.epochs=1", "method.reward_step.train.epochs=3", lambda t: t.trained),
    ("model.sft.epochs=1", "model.sft.epochs=2", lambda t: t.trained),
    ("dataset.world.train_prompts=100", "dataset.world.train_prompts=200", lambda t: t.trained),
    ("dataset.world.pairs_per_prompt=2", "dataset.world.pairs_per_prompt=4", lambda t: t.generated),
    ("evaluate.samples_per_prompt=2", "evaluate.samples_per_prompt=4", lambda t: t.generated),
    ("dataset.world.test_prompts=32", "dataset.world.test_prompts=64", lambda t: t.scored),
    ("method.safety_step.loss=dpo", "method.safety_step.loss=kto", lambda t: t.scored),
    ("model.architecture.layers=2", "model.architecture.layers=8", lambda t: t.flops),
    ("model.architecture.layers=2", "model.architecture.layers=8", lambda t: t.memory),
    ("hardware.generation_batch=64", "hardware.generation_batch=256", lambda t: t.sampling_memory),
    ("method=dpo_helpful", "method=sacpo", lambda t: t.trained),
    ("method=sft", "method=dpo_helpful", lambda t: t.flops),
]


@pytest.mark.parametrize(("less", "more", "figure"), MORE, ids=[f"{a} < {b}" for a, b, _ in MORE])
def test_more_work_is_estimated_as_more(
    tmp_path: Path, less: str, more: str, figure: Callable[[Totals], float]
) -> None:
    assert 0 < figure(totals(plan(tmp_path, less))) < figure(totals(plan(tmp_path, more)))


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ("hardware.micro_batch=4", "hardware.micro_batch=32"),
        ("hardware.activation_checkpointing=true", "hardware.activation_checkpointing=false"),
        ("model.architecture.hidden_size=128", "model.architecture.hidden_size=512"),
    ],
)
def test_training_memory_moves_with_batch_checkpointing_and_width(tmp_path: Path, less: str, more: str) -> None:
    assert training_memory(plan(tmp_path, less)) < training_memory(plan(tmp_path, more))


def prefer_memory(lab: PlanLab) -> float:
    return max(e.memory_bytes for k, e in lab.estimates.items() if isinstance(lab.nodes[k].identity.spec, PreferSpec))


PAPER = ["experiment=sacpo/table3_dpo_dpo", *PINNED]


def test_adapters_need_less_memory_than_all_weights(tmp_path: Path) -> None:
    lora = ["model.lora.rank=16", "model.lora.targets=[q_proj,k_proj,v_proj,o_proj]", "hardware.offload=none"]
    full = prefer_memory(plan(tmp_path, *PAPER, "hardware.offload=none"))
    assert prefer_memory(plan(tmp_path, *PAPER, *lora)) < 0.5 * full


def test_offload_needs_less_device_memory(tmp_path: Path) -> None:
    one = (*PAPER, "hardware=gpu_zero3")
    full = prefer_memory(plan(tmp_path, *one, "hardware.offload=none"))
    assert prefer_memory(plan(tmp_path, *one)) < 0.5 * full


@given(
    parameters=st.floats(1e3, 1e11),
    share=st.floats(0.001, 0.9),
    tokens=st.floats(1, 1e9),
    factor=st.floats(1.01, 100),
)
@settings(max_examples=50, deadline=None)
def test_training_cost_is_monotone(parameters: float, share: float, tokens: float, factor: float) -> None:
    def cost(size: float, trainable: float, count: float) -> tuple[float, float]:
        return training_cost(
            start=Facts(parameters=size),
            trainable=trainable,
            positions=count,
            row_tokens=100,
            batch=8,
            runtime=runtime(),
        )

    flops, memory = cost(parameters, parameters, tokens)
    assert min(flops, memory) > 0
    assert cost(parameters, parameters, tokens * factor) == (pytest.approx(flops * factor), memory)
    assert all(
        a > b for a, b in zip(cost(parameters * factor, parameters * factor, tokens), (flops, memory), strict=True)
    )
    assert all(a < b for a, b in zip(cost(parameters, parameters * share, tokens), (flops, memory), strict=True))


@cache
def runtime() -> Runtime:
    config, _ = resolve(_composed(()))
    return Runtime(config.hardware)


def test_seconds_are_overhead_and_flops_over_speed() -> None:
    hardware = replace(runtime().hardware, flops_per_second=100.0)
    estimate = Estimate(flops=250.0, overhead_seconds=2.0)
    assert seconds_of(estimate, hardware) == 4.5
    several = replace(hardware, processes=5)
    assert seconds_of(estimate, several) == 2.5 + START_SECONDS
    assert seconds_of(estimate, several, parallel=False) == 4.5


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("mode", ["plan=true", "plan=false"])
def test_what_cannot_fit_is_refused_before_anything_runs(tmp_path: Path, mode: str) -> None:
    with pytest.raises(ConfigError) as caught:
        execute(compose(tmp_path, "debug=tiny", "hardware.memory_gib=0.001", mode))
    assert "stage 'sft' needs about" in caught.value.what
    assert caught.value.where == "hardware"
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    ("stage", "mend"),
    [
        ("sft", "hardware.micro_batch"),
        ("prefer", "hardware.micro_batch"),
        ("sample", "hardware.generation_batch"),
        ("logprobs", "hardware.eval_batch"),
        ("merge", "smaller model"),
    ],
)
def test_the_refusal_names_the_setting_of_the_stage_that_is_too_large(tmp_path: Path, stage: str, mend: str) -> None:
    lab = plan(tmp_path, "debug=tiny", "method=p_sacpo")
    large = {key for key, node in lab.nodes.items() if node.stage.name == stage}
    lab.estimates = {k: replace(e, memory_bytes=2.0**60 if k in large else 0.0) for k, e in lab.estimates.items()}
    with pytest.raises(ConfigError) as caught:
        check_fits(lab)
    assert mend in caught.value.mend
    assert "hardware.memory_gib" in caught.value.mend


def test_the_memory_limit_is_what_is_configured_or_what_is_there(tmp_path: Path) -> None:
    hardware = plan(tmp_path, "debug=tiny", "method=sft").config.hardware
    assert memory_limit(replace(hardware, memory_gib=2.0)) == 2 * 2**30
    assert memory_limit(hardware) > 2**28


# ---------------------------------------------------------------- the paper's scale, without a network


@pytest.mark.parametrize("table", ["table3_dpo_dpo", "table3_p_sacpo"])
def test_a_paper_s_experiment_is_planned_without_network_or_gpu(
    tmp_path: Path, table: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a plan went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    composed = compose(tmp_path, f"experiment=sacpo/{table}", *PINNED, "plan=true")
    assert execute(composed) == 0.0  # and it fits the 80 GB card that it names
    assert "prefer reward -> safety" in capsys.readouterr().out
    assert files_below(tmp_path) == []


def test_table_3_is_planned_at_its_published_scale(tmp_path: Path) -> None:
    lab = plan(tmp_path, *PAPER)
    base = next(node for node in lab.nodes.values() if node.stage.name == "base")
    assert lab.estimates[base.key].facts.parameters == pytest.approx(6.738e9, rel=1e-3)  # LLaMA-1 7B
    assert "sft" not in {node.stage.name for node in lab.nodes.values()}
    first, second = (node.identity.spec for node in lab.nodes.values() if node.stage.name == "prefer")
    assert (first.objective, first.beta, first.train.batch_size) == ("reward", 0.1, 256)
    assert (second.objective, second.beta, second.train.batch_size) == ("safety", 0.025, 64)


# ---------------------------------------------------------------- the plan against a real run


@dataclass
class Ran:
    """A tiny run: its configuration, what was planned before it, and where its files lie."""

    composed: DictConfig
    planned: PlanLab
    folder: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("ran")
    composed = compose(folder, "debug=tiny", "method=dpo_helpful")
    planned = walk(PlanLab, composed)
    execute(composed)
    return Ran(composed, planned, folder)


def test_a_run_stores_exactly_the_planned_keys(ran: Ran) -> None:
    store = Store(ran.folder / "store")
    assert sorted(a.key for a in store.artifacts()) == sorted(ran.planned.nodes)
    assert walk(Lab, ran.composed).nodes.keys() == ran.planned.nodes.keys()  # type: ignore[arg-type]


def test_after_the_run_the_plan_finds_everything(ran: Ran, capsys: pytest.CaptureFixture) -> None:
    lab = walk(PlanLab, ran.composed)
    assert all(node.artifact is not None for node in lab.nodes.values())
    execute(compose(ran.folder, "debug=tiny", "method=dpo_helpful", "plan=true"))
    assert f"to run: 0 of {len(lab.nodes)}" in capsys.readouterr().out


def test_after_the_run_another_method_finds_what_it_shares(ran: Ran) -> None:
    lab = plan(ran.folder, "debug=tiny", "method=sacpo")
    cached = {node.label for node in lab.nodes.values() if node.artifact is not None}
    assert {"world", "sft", "label pairs", "prefer reward", "evaluate sft"} <= cached
    assert "prefer reward -> safety" not in cached


def test_what_is_cached_need_not_fit(ran: Ran) -> None:
    check_fits(plan(ran.folder, "debug=tiny", "method=dpo_helpful", "hardware.memory_gib=0.001"))


def test_planned_tokens_are_of_the_real_ones_order(ran: Ran) -> None:
    # a factor of four, for this policy has had one pass and hardly learnt to end an answer
    store, compared = Store(ran.folder / "store"), 0
    for key, node in ran.planned.nodes.items():
        artifact = store.find(key)
        assert artifact is not None
        for name in ("trained_tokens", "generated_tokens", "scored_tokens"):
            real, planned = artifact.manifest["cost"].get(name, 0.0), getattr(ran.planned.estimates[key], name)
            if real or planned:
                assert 0.25 < planned / real < 4, (node.label, name, planned, real)
                compared += 1
    assert compared >= 6


def test_the_run_folder_is_the_output_folder_and_the_run_id(ran: Ran) -> None:
    record = ran.folder / "outputs" / run_id(ran.composed) / "record.json"
    assert record.is_file()
    assert [r["run_id"] for r in read_records(ran.folder / "outputs")] == [run_id(ran.composed)]


def test_a_sweep_s_plan_counts_what_its_runs_share_once() -> None:
    def node(stage: str, seconds: float, *inputs: str, cached: bool = False) -> dict[str, Any]:
        return {"label": stage, "stage": stage, "inputs": list(inputs), "cached": cached, "seconds": seconds}

    shared = {"w": node("world", 1.0, cached=True), "s": node("sft", 50.0, "w")}
    first = shared | {"a": node("prefer", 20.0, "s"), "b": node("prefer", 30.0, "a")}
    second = shared | {"c": node("prefer", 40.0, "s"), "e": node("evaluate", 5.0, "c", "s")}
    union = union_of([first, second])
    assert (union["runs"], union["uses"], union["distinct"], union["cached"], union["to_run"]) == (2, 8, 6, 1, 5)
    assert union["seconds"] == 145.0
    assert union["longest_path"] == 100.0  # sft, a, b
    assert union["alone"] == 101.0 + 96.0
    assert union["stages"]["sft"] == {"uses": 2, "distinct": 1, "to_run": 1, "seconds": 50.0}
    assert union["stages"]["world"]["seconds"] == 0.0
    console = Console(record=True, width=120)
    show_union(union, console)
    assert "every run alone in an empty store 197 s, so 26% is saved" in console.export_text()


def test_the_graph_of_a_plan_is_its_nodes(tmp_path: Path) -> None:
    lab = plan(tmp_path, "debug=tiny")
    graph = graph_of(lab)
    assert list(graph) == list(lab.nodes)
    before: set[str] = set()
    for key, node in graph.items():
        assert set(node["inputs"]) <= before
        assert node["seconds"] > 0
        before.add(key)
