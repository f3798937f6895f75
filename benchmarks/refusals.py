"""Measure how long a dishonest server can delay a login, and how long the event loop stands still meanwhile.

    python -m pip install -e '.[dev]'
    python benchmarks/refusals.py [--rounds 9] [--json FILE]

Each server has a valid certificate and then misbehaves: it asks for the password in another way, breaks the order of
the exchange, or asks for eight million iterations of PBKDF2. Each server is dialled once per round. Meanwhile a task
measures the longest time in which the event loop ran no other task. The server runs in a thread of the same process, so
that its share of the interpreter counts against us.

Limits, for the medians of the rounds: each server is refused within 100 ms, without a stall of more than 20 ms.
"""

from __future__ import annotations

import argparse
import sys
import time

import trustme
from harness import Figure, Limit, Report, Table, run
from loops import longest_stall

import neon_async
from neon_async.testing._impostor import (
    Conversation,
    Impostor,
    Script,
    authentication_request,
    login,
    message,
    server_context,
)

REFUSED, STALL = "refused in", "longest stall"
# The sentence of the verdict, and the most milliseconds.
LIMITS = {REFUSED: ("the slowest refusal takes {} ms", 100), STALL: ("the longest stall takes {} ms", 20)}

OFFER = authentication_request(10, b"SCRAM-SHA-256\0\0")
SALT = b"s=c2FsdHNhbHRzYWx0c2FsdA=="


def challenge(nonce: bytes = b"", *, iterations: bytes = b"4096", extra: bytes = b"") -> Script:
    """Return a step that offers SCRAM and sends a challenge. Its nonce extends the client's, or is `nonce`."""

    def step(conversation: Conversation) -> None:
        conversation.send(OFFER)
        extended = conversation.read_message()[1].rpartition(b"r=")[2] + b"extended"
        body = extra + b"r=" + (nonce or extended) + b"," + SALT + b",i=" + iterations
        conversation.send(authentication_request(11, body))

    return step


def wrong_signature(conversation: Conversation) -> None:
    """Read the client's proof, and answer with a wrong signature."""
    conversation.read_message()
    conversation.send(authentication_request(12, b"v=" + b"A" * 43 + b"=") + authentication_request(0))


CHEATS: dict[str, tuple[bytes | Script, ...]] = {
    "cleartext password": (authentication_request(3),),
    "MD5 password": (authentication_request(5, b"salt"),),
    "GSSAPI": (authentication_request(7),),
    "SSPI": (authentication_request(9),),
    "no authentication": (authentication_request(0),),
    "an unknown request": (authentication_request(99),),
    "SASLFinal first": (authentication_request(12, b"v=AAAA"),),
    "AuthenticationOk instead of the proof": (challenge(), authentication_request(0)),
    "another nonce": (challenge(b"not-the-clients"),),
    "an extension": (challenge(extra=b"m=x,"),),
    "one iteration": (challenge(iterations=b"1"),),
    "eight million iterations": (challenge(iterations=b"8000000"),),
    "a wrong signature": (challenge(), wrong_signature),
    "a message of 2 GiB": (message(b"R", length=2**31 - 1),),
}


async def measure(arguments: argparse.Namespace) -> Report:
    """Return, for each cheat, the seconds until the refusal and the longest stall."""
    table = Table(
        "refusing a verified server that misbehaves, median of the rounds",
        CHEATS,
        [Figure(REFUSED, "ms"), Figure(STALL, "ms")],
    )
    authority = trustme.CA()
    leaf = authority.issue_cert("ep-cool-darkness-123456.us-east-2.aws.neon.tech")
    for name, steps in CHEATS.items():
        script = login(server_context(leaf.private_key_and_cert_chain_pem.bytes()), *steps)
        async with Impostor(script, trust_anchor=authority.cert_pem.bytes()) as server:
            for _ in range(arguments.rounds):
                seconds, stall = await refuse(server)
                table.add(name, REFUSED, seconds)
                table.add(name, STALL, stall)
    return Report([table], [limit_of(table, figure) for figure in LIMITS])


async def refuse(server: Impostor) -> tuple[float, float]:
    """Dial once, and return the seconds until the refusal and the longest stall."""
    async with longest_stall() as stall:
        begin = time.perf_counter()
        try:
            connection = await neon_async.connect(server.dsn, trust_anchor=server.trust_anchor)
        except (neon_async.AuthenticationError, neon_async.ProtocolError):
            seconds = time.perf_counter() - begin
        else:
            connection.terminate()
            raise AssertionError("a server that misbehaves was accepted")
    return seconds, stall[0]


def limit_of(table: Table, figure: str) -> Limit:
    """Return the limit of one figure, for the cheat with its largest value."""
    worst = max(CHEATS, key=lambda name: table.value(name, figure))
    sentence, milliseconds = LIMITS[figure]
    return Limit(f"{sentence}: {worst}", table.value(worst, figure) * 1e3, at_most=milliseconds)


if __name__ == "__main__":
    sys.exit(run(measure, __doc__, rounds=9))
