"""What several benchmarks share; not a benchmark itself."""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path


def machine(*packages):
    """Where figures come from: processor, Python, versions of `packages`."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def llama(*, seed=0, vocabulary, hidden, inner, layers, heads, kv_heads=None, **changes):
    """A Llama with random weights; `changes` are further settings of transformers' config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads or heads,
        **({"max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1} | changes),
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def options(parser, results, child):
    """The command line's options, `--out` among them; started by `in_child`, it does `child`'s work and ends here."""
    parser.add_argument("--out", type=Path, default=results)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    found = parser.parse_args()
    if found.child is not None:
        print(json.dumps(child(found.child)))
        raise SystemExit
    return found


def in_child(script, spec, *, python=sys.executable, threads=1, name="", **environment):
    """What `script --child SPEC` prints last, as JSON, from a process of its own."""
    surroundings = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"} | environment
    command = [python, str(script), "--child", json.dumps(spec)]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name or spec} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def resident(name):
    """VmRSS or VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
