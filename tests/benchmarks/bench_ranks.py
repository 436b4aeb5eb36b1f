"""What it costs to run a stage on several processes of this machine, and what it gains.

    python tests/benchmarks/bench_ranks.py [--ranks 2]     # writes tests/benchmarks/results/ranks.json

Two stages on the embedded model's shape, in place and on ranks in turn: scoring eight responses (all start-up) and one
preference training. Not collected by pytest; nothing is asserted about times.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/stages")]

import tiny  # noqa: E402
from pair_chain import TOKENS, WORDS, Chain, given, pair_table  # noqa: E402

from alignbench.config import ArchitectureConfig, LoraConfig  # noqa: E402
from alignbench.jsonio import read_jsonl, write_jsonl  # noqa: E402
from alignbench.launch import run_on_ranks  # noqa: E402
from alignbench.models import policy as policies  # noqa: E402
from alignbench.stages import LOGPROBS, PREFER, Context, Runtime  # noqa: E402
from alignbench.stages.measure import LogProbsSpec  # noqa: E402
from alignbench.stages.policies import PreferSpec  # noqa: E402

SHAPE = ArchitectureConfig(
    hidden_size=192, intermediate_size=512, layers=4, heads=6, kv_heads=6, vocab_size=1024, max_positions=128
)
STEPS, BATCH = 24, 64


class Wide(Chain):
    """The chain of the tests with a policy of the embedded benchmark's size."""

    def __init__(self, root):
        super().__init__(root, pair_table(count=400))

        def write(out):
            tokenizer = policies.train_tokenizer([" ".join(WORDS)] * 50, SHAPE.vocab_size)
            policies.save_policy(policies.build_llama(SHAPE, tokenizer, 0), tokenizer, out / "policy")

        self.policy = given(self.store, "policy", write, name="wide")
        self.cached = self.logprobs(self.policy)


def seconds_of(stage, spec, inputs, ranks, zero):
    """Wall seconds of one run, and its training log."""
    machine = tiny.hardware(processes=ranks, zero_stage=zero, micro_batch=16, eval_batch=64)
    with tempfile.TemporaryDirectory() as folder:
        out, work = Path(folder) / "out", Path(folder) / "work"
        out.mkdir()
        work.mkdir()
        context = Context(spec, inputs, 0, out, work, {}, Runtime(machine), lambda step, metrics: None)
        begin = time.perf_counter()
        run_on_ranks(stage, context) if ranks > 1 else stage.run(context)
        return time.perf_counter() - begin, read_jsonl(out / "log.jsonl") if (out / "log.jsonl").exists() else []


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ranks.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chain = Wide(Path(folder) / "store")
        few = [{"prompt_id": f"p{i}", "prompt": "a small kettle", "response_ids": [5, 6, 7]} for i in range(8)]
        rows = given(chain.store, "responses", lambda out: write_jsonl(out / "responses.jsonl", few), name="few")
        spec = PreferSpec(
            "reward", "dpo", 0.5, tiny.settings(STEPS, 300, batch_size=BATCH), LoraConfig(rank=0), TOKENS, "fp32"
        )
        start = {"start": chain.policy, "reference": chain.policy}
        work = {
            "start-up": (LOGPROBS, LogProbsSpec("responses", TOKENS, "fp32"), {"policy": chain.policy, "rows": rows}),
            "training": (PREFER, spec, start | {"pairs": chain.pairs, "reference_logprobs": chain.cached}),
        }
        record = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "ranks": options.ranks,
            "steps": STEPS,
            "pairs_per_step": BATCH,
        }
        for name, (stage, settings, inputs) in work.items():
            found = {1: [], options.ranks: []}
            logs = {}
            for _ in range(options.repeat):
                for ranks in found:  # in turn: whatever else the machine does hits both
                    seconds, logs[ranks] = seconds_of(stage, settings, inputs, ranks, 2 if ranks > 1 else 0)
                    found[ranks].append(seconds)
            one, several = (statistics.median(found[ranks]) for ranks in found)
            record[name] = {"in_place_seconds": one, "ranks_seconds": several, "extra_seconds": several - one}
            if logs[1]:
                gaps = [abs(a["loss"] - b["loss"]) for a, b in zip(logs[1], logs[options.ranks], strict=True)]
                record[name]["largest_loss_difference"] = float(np.max(gaps))
            print(name, json.dumps(record[name]))
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
