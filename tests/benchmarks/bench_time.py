"""The plan's times (alignbench/speed.py) against what the stages of real runs took.

    python tests/benchmarks/bench_time.py [--only NAME] [--before FORMER_TIME.json]

writes tests/benchmarks/results/time.json. Every configuration is a run of `method=dpo_helpful` on the embedded world,
with a store and a cache of times of its own, in a process of its own: first its plan, which times pieces of the work,
then the run. Compared are the stages that took half a second or more, and everything from the loading of the libraries
to the last evaluation. Other work on the machine spoils both, and moves processor time much less: of
runs with one thread there is also the ratio of the stage's processor time to pieces that were timed by that clock.
With a former round's file (results/time_before.json) it also says how far the same stages and plans are from
themselves.
Not collected by pytest.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import bench_tools

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
RESULTS = HERE.parent / "results/time.json"

SMALL = ["dataset.world.demonstrations=1500", "dataset.world.train_prompts=60", "dataset.world.validation_prompts=16",
         "dataset.world.test_prompts=48", "dataset.world.pairs_per_prompt=8", "model.sft.epochs=1",
         "evaluate.samples_per_prompt=16"]  # fmt: skip
LARGER = ["model.architecture.hidden_size=256", "model.architecture.intermediate_size=688",
          "model.architecture.layers=6", "model.architecture.heads=8", "model.architecture.kv_heads=8"]  # fmt: skip
ADAPTERS = ["model.lora.rank=8", "model.lora.targets=[q_proj,k_proj,v_proj,o_proj]"]
ONE, TWO = ["hardware.threads=1"], ["hardware.threads=2"]
CONFIGURATIONS = {
    "1M full": ONE,
    "1M LoRA": [*ONE, *ADAPTERS],
    "1M ZeRO-2": [*ONE, "hardware.zero_stage=2"],
    "1M two threads": TWO,
    "5M full": [*ONE, *LARGER],
    "5M LoRA": [*ONE, *LARGER, *ADAPTERS],
    "5M ZeRO-2": [*ONE, *LARGER, "hardware.zero_stage=2"],
    "5M recomputing": [*ONE, *LARGER, "hardware.activation_checkpointing=true"],
    "5M two threads": [*TWO, *LARGER],
}
SHORTEST_S = 0.5


def child(overrides):
    """Plan and run one configuration in this process."""
    import logging
    import os

    sys.path.insert(0, str(ROOT))
    import hydra

    from alignbench.cli import CONF, register
    from alignbench.config import resolve, run_id, validate
    from alignbench.lab import Lab
    from alignbench.plan import times_of
    from alignbench.run import _recipe, planned
    from alignbench.store import Store
    from alignbench.tracking import Tracker

    class Clocked(Lab):
        """Keeps the processor's seconds of every stage."""

        def _realise(self, node):
            started = time.process_time()
            super()._realise(node)
            self.__dict__.setdefault("busy", {})[node.key] = time.process_time() - started

    threads = 2 if "hardware.threads=2" in overrides else 1
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ALIGNBENCH_CACHE"] = f"{folder}/cache"
        places = ["method=dpo_helpful", "tracking=disabled", f"output_dir={folder}/out", f"store_dir={folder}/store"]
        register()
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra.compose("config", overrides=[*SMALL, *overrides, *places])
        config, settings = resolve(composed)
        validate(config, settings)
        store = Store(Path(config.store_dir))
        tracker = Tracker(
            config.tracking, run_id=run_id(composed), group="", job_type="", config={}, folder=Path(folder)
        )
        planner = planned(config, settings, store, tracker)
        started = time.perf_counter()
        times = times_of(planner)
        timing = time.perf_counter() - started
        lab = Clocked(config, store, tracker)
        started = time.perf_counter()
        _recipe(lab, config, settings)
        took = time.perf_counter() - started
        busy = processor_seconds(planner)
    stages = {}
    for key, node in lab.nodes.items():
        if node.seconds >= SHORTEST_S and node.stage.name != "base":  # that one waits for the libraries
            stages[node.label] = compared(times.stages[key], node.seconds)
            if threads == 1:
                stages[node.label] |= {"processor_ratio": busy[key] / lab.busy[key]}
    return {
        "seconds_of_timing": timing,
        "stages": stages,
        "whole": compared(sum(times.stages.values()) + times.start, took),
    }


