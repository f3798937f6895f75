"""Public names appear as `neon_async.X`: in tracebacks, reprs, pickles and documentation."""

from __future__ import annotations

import copy
import datetime
import inspect
import pickle
import subprocess
import sys
import traceback
import typing
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import neon_async
from neon_async import testing
from neon_async._pool.health_log import HealthLog

PUBLIC = [(name, getattr(neon_async, name)) for name in neon_async.__all__]
# `Record` is asyncpg's class under a name of ours.
OWN = [(name, value) for name, value in PUBLIC if value is not asyncpg.Record]
CLASSES = [pytest.param(name, value, id=name) for name, value in OWN if isinstance(value, type)]
ERRORS = [case for case in CLASSES if issubclass(case.values[1], Exception)]  # type: ignore[arg-type]
FUNCTIONS = [pytest.param(name, value, id=name) for name, value in PUBLIC if inspect.isfunction(value)]
PACKAGE = str(Path(neon_async.__file__).parent)
PROTOCOLS = pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))

ENDPOINT = neon_async.Endpoint("ep-a-b-123456", False, "us-east-2", "aws", "ep-a-b-123456.us-east-2.aws.neon.tech")
CERTIFICATE = neon_async.ChainCertificate(
    "CN=leaf", "CN=root", datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC), "00"
)
REVOCATION = neon_async.RevocationReport("good", issuers=(neon_async.RevocationReport("unknown", reason="why"),))
REPORT = neon_async.TLSReport(
    version="TLSv1.3",
    cipher="TLS_AES_256_GCM_SHA384",
    alpn="postgresql",
    negotiation="direct",
    server_name="db.example.com",
    subject="CN=leaf",
    issuer="CN=root",
    not_after=datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC),
    sha256="00",
    anchor="CN=root, from trust_anchor",
    anchor_sha256="00",
    served=(CERTIFICATE,),
    revocation=REVOCATION,
)
STATS = neon_async.create_pool(
    "postgresql://alex:s3cret@ep-a-b-123456.us-east-2.aws.neon.tech/neondb?sslmode=verify-full"
).stats()
HEALTH = HealthLog().snapshot()
EVENTS = (neon_async.Notification("orders", "7", 42), neon_async.Gap(None))
SAMPLES = (ENDPOINT, CERTIFICATE, HEALTH, REVOCATION, REPORT, STATS, *EVENTS)
VALUES = [pytest.param(value, id=type(value).__name__) for value in SAMPLES]


def test_every_class_is_in_one_of_the_tables() -> None:
    covered = {case.values[1] for case in ERRORS} | {type(case.values[0]) for case in VALUES}
    assert {case.values[1] for case in CLASSES} == covered | {
        neon_async.AsyncpgPatch,
        neon_async.ConnectKeywords,
        neon_async.Connection,
        neon_async.Listener,
        neon_async.Pool,
        neon_async.PoolKeywords,
        neon_async.Transaction,
    }


@pytest.mark.parametrize(("name", "value"), [*CLASSES, *FUNCTIONS])
def test_a_public_name_is_of_the_package_and_not_of_a_private_module(name: str, value: Any) -> None:
    assert value.__module__ == "neon_async"
    assert value.__qualname__ == name
    assert getattr(sys.modules[value.__module__], value.__qualname__) is value


@pytest.mark.parametrize("name", [name for name in testing.__all__ if name != "EndpointState"])
def test_a_class_of_testing_is_of_that_package_and_its_annotations_can_be_evaluated(name: str) -> None:
    cls = getattr(testing, name)
    assert repr(cls) == f"<class 'neon_async.testing.{name}'>"
    assert pickle.loads(pickle.dumps(cls)) is cls
    typing.get_type_hints(cls)
    typing.get_type_hints(cls.__init__)


@pytest.mark.parametrize(("name", "cls"), CLASSES)
def test_the_repr_of_a_class_is_its_public_name(name: str, cls: type) -> None:
    assert repr(cls) == f"<class 'neon_async.{name}'>"


@pytest.mark.parametrize(("name", "cls"), ERRORS)
def test_a_traceback_shows_the_public_name_of_an_error(name: str, cls: type[Exception]) -> None:
    try:
        raise cls("what happened")
    except cls as error:
        lines = traceback.format_exception(error)
    assert lines[-1] == f"neon_async.{name}: what happened\n"
    assert __file__ in lines[1]


def test_an_unhandled_error_ends_the_process_with_its_public_name() -> None:
    code = "import neon_async; neon_async.connect('postgresql://alex:s3cret@db.example.com/neondb?sslmode=require')"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.stderr.splitlines()[-1].startswith("neon_async.InsecureConfigurationError: sslmode")


@PROTOCOLS
@pytest.mark.parametrize(("name", "value"), [*CLASSES, *FUNCTIONS])
def test_a_class_or_function_is_pickled_by_its_public_name(name: str, value: Any, protocol: int) -> None:
    pickled = pickle.dumps(value, protocol)
    assert pickle.loads(pickled) is value
    assert b"neon_async._" not in pickled


@PROTOCOLS
@pytest.mark.parametrize(("name", "cls"), ERRORS)
def test_an_error_is_pickled_by_its_public_name(name: str, cls: type[Exception], protocol: int) -> None:
    pickled = pickle.dumps(cls("what happened"), protocol)
    twin = pickle.loads(pickled)
    assert (type(twin), str(twin)) == (cls, "what happened")
    assert b"neon_async._" not in pickled


@PROTOCOLS
@pytest.mark.parametrize("value", VALUES)
def test_a_value_is_pickled_by_its_public_name(value: Any, protocol: int) -> None:
    pickled = pickle.dumps(value, protocol)
    assert pickle.loads(pickled) == value == copy.deepcopy(value)
    assert b"neon_async._" not in pickled


@pytest.mark.parametrize(("name", "cls"), CLASSES)
def test_the_type_hints_of_a_class_can_be_evaluated(name: str, cls: type) -> None:
    assert not [hint for hint in typing.get_type_hints(cls).values() if isinstance(hint, str)]


def test_the_type_hints_of_a_report_are_its_types() -> None:
    hints = typing.get_type_hints(neon_async.TLSReport)
    assert (hints["not_after"], hints["alpn"]) == (datetime.datetime, str | None)


@pytest.mark.parametrize(("name", "function"), FUNCTIONS)
def test_the_source_and_signature_of_a_function_can_be_inspected(name: str, function: Any) -> None:
    assert f"def {name}(" in inspect.getsource(function)
    assert inspect.signature(function).parameters
    assert inspect.getmodule(function) is neon_async


@pytest.mark.parametrize(("name", "cls"), CLASSES)
def test_the_methods_of_a_class_keep_their_source_and_module(name: str, cls: type) -> None:
    for method in vars(cls).values():
        # Python 3.14 and later write a function __annotate__ from the annotations.
        written = inspect.isfunction(method) and method.__name__ != "__annotate__"
        if written and method.__code__.co_filename.startswith(PACKAGE):
            assert f"def {method.__name__}" in inspect.getsource(method)


def test_no_helper_of_the_facade_is_public() -> None:
    names = {name for name, value in vars(neon_async).items() if not inspect.ismodule(value)}
    assert {name for name in names if not name.startswith("_")} - {"annotations"} == set(neon_async.__all__)
