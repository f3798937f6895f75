"""Find the private names of asyncpg that a source file uses, whatever way it uses them.

Reads source text and looks up the classes that it defines. Knows nothing of neon_async.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeAlias, TypeVar

import asyncpg

# Functions that take the name of an attribute as text.
_BY_NAME = {"getattr", "setattr", "delattr", "hasattr", "__getattribute__", "__setattr__", "attrgetter", "methodcaller"}

_F = TypeVar("_F", bound=Callable[..., Any])

_FunctionNode: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def is_private(name: str) -> bool:
    """Return whether a name begins with an underscore and is not one of Python's own."""
    return name.startswith("_") and not name.endswith("__") and name.strip("_") != ""


@functools.cache
def asyncpg_private_names() -> frozenset[str]:
    """Return every private name that asyncpg's modules, the compiled ones included, give to anything."""
    names: set[str] = set()
    for module in _asyncpg_modules():
        names.update(name for name, value in vars(module).items() if not isinstance(value, TypeVar | ParamSpec))
        for kind in vars(module).values():
            if isinstance(kind, type):
                names.update(dir(kind))
    for path in Path(inspect.getfile(asyncpg)).parent.rglob("*.py"):
        names.update(path.stem.split("."))
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Attribute(attr=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    names.add(name)
    return frozenset(name for name in names if is_private(name)) - {"_replace", "_asdict", "_make", "_fields"}


def _asyncpg_modules() -> Iterable[Any]:
    for found in pkgutil.walk_packages(asyncpg.__path__, "asyncpg."):
        if not found.name.startswith(("asyncpg._testbase", "asyncpg.gssapi")):  # these need what is not installed
            yield importlib.import_module(found.name)


def private_names_in(source: str, namespace: Mapping[str, Any]) -> set[str]:
    """Return the private names of asyncpg that a module uses.

    Args:
        source: The text of the module.
        namespace: The names of the module, for the classes it defines. A class that cannot be found there counts as a
            class of asyncpg.
    """
    reader = _Reader(namespace)
    reader.visit(ast.parse(source))
    return reader.found


def computed_names_in(source: str) -> set[str]:
    """Return the functions and methods that read or write an attribute whose name is not in the source."""
    reader = _ComputedNames()
    reader.visit(ast.parse(source))
    return reader.found


def pins(*_: str) -> Callable[[_F], _F]:
    """Note that a test fails where one of these private names of asyncpg does not do what we need."""
    return lambda test: test


def pinned_in(source: str) -> set[str]:
    """Return the names that `pins` notes in a file of tests."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef(decorator_list=decorators) | ast.AsyncFunctionDef(decorator_list=decorators):
                for decorator in decorators:
                    match decorator:
                        case ast.Call(func=ast.Name(id="pins"), args=args):
                            names.update(ast.literal_eval(arg) for arg in args)
    return names


def undocumented_imports_in(source: str) -> set[str]:
    """Return what a module takes from below asyncpg's top level; only that and its exceptions are documented."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if module.startswith("asyncpg."):
                found.update(f"{module}.{alias.name}" for alias in names)
            case ast.ImportFrom(module="asyncpg", names=names):
                found.update(f"asyncpg.{alias.name}" for alias in names if _is_module(alias.name))
            case ast.Import(names=names):
                found.update(alias.name for alias in names if alias.name.startswith("asyncpg."))
            case ast.Attribute(value=ast.Name(id="asyncpg"), attr=name) if _is_module(name):
                found.add(f"asyncpg.{name}")
    return {path for path in found if path.split(".")[1] != "exceptions"}


def _is_module(name: str) -> bool:
    return inspect.ismodule(getattr(asyncpg, name, None))


class _Reader(ast.NodeVisitor):
    """Collects private names of asyncpg.

    On `self` and `cls` in a method, a name counts if a base class from asyncpg has it: other names are the class's own.
    Everywhere else a name counts if asyncpg has it anywhere.
    """

    def __init__(self, namespace: Mapping[str, Any]) -> None:
        self.found: set[str] = set()
        self._namespace = namespace
        self._path: list[str] = []  # the classes and functions that are being read
        self._own: _Owner | None = None  # the class whose method is being read
        self._self_names: frozenset[str] = frozenset()  # the names that mean an object of this class

    # Names on something

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self._own is not None and self._is_self(node.value):
            self._note(node.attr, self._own)
        else:
            self._note(node.attr)
        self.generic_visit(node)

    def _is_self(self, node: ast.expr) -> bool:
        match node:
            case ast.Name(id=name):
                return name in self._self_names
            case ast.Call(func=ast.Name(id="super"), args=[]):
                return True
            case ast.Call(func=ast.Name(id="type"), args=[ast.Name(id=name)]):
                return name in self._self_names
        return False

    def visit_MatchClass(self, node: ast.MatchClass) -> None:
        for name in node.kwd_attrs:
            self._note(name)
        self.generic_visit(node)

    # Names as text and as keywords

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and re.fullmatch(r"[\w.]+", node.value):
            for name in node.value.split("."):
                self._note(name)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg is not None:
            self._note(node.arg)
        self.generic_visit(node)

    # Names that are imported

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._note_import(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self._note_import(f"{node.module}.{alias.name}")

    def _note_import(self, path: str) -> None:
        if path.split(".")[0] == "asyncpg":
            self.found.update(filter(is_private, path.split(".")))

    # Classes: what they override

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for one in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(one)
        self._path.append(node.name)
        outer, self._own = self._own, _Owner.of(self._namespace, self._path)
        for statement in node.body:
            self._visit_member(statement, self._own)
        self._own = outer
        self._path.pop()

    def _visit_member(self, node: ast.stmt, owner: _Owner) -> None:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                self._note(name, owner)
                self._visit_function(node, is_method=True)
            case ast.Assign(targets=[ast.Name(id="__slots__")], value=value):
                for one in ast.walk(value):
                    if isinstance(one, ast.Constant) and isinstance(one.value, str):
                        self._note(one.value, owner)
            case ast.Assign(targets=targets):
                for target in targets:
                    self._note_target(target, owner)
                self.visit(node.value)
            case ast.AnnAssign(target=target):
                self._note_target(target, owner)
                self.generic_visit(node)
            case ast.If():  # methods that type checkers see, or do not
                for one in (*node.body, *node.orelse):
                    self._visit_member(one, owner)
            case _:
                self.visit(node)

    def _note_target(self, target: ast.expr, owner: _Owner) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                self._note(node.id, owner)

    # Functions: whose `self` it is

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_function(node, is_method=False)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._visit_function(node, is_method=False)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._visit_function(node, is_method=False)

    def _visit_function(self, node: _FunctionNode, *, is_method: bool) -> None:
        parameters = [one.arg for one in (*node.args.posonlyargs, *node.args.args)]
        outer = self._self_names
        if is_method and parameters and parameters[0] in ("self", "cls"):
            self._self_names = frozenset(parameters[:1])
        else:  # a function inside a method sees the method's `self`, unless it has a parameter of this name
            self._self_names = (frozenset() if is_method else outer) - set(parameters)
        self._path.append(getattr(node, "name", "<lambda>"))
        self.generic_visit(node)
        self._path.pop()
        self._self_names = outer

    def _note(self, name: str, owner: _Owner | None = None) -> None:
        if is_private(name) and (name in asyncpg_private_names() if owner is None else owner.has(name)):
            self.found.add(name)


class _Owner:
    """A class that a module defines, and what it inherits from asyncpg."""

    def __init__(self, bases: tuple[type, ...] | None) -> None:
        self._bases = bases

    @classmethod
    def of(cls, namespace: Mapping[str, Any], path: list[str]) -> _Owner:
        """Look up a class by its path; one inside a function cannot be found."""
        found: Any = namespace.get(path[0])
        for name in path[1:]:
            found = getattr(found, name, None)
        if not isinstance(found, type):
            return cls(None)
        return cls(tuple(base for base in found.__mro__ if base.__module__.split(".")[0] == "asyncpg"))

    def has(self, name: str) -> bool:
        """Return whether asyncpg's part of the class has the name; of an unknown class that may be any name."""
        if self._bases is None:
            return name in asyncpg_private_names()
        return any(hasattr(base, name) for base in self._bases)


class _ComputedNames(ast.NodeVisitor):
    def __init__(self) -> None:
        self.found: set[str] = set()
        self._path: list[str] = []

    def _visit_scope(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._path.append(node.name)
        self.generic_visit(node)
        self._path.pop()

    visit_ClassDef = visit_FunctionDef = visit_AsyncFunctionDef = _visit_scope  # noqa: N815  names of `ast`

    def visit_Call(self, node: ast.Call) -> None:
        match node.func:
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in _BY_NAME:
                # The name stands first or, behind the object, second. These two take names only.
                names = node.args if name in ("attrgetter", "methodcaller") else node.args[:2]
                written = [isinstance(one, ast.Constant) for one in names]
                if not (all(written) if name == "attrgetter" else any(written)):
                    self.found.add(".".join(self._path) or "<module>")
        self.generic_visit(node)
