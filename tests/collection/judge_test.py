"""A judge that errs at known rates: the rates are found. Nothing is asked twice."""

import hashlib
import json
import re

import pytest

from atommem_jax.collection import judge as judge_lib
from atommem_jax.collection.endpoint import Endpoint, EndpointError, Patience
from atommem_jax.collection.judge import Claim, Judge
from atommem_jax.learning import reward
from tests.helpers.stub_endpoint import Answer, Stub

pytest.importorskip("openai")

QUESTIONS = 400


def make_records():
    """Half of the answers are right, a tenth in other words, which exact match does not know."""
    records = []
    for i in range(QUESTIONS):
        gold, other = f"Person {i}", f"Person {i + 1}"
        answer = gold if i % 2 else f"that is {gold}" if i % 10 == 0 else other
        records.append(
            {
                **{"episode": i // 4, "question": i % 4, "text": f"Who is number {i}?"},
                **{"answer": answer, "aliases": [gold, f"No. {i}"]},
                "em": reward.exact_match(answer, [gold]),
            }
        )
    return records


def read_claim(request):
    """(question, right answers, answer) as the judge is told them."""
    text = request["messages"][0]["content"]
    found = re.search(r"Question: (.*)\nRight answers.*?: (.*)\nAnswer to judge: (.*)\n", text)
    return found[1], json.loads(f"[{found[2].replace('; ', ',')}]"), found[3]


def flip(claim, rate):
    """Whether a judge errs on a claim: always the same way, and at a rate."""
    digest = hashlib.sha256(repr(claim).encode()).digest()
    return int.from_bytes(digest[:4], "big") < rate * 2**32


class Erring:
    """Knows the truth, takes wrong answers and vague ones at a rate, and right ones not at one."""

    def __init__(self, *, wrong=0.0, vague=0.0, right=0.0):
        self.rates = {"wrong": wrong, "vague": vague, "right": right}

    def __call__(self, request):
        claim = read_claim(request)
        _, gold, answer = claim
        kind = "vague" if answer in judge_lib.VAGUE else "wrong"
        if any(answer.removeprefix("that is ") == name for name in gold):
            kind = "right"
        says = (kind == "right") != flip(claim, self.rates[kind])
        return Answer(text="CORRECT" if says else "INCORRECT")


def run(answer, folder, records=None, **how):
    with Stub(answer) as stub:
        endpoint = Endpoint(
            stub.url, "judge", patience=Patience(timeout=30.0, retries=3, backoff=0.01)
        )
        judge = Judge(endpoint, "judge", folder)
        summary, verdicts = judge_lib.judge_records(judge, records or make_records(), **how)
        endpoint.close()
        return summary, verdicts, stub


def test_the_rates_at_which_a_judge_errs_are_found(tmp_path):
    rates = {"wrong": 0.2, "vague": 0.63, "right": 0.1}
    summary, verdicts, stub = run(Erring(**rates), tmp_path, controls=QUESTIONS, prices=(2.0, 6.0))
    controls = summary["controls"]
    assert all(rate["claims"] == QUESTIONS for rate in controls.values())
    # Of 400 the standard deviation is 2.5 points at most.
    assert controls["wrong"]["accepted"] == pytest.approx(0.2, abs=0.06)
    assert controls["vague"]["accepted"] == pytest.approx(0.63, abs=0.07)
    assert controls["right"]["accepted"] == pytest.approx(0.9, abs=0.05)
    # Right are half and a tenth; exact match knows the half.
    assert summary["em"] == 0.5
    assert summary["accepted"] == pytest.approx(0.6 * 0.9 + 0.4 * 0.2, abs=0.05)
    assert summary["em_only"] == pytest.approx(0.5 * 0.1, abs=0.03)
    assert summary["judge_only"] == pytest.approx(0.1 * 0.9 + 0.4 * 0.2, abs=0.04)
    assert summary["agreement"] == pytest.approx(1 - summary["em_only"] - summary["judge_only"])
    assert summary["accepted"] == sum(v.correct for v in verdicts) / QUESTIONS
    assert summary["asked"] == len(stub.requests)
    assert summary["prompt_tokens"] == 100 * summary["asked"]  # as the stub counts
    assert summary["cost"] == pytest.approx(summary["asked"] * (100 * 2.0 + 10 * 6.0) / 1e6)
    assert "of answers made up it accepts" in judge_lib.render(summary)


def test_a_judge_that_does_not_err_agrees_with_the_truth(tmp_path):
    summary, _, _ = run(Erring(), tmp_path, controls=50)
    accepted = {kind: rate["accepted"] for kind, rate in summary["controls"].items()}
    assert accepted == {"wrong": 0.0, "vague": 0.0, "right": 1.0}
    assert (summary["accepted"], summary["em"]) == (0.6, 0.5)
    assert (summary["judge_only"], summary["em_only"]) == (pytest.approx(0.1), 0.0)


def test_nothing_is_asked_twice(tmp_path):
    first, verdicts, stub = run(Erring(wrong=0.3), tmp_path, controls=20)
    assert first["asked"] == len(stub.requests) == len(set(map(str, stub.requests)))
    again, same, quiet = run(Erring(wrong=0.3), tmp_path, controls=20)
    assert not quiet.requests
    assert same == verdicts
    assert (again["asked"], again["prompt_tokens"], again["cost"]) == (0, 0, None)
    assert again["controls"] == first["controls"]
    with Stub(Erring()) as other:
        endpoint = Endpoint(other.url, "another")
        Judge(endpoint, "another", tmp_path).judge([Claim("Who is number 1?", ("x",), "x")])
        endpoint.close()
        assert len(other.requests) == 1, "a verdict is of one judge"


def test_a_request_that_failed_is_sent_again(tmp_path):
    tries = []

    def fail_once(request):
        tries.append(request)
        return Answer(status=503) if len(tries) == 1 else Erring()(request)

    summary, _, _ = run(fail_once, tmp_path, make_records()[:1], controls=0)
    assert (len(tries), summary["asked"]) == (2, 1)


def test_what_is_no_verdict_is_wrong_and_counted(tmp_path):
    summary, _, _ = run(lambda request: Answer(text="Well."), tmp_path, controls=0)
    assert (summary["accepted"], summary["unclear"]) == (0.0, QUESTIONS)
    assert "unclear" in judge_lib.render(summary)
    refused, _, _ = run(
        lambda request: Answer(status=400, body=b"content filter"),
        tmp_path / "..",
        make_records()[:2],
        controls=0,
    )
    assert refused["unclear"] == 2


def test_a_refusal_of_everything_ends_it_and_keeps_what_was_said(tmp_path):
    said = []

    def stop(request):
        said.append(request)
        return Erring()(request) if len(said) <= 3 else Answer(status=401)

    with pytest.raises(EndpointError, match="401"):
        run(stop, tmp_path, controls=0)
    kept = (tmp_path / judge_lib.CACHE_FILE).read_text().splitlines()
    assert len(kept) == 3


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("CORRECT", (True, True)),
        ("incorrect.", (False, True)),
        ("It may look INCORRECT, but it is\n**Correct**", (True, True)),
        ("Yes", (False, False)),
        ("", (False, False)),
    ],
)
def test_the_last_word_counts(text, verdict):
    assert judge_lib.read_verdict(text) == verdict


def test_no_answer_is_wrong_and_asked_of_nobody(tmp_path):
    record = make_records()[0] | {"answer": " "}
    summary, _, stub = run(Erring(right=1.0), tmp_path, [record], controls=0)
    assert (summary["accepted"], summary["unclear"], stub.requests) == (0.0, 0, [])


def test_controls_are_wrong_by_construction():
    records = make_records()
    controls = judge_lib.make_controls(records, 30)
    assert {kind: len(claims) for kind, claims in controls.items()} == {
        "wrong": 30,
        "vague": 30,
        "right": 30,
    }
    for kind in ("wrong", "vague"):
        assert not any(reward.exact_match(c.answer, c.gold) for c in controls[kind])
    assert all(reward.exact_match(c.answer, c.gold) for c in controls["right"])
    alone = judge_lib.make_controls(records[:1], 5)
    assert (len(alone["wrong"]), len(alone["vague"])) == (0, 1)
