"""The JSON and the picture show the facts of a check and of a survey of the roots, and escape what servers send."""

from __future__ import annotations

import dataclasses
import datetime
import io
import json
import re
from collections.abc import Callable

import pytest
from rich.console import Console
from support.command_line import STEPS, certified
from support.probes import password_of

import neon_async
from neon_async._cli.check import CheckResult, Step, check
from neon_async._cli.render import check_to_json, print_check, print_roots, roots_to_json
from neon_async._wire.trust import Place, survey
from neon_async.testing import LocalPostgres
from neon_async.testing._impostor import SERVER_NAME, error_response, login

pytestmark = pytest.mark.anyio


def picture(show: Callable[[Console], None], *, encoding: str = "utf-8", width: int = 80) -> str:
    """Return the output of `show` on a console without colours."""
    output = io.BytesIO()
    with io.TextIOWrapper(output, encoding=encoding, errors="strict") as file:
        show(Console(file=file, width=width, color_system=None))
        file.flush()
        return output.getvalue().decode(encoding)


def facts(shown: str) -> dict[str, str]:
    """Return the indented lines of a picture that consist of a name and a value."""
    return dict(re.findall(r"^  (\S+(?: \S+)?)  +(\S.*)$", shown, re.MULTILINE))


# ---------------------------------------------------------------------------------------------------------------------
# JSON


async def test_the_json_of_a_good_connection_has_the_documented_keys(postgres: LocalPostgres) -> None:
    result = await check(postgres.dsn, trust_anchor=postgres.trust_anchor)
    document = json.loads(check_to_json(result))
    assert list(document) == [
        "verdict",
        "seconds",
        "target",
        "steps",
        "tls",
        "certificate",
        "anchor",
        "chain",
        "revocation",
        "server_version",
        "problem",
        "refusal",
    ]
    assert document["verdict"] == "good"
    assert document["problem"] is document["refusal"] is None
    assert all(list(step) == ["name", "started", "seconds", "outcome", "detail"] for step in document["steps"])
    ran = [step for step in document["steps"] if step["outcome"] == "ok"]
    assert all(isinstance(step[key], float) for step in ran for key in ("started", "seconds"))
    assert list(document["tls"]) == ["version", "cipher", "alpn", "negotiation", "server_name", "mechanism"]
    assert document["tls"]["mechanism"] == "SCRAM-SHA-256-PLUS"
    assert (document["tls"]["version"], document["tls"]["alpn"]) == ("TLSv1.3", "postgresql")
    assert list(document["certificate"]) == ["subject", "issuer", "not_after", "days_left", "sha256"]
    assert result.tls is not None
    assert datetime.datetime.fromisoformat(document["certificate"]["not_after"]) == result.tls.not_after
    assert list(document["anchor"]) == ["subject", "source", "sha256"]
    chain = document["chain"]
    assert list(chain) == ["served", "verified", "path_ends", "warnings"]
    assert [each["sha256"] for each in chain["verified"]] == [each.sha256 for each in result.tls.chain]
    assert chain["verified"][0] == chain["served"][0]
    assert (chain["verified"][-1]["sha256"], chain["warnings"]) == (document["anchor"]["sha256"], [])


async def test_the_json_of_a_refusal_has_the_same_keys_and_the_problem() -> None:
    document = json.loads(check_to_json(await check(f"postgresql://neon:hunter2@{SERVER_NAME}/neondb?sslsni=0")))
    assert document["verdict"] == "refused"
    assert list(document["problem"]) == ["step", "type", "message", "retryable"]
    assert document["problem"]["type"] == "InsecureConfigurationError"
    assert document["refusal"] is None
    assert document["tls"] is document["certificate"] is document["anchor"] is document["server_version"] is None


def test_the_json_of_the_roots_contains_what_the_survey_found() -> None:
    places = survey()
    document = json.loads(roots_to_json(places))
    assert document["sha256"] == neon_async.ISRG_ROOT_X1_SHA256
    assert document["found"] is any(place.found for place in places)
    assert [Place(**place) for place in document["places"]] == places


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
async def test_the_picture_of_a_good_connection_fits_80_columns_in_any_encoding(
    postgres: LocalPostgres, encoding: str
) -> None:
    result = await check(postgres.dsn, trust_anchor=postgres.trust_anchor)
    shown = picture(lambda console: print_check(result, console), encoding=encoding)
    assert max(map(len, shown.splitlines())) <= 80
    assert [line.split()[1] for line in shown.split("\n\n")[1].splitlines()[:-1]] == STEPS
    assert shown.splitlines()[-1].startswith("Good:")


async def test_the_picture_and_the_json_show_the_same_facts(postgres: LocalPostgres) -> None:
    result = await check(postgres.dsn, trust_anchor=postgres.trust_anchor)
    document = json.loads(check_to_json(result))
    shown = facts(picture(lambda console: print_check(result, console), width=200))
    expected = document["tls"] | document["certificate"] | {"found_in": document["anchor"]["source"]}
    for name in ("version", "cipher", "negotiation", "server_name", "mechanism", "issuer", "found_in"):
        assert shown[name.replace("_", " ")] == expected[name]
    assert f"{document['certificate']['days_left']} days left" in shown["notAfter"]
    assert document["chain"]["path_ends"].startswith(shown["path ends"])
    for name in ("served", "verified"):
        assert shown[f"as {name}"].startswith(document["chain"][name][0]["subject"])


