"""Policies: build one from nothing, load one from a folder, adapt it with LoRA, export it.

A stored policy is an ordinary transformers folder (safetensors, tokenizer), so that
`AutoModelForCausalLM.from_pretrained` opens it. A LoRA stage stores the *merged* policy: the next stage's
reference is then the whole previous policy, never the bare base.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

from alignbench.architecture import family_of, transformers_config
from alignbench.config import ArchitectureConfig, LoraConfig
from alignbench.engine import group
from alignbench.errors import ModelError
from alignbench.models.norms import with_fused_norms
from alignbench.models.weights import WEIGHT_SUFFIX

END, PAD = "<|end|>", "<|pad|>"
SCORE_HEAD = "score_head"

_HELD: WeakSet[torch.nn.Module] = WeakSet()


def held(least: int = 0) -> int:
    """Policies that this process holds in memory now: those built or loaded here that something still refers to.

    Counted after a garbage collection, since a model often sits in reference cycles and would outlive its last use
    by a while. A model under LoRA is one policy with its adapters.

    Args:
        least: How many are certainly held; where there are no more, nothing needs to be collected (a third of a
            second).
    """
    if len(_HELD) > least:
        gc.collect()
    return len(_HELD)


def hold(model: Any) -> Any:
    """Count `model` among those that are held; returns it."""
    _HELD.add(model)
    return model


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with an end and a pad token, trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def build_llama(shape: ArchitectureConfig, tokenizer: Any, seed: int) -> Any:
    """A Llama with random weights that are a function of `seed`."""
    from transformers import LlamaForCausalLM

    config = transformers_config(
        dataclasses.replace(shape, vocab_size=len(tokenizer)),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return hold(LlamaForCausalLM(config))


def load_tokenizer(folder: Path, *, ends: bool = True) -> Any:
    """The tokenizer of a model folder.

    Args:
        folder: The folder.
        ends: Whether it must have an end-of-sequence token; an encoder's has none.

    Raises:
        ModelError: the folder has none, or one without an end-of-sequence token.
    """
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spm.model")
    if not any((folder / name).exists() for name in files):
        raise ModelError(
            "the model folder has no tokenizer",
            where=str(folder),
            mend="save one beside the weights: tokenizer.save_pretrained(FOLDER) of the model it was trained with",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the tokenizer cannot be read: {str(error).splitlines()[0]}",
            where=str(folder),
            mend="re-save it with tokenizer.save_pretrained(FOLDER)",
        ) from error
    if ends and tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token, so a response would never end",
            where=str(folder),
            mend="set tokenizer.eos_token and save it again",
        )
    return tokenizer


def pad_id(tokenizer: Any) -> int:
    """A token id to pad with; masks come from lengths, so EOS serves where there is no pad token."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def load_policy(folder: Path, dtype: torch.dtype, device: torch.device, zero3: Mapping[str, Any] | None = None) -> Any:
    """A causal language model in evaluation mode; arguments and errors are those of `load_whole`."""
    from transformers import AutoModelForCausalLM

    return load_whole(AutoModelForCausalLM, "causal language model", folder, dtype, device, zero3=zero3)


def load_whole(
    kind: Any,
    noun: str,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    zero3: Mapping[str, Any] | None = None,
    spare: str | None = None,
    **options: Any,
) -> Any:
    """A model whose parameters are all there and finite, in evaluation mode.

    Args:
        kind: transformers' class, or auto class, that reads it.
        noun: What it is, for messages.
        folder: A transformers folder.
        dtype: Of its parameters.
        device: Where it goes.
        zero3: DeepSpeed's ZeRO-3 configuration; then every rank calls this, rank 0 reads the weights one module at a
            time, and each keeps its own part of every parameter only.
        spare: Names that begin so may be absent from the files.
        options: Further arguments of `from_pretrained`.

    Raises:
        ModelError: not such a folder, a parameter is absent, or one holds NaN or infinity.
    """
    from safetensors import SafetensorError

    _one_bar_per_stage()
    try:
        with _partitioned(zero3):
            model, loading = kind.from_pretrained(
                folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **options
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the folder holds no {noun} in safetensors: {str(error).splitlines()[0]}",
            where=str(folder),
            mend="re-save it with model.save_pretrained(FOLDER); pickled weights are not read",
        ) from error
    # surplus tensors are old buffers (rotary frequencies) in many checkpoints of 2023, and harmless
    absent = sorted(name for name in loading["missing_keys"] if spare is None or not name.startswith(spare))
    if absent:
        raise ModelError(
            f"{len(absent)} parameter tensor(s) are absent: {', '.join(absent[:3])}",
            where=str(folder),
            mend=f"get the whole {noun} (another kind of model has another head); transformers would fill the gap "
            "with random numbers",
        )
    own = {name: getattr(p, "ds_tensor", p) for name, p in model.named_parameters()}
    broken = [name for name, values in own.items() if not bool(torch.isfinite(values.detach()).all())]
    if zero3:  # each rank has looked at its own part, and all must raise
        broken = list(dict.fromkeys(name for part in group.gather(broken) for name in part))
    if broken:
        raise ModelError(
            f"{len(broken)} parameter tensor(s) hold NaN or infinity: {', '.join(broken[:3])}",
            where=str(folder),
            mend="load and re-save the checkpoint, or get an intact copy; working with it would be silent ruin",
        )
    return hold(with_fused_norms(model if zero3 else model.to(device)).eval())


