"""The plan's memory model (alignbench/memory.py) against measured peaks.

    python tests/benchmarks/bench_memory.py

writes tests/benchmarks/results/memory.json. Every configuration is a process of its own that loads a model of random
weights from a folder and trains it (engine.train: DPO), takes log-probs (engine.logprobs) or samples (engine.generate).
Its peak resident set, imports included, is compared with the estimate. Memory does not depend on the machine's load.
`--only NAME` keeps the others' figures; `--again` puts new estimates beside the measurements that are there. Not
collected by pytest; tests/test_memory.py has a few of the configurations.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import bench_tools

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
RESULTS = HERE.parent / "results/memory.json"

# vocabulary, hidden, intermediate, layers, heads, key-value heads, tied, family
SHAPES = {
    "1M": (1024, 128, 352, 4, 4, 4, True, "llama"),
    "7M": (8192, 256, 688, 6, 8, 8, True, "llama"),
    "30M": (16384, 512, 1376, 5, 8, 4, False, "llama"),
    "12M NeoX": (8192, 256, 1024, 6, 8, 8, False, "gpt_neox"),
}
HARDWARE = {
    "device": "cpu", "dtype": "fp32", "zero_stage": 0, "attention": "packed_sdpa", "micro_batch": 10**6,
    "micro_tokens": 1000, "eval_batch": 10**6, "eval_tokens": 8192, "logits_mib": 256, "generation_batch": 128,
    "checkpoint_every": 10**6, "flops_per_second": 1e9,
}  # fmt: skip
NEOX = {"rank": 8, "targets": ["query_key_value"]}
NEOX_EVERYWHERE = {"rank": 8, "targets": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]}
ADAPTERS = {"rank": 8, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
EVERYWHERE = {"rank": 8, "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
PROMPT, RESPONSE, NEW = 40, 80, 96


def configurations():
    """Everything that is measured, by name."""
    found = {}
    for model in SHAPES:
        for tokens in (1000,) if model == "30M" else (1000, 4000):
            for lora, adapters in (("full", None), ("lora", NEOX if model.endswith("NeoX") else ADAPTERS)):
                for checkpointing in (False, True):
                    name = f"train {model} {lora} {tokens}" + (" checkpointing" if checkpointing else "")
                    found[name] = {"what": "train", "model": model, "lora": adapters, "hardware": {
                        "micro_tokens": tokens, "activation_checkpointing": checkpointing}}  # fmt: skip
            found[f"logprobs {model} {tokens}"] = {
                "what": "logprobs", "model": model, "hardware": {"eval_tokens": tokens}
            }  # fmt: skip
            rows = tokens // 20
            found[f"sample {model} {rows}"] = {
                "what": "sample", "model": model, "hardware": {"generation_batch": rows}
            }  # fmt: skip
    for stage in (1, 2, 3):
        found[f"train 30M full 1000 ZeRO-{stage}"] = {
            "what": "train", "model": "30M", "hardware": {"zero_stage": stage}
        }  # fmt: skip
    found["train 30M lora 1000 all layers"] = {"what": "train", "model": "30M", "lora": EVERYWHERE}
    found["train 30M full 1000 one pass a step"] = {"what": "train", "model": "30M", "passes": 1}
    found["train 7M full 1000 bf16"] = {"what": "train", "model": "7M", "hardware": {"dtype": "bf16"}}
    found["train 7M full 1000 logits in chunks"] = {"what": "train", "model": "7M", "hardware": {"logits_mib": 16}}
    return found


def shape_of(model):
    from alignbench.config import ArchitectureConfig

    *widths, tied, family = SHAPES[model]
    return ArchitectureConfig(*widths, 1024, tied, family=family)


def hardware_of(spec):
    from alignbench.config import HardwareConfig

    return HardwareConfig(**(HARDWARE | spec.get("hardware", {})))


def predicted(spec):
    """Bytes by the memory model, besides the constant."""
    from alignbench import memory
    from alignbench.architecture import lora_parameter_count, parameter_count
    from alignbench.config import LoraConfig

    shape, hardware = shape_of(spec["model"]), hardware_of(spec)
    weights = parameter_count(shape)
    if spec["what"] == "sample":
        return memory.sampling_peak(shape, weights, hardware.generation_batch, PROMPT, NEW, hardware)
    if spec["what"] == "logprobs":
        share = RESPONSE / (RESPONSE + PROMPT / 2)
        work = memory.Work(hardware.eval_tokens, hardware.eval_tokens * share)
        return memory.forward_peak(shape, weights, work, hardware)
    pair = PROMPT + 2 * RESPONSE
    positions = hardware.micro_tokens // pair * pair
    work = memory.Work(positions, positions * 2 * RESPONSE / pair, spec.get("passes", 2) > 1)
    if not spec.get("lora"):
        return memory.training_peak(shape, weights, work, hardware)
    lora = LoraConfig(**spec["lora"])
    adapters = lora_parameter_count(shape, lora)
    return memory.training_peak(shape, weights + adapters, work, hardware, trainable=adapters, lora=lora)


def measured(spec):
    """Peak resident set of this process, and what it was before a model was loaded; bytes."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import numpy as np
    import torch

    from alignbench.config import LoraConfig, SamplingConfig, TrainConfig
    from alignbench.engine import generate, logprobs, train
    from alignbench.engine.batching import Row
    from alignbench.engine.objectives import PairObjective
    from alignbench.engine.runtime import device_of, dtype_of, join_process_group
    from alignbench.models import policy as policies

    torch.set_num_threads(1)
    hardware = hardware_of(spec)
    join_process_group(hardware)
    import transformers.models.llama.modeling_llama  # noqa: F401

    if spec.get("lora"):
        import peft  # noqa: F401
    before = bench_tools.resident("VmRSS")
    policy = policies.load_policy(Path(spec["folder"]), dtype_of(hardware), device_of(hardware))
    rng, vocabulary = np.random.default_rng(0), SHAPES[spec["model"]][0]

    def ids(count):
        return rng.integers(2, vocabulary, count).tolist()

    if spec["what"] == "sample":
        requests = [generate.Request(str(i), tuple(ids(PROMPT)), 0) for i in range(hardware.generation_batch)]
        sampling = SamplingConfig(NEW)
        generate.generate(
            policy, requests, sampling=sampling, eos_id=-1, pad_id=1, seed=0, batch=hardware.generation_batch,
            device=device_of(hardware),
        )  # fmt: skip
        return {"before": before, "peak": bench_tools.resident("VmHWM")}
    tokens = hardware.eval_tokens if spec["what"] == "logprobs" else hardware.micro_tokens
    count = tokens // (PROMPT + 2 * RESPONSE)
    passes, steps = spec.get("passes", 2), 2  # the second has the state that the first made
    prompts = [ids(PROMPT) for _ in range(count * passes)]
    sides = [[Row(prompt + ids(RESPONSE), PROMPT) for prompt in prompts] for _ in range(2)]
    if spec["what"] == "logprobs":
        logprobs.sequence_logprobs(
            policy, sides[0] + sides[1], pad_id=1, hardware=hardware, device=device_of(hardware), label=""
        )
        return {"before": before, "peak": bench_tools.resident("VmHWM")}
    lora = spec.get("lora")
    if lora:
        policy = policies.add_lora(policy, LoraConfig(**lora), 0)
    settings = TrainConfig(
        learning_rate=1e-5, epochs=steps, batch_size=len(prompts), schedule="constant", warmup_ratio=0.0
    )
    goal = PairObjective(*sides, np.zeros((len(prompts), 2)), "dpo", 0.1)
    with tempfile.TemporaryDirectory() as work:
        job = train.TrainJob(
            policy=policy, objective=goal, settings=settings, hardware=hardware, seed=0, pad_id=1, work=Path(work),
            lora=bool(lora), starts_at_reference=False,
        )  # fmt: skip
        train.train(job, {}, lambda step, metrics: None)
    return {"before": before, "peak": bench_tools.resident("VmHWM")}


