"""Preference training against TRL's DPOTrainer and against padded rows: pairs/s, tokens/s, peak memory.

    python tests/benchmarks/bench_training.py [--rounds 3] [--trl-python /path/to/python] [--former /path/to/checkout]
    python tests/benchmarks/bench_training.py --model FOLDER [--lora] --lengths pku --pairs 16 --out FILE

writes tests/benchmarks/results/training.json. Every run is a process of its own, and so is its peak memory, in turn
with the others; medians over rounds. All runs train the same model in fp32 with DPO on the same pairs (of random ids)
in the same order, with the same reference, and must agree in the first step's loss: a 6.8M-parameter Llama of random
weights, or a saved model. Besides wall-clock rates there are rates per second of processor time: other work on a
shared machine moves those much less.

TRL is no requirement of this project, and is kept apart in an environment that sees this one's packages:

    python -m venv /tmp/trl
    python -c "import site; print(site.getsitepackages()[0])" > /tmp/trl/lib/python3.11/site-packages/shared.pth
    /tmp/trl/bin/python -m pip install trl

Runs: `packed` and `padded` are this engine's two layouts, `former` the engine of another checkout; `trl_default` has
TRL's default settings, `trl_no_checkpointing` those without activation checkpointing, and `trl_best` also reference
log-probs that were computed before (padding_free is switched off in TRL 1.16, and its fused head is always on).
Not collected by pytest; nothing is asserted about times.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_tools

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
RESULTS = HERE.parent / "results/training.json"
BATCH, WARM_UP, BETA, VOCABULARY = 8, 1, 0.1, 8192
LENGTHS = {
    # prompt, response: (kind, ...) with the mean and the spread of a log-normal, or bounds of a uniform
    "pku": (("lognormal", 25, 0.5, 4, 100), ("lognormal", 100, 0.7, 4, 480)),
    "hh": (("lognormal", 200, 0.5, 16, 480), ("lognormal", 60, 0.7, 4, 240)),
    "uniform": (("uniform", 16, 128), ("uniform", 16, 256)),
}
ENGINES = ("packed", "padded", "former", "trl_default", "trl_no_checkpointing", "trl_best")


def pairs(lengths, count, vocabulary=VOCABULARY):
    """(prompt, chosen, rejected) token ids of every pair; a function of the arguments alone."""
    import numpy as np

    rng = np.random.default_rng(7)

    def draw(kind, *numbers):
        if kind == "fixed":
            return numbers[0]
        if kind == "uniform":
            return int(rng.integers(*numbers))
        mean, sigma, low, high = numbers
        return int(np.clip(round(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma)), low, high))

    def ids(count):
        return rng.integers(2, vocabulary, count).tolist()

    prompt, response = LENGTHS[lengths] if isinstance(lengths, str) else lengths
    return [(ids(draw(*prompt)), ids(draw(*response)), ids(draw(*response))) for _ in range(count)]


def model(seed, folder=None, lora=False, vocabulary=VOCABULARY):
    """The model in `folder`, or a 6.8M-parameter Llama with larger weights than transformers' own start.

    Seed 0 is the policy, 1 the reference; a saved model's reference is itself, and a first loss of ln 2 follows.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if folder:
        torch.manual_seed(seed)
        found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if lora and seed == 0:
            from peft import LoraConfig, get_peft_model

            targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            found = get_peft_model(found, LoraConfig(r=16, lora_alpha=16, target_modules=targets))
        return found.eval()
    return bench_tools.llama(
        seed=seed, vocabulary=vocabulary, hidden=256, inner=688, layers=6, heads=8, tie_word_embeddings=True,
        max_position_embeddings=2048,
        initializer_range=0.04,
    )  # fmt: skip


