"""Score models in others' formats give the numbers that those formats mean; wrong ones are refused."""

import json
import shutil

import numpy as np
import pytest
import score_folders
import tiny
import torch
from score_folders import PAIRS, texts

from alignbench.data.score_text import ScoreText, encode_texts
from alignbench.engine.attention import PADDED
from alignbench.engine.scores import EndScores, Verdicts, sequence_scores
from alignbench.errors import AlignbenchError, ConfigError, InvariantError, ModelError
from alignbench.models import policy as policies
from alignbench.models import score_models as models
from alignbench.stages.scoring import ColumnSpec, read_column, rows_of

PKU = ScoreText("pku", append_eos=True, max_length=200)


def raw(reader, folder, text=PKU, attention="auto", pad=tiny.PAD, pairs=PAIRS):
    """Raw scores of the texts."""
    tokens = encode_texts(
        policies.load_tokenizer(folder, ends=False), [p for p, _ in pairs], [r for _, r in pairs], text
    )
    machine = tiny.hardware(attention=attention, eval_batch=64)
    return sequence_scores(
        reader(machine), rows_of(tokens), pad_id=pad, hardware=machine, device=tiny.CPU, label="test"
    )


def scored(folder, dtype=torch.float32, **options):
    model = models.load_score_model(folder, dtype, tiny.CPU)
    return raw(lambda machine: EndScores(model, machine), folder, **options)


def by_hand(decoder, head, folder):
    """Safe RLHF's score of each text alone: the whole text tokenised, EOS appended, the head at the last token."""
    tokenizer = policies.load_tokenizer(folder)
    found = []
    for prompt, response in PAIRS:
        text = f"BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}{tokenizer.eos_token}"
        with torch.no_grad():
            hidden = decoder(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state
            found.append(float(head(hidden)[0, -1, 0]))
    return np.array(found)


# ---------------------------------------------------------------- Safe RLHF's format


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"shards": 3}], ids=str)
def test_a_released_checkpoint_gives_its_own_scores(tmp_path, changes):
    decoder, head = score_folders.beaver(tmp_path / "cost", **changes)
    models.check_format(tmp_path / "cost", "beaver", "x")
    found = scored(tmp_path / "cost")
    assert found.shape == (5, 1)
    np.testing.assert_allclose(found[:, 0], by_hand(decoder, head, tmp_path / "cost"), atol=1e-5)
    assert found.std() > 0.3


@pytest.mark.parametrize(
    ("score_type", "normalised"),
    [
        ("reward", lambda x: (x - float(np.float32(0.7))) / (2.0 + 1e-8)),
        ("cost", lambda x: x / (2.0 + 1e-8)),
        ("critic", lambda x: x),
    ],
)
def test_normalisation_is_what_the_score_type_says_and_keeps_a_cost_s_zero(tmp_path, score_type, normalised):
    score_folders.beaver(tmp_path / "m", score_type=score_type, do_normalize=True)
    values = np.array([[-3.0], [0.0], [5.0]])
    np.testing.assert_allclose(models.normaliser_of(tmp_path / "m")(values), normalised(values), rtol=1e-9)
    if score_type == "cost":
        assert models.normaliser_of(tmp_path / "m")(np.zeros((1, 1)))[0, 0] == 0


def test_scores_are_as_they_are_unless_normalisation_is_asked_for(tmp_path):
    score_folders.beaver(tmp_path / "m", do_normalize=False)
    assert models.normaliser_of(tmp_path / "m")(np.array([[3.0]]))[0, 0] == 3.0


def test_the_normaliser_is_read_in_its_own_precision(tmp_path):
    score_folders.beaver(tmp_path / "m", score_type="reward", do_normalize=True, mean=1.2345678)
    assert models.normaliser_of(tmp_path / "m").mean == pytest.approx(1.2345678, abs=1e-6)


def test_the_config_s_moments_serve_where_the_weights_have_none(tmp_path):
    from safetensors.torch import load_file, save_file

    score_folders.beaver(tmp_path / "m", score_type="reward", do_normalize=True)
    file = tmp_path / "m/model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if not n.startswith("normalizer")}
    save_file(kept, file, metadata={"format": "pt"})
    assert models.normaliser_of(tmp_path / "m")(np.array([[2.7]]))[0, 0] == pytest.approx(1.0)
    assert scored(tmp_path / "m").std() > 0.3


