"""Score models: Safe RLHF's format (Beaver's reward and cost models), classifiers, and generative judges.

Beaver's checkpoints name a class that only the `safe_rlhf` package has (`LlamaForScore`), and that package's copy does
not import with current transformers. The format is simple: a decoder under its usual prefix, a linear `score_head` on
the last hidden states, and the buffers `normalizer.{mean,var,count}`; config.json says `score_type` (reward, cost or
critic) and whether scores are normalised. It is read here with plain transformers, for every decoder family; our own
score models are written in it, so `safe_rlhf` and this module open the same folders.

Sources: Safe RLHF (Dai et al., arXiv 2310.12773) and its score model code (PKU-Alignment/safe-rlhf).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from alignbench.errors import ConfigError, ModelError
from alignbench.models.policy import SCORE_HEAD as HEAD
from alignbench.models.policy import WEIGHT_SUFFIX, fingerprint, hold, is_hub_id, load_policy, load_whole
from alignbench.scoring import BEAVER, CLASSIFIER, JUDGE, LEARNED

REWARD, COST, CRITIC = "reward", "cost", "critic"
#: Safe RLHF's own: what keeps a vanishing deviation from dividing.
_EPSILON = 1e-8


@cache
def score_model_class(kind: Any) -> Any:
    """A transformers model in Safe RLHF's format, of the family of the configuration class `kind`.

    Raises:
        ModelError: transformers has no bare model of that family.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if kind not in MODEL_MAPPING:
        raise ModelError(
            f"transformers has no decoder for {kind.__name__}", where="score model", mend="use another family"
        )
    decoder: Any = MODEL_MAPPING[kind]
    prefix, family = decoder.base_model_prefix, next(c for c in decoder.__mro__[1:] if c.__name__.endswith("Model"))

    class ForScore(family):  # type: ignore[misc, valid-type]
        """Decoder, score head and normaliser; the forward pass is `engine.scores.EndScores`'s."""

        config_class = kind
        base_model_prefix = prefix

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            width = getattr(config, "score_dim", 1)
            setattr(self, prefix, decoder(config))
            self.score_head = nn.Linear(config.hidden_size, width, bias=getattr(config, "score_bias", True))
            self.normalizer = nn.Module()
            self.normalizer.register_buffer("mean", torch.zeros(width))
            self.normalizer.register_buffer("var", torch.ones(width))
            self.normalizer.register_buffer("count", torch.zeros(1, dtype=torch.long))
            self.post_init()

        def get_output_embeddings(self) -> None:
            return None

    ForScore.__name__ = ForScore.__qualname__ = kind.__name__.removesuffix("Config") + "ForScore"
    return ForScore


# ---------------------------------------------------------------- formats, read without loading


@dataclass(frozen=True)
class Normaliser:
    """What Safe RLHF's score models do to a raw score.

    Attributes:
        function: "affine" ((x - mean) / std: rewards), "scale" (x / std, which keeps a cost's zero) or "identity".
        mean: (score_dim,).
        std: (score_dim,).
    """

    function: str
    mean: np.ndarray
    std: np.ndarray

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Normalised scores, of the same shape (n, score_dim)."""
        if self.function == "identity":
            return scores
        shifted = scores - self.mean if self.function == "affine" else scores
        return shifted / (self.std + _EPSILON)


def normaliser_of(folder: Path) -> Normaliser:
    """The normaliser of a folder in Safe RLHF's format: identity, unless its config asks for more.

    Its numbers are read in the precision they are stored in, whatever dtype the model runs in.
    """
    config = json.loads((folder / "config.json").read_text())
    if not config.get("do_normalize"):
        return Normaliser("identity", np.zeros(1), np.ones(1))
    function = {REWARD: "affine", COST: "scale", CRITIC: "identity"}[config.get("score_type", REWARD)]
    stored = _tensors(folder, ("normalizer.mean", "normalizer.var"))
    mean, var = (
        np.atleast_1d(np.asarray(stored.get(f"normalizer.{name}", config.get(name)), dtype=np.float64))
        for name in ("mean", "var")
    )
    if not (np.isfinite(mean).all() and np.isfinite(var).all() and (var >= 0).all()):
        raise ModelError(
            f"do_normalize is set, but the normaliser has mean {mean.tolist()} and variance {var.tolist()}",
            where=str(folder),
            mend="get an intact copy: its weights hold normalizer.mean and normalizer.var, or its config mean and var",
        )
    return Normaliser(function, mean, np.sqrt(var))


def _headers(folder: Path) -> dict[str, Path]:
    """Tensor names of a folder's safetensors, with the file of each."""
    from safetensors import SafetensorError, safe_open

    found = {}
    for file in sorted(folder.glob("*" + WEIGHT_SUFFIX)):
        try:
            with safe_open(file, framework="pt") as weights:
                found.update(dict.fromkeys(weights.keys(), file))
        except SafetensorError as error:
            raise ModelError(
                f"{file.name} is no whole safetensors file ({error})", where=str(folder), mend="get an intact copy"
            ) from error
    return found


