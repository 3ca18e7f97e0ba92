"""A client of chat endpoints that speak OpenAI's protocol, of the standard library alone.

A request that failed for a passing reason (429, 5xx, no answer in time, a lost connection, a reply
that is no JSON) is sent again, a bounded number of times, after exponentially growing waits with
jitter, and never sooner than the server's Retry-After. Any other 4xx ends with an error.

The key goes into the Authorization header and nowhere else: redirects are not followed, and what a
server says is quoted without it.
"""

import dataclasses
import datetime
import email.utils
import http.client
import json
import random
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from atommem_jax.config import check

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


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *unused: Any) -> None:
        return None


class Endpoint:
    """One model behind one address. Any number of threads may call `chat`.

    Args:
      base_url: such as "http://localhost:8000/v1"; "/chat/completions" is added.
      model: its name there.
      api_key: None or '' for servers that ask for none.
      options: more fields of every request, such as `temperature` and `max_tokens`.
      patience: see `Patience`.

    Raises ConfigError for an address that is none, or a key that cannot be sent.
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
        parts = urllib.parse.urlsplit(base_url)
        check(
            parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc,
            f"--base_url={parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}: allowed "
            "is http:// or https:// and a host, without a user or a key; pass the address of a "
            "server, such as http://localhost:8000/v1",
        )
        key = (api_key or "").strip()
        check(
            all("!" <= character <= "~" for character in key),
            "--api_key_env: the key in that environment variable has characters that no HTTP "
            "header can hold; allowed are printable ASCII characters without spaces. Set it again",
        )
        self.url = f"{base_url.rstrip('/')}/chat/completions"
        self._fields = {"model": model, **(options or {})}
        self._patience = patience or Patience()
        self._key = key
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._random = random.Random()
        self._closed = threading.Event()

    def chat(self, messages: Sequence[Mapping[str, str]]) -> Reply:
        """What the model says next.

        Raises:
          EndpointError: the server refuses the request.
          OutOfRetriesError: the last attempt has failed, or the server asks for too long a wait.
          ClosedError: `close` was called.
        """
        body = json.dumps({**self._fields, "messages": list(messages)}).encode()
        for attempt in range(self._patience.retries + 1):
            if self._closed.is_set():
                raise ClosedError("the endpoint is closed")
            try:
                return _read(self._post(body))
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

    def _post(self, body: bytes) -> Any:
        """The server's JSON."""
        headers = {"Content-Type": "application/json", "User-Agent": "atommem_jax"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._patience.timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            raise self._judge(error) from error
        except TimeoutError as error:
            raise _PassingError(f"no answer within {self._patience.timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or repr(error)
            raise _PassingError(f"connection failed: {reason}") from error
        try:
            return json.loads(content)
        except ValueError as error:
            raise _PassingError(f"the reply is no JSON: {self._quote(content)!r}") from error

    def _judge(self, error: urllib.error.HTTPError) -> Exception:
        """What an answer other than 200 means."""
        try:
            said = self._quote(error.read())
        except (OSError, http.client.HTTPException):
            said = ""
        if error.code == 429 or error.code >= 500:
            wait = _parse_retry_after(error.headers.get("Retry-After"))
            return _PassingError(f"status {error.code} {said!r}", wait)
        rest = _ADVICE_ON_REDIRECT if error.code < 400 else _ADVICE_ON_REST
        advice = _ADVICE.get(error.code, rest)
        return EndpointError(f"{self.url}: status {error.code}, {said!r}. {advice}")

    def _quote(self, content: bytes) -> str:
        text = " ".join(content.decode(errors="replace").split())
        if self._key:
            text = text.replace(self._key, "***")
        return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."


def _read(answer: Any) -> Reply:
    """Raises _PassingError for what is no completion."""
    try:
        choice = answer["choices"][0]
        text = choice["message"].get("content") or ""
        usage = answer.get("usage") or {}
        return Reply(
            text=text.encode(errors="replace").decode(),
            cut=choice.get("finish_reason") == "length",
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
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
