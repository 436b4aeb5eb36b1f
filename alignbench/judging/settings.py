"""The schema of the `judge` group, and its checks."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from omegaconf import MISSING

from alignbench.data.templates import check_template
from alignbench.errors import ConfigError
from alignbench.judging.protocols import CRITERIA, Protocol, find_protocol

BACKENDS = ("scorer", "local", "server")
OPPONENTS = ("reference", "all")
READS = ("text", "probability")
#: Keys that change no answer: they stay out of run ids and artifact keys.
_MANNERS = ("cache", "elo")


@dataclass
class LocalJudgeConfig:
    """A causal language model on this machine."""

    path: str = MISSING
    revision: str | None = None
    template: str = MISSING
    max_length: int = MISSING
    read: str = MISSING
    least_mass: float = 0.5


@dataclass
class ServerJudgeConfig:
    """A model behind an OpenAI-compatible server. All but `url`, `model` and `extra` changes no answer.

    Attributes:
        url: Base address; `/chat/completions` is added.
        model: The server's name of the model.
        extra: Further fields of every request; null takes a field out.
        key_env: Environment variable that holds the key; None sends none.
        timeout_s: Longest wait for one answer.
        retries: Further tries after a passing fault.
        pause_s: Pause before the first of them; it doubles each time, with jitter, up to a minute.
        concurrency: Requests under way at a time.
        requests_per_minute: 0 for no limit.
        input_price: Per million tokens read.
        output_price: Per million tokens written.
        most_cost: Most that one pair of policies may cost, earlier attempts included; None: no cap.
    """

    url: str = MISSING
    model: str = MISSING
    extra: dict[str, Any] = field(default_factory=dict)
    key_env: str | None = None
    timeout_s: float = 120.0
    retries: int = 6
    pause_s: float = 1.0
    concurrency: int = 8
    requests_per_minute: float = 0.0
    input_price: float = 0.0
    output_price: float = 0.0
    most_cost: float | None = None


@dataclass
class JudgeConfig:
    """Who compares the policies' answers in pairs, and by which protocol."""

    name: str = MISSING
    backend: str = MISSING
    protocol: str = MISSING
    criteria: list[str] = MISSING
    samples_per_prompt: int = MISSING
    opponents: str = MISSING
    repeats: int | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    scorer: str | None = None
    tie_margin: float = 0.0
    local: LocalJudgeConfig | None = None
    server: ServerJudgeConfig | None = None
    cache: str | None = None
    elo: bool = False


_SERVER_SCIENCE = ("url", "model", "extra")


def scientific_part(judge: dict[str, Any]) -> dict[str, Any]:
    """The part of the group that decides numbers, for run ids."""
    kept = {key: value for key, value in judge.items() if key not in _MANNERS}
    if isinstance(kept.get("server"), dict):
        kept["server"] = {key: kept["server"].get(key) for key in _SERVER_SCIENCE}
    return kept


def protocol_of(judge: JudgeConfig) -> Protocol:
    """The named protocol with the group's own repeats, temperature and length of answers, where given."""
    protocol = find_protocol(judge.protocol)
    given = {name: getattr(judge, name) for name in ("repeats", "temperature", "max_tokens")}
    if judge.local is not None and judge.local.read == "probability":
        given["repeats"] = 1  # they would be the same
    return replace(protocol, **{name: value for name, value in given.items() if value is not None})


def check_judge(judge: JudgeConfig, *, samples: int, embedded: bool) -> None:
    """Refuse a judge that cannot be asked as stated.

    Args:
        judge: The group.
        samples: Answers per prompt that there are.
        embedded: Whether the data set is the embedded world, which alone has gold scores.

    Raises:
        ConfigError: with the key and the mend.
    """
    protocol = find_protocol(judge.protocol)
    for name, value, known in (("backend", judge.backend, BACKENDS), ("opponents", judge.opponents, OPPONENTS)):
        if value not in known:
            raise ConfigError(f"judge.{name} = {value!r} is unknown", where=f"judge.{name}", mend=_one_of(known))
    if not judge.criteria or set(judge.criteria) - set(CRITERIA) or len(set(judge.criteria)) < len(judge.criteria):
        raise ConfigError(
            f"judge.criteria = {list(judge.criteria)}",
            where="judge.criteria",
            mend=f"each once, of {', '.join(CRITERIA)}",
        )
    if not 1 <= judge.samples_per_prompt <= samples:
        raise ConfigError(
            f"{judge.samples_per_prompt} answers per prompt are to be judged, and {samples} are sampled",
            where="judge.samples_per_prompt",
            mend=f"1 to {samples}, or raise evaluate.samples_per_prompt",
        )
    resolved = protocol_of(judge)
    if resolved.repeats < 1 or resolved.temperature < 0 or resolved.max_tokens < 1 or judge.tie_margin < 0:
        raise ConfigError(
            f"repeats {resolved.repeats}, temperature {resolved.temperature}, max_tokens {resolved.max_tokens}, "
            f"tie_margin {judge.tie_margin}",
            where="judge",
            mend="at least one repeat and one token; temperature and tie_margin are not negative",
        )
    {"scorer": _check_scorer, "local": _check_local, "server": _check_server}[judge.backend](judge, protocol, embedded)


