"""The client of an OpenAI-compatible endpoint, against a stub that fails in every way."""

import sys
import threading

import pytest

from atommem_jax.collection import endpoint
from atommem_jax.config import ConfigError
from tests.helpers.stub_endpoint import Answer, Stub, complete

HELLO = [{"role": "user", "content": "hello"}]
HASTY = endpoint.Patience(timeout=5.0, retries=3, backoff=0.001, longest_wait=0.2)
SECRET = "sk-very-secret"


def ask(answers, patience=HASTY, **arguments):
    """(the reply or what was raised, the stub) of one question; the last answer repeats."""
    left = list(answers)
    with Stub(lambda request: left.pop(0) if len(left) > 1 else left[0]) as stub:
        client = endpoint.Endpoint(stub.url, "some/model", patience=patience, **arguments)
        try:
            return client.chat(HELLO), stub
        except (endpoint.EndpointError, endpoint.OutOfRetriesError) as error:
            return error, stub


def test_a_request_is_what_the_protocol_asks_for():
    options = {"temperature": 0.5, "max_tokens": 7}
    reply, stub = ask([Answer("h\N{SNOWMAN}")], api_key=f" {SECRET}\n", options=options)
    assert reply == endpoint.Reply("h\N{SNOWMAN}", False, 100, 10)
    assert stub.requests == [{"model": "some/model", "messages": HELLO, **options}]
    assert stub.keys == [f"Bearer {SECRET}"]
    _, stub = ask([Answer()])
    assert stub.keys == [None]


def test_what_the_environment_holds_for_another_server_is_not_sent(monkeypatch):
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", SECRET)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    for key in (None, "sk-another"):
        reply, stub = ask([Answer("here")], api_key=key)
        assert reply.text == "here"
        assert stub.keys == [f"Bearer {key}" if key else None]
        assert SECRET not in str(stub.headers)
        assert not {"openai-organization", "openai-project"} & stub.headers[0].keys()


def test_messages_and_options_are_sent_without_lone_surrogates():
    with Stub(lambda request: Answer()) as stub:
        client = endpoint.Endpoint(stub.url, "m", options={"stop": "\ud800."}, patience=HASTY)
        client.chat([{"role": "user", "content": "a\udfffb\N{SNOWMAN}"}])
    assert stub.requests[0]["stop"] == "?."
    assert stub.requests[0]["messages"] == [{"role": "user", "content": "a?b\N{SNOWMAN}"}]


def test_without_the_client_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"pip install 'atommem_jax\[collect\]'"):
        endpoint.Endpoint("http://host/v1", "m")


