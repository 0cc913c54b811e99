"""The part of `rapha-lab` for a hospital's people: their tables, what waits for them in the airlock, and opt-outs."""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from pathlib import Path
from typing import Any

from rapha_lab.protocol.errors import RequestError

__all__ = ["add_to", "passphrase"]


def add_to(commands: Any) -> None:
    """Add the commands `data`, `review` and `optout`."""
    _data_commands(commands.add_parser("data", help="a hospital's tables").add_subparsers(required=True))
    _review_parsers(commands.add_parser("review", help="what waits for custodians in a site's airlock"))
    _opt_out_parsers(commands.add_parser("optout", help="patients who opted out, at the site itself"))


def _data_commands(data: Any) -> None:
    add = data.add_parser("add", help="walk from the tables in a folder to a schema; writes NAME.toml there")
    add.add_argument("folder", type=Path)
    add.add_argument(
        "--database", default="", help="postgresql://user@host/name: its tables instead; PGPASSWORD"
    )
    add.add_argument("--answers", type=Path, help="answers written beforehand, as TOML")
    add.set_defaults(run=_add_data)
    tidy = data.add_parser(
        "tidy", help="copy a CSV with other separators, names or numbers into a Parquet file"
    )
    tidy.add_argument("file", type=Path)
    tidy.add_argument("--out", type=Path, help="the new file; beside the old one if not given")
    tidy.add_argument(
        "--dates", default="", metavar="FORM", help="how dates are written, such as %%d.%%m.%%Y"
    )
    tidy.add_argument(
        "--missing", default="", metavar="WORDS", help="what stands for not known: 'n/a; unknown'"
    )
    tidy.set_defaults(run=_tidy)
    check = data.add_parser("check", help="try a schema on the records; shows rows, for custodians alone")
    check.add_argument("schema", type=Path)
    check.add_argument("--folder", type=Path, help="the data folder; the schema's if not given")
    check.set_defaults(run=_check_data)
    snapshot = data.add_parser("snapshot", help="read a PostgreSQL database into files that never change")
    snapshot.add_argument("schema", type=Path)
    snapshot.add_argument(
        "--database", required=True, help="postgresql://user@host/name; the password is PGPASSWORD"
    )
    snapshot.add_argument("--folder", type=Path, help="the data folder; the schema's if not given")
    snapshot.set_defaults(run=_snapshot)


def _review_parsers(review: argparse.ArgumentParser) -> None:
    acts = review.add_subparsers(required=True)
    for name, words in (
        ("list", "what waits for a decision"),
        ("show", "one thing: what it is, what it asks and costs, what changed, what the checks found"),
        ("inputs", "write the tensors that a function is to be given to a file (safetensors)"),
        ("approve", "let a function run, or an answer leave"),
        ("refuse", "refuse it for good, with a reason"),
        ("veto", "end the policy at once"),
    ):
        act = acts.add_parser(name, help=words)
        act.add_argument("site", help="its address")
        if name in ("show", "inputs", "approve", "refuse"):
            act.add_argument("subject", help="or its first letters")
        if name == "inputs":
            act.add_argument("file", type=Path, help="a new one")
        if name in ("refuse", "veto"):
            act.add_argument("--reason", required=True)
        act.add_argument("--key", type=Path, required=True, help="yours, as a custodian")
        act.add_argument("--allow-simulated", action="store_true")
        act.add_argument("--measurement", action="append", default=[], help="of an enclave to trust")
        act.set_defaults(run=_review, act=name)
    sign = acts.add_parser("sign", help="sign what a console shows, in a file, without a connection")
    sign.add_argument("file", type=Path)
    sign.add_argument("--key", type=Path, required=True)
    sign.set_defaults(run=_sign)


def _opt_out_parsers(optout: argparse.ArgumentParser) -> None:
    acts = optout.add_subparsers(required=True)
    for name, words in (("add", "leave patients out from now on"), ("return", "take them back in")):
        act = acts.add_parser(name, help=words)
        act.add_argument("config", type=Path, help="the site's configuration")
        act.add_argument("dataset")
        act.add_argument(
            "patients", nargs="*", help="identifiers; or lines on standard input if there are none"
        )
        act.add_argument("--key", type=Path, required=True, help="yours, as a custodian")
        act.set_defaults(run=_opt_out, act=name)
    mends = acts.add_parser("mend", help="set aside versions that do not hold, which close the dataset")
    mends.add_argument("config", type=Path)
    mends.add_argument("--key", type=Path, required=True, help="yours, as a custodian")
    mends.set_defaults(run=_mend_opt_outs)
    listed = acts.add_parser("list", help="the versions of the lists")
    listed.add_argument("config", type=Path)
    listed.set_defaults(run=_list_opt_outs)
    which = acts.add_parser("which", help="which version a receipt names, or the log on one day")
    which.add_argument("config", type=Path)
    which.add_argument("dataset")
    which.add_argument("of", help="the receipt's job, or the day")
    which.add_argument("label")
    which.set_defaults(run=_which_opt_outs)


