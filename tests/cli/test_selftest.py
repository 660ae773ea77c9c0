"""``sae-steer selftest``: passes on a server that is right, and fails on each that is wrong in one way."""

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from sae_steer import embedded
from sae_steer.sites import Site
from sae_steer_cli.checks import answers, first
from sae_steer_cli.checks.answers import LEAST_BOUND, Answer, Token, compare
from sae_steer_cli.checks.run import Outcome, checks, run
from sae_steer_cli.checks.subject import Edit, Subject
from sae_steer_cli.cli import app
from sae_steer_http.client import Server
from sae_steer_server.settings import SaeSource, Settings
from tests.cli import broken_servers as broken
from tests.server.conftest import Served

PLAIN = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
SEA = Edit("embedded", 551, 28.15)
KEYS = [check.key for check in checks(None, None)]


@pytest.fixture(scope="module")
def demo() -> Iterator[Served]:
    """The embedded model, served."""
    served = Served(Settings(model="demo", dtype="float32", device="cpu", port=0, max_model_len=320))
    yield served
    served.stop()


SEED = 7  # of the prompts: on some that a server may be given, no edit shows


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["selftest", "--seed", str(SEED), *arguments], env=PLAIN)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def checked(url: str, *keys: str, given: Edit | None = SEA) -> dict[str, Outcome]:
    """Some of the checks, and those that they need."""
    todo = tuple(check for check in checks(given, None) if check.vital or check.key in keys)
    with closing(Server(url, None, 60)) as server:
        subject = Subject(server, first.model_of(server, None), lambda _: None, chance=random.Random(SEED))
        return {outcome.key: outcome for outcome in run(subject, todo)}


@pytest.fixture(scope="module")
def known(demo: Served) -> Subject:
    """What the checks that come first find out about the server while nothing is wrong with it."""
    with closing(Server(demo.url, None, 60)) as server:
        subject = Subject(server, first.model_of(server, None), lambda _: None, chance=random.Random(SEED))
        todo = tuple(check for check in checks(SEA, None) if check.vital)
        assert {outcome.verdict for outcome in run(subject, todo)} == {"PASS"}
    return subject


def one_checked(known: Subject, url: str, key: str, *, reports_cached: bool = False) -> Outcome:
    """One check, of a server that is wrong in nothing that the first ones look at."""
    todo = tuple(check for check in checks(SEA, None) if check.key == key)
    with closing(Server(url, None, 60)) as server:
        subject = replace(known, server=server, reports_cached=reports_cached, chance=random.Random(SEED))
        first.serves_steering(subject)
        (outcome,) = run(subject, todo)
    return outcome


def test_help_teaches() -> None:
    found = CliRunner().invoke(app, ["selftest", "--help"], env=PLAIN).stdout
    for word in (
        "sae-steer selftest --url http://127.0.0.1:8000",
        "--enable-prompt-tokens-details",
        "--feature",
        "SAE_STEER_API_KEY",
        "--json",
    ):
        assert word in found


def test_a_server_that_is_right_passes(demo: Served) -> None:
    code, out, err = invoke("--url", demo.url)
    assert code == 0, out
    lines = out.splitlines()
    assert [line[:4] for line in lines[:-1]].count("PASS") == len(KEYS) - 1
    (skipped,) = [line for line in lines if line.startswith("SKIP")]
    assert "--enable-prompt-tokens-details" in skipped
    assert lines[-1] == f"{len(KEYS) - 1} passed, 0 failed, 1 skipped"
    assert "trying feature" in err
    assert "times its recorded maximum changes the answer" in out


def test_one_with_a_prefix_cache_passes_all(demo: Served) -> None:
    with broken.running(broken.LikeVllm(demo.url)) as url:
        code, out, _ = invoke(
            "--url", f"{url}/v1/", "--json", "--sae", "embedded", "--feature", "551", "--value", "28.15"
        )
    report = json.loads(out)
    verdicts = {check["key"]: (check["verdict"], check["reason"]) for check in report["checks"]}
    assert list(verdicts) == KEYS
    assert {verdict for verdict, _ in verdicts.values()} == {"PASS"}, verdicts
    assert code == 0
    assert report["passed"] is True
    assert report["edit"] == {"sae": "embedded", "feature": 551, "value": 28.15, "units": "raw"}
    assert (report["host"], report["model"], report["url"]) == ("vllm", "demo", url)
    assert "no prompt token came from the other's cache" in verdicts["cache_steered_plain"][1]


