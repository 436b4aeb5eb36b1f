"""Shapes of models: what a plan counts is what transformers builds, and the presets' are the published ones."""

from dataclasses import replace

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from alignbench.architecture import (
    FAMILIES,
    ArchitectureConfig,
    block_weights,
    check_architecture,
    lora_parameter_count,
    matrices,
    parameter_count,
    transformers_config,
)
from alignbench.cli import CONF, register
from alignbench.config import LoraConfig, run_id
from alignbench.errors import ConfigError
from alignbench.models.policy import add_lora, shape_of

# the numbers of weights that the models' cards state; Alpaca's are LLaMA's with one more token in and out
PUBLISHED = {
    "pythia_70m": 70_426_624,
    "pythia_410m": 405_334_016,
    "pythia_1_4b": 1_414_647_808,
    "pythia_6_9b": 6_857_302_016,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_7b": 7_615_616_512,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "alpaca_7b": 6_738_415_616 + 2 * 4096,
    "alpaca_7b_llama2": 6_738_415_616 + 2 * 4096,
    "alpaca_8b_llama3": 8_030_261_248 + 2 * 4096,
}
SMALL = ArchitectureConfig(
    vocab_size=97, hidden_size=24, intermediate_size=40, layers=3, heads=6, kv_heads=2, max_positions=32
)


def model_of(name):
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", overrides=[f"model={name}"]).model


def built(shape):
    """transformers' own model of that shape, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(transformers_config(shape))


def test_every_preset_of_a_published_model_is_here():
    brought = {path.stem for path in (CONF / "model").glob("*.yaml") if model_of(path.stem).get("path", None)}
    assert brought == set(PUBLISHED)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_preset_has_the_published_number_of_weights(name):
    model = model_of(name)
    shape = OmegaConf.to_object(model.architecture)
    check_architecture(shape, "model.architecture", built=False)
    assert parameter_count(shape) == PUBLISHED[name]
    found = built(shape)
    assert found.num_parameters() == PUBLISHED[name]
    # the adapters' targets are all the linear modules of a block
    assert set(model.lora.targets) == set(matrices(shape))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_a_model_that_is_built(family, tied):
    shape = replace(SMALL, family=family, tied_embeddings=tied)
    model = AutoModelForCausalLM.from_config(transformers_config(shape))
    assert parameter_count(shape) == model.num_parameters()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
    assert shape.layers * block_weights(shape) == sum(module.weight.numel() for module in linear.values())
    lora = LoraConfig(rank=5, targets=list(matrices(shape)))
    adapted = add_lora(model, lora, 0)
    assert lora_parameter_count(shape, lora) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_s_shape_is_the_one_it_was_saved_with(family, tmp_path):
    heads = SMALL.heads if family == "gpt_neox" else SMALL.kv_heads
    shape = replace(SMALL, family=family, kv_heads=heads, tied_embeddings=False)
    transformers_config(shape).save_pretrained(tmp_path)
    assert shape_of(str(tmp_path), SMALL) == shape


def test_a_family_that_no_plan_knows_and_one_that_is_not_built():
    with pytest.raises(ConfigError, match="is unknown"):
        check_architecture(replace(SMALL, family="gpt2"), "model.architecture", built=False)
    with pytest.raises(ConfigError, match="is a Llama"):
        check_architecture(replace(SMALL, family="gpt_neox", vocab_size=300), "model.architecture", built=True)


def test_the_family_names_no_run():
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        one, other = (
            hydra.compose("config", overrides=["model=pythia_70m", f"model.architecture.family={family}"])
            for family in FAMILIES[:2]
        )
    assert run_id(one) == run_id(other)