def _opt_out(args: argparse.Namespace) -> None:
    from rapha_lab.curator.optouts import add
    from rapha_lab.custodian.optouts import kept, strangers
    from rapha_lab.protocol.keys import PrivateKey
    from rapha_lab.protocol.schema import Schema

    people = args.patients or [line.strip() for line in sys.stdin if line.strip()]
    key = PrivateKey.load(args.key, passphrase("Your passphrase: "))
    path, ledger, salt, config = _opt_outs_of(args.config)
    served = {(schema := Schema.load(Path(each.schema))).name: (schema, each) for each in config.datasets}
    if args.dataset not in served:
        what = f"The site serves no dataset {args.dataset!r}, so that nobody was opted out."
        raise RequestError(what, f"It serves {', '.join(served)}.", "Name one of them.", field="dataset")
    _hold_custodian(args.key, str(key.public), config)
    sets = (people, []) if args.act == "add" else ([], people)
    version = add(path, args.dataset, key, salt, *sets, taken=kept(ledger))
    print(
        f"Version {version.number} of {args.dataset}: {len(people)} patient(s) {args.act}ed, from the next step on."
    )
    schema, source = served[args.dataset]
    if unknown := strangers(schema, Path(source.folder), people):
        named = ", ".join(unknown[:10]) + (" ..." if len(unknown) > 10 else "")
        print(
            f"{len(unknown)} of them are no patients of the records as they are: {named}. Spelled as there?"
        )


def _hold_custodian(file: Path, key: str, config: Any) -> set[str]:
    """The custodians' keys; refuses a key that is none of them, whose list would close the dataset."""
    from rapha_lab.protocol.policy import Policy

    custodians = {each.key for each in Policy.parse(Path(config.policy).read_text()).custodians}
    if key not in custodians:
        what = f"{file} is the key of none of the policy's custodians."
        raise RequestError(what, "Its list would close the dataset.", "Use a custodian's key.", field="key")
    return custodians


def _mend_opt_outs(args: argparse.Namespace) -> None:
    from rapha_lab.custodian.optouts import kept, mend
    from rapha_lab.protocol.keys import PrivateKey

    key = PrivateKey.load(args.key, passphrase("Your passphrase: "))
    path, ledger, _, config = _opt_outs_of(args.config)
    custodians = _hold_custodian(args.key, str(key.public), config)
    print(
        *(mend(path, key, custodians, kept(ledger)) or ["Every version holds; nothing was changed."]),
        sep="\n",
    )


def _list_opt_outs(args: argparse.Namespace) -> None:
    from datetime import UTC, datetime

    from rapha_lab.curator.optouts import versions
    from rapha_lab.custodian.optouts import kept

    path, ledger, *_ = _opt_outs_of(args.config)
    for v in {v.digest: v for v in (*kept(ledger), *versions(path))}.values():
        when = f"{datetime.fromtimestamp(v.time, UTC):%Y-%m-%d %H:%M}"
        print(
            f"{v.dataset} {v.number}: {len(v.added)} added, {len(v.returned)} returned, {when} UTC, by {v.key}"
        )


def _which_opt_outs(args: argparse.Namespace) -> None:
    from rapha_lab.curator.optouts import label, versions
    from rapha_lab.custodian.optouts import kept

    path, ledger, salt, _ = _opt_outs_of(args.config)
    numbers = {0, *(v.number for v in (*kept(ledger), *versions(path)) if v.dataset == args.dataset)}
    found = [n for n in sorted(numbers) if label(salt, args.dataset, n, args.of) == args.label]
    print(f"Version {found[0]} of {args.dataset}." if found else "No version of this site has that name.")