@pytest.mark.parametrize(
    ("wrong", "key", "reason"),
    [
        (broken.Stock, "server", "this server runs without sae-steer"),
        (broken.Unnamed, "server", "VLLM_PLUGINS=sae_steer"),
        (broken.Ignores, "refusals", "it ignores it"),
        (broken.Marks, "repeats", "was answered as a steered one"),
        (broken.Checks, "effect", "without choices[0].steering"),
        (broken.Pretends, "effect", "no answer changed with an edit that fired"),
        (broken.Silent, "effect", "no answer changed with an edit that fired"),
    ],
)
def test_one_that_does_not_steer_fails(demo: Served, wrong: type[broken.Proxy], key: str, reason: str) -> None:
    with broken.running(wrong(demo.url)) as url:
        found = checked(url)
    assert found[key].verdict == "FAIL", found[key].reason
    assert reason in found[key].reason
    vital = list(found)
    assert {found[k].verdict for k in vital[: vital.index(key)]} <= {"PASS"}
    assert {found[k].verdict for k in vital[vital.index(key) + 1 :]} <= {"SKIP"}


@pytest.mark.parametrize(
    ("wrong", "key", "reason"),
    [
        (broken.Spreads, "plain", "in a batch with steered ones"),
        (broken.OneBlock, "choices", "choice 1 of 2 has no block"),
        (broken.BareStream, "stream", "the last event of a steered stream has no block"),
        (broken.BrokenStream, "stream", "broke off"),
        (broken.BareChat, "chat", "a steered chat has no block"),
        (broken.NoProfiles, "profile", "does not list"),
        (broken.Beams, "beam_search", "HTTP 200"),
        (broken.Responds, "routes", "/v1/responses answers"),
        (broken.Shares, "cache_steered_plain", "from the other's cache"),
        (broken.Shares, "cache_plain_steered", "from the other's cache"),
        (broken.Shares, "cache_reply", "from the other's cache"),
        (broken.SharesNothing, "cache_completion_shares", "and one like it takes 0"),
        (broken.LeaksOneWay, "cache_steered_plain", "is what a leak would answer"),
        (broken.LeaksOneWay, "cache_reply", "is what a leak would answer"),
        (broken.Leaks, "plain", "after a steered request"),
        (broken.Leaks, "cache_steered_plain", "differs from its cold answer"),
        (broken.Leaks, "cache_plain_steered", "differs from its cold answer"),
        (broken.Leaks, "cache_steered_other", "differs from its cold answer"),
        (broken.Leaks, "cache_reply", "differs from its cold answer"),
    ],
)
def test_one_that_is_wrong_fails(
    demo: Served, known: Subject, wrong: type[broken.Proxy], key: str, reason: str
) -> None:
    with broken.running(wrong(demo.url)) as url:
        found = one_checked(known, url, key, reports_cached=wrong in (broken.Shares, broken.SharesNothing))
    assert found.verdict == "FAIL", found.reason
    assert reason in found.reason


def test_the_status_of_a_failure_is_one(demo: Served) -> None:
    with broken.running(broken.Ignores(demo.url)) as url:
        code, out, _ = invoke("--url", url)
    assert code == 1
    lines = out.splitlines()
    assert [line[:4] for line in lines[:2]] == ["PASS", "FAIL"]
    assert lines[-1] == f"1 passed, 1 failed, {len(KEYS) - 2} skipped"


def test_a_last_layer_shows_no_leak_and_says_so() -> None:
    sae = SaeSource("last", str(embedded.SAE), site=Site.parse("resid_post.5"))
    served = Served(Settings(model=str(embedded.MODEL), saes=(sae,), dtype="float32", device="cpu", port=0))
    try:
        found = checked(served.url, "cache_steered_plain", given=Edit("last", 551, 60.0))
    finally:
        served.stop()
    assert found["effect"].verdict == "PASS", found["effect"].reason
    assert found["cache_steered_plain"].verdict == "SKIP"
    assert "last layer" in found["cache_steered_plain"].reason