def test_a_cost_becomes_a_utility_and_a_reward_stays(tmp_path):
    score_folders.beaver(tmp_path / "m", do_normalize=True, score_type="cost")
    values = np.array([[4.0], [-2.0]])
    cost = ColumnSpec("safety", "beaver", "model_0", "worse", text=PKU)
    assert read_column(cost, values, tmp_path / "m").tolist() == pytest.approx([-2.0, 1.0])
    shifted = ColumnSpec("safety", "beaver", "model_0", "worse", shift=1.5, text=PKU)
    assert read_column(shifted, values, tmp_path / "m").tolist() == pytest.approx([-0.5, 2.5])


def test_a_pad_token_that_is_eos_moves_nothing(tmp_path):
    score_folders.beaver(tmp_path / "m")
    found = [scored(tmp_path / "m", attention=PADDED, pad=pad) for pad in (tiny.PAD, tiny.EOS)]
    np.testing.assert_array_equal(*found)


def test_eos_is_read_and_its_absence_is_another_score(tmp_path):
    score_folders.beaver(tmp_path / "m")
    bare = scored(tmp_path / "m", text=ScoreText("pku", append_eos=False, max_length=200))
    assert np.abs(bare - scored(tmp_path / "m")).min() > 1e-3


def test_what_we_save_is_that_format(tmp_path):
    """The tensors and config of a folder that our class wrote are those of the one it was read from."""
    from safetensors.torch import load_file

    score_folders.beaver(tmp_path / "m", do_normalize=True)
    model = models.load_score_model(tmp_path / "m", torch.float32, tiny.CPU)
    policies.save_policy(model, tiny.tokenizer(), tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert (config["architectures"], config["score_type"]) == (["LlamaForScore"], "cost")
    assert config["do_normalize"] is True


def test_a_fresh_one_has_no_opinion_and_the_policy_s_decoder(policy_folder, tmp_path):
    fresh = models.fresh_score_model(policy_folder, torch.float32, tiny.CPU, "reward")
    start = policies.load_policy(policy_folder, torch.float32, tiny.CPU)
    assert all(torch.equal(a, b) for a, b in zip(fresh.model.parameters(), start.model.parameters(), strict=True))
    assert not raw(lambda machine: EndScores(fresh, machine), policy_folder).any()
    policies.save_policy(fresh, tiny.tokenizer(), tmp_path / "s")
    models.check_format(tmp_path / "s", "beaver", "x")
    assert not scored(tmp_path / "s").any()


# ---------------------------------------------------------------- classifiers


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "GPT2", "GPTNeoX", "Gemma"])
def test_a_classifier_gives_transformers_own_logits(tmp_path, family):
    folder = score_folders.classifier(tmp_path / "c", family, labels=3)
    text = ScoreText("{prompt} => {response}", append_eos=False, max_length=200)
    model = models.load_classifier(folder, torch.float32, tiny.CPU)
    found = raw(lambda machine: EndScores(model, machine), folder, text)
    tokenizer = tiny.tokenizer()
    with torch.no_grad():
        one = [model(torch.tensor([tokenizer(f"{p} => {r}")["input_ids"]])).logits[0] for p, r in PAIRS]
    np.testing.assert_allclose(found, torch.stack(one).numpy(), atol=1e-5)
    assert found.shape == (5, 3)
    assert found.std(0).min() > 1e-3


def test_an_encoder_is_asked_for_its_own_logits(tmp_path):
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers import models as parts
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *{w for pair in PAIRS for t in pair for w in t.split()}]
    inner = Tokenizer(parts.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        num_labels=2, pad_token_id=0,
    )  # fmt: skip
    model = tiny.enlarge(BertForSequenceClassification(config), 4.0)
    policies.save_policy(model, tokenizer, tmp_path / "bert")
    models.check_format(tmp_path / "bert", "classifier", "x")
    loaded = models.load_classifier(tmp_path / "bert", torch.float32, tiny.CPU)
    text = ScoreText("{prompt} {response}", append_eos=False, max_length=60)
    found = raw(lambda machine: EndScores(loaded, machine), tmp_path / "bert", text, pad=0)
    with torch.no_grad():
        one = [model(torch.tensor([tokenizer(f"{p} {r}")["input_ids"]])).logits[0] for p, r in PAIRS]
    np.testing.assert_allclose(found, torch.stack(one).numpy(), atol=1e-5)
    # cut, it still ends as the encoder was trained to see it
    cut = encode_texts(tokenizer, *texts(), ScoreText("{prompt} {response}", append_eos=False, max_length=9))
    assert all(ids[0] == 1 and ids[-1] == 2 and len(ids) <= 9 for ids in cut.ids)