def _opt_outs_of(path: Path) -> tuple[Path, Path, bytes, Any]:
    """A site's opt-outs, its ledger, the secret with which identifiers are hashed, and its configuration."""
    from rapha_lab.enclave.site import Config

    config = Config.load(path)
    state = Path(config.state)
    salt = state / "split.salt"
    if not salt.exists():
        what = f"The site {config.name} was never started: {state} has no secret to hash identifiers with."
        raise RequestError(what, "", "Start it once: rapha-lab serve.", field="state")
    return state / "opt-outs", state / "ledger.sqlite", salt.read_bytes(), config


def _review(args: argparse.Namespace) -> None:
    from rapha_lab.client.custodian import Custodian, in_words
    from rapha_lab.client.site import connect
    from rapha_lab.protocol.keys import PrivateKey

    key = PrivateKey.load(args.key, passphrase("Your passphrase: "))
    site = connect(args.site, key=key, allow_simulated=args.allow_simulated, measurements=args.measurement)
    custodian = Custodian(site, key)
    if args.act == "list":
        waiting = custodian.waiting()
        if not waiting:
            print("Nothing waits.")
        for told in waiting:
            about = f"{told['kind']} of {told['project']} on {told['dataset']}, lane {told['lane']}"
            print(f"{told['subject'][:16]}  {about}: {told['missing']} of {told['mode']} to approve")
    elif args.act == "show":
        print(in_words(custodian.show(args.subject)))
    elif args.act == "inputs":
        blob = custodian.inputs(args.subject)
        with args.file.open("xb") as file:
            file.write(blob)
        print(f"Written: {args.file}, {len(blob):,} bytes, of the SHA-256 that the function names.")
    elif args.act == "veto":
        custodian.veto(args.reason)
        print("The policy is no longer in force.")
    else:
        reason = (args.reason,) if args.act == "refuse" else ()
        told = getattr(custodian, args.act)(args.subject, *reason)
        print(f"{told['subject'][:16]} is {told['state']}.")


def _sign(args: argparse.Namespace) -> None:
    from rapha_lab.client.custodian import countersign
    from rapha_lab.protocol.keys import PrivateKey

    text = args.file.read_text()
    print(countersign(text, PrivateKey.load(args.key, passphrase("Your passphrase: ")), print))


def _add_data(args: argparse.Namespace) -> None:
    from rapha_lab.custodian.add import add
    from rapha_lab.custodian.answers import File, Terminal
    from rapha_lab.custodian.check import report, unset
    from rapha_lab.custodian.snapshot import take
    from rapha_lab.protocol.schema import Schema

    asker = File(args.answers) if args.answers else Terminal()
    name, text = add(args.folder, asker, args.database)
    if isinstance(asker, File):
        asker.close()
    path = args.folder / f"{name}.toml"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RequestError(
            f"{path} exists.", "Nothing was written.", "Move it away, or choose another name.", field="name"
        ) from None
    print(f"Written: {path}. It is what researchers will see; read it before you serve it.")
    if left := unset(text):
        print("To be set before it is a schema:", *left, sep="\n  ")
        then = f"snapshot {path} --database '{args.database}'" if args.database else f"check {path}"
        print(f"Then run: rapha-lab data {then}")
    else:
        if args.database:
            take(Schema.load(path), args.database, args.folder)
        print(report(path, args.folder))


def _tidy(args: argparse.Namespace) -> None:
    from rapha_lab.custodian.tidy import tidy

    print(*tidy(args.file, args.out, args.dates, args.missing), sep="\n")


def _check_data(args: argparse.Namespace) -> None:
    from rapha_lab.custodian.check import report

    print(report(args.schema, args.folder or args.schema.parent))


def _snapshot(args: argparse.Namespace) -> None:
    from rapha_lab.custodian.snapshot import take
    from rapha_lab.protocol.schema import Schema

    told = take(Schema.load(args.schema), args.database, args.folder or args.schema.parent)
    for name, file in told.files.items():
        print(f"{name}: {file['rows']:,} rows of {file['table']}, {len(file['columns'])} columns")
    print(f"Snapshot {told.hash}, taken {told.made[:19]} UTC. Keep the hash; show it to custodians only.")
    print("The site reads it when it starts again; the budget already spent stays spent.")


def passphrase(prompt: str) -> str:
    """What RAPHA_LAB_PASSPHRASE says, or else somebody at the terminal."""
    try:
        return os.environ.get("RAPHA_LAB_PASSPHRASE") or getpass.getpass(prompt)
    except EOFError:
        raise RequestError(
            "A passphrase is needed.", "There is nobody to ask.", "Set RAPHA_LAB_PASSPHRASE."
        ) from None