def build(model, folder):
    """A folder with random weights of that shape."""
    policy_of(model).save_pretrained(folder)


def policy_of(model):
    """A model of that shape with random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from alignbench.architecture import transformers_config

    torch.manual_seed(0)
    config = transformers_config(shape_of(model), bos_token_id=None, eos_token_id=0, pad_token_id=1)
    return AutoModelForCausalLM.from_config(config).eval()


def run(**spec):
    """What `measured` finds in a fresh process, and the estimate beside it."""
    found = bench_tools.in_child(HERE, spec, PYTHONPATH=str(ROOT))
    return compared(spec, found["before"], found["peak"])


def compared(spec, before, peak):
    """A measurement beside the estimate, MiB, and estimate over measurement; bytes are given."""
    from alignbench.memory import OVERHEAD

    estimate = predicted(spec)
    return {
        "before_mib": before / 2**20,
        "measured_mib": peak / 2**20,
        "predicted_mib": (estimate + OVERHEAD["cpu"]) / 2**20,
        "ratio": (estimate + OVERHEAD["cpu"]) / peak,
    }


def summary(found):
    """What is kept of all measurements."""
    ratios = [each["ratio"] for each in found.values()]
    return {
        **bench_tools.machine("torch", "transformers", "deepspeed"),
        "median_before_mib": statistics.median(each["before_mib"] for each in found.values()),
        "lowest_and_highest_ratio": [min(ratios), max(ratios)],
        "within_a_fifth": f"{sum(0.8 <= ratio <= 1.2 for ratio in ratios)} of {len(ratios)}",
        "configurations": found,
    }


def main():
    """Measure everything and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--again", action="store_true", help="measure nothing")
    sys.path.insert(0, str(ROOT))
    options = bench_tools.options(parser, RESULTS, measured)
    found = json.loads(options.out.read_text())["configurations"] if options.out.exists() else {}
    if options.again:
        specs = configurations()
        for name, each in found.items():
            found[name] = compared(specs[name], each["before_mib"] * 2**20, each["measured_mib"] * 2**20)
        options.out.write_text(json.dumps(summary(found), indent=2) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        for model in SHAPES:
            build(model, f"{folder}/{model}")
        for name, spec in configurations().items():
            if options.only in name:
                found[name] = run(**spec, folder=f"{folder}/{spec['model']}")
                shown = {key: round(value, 2 if "ratio" in key else 0) for key, value in found[name].items()}
                print(f"{name:45}", *shown.values(), file=sys.stderr, flush=True)
                options.out.write_text(json.dumps(summary(found), indent=2) + "\n")


if __name__ == "__main__":
    main()
