"""RMSNorm with its gradient written out against transformers' own: what a pass with gradients gains, and one without.

    python tests/benchmarks/bench_norms.py

writes tests/benchmarks/results/norms.json. Passes are those of bench_compile.py, on one thread; every one is computed
by both, in turn in one process, so that both meet the same machine. Not collected by pytest; tests/models/test_norms.py
has that both compute the same.
"""

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path

import bench_tools
from bench_compile import ROOT, SHAPES, passes, scorer_of, seconds

HERE = Path(__file__).resolve()
RESULTS = HERE.parent / "results/norms.json"
PASSES = {"1M": 80, "7M": 30}


def child(spec):
    """Seconds of every pass, (transformers', ours)."""
    sys.path.insert(0, str(ROOT))
    import torch

    from alignbench.models.norms import with_fused_norms

    torch.set_num_threads(1)
    plain = bench_tools.llama(**SHAPES[spec["model"]], tie_word_embeddings=True)
    scorers = [scorer_of(policy) for policy in (plain, with_fused_norms(copy.deepcopy(plain)))]
    found = []
    for number, work in enumerate(passes(spec["model"], PASSES[spec["model"]])):
        order = (0, 1) if number % 2 else (1, 0)
        times = {which: seconds(scorers[which], work, spec["kind"]) for which in order}
        found.append((times[0], times[1]))
    return found[4:]


def main():
    """Run everything and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = bench_tools.options(parser, RESULTS, child)
    found = {}
    for model in SHAPES:
        for kind in ("train", "forward"):
            times = bench_tools.in_child(HERE, {"model": model, "kind": kind})
            ratios = sorted(ours / theirs for theirs, ours in times)
            found[f"{kind} {model}"] = {
                "ours_over_theirs": statistics.median(ratios),
                "quartiles": statistics.quantiles(ratios, n=4)[::2],
                "passes": len(ratios),
            }
            print(kind, model, json.dumps(found[f"{kind} {model}"]), file=sys.stderr, flush=True)
    kept = bench_tools.machine("torch", "transformers") | {"pieces": found}
    options.out.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
