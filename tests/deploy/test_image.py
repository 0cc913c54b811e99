"""The confidential VM's image: the same bytes from the same files, one number for all of them, and a boot that obeys it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
TOOLS = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def needs(*tools: str) -> pytest.MarkDecorator:
    """Skipped, saying so, where a tool of Debian's is not installed."""
    missing = [tool for tool in tools if shutil.which(tool, path=TOOLS) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture(scope="module")
def image() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("image", DEPLOY / "image.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tree(folder: Path, *, backwards: bool = False) -> Path:
    """A small root, written in one order or the other, with the times of now."""
    files = {f"d{n % 3}/f{n}": bytes([n]) * (n * 700) for n in range(20)} | {"etc/word": b"ward-nine\n"}
    for name in sorted(files, reverse=backwards):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(files[name])
        os.utime(folder / name, (1, 1) if backwards else None)
    (folder / "d1/link").symlink_to("f1")
    return folder


def verity_root(image: bytes) -> str:
    """dm-verity's root hash by its definition: SHA-256 over salt and block, level by level, 128 hashes a block."""

    def level(blocks: list[bytes]) -> list[bytes]:
        return [hashlib.sha256(bytes(32) + block).digest() for block in blocks]

    hashes = level([image[at : at + 4096] for at in range(0, len(image), 4096)])
    while len(hashes) > 1:
        packed = [b"".join(hashes[at : at + 128]).ljust(4096, b"\0") for at in range(0, len(hashes), 128)]
        hashes = level(packed)
    return hashes[0].hex()


@needs("mkfs.erofs", "veritysetup")
class TestRoot:
    def test_two_copies_of_a_tree_have_one_hash(self, image: ModuleType, tmp_path: Path) -> None:
        """Whatever the order they were written in, and the time."""
        one = image.root(tree(tmp_path / "a"), tmp_path / "out a")
        two = image.root(tree(tmp_path / "b", backwards=True), tmp_path / "out b")
        assert one == two
        for name in ("root.erofs", "root.verity", "root.hash"):
            assert (tmp_path / "out a" / name).read_bytes() == (tmp_path / "out b" / name).read_bytes()

    def test_the_hash_is_that_of_the_definition(self, image: ModuleType, tmp_path: Path) -> None:
        """As computed here in ten lines."""
        found = image.root(tree(tmp_path / "a"), tmp_path / "out")
        assert found == verity_root((tmp_path / "out" / "root.erofs").read_bytes())

    @pytest.mark.parametrize("name", ["etc/word", "d2/f2", "new"])
    def test_every_file_counts(self, image: ModuleType, tmp_path: Path, name: str) -> None:
        """One byte more or less, or a new file."""
        root = tree(tmp_path / "a")
        before = image.root(root, tmp_path / "out")
        with (root / name).open("ab") as file:
            file.write(b"x")
        assert image.root(root, tmp_path / "out") != before


class TestInitrd:
    def test_the_archive_is_what_cpio_reads(self, image: ModuleType, tmp_path: Path) -> None:
        """Every file with its mode and content, folders before what is in them."""
        if shutil.which("cpio") is None:
            pytest.skip("not installed: cpio")
        files = {"init": (0o755, b"#!/bin/sh\n"), "a/b/c": (0o644, b"x" * 1001)}
        done = subprocess.run(
            ["cpio", "-id", "--quiet"], input=image.cpio(files), cwd=tmp_path, capture_output=True
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert (tmp_path / "a/b/c").read_bytes() == b"x" * 1001
        assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755
        assert (tmp_path / "newroot").is_dir()

    def test_the_same_files_give_the_same_bytes(self, image: ModuleType) -> None:
        """In any order; another mode or name gives others."""
        files = {"a": (0o644, b"1"), "b": (0o755, b"2")}
        assert image.cpio(files) == image.cpio(dict(reversed(files.items())))
        assert image.cpio(files) != image.cpio({"a": (0o755, b"1"), "b": (0o755, b"2")})

    def test_modules_come_after_those_they_need(self, image: ModuleType, tmp_path: Path) -> None:
        """As the kernel's own list says; those it has built in are not missed."""
        (tmp_path / "modules.dep").write_text(
            "k/dm-verity.ko: k/reed.ko k/dm-mod.ko\nk/dm-mod.ko:\nk/reed.ko:\nk/virtio_blk.ko: k/virtio.ko\n"
            "k/virtio.ko:\nk/other.ko:\n"
        )
        found = [path.name for path in image._modules(tmp_path)]
        assert sorted(found) == ["dm-mod.ko", "dm-verity.ko", "reed.ko", "virtio.ko", "virtio_blk.ko"]
        assert found.index("dm-mod.ko") < found.index("dm-verity.ko") > found.index("reed.ko")
        assert found.index("virtio.ko") < found.index("virtio_blk.ko")

    def test_a_programs_libraries_come_with_it(self, image: ModuleType, tmp_path: Path) -> None:
        """Wherever the loader looks for them."""
        path = image.initrd(tmp_path, None, programs=("/bin/ls",))
        names = image.cpio({str(p).lstrip("/"): (0o755, b"") for p in image._closure(Path("/bin/ls"))})
        assert b"libc.so.6\0" in path.read_bytes()
        assert names.count(b"070701") > 3


# a firmware file with the tables that a launch digest is computed by (edk2's OvmfPkg/ResetVector), and nothing else

FOOTER = "96b582de-1fb2-45f7-baea-a366c55a082d"
RESET = "00f771de-1a7e-4fcb-890e-68c77e2fb44e"
METADATA = "dc886566-984a-4798-a75e-5585a7bf67cc"
HASH_TABLE = "7255371f-3a3b-4b04-927b-1da6efa8d454"
SIZE = 1 << 20


def firmware(path: Path, *, hashes: bool = True) -> Path:
    """A firmware of 1 MiB with a SEV metadata table; `hashes` says whether it has room for the kernel's hashes."""
    sections = [(0x800000, 0x9000, 1), (0x80A000, 0x3000, 1), (0x80D000, 0x1000, 2), (0x80E000, 0x1000, 3)]
    if hashes:
        sections.append((0x810000, 0x1000, 0x10))
    metadata = struct.pack("<4sIII", b"ASEV", 16 + 12 * len(sections), 1, len(sections))
    metadata += b"".join(struct.pack("<III", *section) for section in sections)
    at = SIZE - 0x800

    def entry(guid: str, data: bytes) -> bytes:
        return data + struct.pack("<H", len(data) + 18) + uuid.UUID(guid).bytes_le

    table = entry(METADATA, struct.pack("<I", SIZE - at)) + entry(RESET, struct.pack("<I", 0x80B004))
    table += entry(HASH_TABLE, struct.pack("<II", 0x810C00, 0x400))
    table += struct.pack("<H", len(table) + 18) + uuid.UUID(FOOTER).bytes_le
    data = bytearray(SIZE)
    data[at : at + len(metadata)] = metadata
    data[SIZE - 32 - len(table) : SIZE - 32] = table
    path.write_bytes(data)
    return path


class TestMeasure:
    @pytest.fixture
    def out(self, tmp_path: Path) -> Path:
        """A folder as the steps before leave it."""
        pytest.importorskip("sevsnpmeasure")
        (tmp_path / "root.hash").write_text("ab" * 32 + "\n")
        (tmp_path / "initrd").write_bytes(b"initrd")
        (tmp_path / "kernel").write_bytes(b"kernel")
        return tmp_path

    def digests(self, image: ModuleType, out: Path, **other: Any) -> dict[str, str]:
        """The launch digests of the image in `out`."""
        given = {
            "ovmf": firmware(out / "ovmf"),
            "kernel": out / "kernel",
            "cpus": [1, 2],
            "types": ["EPYC-v4"],
        }
        found: dict[str, str] = image.measure(out, **{**given, **other})["measurements"]
        return found

    def test_the_same_image_measures_the_same(self, image: ModuleType, out: Path) -> None:
        """In the form that evidence has, one for each number of processors."""
        found = self.digests(image, out)
        assert found == self.digests(image, out)
        assert list(found) == ["EPYC-v4 x 1", "EPYC-v4 x 2"]
        assert len(set(found.values())) == 2
        assert all(digest.startswith("sha384:") and len(digest) == 103 for digest in found.values())
        assert json.loads((out / "image.json").read_text())["command line"].endswith(
            f"rapha.root={'ab' * 32}"
        )

    @pytest.mark.parametrize("name", ["kernel", "initrd", "root.hash"])
    def test_every_part_counts(self, image: ModuleType, out: Path, name: str) -> None:
        """Kernel, initrd, and through the command line the root."""
        before = self.digests(image, out)
        (out / name).write_text("cd" * 32)
        after = self.digests(image, out)
        assert not set(before.values()) & set(after.values())

    def test_a_firmware_that_measures_no_kernel_is_refused(self, image: ModuleType, out: Path) -> None:
        """Under it any kernel would give the same digest."""
        with pytest.raises(Exception, match="KERNEL_HASHES"):
            self.digests(image, out, ovmf=firmware(out / "plain", hashes=False))


def test_locked_requirements_have_hashes_and_leave_out_what_was_given_by_hand(image: ModuleType) -> None:
    """A wheel from a folder is not looked for elsewhere; what has no hash is refused."""

    def item(name: str, digest: str | None, direct: bool = False) -> dict[str, Any]:
        info = {"archive_info": {"hashes": {"sha256": digest} if digest else {}}}
        return {"metadata": {"name": name, "version": "1"}, "download_info": info, "is_direct": direct}

    report = {"install": [item("B", "bb"), item("a", "aa"), item("rapha-lab", None, True)]}
    assert image.lock(report) == ["a==1 --hash=sha256:aa", "b==1 --hash=sha256:bb"]
    with pytest.raises(SystemExit, match="no hash"):
        image.lock({"install": [item("c", None)]})


@needs("nft")
def test_the_network_rules_are_rules() -> None:
    """And their default is to drop, in every direction."""
    path = DEPLOY / "overlay/etc/nftables.conf"
    if os.geteuid() == 0:
        tool = shutil.which("nft", path=TOOLS)
        assert subprocess.run([str(tool), "-c", "-f", str(path)], capture_output=True).returncode == 0
    assert path.read_text().count("policy drop;") == 3


@pytest.mark.parametrize(
    "script", ["init", "overlay/usr/sbin/rapha-init", "overlay/usr/sbin/rapha-state", "build"]
)
def test_scripts_parse_and_stop_at_the_first_failure(script: str) -> None:
    """`set -e` in each."""
    path = DEPLOY / script
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0
    assert "\nset -eu" in path.read_text()
    assert os.access(path, os.X_OK)


KERNEL = sorted(Path("/boot").glob("vmlinuz-*")) if os.environ.get("RAPHA_LAB_DEEP") == "1" else []


@needs("qemu-system-x86_64", "mkfs.erofs", "veritysetup", "busybox")
@pytest.mark.skipif(not KERNEL, reason="a deep run, on a machine with a kernel in /boot")
class TestBoot:
    def boot(self, out: Path, root: str, hash: str) -> str:
        """What the machine writes until it ends."""
        command = [
            "qemu-system-x86_64",
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-m",
            "1G",
            "-nographic",
            "-no-reboot",
        ]
        command += ["-nodefaults", "-serial", "stdio", "-nic", "none", "-kernel", str(KERNEL[-1])]
        command += [
            "-initrd",
            str(out / "initrd"),
            "-append",
            f"console=ttyS0 panic=-1 oops=panic rapha.root={hash}",
        ]
        for name in (root, "root.verity"):
            command += ["-drive", f"file={out / name},if=virtio,format=raw,readonly=on"]
        return subprocess.run(command, capture_output=True, timeout=280).stdout.decode(errors="replace")

    def test_the_root_runs_if_it_fits_its_hash(self, image: ModuleType, tmp_path: Path) -> None:
        """A changed byte of a file, another hash or none: nothing of it runs."""
        root = tree(tmp_path / "tree")
        for folder in ("bin", "sbin", "dev", "proc", "sys"):
            (root / folder).mkdir()
        shutil.copy("/bin/busybox", root / "bin")
        script = "#!/bin/busybox sh\n/bin/busybox echo ROOT IS UP; /bin/busybox cat /etc/word\n/bin/busybox poweroff -f\n"
        (root / "sbin/rapha-init").write_text(script)
        (root / "sbin/rapha-init").chmod(0o755)
        out = tmp_path / "out"
        found = image.root(root, out)
        image.initrd(out, Path("/lib/modules") / KERNEL[-1].name.removeprefix("vmlinuz-"))
        assert "ROOT IS UP\r\nward-nine" in self.boot(out, "root.erofs", found)
        data = (out / "root.erofs").read_bytes()
        (out / "changed.erofs").write_bytes(data.replace(b"ward-nine", b"ward-five"))
        assert data.count(b"ward-nine") == 1
        assert "ward-five" not in self.boot(out, "changed.erofs", found)
        for other in ("0" * 64, ""):
            assert "ROOT IS UP" not in self.boot(out, "root.erofs", other)