def _one_of(known: tuple[str, ...]) -> str:
    return "one of: " + ", ".join(known)


def _check_scorer(judge: JudgeConfig, protocol: Protocol, embedded: bool) -> None:
    if judge.scorer is None or judge.scorer == "none":
        raise ConfigError("the judge has no scorer", where="judge.scorer", mend="judge.scorer=gold, or another scorer")
    # whether there is one of that name: alignbench.scoring
    if judge.scorer == "gold" and not embedded:
        raise ConfigError(
            "the gold scorer judges answers of the embedded world only",
            where="judge.scorer",
            mend="judge=local or judge=server, or another scorer",
        )


def _check_local(judge: JudgeConfig, protocol: Protocol, embedded: bool) -> None:
    local = judge.local
    if local is None:
        raise ConfigError("no local model is given", where="judge.local", mend="judge=local judge.local.path=FOLDER")
    if local.read not in READS:
        raise ConfigError(f"judge.local.read = {local.read!r}", where="judge.local.read", mend=_one_of(READS))
    if local.read == "probability" and protocol.form != "choice":
        raise ConfigError(
            f"protocol {protocol.name!r} asks for two scores, which no first token holds",
            where="judge.local.read",
            mend="judge.protocol=choice, or judge.local.read=text",
        )
    if local.read == "probability" and judge.elo:
        raise ConfigError(
            "probabilities are no single games, which sequential Elo plays",
            where="judge.elo",
            mend="judge.elo=false (Bradley-Terry ratings take them), or judge.local.read=text",
        )
    if not 0 <= local.least_mass <= 1 or local.max_length < 2:
        raise ConfigError(
            f"least_mass {local.least_mass}, max_length {local.max_length}",
            where="judge.local",
            mend="least_mass is a probability, max_length the judge's longest question and answer in tokens",
        )
    try:
        check_template(local.template)
    except ConfigError as error:
        raise ConfigError(error.what, where="judge.local.template", mend=error.mend) from None


def _check_server(judge: JudgeConfig, protocol: Protocol, embedded: bool) -> None:
    server = judge.server
    if server is None:
        raise ConfigError("no server is given", where="judge.server", mend="judge=server judge.server.url=http://...")
    address = urlsplit(server.url)
    if address.scheme not in ("http", "https") or not address.netloc:
        raise ConfigError(
            f"judge.server.url = {server.url!r} is no address",
            where="judge.server.url",
            mend="the part before /chat/completions, such as http://localhost:8000/v1",
        )
    if "@" in address.netloc or address.query:
        raise ConfigError(
            "judge.server.url holds a name, password or query, which would stand in records",
            where="judge.server.url",
            mend="put the key into an environment variable and name it: judge.server.key_env=NAME",
        )
    if server.key_env is not None and not os.environ.get(server.key_env):
        raise ConfigError(
            f"the environment variable {server.key_env} is not set",
            where="judge.server.key_env",
            mend=f"export {server.key_env}=..., or judge.server.key_env=null for a server without keys",
        )
    if min(server.timeout_s, server.concurrency) <= 0 or min(server.retries, server.pause_s) < 0:
        raise ConfigError(
            f"timeout_s {server.timeout_s}, concurrency {server.concurrency}, retries {server.retries}, pause_s "
            f"{server.pause_s}",
            where="judge.server",
            mend="timeout_s and concurrency are positive, retries and pause_s are not negative",
        )
    if min(server.requests_per_minute, server.input_price, server.output_price) < 0:
        raise ConfigError(
            "a negative price or rate", where="judge.server", mend="0 is no price, and no limit of the rate"
        )
    if server.most_cost is not None and (server.most_cost < 0 or server.input_price + server.output_price == 0):
        raise ConfigError(
            f"judge.server.most_cost = {server.most_cost} caps nothing without prices",
            where="judge.server.most_cost",
            mend="give judge.server.input_price and output_price, per million tokens",
        )