def _tensors(folder: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    found = {}
    for name, file in _headers(folder).items():
        if name in names:
            with safe_open(file, framework="pt") as weights:
                found[name] = weights.get_tensor(name).double().numpy()
    return found


def check_format(folder: Path, kind: str, where: str) -> None:
    """Refuse a folder that does not hold a score model of that kind; no weight is read.

    Args:
        folder: A transformers folder.
        kind: "beaver", "classifier" or "judge".
        where: The configuration key, for messages.

    Raises:
        ModelError: no config, no safetensors, no head, another architecture.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder} has no readable config.json ({type(error).__name__})",
            where=where,
            mend="give a transformers folder: config.json, *.safetensors, tokenizer",
        ) from None
    names = _headers(folder)
    if not names:
        pickled = any(folder.glob("*.bin"))
        raise ModelError(
            f"{folder} has no *.safetensors" + (", only pickled weights, which are not read" if pickled else ""),
            where=where,
            mend="get the repository's safetensors, or load and re-save it with model.save_pretrained(FOLDER)",
        )
    architecture = ", ".join(config.get("architectures") or ["none"])
    heads = [n for n in names if n.split(".")[0] in (HEAD, "score", "classifier", "lm_head", "embed_out")]
    has = {
        BEAVER: f"{HEAD}.weight" in names,
        CLASSIFIER: "ForSequenceClassification" in architecture,
        JUDGE: "CausalLM" in architecture or "LMHead" in architecture,
    }
    if not has[kind]:
        wanted = {
            BEAVER: f"{HEAD}.weight (Safe RLHF's score models, architecture ...ForScore)",
            CLASSIFIER: "a classifier (architecture ...ForSequenceClassification)",
            JUDGE: "a causal language model (architecture ...ForCausalLM)",
        }[kind]
        fits = [name for name, good in has.items() if good]
        raise ModelError(
            f"{folder} holds no {wanted}: its architecture is {architecture}, its heads "
            f"{', '.join(sorted({n.rsplit('.', 1)[0] for n in heads})) or 'none'}",
            where=where,
            mend=f"kind={fits[0]}" if fits else "a policy scores nothing: give its reward or cost model",
        )


def check_meaning(folder: Path, kind: str, larger_is: str, label: str | None, where: str) -> None:
    """Refuse a configuration that contradicts what the model says of itself.

    Args:
        folder: A folder that `check_format` has passed.
        kind: "beaver", "learned" (which is in the same format), "classifier" or "judge".
        larger_is: "better" or "worse": what the configuration says of the raw score.
        label: The label of a classifier that is read.
        where: The configuration key, for messages.

    Raises:
        ConfigError: a cost model whose larger scores are called better, a reward model whose are called worse, a
            critic, a label that the classifier has not got.
    """
    config = json.loads((folder / "config.json").read_text())
    if kind in (BEAVER, LEARNED):
        meant = {REWARD: "better", COST: "worse"}.get(config.get("score_type", REWARD))
        if meant is None:
            raise ConfigError(
                f"score_type is {config.get('score_type')!r}: a critic values unfinished texts",
                where=where,
                mend="give a reward or a cost model",
            )
        if larger_is != meant:
            raise ConfigError(
                f"larger_is = {larger_is}, but this is a {config.get('score_type', REWARD)} model",
                where=f"{where}.larger_is",
                mend=f"larger_is={meant} (a cost above 0 is unsafe)",
            )
    if kind == CLASSIFIER:
        label_index(config, label, where)


def label_index(config: Mapping[str, Any], label: str | None, where: str) -> int:
    """Which of a classifier's logits `label` (a number or a name) is.

    Raises:
        ConfigError: it has no such label, or several and none is named.
    """
    names = {int(k): str(v) for k, v in (config.get("id2label") or {}).items()}
    count = int(config.get("num_labels") or len(names) or 2)
    if label is None and count == 1:
        return 0
    for index in range(count):
        if label is not None and label.lower() in (str(index), names.get(index, "").lower()):
            return index
    known = ", ".join(f"{i} ({names[i]})" if i in names else str(i) for i in range(count))
    raise ConfigError(
        f"label = {label}, and the classifier has {count} labels", where=f"{where}.label", mend=f"one of: {known}"
    )


def identify(path: str, revision: str | None, where: str) -> str:
    """What identifies a score model's content; a hub model must be here, or reachable, already.

    Raises:
        ModelError: the folder does not exist, or the hub model is neither in the cache nor reachable.
        ConfigError: a hub id without a pinned revision.
    """
    if not is_hub_id(path):
        if not Path(path).is_dir():
            raise ModelError(
                f"there is no folder {path}",
                where=f"{where}.path",
                mend="give a transformers folder (config.json, *.safetensors, tokenizer), or a hub id owner/name",
            )
        return fingerprint(path, revision)
    if not revision:
        raise ConfigError(
            f"hub model {path} has no pinned revision",
            where=f"{where}.revision",
            mend=f"{where}.revision=40-hex-digits, the commit that the hub shows (a branch moves)",
        )
    cached_folder(path, revision, where)
    return fingerprint(path, revision)


def cached_folder(path: str, revision: str, where: str) -> Path | None:
    """The hub cache's folder of a model; None where it is not cached but the hub answers for it.

    Raises:
        ModelError: not cached, and the hub cannot be reached or has no such model.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        folder = Path(snapshot_download(path, revision=revision, local_files_only=True))
        if any(folder.glob("*" + WEIGHT_SUFFIX)):
            return folder
    except Exception:  # noqa: BLE001 - whatever it says, it is not in the cache
        pass
    try:
        hf_hub_download(path, "config.json", revision=revision)
    except Exception as error:
        offline = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") == "1" else type(error).__name__
        raise ModelError(
            f"{path}@{revision} is neither in the local hub cache nor reachable ({offline})",
            where=f"{where}.path",
            mend=f"where there is a network: hf download {path} --revision {revision} --local-dir FOLDER; "
            f"then {where}.path=FOLDER",
        ) from error
    return None


# ---------------------------------------------------------------- loading


def load_score_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A score model in Safe RLHF's format, in evaluation mode; raw scores, see `normaliser_of`.

    Raises:
        ModelError: an absent or broken parameter.
    """
    from transformers import AutoConfig

    names = _headers(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # the key's name changed between Safe RLHF's versions, the weights say it for sure
    config.score_bias = f"{HEAD}.bias" in names
    kind: Any = type(config)
    # its own normaliser is read by `normaliser_of`, which knows where else its numbers stand
    return load_whole(score_model_class(kind), "score model", folder, dtype, device, spare="normalizer.", config=config)


def load_classifier(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A sequence classifier, in evaluation mode.

    Raises:
        ModelError: an absent or broken parameter.
    """
    from transformers import AutoModelForSequenceClassification

    return load_whole(AutoModelForSequenceClassification, "classifier", folder, dtype, device)


def fresh_score_model(folder: Path, dtype: torch.dtype, device: torch.device, score_type: str) -> Any:
    """A score model on the decoder of a policy's folder; its head is zero, so that it starts from no opinion.

    Every pair then has the margin 0 and every response the cost 0, and the loss at step 0 is ln 2 (reward) or
    3 ln 2 (cost) whatever the text.

    Args:
        folder: A causal language model's folder.
        dtype: Parameter dtype.
        device: Where it goes.
        score_type: "reward" or "cost".
    """
    policy = load_policy(folder, dtype, torch.device("cpu"))
    config = policy.config
    config.update({"score_type": score_type, "score_dim": 1, "score_bias": True, "do_normalize": False})
    config.update({"normalizer_type": None, "mean": None, "var": None, "momentum": None})
    family: Any = type(config)
    kind = score_model_class(family)
    with torch.device("meta"):
        model = kind(config)
    # the decoder itself, not a copy: a 7B model would not fit twice
    setattr(model, model.base_model_prefix, policy.base_model)
    model.score_head = nn.Linear(config.hidden_size, 1, dtype=dtype)
    nn.init.zeros_(model.score_head.weight)
    nn.init.zeros_(model.score_head.bias)
    model.normalizer.mean, model.normalizer.var = torch.zeros(1), torch.ones(1)
    model.normalizer.count = torch.zeros(1, dtype=torch.long)
    config.architectures = [kind.__name__]
    return hold(model.to(device).eval())


def verdict_tokens(tokenizer: Any, text_end: str, verdicts: tuple[str, str], where: str) -> tuple[int, int]:
    """The first token of each verdict, where it follows the judge's text.

    Args:
        tokenizer: The judge's.
        text_end: What stands before the verdict.
        verdicts: (what says unsafe, what says safe).
        where: The configuration key, for messages.

    Raises:
        ConfigError: the two begin with one token, or a verdict melts into the text before it.
    """
    before = tokenizer(text_end, add_special_tokens=False)["input_ids"]
    found = []
    for verdict in verdicts:
        ids = tokenizer(text_end + verdict, add_special_tokens=False)["input_ids"]
        if ids[: len(before)] != before or len(ids) == len(before):
            raise ConfigError(
                f"the verdict {verdict!r} melts into the text before it: its first token is not one of its own",
                where=f"{where}.verdicts",
                mend="end the template where the judge begins to write (a space or line break may belong to the "
                "verdict: ' unsafe')",
            )
        found.append(int(ids[len(before)]))
    if found[0] == found[1]:
        raise ConfigError(
            f"{verdicts[0]!r} and {verdicts[1]!r} begin with the same token",
            where=f"{where}.verdicts",
            mend="name verdicts that differ in their first token for this tokenizer",
        )
    return found[0], found[1]
