"""Private names of asyncpg stand in `_driver/holder.py` only, each pinned by a test, and the search finds every use."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from types import ModuleType

import pytest
from support.private_names import (
    asyncpg_private_names,
    computed_names_in,
    pinned_in,
    private_names_in,
    undocumented_imports_in,
)

import neon_async

_PACKAGE = Path(neon_async.__file__).parent
_HERE = Path(__file__).parent


def _name_of(path: Path) -> str:
    parts = path.relative_to(_PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {_name_of(path): path.read_text() for path in _PACKAGE.rglob("*.py")}
HOLDER = "_driver.holder"

_PINS = ("test_holder.py", "test_holder_statements.py", "test_lending.py", "test_losses.py", "test_timeouts.py")

# Attributes whose names are computed: what a search in the source cannot see.
COMPUTED = {
    HOLDER: {
        "Proxy.__getattr__",  # all of a connection's, for the caller
        "in_front_of_protocol",  # all of asyncpg's protocol, for asyncpg
        "keep_frequent_methods",
        "mark_coroutine_functions",
    },
    "_patch": {"AsyncpgPatch.__init__", "AsyncpgPatch.undo"},  # asyncpg's public functions, wherever it has them
    "_driver.healing": {"HealedStatements._renew_codecs"},  # set_type_codec or set_builtin_type_codec
    "_driver.loop": {"LoopAdapter.__getattr__"},  # the running loop's
    "_driver.transaction": {"_Observed.__getattr__", "_Observed.__setattr__"},  # all of a connection's, for asyncpg
    "_pool.options": {"PoolOptions.__init__"},
    "_pool.pool": {"Pool._call"},  # the public methods of a connection that a pool has, too
    "sqlalchemy": {"_dbapi_class"},  # names of PEP 249
}

# What asyncpg does not document, without an underscore.
IMPORTS = {
    HOLDER: {
        "asyncpg.connresource",
        "asyncpg.pool.PoolConnectionHolder",
        "asyncpg.pool.PoolConnectionProxy",
        "asyncpg.protocol",
    },
    "_driver.connection": {"asyncpg.pool.PoolConnectionProxy"},  # for type checkers
    "_driver.resources": {"asyncpg.cursor", "asyncpg.prepared_stmt"},
    "_driver.transaction": {
        "asyncpg.transaction.Transaction",
    },
    "_pool.options": {"asyncpg.pool.PoolConnectionProxy"},  # for type checkers
    "_patch": {"asyncpg.connection", "asyncpg.pool"},  # other places of the public functions
    "_pool.pool": {
        "asyncpg.pool.PoolAcquireContext",
        "asyncpg.pool.PoolConnectionProxy",
    },  # the latter for type checkers
}


def module(name: str) -> ModuleType:
    return importlib.import_module(f"neon_async.{name}" if name else "neon_async")


def meets_asyncpg(source: str) -> bool:
    return "import asyncpg" in source or "from asyncpg" in source


# ---------------------------------------------------------------------------------------------------------------------
# The package


@pytest.mark.parametrize("name", sorted(SOURCES.keys() - {HOLDER}))
def test_no_module_but_holder_uses_a_private_name_of_asyncpg(name: str) -> None:
    assert private_names_in(SOURCES[name], vars(module(name))) == set()


def test_every_private_name_that_holder_uses_is_pinned_by_a_test() -> None:
    pinned = set().union(*(pinned_in((_HERE / name).read_text()) for name in _PINS))
    assert private_names_in(SOURCES[HOLDER], vars(module(HOLDER))) == pinned


def test_names_are_computed_only_where_they_must_be() -> None:
    found = {name: computed_names_in(source) for name, source in SOURCES.items() if meets_asyncpg(source)}
    found["_driver.loop"] = computed_names_in(SOURCES["_driver.loop"])
    assert {name: names for name, names in found.items() if names} == COMPUTED


def test_what_asyncpg_does_not_document_is_imported_only_where_it_is_needed() -> None:
    found = {name: undocumented_imports_in(source) for name, source in SOURCES.items()}
    assert {name: names for name, names in found.items() if names} == IMPORTS


def test_the_names_of_asyncpg_are_known_in_the_first_place() -> None:
    """Slots, methods, mangled names, functions, and attributes of compiled classes."""
    assert asyncpg_private_names() >= {
        *("_con", "_top_xact", "_pool_release_ctr", "_cleanup", "_Transaction__commit", "__commit"),
        *("_connect_addr", "_mogrify", "_is_cancelling", "_wait_for_cancellation", "_ConnectionProxy"),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Planted violations

FOUND = {
    "on an object": ("def f(connection):\n return connection._protocol", "_protocol"),
    "assigned": ("def f(connection):\n connection._top_xact = None", "_top_xact"),
    "deleted": ("def f(connection):\n del connection._listeners", "_listeners"),
    "on a call": ("def f(pool):\n return pool.acquire()._holder", "_holder"),
    "on a module": ("from asyncpg import connect_utils as c\nc._connect_addr()", "_connect_addr"),
    "on self in a function": ("async def begin(self):\n return self._pool_release_ctr", "_pool_release_ctr"),
    "on cls in a function": ("def f(cls):\n return cls._wrap_connection_method", "_wrap_connection_method"),
    "on self in a lambda": ("f = lambda self: self._con", "_con"),
    "on self in a function inside a function": ("def f():\n def g(self):\n  return self._con", "_con"),
    "on self in a function that is handed to a class": (
        "def get_statement(self, query): return self._get_statement(query)\ntype('C', (), {'f': get_statement})",
        "_get_statement",
    ),
    "on self in a method of a subclass": (
        "import asyncpg\nclass Pool(asyncpg.Pool):\n def f(self): return self._queue",
        "_queue",
    ),
    "on cls in a class method of a subclass": (
        "import asyncpg\nclass Pool(asyncpg.Pool):\n @classmethod\n def f(cls): return cls._queue",
        "_queue",
    ),
    "on self in a function inside a method of a subclass": (
        "import asyncpg\nclass C(asyncpg.Connection):\n def f(self):\n  def g(): return self._params\n  return g",
        "_params",
    ),
    "on another self inside a method of a class of ours": (
        "class C:\n def f(self):\n  def g(self): return self._params\n  return g",
        "_params",
    ),
    "on self in a lambda inside a method of a subclass": (
        "import asyncpg\nclass C(asyncpg.Connection):\n def f(self): return lambda: self._params",
        "_params",
    ),
    "on the first parameter by another name": ("class C:\n def f(this): return this._params", "_params"),
    "on self by another name": ("class C:\n def f(self):\n  me = self\n  return me._params", "_params"),
    "on super": (
        "import asyncpg\nclass C(asyncpg.Connection):\n def f(self): return super()._cleanup()",
        "_cleanup",
    ),
    "on the type of self": (
        "import asyncpg\nclass C(asyncpg.Connection):\n def f(self): return type(self)._cleanup",
        "_cleanup",
    ),
    "in a static method": ("class C:\n @staticmethod\n def f(connection): return connection._params", "_params"),
    "in a class inside a function": ("def f(base):\n class C(base):\n  def g(self): return self._params", "_params"),
    "in a class inside a class": (
        "import asyncpg\nclass A:\n class B(asyncpg.Connection):\n  def g(self): return self._params",
        "_params",
    ),
    "in a subclass of a subclass": (
        "import asyncpg\nclass A(asyncpg.Connection): pass\nclass B(A):\n def g(self): return self._params",
        "_params",
    ),
    "overridden by a method": (
        "import asyncpg\nclass Pool(asyncpg.Pool):\n def _drop_type_cache(self): pass",
        "_drop_type_cache",
    ),
    "overridden by an async method": (
        "import asyncpg\nclass Pool(asyncpg.Pool):\n async def _acquire(self): pass",
        "_acquire",
    ),
    "overridden by an assignment": (
        "import asyncpg\nclass Pool(asyncpg.Pool):\n _drop_type_cache = None",
        "_drop_type_cache",
    ),
    "overridden for type checkers": (
        "import asyncpg\nclass Pool(asyncpg.Pool):\n if True:\n  def _drop_type_cache(self): pass",
        "_drop_type_cache",
    ),
    "overridden in a class inside a function": (
        "def f(base):\n class C(base):\n  async def _acquire(self): pass",
        "_acquire",
    ),
    "annotated": ("import asyncpg\nclass C(asyncpg.Connection):\n _params: object", "_params"),
    "a slot": ("import asyncpg\nclass C(asyncpg.Connection):\n __slots__ = ('_params',)", "_params"),
    "getattr": ("def f(connection): return getattr(connection, '_top_xact')", "_top_xact"),
    "getattr with a default": ("def f(connection): return getattr(connection, '_con', None)", "_con"),
    "getattr on self": ("class C:\n def f(self): return getattr(self, '_con', None)", "_con"),
    "hasattr": ("def f(connection): return hasattr(connection, '_pool_release_ctr')", "_pool_release_ctr"),
    "setattr": ("def f(connection): setattr(connection, '_top_xact', None)", "_top_xact"),
    "delattr": ("def f(connection): delattr(connection, '_top_xact')", "_top_xact"),
    "object.__setattr__": ("def f(c): object.__setattr__(c, '_top_xact', None)", "_top_xact"),
    "attrgetter": ("import operator\nf = operator.attrgetter('a._protocol.b')", "_protocol"),
    "methodcaller": ("import operator\nf = operator.methodcaller('_cleanup')", "_cleanup"),
    "in the names of an object": ("def f(pool): return vars(pool)['_queue']", "_queue"),
    "a string in a table": ("NAMES = ('a', '_queue')", "_queue"),
    "a keyword": ("def f(g): g(_top_xact=None)", "_top_xact"),
    "a keyword of a dictionary": ("f = dict(_con=None)", "_con"),
    "a pattern": ("def f(c):\n match c:\n  case object(_con=None): pass", "_con"),
    "in a comprehension": ("def f(pool): return [h._con for h in pool]", "_con"),
    "in a default": ("import asyncpg\ndef f(x=asyncpg.Connection._cleanup): pass", "_cleanup"),
    "in a decorator": ("import asyncpg\n@asyncpg.Pool._acquire\ndef f(): pass", "_acquire"),
    "in an annotation": ("import asyncpg.pool as p\ndef f(x: p.Pool._queue): pass", "_queue"),
    "a base class": ("from asyncpg import connection as c\nclass C(c._ConnectionProxy): pass", "_ConnectionProxy"),
    "imported": ("from asyncpg.connection import _ConnectionProxy", "_ConnectionProxy"),
    "imported under another name": ("from asyncpg.utils import _mogrify as mogrify", "_mogrify"),
    "imported as a module": ("import asyncpg._asyncio_compat", "_asyncio_compat"),
    "imported from a module": ("from asyncpg._asyncio_compat import wait_for", "_asyncio_compat"),
    "a mangled name": ("def f(transaction): return transaction._Transaction__commit()", "_Transaction__commit"),
    "in an async block": ("async def f(c):\n async with c._stmt_exclusive_section: pass", "_stmt_exclusive_section"),
    "in a loop": ("def f(c):\n for c._top_xact in (): pass", "_top_xact"),
    "in an f-string": ("def f(c): return f'{c._params}'", "_params"),
}

PASSED = {
    "on self in a class of ours": "class C:\n def f(self): return self._queue",
    "overridden in a class of ours": "class C:\n def _acquire(self): pass",
    "a slot of a class of ours": "class C:\n __slots__ = ('_queue',)",
    "on self inside a method of a class of ours": "class C:\n def f(self):\n  return lambda: self._queue",
    "a name of our own in a subclass": (
        "import asyncpg\nclass C(asyncpg.Connection):\n def _ours(self): return self._ours"
    ),
    "a function of our own": "def _acquire(): return _acquire",
    "a variable of our own": "_queue = 1",
    "a public name": "def f(connection): return connection.execute",
    "a name of Python's": "def f(connection): return connection.__class__.__name__",
    "a name that asyncpg does not have": "def f(connection): return connection._no_such_name",
    "in a docstring": "def f():\n 'Not connection._con, but another.'",
}


def read(source: str) -> set[str]:
    namespace: dict[str, object] = {}
    with contextlib.suppress(Exception):  # some cannot run; their classes count as unknown
        exec(compile(source, "planted", "exec"), namespace)
    return private_names_in(source, namespace)


@pytest.mark.parametrize(("source", "name"), [pytest.param(*case, id=way) for way, case in FOUND.items()])
def test_a_planted_use_is_found(source: str, name: str) -> None:
    assert read(source) == {name}


@pytest.mark.parametrize("source", [pytest.param(source, id=way) for way, source in PASSED.items()])
def test_a_name_of_our_own_is_not_reported(source: str) -> None:
    assert read(source) == set()


@pytest.mark.parametrize(
    "source",
    [
        "def f(o, name): return getattr(o, name)",
        "def f(o, name): return getattr(o, '_' + name)",
        "def f(o, name): return getattr(o, f'_{name}', None)",
        "def f(o, name): return hasattr(o, name)",
        "def f(o, name): setattr(o, name, '_con')",
        "def f(o, name): delattr(o, name)",
        "def f(o, name): object.__setattr__(o, name, None)",
        "def f(o, name): return o.__getattribute__(name)",
        "def f(o, name): return operator.attrgetter('a', name)(o)",
        "def f(o, name): return attrgetter(name)(o)",
    ],
)
def test_a_computed_name_is_found(source: str) -> None:
    assert computed_names_in(source) == {"f"}


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("from asyncpg.pool import PoolConnectionHolder", "asyncpg.pool.PoolConnectionHolder"),
        ("from asyncpg import cursor", "asyncpg.cursor"),
        ("import asyncpg.cursor", "asyncpg.cursor"),
        ("import asyncpg.cursor as c", "asyncpg.cursor"),
        ("import asyncpg\nasyncpg.pool.PoolConnectionHolder", "asyncpg.pool"),
        ("def f():\n from asyncpg.protocol import protocol", "asyncpg.protocol.protocol"),
    ],
)
def test_an_undocumented_import_is_found(source: str, path: str) -> None:
    assert undocumented_imports_in(source) == {path}


@pytest.mark.parametrize(
    "source",
    [
        "import asyncpg\nasyncpg.Connection",
        "from asyncpg import Pool",
        "import asyncpg\nasyncpg.exceptions.ProtocolError",
        "from asyncpg.exceptions import ProtocolError",
    ],
)
def test_a_documented_name_is_not_reported(source: str) -> None:
    assert undocumented_imports_in(source) == set()
