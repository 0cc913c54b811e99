"""Builds the confidential VM's image from files, the same bytes from the same files, and says what it measures to.

    python deploy/image.py lock REPORT                          requirements with hashes, from pip's report
    python deploy/image.py root TREE OUT                        OUT/root.erofs, OUT/root.verity; prints the root hash
    python deploy/image.py initrd OUT --kernel-modules DIR      OUT/initrd
    python deploy/image.py measure OUT --ovmf F --kernel F --cpus 2 4 8    OUT/image.json: every launch digest

What each step needs of Debian: erofs-utils and cryptsetup-bin (root), busybox-static and cryptsetup-bin (initrd),
the Python package sev-snp-measure (measure). Nothing here touches the network. See README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).parent
UUID = "5a7e0000-0000-4000-8000-000000000000"
SALT = "00" * 32  # a salt hides equal images from each other, which nobody needs here
MODULES = (
    "virtio_pci", "virtio_blk", "virtio_net", "dm-verity", "dm-crypt", "erofs", "nf_tables", "nft_ct", "sev-guest", "tsm",
)  # fmt: skip
PROGRAMS = ("/bin/busybox", "/sbin/veritysetup")
COMMAND_LINE = "console=ttyS0 panic=-1 oops=panic lockdown=confidentiality rapha.root={root}"


def lock(report: dict[str, object]) -> list[str]:
    """Requirements with versions and hashes, out of `pip install --dry-run --report`; a wheel given by hand is not one."""
    lines = []
    for item in (each for each in report["install"] if not each["is_direct"]):  # type: ignore[attr-defined]
        name, version = (item["metadata"][field] for field in ("name", "version"))
        digest = item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if digest is None:
            raise SystemExit(f"{name} has no hash: it is no archive.")
        lines.append(f"{name.lower()}=={version} --hash=sha256:{digest}")
    return sorted(lines)


def root(tree: Path, out: Path) -> str:
    """Pack a folder as a read-only file system with a hash tree; gives the hash that stands for all of it."""
    out.mkdir(parents=True, exist_ok=True)
    image, hashes = out / "root.erofs", out / "root.verity"
    for old in (image, hashes):
        old.unlink(missing_ok=True)
    _run(_tool("mkfs.erofs"), "-T0", "-U", UUID, "--all-root", "--quiet", image, tree)
    told = _run(_tool("veritysetup"), "format", f"--salt={SALT}", f"--uuid={UUID}", image, hashes)
    found = re.search(r"^Root hash:\s+([0-9a-f]{64})$", told, re.M)
    if found is None:
        raise SystemExit("veritysetup gave no root hash.")
    (out / "root.hash").write_text(found[1] + "\n")
    return found[1]


def initrd(out: Path, modules: Path | None, programs: Sequence[str] = PROGRAMS) -> Path:
    """Write the first programs of the machine: they open the root by its hash, or end the machine."""
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, tuple[int, bytes]] = {"init": (0o755, (HERE / "init").read_bytes())}
    for program in programs:
        for path in _closure(Path(program)):
            files[str(path).lstrip("/")] = (0o755, path.read_bytes())
    order = list(_modules(modules)) if modules else []
    for path in order:
        files[f"modules/{path.name}"] = (0o644, path.read_bytes())
    files["modules/order"] = (0o644, "".join(f"{path.name}\n" for path in order).encode())
    path = out / "initrd"
    path.write_bytes(cpio(files))
    return path


def cpio(files: dict[str, tuple[int, bytes]]) -> bytes:
    """An archive in the form "newc" that the kernel reads, with its folders; no owner, time or order of its own."""
    entries: dict[str, tuple[int, bytes]] = {}
    for name in ("dev", "proc", "sys", "newroot", "run"):
        entries[name] = (stat.S_IFDIR | 0o755, b"")
    for name, (mode, data) in files.items():
        for parent in list(Path(name).parents)[:-1]:
            entries[str(parent)] = (stat.S_IFDIR | 0o755, b"")
        entries[name] = (stat.S_IFREG | mode, data)
    parts = [_entry(n, name, *entries[name]) for n, name in enumerate(sorted(entries), 1)]
    return b"".join([*parts, _entry(0, "TRAILER!!!", 0, b"")])


def _entry(number: int, name: str, mode: int, data: bytes) -> bytes:
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return _aligned(head) + _aligned(data)


def _aligned(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _closure(program: Path) -> Iterator[Path]:
    """A program and the libraries it is linked with, each under the path by which it is looked for."""
    yield program
    told = subprocess.run(["ldd", program], capture_output=True, text=True).stdout  # noqa: S603, S607
    for found in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", told, re.M):
        yield Path(found)


def _modules(folder: Path) -> Iterator[Path]:
    """The kernel modules that the initrd loads, each after those it needs."""
    needs = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[path] = others.split()
    wanted = [
        path
        for name in MODULES
        for path in needs
        if Path(path).name.split(".")[0].replace("_", "-") == name.replace("_", "-")
    ]
    done: dict[str, None] = {}
    for path in wanted:
        for needed in [*reversed(needs[path]), path]:
            done.setdefault(needed)
    for path in done:
        yield folder / path


def measure(
    out: Path, ovmf: Path, kernel: Path, cpus: Iterable[int], types: Iterable[str]
) -> dict[str, object]:
    """What the machine measures to under SEV-SNP, for each number and type of virtual processors."""
    from sevsnpmeasure import vcpu_types
    from sevsnpmeasure.guest import snp_calc_launch_digest

    line = COMMAND_LINE.format(root=(out / "root.hash").read_text().strip())
    digests = {}
    for kind in types:
        for count in cpus:
            files = str(ovmf), str(kernel), str(out / "initrd")
            digest = snp_calc_launch_digest(count, vcpu_types.CPU_SIGS[kind], *files, line, 0x1, "")
            digests[f"{kind} x {count}"] = f"sha384:{digest.hex()}"
    told = {"command line": line, "measurements": digests}
    (out / "image.json").write_text(json.dumps(told, indent=2) + "\n")
    return told


def _tool(name: str) -> str:
    for folder in (*os.environ.get("PATH", "").split(os.pathsep), "/usr/sbin", "/sbin"):
        if os.access(path := os.path.join(folder, name), os.X_OK):
            return path
    raise SystemExit(f"{name} is not installed: see deploy/README.md.")


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one step."""
    line = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = line.add_subparsers(required=True, dest="step")
    steps.add_parser("lock").add_argument("report", type=Path)
    one = steps.add_parser("root")
    one.add_argument("tree", type=Path)
    one.add_argument("out", type=Path)
    one = steps.add_parser("initrd")
    one.add_argument("out", type=Path)
    one.add_argument("--kernel-modules", type=Path, help="such as TREE/lib/modules/VERSION")
    one = steps.add_parser("measure")
    one.add_argument("out", type=Path)
    one.add_argument("--ovmf", type=Path, required=True, help="built as AmdSevX64, with kernel hashes")
    one.add_argument("--kernel", type=Path, required=True)
    one.add_argument("--cpus", type=int, nargs="+", default=[2, 4, 8, 16])
    one.add_argument("--types", nargs="+", default=["EPYC-v4"], help="as given to QEMU's -cpu")
    args = line.parse_args(arguments)
    if args.step == "lock":
        print("\n".join(lock(json.loads(args.report.read_text()))))
    elif args.step == "root":
        print(root(args.tree, args.out))
    elif args.step == "initrd":
        print(initrd(args.out, args.kernel_modules))
    else:
        told = measure(args.out, args.ovmf, args.kernel, args.cpus, args.types)
        print(*told["measurements"].values(), sep="\n")  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
