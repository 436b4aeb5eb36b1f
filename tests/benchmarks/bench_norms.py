"""RMSNorm with its gradient written out against transformers' own: values and gradients of one norm.

    python tests/benchmarks/bench_norms.py

writes tests/benchmarks/results/norms.json. One thread; the width and the tokens of a micro-batch of the embedded
benchmark, and larger. Both compute the same in turn in one process, so that both meet the same machine; freed memory is
kept by glibc, as in sweeps/lib/side_by_side.sh. Not collected by pytest; tests/models/test_norms.py has that both
compute the same.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import bench_tools

HERE = Path(__file__).resolve()
RESULTS = HERE.parent / "results/norms.json"
SHAPES = [(1000, 128), (4500, 128), (4500, 256), (1000, 1024), (4500, 1024)]
KEPT = {"MALLOC_TRIM_THRESHOLD_": "2000000000", "MALLOC_MMAP_THRESHOLD_": "33554432"}
TIMES = 200


def child(spec):
    """Seconds of both, each as often."""
    sys.path.insert(0, str(HERE.parents[2]))
    import torch
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from alignbench.models.norms import rms_norm

    torch.set_num_threads(1)
    tokens, width = spec["shape"]
    module = LlamaRMSNorm(width, 1e-6)
    # not a leaf: a gradient that autograd would have to keep is another copy
    hidden = torch.randn(1, tokens, width, requires_grad=True) * 1.0
    gradient = torch.randn(1, tokens, width)
    found = {"theirs": [], "ours": []}
    for number in range(TIMES):
        for name in ("theirs", "ours") if number % 2 else ("ours", "theirs"):
            started = time.perf_counter()
            values = module(hidden) if name == "theirs" else rms_norm(hidden, module.weight, 1e-6)
            torch.autograd.grad(values, (hidden, module.weight), gradient)
            found[name].append(time.perf_counter() - started)
    return {name: times[10:] for name, times in found.items()}


def main():
    """Run everything and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = bench_tools.options(parser, RESULTS, child)
    found = {}
    for shape in SHAPES:
        times = bench_tools.in_child(HERE, {"shape": shape}, **KEPT)
        ratios = [ours / theirs for ours, theirs in zip(times["ours"], times["theirs"], strict=True)]
        name = "{} tokens of {}".format(*shape)
        found[name] = {
            "ours_over_theirs": statistics.median(ratios),
            "quartiles": statistics.quantiles(ratios, n=4)[::2],
            "theirs_ms": 1000 * statistics.median(times["theirs"]),
        }
        print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
    kept = bench_tools.machine("torch", "transformers") | {"pieces": found}
    options.out.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
