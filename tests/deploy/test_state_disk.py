"""The header of the state disk, which the host may write: what opens under every key, or leads elsewhere, opens nothing.

With the real cryptsetup on files; what it would map, it is only asked whether the key opens, for want of a device mapper.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SBIN = Path(__file__).parents[2] / "deploy/overlay/usr/sbin"
KEY = bytes(range(64))
LUKS = shutil.which("cryptsetup", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or "/usr/sbin/cryptsetup"

Header = dict[str, Any]


@pytest.fixture(scope="module")
def formatted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk as custodians format it."""
    folder = tmp_path_factory.mktemp("disk")
    disk, key = folder / "site.img", folder / "key"
    key.write_bytes(KEY)
    with disk.open("wb") as file:
        file.truncate(17 << 20)
    quick = ["--pbkdf-force-iterations", "4", "--pbkdf-memory", "65536"]
    done = subprocess.run([LUKS, "luksFormat", "-q", "--type", "luks2", *quick, disk, key], check=False)
    assert done.returncode == 0
    return disk


def forge(disk: Path, change: Callable[[Header], object]) -> None:
    """Change the header as whoever holds the disk can: both copies, with checksums that hold."""
    data = bytearray(disk.read_bytes())
    (size,) = struct.unpack_from(">Q", data, 8)
    for start in (0, size):
        told = json.loads(data[start + 4096 : start + size].rstrip(b"\0"))
        change(told)
        data[start + 4096 : start + size] = json.dumps(told).encode().ljust(size - 4096, b"\0")
        data[start + 448 : start + 512] = bytes(64)
        data[start + 448 : start + 480] = hashlib.sha256(data[start : start + size]).digest()
    disk.write_bytes(data)


def start(disk: Path, folder: Path, key: bytes) -> tuple[bool, str]:
    """Run rapha-state with this disk in the device's place; whether the key opened it, and what it said."""
    tools = folder / "bin"
    tools.mkdir()
    shutil.copy(SBIN / "rapha-check-header", tools)
    (folder / "derived").write_bytes(key)
    bash = (
        f'#!/bin/bash\n[ "$1" = open ] && set -- open --test-passphrase "${{@:2:$#-2}}"\nexec {LUKS} "$@"\n'
    )
    programs = {
        "cryptsetup": bash,
        "rapha-derive-key": f"#!/bin/sh\ncat {folder / 'derived'}\n",
        "mount": f"#!/bin/sh\ntouch {folder / 'mounted'}\n",
    }
    for name, text in programs.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    script = (SBIN / "rapha-state").read_text().replace("/dev/vdc", str(disk)).replace("/run/", f"{folder}/")
    done = subprocess.run(
        ["/bin/sh", "-s", "/site"],
        input=script,
        env={"PATH": f"{tools}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    opened = (folder / "mounted").exists()
    assert opened == (done.returncode == 0)
    return opened, done.stderr


def test_the_disk_opens_under_its_key_and_no_other(formatted: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert start(formatted, tmp_path / "one", KEY) == (True, "")
    opened, said = start(formatted, tmp_path / "two", KEY[::-1])
    assert not opened
    assert "No key available" in said


FORGERIES: dict[str, Callable[[Header], object]] = {
    "a key that any other opens": lambda h: h["keyslots"]["0"]["area"].update(encryption="cipher_null-ecb"),
    "a key that one of 256 opens": lambda h: h["keyslots"]["0"]["area"].update(key_size=1),
    "a second key that any other opens": lambda h: h["keyslots"].update(
        {"1": json.loads(json.dumps(h["keyslots"]["0"]).replace("aes-xts-plain64", "cipher_null-ecb"))}
    ),
    "data in the clear": lambda h: h["segments"]["0"].update(encryption="cipher_null-ecb"),
    "a plain part before the data": lambda h: h["segments"].update(
        {"1": {"type": "linear", "offset": "16777216", "size": "4096"}}
    ),
    "an unfinished encryption": lambda h: h["config"].update(
        requirements={"mandatory": ["online-reencrypt-v2"]}
    ),
    "a token": lambda h: h["tokens"].update(
        {"0": {"type": "luks2-keyring", "keyslots": ["0"], "key_description": "x"}}
    ),
    "an integrity of its own": lambda h: h["segments"]["0"].update(
        integrity={"type": "none", "journal_encryption": "none", "journal_integrity": "none"}
    ),
    "a key stretched by a weak hash": lambda h: h["keyslots"]["0"]["kdf"].update(
        type="pbkdf2", hash="md5", iterations=1000
    ),
    "no key": lambda h: (h["keyslots"].clear(), h["digests"]["0"]["keyslots"].clear()),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_header_that_the_host_wrote_opens_nothing(formatted: Path, tmp_path: Path, what: str) -> None:
    """Even with the right key, so that it is the header that is refused: none gets as far as to the key."""
    disk = Path(shutil.copy(formatted, tmp_path / "site.img"))
    forge(disk, FORGERIES[what])
    opened, said = start(disk, tmp_path, KEY)
    assert not opened
    assert "rapha-check-header: " in said or "Device" in said  # cryptsetup refuses some by itself


def test_what_was_judged_is_what_opens() -> None:
    """The disk answers the second reading of its header with another one: nothing asks."""
    text = (SBIN / "rapha-state").read_text()
    judged, opened = text.split("rapha-check-header <", 1)
    assert "luksHeaderBackup /dev/vdc --header-backup-file /run/state.header" in judged
    assert "--header /run/state.header" in opened
    assert (SBIN / "rapha-check-header").stat().st_mode & 0o100


def test_a_disk_without_a_header_is_refused(tmp_path: Path) -> None:
    disk = tmp_path / "site.img"
    with disk.open("wb") as file:
        file.truncate(17 << 20)
    assert not start(disk, tmp_path, KEY)[0]
