"""The client of an OpenAI-compatible endpoint, against a stub that fails in every way."""

import json
import sys
import threading
import time

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
    assert reply == endpoint.Reply("h\N{SNOWMAN}", endpoint.STOP, 100, 10)
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
    assert "no whole answer within 0.2 s; given up after 2 attempts" in str(error)
    assert len(stub.requests) == 2


def test_the_timeout_is_of_the_whole_answer():
    """A byte now and then, long before it has passed, does not begin it anew."""
    patience = endpoint.Patience(timeout=0.3, retries=1, backoff=0.0)
    begin = time.monotonic()
    error, stub = ask([Answer(drips=True)], patience)
    assert 0.6 <= time.monotonic() - begin < 5.0
    assert isinstance(error, endpoint.OutOfRetriesError)
    assert "no whole answer within 0.3 s; given up after 2 attempts" in str(error)
    assert len(stub.requests) == 2
    reply, _ = ask([Answer(drips=True), Answer("at last")], patience)
    assert reply.text == "at last"


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


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refusal_may_be_of_one_prompt(status):
    """Of that kind is what others need not get; everything else ends for all."""
    for said, advice in (
        ("The maximum context length is 4096 tokens", "lower --max_tokens"),
        ("The response was filtered due to the content management policy", "content filter"),
        ("Unsupported parameter: max_tokens", "smaller" if status == 413 else "--max_tokens"),
    ):
        body = json.dumps({"error": {"message": said}}).encode()
        error, stub = ask([Answer(status=status, body=body)])
        assert type(error) is endpoint.RefusedError
        assert f"status {status}, " in str(error)
        assert said in str(error)
        assert advice in str(error)
        assert len(stub.requests) == 1
    flagged = b'{"error": {"message": "Your input was flagged", "code": 403}}'
    assert type(ask([Answer(status=403, body=flagged)])[0]) is endpoint.RefusedError
    for other in (401, 402, 403, 404):
        assert type(ask([Answer(status=other)])[0]) is endpoint.EndpointError


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        (
            {"error": {"message": "Insufficient credits", "code": 402}, "user_id": "u"},
            endpoint.EndpointError,
            'status 200 with error 402, \'{"message": "Insufficient credits"',
        ),
        (
            {"error": {"message": "Bad key", "code": "401"}, "choices": None},
            endpoint.EndpointError,
            "--api_key_env",
        ),
        (
            {"object": "error", "message": "maximum context length is 9", "code": 400},
            endpoint.RefusedError,
            "maximum context length is 9",
        ),
        (
            {"error": {"message": "Blocked", "code": "content_filter"}},
            endpoint.RefusedError,
            "status 200 with an error, ",
        ),
        (
            {"error": {"message": "Rate limit exceeded", "code": 429}},
            endpoint.OutOfRetriesError,
            'status 200 with error 429 \'{"message": "Rate limit exceeded"',
        ),
        ({"error": "Model is loading"}, endpoint.OutOfRetriesError, "Model is loading"),
        (
            {
                "choices": [
                    {
                        "message": {"content": "<create>Anna lives in " + "x" * 1000},
                        "finish_reason": "error",
                        "error": {"code": 502, "message": "Provider disconnected"},
                    }
                ]
            },
            endpoint.OutOfRetriesError,
            'status 200 with error 502 \'{"code": 502, "message": "Provider disconnected"}\'; '
            "given up after 4 attempts",
        ),
        (
            {"choices": [{"message": {"content": "half"}, "finish_reason": "error"}]},
            endpoint.OutOfRetriesError,
            '"finish_reason": "error"',
        ),
        (
            {"choices": None, "detail": "no such thing"},
            endpoint.OutOfRetriesError,
            'the reply is no chat completion: \'{"choices": null, "detail": "no such thing"}\'',
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_error_in_the_body_of_a_200_is_quoted_and_judged(body, kind, said):
    error, stub = ask([Answer(body=json.dumps(body).encode())])
    assert type(error) is kind, error
    assert said in str(error)
    assert len(stub.requests) == (4 if kind is endpoint.OutOfRetriesError else 1)


def test_a_reply_may_be_odd():
    body = complete(Answer("a?b")).replace(b"?", b"\\ud800")
    reply, _ = ask([Answer(body=body.replace(b'"usage"', b'"others"'))])
    assert reply == endpoint.Reply("a?b", endpoint.STOP, 0, 0)
    reply, _ = ask([Answer(body=b"\xef\xbb\xbf\n" + complete(Answer("a")))])
    assert reply.text == "a"
    error, _ = ask([Answer(body=b"[" * 100_000)])
    assert "the reply is no JSON object: '[[[" in str(error)


@pytest.mark.parametrize(
    ("reason", "ended"),
    [
        ("stop", "stop"),
        ("STOP", "stop"),
        ("eos_token", "stop"),
        ("length", "length"),
        ("content_filter", "content_filter"),
        ("tool_calls", "tool_calls"),
        ("abort", "abort"),
        (None, "no finish_reason"),
    ],
)
def test_only_a_reply_that_stopped_is_whole(reason, ended):
    reply, _ = ask([Answer("abc", finish_reason=reason)])
    assert reply == endpoint.Reply("abc", ended, 100, 10)


THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}


