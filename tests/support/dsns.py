"""Connection strings of a Neon endpoint, and a strategy that makes any valid one."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote

from hypothesis import strategies as st

from neon_async._config.hints import is_masked, is_password_placeholder, is_placeholder

HOST = "ep-cool-darkness-123456.us-east-2.aws.neon.tech"
POOLED = HOST.replace(".", "-pooler.", 1)
# As the Neon console shows it, without its parameters.
CONSOLE = "postgresql://alex:AbC123dEf@ep-cool-darkness-a1b2c3d4-pooler.us-east-2.aws.neon.tech/dbname"
# The keywords that a connection cannot do without.
MINIMAL: dict[str, object] = {"host": HOST, "user": "alex", "password": "x"}

TEXT = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=12)
_LABEL = st.from_regex(r"\A[a-z]([a-z0-9-]{0,8}[a-z0-9])?\Z")
_SSLMODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full", "", "nonsense")
_QUERY = st.dictionaries(
    st.sampled_from(["application_name", "options", "fallback_application_name"]), TEXT, max_size=3
).map(lambda items: [f"{key}={quote(value, safe='')}" for key, value in items.items()])


def _is_a_value(text: str) -> bool:
    return not (is_placeholder(text) or is_password_placeholder(text) or is_masked(text))


@st.composite
def dsns(draw: Callable[..., str], password: st.SearchStrategy[str] = TEXT) -> str:
    """Return a connection URL that is valid except, perhaps, for its sslmode."""
    texts = (text.filter(_is_a_value) for text in (TEXT, password, TEXT))
    user, secret, database = (quote(draw(text), safe="") for text in texts)
    items: list[str] = draw(_QUERY)  # type: ignore[assignment]
    mode = draw(st.sampled_from((None, *_SSLMODES)))
    if mode is not None:
        items.insert(draw(st.integers(0, len(items))), f"sslmode={mode}")  # type: ignore[arg-type]
    query = "?" + "&".join(items) if items else ""
    return f"postgresql://{user}:{secret}@{draw(_LABEL)}.{draw(_LABEL)}.example/{database}{query}"
