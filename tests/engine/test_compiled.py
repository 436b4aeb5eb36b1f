"""Compiled blocks compute what the others do, in every family and with what wraps them, without ever more graphs."""

import copy

import numpy as np
import pytest
import tiny
import torch
from test_packing import FAMILIES, assert_same, groups

from alignbench.engine import packing
from alignbench.engine.compiled import compile_blocks
from alignbench.engine.logprobs import LogProbPolicy
from alignbench.errors import ConfigError
from alignbench.hardware import check_hardware

QUICK, REAL = "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)


def values_and_gradients(model, backend, kind="packed_sdpa", **machine):
    """Log-probs and gradients of three passes of different lengths, the gradients added up."""
    model = copy.deepcopy(model)
    if backend is not None:
        assert compile_blocks(model, backend) == 2
    scorer, values = LogProbPolicy(model, tiny.hardware(attention=kind, **machine)), []
    for seed in (1, 2, 3):
        rows = groups(3 + seed, seed)
        found = scorer(packing.prepare(rows, tiny.PAD, kind))
        (found * torch.linspace(-1, 1, len(rows), dtype=torch.float64)).sum().backward()
        values.append(found.detach().numpy())
    return np.concatenate(values), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", [QUICK, REAL])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_is_eager_in_values_and_gradients(family, backend):
    model = FAMILIES[family]()
    assert_same(values_and_gradients(model, backend), values_and_gradients(model, None))


@pytest.mark.parametrize("kind", ["padded", "packed_sdpa"])
def test_other_lengths_compile_nothing_anew(kind):
    from torch._dynamo.utils import counters

    model = tiny.llama()
    compile_blocks(model, QUICK)
    scorer, graphs = LogProbPolicy(model, tiny.hardware(attention=kind)), []
    for seed in range(6):
        scorer(packing.prepare(groups(3 + seed, seed), tiny.PAD, kind)).sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert len(set(graphs[1:])) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "machine"),
    [
        (None, {"zero_stage": 0}),
        (None, {"zero_stage": 2}),
        (tiny.LORA, {"zero_stage": 0, "activation_checkpointing": True}),
    ],
    ids=["full", "zero2", "lora-recomputing"],
)
def test_a_compiled_training_follows_the_eager_one(tmp_path, lora, machine):
    folder = tiny.save(tiny.llama(), tmp_path / "start")
    goal = tiny.preference("dpo", tiny.load(folder))

    def trained(compiled):
        settings = {**machine, "compile": compiled, "micro_batch": 2}
        job = tiny.job(tiny.load(folder, lora), goal, tmp_path / str(compiled), lora=lora, machine=settings)
        return tiny.run(job)

    (eager, _), (compiled, _) = trained(False), trained(True)
    np.testing.assert_allclose(tiny.losses(compiled), tiny.losses(eager), atol=1e-5)


def test_zero_3_is_refused():
    with pytest.raises(ConfigError, match="ZeRO-3"):
        check_hardware(tiny.hardware(compile=True, zero_stage=3))
