"""The connectors of single connections: parameters are judged, and files loaded, once per distinct set of parameters.

A pool has a connector of its own. `connect()` is called again and again with the same parameters, and finds here what
it has made of them, together with what earlier logins to the server have established. Knows nothing of connections.
"""

from __future__ import annotations

import functools
import os
import types
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from .._config.connection import ConnectionParameters
from .._config.keyword_readers import PEM, FilePath
from .._config.keywords import KEYWORDS
from .._config.roots import KnownRoots
from .connector import Connector, judge, load

# How many sets of parameters are remembered. They contain passwords, so they are few.
_LIMIT = 32

_VARIABLES = tuple(keyword.variable for keyword in KEYWORDS if keyword.variable)
_FILES = tuple(keyword.name for keyword in KEYWORDS if isinstance(keyword.reader, FilePath | PEM))

# Values that are the same for ever. A set of parameters that contains any other is judged at every call.
_CONSTANT = frozenset({str, bytes, int, float, bool, types.NoneType, KnownRoots})
# Functions that return the password; the same one is called for every connection.
_FUNCTIONS = frozenset({types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial})


class _Known(NamedTuple):
    """What is remembered of one set of parameters: the connector, and the state of the files that it was made of."""

    connector: Connector
    files: tuple[object, ...]


_known: OrderedDict[Hashable, _Known] = OrderedDict()


def connector_for(dsn: str | None, **parameters: Any) -> Connector:
    """Return the connector for one connection: that of an earlier call, if nothing has changed since.

    What can change is a parameter, a `PG*` variable, and a file that a parameter names.

    Args:
        dsn: The connection string.
        **parameters: The keywords of `prepare()`.

    Raises:
        ConfigurationError: A parameter is refused, or a file cannot be used.
    """
    identity = _identity_of({"dsn": dsn, **parameters})
    known = _known.get(identity)
    if known is not None and known.files == _state_of_files(known.connector.parameters):
        return known.connector
    judged = judge(dsn, **parameters)
    files = _state_of_files(judged)  # before they are read: if they change meanwhile, the next call reads them again
    connector = load(judged)
    if identity is not None:
        _remember(identity, _Known(connector, files))
    return connector


def _remember(identity: Hashable, known: _Known) -> None:
    _known[identity] = known
    while len(_known) > _LIMIT:
        _known.popitem(last=False)  # the oldest one


def _identity_of(parameters: Mapping[str, object]) -> Hashable | None:
    """Return what is equal for equal parameters and an equal environment only, or None where nothing can be."""
    try:
        return (*_constants(parameters), *map(os.environ.get, _VARIABLES))
    except _ChangeableError:
        return None


class _ChangeableError(Exception):
    """A value may change although it remains the same object."""


def _constants(values: Mapping[str, object]) -> Iterator[Hashable]:
    for name, value in values.items():
        kind = type(value)
        # With the type, because True == 1 == 1.0, and what is accepted of one is refused of another.
        if kind in _CONSTANT or kind in _FUNCTIONS or isinstance(value, PurePath):
            yield name, kind, value
        elif isinstance(value, dict) and kind is dict and all(type(one) is str for one in (*value, *value.values())):
            yield name, kind, tuple(value.items())
        else:
            raise _ChangeableError


def _state_of_files(parameters: ConnectionParameters) -> tuple[object, ...]:
    values = (getattr(parameters, name) for name in _FILES)
    return tuple(_state_of(value) for value in values if value is not None)


def _state_of(path: Any) -> object:
    """Return what changes with the contents of a file, or None where `path` is not that of a file."""
    try:
        status = Path(path).stat()
    except (OSError, ValueError, TypeError):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