def processor_seconds(planner):
    """What the plan says if its pieces are timed by the processor's clock, in this process: by stage's key."""
    from alignbench import speed
    from alignbench.plan import seconds_of

    hardware, clock = planner.config.hardware, speed.time.perf_counter
    pieces = {piece.key(hardware): piece for e in planner.estimates.values() for piece, _ in e.pieces}
    here = speed.Speed(hardware)
    try:
        speed.time.perf_counter = time.process_time
        here.known = {key: speed.seconds_of(piece, hardware) for key, piece in pieces.items()}
    finally:
        speed.time.perf_counter = clock
    return {key: seconds_of(e, hardware, speed=here) for key, e in planner.estimates.items()}


def compared(planned, took):
    """Both, and the first over the second."""
    return {"planned_s": planned, "took_s": took, "ratio": planned / took}


def between(found, before):
    """How far a plan or a stage is from itself in an earlier round: no plan can be nearer to a stage than that."""
    both = [
        (stage, old)
        for name, each in found.items()
        for key, stage in each["stages"].items()
        if (old := before.get(name, {}).get("stages", {}).get(key))
    ]
    result = {}
    for what, words in (("took_s", "the_same_stage"), ("planned_s", "its_plan")):
        ratios = sorted(stage[what] / old[what] for stage, old in both)
        result[f"{words}_within_a_fifth"] = f"{sum(0.8 <= ratio <= 1.2 for ratio in ratios)} of {len(ratios)}"
        result[f"{words}_lowest_and_highest_ratio"] = [min(ratios), max(ratios)]
    return result


def summary(found, before):
    """What is kept of all configurations, and of their difference to an earlier round's."""
    stages = [stage for each in found.values() for stage in each["stages"].values()]
    ratios = [stage["ratio"] for stage in stages]
    processor = [stage["processor_ratio"] for stage in stages if "processor_ratio" in stage]
    wholes = [each["whole"]["ratio"] for each in found.values()]
    return {
        **bench_tools.machine("torch", "transformers", "deepspeed"),
        "stages_within_a_fifth": f"{sum(0.8 <= ratio <= 1.2 for ratio in ratios)} of {len(ratios)}",
        "stages_within_a_fifth_by_processor_time": f"{sum(0.8 <= r <= 1.2 for r in processor)} of {len(processor)}",
        "runs_within_a_fifth": f"{sum(0.8 <= ratio <= 1.2 for ratio in wholes)} of {len(wholes)}",
        "lowest_and_highest_ratio": [min(ratios), max(ratios)],
        **({"between_rounds": between(found, before)} if found.keys() & before.keys() else {}),
        "configurations": found,
    }


def main():
    """Measure, and write the JSON; what `--only` leaves out is kept as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--before", type=Path, help="a former time.json, for the difference between two rounds")
    options = bench_tools.options(parser, RESULTS, child)
    before = json.loads(options.before.read_text())["configurations"] if options.before else {}
    found = json.loads(options.out.read_text())["configurations"] if options.out.exists() else {}
    for name, overrides in CONFIGURATIONS.items():
        if options.only in name:
            threads = 2 if "hardware.threads=2" in overrides else 1
            found[name] = bench_tools.in_child(HERE, overrides, threads=threads, name=name)
            for stage, each in (found[name]["stages"] | {"whole": found[name]["whole"]}).items():
                print(
                    f"{name:15} {stage:40}", *(round(value, 2) for value in each.values()), file=sys.stderr, flush=True
                )
            options.out.write_text(json.dumps(summary(found, before), indent=2) + "\n")


if __name__ == "__main__":
    main()
