"""Sampling against a plain loop over transformers' `generate`, and against a former engine: tokens/s.

    python tests/benchmarks/bench_generation.py [--rounds 3] [--former /path/to/checkout]

writes tests/benchmarks/results/generation.json. Every run is a process of its own, in turn with the others; ratios are
medians over rounds of two runs of the same round, since other work on a shared machine slows both. Idle OpenMP threads
spin as long as main.py lets them (GOMP_SPINCOUNT=10000), for every engine. All sample 64
responses of at most 64 tokens to each prompt from the embedded Llama's shape (0.9M parameters, random weights, fp32)
at temperature 1 from the whole vocabulary, in batches of the same number of sequences. The plain loop takes prompts in
the order of the data, left-padded, with `num_return_sequences=64`; its other settings are transformers' defaults.

Two kinds of responses: in `full` none ends before 64 tokens; in `ending` each token ends it with a chance near 1/24.
A response's tokens count up to its end, as long as it is. Not collected by pytest; nothing is asserted about times.

`bound` says where our time goes in one more run, under torch's profiler: products with weights (their arithmetic, and
the rate that it comes to), those of attention, all else. No engine that computes these products in fp32 by the same
library has more tokens/s than if the rest took no time. These are wall seconds, which other work on the machine
stretches; `tokens_per_cpu_second` at `--threads 1` is what such work disturbs least.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import bench_tools

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
RESULTS = HERE.parent / "results/generation.json"
ENGINES = ("ours", "plain", "former")
EOS, PAD, VOCABULARY, SAMPLES, MOST = 0, 1, 1024, 64, 64
END_BIAS = {"full": -1e4, "ending": 3.75}  # of the end's logit; without, each token has about the same


def model(kind):
    """The embedded Llama's shape, with a bias on the output head."""
    import torch

    policy = bench_tools.llama(
        vocabulary=VOCABULARY, hidden=128, inner=352, layers=4, heads=4, max_position_embeddings=256,
        initializer_range=0.05, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    policy.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
    policy.lm_head.bias.data[EOS] = END_BIAS[kind]
    return policy


def prompts(count):
    """Token ids, 4 to 39 each."""
    import numpy as np

    rng = np.random.default_rng(7)
    return [tuple(rng.integers(2, VOCABULARY, rng.integers(4, 40)).tolist()) for _ in range(count)]


def run_plain(policy, data, batch, samples):
    """The plain loop; returns the number of tokens."""
    import torch

    torch.manual_seed(1)
    tokens, size = 0, max(1, batch // samples)
    for start in range(0, len(data), size):
        part = data[start : start + size]
        longest = max(map(len, part))
        ids = torch.tensor([[PAD] * (longest - len(p)) + list(p) for p in part])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part])
        found = policy.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
            max_new_tokens=MOST, num_return_sequences=samples, eos_token_id=EOS, pad_token_id=PAD,
        )[:, longest:]  # fmt: skip
        ended = (found == EOS).int().cumsum(1)
        tokens += int(((ended - (found == EOS).int()) == 0).sum())
    return tokens


def run_engine(policy, data, batch, samples):
    """The engine of the checkout that is first on the path; returns the number of tokens."""
    import torch

    from alignbench.config import SamplingConfig
    from alignbench.engine.generate import Request, generate

    requests = [Request(f"p{i}", ids, k) for i, ids in enumerate(data) for k in range(samples)]
    found = generate(
        policy, requests, sampling=SamplingConfig(MOST, 1.0, 1.0), eos_id=EOS, pad_id=PAD, seed=1, batch=batch,
        device=torch.device("cpu"),
    )  # fmt: skip
    return sum(map(len, found))


