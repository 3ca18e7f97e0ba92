"""A chat endpoint in a thread, which answers by a function; and a teacher that reads the messages.

with Stub(lambda request: Answer(text="hello")) as stub:
    Endpoint(stub.url, "any model").chat([...])
"""

import contextlib
import dataclasses
import http.server
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the server does with a request."""

    text: Any = ""  # the message's content: a string, None, or a list of parts
    status: int = 200
    body: bytes | None = None  # in place of a completion
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    finish_reason: str | None = "stop"  # None leaves it out
    message: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # more of its fields
    drips: bool = False  # a blank every 50 ms, without an end
    stalls: bool = False  # nothing comes until the server ends
    hangs_up: bool = False


class Stub:
    """A server on a free port of this host. Use it as a context manager.

    `requests` are the bodies so far, `queries` those of their addresses, `headers` what came with
    them, `keys` the Authorization headers among these.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Answer]):
        self.requests: list[dict[str, Any]] = []
        self.queries: list[str] = []
        self.headers: list[dict[str, str]] = []
        self._answer, self._over = answer, threading.Event()
        stub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                stub.handle(self)

            def log_message(self, *unused: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def keys(self) -> list[str | None]:
        return [headers.get("authorization") for headers in self.headers]

    def handle(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        """Answers one request."""
        size = int(handler.headers["Content-Length"])
        request = json.loads(handler.rfile.read(size))
        path, _, query = handler.path.partition("?")
        assert path == "/v1/chat/completions"
        self.queries.append(query)
        self.requests.append(request)
        self.headers.append({name.lower(): value for name, value in handler.headers.items()})
        try:
            answer = self._answer(request)
        except Exception as error:  # a test that is wrong ends the client at once
            answer = Answer(status=400, body=repr(error).encode())
        if answer.stalls:
            self._over.wait()
        if answer.stalls or answer.hangs_up:
            return
        if answer.drips:
            self._drip(handler)
            return
        body = complete(answer) if answer.body is None else answer.body
        handler.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    def _drip(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):  # the client has gone
            while not self._over.wait(0.05):
                handler.wfile.write(b" ")

    def __enter__(self) -> "Stub":
        self._thread.start()
        return self

    def __exit__(self, *unused_error: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def complete(answer: Answer) -> bytes:
    """A chat completion; each counts 100 prompt tokens and 10 others."""
    choice: dict[str, Any] = {
        "message": {"role": "assistant", "content": answer.text, **answer.message}
    }
    if answer.finish_reason is not None:
        choice["finish_reason"] = answer.finish_reason
    return json.dumps(
        {
            "choices": [choice],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10},
        }
    ).encode()


def teach(messages: Sequence[Mapping[str, str]]) -> str:
    """What a good teacher of the synthetic task replies, in the compact protocol.

    It knows nothing but the text of the messages: who works where, and where companies are.
    """
    system, user = (message["content"] for message in messages)
    assert "<create>" in system
    shown: dict[str, list[str]] = {}
    for name, text in re.findall(r"\n\n([A-Z][\w ]*):\n(.*)", user):
        shown.setdefault(name, []).append(text)
    entries = {int(n.split()[1]): t[0] for n, t in shown.items() if n.startswith("Memory ")}
    asked = [re.search(r"does (\w+) work", question)[1] for question in shown["Question"]]
    if "Part of the document" in shown:
        (fact,) = shown["Part of the document"]
        return _read(fact, asked, entries, first="Query" not in shown)

    person = asked[0]
    jobs = [re.search(rf"^{person} (now )?works at (\w+)\.", text) for text in entries.values()]
    company = next((job[2] for job in sorted(filter(None, jobs), key=lambda j: not j[1])), None)
    wants_city = shown["Question"][0].startswith("Which city")
    places = [re.search(rf"^{company} is in (\w+)\.", text) for text in entries.values()]
    answer = next((place[1] for place in places if place), None) if wants_city else company
    if answer is None and "Answer the question now." not in user:
        return f"<read>{company if company else person}<end>"
    return f"<answer>{answer or 'unknown'}<end>"


def _read(fact: str, asked: Sequence[str], entries: Mapping[int, str], *, first: bool) -> str:
    actions = [f"<read>{' '.join(asked)}<end>"] if first else []
    subject = fact.split()[0]
    stale = [i for i, text in entries.items() if text.startswith(f"{subject} ")]
    if subject in asked and stale:
        actions.append(f"<update><{stale[0]}> {fact}<end>")
    elif subject in asked or any(text.endswith(f" {subject}.") for text in entries.values()):
        actions.append(f"<create>{fact}<end>")
    return "I note:\n" + "\n".join(actions)
