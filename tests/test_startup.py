"""What an import of the package loads, and what it leaves for the first use."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

import neon_async

POOL = "neon_async.create_pool('postgresql://alex:s3cret@ep-a-b-123456.us-east-2.aws.neon.tech/neondb')"


def printed_by(code: str) -> list[str]:
    """Return the words that a new interpreter prints for `code`."""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return finished.stdout.split()


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    """The modules that are loaded once a pool has been created."""
    return set(printed_by(f"import sys, neon_async; {POOL}; print(*sys.modules)"))


@pytest.mark.parametrize(
    "module",
    [
        pytest.param("_driver.listen", id="listen()"),
        pytest.param("_driver.stale", id="the judgement of stale statements"),
        pytest.param("_patch", id="patch_asyncpg()"),
        pytest.param("_pool.events", id="events, without on_event"),
        pytest.param("_pool.health", id="the answer of health()"),
        pytest.param("_pool.stats", id="the answer of stats()"),
        pytest.param("_wire.culprits", id="the explanation of a refused certificate"),
        pytest.param("_wire.report", id="the answer of tls_report()"),
        pytest.param("_wire.revocation", id="revocation"),
    ],
)
def test_a_pool_is_created_without_what_it_does_not_need(loaded: set[str], module: str) -> None:
    assert "neon_async._pool.pool" in loaded
    assert f"neon_async.{module}" not in loaded


def test_a_pool_with_on_event_loads_the_events() -> None:
    pool = POOL.replace("')", "', on_event=print)")
    assert printed_by(f"import sys, neon_async; {pool}; print('neon_async._pool.events' in sys.modules)") == ["True"]


def test_every_public_name_is_listed_before_its_module_is_loaded() -> None:
    code = "import neon_async; print(*sorted(set(neon_async.__all__) - set(dir(neon_async))), 'end')"
    assert printed_by(code) == ["end"]


def test_a_star_import_binds_every_public_name() -> None:
    code = "from neon_async import *; import neon_async; print(*set(neon_async.__all__) - set(globals()), 'end')"
    assert printed_by(code) == ["end"]


@pytest.mark.parametrize("name", sorted(neon_async._MODULE_OF))  # type: ignore[attr-defined, unused-ignore]
def test_a_name_that_is_loaded_first_is_public_in_every_respect(name: str) -> None:
    code = (
        f"import neon_async, pickle, typing; value = neon_async.{name}; print(value.__module__); "
        "print(pickle.loads(pickle.dumps(value)) is value); typing.get_type_hints(value) if type(value) is type else 0"
    )
    assert printed_by(code) == ["neon_async", "True"]


@pytest.mark.parametrize("call", ["stats", "health"])
def test_an_answer_that_was_made_before_its_class_was_named_is_pickled_by_its_public_name(call: str) -> None:
    pickled = printed_by(f"import neon_async, pickle; print(pickle.dumps({POOL}.{call}()).hex())")
    data = bytes.fromhex(pickled[0])
    assert b"neon_async._" not in data
    assert type(pickle.loads(data)) is getattr(neon_async, f"Pool{call.capitalize()}")


def test_a_name_that_does_not_exist_is_refused_as_by_any_module() -> None:
    with pytest.raises(AttributeError, match=r"^module 'neon_async' has no attribute 'lisen'$"):
        neon_async.lisen  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(neon_async, "_driver_that_does_not_exist")
