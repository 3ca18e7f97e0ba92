"""Chat endpoints that speak OpenAI's protocol, through its client (the extra `collect`).

A request that failed for a passing reason (429, 5xx, no whole answer in time, a lost connection, a
reply that is no JSON) is sent again, a bounded number of times, after exponentially growing waits
with jitter, and never sooner than the server's Retry-After. Where the prompt may be the reason
(400, 413, 422) the request fails alone; any other 4xx is an error for all requests. An error in the
body of a 200 is judged by its code as if that were the status. The client's own retries are off:
how long a wait they grant to a server cannot be set, they do not send again where a reply is no
JSON or no completion, and nothing ends their waits.

Requests run on an event loop in a thread: only there can one that has begun be given up, whatever
it waits for. The client's own timeout begins anew with every byte.

The key goes into the Authorization header and nowhere else: redirects are not followed, and what a
server says is quoted without it.
"""

import asyncio
import concurrent.futures
import dataclasses
import datetime
import email.utils
import json
import random
import re
import threading
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from atommem_jax.config import ConfigError, check

STOP = "stop"
"""How a whole reply ended; `Reply.ended` has another word for each that is not whole."""

UNFINISHED_THOUGHTS = "thoughts without a reply"

_WHOLE = {STOP, "eos", "eos_token", "end_turn", "stop_sequence"}  # as servers spell "stop"

_QUOTED = 300  # characters of a server's words in an error

# What servers say of a prompt that they do not take, whatever the status.
_TOO_LONG = re.compile(r"context.?(length|size|window)|(prompt|input|request) (is )?too long", re.I)
_FILTERED = re.compile(
    r"content.?(filter|management|policy)|moderation|flagged.?input|input was flagged", re.I
)
_REFUSALS = {400, 413, 422}  # may be for the prompt alone

_ADVICE = {
    401: "Put a valid key into the environment variable that --api_key_env names",
    402: "The account has no credit left: add some, or put another key into --api_key_env",
    403: "Use a key that may use this model; --api_key_env names its environment variable",
    404: "Check --base_url, which for most servers ends in /v1, and --model",
    413: "The server takes no prompt of this length: use another, or smaller parts",
}
_ADVICE_ON_REDIRECT = "Pass the address that it points to as --base_url"
_ADVICE_ON_LENGTH = (
    "The prompt and --max_tokens do not fit into the teacher's context: lower --max_tokens, use a "
    "teacher with a longer context, or smaller parts"
)
_ADVICE_ON_FILTER = "A content filter refuses this prompt: other episodes are not concerned by it"
_ADVICE_ON_REST = "Change what it names: --model, --temperature, --max_tokens or --extra_body"


class EndpointError(RuntimeError):
    """The server refuses the request, and would refuse it again. The message says what to do."""


class RefusedError(EndpointError):
    """The server refuses this request, for what may lie in its prompt; it may take another."""


class OutOfRetriesError(RuntimeError):
    """A request has failed as often as it may; another one may succeed."""