async def test_a_chain_that_failed_verification_is_shown_as_it_was_served(postgres: LocalPostgres) -> None:
    result = await check(postgres.dsn)  # ISRG Root X1 is trusted, and nothing else
    served = json.loads(check_to_json(result))["chain"]["served"]
    assert len(served) == 1
    assert served[0]["subject"] in picture(lambda console: print_check(result, console), width=200)


async def test_the_picture_shows_the_warnings_about_the_chain(postgres: LocalPostgres) -> None:
    result = await check(postgres.dsn, trust_anchor=postgres.trust_anchor)
    assert result.tls is not None
    warned = dataclasses.replace(result, tls=dataclasses.replace(result.tls, warnings=("The path ends.",)))
    assert facts(picture(lambda console: print_check(warned, console)))["WARNING"] == "The path ends."


async def test_each_bar_begins_where_the_previous_bar_ends() -> None:
    steps = (
        Step("parse", 0.0, 0.1, "ok", ""),
        Step("dns", 0.1, 0.2, "ok", ""),
        Step("tcp", 0.3, 0.7, "ok", ""),
        *(Step(name, None, None, "skipped", "not reached") for name in STEPS[3:]),
    )
    shown = picture(lambda console: print_check(CheckResult(steps), console), encoding="ascii")
    assert re.findall(r"(\d+\.\d) ms +(=+)", shown) == [("100.0", "=="), ("200.0", "====="), ("700.0", "=" * 15)]
    spans = [match.span() for line in shown.splitlines() for match in re.finditer("=+", line)]
    assert [start for start, _ in spans[1:]] == [end for _, end in spans[:-1]]


async def test_the_picture_of_a_problem_shows_the_message_and_what_was_not_reached(
    postgres: LocalPostgres,
) -> None:
    result = await check(postgres.dsn)
    shown = picture(lambda console: print_check(result, console))
    assert result.problem is not None
    assert " ".join(result.problem.message.split()) in " ".join(shown.split())
    assert shown.count("not reached") == 2
    assert "CertificateError at the step tls" in shown
    assert shown.splitlines()[-1].startswith("Refused:")


@pytest.mark.parametrize("weakness", ["sslmode=require", "sslmode=require&sslmode=allow", "ssl=true"])
async def test_what_create_pool_refuses_stands_in_front_with_the_dsn_to_use_unbroken(
    postgres: LocalPostgres, weakness: str
) -> None:
    path = "x" * 120
    dsn = postgres.dsn.replace("/neondb", f"/{path}")
    result = await check(f"{dsn}&{weakness}", trust_anchor=postgres.trust_anchor)
    shown = picture(lambda console: print_check(result, console))
    assert shown.startswith("create_pool() refuses")
    assert re.search(
        rf"^ +postgresql://\S+:\*\*\*@\S+/{path}\?hostaddr=127.0.0.1&sslmode=verify-full$", shown, re.MULTILINE
    )
    assert shown.index("sslmode=verify-full") < shown.index("parse")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("\x1b[2J\x1b]0;owned\x07", id="terminal escapes"),
        pytest.param("a\rb\x08c\x9b31m", id="control characters"),
        pytest.param("admin\u202egnp", id="right-to-left override"),
        pytest.param("[bold red]good[/bold red][link=x]", id="markup"),
    ],
)
async def test_the_text_of_a_server_cannot_control_the_terminal(text: str) -> None:
    answer = error_response(f"no: {text}", code="28000")
    async with certified(lambda context: login(context, answer)) as impostor:
        result = await check(impostor.dsn, trust_anchor=impostor.trust_anchor)
    assert result.problem is not None
    assert result.problem.step == "authentication"
    shown = picture(lambda console: print_check(result, console))
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert "[bold red]good" in shown or "bold" not in text


@pytest.mark.parametrize(
    ("certificates", "found", "words"),
    [
        pytest.param(140, True, "found among 140 certificates", id="found"),
        pytest.param(3, False, "not found among 3 certificates", id="not found"),
        pytest.param(None, False, "no such place on this system", id="no such place"),
    ],
)
def test_the_picture_of_the_roots_shows_each_place_and_its_state(
    certificates: int | None, found: bool, words: str
) -> None:
    place = Place("Some system", "/some/path/" + "x" * 90, certificates, found)
    shown = picture(lambda console: print_roots([place], console))
    assert re.search(rf"Some system +{words}$", shown, re.MULTILINE)
    assert place.location in shown
    assert f"found in {int(found)} of 1 places" in shown
    assert neon_async.ISRG_ROOT_X1_SHA256 in shown


@pytest.mark.parametrize("trusted", [True, False], ids=["good", "refused"])
async def test_the_password_appears_in_no_output(postgres: LocalPostgres, trusted: bool) -> None:
    result = await check(postgres.dsn, trust_anchor=postgres.trust_anchor if trusted else None)
    password = password_of(postgres)
    shown = [repr(result), check_to_json(result), picture(lambda console: print_check(result, console))]
    assert [text for text in shown if password in text] == []
