"""Chat endpoints that speak OpenAI's protocol, through its client (the extra `collect`).

A request that failed for a passing reason (429, 5xx, no answer in time, a lost connection, a reply
that is no JSON) is sent again, a bounded number of times, after exponentially growing waits with
jitter, and never sooner than the server's Retry-After. Any other 4xx ends with an error. The
client's own retries are off: how long a wait they grant to a server cannot be set, they do not send
again where a reply is no JSON or no completion, and nothing ends their waits.

The key goes into the Authorization header and nowhere else: redirects are not followed, and what a
server says is quoted without it.
"""

import dataclasses
import datetime
import email.utils
import json
import random
import threading
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from atommem_jax.config import ConfigError, check

_QUOTED = 300  # characters of a server's words in an error

_ADVICE = {
    401: "Put a valid key into the environment variable that --api_key_env names",
    403: "Use a key that may use this model; --api_key_env names its environment variable",
    404: "Check --base_url, which for most servers ends in /v1, and --model",
    413: "The server takes no prompt of this length: use another, or smaller chunks",
}
_ADVICE_ON_REDIRECT = "Pass the address that it points to as --base_url"
_ADVICE_ON_REST = "Change what it names: --model, --temperature, --max_tokens or --extra_body"


class EndpointError(RuntimeError):
    """The server refuses the request, and would refuse it again. The message says what to do."""


class OutOfRetriesError(RuntimeError):
    """A request has failed as often as it may; another one may succeed."""


class ClosedError(RuntimeError):
    """The endpoint was closed while a request waited to be sent again."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long to wait for a reply; times are in seconds."""

    timeout: float = 120.0  # in which the server must send something
    retries: int = 6  # after the first attempt
    backoff: float = 1.0  # the first wait; it doubles with each
    longest_wait: float = 60.0  # a server that asks for more counts as failed


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the assistant said, and what it cost."""

    text: str  # without lone surrogates
    cut: bool  # the server stopped it at its limit of tokens
    prompt_tokens: int  # 0 where the server does not count
    completion_tokens: int


class _PassingError(Exception):
    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class Endpoint:
    """One model behind one address. Any number of threads may call `chat`.

    Args:
      base_url: such as "http://localhost:8000/v1"; "/chat/completions" is added.
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
        _check_address(base_url)
        key = (api_key or "").strip()
        check(
            all("!" <= character <= "~" for character in key),
            "--api_key_env: the key in that environment variable has characters that no HTTP "
            "header can hold; allowed are printable ASCII characters without spaces. Set it again",
        )
        self.url = f"{base_url.rstrip('/')}/chat/completions"
        self._fields = _make_sendable(options or {})
        self._model = model
        self._patience = patience or Patience()
        self._key = key
        self._openai = openai = _import_client()
        http = openai.DefaultHttpxClient(follow_redirects=False, timeout=self._patience.timeout)
        try:
            # Without a key the client does not start; then this word is not sent either.
            self._client = openai.OpenAI(
                api_key=key or "none", base_url=base_url, max_retries=0, http_client=http
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
        self._closed = threading.Event()

    def chat(self, messages: Sequence[Mapping[str, str]]) -> Reply:
        """What the model says next.

        Raises:
          EndpointError: the server refuses the request.
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
        """Requests that wait to be sent again, and later ones, raise ClosedError."""
        self._closed.set()

    def _find_wait(self, attempt: int, asked: float) -> float:
        longest = self._patience.longest_wait
        wait = min(self._patience.backoff * 2.0**attempt, longest) * self._random.uniform(0.5, 1.0)
        return max(wait, asked)

    def _ask(self, messages: Sequence[Mapping[str, str]]) -> Reply:
        """The reply to one request. Raises EndpointError, or _PassingError."""
        try:
            answer = self._client.chat.completions.with_raw_response.create(
                model=self._model,
                messages=messages,
                extra_body=self._fields,
                extra_headers=self._headers,
            )
        except self._openai.APIStatusError as error:
            raise self._judge(error.response) from error
        except self._openai.APITimeoutError as error:
            raise _PassingError(f"no answer within {self._patience.timeout:g} s") from error
        except self._openai.APIConnectionError as error:
            reason = str(error.__cause__) or repr(error.__cause__)
            raise _PassingError(f"connection failed: {reason}") from error
        try:
            completion = answer.parse()
        except ValueError:
            completion = None
        if not isinstance(completion, self._openai.BaseModel):
            said = self._quote(answer.content)
            raise _PassingError(f"the reply is no JSON object: {said!r}")
        return _read(completion)

    def _judge(self, response: Any) -> Exception:
        """What an answer other than 200 means."""
        status, said = response.status_code, self._quote(response.content)
        if status == 429 or status >= 500:
            wait = _parse_retry_after(response.headers.get("Retry-After"))
            return _PassingError(f"status {status} {said!r}", wait)
        rest = _ADVICE_ON_REDIRECT if status < 400 else _ADVICE_ON_REST
        return EndpointError(f"{self.url}: status {status}, {said!r}. {_ADVICE.get(status, rest)}")

    def _quote(self, content: bytes) -> str:
        text = " ".join(content.decode(errors="replace").split())
        if self._key:
            text = text.replace(self._key, "***")
        return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


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


def _check_address(base_url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(base_url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port or an IPv6 address that is none
        valid = False
    check(valid and "@" not in base_url, _describe_address(base_url))


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


def _read(completion: Any) -> Reply:
    """Raises _PassingError for what is no completion: the client checks no field."""
    try:
        choice, usage = completion.choices[0], completion.usage
        text = choice.message.content or ""
        return Reply(
            text=text.encode(errors="replace").decode(),
            cut=choice.finish_reason == "length",
            prompt_tokens=int(getattr(usage, "prompt_tokens", None) or 0),
            completion_tokens=int(getattr(usage, "completion_tokens", None) or 0),
        )
    except (IndexError, TypeError, ValueError, AttributeError) as error:
        raise _PassingError(f"the reply is no chat completion: {error!r}") from error


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
