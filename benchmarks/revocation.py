"""Measure what a check of revocation costs: a connect under each mode, and a long revocation list.

    python -m pip install -e '.[dev]'
    python benchmarks/revocation.py [--connections 10] [--entries 100000] [--rounds 25] [--json FILE]

The lists are those of a CA that is made here. A connect is timed under `off`, `advise` and `require` in turn, on one
real PostgreSQL, when the lists are known. The long list comes from another process over HTTP, and is fetched anew in
each round: from the request until the verdict about a certificate is known. The longest stall of the event loop
meanwhile is in process time, which counts what this process does and not what others do; an event loop that waits as
long for nothing is shown beside it. Memory is what Python allocates, at its peak and afterwards. Limits: a connect
under `advise` and under `require` takes at most 1.03 times as long as under `off` (median of the rounds' ratios), and
the long list stalls the event loop for at most 5 ms (median) and takes at most 30 MB at its peak and 2 MB afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

from harness import Figure, Limit, Option, Report, Table, run, take_turns
from loops import longest_stall

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the CA of the tests, and their servers

from support.certificates import issue
from support.crls import RevocablePKI, long_crl, revocable_pki, scope
from support.signatures import PresentingServer, presenting_server

import neon_async
from neon_async._wire.revocation import disk, shard
from neon_async._wire.revocation.lists import Source
from neon_async._wire.revocation.shard import Shard, shard_of

MODES: tuple[neon_async.RevocationMode, ...] = ("off", "advise", "require")
OFF, ADVISE, REQUIRE = MODES
CONNECT = "connect"
LIST, NOTHING = "the list", "nothing"
TIME, STALL, PEAK, KEPT = "time", "longest stall", "memory at its peak", "memory afterwards"


async def measure(arguments: argparse.Namespace) -> Report:
    """Return the seconds of a connect under each mode; and the seconds, the stalls and the bytes of a long list."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        connects = await measure_connects(arguments.connections, arguments.rounds)
        long = await measure_long_list(arguments.entries, max(arguments.rounds // 5, 1))
    ratios = {mode: connects.paired_ratio(CONNECT, mode, OFF) for mode in (ADVISE, REQUIRE)}
    return Report(
        [connects, long],
        [
            *(
                Limit(f"a connect under {mode} takes {{}} times as long as under off", ratio, at_most=1.03)
                for mode, ratio in ratios.items()
            ),
            Limit("the long list stalls the event loop for {} ms", long.value(LIST, STALL) * 1e3, at_most=5),
            Limit("the long list takes {} MB at its peak", long.value(LIST, PEAK) / 1e6, at_most=30),
            Limit("the long list takes {} MB afterwards", long.value(LIST, KEPT) / 1e6, at_most=2),
        ],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Connects


async def measure_connects(connections: int, rounds: int) -> Table:
    """Return the mean seconds of a connect under each mode, in each round."""
    table = Table("time of a connect", MODES, [Figure(CONNECT, "ms", show=("median", "min", "max"), base=OFF)])
    with (
        tempfile.TemporaryDirectory() as folder,
        revocable_pki() as pki,
        presenting_server(Path(folder), None) as server,
    ):
        server.present_chain(pki.leaf(), pki.issuer)
        spent = dict.fromkeys(MODES, 0.0)
        turns = take_turns({mode: mode for mode in MODES}, rounds * connections, warm_up=True)
        for number, (counts, _, mode) in enumerate(turns):
            seconds = await connect(server, pki, mode)
            if counts:
                spent[mode] += seconds
            if number % (len(MODES) * connections) == len(MODES) - 1 and any(spent.values()):
                for each in MODES:
                    table.add(each, CONNECT, spent[each] / connections)
                spent = dict.fromkeys(MODES, 0.0)
    return table


async def connect(server: PresentingServer, pki: RevocablePKI, mode: neon_async.RevocationMode) -> float:
    """Return the seconds of one connect."""
    connector = neon_async.connect(server.dsn, trust_anchor=pki.root.pem, revocation=mode)
    began = time.perf_counter()
    connection = await connector
    seconds = time.perf_counter() - began
    await connection.close()
    return seconds


# ---------------------------------------------------------------------------------------------------------------------
# A long list


async def measure_long_list(entries: int, rounds: int) -> Table:
    """Return the seconds from the request to the verdict, the longest stall meanwhile, and the bytes."""
    numbers = random.Random(1)  # noqa: S311
    serials = [numbers.getrandbits(140) | 1 << 140 for _ in range(entries)]
    ca = issue(subject="CA", ca=True)
    table = Table(
        f"a revocation list of {entries:,} entries",
        (LIST, NOTHING),
        [
            Figure(TIME, "ms", show=("median", "min", "max")),
            Figure(STALL, "ms", show=("median", "min", "max")),
            Figure(PEAK, "B", show=("max",)),
            Figure(KEPT, "B", show=("max",)),
        ],
    )
    with tempfile.TemporaryDirectory() as folder, http_server(folder) as address:
        url = f"{address}/long.crl"
        Path(folder, "long.crl").write_bytes(long_crl(ca, serials, also=[(scope(url, users=True), True)]))
        source = Source(url, ca.der, for_cas=False, must_name_url=True)
        for _ in range(rounds):
            async with longest_stall(time.process_time) as stall:
                _, seconds = await fetch_anew(source, serials[0])
            table.add(LIST, TIME, seconds)
            table.add(LIST, STALL, stall[0])
            async with longest_stall(time.process_time) as stall:
                await asyncio.sleep(seconds)
            table.add(NOTHING, TIME, seconds)
            table.add(NOTHING, STALL, stall[0])
            tracemalloc.start()
            one, _ = await fetch_anew(source, serials[0])
            kept, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            del one
            for row, sizes in ((LIST, (peak, kept)), (NOTHING, (0, 0))):
                table.add(row, PEAK, sizes[0])
                table.add(row, KEPT, sizes[1])
    return table


async def fetch_anew(source: Source, revoked: int) -> tuple[Shard, float]:
    """Return the list, and the seconds until a process that knows no list knows a verdict about a certificate."""
    shard.forget_all()
    with contextlib.suppress(FileNotFoundError):
        disk._path(source).unlink()
    one, done = shard_of(source), asyncio.Event()
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    one.listeners.add(lambda: loop.call_soon_threadsafe(done.set))
    one.refresh()
    await done.wait()
    assert is_revoked(one, revoked), one.state.failure
    return one, time.perf_counter() - began


def is_revoked(one: Shard, serial: int) -> bool:
    return one.current is not None and serial in one.current


@contextlib.contextmanager
def http_server(folder: str) -> Iterator[str]:
    """Serve the files of a folder from another process, and yield its address."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"port (\d+)", process.stdout.readline())
        assert found is not None
        try:
            yield f"http://127.0.0.1:{found[1]}"
        finally:
            process.terminate()


if __name__ == "__main__":
    options = [
        Option("--connections", "connects per mode and round", 10),
        Option("--entries", "entries of the long list", 100_000),
    ]
    sys.exit(run(measure, __doc__, rounds=25, options=options))
