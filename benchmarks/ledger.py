"""How long the ledger takes with a million entries in its log: to open, to reserve and settle, to state and quote.

    python benchmarks/ledger.py [entries] [folder]

The figures depend on the disk's fsync, so the time of a bare one on the same disk stands beside them. The million
entries are written in one transaction, by the statements that the ledger itself uses.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rapha_lab.curator.accounting import Gaussian, encode_loss, units
from rapha_lab.curator.ledger import ALL, Ledger

KEY = Ed25519PrivateKey.generate()
LOSS = Gaussian(2e4)
WHERE = ("p", "ward", ["train"])


def fill(path: Path, entries: int) -> None:
    """A ledger with so many entries: half as many settled jobs, each charged to a project and to the cap."""
    ledger = Ledger(path, KEY)
    for project, epsilon in (("p", 900.0), (ALL, 1000.0)):
        ledger.open_account(project, "ward", "train", epsilon, 1e-6)
    text, release = encode_loss(LOSS), b'{"values":{"value":1.0}}' * 4
    with ledger._transaction() as db:
        accounts = ledger._charged_to(*WHERE)
        spent = {account.label: account.spent for account in accounts}
        for number in range(entries // 2):
            job = f"{number:032x}-{number:08x}"
            row = job, b"%032d" % number, b"basis", text, release, ledger.log.size() + 1
            db.execute("INSERT INTO job VALUES (?, 'settled', ?, ?, ?, 1, ?, x'', ?)", row)
            heads = {}
            for account in accounts:
                price = units(LOSS, account.alpha)
                spent[account.label] += price
                heads[account.label] = {
                    "alpha": account.alpha,
                    "charged": price,
                    "spent": spent[account.label],
                }
                db.execute("INSERT INTO charge VALUES (?, ?, ?, 0)", (account.number, job, price))
            told = {"job": job, "accounts": heads, "loss": text}
            ledger.log.append(db, "reserve", told | {"request": "0" * 64})
            ledger.log.append(db, "charge", told | {"release": "0" * 64, "steps": 1})
    ledger.close()


def timed(act: Callable[[], object], times: int) -> float:
    """Median milliseconds."""
    took = []
    for _ in range(times):
        begun = time.perf_counter()
        act()
        took.append(1000 * (time.perf_counter() - begun))
    return statistics.median(took)


def bare(folder: Path) -> Callable[[], None]:
    """One write and fsync of a page."""
    fd = os.open(folder / "bare", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def act() -> None:
        os.write(fd, bytes(4096))
        os.fsync(fd)

    return act


def main() -> None:
    """Print the table."""
    entries = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as name:
        path = Path(name) / "ledger.sqlite"
        begun = time.perf_counter()
        fill(path, entries)
        print(
            f"{entries:,} entries, {path.stat().st_size / 1e6:,.0f} MB, in {time.perf_counter() - begun:.0f} s"
        )
        opened = timed(lambda: Ledger(path, KEY).close(), 5)
        ledger, jobs = Ledger(path, KEY), iter(range(10**9))

        def job() -> None:
            name = f"new-{next(jobs)}"
            ledger.reserve(name, *WHERE, LOSS, name.encode().ljust(32))
            ledger.touch(name, 1)
            ledger.settle(name, b"{}" * 50)

        def reserve_and_settle() -> float:
            name = f"new-{next(jobs)}"
            begun = time.perf_counter()
            ledger.reserve(name, *WHERE, LOSS, name.encode().ljust(32))
            took = time.perf_counter() - begun
            ledger.touch(name, 1)
            begun = time.perf_counter()
            ledger.settle(name, b"{}" * 50)
            return 1000 * (took + time.perf_counter() - begun)

        rows = {
            "a bare write and fsync": timed(bare(Path(name)), 200),
            "open": opened,
            "reserve and settle": statistics.median(reserve_and_settle() for _ in range(200)),
            "reserve, touch and settle": timed(job, 200),
            "ask again": timed(lambda: ledger.settled(b"%032d" % 7, b"basis"), 50),
            "statement": timed(lambda: ledger.statement("p", "ward", "train"), 3),
            "quote": timed(lambda: ledger.quote("p", "ward", "train", LOSS), 3),
        }
        ledger.close()
    for what, milliseconds in rows.items():
        print(f"{what:<28} {milliseconds:>10.2f} ms")


if __name__ == "__main__":
    main()
