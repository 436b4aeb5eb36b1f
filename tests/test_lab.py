"""What is computed again and what is found: the cache's rules, on real runs and under the lab that runs nothing."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from tiny_runs import STATED, Run, command, only_record, plan, run, science, shared_tiny, started

from alignbench.errors import ConfigError
from alignbench.store import Store

SHARED = ["world", "base", "sft", "sample pairs", "score pairs", "label pairs"]
FIRST = "reference log-probs for prefer reward"
SECOND = "reference log-probs for prefer reward -> safety"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return shared_tiny(tmp_path_factory)


def of_row(row: str) -> list[str]:
    own = [f"sample {row}", f"score {row}", f"log-probs {row}"]
    return [*own, *([] if row == "sft" else [f"log-probs of sft on {row}"]), f"evaluate {row}"]


def missing(tiny: Run, *overrides: str) -> list[str]:
    """Labels of what another configuration would have to compute after `tiny`."""
    own_method = any(override.startswith("method=") for override in overrides)
    _, _, _, nodes = plan(tiny.store, *([] if own_method else [STATED]), *overrides)
    known = {stage["key"] for stage in tiny.record["stages"]}
    absent = [label for label, node in nodes.items() if node.key not in known]
    assert absent == [label for label, node in nodes.items() if node.artifact is None]
    return absent


def test_the_stages_of_a_run_in_order(tiny: Run) -> None:
    training = [*SHARED, FIRST, "prefer reward", SECOND, "prefer reward -> safety"]
    assert tiny.labels == [*training, *of_row("sft"), *of_row("step reward"), *of_row("sacpo")]
    assert tiny.built == tiny.labels
    assert tiny.record["cost"]["stages_built_now"] == 24


def test_the_same_command_again_builds_nothing_and_loads_no_training_stack(tiny: Run, tmp_path: Path) -> None:
    argv = command(tiny.store, tmp_path / "out", STATED)
    argv[1:1] = ["-X", "importtime"]
    with started(argv, tmp_path / "log") as process:
        output = process.finish()
    again = only_record(tmp_path / "out")
    assert again["cost"]["stages_built_now"] == 0
    assert again["cost"]["seconds_now"] == 0
    assert not any(stage["built"] for stage in again["stages"])
    assert science(again) == science(tiny.record)
    assert again["run_id"] == tiny.record["run_id"]
    assert again["cost"]["total"] == tiny.record["cost"]["total"]
    imported = {line.rpartition("|")[2].strip() for line in output.splitlines() if line.startswith("import time:")}
    assert "alignbench.lab" in imported  # the list is there
    assert not imported & {"deepspeed", "transformers", "peft", "datasets", "wandb"}


def test_another_reward_step_rebuilds_what_hangs_on_it(tiny: Run, tmp_path: Path) -> None:
    store = tiny.copied(tmp_path / "store")
    changed = run(store, tmp_path / "out", STATED, "method.reward_step.train.learning_rate=1e-3")
    affected = ["prefer reward", SECOND, "prefer reward -> safety", *of_row("step reward"), *of_row("sacpo")]
    assert changed.built == affected
    assert changed.weights("prefer reward") != tiny.weights("prefer reward")
    # found: the world, SFT, the pairs, the first reference's log-probs, the reference's own row
    assert set(changed.labels) - set(affected) == {*SHARED, FIRST, *of_row("sft")}
    assert changed.record["rows"]["sft"] == tiny.record["rows"]["sft"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["constraint.thresholds=[0.75]"], [f"evaluate {row}" for row in ("sft", "step reward", "sacpo")]),
        (
            ["constraint.form=absolute_cost", "constraint.thresholds=[0.0]"],
            [f"evaluate {row}" for row in ("sft", "step reward", "sacpo")],
        ),
        (["evaluate.resamples=300"], [f"evaluate {row}" for row in ("sft", "step reward", "sacpo")]),
        (["method.beta_over_lambda=[0.25]"], ["prefer reward -> safety", *of_row("sacpo")]),
        (
            ["evaluate.split=validation"],
            [*of_row("sft"), *of_row("step reward"), *of_row("sacpo")],
        ),
    ],
    ids=["threshold", "form", "resamples", "second step's beta", "split"],
)
def test_what_a_change_rebuilds(tiny: Run, overrides: list[str], expected: list[str]) -> None:
    assert missing(tiny, *overrides) == expected


def test_another_seed_keeps_the_world_alone(tiny: Run) -> None:
    assert missing(tiny, "seed=1") == [label for label in tiny.labels if label != "world"]


def test_another_problem_beta_rebuilds_both_steps(tiny: Run) -> None:
    # the evaluations' spec holds the problem, so the reference's row is evaluated anew, on the same samples
    found = missing(tiny, "constraint.beta=0.25")
    steps = ["prefer reward", SECOND, "prefer reward -> safety"]
    assert found == [*steps, "evaluate sft", *of_row("step reward"), *of_row("sacpo")]


@pytest.mark.parametrize(
    "override",
    [
        "tracking.mode=offline",
        "tracking.project=other",
        "hardware.zero_stage=2",
        "hardware.micro_batch=4",
        "hardware.eval_batch=3",
        "hardware.generation_batch=5",
        "hardware.checkpoint_every=1",
        "hardware.threads=2",
        "hardware.activation_checkpointing=true",
        "output_dir=/somewhere/else",
        "method.reward_step.kto_labels=preferred",
        "constraint.thresholds=[0.10]",
    ],
)
def test_what_changes_nothing(tiny: Run, override: str) -> None:
    assert missing(tiny, override) == []


def test_other_methods_find_the_shared_stages(tiny: Run) -> None:
    assert missing(tiny, "method=sft") == []
    train = tiny.record["config"]["method"]["reward_step"]["train"]
    same = [f"method.step.train.{name}={value}" for name, value in train.items()]
    assert missing(tiny, "method=dpo_helpful", *same) == []  # it is SACPO's first step
    assert missing(tiny, "method=dpo_safe") == ["prefer safety", *of_row("dpo_safe")]


def test_a_damaged_policy_is_reported_and_rebuilt_to_the_same_numbers(
    tiny: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tiny.copied(tmp_path / "store")
    key = tiny.key("prefer reward")
    weights = store / "artifacts" / key / "policy" / "model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    weights.write_bytes(flipped)

    with caplog.at_level(logging.INFO):
        again = run(store, tmp_path / "out", STATED)

    said = [r.getMessage() for r in caplog.records if r.name == "alignbench.run"]
    (message,) = [text for text in said if "damaged" in text]
    assert key in message
    assert "policy/model.safetensors: sha256 differs" in message
    assert (store / "damaged" / f"{key}-0").is_dir()
    assert again.built == ["prefer reward"]
    assert again.weights("prefer reward") == tiny.weights("prefer reward")
    assert science(again.record) == science(tiny.record)


def test_from_scratch_elsewhere_gives_the_same_bits(tiny: Run, tmp_path: Path) -> None:
    """In another process, another folder: everything but times is equal, file by file."""
    with started(command(tmp_path / "store", tmp_path / "out", STATED), tmp_path / "log") as process:
        process.finish()
    record = only_record(tmp_path / "out")
    assert record["cost"]["stages_built_now"] == len(tiny.labels)
    assert science(record) == science(tiny.record)
    here, there = Store(tiny.store), Store(tmp_path / "store")
    for stage in record["stages"]:
        one, other = here.find(stage["key"]), there.find(stage["key"])
        assert one is not None
        assert other is not None
        differ = [n for n, entry in one.manifest["files"].items() if other.manifest["files"].get(n) != entry]
        assert differ == [], f"{stage['label']}: {differ}"


def test_a_plan_touches_no_file_and_asks_for_what_is_not_there(tiny: Run, tmp_path: Path) -> None:
    def listing() -> list[str]:
        return sorted(str(p) for p in tiny.store.rglob("*"))

    before = listing()
    lab, outcome, _, nodes = plan(tiny.store, "seed=5", "method=p_sacpo")
    assert listing() == before
    assert set(lab.estimates) == set(lab.nodes)
    assert nodes["world"].artifact is not None
    assert outcome.policies["conservative"].artifact is None
    with pytest.raises(ConfigError, match="not computed yet"):
        _ = outcome.policies["conservative"].result


def test_hydra_says_the_same_in_any_order_of_overrides(tmp_path: Path) -> None:
    _, _, _, one = plan(tmp_path, "seed=3", "constraint.beta=0.25")
    _, _, _, other = plan(tmp_path, "constraint.beta=0.25", "seed=3")
    assert [n.key for n in one.values()] == [n.key for n in other.values()]


def test_a_specs_text_is_in_the_record(tiny: Run) -> None:
    (stage,) = [s for s in tiny.record["stages"] if s["label"] == "prefer reward"]
    assert stage["spec"]["objective"] == "reward"
    assert stage["inputs"]["reference"] == tiny.key("sft")
    assert json.loads(json.dumps(stage)) == stage