def child(spec):
    """One run in this process, after a small one that warms up."""
    import logging

    sys.path.insert(0, spec["root"])
    import torch

    logging.disable(logging.WARNING)
    torch.set_num_threads(spec["threads"])
    if spec["engine"] == "bound":
        return bound(spec)
    policy, data = model(spec["kind"]), prompts(spec["prompts"])
    work = run_plain if spec["engine"] == "plain" else run_engine
    work(policy, data[:1], SAMPLES, SAMPLES)
    started, started_cpu = time.perf_counter(), time.process_time()
    tokens = work(policy, data, spec["batch"], spec["samples"])
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    return {"tokens": tokens, "tokens_per_second": tokens / seconds, "tokens_per_cpu_second": tokens / cpu_seconds}


def bound(spec):
    """Where the time of one run of ours goes, seconds, and what products with weights alone would allow."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(spec["threads"])
    policy, data = model(spec["kind"]), prompts(spec["prompts"])
    run_engine(policy, data[:1], SAMPLES, SAMPLES)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        tokens = run_engine(policy, data, spec["batch"], spec["samples"])
    seconds = {"weights": 0.0, "attention": 0.0, "other": 0.0}
    kinds = dict.fromkeys(("aten::mm", "aten::addmm"), "weights")
    kinds |= dict.fromkeys(("aten::bmm", "aten::baddbmm", "aten::baddbmm_"), "attention")
    for event in profiler.key_averages():
        seconds[kinds.get(event.key, "other")] += event.self_cpu_time_total / 1e6
    # embeddings are looked up; the head is a product
    weights = sum(p.numel() for p in policy.parameters() if p.ndim == 2) - policy.get_input_embeddings().weight.numel()
    return {
        "tokens": tokens,
        "seconds": seconds,
        "flops_per_token": 2 * weights,
        "flops_per_second_of_products_with_weights": 2 * weights * tokens / seconds["weights"],
        "tokens_per_second_if_the_rest_took_no_time": tokens / seconds["weights"],
    }


def run(**spec):
    """One run in a process of its own."""
    # threads that wait for each other at every small product must not go to sleep
    return bench_tools.in_child(HERE, spec, threads=spec["threads"], name=spec["engine"], GOMP_SPINCOUNT="10000")


def measure(kind, options):
    """Medians of every engine on one kind of responses, our rate over theirs, and where our time goes."""
    runs = {name: [] for name in ENGINES if name != "former" or options.former}
    shared = {
        "prompts": options.prompts,
        "batch": options.batch,
        "samples": options.samples,
        "threads": options.threads,
    }
    for _ in range(options.rounds):
        for name, found in runs.items():
            root = options.former if name == "former" else str(ROOT)
            found.append(run(engine=name, kind=kind, root=root, **shared))
            print(kind, name, json.dumps(found[-1]), file=sys.stderr, flush=True)
    medians = {name: {key: statistics.median(r[key] for r in each) for key in each[0]} for name, each in runs.items()}
    ratios = {
        f"ours_over_{name}": {
            rate: statistics.median(a[rate] / b[rate] for a, b in zip(runs["ours"], each, strict=True))
            for rate in ("tokens_per_second", "tokens_per_cpu_second")
        }
        for name, each in runs.items()
        if name != "ours"
    }
    return {"runs": medians, "ratios": ratios, "bound": run(engine="bound", kind=kind, root=str(ROOT), **shared)}


def main():
    """Run everything and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="responses per prompt")
    parser.add_argument("--batch", type=int, default=512, help="sequences sampled at once")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--kinds", nargs="*", default=list(END_BIAS), choices=list(END_BIAS))
    parser.add_argument("--former", help="another checkout of this repository")
    options = bench_tools.options(parser, RESULTS, child)
    found = {
        **bench_tools.machine("torch", "transformers"),
        "load_average": os.getloadavg()[0],
        "prompts": options.prompts,
        "samples_per_prompt": options.samples,
        "batch": options.batch,
        "rounds": options.rounds,
        "threads": options.threads,
        "kinds": {},
    }
    for kind in options.kinds:
        found["kinds"][kind] = measure(kind, options)
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
