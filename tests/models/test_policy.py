"""Policies: user errors that say how to mend them, fingerprints, LoRA, merging."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import tiny
import torch

from alignbench.errors import ModelError
from alignbench.models import policy as policies

CPU = tiny.CPU


@pytest.fixture
def folder(policy_folder, tmp_path):
    """A copy of the tiny policy that a test may damage."""
    return shutil.copytree(policy_folder, tmp_path / "policy")


# ---- building and loading


def test_building_is_a_function_of_the_seed_and_leaves_the_global_generator(tokenizer):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, same, other = (policies.build_llama(tiny.SHAPE, tokenizer, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert tiny.same_bits(first.state_dict(), same.state_dict())
    assert not tiny.same_bits(first.state_dict(), other.state_dict())


def test_tokenizer_round_trips_any_text_and_survives_saving(folder, tokenizer):
    text = "Kettle №5 → naïve 🫖\n  two  spaces"
    loaded = policies.load_tokenizer(folder)
    for candidate in (tokenizer, loaded):
        ids = candidate.encode(text, add_special_tokens=False)
        assert candidate.decode(ids) == text
        assert not {candidate.eos_token_id, candidate.pad_token_id} & set(ids)
    assert loaded.encode(text) == tokenizer.encode(text)
    assert (loaded.eos_token_id, policies.pad_id(loaded)) == (tiny.EOS, tiny.PAD)


def test_loaded_policy_is_in_evaluation_mode_and_of_the_asked_dtype(folder):
    for dtype in (torch.float32, torch.bfloat16):
        model = policies.load_policy(folder, dtype, CPU)
        assert not model.training
        assert {p.dtype for p in model.parameters()} == {dtype}


def test_folder_without_tokenizer_says_how_to_mend_it(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer[\s\S]*save_pretrained") as caught:
        policies.load_tokenizer(folder)
    assert str(folder) in str(caught.value)


def test_broken_tokenizer_is_a_model_error(folder):
    (folder / "tokenizer.json").write_text("{ not json")
    with pytest.raises(ModelError, match="tokenizer cannot be read"):
        policies.load_tokenizer(folder)


def test_tokenizer_without_eos_is_refused(folder):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            config = json.loads((folder / name).read_text())
            config.pop("eos_token", None)
            (folder / name).write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        policies.load_tokenizer(folder)


def test_eos_pads_where_there_is_no_pad_token(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.pad_token = None
    assert policies.pad_id(other) == tiny.EOS


def test_pickled_weights_alone_are_refused(folder):
    torch.save(tiny.llama().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"safetensors[\s\S]*pickled weights are not read"):
        policies.load_policy(folder, torch.float32, CPU)
    with pytest.raises(ModelError, match=r"lacks config.json or \*.safetensors"):
        policies.fingerprint(str(folder), None)


def test_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="no causal language model"):
        policies.load_policy(folder, torch.float32, CPU)
    with pytest.raises(ModelError, match=r"lacks config.json"):
        policies.bring_in(str(folder), None, folder.parent / "in")


def test_weights_of_another_shape_are_a_model_error(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(ModelError, match="safetensors"):
        policies.load_policy(folder, torch.float32, CPU)


def test_truncated_weights_are_a_model_error(folder):
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(ModelError, match="safetensors"):
        policies.load_policy(folder, torch.float32, CPU)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_reported_by_name(tmp_path, value):
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = value
    tiny.save(model, tmp_path)
    with pytest.raises(ModelError, match=r"1 parameter tensor.*model\.layers\.1\.mlp\.up_proj\.weight"):
        policies.load_policy(tmp_path, torch.float32, CPU)


def test_absent_weights_are_not_filled_with_random_numbers(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        policies.load_policy(folder, torch.float32, CPU)


# ---- LoRA


def test_a_lora_target_without_a_module_lists_the_linear_ones(policy):
    lora = replace(tiny.LORA, targets=["q_proj", "query_key_value"])
    with pytest.raises(ModelError, match="query_key_value match no module of LlamaForCausalLM") as caught:
        policies.add_lora(policy, lora, 0)
    for leaf in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"):
        assert leaf in caught.value.mend


def test_fresh_adapters_change_nothing_and_depend_on_the_seed(policy_folder):
    rows = tiny.rows(6, 0)
    plain = tiny.logprobs(tiny.load(policy_folder), rows)
    first, same, other = (policies.add_lora(tiny.load(policy_folder), tiny.LORA, seed) for seed in (1, 1, 2))
    assert (tiny.logprobs(first, rows) == plain).all()
    states = [{n: p for n, p in m.named_parameters() if p.requires_grad} for m in (first, same, other)]
    assert all("lora_" in name for name in states[0])
    assert tiny.same_bits(states[0], states[1])
    assert not tiny.same_bits(states[0], states[2])


# ---- fingerprints and bringing in


def test_fingerprint_changes_with_every_file_and_only_then(folder, policy_folder):
    original = policies.fingerprint(str(folder), None)
    assert policies.fingerprint(str(policy_folder), None) == original  # the place does not count
    names = sorted(file.name for file in policies.model_files(folder))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert policies.fingerprint(str(folder), None) != original, name
        (folder / name).write_bytes(content)
        os.utime(folder / name, (0, 0))
        assert policies.fingerprint(str(folder), None) == original, name
    (folder / "tokenizer.json").rename(folder / "other.json")
    assert policies.fingerprint(str(folder), None) != original


def test_pickles_and_notes_do_not_count(folder):
    original = policies.fingerprint(str(folder), None)
    (folder / "training_args.bin").write_bytes(b"x")
    (folder / "README.md").write_text("x")
    assert policies.fingerprint(str(folder), None) == original


def test_neither_folder_nor_hub_id(tmp_path):
    with pytest.raises(ModelError, match="neither a folder nor a hub id") as caught:
        policies.fingerprint(str(tmp_path / "absent"), None)
    assert caught.value.where == "model.path"


def test_hub_id_without_a_revision_is_refused():
    with pytest.raises(ModelError, match=r"owner/name has no pinned revision[\s\S]*model\.revision="):
        policies.fingerprint("owner/name", None)
    revision = "0" * 40
    assert policies.fingerprint("owner/name", revision) == f"hub:owner/name@{revision}"


def test_hub_id_that_is_not_cached_says_so_offline(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=r"neither in the local hub cache nor reachable[\s\S]*model\.path=") as caught:
        policies.bring_in("owner/name", "0" * 40, tmp_path / "in")
    assert "owner/name" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "hub"),
    [("owner/name", True), ("./a/b", False), ("/a/b", False), ("~/a", False), ("a", False), ("a/b/c", False)],
)
def test_what_counts_as_a_hub_id(path, hub):
    assert policies.is_hub_id(path) is hub


def test_bringing_in_copies_the_model_and_nothing_else(folder, tmp_path):
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    policies.bring_in(str(folder), None, tmp_path / "in")
    assert not (tmp_path / "in/pytorch_model.bin").exists()
    assert policies.fingerprint(str(tmp_path / "in"), None) == policies.fingerprint(str(folder), None)
    rows = tiny.rows(3, 0)
    assert (tiny.logprobs(tiny.load(tmp_path / "in"), rows) == tiny.logprobs(tiny.load(folder), rows)).all()


# ---- merging (P-SACPO)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    root = tmp_path_factory.mktemp("merge")
    return [tiny.save(tiny.llama(seed=seed), root / str(seed)) for seed in (1, 2)]


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("q", [0.25, 0.7])
def test_merge_is_the_weight_average_to_float_precision(two, q):
    first, second = (weights(tiny.load(folder)) for folder in two)
    merged = policies.merge_policies([(two[0], 1 - q), (two[1], q)])
    for name, found in weights(merged).items():
        exact = (1 - q) * first[name].double() + q * second[name].double()
        assert torch.equal(found, exact.float()), name
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert not merged.training


@pytest.mark.parametrize("q", [0.0, 1.0])
def test_ends_of_the_merge_are_the_policies_themselves(two, q):
    merged = policies.merge_policies([(two[0], 1 - q), (two[1], q)])
    assert tiny.same_bits(weights(merged), weights(tiny.load(two[int(q)])))


def test_merge_of_three_and_beyond_the_segment(two, tmp_path):
    third = tiny.save(tiny.llama(seed=3), tmp_path / "3")
    merged = policies.merge_policies([(two[0], 0.5), (two[1], 0.8), (third, -0.3)])
    states = [weights(tiny.load(folder)) for folder in (*two, third)]
    expected = {
        n: 0.5 * states[0][n].double() + 0.8 * states[1][n].double() - 0.3 * states[2][n].double() for n in states[0]
    }
    assert tiny.distance(weights(merged), expected) < 1e-6


@pytest.mark.parametrize("parts", [(0.5, 0.6), (0.5, 0.4), (1.0, 1.0)])
def test_merge_weights_must_sum_to_one(two, parts):
    with pytest.raises(ModelError, match="merge weights sum to"):
        policies.merge_policies(list(zip(two, parts, strict=True)))


@pytest.mark.parametrize(
    "change",
    # the last two have the same names and shapes, and mean something else
    [{"hidden_size": 16}, {"layers": 1}, {"tied_embeddings": False}, {"heads": 4, "kv_heads": 2}],
)
def test_merging_other_architectures_is_refused(two, tmp_path, change):
    other = tiny.save(tiny.llama(**change), tmp_path / "other")
    with pytest.raises(ModelError, match="different shape"):
        policies.merge_policies([(two[0], 0.5), (other, 0.5)])


def test_merging_other_families_is_refused(two, tmp_path):
    other = tiny.save(tiny.gpt_neox(), tmp_path / "other")
    with pytest.raises(ModelError, match="different shape"):
        policies.merge_policies([(two[0], 0.5), (other, 0.5)])


def test_bf16_parts_are_averaged_before_they_are_rounded(tmp_path):
    folders = [tiny.save(tiny.llama(seed=s).to(torch.bfloat16), tmp_path / str(s)) for s in (1, 2)]
    first, second = (weights(tiny.load(folder)) for folder in folders)
    merged = policies.merge_policies([(folders[0], 0.75), (folders[1], 0.25)])
    for name, found in weights(merged).items():
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, (0.75 * first[name].double() + 0.25 * second[name].double()).bfloat16()), name
