"""A site's configuration that cannot be used says so in one error."""

from __future__ import annotations

from pathlib import Path

import pytest

from rapha_lab.enclave.site import Config
from rapha_lab.protocol.errors import RequestError


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file"),
        (b"\x89PNG", "malformed"),
        (b"name = ", "malformed"),
        (b'name = "ward"', "missing required field"),
    ],
)
def test_what_is_wrong_is_said_with_the_file_and_the_way_out(
    tmp_path: Path, content: bytes | None, says: str
) -> None:
    """Absent, no text, no TOML, no configuration."""
    path = tmp_path / "site.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestError, match=says) as raised:
        Config.load(path)
    assert str(path) in str(raised.value)
    assert "docs/hospital.md" in raised.value.instead