def reference_logprobs(data, reference):
    """Chosen and rejected log-probs under the reference, by plain transformers; made once for all runs."""
    import torch

    found = []
    with torch.no_grad():
        for prompt, *responses in data:
            row = []
            for response in responses:
                logits = reference(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
                row.append(float(torch.log_softmax(logits, -1).double()[range(len(response)), response].sum()))
            found.append(row)
    return found


class Clock:
    """Seconds and the peak memory from the end of the warm-up on."""

    def __init__(self):
        self.stamps, self.losses = [], []
        self.tick()
        Path("/proc/self/clear_refs").write_text("5")

    def tick(self):
        self.stamps.append((time.perf_counter(), time.process_time()))

    def result(self, data, order, batch):
        """Rates of the steps after the warm-up."""
        steps = len(self.stamps) - 1
        seconds, cpu_seconds = (self.stamps[-1][k] - self.stamps[WARM_UP][k] for k in (0, 1))
        timed = [data[i] for i in order[WARM_UP * batch : steps * batch]]
        tokens = sum(2 * len(p) + len(c) + len(r) for p, c, r in timed)
        return {
            "pairs_per_second": len(timed) / seconds,
            "pairs_per_cpu_second": len(timed) / cpu_seconds,
            "tokens_per_second": tokens / seconds,
            "peak_rss_bytes": bench_tools.resident("VmHWM"),
            "first_loss": self.losses[0],
        }


def the_model(spec, seed):
    """The policy (seed 0) or the reference (1) of a run."""
    return model(seed, spec["model"], spec["lora"], spec["vocabulary"])


def hardware_config(spec):
    """The run's hardware, in the words of whichever checkout is on the path."""
    from alignbench.config import HardwareConfig

    fields = {field.name for field in dataclasses.fields(HardwareConfig)}
    values = {
        "device": "cpu", "dtype": "fp32", "zero_stage": 0, "micro_batch": spec["batch"],
        "attention": "padded" if spec["engine"] == "padded" else "packed_sdpa",
        "micro_tokens": 1 << 16, "eval_batch": BATCH, "eval_tokens": 1 << 16, "logits_mib": 256, "generation_batch": 1,
        "checkpoint_every": 10**6, "flops_per_second": 1e9,
    } | spec["hardware"]  # fmt: skip
    return HardwareConfig(**{name: value for name, value in values.items() if name in fields})


def run_alignbench(spec, data, reference, order, folder):
    """Train with the engine in the checkout `root`, less what `without` names."""
    sys.path.insert(0, spec["root"])
    import numpy as np
    import torch

    from alignbench.config import TrainConfig
    from alignbench.engine import logprobs
    from alignbench.engine.batching import Row
    from alignbench.engine.objectives import PairObjective
    from alignbench.engine.train import TrainJob, train

    kind, hardware = PairObjective, hardware_config(spec)
    if spec["without"] == "answer positions only":
        logprobs._KNOWN_HEADS = ()
    elif spec["without"] == "own log-softmax":
        logprobs._chosen = lambda logits, targets: torch.log_softmax(logits, 1).gather(1, targets[:, None])[:, 0]
    elif spec["without"] == "cached reference":
        kind = live_reference(PairObjective, the_model(spec, 1), hardware)
    rows = [[Row(p + response, len(p)) for response in (c, r)] for p, c, r in data]
    goal = kind([r[0] for r in rows], [r[1] for r in rows], np.array(reference), "dpo", BETA)
    settings = TrainConfig(
        learning_rate=1e-5, epochs=1, batch_size=spec["batch"], schedule="constant", warmup_ratio=0.0, max_grad_norm=1.0
    )
    job = TrainJob(
        policy=the_model(spec, 0), objective=goal, settings=settings, seed=3, pad_id=1, work=folder,
        hardware=hardware, starts_at_reference=False, lora=spec["lora"],
    )  # fmt: skip
    clock = Clock()

    def on_metrics(step, metrics):
        clock.losses.append(metrics["loss"])
        clock.tick()

    train(job, {}, on_metrics)
    return clock.result(data, order, spec["batch"])


def live_reference(kind, reference, hardware):
    """An objective that computes its reference's log-probs in every step, beside the policy, as trainers do."""
    import torch

    from alignbench.engine.logprobs import sequence_logprobs

    class Live(kind):
        def context(self, indices, logprobs):
            rows = [row for i in indices for row in self.rows(i)]
            device = torch.device("cpu")
            found = sequence_logprobs(reference, rows, pad_id=1, hardware=hardware, device=device, label="reference")
            self.reference[indices] = found.reshape(len(indices), 2)
            return super().context(indices, logprobs)

    return Live


def run_trl(spec, data, reference, order, folder):
    """Train with TRL's DPOTrainer."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    name, policy = spec["engine"], the_model(spec, 0)
    core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(policy.config.vocab_size)}, unk_token="t2"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="t0", pad_token="t1")
    cached = name == "trl_best"
    table = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for i in order:
        for column, ids in zip(table, data[i], strict=True):
            table[column].append(ids)
    if cached:
        table |= {
            f"ref_{side}_logps": [reference[i][k] for i in order] for k, side in enumerate(("chosen", "rejected"))
        }
    keep = {} if name == "trl_default" else {"gradient_checkpointing": False}
    config = DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=spec["batch"], num_train_epochs=1, learning_rate=1e-5,
        lr_scheduler_type="constant", max_grad_norm=1.0, beta=BETA, bf16=False, use_cpu=True, save_strategy="no",
        report_to="none", disable_tqdm=True, precompute_ref_log_probs=cached, logging_steps=1, **keep,
    )  # fmt: skip
    clock = None

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # token ids are given

        def _precompute_ref_logps(self, dataset, *args, **kwargs):
            return dataset  # and so are the reference's log-probs

        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            clock.losses.append(float(loss[0] if isinstance(loss, tuple) else loss))
            return loss

    class Ticks(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock.tick()

    # with adapters TRL's reference is the policy without them
    beside = None if cached or spec["lora"] else the_model(spec, 1)
    trainer = Trainer(
        model=policy, ref_model=beside, args=config, train_dataset=Dataset.from_dict(table),
        processing_class=tokenizer, callbacks=[Ticks()],
    )  # fmt: skip
    clock = Clock()
    trainer.train()
    return clock.result(data, order, spec["batch"])


def child(spec):
    """One run in this process."""
    import logging
    import warnings

    import numpy as np
    import torch

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(spec["threads"])
    folder = Path(spec["folder"])
    if spec["model"]:
        from transformers import AutoConfig

        spec["vocabulary"] = AutoConfig.from_pretrained(spec["model"]).vocab_size
    data = pairs(spec["lengths"], spec["pairs"], spec["vocabulary"])
    if spec["engine"] == "reference":
        (folder / "reference.json").write_text(json.dumps(reference_logprobs(data, the_model(spec, 1))))
        return {}
    # the engine's own order of examples, for all
    rng = np.random.default_rng([3, 0x0DE2])
    order = rng.permutation(len(data)).tolist()
    reference = json.loads((folder / "reference.json").read_text())
    with tempfile.TemporaryDirectory() as work:
        runs = run_trl if spec["engine"].startswith("trl") else run_alignbench
        return runs(spec, data, reference, order, Path(work))


#: What a run is, unless it says otherwise.
USUAL = {
    "lengths": "pku", "pairs": 48, "batch": BATCH, "vocabulary": VOCABULARY, "model": None, "lora": False,
    "without": None, "hardware": {}, "root": str(ROOT),
}  # fmt: skip


def run(python, **spec):
    """One run in a process of its own."""
    spec = USUAL | spec
    return bench_tools.in_child(HERE, spec, python=python, threads=spec["threads"], name=spec["engine"])


def measure(engines, lengths, options):
    """Medians of every engine on one kind of lengths, and ratios to `packed`."""
    runs = {name: [] for name in engines}
    with tempfile.TemporaryDirectory() as folder:
        base = {"lengths": lengths, "folder": folder, "threads": options.threads, "pairs": options.pairs}
        base |= {"model": options.model, "lora": options.lora}
        run(sys.executable, engine="reference", **base)
        for _ in range(options.rounds):
            for name in engines:
                python = options.trl_python if name.startswith("trl") else sys.executable
                root = options.former if name == "former" else str(ROOT)
                runs[name].append(run(python, engine=name, root=root, **base))
                print(lengths, name, json.dumps(runs[name][-1]), file=sys.stderr, flush=True)
    found = {name: {key: statistics.median(r[key] for r in each) for key in each[0]} for name, each in runs.items()}
    losses = [each["first_loss"] for each in found.values()]
    ratios = {
        f"packed_over_{name}": {
            # of the same round: a machine that others use is as busy for both
            rate: statistics.median(a[rate] / b[rate] for a, b in zip(runs["packed"], runs[name], strict=True))
            for rate in ("pairs_per_second", "pairs_per_cpu_second")
        }
        | {"peak_rss": found["packed"]["peak_rss_bytes"] / found[name]["peak_rss_bytes"]}
        for name in engines
        if name != "packed"
    }
    return {"runs": found, "ratios": ratios, "largest_first_loss_difference": max(losses) - min(losses)}


def main():
    """Run everything and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--lengths", nargs="*", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--model", help="a saved model's folder, instead of the 6.8M-parameter Llama")
    parser.add_argument("--lora", action="store_true", help="rank-16 adapters on every matrix; needs --model")
    parser.add_argument("--trl-python", help="a Python that has TRL")
    parser.add_argument("--former", help="another checkout of this repository")
    options = bench_tools.options(parser, RESULTS, child)
    needs = {"former": options.former, "trl": options.trl_python}
    engines = [name for name in options.engines if needs.get(name.split("_")[0], True)]
    found = {
        **bench_tools.machine("torch", "transformers", "deepspeed"),
        "model": Path(options.model).name if options.model else "Llama of 6.8M parameters, random weights",
        "trained": "LoRA" if options.lora else "full",
        "pairs": options.pairs,
        "pairs_per_step": BATCH,
        "rounds": options.rounds,
        "threads": options.threads,
        "lengths": {},
    }
    if options.trl_python:
        ask = "import importlib.metadata as m; print(m.version('trl'))"
        found["versions"]["trl"] = subprocess.check_output([options.trl_python, "-c", ask], text=True).strip()
    for lengths in options.lengths:
        found["lengths"][lengths] = measure(engines, lengths, options)
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