def test_which_label_is_read_and_how(tmp_path):
    folder = score_folders.classifier(
        tmp_path / "c", labels=3, id2label={0: "fine", 1: "Toxic", 2: "odd"}, label2id={"fine": 0, "Toxic": 1, "odd": 2}
    )
    values = np.random.default_rng(0).normal(size=(4, 3))

    def read(how, label="toxic", where=folder):
        return read_column(ColumnSpec("safety", "classifier", "m", "better", how, label), values, where)

    share = np.exp(values[:, 1]) / np.exp(values).sum(1)
    np.testing.assert_allclose(read("score"), values[:, 1])
    np.testing.assert_allclose(read("probability"), share)
    np.testing.assert_allclose(read("log_odds"), np.log(share / (1 - share)))
    np.testing.assert_allclose(read("score", "2"), values[:, 2])
    many = score_folders.classifier(tmp_path / "m", labels=3, problem_type="multi_label_classification")
    np.testing.assert_allclose(read("probability", "1", many), 1 / (1 + np.exp(-values[:, 1])))


# ---------------------------------------------------------------- judges

JUDGE = ScoreText("Task: is the answer safe?\nUser: {prompt}\nAgent: {response}\nVerdict:", False, 200)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "GPT2", "GPTNeoX", "Gemma"])
def test_a_judge_s_log_odds_are_those_of_its_next_token(tmp_path, family):
    folder = score_folders.language_model(tmp_path / "j", family)
    models.check_format(folder, "judge", "x")
    model, tokenizer = policies.load_policy(folder, torch.float32, tiny.CPU), tiny.tokenizer()
    found = raw(lambda machine: Verdicts(model, machine, (40, 50)), folder, JUDGE)[:, 0]
    with torch.no_grad():
        wanted = []
        for prompt, response in PAIRS:
            text = f"Task: is the answer safe?\nUser: {prompt}\nAgent: {response}\nVerdict:"
            share = torch.softmax(model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].double(), -1)
            wanted.append(float(torch.log(share[40] / share[50])))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * max(1, np.abs(wanted).max()))
    assert np.std(wanted) > 0.05
    probability = read_column(ColumnSpec("safety", "judge", "m", "worse", "probability"), found[:, None], folder)
    np.testing.assert_allclose(-probability, 1 / (1 + np.exp(-found)), rtol=1e-6)


def test_verdicts_need_first_tokens_of_their_own(tokenizer):
    ids = models.verdict_tokens(tokenizer, "Verdict:\n", ("unsafe", "safe"), "x")
    assert [tokenizer.decode([i]) for i in ids] == ["u", "s"]
    with pytest.raises(ConfigError, match="same token"):
        models.verdict_tokens(tokenizer, "Verdict:\n", ("safe", "safer"), "x")


# ---------------------------------------------------------------- banks


def test_equal_texts_are_computed_once(tmp_path, monkeypatch):
    score_folders.beaver(tmp_path / "m")
    twice = scored(tmp_path / "m", pairs=[*PAIRS, *PAIRS[::-1]])
    np.testing.assert_array_equal(twice[:5], twice[5:][::-1])
    seen = []
    monkeypatch.setattr(
        "alignbench.engine.scores.frozen_logprobs",
        lambda scorer, attention, rows, *rest: seen.append(len(rows)) or np.zeros((len(rows), 1)),
    )
    scored(tmp_path / "m", pairs=[*PAIRS, *PAIRS[::-1]])
    assert seen == [5]


# ---------------------------------------------------------------- refusals


def refused(folder, kind="beaver", larger_is="worse", label=None):
    def look():
        models.check_format(folder, kind, "scorers.s.columns.safety")
        models.check_meaning(folder, kind, larger_is, label, "scorers.s.columns.safety")

    with pytest.raises(AlignbenchError) as caught:
        look()
    return caught.value


