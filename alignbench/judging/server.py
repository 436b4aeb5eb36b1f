"""A judge behind an OpenAI-compatible server: retries, rate limit, cost cap, and every answer kept as it comes."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from alignbench.engine.logprobs import progress
from alignbench.errors import JudgeError
from alignbench.jsonio import plain
from alignbench.judging.asking import Answer, AnswerCache, Question
from alignbench.judging.settings import ServerJudgeConfig

#: Answers of a server that may be different a little later.
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_PAUSE_S = 60.0
#: Tokens of a chat format around one message, generously.
_FRAME_TOKENS = 16


@dataclass(frozen=True)
class ServerJudge:
    """Which judge it is: all that changes its answers.

    Attributes:
        url: Base address; `/chat/completions` is added.
        model: The server's name of the model.
        extra: Further fields of every request, as JSON; null takes a field out.
        kind: Tells it from other judges in keys.
    """

    url: str
    model: str
    extra: str = "{}"
    kind: str = "server"


class _FaultError(Exception):
    """A passing fault: worth another try.

    Attributes:
        pause: What the server asks for, in seconds.
        billed: Whether the server may have answered, and charge for it.
    """

    def __init__(self, what: str, pause: float | None = None, *, billed: bool = False) -> None:
        super().__init__(what)
        self.pause, self.billed = pause, billed


class _CapError(Exception):
    """The next request might exceed the cost cap."""


@dataclass
class _Purse:
    """Money: what was spent, and what requests under way may cost at most."""

    most: float | None
    spent: float = 0.0
    reserved: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reserve(self, amount: float) -> None:
        with self.lock:
            if self.most is not None and self.spent + self.reserved + amount > self.most:
                raise _CapError
            self.reserved += amount

    def settle(self, amount: float, paid: float) -> None:
        with self.lock:
            self.reserved -= amount
            self.spent += paid


@dataclass
class _Gate:
    """Spaces the starts of requests evenly."""

    per_minute: float
    next: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def enter(self, stop: threading.Event) -> None:
        if self.per_minute <= 0:
            return
        with self.lock:
            now = time.monotonic()
            start = max(now, self.next)
            self.next = start + 60.0 / self.per_minute
        stop.wait(start - now)


class ServerClient:
    """Asks one server.

    Args:
        judge: Which judge.
        manners: How it is asked; of who it is, `judge` alone decides.
    """

    def __init__(self, judge: ServerJudge, manners: ServerJudgeConfig) -> None:
        self._judge, self._manners = judge, manners
        self._extra: Mapping[str, Any] = json.loads(judge.extra)
        self._local = threading.local()
        self._headers = {}
        if manners.key_env is not None:
            self._headers = {"Authorization": f"Bearer {os.environ[manners.key_env]}"}  # set, by the settings' checks

    def ask(self, asked: Sequence[Question], cache: AnswerCache, label: str) -> list[Answer]:
        """The answers to all questions: from the cache, else from the server, each kept before the next is awaited.

        Raises:
            JudgeError: the server refuses or stays silent, or the cost cap is reached; what was answered is kept, and
                the same questions go on from there.
        """
        identity = plain(self._judge)
        keys = [question.key(identity) for question in asked]
        found = {key: answer for key in dict.fromkeys(keys) if (answer := cache.get(key)) is not None}
        todo = {key: question for key, question in zip(keys, asked, strict=True) if key not in found}
        purse = _Purse(self._manners.most_cost, sum(answer.paid for answer in found.values()))
        gate, stop = _Gate(self._manners.requests_per_minute), threading.Event()

        def one(key: str, question: Question) -> Answer:
            answer = self._answer(question, purse, gate, stop)
            cache.put(key, answer)
            return answer

        pool = ThreadPoolExecutor(self._manners.concurrency)
        waiting, running = list(todo.items())[::-1], dict[Future[Answer], str]()
        try:
            with progress(len(todo), label, "ans") as bar:
                while waiting or running:
                    while waiting and len(running) < self._manners.concurrency:
                        key, question = waiting.pop()
                        running[pool.submit(one, key, question)] = key
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        found[running.pop(future)] = future.result()
                        bar.update()
        except BaseException as error:
            stop.set()  # pauses end now; requests under way are still awaited, and kept
            pool.shutdown(wait=True, cancel_futures=True)
            there = len(found) + sum(f.done() and not f.cancelled() and f.exception() is None for f in running)
            if isinstance(error, _CapError | JudgeError):
                raise self._explained(error, there, len(set(keys)), purse) from error
            raise
        pool.shutdown()
        return [found[key] for key in keys]

    @staticmethod
    def _explained(error: _CapError | JudgeError, there: int, total: int, purse: _Purse) -> JudgeError:
        kept = f"{there} of {total} answers are kept; the same command goes on from there"
        if isinstance(error, _CapError):
            return JudgeError(
                f"the judge has cost {purse.spent:.4g}, and its next answer might exceed judge.server.most_cost = "
                f"{purse.most:g}; {kept}",
                where="judge.server.most_cost",
                mend="raise it, or judge less (judge.samples_per_prompt, judge.criteria, judge.repeats)",
            )
        return JudgeError(f"{error.what}; {kept}", where=error.where, mend=error.mend)

    def _answer(self, question: Question, purse: _Purse, gate: _Gate, stop: threading.Event) -> Answer:
        """One answer, with further tries after passing faults."""
        body = {
            "model": self._judge.model,
            "messages": question.messages,
            "temperature": question.temperature,
            "max_tokens": question.max_tokens,
        } | dict(self._extra)
        body = {name: value for name, value in body.items() if value is not None}
        most_read, most_written = upper_tokens(question), question.max_tokens
        fault, earlier = _FaultError(""), 0.0
        for attempt in range(self._manners.retries + 1):
            if attempt:
                pause = min(_LONGEST_PAUSE_S, self._manners.pause_s * 2 ** (attempt - 1))
                # jitter, so that clients that were refused together do not come back together
                stop.wait(fault.pause if fault.pause is not None else pause * random.uniform(0.5, 1.0))
            if stop.is_set():
                break
            most, paid = self._price(most_read, most_written), 0.0
            purse.reserve(most)
            try:
                gate.enter(stop)
                text, usage = self._post(body)
                read, written = (usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
                # a server that does not count is charged what it may have used at most
                read, written = (
                    value if isinstance(value, int) and value >= 0 else most
                    for value, most in ((read, most_read), (written, most_written))
                )
                paid = self._price(read, written)
                return Answer(text, paid=earlier + paid, tokens=read + written)
            except _FaultError as error:
                fault, paid = error, most if error.billed else 0.0
                earlier += paid
            finally:
                purse.settle(most, paid)
        raise JudgeError(
            f"the judge's server gave no answer in {self._manners.retries + 1} tries ({fault})",
            where=self._judge.url,
            mend="see that it runs and what it says; judge.server.retries, timeout_s and requests_per_minute set how "
            "it is asked",
        )

    def _price(self, read: int, written: int) -> float:
        return (read * self._manners.input_price + written * self._manners.output_price) / 1e6

    def _session(self) -> Any:
        """One of this thread's own: a session keeps its connection and is not made for several threads."""
        if not hasattr(self._local, "session"):
            import requests

            self._local.session = requests.Session()
        return self._local.session

    def _post(self, body: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
        import requests

        address = self._judge.url.rstrip("/") + "/chat/completions"
        try:
            reply = self._session().post(address, json=body, headers=self._headers, timeout=self._manners.timeout_s)
        except requests.RequestException as error:
            unheard = isinstance(error, requests.ConnectTimeout)
            raise _FaultError(f"{type(error).__name__}: {str(error)[:200]}", billed=not unheard) from None
        if reply.status_code in _PASSING:
            raise _FaultError(
                f"status {reply.status_code}: {reply.text[:200]}", _pause_of(reply.headers.get("Retry-After"))
            )
        if reply.status_code != 200:
            raise JudgeError(
                f"the judge's server refuses with status {reply.status_code}: {reply.text[:300].strip()}",
                where=address,
                mend="see judge.server.url, model, extra and the key; the text is the server's own",
            )
        try:
            content = reply.json()
            text = content["choices"][0]["message"]["content"]
            usage = content.get("usage") or {}
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _FaultError(f"its reply is no chat completion: {reply.text[:200]!r}", billed=True) from None
        if not isinstance(usage, Mapping):
            usage = {}
        # silence (a filter, an empty answer) is an answer that cannot be read, not a fault of the server
        return text if isinstance(text, str) else "", usage


def upper_tokens(question: Question) -> int:
    """More tokens than a question can have: a token of a byte-level vocabulary covers at least one byte."""
    return sum(len(message["content"].encode()) + _FRAME_TOKENS for message in question.messages)


def _pause_of(header: str | None) -> float | None:
    """Seconds of a Retry-After header; None where it holds no number."""
    try:
        return min(_LONGEST_PAUSE_S, max(0.0, float(header))) if header else None
    except ValueError:
        return None
