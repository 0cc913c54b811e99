"""The key of the state disk: the bytes that the firmware is asked with and answers, and that there is none without it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import importlib.machinery
import importlib.util
import os
import pty
import stat
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

SCRIPT = Path(__file__).parents[2] / "deploy/overlay/usr/sbin/rapha-derive-key"
SECRET = bytes(range(1, 33))


@pytest.fixture
def derive() -> ModuleType:
    """The script as a module."""
    loader = importlib.machinery.SourceFileLoader("derive", str(SCRIPT))
    spec = importlib.util.spec_from_loader("derive", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class Firmware:
    """Answers the ioctl as the driver does: reads and writes the process's memory by the addresses it is given."""

    def __init__(self, answer: bytes, error: OSError | None = None, codes: int = 0) -> None:
        self.answer, self.error, self.codes = answer, error, codes
        self.asked: list[bytes] = []

    def __call__(self, device: Any, number: int, message: Any) -> int:
        assert number == 0xC0205301
        assert ctypes.sizeof(message) == 32
        version, request, answer, _ = message
        assert version == 1  # the first byte is the version, the seven behind it are padding
        self.asked.append(ctypes.string_at(request, 32))
        message[3] = self.codes
        if self.error is not None:
            raise self.error
        ctypes.memmove(answer, self.answer, 64)
        return 0


def response(key: bytes = SECRET, status: int = 0, reserved: bytes = bytes(28)) -> bytes:
    """MSG_KEY_RSP: status, reserved, the key at byte 32."""
    return struct.pack("<I", status) + reserved + key


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A file in the device's place."""
    path = tmp_path / "sev-guest"
    path.touch()
    return path


def test_the_firmware_is_asked_for_this_image_and_policy(
    derive: ModuleType, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VCEK; guest policy and measurement mixed in; nothing else, since what else is mixed changes by itself."""
    firmware = Firmware(response())
    monkeypatch.setattr(fcntl, "ioctl", firmware)
    assert derive.derived(str(device)) == SECRET
    assert firmware.asked == [bytes(8) + (0b1001).to_bytes(8, "little") + bytes(16)]


def test_the_disks_key_is_hkdf_of_what_was_derived(derive: ModuleType) -> None:
    """As another implementation computes it; another secret is another key."""
    expected = HKDF(hashes.SHA256(), 64, None, b"rapha-lab/state-disk/v1").derive(SECRET)
    assert derive.disk_key(SECRET) == expected
    assert derive.disk_key(SECRET[::-1]) != expected


@pytest.mark.parametrize(
    ("answer", "codes", "reason"),
    [
        (response(status=0x16), 0, "status 0x16"),
        (response(), 0x1_0000_0000, "error 0x100000000"),
        (response(key=bytes(32)), 0, "malformed"),
        (response(reserved=b"\1" + bytes(27)), 0, "malformed"),
    ],
)
def test_an_answer_without_a_key_is_refused(
    derive: ModuleType, device: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, codes: int, reason: str
) -> None:
    """Zeros would be a key that everybody has."""
    monkeypatch.setattr(fcntl, "ioctl", Firmware(answer, codes=codes))
    with pytest.raises(derive.Refused, match=reason):
        derive.derived(str(device))


def test_an_error_of_the_driver_is_said(
    derive: ModuleType, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the firmware's and the host's code."""
    failed = Firmware(response(), OSError(errno.EIO, os.strerror(errno.EIO)), codes=0x2_0000_0016)
    monkeypatch.setattr(fcntl, "ioctl", failed)
    with pytest.raises(derive.Refused, match="firmware error 0x16, host error 0x2"):
        derive.derived(str(device))


def test_what_is_no_device_gives_no_key(derive: ModuleType, device: Path) -> None:
    """The real call, on a file: the kernel refuses it."""
    with pytest.raises(derive.Refused, match="Inappropriate ioctl"):
        derive.derived(str(device))


@pytest.mark.skipif(Path("/dev/sev-guest").exists(), reason="this machine is an SEV-SNP guest")
def test_without_the_hardware_it_says_so_and_writes_nothing() -> None:
    """Cryptsetup then reads an empty key, which it refuses: the disk stays closed."""
    done = subprocess.run([sys.executable, "-I", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "rapha-derive-key: There is no /dev/sev-guest: this is no SEV-SNP guest, or its kernel lacks sev-guest.\n"
    )


def test_no_key_is_shown_on_a_screen() -> None:
    """A console is the host's to read."""
    ours, theirs = pty.openpty()
    done = subprocess.run([sys.executable, "-I", SCRIPT], stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 1
    assert "is not shown" in done.stderr


def test_the_image_can_run_it() -> None:
    """With the interpreter that is in it, by the name that rapha-state calls."""
    assert SCRIPT.stat().st_mode & stat.S_IXUSR
    assert SCRIPT.read_text().startswith("#!/usr/bin/python3 -I\n")
    assert f"\n{SCRIPT.name} | cryptsetup open " in SCRIPT.with_name("rapha-state").read_text()