def test_a_policy_is_no_score_model_and_the_other_way_round(tmp_path, policy_folder):
    error = refused(policy_folder)
    assert "score_head.weight" in error.what
    assert "LlamaForCausalLM" in error.what
    assert "kind=judge" in error.mend
    score_folders.beaver(tmp_path / "m")
    assert "kind=beaver" in refused(tmp_path / "m", "classifier").mend
    assert "kind=beaver" in refused(tmp_path / "m", "judge").mend
    folder = score_folders.classifier(tmp_path / "c")
    assert "kind=classifier" in refused(folder).mend


def test_a_sign_that_contradicts_the_model_is_refused(tmp_path):
    score_folders.beaver(tmp_path / "cost")
    error = refused(tmp_path / "cost", larger_is="better")
    assert (error.where, "cost model" in error.what) == ("scorers.s.columns.safety.larger_is", True)
    assert "larger_is=worse" in error.mend
    score_folders.beaver(tmp_path / "reward", score_type="reward")
    assert "larger_is=better" in refused(tmp_path / "reward", larger_is="worse").mend
    score_folders.beaver(tmp_path / "critic", score_type="critic")
    assert "unfinished" in refused(tmp_path / "critic").what


def test_a_label_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    folder = score_folders.classifier(tmp_path / "c", labels=2, id2label={0: "ok", 1: "bad"})
    assert "0 (ok), 1 (bad)" in refused(folder, "classifier", label="ugly").mend
    assert "has 2 labels" in refused(folder, "classifier", label=None).what


def test_folders_without_a_model_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(tmp_path / "empty").what
    score_folders.beaver(tmp_path / "m")
    (tmp_path / "m/model.safetensors").rename(tmp_path / "m/pytorch_model.bin")
    assert "pickled" in refused(tmp_path / "m").what
    (tmp_path / "m/pytorch_model.bin").rename(tmp_path / "m/model.safetensors")
    whole = (tmp_path / "m/model.safetensors").read_bytes()
    (tmp_path / "m/model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "no whole safetensors" in refused(tmp_path / "m").what


def test_old_buffers_in_a_checkpoint_are_no_matter(tmp_path):
    """Llama checkpoints of 2023 hold every layer's rotary frequencies."""
    from safetensors.torch import load_file, save_file

    score_folders.beaver(tmp_path / "m")
    before = scored(tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    old = {f"model.layers.{k}.self_attn.rotary_emb.inv_freq": torch.ones(4) for k in (0, 1)}
    save_file(load_file(file) | old, file, metadata={"format": "pt"})
    np.testing.assert_array_equal(scored(tmp_path / "m"), before)


def test_an_absent_or_broken_weight_is_refused_when_loading(tmp_path):
    from safetensors.torch import load_file, save_file

    score_folders.beaver(tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    state = load_file(file)
    save_file({n: t for n, t in state.items() if "layers.1.mlp.up" not in n}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"absent: model\.layers\.1\.mlp\.up_proj"):
        scored(tmp_path / "m")
    save_file(state | {"score_head.weight": state["score_head.weight"] * np.nan}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 parameter tensor\(s\) hold NaN or infinity: score_head"):
        scored(tmp_path / "m")


def test_scores_that_overflow_are_refused(tmp_path):
    score_folders.beaver(tmp_path / "m")
    model = models.load_score_model(tmp_path / "m", torch.float32, tiny.CPU)
    torch.nn.init.constant_(model.score_head.bias, torch.inf)
    with pytest.raises(InvariantError, match="not finite"):
        raw(lambda machine: EndScores(model, machine), tmp_path / "m")


def test_a_model_s_identity_is_its_content_or_its_pinned_revision(tmp_path, monkeypatch):
    score_folders.beaver(tmp_path / "m")
    shutil.copytree(tmp_path / "m", tmp_path / "copy")
    score_folders.beaver(tmp_path / "other", seed=1)
    first, copy, other = (models.identify(str(tmp_path / n), None, "w") for n in ("m", "copy", "other"))
    assert first == copy != other
    with pytest.raises(ModelError, match="there is no folder"):
        models.identify(str(tmp_path / "absent"), None, "scorers.s.columns.reward")
    with pytest.raises(ConfigError, match="pinned revision"):
        models.identify("PKU-Alignment/beaver-7b-v1.0-cost", None, "w")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        models.identify("PKU-Alignment/beaver-7b-v1.0-cost", "a" * 40, "scorers.s.columns.safety")
    assert "hf download PKU-Alignment/beaver-7b-v1.0-cost --revision aaaa" in caught.value.mend
    assert "scorers.s.columns.safety.path=FOLDER" in caught.value.mend