@pytest.mark.parametrize(
    "failure",
    [
        Answer(status=500),
        Answer(status=429, headers={"Retry-After": "0.05"}),
        Answer(status=503, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        Answer(status=503, headers={"Retry-After": "soon"}),
        Answer(body=b'{"choices": [{"mess'),
        Answer(body=b'{"choices": []}'),
        Answer(body=b"[1]"),
        Answer(hangs_up=True),
        # Fewer bytes than were announced.
        Answer(body=b"{}", headers={"Content-Length": "9", "Connection": "close"}),
    ],
    ids=lambda failure: f"{failure.status}{failure.body or ''}",
)
def test_what_passes_is_tried_again(failure):
    reply, stub = ask([failure, failure, Answer("at last")])
    assert isinstance(reply, endpoint.Reply), reply
    assert reply.text == "at last"
    assert len(stub.requests) == 3


def test_a_server_that_says_nothing_is_left():
    patience = endpoint.Patience(timeout=0.2, retries=1, backoff=0.0)
    error, stub = ask([Answer(stalls=True)], patience)
    assert isinstance(error, endpoint.OutOfRetriesError)
    assert "no answer within 0.2 s; given up after 2 attempts" in str(error)
    assert len(stub.requests) == 2


def test_attempts_and_waits_are_bounded():
    error, stub = ask([Answer(status=500, body=b"busy")])
    assert isinstance(error, endpoint.OutOfRetriesError)
    assert "status 500 'busy'; given up after 4 attempts" in str(error)
    assert len(stub.requests) == 4
    error, stub = ask([Answer(status=429, headers={"Retry-After": "86400"})])
    assert "asks to wait 86400 s; given up after 1 attempts" in str(error)
    assert len(stub.requests) == 1
    with Stub(lambda request: Answer()) as stub:
        pass
    client = endpoint.Endpoint(stub.url, "m", patience=HASTY)
    with pytest.raises(endpoint.OutOfRetriesError, match="connection failed"):
        client.chat(HELLO)


def test_waits_grow_with_jitter_and_are_never_shorter_than_asked():
    client = endpoint.Endpoint(
        "http://host/v1", "m", patience=endpoint.Patience(backoff=1.0, longest_wait=60.0)
    )
    for attempt, whole in enumerate([1, 2, 4, 8, 16, 32, 60, 60]):
        waits = [client._find_wait(attempt, 0.0) for _ in range(50)]
        assert whole / 2 <= min(waits) < max(waits) <= whole
        assert client._find_wait(attempt, 70.0) == 70.0


@pytest.mark.parametrize(
    ("status", "advice"),
    [(400, "--max_tokens"), (401, "--api_key_env"), (404, "--base_url"), (307, "--base_url")],
)
def test_a_refusal_ends_at_once_and_says_what_to_do(status, advice):
    body = f"<html>\n no such\nthing for {SECRET} {'x' * 1000}".encode()
    headers = {"Location": "http://127.0.0.1:9/elsewhere"}
    error, stub = ask([Answer(status=status, body=body, headers=headers)], api_key=SECRET)
    assert isinstance(error, endpoint.EndpointError)
    assert f"status {status}, '<html> no such thing for *** xxx" in str(error)
    assert advice in str(error)
    assert len(str(error)) < 700
    assert SECRET not in str(error)
    assert len(stub.requests) == 1


def test_a_reply_may_be_empty_cut_or_odd():
    reply, _ = ask([Answer(text=None)])
    assert reply == endpoint.Reply("", False, 100, 10)
    reply, _ = ask([Answer("abc", finish_reason="length")])
    assert reply.cut
    body = complete(Answer("a?b")).replace(b"?", b"\\ud800")
    reply, _ = ask([Answer(body=body.replace(b'"usage"', b'"others"'))])
    assert reply == endpoint.Reply("a?b", False, 0, 0)


def test_a_bad_address_or_key_is_refused_without_quoting_the_key():
    addresses = ["localhost:8000/v1", "ftp://host", "http://host:0", "http://host:port", "http://["]
    addresses += ["http://a\0b/v1", "http://xn--\N{SNOWMAN}/v1"]
    addresses += [f"http://user:{SECRET}@host/v1", f"user:{SECRET}@host/v1"]
    for url in addresses:
        with pytest.raises(ConfigError, match="--base_url=") as info:
            endpoint.Endpoint(url, "m")
        assert SECRET not in str(info.value)
    with pytest.raises(ConfigError, match="--api_key_env") as info:
        endpoint.Endpoint("http://host/v1", "m", api_key=f"{SECRET}\nX-Other: 1")
    assert SECRET not in str(info.value)
    with pytest.raises(ConfigError, match="--extra_body: a field cannot be sent"):
        endpoint.Endpoint("http://host/v1", "m", options={"top_p": float("nan")})


def test_closing_ends_a_wait():
    arrived = threading.Event()

    def answer(request):
        arrived.set()
        return Answer(status=500, headers={"Retry-After": "3600"})

    with Stub(answer) as stub:
        patience = endpoint.Patience(longest_wait=7200.0)
        client = endpoint.Endpoint(stub.url, "m", patience=patience)
        raised = []

        def wait():
            with pytest.raises(endpoint.ClosedError) as info:
                client.chat(HELLO)
            raised.append(info)

        thread = threading.Thread(target=wait)
        thread.start()
        arrived.wait()
        client.close()
        thread.join()
        assert len(raised) == len(stub.requests) == 1
