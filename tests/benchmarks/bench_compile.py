"""torch.compile on a CPU: what compiling a model's blocks takes, what a pass gains, and after how many it has paid.

    python tests/benchmarks/bench_compile.py [--only NAME]

writes tests/benchmarks/results/compile.json. Every run is a process of its own on one thread: twelve passes of random
packed pairs (about 1,000 tokens, no two lengths alike) with gradients and without, eager and compiled. Not collected by
pytest; tests/engine/test_compiled.py has that both compute the same.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import bench_tools

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
RESULTS = HERE.parent / "results/compile.json"
SHAPES = {
    "1M": {"vocabulary": 1024, "hidden": 128, "inner": 352, "layers": 4, "heads": 4},
    "7M": {"vocabulary": 8192, "hidden": 256, "inner": 688, "layers": 6, "heads": 8},
}
PASSES = 12


def child(spec):
    """Seconds of every pass of one kind in this process."""
    import logging

    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch

    from alignbench.config import HardwareConfig
    from alignbench.engine.batching import Row
    from alignbench.engine.compiled import compile_blocks
    from alignbench.engine.logprobs import LogProbPolicy
    from alignbench.engine.packing import prepare

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    policy = bench_tools.llama(**SHAPES[spec["model"]], tie_word_embeddings=True)
    if spec["compiled"]:
        compile_blocks(policy)
    hardware = HardwareConfig(
        device="cpu", dtype="fp32", zero_stage=0, attention="packed_sdpa", micro_batch=64, micro_tokens=8192,
        eval_batch=64, eval_tokens=8192, logits_mib=256, generation_batch=128, checkpoint_every=1,
    )  # fmt: skip
    rng, vocabulary = np.random.default_rng(0), SHAPES[spec["model"]]["vocabulary"]

    def ids(count):
        return rng.integers(2, vocabulary, count).tolist()

    scorer, times = LogProbPolicy(policy, hardware), []
    for _ in range(PASSES):
        prompts = [ids(int(rng.integers(8, 40))) for _ in range(6)]
        rows = [Row(p + ids(int(rng.integers(20, 110))), len(p)) for p in prompts for _ in range(2)]
        work = prepare(rows, 1, "packed_sdpa")
        started = time.perf_counter()
        if spec["kind"] == "train":
            scorer(work).sum().backward()
        else:
            with torch.no_grad():
                scorer(work)
        times.append(time.perf_counter() - started)
    return times


def main():
    """Run everything and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="pieces whose name contains this; the others are kept")
    options = bench_tools.options(parser, RESULTS, child)
    found = json.loads(options.out.read_text())["pieces"] if options.out.exists() else {}
    for model in SHAPES:
        for kind in ("train", "forward"):
            runs = []
            if options.only not in f"{kind} {model}":
                continue
            for compiled in (False, True):
                # a cache of its own: what an earlier run compiled would make this one look cheap
                with tempfile.TemporaryDirectory() as cache:
                    spec = {"model": model, "kind": kind, "compiled": compiled}
                    runs.append(bench_tools.in_child(HERE, spec, TORCHINDUCTOR_CACHE_DIR=cache))
            eager, compiled = (statistics.median(times[PASSES // 2 :]) for times in runs)
            extra = sum(runs[1]) - sum(runs[0]) - PASSES * (compiled - eager)
            found[f"{kind} {model}"] = {
                "eager_s_per_pass": eager,
                "compiled_s_per_pass": compiled,
                "speed_up": eager / compiled,
                "compiling_s": extra,
                "passes_until_it_pays": extra / (eager - compiled) if compiled < eager else None,
            }
            print(kind, model, json.dumps(found[f"{kind} {model}"]), file=sys.stderr, flush=True)
            kept = bench_tools.machine("torch", "transformers") | {"pieces": found}
            options.out.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
