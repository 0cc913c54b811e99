"""Keys on disk and as text."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rapha_lab.cli import main
from rapha_lab.protocol.errors import RequestError, TrustError
from rapha_lab.protocol.keys import PrivateKey, PublicKey

PASSPHRASE = "correct horse"
ALGORITHMS = ["ed25519", "x25519", "x-wing"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
class TestEveryKind:
    def test_a_saved_key_is_loaded_with_its_passphrase(self, algorithm: str, tmp_path: Path) -> None:
        """What comes back is the same key."""
        key = PrivateKey.create(algorithm)
        key.save(tmp_path / "key", PASSPHRASE)
        assert PrivateKey.load(tmp_path / "key", PASSPHRASE).public == key.public

    def test_only_its_owner_can_read_the_file(self, algorithm: str, tmp_path: Path) -> None:
        """The mode is 0600 from the first moment, and nothing of the key is in the clear."""
        key = PrivateKey.create(algorithm)
        key.save(tmp_path / "key", PASSPHRASE)
        assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
        assert all(part.private_bytes_raw() not in (tmp_path / "key").read_bytes() for part in key.parts)

    def test_another_passphrase_does_not_open_it(self, algorithm: str, tmp_path: Path) -> None:
        """The message says so without saying more."""
        PrivateKey.create(algorithm).save(tmp_path / "key", PASSPHRASE)
        with pytest.raises(TrustError, match="passphrase is wrong or the file is damaged"):
            PrivateKey.load(tmp_path / "key", PASSPHRASE + "!")

    def test_the_text_form_reads_back(self, algorithm: str, tmp_path: Path) -> None:
        """A public key is one line of text."""
        public = PrivateKey.create(algorithm).public
        assert PublicKey.parse(str(public)) == public
        assert str(public).startswith(algorithm + ":")

    def test_a_private_key_shows_its_public_half_only(self, algorithm: str, tmp_path: Path) -> None:
        """Its repr is safe to log."""
        key = PrivateKey.create(algorithm)
        assert repr(key) == f"PrivateKey of {str(key.public)[:40]}"


def test_a_key_is_never_written_over_another_file(tmp_path: Path) -> None:
    """The file keeps what it had."""
    (tmp_path / "key").write_text("something else")
    with pytest.raises(TrustError, match="exists"):
        PrivateKey.create().save(tmp_path / "key", PASSPHRASE)
    assert (tmp_path / "key").read_text() == "something else"


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    """As ssh does."""
    PrivateKey.create().save(tmp_path / "key", PASSPHRASE)
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(TrustError, match="chmod 600"):
        PrivateKey.load(tmp_path / "key", PASSPHRASE)


def test_a_missing_file_is_an_error_of_ours(tmp_path: Path) -> None:
    """Not a traceback of the operating system."""
    with pytest.raises(TrustError, match="no key"):
        PrivateKey.load(tmp_path / "none", PASSPHRASE)


def test_a_short_passphrase_is_refused(tmp_path: Path) -> None:
    """And no file is left behind."""
    with pytest.raises(TrustError, match="too short"):
        PrivateKey.create().save(tmp_path / "key", "hunter2")
    assert not (tmp_path / "key").exists()


def test_a_damaged_file_is_refused_byte_by_byte(tmp_path: Path) -> None:
    """A cut or altered file never loads as another key."""
    PrivateKey.create().save(tmp_path / "key", PASSPHRASE)
    whole = (tmp_path / "key").read_bytes()
    for damaged in (b"", whole[:50], whole[:-40], whole.replace(b"ed25519", b"x25519", 1), b"\xff" + whole):
        (tmp_path / "key").write_bytes(damaged)
        with pytest.raises(TrustError):
            PrivateKey.load(tmp_path / "key", PASSPHRASE)


@given(st.text(max_size=80))
def test_no_other_text_is_a_key(text: str) -> None:
    """Whatever is not the canonical spelling of a key is refused with one kind of error."""
    for candidate in (text, "ed25519:" + text):
        with pytest.raises(RequestError):
            PublicKey.parse(candidate)


def test_a_key_has_one_spelling() -> None:
    """Unused bits of the base64, padding and white space count: a list of keys can be compared as text."""
    text = str(PublicKey("ed25519", bytes(32)))
    for other in (text[:-2] + "B=", text.rstrip("="), text + "\n", text.upper(), " " + text):
        with pytest.raises(RequestError):
            PublicKey.parse(other)


def test_only_signing_keys_verify() -> None:
    """An X25519 key that happens to hold the same bytes as an Ed25519 key signs nothing."""
    key = PrivateKey.create()
    assert key.public.verifies(key.sign(b"m"), b"m")
    assert not PublicKey("x25519", key.public.raw).verifies(key.sign(b"m"), b"m")
    assert not key.public.verifies(key.sign(b"m"), b"n")
    assert not key.public.verifies(b"", b"m")


def test_a_new_keys_passphrase_is_asked_for_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A slip of the fingers would lose the key."""
    monkeypatch.delenv("RAPHA_LAB_PASSPHRASE", raising=False)
    typed = iter([PASSPHRASE, PASSPHRASE + "x", PASSPHRASE, PASSPHRASE])
    monkeypatch.setattr("getpass.getpass", lambda prompt: next(typed))
    assert main(["keys", "new", str(tmp_path / "key")]) == 1
    assert not (tmp_path / "key").exists()
    assert main(["keys", "new", str(tmp_path / "key")]) == 0
    public = capsys.readouterr().out.strip()
    assert str(PrivateKey.load(tmp_path / "key", PASSPHRASE).public) == public


def test_a_passphrase_too_short_is_said_before_it_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a name that is taken before any passphrase is."""
    monkeypatch.delenv("RAPHA_LAB_PASSPHRASE", raising=False)
    asked = list[str]()
    monkeypatch.setattr("getpass.getpass", lambda prompt: asked.append(prompt) or "short")
    assert main(["keys", "new", str(tmp_path / "key")]) == 1
    assert "too short" in capsys.readouterr().err
    assert len(asked) == 1
    (tmp_path / "taken").write_text("mine")
    assert main(["keys", "new", str(tmp_path / "taken")]) == 1
    assert len(asked) == 1


def test_where_nobody_can_be_asked_for_a_passphrase_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a script without a terminal: the name of the variable, and no traceback."""

    def nobody(prompt: str) -> str:
        raise EOFError

    monkeypatch.delenv("RAPHA_LAB_PASSPHRASE", raising=False)
    monkeypatch.setattr("getpass.getpass", nobody)
    assert main(["keys", "new", str(tmp_path / "key")]) == 1
    assert "RAPHA_LAB_PASSPHRASE" in capsys.readouterr().err
