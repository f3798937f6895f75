"""The folder in which a `LocalPostgres` keeps its data, with the password and the certificates that belong to it.

This module must not know servers: PostgreSQL's own files are in the folder `data` inside, which the supervisor owns.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .._errors import ConfigurationError
from ._certificates import Certificates

_MARKER = "local-postgres.json"


@dataclass(frozen=True, slots=True)
class Kept:
    """What clients of the database in a folder need to know."""

    password: str = field(repr=False)
    certificates: Certificates


class DataDir:
    """A folder for the data of one `LocalPostgres`.

    A file in it marks the folder as one of ours. It is empty until the database is complete: what an interrupted start
    left is created anew.

    Args:
        folder: The folder. It need not exist.

    Raises:
        ConfigurationError: The folder contains something else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._marker = folder / _MARKER
        if folder.exists() and not folder.is_dir():
            raise ConfigurationError(f"data_dir={str(folder)!r} is not a folder. Pass a folder.")
        if folder.is_dir() and not self._marker.exists() and any(folder.iterdir()):
            raise ConfigurationError(
                f"data_dir={str(folder)!r} contains files that are not of a LocalPostgres. "
                "Pass an empty or a new folder."
            )

    def __repr__(self) -> str:
        return f"<DataDir {self.folder}>"

    def read(self) -> Kept | None:
        """Return what the folder keeps, or None if there is no complete database in it.

        Raises:
            ConfigurationError: The file that marks the folder is damaged.
        """
        try:
            text = self._marker.read_text(encoding="utf-8")
            if not text:
                return None
            kept = json.loads(text)
            return Kept(kept["password"], Certificates(**kept["certificates"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise ConfigurationError(
                f"{self._marker} is damaged, and the password of the database is not known without it. Remove "
                f"{self.folder}, or pass another data_dir."
            ) from None

    def claim(self) -> None:
        """Create the folder, and mark it as ours."""
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            self.folder.chmod(0o711)  # under root, PostgreSQL runs as another user, who has to enter it
        self._marker.touch(mode=0o600)
        (self.folder / ".gitignore").write_text("*\n")  # a database and its password do not belong in a repository

    def complete(self, password: str, certificates: Certificates) -> None:
        """Note that the database is complete."""
        new = self._marker.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_text(json.dumps({"password": password, "certificates": asdict(certificates)}), encoding="utf-8")
        new.replace(self._marker)