@contextlib.contextmanager
def _partitioned(zero3: Mapping[str, Any] | None) -> Iterator[None]:
    """Partition what is loaded inside, if `zero3` says how; what is loaded later is whole again."""
    if zero3 is None:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    said = HfDeepSpeedConfig(dict(zero3))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del said


def own_parameters(model: Any) -> float:
    """How many parameters this process holds: all of them, or its part under ZeRO-3."""
    return float(sum(getattr(p, "ds_tensor", p).numel() for p in model.parameters()))


def _one_bar_per_stage() -> None:
    """Turn transformers' progress bars off: a stage shows its own."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def save_policy(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a transformers folder: config, safetensors, tokenizer."""
    _one_bar_per_stage()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def add_lora(model: Any, lora: LoraConfig, seed: int) -> Any:
    """Wrap `model` with fresh adapters (their product is zero: the policy is unchanged at step 0).

    Raises:
        ModelError: a target matches no module of this model.
    """
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    names = [name for name, _ in model.named_modules()]
    absent = [t for t in lora.targets if not any(n == t or n.endswith("." + t) for n in names)]
    if absent:
        leaves = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise ModelError(
            f"LoRA target(s) {', '.join(absent)} match no module of {type(model).__name__}",
            where="model.lora.targets",
            mend=f"linear modules here: {', '.join(leaves)}",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(
            model,
            PeftLora(
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=list(lora.targets),
                # a score head starts from nothing, so it is trained whole
                **({"modules_to_save": [SCORE_HEAD]} if hasattr(model, SCORE_HEAD) else {"task_type": "CAUSAL_LM"}),
                bias="none",
            ),
        )


def restore_weights(
    folder: Path, state: Mapping[str, torch.Tensor], lora: LoraConfig | None, load: Callable[..., Any] | None = None
) -> Any:
    """The model that training left: the start model from `folder` with the trained `state` put in.

    Args:
        folder: The transformers folder that training started from.
        state: Trained tensors under the names of the training module (full, or adapters only).
        lora: The adapters' configuration, or None for full training.
        load: What made the start model, (folder, dtype, device) -> model; None: `load_policy`.

    Returns:
        A plain (merged) transformers model on the CPU, in the state's dtype for full training.
    """
    dtype = next(iter(state.values())).dtype
    model = (load or load_policy)(folder, dtype, torch.device("cpu"))
    if lora is None:
        missing, unexpected = model.load_state_dict(state, strict=False)
        kept = {name for name, _ in model.named_buffers()}  # they are not trained
        tied = {name for name in missing if "lm_head" in name or "embed_out" in name or name in kept}
        if unexpected or set(missing) - tied:
            raise ModelError(f"trained weights do not fit the policy: {unexpected or missing}", where=str(folder))
        model.tie_weights()
        return model
    adapted = add_lora(model, lora, seed=0)
    _, unexpected = adapted.load_state_dict(state, strict=False)
    if unexpected:
        raise ModelError(f"trained adapters do not fit the policy: {unexpected[:3]}", where=str(folder))
    return adapted.merge_and_unload(safe_merge=True)


def merge_policies(parts: list[tuple[Path, float]]) -> Any:
    """Linear combination of policies' weights, in float64, returned in the parts' own dtype.

    Args:
        parts: (policy folder, weight); weights sum to one (P-SACPO: 1 - q and q).

    Raises:
        ModelError: shapes or names differ, or the weights do not sum to one.
    """
    total = sum(weight for _, weight in parts)
    if abs(total - 1) > 1e-9:
        raise ModelError(f"merge weights sum to {total}", where="merge", mend="they must sum to 1")
    models = [load_policy(folder, torch.float32, torch.device("cpu")) for folder, _ in parts]
    states = [model.state_dict() for model in models]
    shapes = [{name: tuple(t.shape) for name, t in state.items()} for state in states]
    configs = [_architecture(model) for model in models]  # equal shapes may be other heads or untied embeddings
    if any(shape != shapes[0] for shape in shapes[1:]) or any(config != configs[0] for config in configs[1:]):
        raise ModelError(
            "policies of different shape cannot be merged",
            where="merge",
            mend="merge stages of one base model only",
        )
    merged = {
        name: sum(weight * state[name].double() for state, (_, weight) in zip(states, parts, strict=True))
        for name in states[0]
    }
    models[0].load_state_dict({name: tensor.to(states[0][name].dtype) for name, tensor in merged.items()})
    return models[0].to(stored_dtype(parts[0][0]))


def _architecture(model: Any) -> dict[str, Any]:
    """A model's configuration without what says nothing of its function."""
    aside = ("dtype", "torch_dtype", "transformers_version", "use_cache", "_name_or_path")
    return {name: value for name, value in model.config.to_dict().items() if name not in aside}


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of a policy's stored weights."""
    from safetensors import safe_open

    file = next(iter(sorted(folder.glob("*" + WEIGHT_SUFFIX))))
    with safe_open(file, framework="pt") as weights:
        name = next(iter(weights.keys()))
        return weights.get_tensor(name).dtype


def is_hub_id(path: str) -> bool:
    """Whether `path` names a hub repository ("owner/name") and not a folder here."""
    return not Path(path).exists() and len(path.split("/")) == 2 and not path.startswith((".", "/", "~"))


def shape_of(path: str, otherwise: ArchitectureConfig) -> ArchitectureConfig:
    """The shape a local model's config.json states, for plans; `otherwise` for hub ids and unknown families."""
    file = Path(path) / "config.json"
    if not file.exists():
        return otherwise
    found = json.loads(file.read_text())

    def of(*names: str, default: int = 0) -> int:
        return int(next((found[name] for name in names if found.get(name) is not None), default))

    hidden, heads = of("hidden_size", "n_embd"), of("num_attention_heads", "n_head")
    if not hidden or not heads:
        return otherwise
    return ArchitectureConfig(
        vocab_size=of("vocab_size"),
        hidden_size=hidden,
        intermediate_size=of("intermediate_size", "n_inner", default=4 * hidden),
        layers=of("num_hidden_layers", "n_layer"),
        heads=heads,
        kv_heads=of("num_key_value_heads", default=heads),
        max_positions=of("max_position_embeddings", "n_positions"),
        tied_embeddings=bool(found.get("tie_word_embeddings", True)),
        family=family_of(found.get("model_type")),
    )


def fingerprint(path: str, revision: str | None) -> str:
    """What identifies a base model's content: the hash of its files, or the hub id with its revision.

    Raises:
        ModelError: neither a folder nor a hub id, or a hub id without a pinned revision.
    """
    if is_hub_id(path):
        if not revision:
            raise ModelError(
                f"hub model {path} has no pinned revision",
                where="model.revision",
                mend="give the commit: model.revision=40-hex-digits (a moving branch cannot be reproduced)",
            )
        return f"hub:{path}@{revision}"
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(
            f"model.path = {path} is neither a folder nor a hub id",
            where="model.path",
            mend="give a transformers folder (config.json, *.safetensors, tokenizer), or owner/name",
        )
    digest = hashlib.sha256()
    for file in model_files(folder):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"files:{digest.hexdigest()}"


def model_files(folder: Path) -> list[Path]:
    """The files of a transformers folder that make up the model; pickled weights are left out.

    Raises:
        ModelError: no configuration or no safetensors.
    """
    wanted = (".json", ".safetensors", ".model", ".txt", ".jinja")
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.suffix in wanted)
    if not (folder / "config.json").exists() or not any(f.suffix == WEIGHT_SUFFIX for f in files):
        raise ModelError(
            "the model folder lacks config.json or *.safetensors",
            where=str(folder),
            mend="save it with model.save_pretrained(FOLDER)",
        )
    return files


def bring_in(path: str, revision: str | None, folder: Path, *, ends: bool = True) -> None:
    """Put a model's files into `folder`: hard links where the disk allows, else copies.

    `ends`: whether its tokenizer must have an end-of-sequence token.

    Raises:
        ModelError: a hub model is not in the local cache and the hub cannot be reached.
    """
    source = _download(path, revision) if is_hub_id(path) else Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    for file in model_files(source):
        target = folder / file.name
        try:
            os.link(file.resolve(), target)
        except OSError:
            shutil.copyfile(file, target)
    load_tokenizer(folder, ends=ends)


def _download(path: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, ignore_patterns=["*.bin", "*.pt", "*.pth"]))
    except Exception as error:
        raise ModelError(
            f"{path}@{revision} is neither in the local hub cache nor reachable ({type(error).__name__})",
            where="model.path",
            mend="download it on a machine with network and give the folder: model.path=/path/to/folder",
        ) from error