@pytest.mark.parametrize(
    ("content", "fields", "text", "ended", "thoughts"),
    [
        ("", {}, "", "stop", ""),
        (None, {}, "", "no content", ""),
        ([], {}, "", "no content", ""),
        (None, {"reasoning_content": "hm"}, "", "thoughts without a reply", "hm"),
        ("", {"reasoning": "hm"}, "", "thoughts without a reply", "hm"),
        ("yes", {"reasoning": "hm", "reasoning_content": "hm"}, "yes", "stop", "hm"),
        ("yes", {"reasoning_content": None}, "yes", "stop", ""),
        ([{"type": "text", "text": "y"}, {"type": "text", "text": "es"}], {}, "yes", "stop", ""),
        ([THINKING, {"type": "text", "text": "yes"}], {}, "yes", "stop", "hm"),
        ([{"type": "thinking", "thinking": "hm"}], {}, "", "thoughts without a reply", "hm"),
        ([{"type": "refusal", "refusal": "no"}], {}, "", "refusal", ""),
        (None, {"refusal": "I will not"}, "", "refusal", ""),
        ([{"type": "image_url", "image_url": {}}], {}, "", "no content", ""),
    ],
)
def test_content_may_be_null_or_in_parts(content, fields, text, ended, thoughts):
    reply, _ = ask([Answer(content, message=fields)])
    assert reply == endpoint.Reply(text, ended, 100, 10, thoughts)


def test_content_that_is_no_text_is_quoted():
    for content in (7, [{"text": "x"}], [{"type": "text"}]):
        error, _ = ask([Answer(content)])
        assert isinstance(error, endpoint.OutOfRetriesError)
        assert 'the reply is no chat completion: \'{"choices"' in str(error)


def test_an_address_may_have_a_query_and_blanks_around_it():
    for before, after, query in (
        (" ", "/\n", ""),
        ("", "?api-version=2024-10-21", "api-version=2024-10-21"),
        ("\t", "/?api-version=2024-10-21&a=1&a=2&b= ", "api-version=2024-10-21&a=1&a=2&b="),
        ("", "/chat/completions?x=y", "x=y"),
    ):
        with Stub(lambda request: Answer("here")) as stub:
            client = endpoint.Endpoint(f"{before}{stub.url}{after}", "m", patience=HASTY)
            assert client.url == f"{stub.url}/chat/completions"
            assert [client.chat(HELLO).text for _ in range(2)] == ["here", "here"]
            assert stub.queries == [query, query]


def test_what_a_query_holds_is_not_quoted_either():
    with Stub(lambda request: Answer(status=404, body=f"no {SECRET} 2024-10-21".encode())) as stub:
        address = f"{stub.url}?api-version=2024-10-21&code={SECRET}"
        with pytest.raises(endpoint.EndpointError, match=r"'no \*\*\* 2024-10-21'") as info:
            endpoint.Endpoint(address, "m", patience=HASTY).chat(HELLO)
    assert SECRET not in str(info.value)


def test_a_bad_address_or_key_is_refused_without_quoting_the_key():
    addresses = ["localhost:8000/v1", "ftp://host", "http://host:0", "http://host:port", "http://["]
    addresses += [
        "http://a b/v1",
        "http://host/v 1",
        " ",
        "http://a\0b/v1",
        "http://xn--\N{SNOWMAN}/v1",
    ]
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


def test_closing_ends_a_request_under_way():
    arrived = threading.Event()

    def answer(request):
        arrived.set()
        return Answer(stalls=True)

    with Stub(answer) as stub:
        client = endpoint.Endpoint(stub.url, "m", patience=endpoint.Patience(timeout=600.0))
        closing = threading.Thread(target=lambda: (arrived.wait(), client.close(), client.close()))
        closing.start()
        with pytest.raises(endpoint.ClosedError):
            client.chat(HELLO)
        closing.join()
        with pytest.raises(endpoint.ClosedError):
            client.chat(HELLO)
        assert len(stub.requests) == 1
