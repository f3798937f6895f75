"""How long a dishonest server can hold us up during login, and how long the event loop stands still for it.

    python -m pip install -e '.[dev]'
    python benchmarks/refusals.py [--rounds 9] [--json FILE]

Each server has a certificate that is verified, and then cheats: it asks for the password in another way, breaks the
order of the exchange, or asks for eight million iterations of PBKDF2. Each is dialled once a round, with a task beside
it that only yields to the loop and notes the longest time between two of its turns. The server runs in a thread of the
same process, so what it takes of the interpreter counts against us.

The numbers are medians over the rounds. Exit status: 0 when each server is refused within 100 ms with no stall of 20 ms
or more, else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path

import trustme
from loop_stall import longest_stall

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

MOST_TIME, MOST_STALL = 0.100, 0.020

OFFER = authentication_request(10, b"SCRAM-SHA-256\0\0")
SALT = b"s=c2FsdHNhbHRzYWx0c2FsdA=="


def challenge(nonce: bytes = b"", *, iterations: bytes = b"4096", extra: bytes = b"") -> Script:
    """Return a step that offers SCRAM and sends a challenge. Its nonce extends the client's, or is `nonce`."""

    def step(conversation: Conversation) -> None:
        conversation.send(OFFER)
        ours = conversation.read_message()[1].rpartition(b"r=")[2] + b"extended"
        body = extra + b"r=" + (nonce or ours) + b"," + SALT + b",i=" + iterations
        conversation.send(authentication_request(11, body))

    return step


def verdict(conversation: Conversation) -> None:
    """Take the client's proof, and answer with a signature that is none."""
    conversation.read_message()
    conversation.send(authentication_request(12, b"v=" + b"A" * 43 + b"=") + authentication_request(0))


CHEATS: tuple[tuple[str, tuple[bytes | Script, ...]], ...] = (
    ("cleartext password", (authentication_request(3),)),
    ("MD5 password", (authentication_request(5, b"salt"),)),
    ("GSSAPI", (authentication_request(7),)),
    ("SSPI", (authentication_request(9),)),
    ("no authentication", (authentication_request(0),)),
    ("an unknown request", (authentication_request(99),)),
    ("SASLFinal first", (authentication_request(12, b"v=AAAA"),)),
    ("AuthenticationOk in place of the proof", (challenge(), authentication_request(0))),
    ("another nonce", (challenge(b"somebody-else"),)),
    ("an extension", (challenge(extra=b"m=x,"),)),
    ("one iteration", (challenge(iterations=b"1"),)),
    ("eight million iterations", (challenge(iterations=b"8000000"),)),
    ("a wrong signature", (challenge(), verdict)),
    ("a message of 2 GiB", (message(b"R", length=2**31 - 1),)),
)


async def measure(rounds: int) -> dict[str, tuple[float, float]]:
    """Return, for each cheat, the median seconds until it was refused and the median longest stall."""
    authority = trustme.CA()
    leaf = authority.issue_cert("ep-cool-darkness-123456.us-east-2.aws.neon.tech")
    medians = {}
    for name, steps in CHEATS:
        script = login(server_context(leaf.private_key_and_cert_chain_pem.bytes()), *steps)
        async with Impostor(script, trust_anchor=authority.cert_pem.bytes()) as server:
            taken = [await refuse(server) for _ in range(rounds)]
        medians[name] = (statistics.median(t for t, _ in taken), statistics.median(s for _, s in taken))
    return medians


async def refuse(server: Impostor) -> tuple[float, float]:
    """Dial once; return the seconds until the refusal, and the longest stall. Raises when the server is let in."""
    async with longest_stall() as stall:
        begin = time.perf_counter()
        try:
            connection = await neon_async.connect(server.dsn, trust_anchor=server.trust_anchor)
        except (neon_async.AuthenticationError, neon_async.ProtocolError):
            seconds = time.perf_counter() - begin
        else:
            connection.terminate()
            raise AssertionError("a server that cheats was let in")
    return seconds, stall[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    medians = asyncio.run(measure(arguments.rounds))
    print(f"refusing a verified server that cheats, median of {arguments.rounds} rounds")
    print(f"{'':40s} refused in   longest stall")
    for name, (seconds, stall) in medians.items():
        print(f"{name:40s} {seconds * 1e3:7.1f} ms {stall * 1e3:12.1f} ms")
    if arguments.json:
        document = {name: {"seconds": seconds, "stall": stall} for name, (seconds, stall) in medians.items()}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    slow = [name for name, (seconds, stall) in medians.items() if seconds >= MOST_TIME or stall >= MOST_STALL]
    limit = f"{MOST_TIME * 1e3:.0f} ms and {MOST_STALL * 1e3:.0f} ms"
    print(f"TOO SLOW: {', '.join(slow)}; the limits are {limit}" if slow else f"good: the limits are {limit}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