class ClosedError(RuntimeError):
    """The endpoint was closed while a request waited to be sent again."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long to wait for a reply; times are in seconds."""

    timeout: float = 120.0  # in which the whole reply must have come
    retries: int = 6  # after the first attempt
    backoff: float = 1.0  # the first wait; it doubles with each
    longest_wait: float = 60.0  # a server that asks for more counts as failed


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the assistant said, and what it cost."""

    text: str  # without lone surrogates
    ended: str  # STOP where it is whole, else what ended it, in the server's word where it has one
    prompt_tokens: int  # 0 where the server does not count
    completion_tokens: int
    thoughts: str = ""  # that the server sent apart from the text


class _PassingError(Exception):
    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


def parse_prices(values: Sequence[str], flag: str) -> tuple[float, float] | None:
    """Prices of a million prompt and completion tokens, from a flag that holds both; None: none.

    Raises ConfigError for anything else.
    """
    if not values:
        return None
    try:
        prompt, completion = (float(value) for value in values)
    except ValueError:
        prompt = completion = -1.0
    check(
        prompt >= 0 and completion >= 0,
        f"--{flag}={','.join(values)}: allowed are two numbers of 0 or more; pass the prices of a "
        "million prompt and completion tokens as IN,OUT",
    )
    return prompt, completion


class Endpoint:
    """One model behind one address. Any number of threads may call `chat`.

    Args:
      base_url: such as "http://localhost:8000/v1"; "/chat/completions" is added. A query goes with
        every request, and blanks around it with none.
      model: its name there.
      api_key: None or '' for servers that ask for none.
      options: more fields of every request, such as `temperature` and `max_tokens`.
      patience: see `Patience`.

    Raises ConfigError for an address that is none, a key or options that cannot be sent, or where
    the client is not installed.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        options: Mapping[str, Any] | None = None,
        patience: Patience | None = None,
    ):
        address, query = _split_address(base_url)
        key = (api_key or "").strip()
        check(
            all("!" <= character <= "~" for character in key),
            "--api_key_env: the key in that environment variable has characters that no HTTP "
            "header can hold; allowed are printable ASCII characters without spaces. Set it again",
        )
        self.url = f"{address}/chat/completions"
        self._fields = _make_sendable(options or {})
        self._model = model
        self._patience = patience or Patience()
        # A query may hold a secret too. A short value is none, and many sentences hold it.
        self._secrets = [key] if key else []
        self._secrets += [v for name, v in query if len(v) >= 8 and name != "api-version"]
        self._openai = openai = _import_client()
        try:
            http = openai.DefaultAsyncHttpxClient(
                follow_redirects=False, timeout=None, params=query
            )
            # Without a key the client does not start; then this word is not sent either.
            self._client = openai.AsyncOpenAI(
                api_key=key or "none",
                base_url=address,
                timeout=None,  # see `_send`
                max_retries=0,
                http_client=http,
            )
        except Exception as error:  # of many kinds, by what the client finds wrong
            raise ConfigError(_describe_address(base_url)) from error
        # Whose account pays is for the key to say: what the environment holds for OpenAI's own
        # servers is not told to others.
        self._headers = {
            "Authorization": f"Bearer {key}" if key else openai.Omit(),
            "OpenAI-Organization": openai.Omit(),
            "OpenAI-Project": openai.Omit(),
            "User-Agent": "atommem_jax",
        }
        self._random = random.Random()
        self._closed, self._lock = threading.Event(), threading.Lock()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_run, args=(self._loop,), name="endpoint", daemon=True).start()

    def chat(self, messages: Sequence[Mapping[str, str]]) -> Reply:
        """What the model says next.

        Raises:
          RefusedError: the server refuses the request, perhaps for what its prompt holds.
          EndpointError: the server refuses all requests.
          OutOfRetriesError: the last attempt has failed, or the server asks for too long a wait.
          ClosedError: `close` was called.
        """
        sendable = _make_sendable(list(messages))
        for attempt in range(self._patience.retries + 1):
            if self._closed.is_set():
                raise ClosedError("the endpoint is closed")
            try:
                return self._ask(sendable)
            except _PassingError as error:
                wait = self._find_wait(attempt, error.wait)
                last = attempt == self._patience.retries
                if last or wait > self._patience.longest_wait:
                    asked = f", which asks to wait {error.wait:g} s" if error.wait else ""
                    raise OutOfRetriesError(
                        f"{self.url}: {error}{asked}; given up after {attempt + 1} attempts "
                        "(--retries, --timeout, --longest_wait)"
                    ) from error
                self._closed.wait(wait)
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        """Requests under way, those that wait for another try, and later ones raise ClosedError."""
        with self._lock:
            if not self._closed.is_set():
                self._closed.set()
                asyncio.run_coroutine_threadsafe(self._end(), self._loop)

    async def _end(self) -> None:
        try:
            requests = asyncio.all_tasks() - {asyncio.current_task()}
            for request in requests:
                request.cancel()
            await asyncio.gather(*requests, return_exceptions=True)
            await self._client.close()
        finally:
            self._loop.stop()

    def _find_wait(self, attempt: int, asked: float) -> float:
        longest = self._patience.longest_wait
        wait = min(self._patience.backoff * 2.0**attempt, longest) * self._random.uniform(0.5, 1.0)
        return max(wait, asked)

    def _ask(self, messages: Sequence[Mapping[str, str]]) -> Reply:
        """The reply to one request. Raises EndpointError, ClosedError or _PassingError."""
        with self._lock:  # a loop that has ended would take a request, and never send it
            if self._closed.is_set():
                raise ClosedError("the endpoint is closed")
            sent = asyncio.run_coroutine_threadsafe(self._send(messages), self._loop)
        try:
            return self._understand(sent.result())
        except concurrent.futures.CancelledError as error:
            raise ClosedError("the endpoint is closed") from error
        except self._openai.APIStatusError as error:
            wait = _parse_retry_after(error.response.headers.get("Retry-After"))
            status, content = error.response.status_code, error.response.content
            raise self._judge(status, f"status {status}", content, wait) from error
        except TimeoutError as error:
            raise _PassingError(f"no whole answer within {self._patience.timeout:g} s") from error
        except self._openai.APIConnectionError as error:
            reason = str(error.__cause__) or repr(error.__cause__)
            raise _PassingError(f"connection failed: {reason}") from error

    async def _send(self, messages: Sequence[Mapping[str, str]]) -> bytes:
        async with asyncio.timeout(self._patience.timeout):
            answer = await self._client.chat.completions.with_raw_response.create(
                model=self._model,
                messages=messages,
                extra_body=self._fields,
                extra_headers=self._headers,
            )
        return answer.content

    def _understand(self, content: bytes) -> Reply:
        """What the body of a 200 says; the client would check no field of it."""
        try:
            completion = json.loads(content)
        except (ValueError, RecursionError):
            completion = None
        if not isinstance(completion, dict):
            raise _PassingError(f"the reply is no JSON object: {self._quote(content)!r}")
        error = _find_error(completion)
        if error is not None:
            code = _find_code(error)
            name = "status 200 with an error" if code is None else f"status 200 with error {code}"
            # What the server generated until then may be long.
            alone = json.dumps(error, ensure_ascii=False).encode(errors="replace")
            raise self._judge(code, name, alone)
        try:
            return _read(completion)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            said = self._quote(content)
            raise _PassingError(f"the reply is no chat completion: {said!r}") from error

    def _judge(
        self, status: int | None, name: str, content: bytes, wait: float = 0.0
    ) -> _PassingError | EndpointError:
        """What a failure means, by its status: None where the server names none."""
        said = self._quote(content)
        too_long, filtered = _TOO_LONG.search(said), _FILTERED.search(said)
        refused = status in _REFUSALS or (status in (None, 403) and bool(too_long or filtered))
        if not refused and (status is None or status == 429 or status >= 500):
            return _PassingError(f"{name} {said!r}", wait)
        if refused and (too_long or filtered):
            advice = _ADVICE_ON_LENGTH if too_long else _ADVICE_ON_FILTER
        else:
            rest = _ADVICE_ON_REDIRECT if status is not None and status < 400 else _ADVICE_ON_REST
            advice = _ADVICE.get(status or 0, rest)
        kind = RefusedError if refused else EndpointError
        return kind(f"{self.url}: {name}, {said!r}. {advice}")

    def _quote(self, content: bytes) -> str:
        text = " ".join(content.decode(errors="replace").split())
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _import_client() -> Any:
    """The module `openai`: half a second that nothing else of the package should wait for."""
    try:
        import openai
    except ImportError as error:
        raise ConfigError(
            "--base_url: chat endpoints are asked through the package openai, which is not "
            f"installed ({error}); run: pip install 'atommem_jax[collect]'"
        ) from error
    return openai