def test_a_server_without_saes_has_nothing_to_show(demo: Served) -> None:
    with broken.running(broken.NoSaes(demo.url)) as url:
        found = checked(url, given=None)
    assert found["effect"].verdict == "FAIL"
    assert "no SAE" in found["effect"].reason


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (Edit("none", 0, 1.0), "HTTP 400: "),
        (Edit("embedded", 768, 1.0), "HTTP 400: "),
        (Edit("embedded", 551, 0.0), "Give a larger --value"),
    ],
)
def test_an_edit_that_cannot_be_used_is_a_failure(demo: Served, given: Edit, reason: str) -> None:
    found = checked(demo.url, given=given)
    assert found["effect"].verdict == "FAIL"
    assert reason in found["effect"].reason


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--url", "127.0.0.1:8000"], "Write it like http://127.0.0.1:8000"),
        (["--url", "http://[::1"], "cannot be sent"),
        (["--url", "CLOSED"], "cannot be reached"),
        (["--url", "OPEN", "--model", "gemma"], "There is no model 'gemma'"),
        (["--url", "OPEN", "--model", "demo:seaside"], "is a profile's name"),
        (["--url", "OPEN", "--feature", "3"], "come together"),
        (["--url", "OPEN", "--value", "3"], "come together"),
        (["--url", "OPEN/elsewhere"], "OpenAI-compatible"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(demo: Served, arguments: list[str], said: str) -> None:
    words = {"CLOSED": f"http://127.0.0.1:{free_port()}", "OPEN": demo.url, "OPEN/elsewhere": f"{demo.url}/elsewhere"}
    code, out, err = invoke(*(words.get(word, word) for word in arguments))
    assert code == 2
    assert out == ""
    (line,) = err.splitlines()
    assert said in line


def test_keys() -> None:
    served = Served(Settings(model="demo", device="cpu", port=0, api_key="open sesame"))
    try:
        code, _, err = invoke("--url", served.url, "--api-key", "sesame")
        assert code == 2
        assert "--api-key" in err
        with closing(Server(served.url, "open sesame", 60)) as server:
            assert first.model_of(server, None) == "demo"
    finally:
        served.stop()


def test_a_server_that_says_nothing_is_given_up(demo: Served) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        code, _, err = invoke("--url", f"http://127.0.0.1:{sock.getsockname()[1]}", "--timeout", "1")
    assert code == 2
    assert "within 1 s" in err


def test_a_server_that_goes_away_fails_the_check_and_skips_the_rest(demo: Served) -> None:
    with broken.running(broken.Proxy(demo.url)) as url:
        server = Server(url, None, 60)
        subject = Subject(server, first.model_of(server, None), lambda _: None, chance=random.Random(SEED))
    found = list(run(subject, checks(SEA, None)))
    server.close()
    assert [outcome.verdict for outcome in found] == ["FAIL"] + ["SKIP"] * (len(KEYS) - 1)
    assert found[1].reason == "the server stopped answering"


def test_httpx_is_asked_for() -> None:
    program = "import sys; sys.modules['httpx'] = None; import sae_steer_cli.__main__ as m; m.main()"
    command = [sys.executable, "-c", program, "selftest", "--url", "http://127.0.0.1:1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=PLAIN)
    assert result.returncode == 2
    assert "pip install 'sae-steer[selftest]'" in result.stderr


def answer(*tokens: tuple[str, float, dict[str, float]]) -> Answer:
    made = [Token(*token) for token in tokens]
    return Answer("".join(token.text for token in made), made, None, None, None, None, 5, None)


SURE = ("b", -0.1, {"b": -0.1, "c": -3.0})
TIE = ("b", -0.70, {"b": -0.70, "c": -0.72})


def test_rounding_is_told_from_another_answer() -> None:
    one = answer(("a", -0.5, {}), TIE)
    rounded = answer(("a", -0.51, {}), ("c", -0.70, {"b": -0.71, "c": -0.70}))
    difference = compare(one, rounded)
    assert (difference.at, difference.within(LEAST_BOUND)) == (1, True)
    assert "another text from place 1" in str(difference)
    # The same tokens, and not the same numbers.
    assert not compare(one, answer(("a", -0.6, {}), TIE)).within(LEAST_BOUND)
    # Another token, which was never likely, or not even listed.
    assert not compare(answer(SURE), answer(("c", -0.1, {"c": -0.1, "b": -3.0}))).within(LEAST_BOUND)
    assert not compare(answer(SURE), answer(("d", -0.1, {"d": -0.1}))).within(LEAST_BOUND)
    # One that ends earlier.
    assert not compare(one, answer(("a", -0.5, {}))).within(LEAST_BOUND)
    assert str(compare(one, one)) == "the same text, log-probabilities equal to the bit"


def test_without_log_probabilities_texts_are_compared() -> None:
    one = Answer("abc", None, None, None, None, None, 5, None)
    other = Answer("abd", None, None, None, None, None, 5, None)
    assert compare(one, one).within(LEAST_BOUND)
    assert compare(one, other).at == 2
    assert not compare(one, other).within(LEAST_BOUND)


@pytest.mark.parametrize(
    "reply", [{}, {"choices": []}, {"choices": [{"index": 0}]}, {"choices": [{"text": "a", "steering": {}}]}]
)
def test_what_is_no_answer_is_said(reply: dict[str, object]) -> None:
    with pytest.raises(answers.BadAnswer, match="the answer has no "):
        Answer.of(reply)
