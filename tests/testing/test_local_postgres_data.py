"""`LocalPostgres` with a schema file, and with a folder in which its data is kept."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import Scene, ask, connect, running

from neon_async import ConfigurationError
from neon_async.testing import LocalPostgres, LocalPostgresError

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="PostgreSQL runs as another user under root only")


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder that every user can enter, unlike `tmp_path`."""
    folder = Path(tempfile.mkdtemp(prefix="test-neon-async-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------------------------------------
# A schema file


def test_a_schema_file_is_run_when_the_database_is_created(postgres_bin_dir: str | None, tmp_path: Path) -> None:
    schema = tmp_path / "schema.sql"
    schema.write_text(
        "\ufeff\\restrict abcDEF\n\nCREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY, item text);\n\n"
        "CREATE FUNCTION twice(n int) RETURNS int LANGUAGE plpgsql AS $$\nBEGIN\n\n  RETURN n * 2;\n\nEND $$;\n"
        "INSERT INTO orders (item) VALUES ('ä;b');\n\n\\unrestrict abcDEF\n",
        encoding="utf-8",
    )
    with running(LocalPostgres(postgres_bin_dir, schema=schema)) as server:
        assert ask(server, tmp_path, "SELECT item || twice(21) FROM orders") == "ä;b42"


def test_an_error_in_a_schema_names_file_and_line_and_leaves_nothing(scene: Scene, tmp_path: Path) -> None:
    schema = tmp_path / "schema.sql"
    schema.write_text("CREATE TABLE first ();\n-- ü\nCREATE TABEL second ();\n")
    with (
        pytest.raises(LocalPostgresError, match=r'schema\.sql, line 3: syntax error at or near "TABEL"'),
        running(LocalPostgres(schema=schema)),
    ):
        pass
    assert scene.traces() == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("SELECT 1;\n\\connect other\n", r"line 2: \\connect is for psql", id="a command of psql"),
        pytest.param("COPY public.t (a, b) FROM stdin;\n1\t2\n\\.\n", "line 1: COPY is for psql", id="data for COPY"),
        pytest.param("\udcff", "cannot be read: .*utf-8", id="not UTF-8"),
    ],
)
def test_a_schema_that_the_server_cannot_run_is_refused_before_it_starts(
    text: str, reason: str, tmp_path: Path
) -> None:
    schema = tmp_path / "schema.sql"
    schema.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigurationError, match=reason):
        LocalPostgres(schema=schema)


def test_a_schema_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nothing\.sql' cannot be read"):
        LocalPostgres(schema=tmp_path / "nothing.sql")


# ---------------------------------------------------------------------------------------------------------------------
# A folder for the data


def test_data_password_and_certificate_are_kept_in_the_folder(
    postgres_bin_dir: str | None, home: Path, tmp_path: Path
) -> None:
    schema = tmp_path / "schema.sql"
    schema.write_text("CREATE TABLE kept (n int)")
    folder = home / "new" / "data dir"
    with running(LocalPostgres(postgres_bin_dir, schema=schema, data_dir=folder)) as server:
        credentials = server.dsn.partition("@")[0], server.trust_anchor
        with connect(server, tmp_path) as connection:
            connection.execute("INSERT INTO kept VALUES (42)")
        assert ask(server, tmp_path, "SHOW fsync") == "on"
    marker = folder / "local-postgres.json"
    assert marker.stat().st_mode & 0o777 == 0o600
    assert (folder / ".gitignore").read_text() == "*\n"

    with running(
        LocalPostgres(postgres_bin_dir, schema=schema, data_dir=folder)
    ) as server:  # the schema is not run again
        assert (server.dsn.partition("@")[0], server.trust_anchor) == credentials
        assert ask(server, tmp_path, "SELECT n FROM kept") == 42


def test_a_start_that_failed_is_repeated_from_the_beginning(home: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.sql"
    schema.write_text("nonsense")
    with pytest.raises(LocalPostgresError, match="nonsense"), running(LocalPostgres(schema=schema, data_dir=home)):
        pass
    schema.write_text("CREATE TABLE complete AS SELECT 1 AS n")
    with running(LocalPostgres(schema=schema, data_dir=home)) as server:
        assert ask(server, tmp_path, "SELECT n FROM complete") == 1


def test_two_servers_do_not_share_a_folder(home: Path) -> None:
    with running(LocalPostgres(data_dir=home)):
        second = LocalPostgres(data_dir=home)
        with pytest.raises(LocalPostgresError, match=r"(?s)did not start.*postmaster\.pid"), running(second):
            pass


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="contains files that are not of a LocalPostgres"):
        LocalPostgres(data_dir=tmp_path)
    with pytest.raises(ConfigurationError, match="is not a folder"):
        LocalPostgres(data_dir=tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("text", ["{", "[]", '{"password": "x"}', '{"password": "x", "certificates": {"a": 1}}'])
def test_a_damaged_folder_is_refused_without_its_secrets(text: str, tmp_path: Path) -> None:
    (tmp_path / "local-postgres.json").write_text(text)
    with pytest.raises(ConfigurationError, match="is damaged") as caught:
        LocalPostgres(data_dir=tmp_path)
    assert caught.value.__cause__ is None


def test_data_that_is_missing_is_reported(home: Path) -> None:
    certificates = {"trust_anchor": "a", "chain": "b", "key": "c"}
    (home / "local-postgres.json").write_text(json.dumps({"password": "x", "certificates": certificates}))
    with (
        pytest.raises(LocalPostgresError, match=r"The data is missing: .*/data"),
        running(LocalPostgres(data_dir=home)),
    ):
        pass


@as_root
def test_a_folder_that_the_other_user_cannot_enter_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    server = LocalPostgres(data_dir=closed)
    with pytest.raises(LocalPostgresError, match=r"'nobody', which cannot enter .*closed"), running(server):
        pass