def _split_address(base_url: str) -> tuple[str, list[tuple[str, str]]]:
    """What requests are sent below, without a slash at its end, and the query of each."""
    stripped = base_url.strip()
    try:
        parts = urllib.parse.urlsplit(stripped)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port or an IPv6 address that is none
        valid = False
    valid = valid and "@" not in stripped and not re.search(r"\s", stripped)
    check(valid, _describe_address(stripped))
    # Consoles show the whole address of a deployment, ready to be copied.
    path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    query = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
    return f"{parts.scheme}://{parts.netloc}{path}", query


def _describe_address(base_url: str) -> str:
    """What is wrong with an address, quoted without what may be a secret in it."""
    shown = base_url.rpartition("@")[2].partition("?")[0]
    return (
        f"--base_url={shown}: allowed is http:// or https:// and a host, without a user or a key; "
        "pass the address of a server, such as http://localhost:8000/v1"
    )


def _make_sendable(value: Any) -> Any:
    """The same without lone surrogates: UTF-8 has none. ConfigError for what is no JSON."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"--extra_body: a field cannot be sent ({error}); allowed is JSON without NaN and "
            "infinities: change it"
        ) from error
    return json.loads(text.encode(errors="replace"))


def _find_error(completion: Mapping[str, Any]) -> Any:
    """The error that a server sent in place of a completion, or in the midst of one; or None."""
    if completion.get("object") == "error":
        return completion
    if completion.get("error"):
        return completion["error"]
    choices = completion.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(choice, dict) and (choice.get("error") or choice.get("finish_reason") == "error"):
        return choice.get("error") or choice
    return None


def _find_code(error: Any) -> int | None:
    """The status that an error in a body stands for."""
    fields = error if isinstance(error, dict) else {}
    for value in (fields.get("code"), fields.get("status")):
        if isinstance(value, int | str) and re.fullmatch("[345][0-9]{2}", str(value)):
            return int(value)
    return None


def _read(completion: Mapping[str, Any]) -> Reply:
    """Raises LookupError, TypeError, ValueError or AttributeError for what is no completion."""
    choice, usage = completion["choices"][0], completion.get("usage") or {}
    message = choice["message"]
    content = message.get("content")
    text, thoughts, refusal = _join_parts(content)
    for field in ("reasoning_content", "reasoning"):
        apart = message.get(field)
        if isinstance(apart, str) and apart not in thoughts:  # some servers send both
            thoughts += apart
    ended = str(choice.get("finish_reason") or "no finish_reason")
    if ended.lower() in _WHOLE:
        ended = STOP
        if refusal or message.get("refusal"):
            ended = "refusal"
        elif not text.strip() and thoughts:
            ended = UNFINISHED_THOUGHTS
        elif not text.strip() and not isinstance(content, str):
            ended = "no content"
    return Reply(
        text=text.encode(errors="replace").decode(),
        ended=ended,
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        completion_tokens=int(usage.get("completion_tokens") or 0),
        thoughts=thoughts.encode(errors="replace").decode(),
    )


def _join_parts(content: Any) -> tuple[str, str, bool]:
    """(text, thoughts, whether there is a refusal) of a message's content, whole or in parts."""
    parts = content if isinstance(content, list) else [] if content is None else [content]
    text, thoughts, refusal = "", "", False
    for part in parts:
        kind = "text" if isinstance(part, str) else part["type"]
        if kind in ("text", "output_text"):
            text += part if isinstance(part, str) else part["text"]
        elif kind in ("thinking", "reasoning"):
            inner = part.get(kind) or part.get("text") or ""
            thoughts += inner if isinstance(inner, str) else _join_parts(inner)[0]
        refusal |= kind == "refusal"
    return text, thoughts, refusal


def _parse_retry_after(value: str | None) -> float:
    """Seconds; 0 where the header is absent or unreadable. It holds seconds or a date."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        now = datetime.datetime.now(datetime.UTC)
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.UTC)
        seconds = (date - now).total_seconds()
    return seconds if 0 < seconds < float("inf") else 0.0
