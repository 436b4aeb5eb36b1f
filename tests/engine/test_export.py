"""The stored policy is the trained one: full or LoRA, whatever the ZeRO stage and architecture."""

import numpy as np
import pytest
import tiny
import torch

from alignbench.config import LoraConfig
from alignbench.engine.runtime import join_process_group
from alignbench.engine.train import _Loop, trained_state
from alignbench.errors import ModelError
from alignbench.models import policy as policies

pytestmark = pytest.mark.usefixtures("split_parameters")

CASES = [
    pytest.param("llama", None, 0, id="llama-full-zero0"),
    pytest.param("llama", None, 3, id="llama-full-zero3"),
    pytest.param("llama", tiny.LORA, 0, id="llama-lora-zero0"),
    pytest.param("llama", tiny.LORA, 3, id="llama-lora-zero3"),
    pytest.param("untied", None, 3, id="untied-full-zero3"),
    pytest.param("gpt2", None, 2, id="gpt2-full-zero2"),
    pytest.param("gpt2", LoraConfig(rank=2, alpha=8.0, targets=["c_attn", "c_proj"]), 0, id="gpt2-lora-zero0"),
    pytest.param("gpt_neox", None, 0, id="gpt_neox-full-zero0"),
    pytest.param("gpt_neox", LoraConfig(rank=2, alpha=8.0, targets=["query_key_value"]), 0, id="gpt_neox-lora-zero0"),
]
MODELS = {
    "llama": tiny.llama,
    "untied": lambda: tiny.llama(tied_embeddings=False),
    "gpt2": tiny.gpt2,
    "gpt_neox": tiny.gpt_neox,
}


@pytest.mark.parametrize(("name", "lora", "stage"), CASES)
def test_exported_policy_equals_the_trained_module(tmp_path, name, lora, stage):
    from transformers import AutoModelForCausalLM

    base = tiny.save(MODELS[name](), tmp_path / "base")
    before = {n: p.clone() for n, p in tiny.load(base).named_parameters()}
    goal, unseen = tiny.preference("dpo", tiny.load(base)), tiny.rows(10, 99)
    job = tiny.job(
        tiny.load(base, lora),
        goal,
        tmp_path,
        steps=5,
        lora=lora,
        machine={"zero_stage": stage},
        train_settings={"learning_rate": 1e-2},
    )
    join_process_group(job.hardware)
    loop = _Loop(job, tiny.CPU)
    loop.run({}, lambda step, metrics: None)
    live = loop._frozen_logprobs(unseen).numpy()
    assert np.abs(live - tiny.logprobs(tiny.load(base), unseen)).max() > 0.1  # it did train

    restored = policies.restore_weights(base, trained_state(job), lora)
    np.testing.assert_allclose(tiny.logprobs(restored, unseen), live, atol=1e-5)
    folder = tiny.save(restored, tmp_path / "exported")
    opened = AutoModelForCausalLM.from_pretrained(folder)
    assert type(opened) is type(tiny.load(base))
    np.testing.assert_allclose(tiny.logprobs(opened.eval(), unseen), live, atol=1e-5)
    if lora is not None:  # modules without adapters are the base's to the bit
        kept = [n for n, p in opened.named_parameters() if not any(f".{t}." in n for t in lora.targets)]
        assert kept
        assert all(torch.equal(dict(opened.named_parameters())[n], before[n]) for n in kept)


@pytest.mark.parametrize("lora", [None, tiny.LORA], ids=["full", "lora"])
def test_tied_embeddings_stay_tied(policy_folder, tmp_path, lora):
    from safetensors import safe_open

    job = tiny.job(tiny.load(policy_folder, lora), tiny.sft(), tmp_path, lora=lora)
    _, state = tiny.run(job)
    restored = policies.restore_weights(policy_folder, state, lora)
    assert restored.lm_head.weight is restored.model.embed_tokens.weight
    folder = tiny.save(restored, tmp_path / "exported")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - a safetensors handle is no dict
    opened = tiny.load(folder)
    assert opened.lm_head.weight is opened.model.embed_tokens.weight


def test_bf16_training_exports_bf16_weights(policy_folder, tmp_path):
    half = tiny.load(policy_folder, dtype=torch.bfloat16)
    job = tiny.job(half, tiny.sft(), tmp_path, steps=2, machine={"dtype": "bf16"})
    _, state = tiny.run(job)
    folder = tiny.save(policies.restore_weights(policy_folder, state, None), tmp_path / "exported")
    assert policies.stored_dtype(folder) == torch.bfloat16


def test_foreign_tensors_are_refused(policy_folder):
    state = {name: p.detach() for name, p in tiny.llama().named_parameters()}
    with pytest.raises(ModelError, match="do not fit"):
        policies.restore_weights(policy_folder, state | {"model.extra.weight": torch.zeros(2)}, None)
    incomplete = dict(list(state.items())[:-1])
    with pytest.raises(ModelError, match="do not fit"):
        policies.restore_weights(policy_folder, incomplete, None)
    with pytest.raises(ModelError, match="do not fit"):
        policies.restore_weights(policy_folder, {"base_model.nothing.lora_A.default.weight": torch.zeros(2)}, tiny.LORA)
