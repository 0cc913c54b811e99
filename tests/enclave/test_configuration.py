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


def test_a_dataset_without_a_folder_has_its_schemas(tmp_path: Path) -> None:
    """And another where it names one; both from the configuration's own place."""
    (tmp_path / "site.toml").write_text(
        'name = "s"\nstate = "state"\npolicy = "policy.toml"\n'
        'datasets = [{schema = "data/ward.toml"}, {schema = "data/b.toml", folder = "records"}]\n'
    )
    first, second = Config.load(tmp_path / "site.toml").datasets
    assert Path(first.folder) == tmp_path / "data"
    assert Path(second.folder) == tmp_path / "records"
