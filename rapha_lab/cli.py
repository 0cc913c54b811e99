"""`rapha-lab`: serve a site, read its tables, make keys, sign and read policies, measure a release, check a log."""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from rapha_lab.protocol.errors import RaphaError, RequestError
from rapha_lab.protocol.keys import PrivateKey, PublicKey, long_enough

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it went well, 1 with a clear line if not."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args) or 0)
    except RaphaError as error:
        said = str(error).replace("allow_simulated=True", "--allow-simulated")  # what it is called here
        print(f"{type(error).__name__}: {said}", file=sys.stderr)
    except FileNotFoundError as error:
        print(f"There is no file {error.filename}.", file=sys.stderr)
    except (OSError, UnicodeDecodeError) as error:
        told = error.strerror if isinstance(error, OSError) else "It is no text."
        print(f"{getattr(error, 'filename', None) or 'A file'}: {told}", file=sys.stderr)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    line = argparse.ArgumentParser(prog="rapha-lab", description=__doc__)
    commands = line.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run a hospital's site from its configuration")
    serve.add_argument("config", type=Path)
    serve.set_defaults(run=_serve)

    measure = commands.add_parser("measure", help="what this release's enclave measures to")
    measure.add_argument("--sign", type=Path, metavar="KEY", help="a release key: print a signed release")
    measure.add_argument("--also", nargs="+", default=[], metavar="DIGEST", help="measurements of its images")
    measure.set_defaults(run=_measure)

    keys = commands.add_parser("keys", help="researchers' and custodians' keys").add_subparsers(required=True)
    new = keys.add_parser("new", help="make a key and print its public half")
    new.add_argument("file", type=Path)
    new.set_defaults(run=_new_key)
    show = keys.add_parser("show", help="print a key's public half")
    show.add_argument("file", type=Path)
    show.set_defaults(run=_show_key)

    nonce = keys.add_parser("nonce", help="the nonce to ask your hospital's identity provider with")
    nonce.add_argument("key", help="the key's public half")
    nonce.set_defaults(run=_nonce)

    policy = commands.add_parser("policy", help="the custodians' policy").add_subparsers(required=True)
    _policy_parsers(policy)
    for name, run, words in (
        ("show", _show_policy, "the policy in plain English"),
        ("check", _check_policy, "whether it is in force, and who has not signed"),
    ):
        command = policy.add_parser(name, help=words)
        command.add_argument("policy", type=Path)
        command.set_defaults(run=run)
    for act, words in (
        ("sign", "sign it"),
        ("veto", "end it at once"),
        ("revoke", "take a researcher's key or a project out of it at once"),
    ):
        command = policy.add_parser(act, help=words)
        command.add_argument("policy", type=Path)
        command.add_argument("--key", type=Path, required=True)
        command.add_argument("--reason", default="")
        if act == "revoke":
            command.add_argument("subject")
        command.set_defaults(run=_state, act=act, subject="")

    spend = policy.add_parser(
        "spend", help="say what was released elsewhere of a split's patients; never undone"
    )
    spend.add_argument("policy", type=Path)
    spend.add_argument("--key", type=Path, required=True)
    spend.add_argument("--dataset", required=True)
    spend.add_argument("--split", required=True, choices=("train", "validation", "test"))
    spend.add_argument("--project", default="*", help="the project that had it; else none of them")
    spend.add_argument("--epsilon", type=float, help="if it was (epsilon, 0)-private")
    spend.add_argument("--rho", type=float, help="if it was rho-zCDP")
    spend.add_argument("--reason", required=True)
    spend.set_defaults(run=_spend)

    _data_commands(commands.add_parser("data", help="a hospital's tables").add_subparsers(required=True))
    demo = commands.add_parser("demo", help="the demo site's datasets").add_subparsers(required=True)
    build = demo.add_parser("build", help="build one more from the package that carries it")
    build.add_argument("name", help="support2, rhc, nafld, eunomia, clinic or flchain")
    build.set_defaults(run=_build_demo)

    _review_parsers(commands.add_parser("review", help="what waits for custodians in a site's airlock"))
    _opt_out_parsers(commands.add_parser("optout", help="patients who opted out, at the site itself"))
    made = commands.add_parser("dossier", help="all an output checker needs of a kept model, in one folder")
    made.add_argument("model", type=Path, help="as rapha.keep wrote it, the site's log beside it")
    made.add_argument("--folder", type=Path, help="a new one; MODEL.dossier if not given")
    made.set_defaults(run=_write_dossier)
    _log_commands(commands.add_parser("log", help="a site's transparency log").add_subparsers(required=True))
    witness = commands.add_parser("witness", help="check that a log extends what was seen of it, and cosign")
    witness.add_argument("what", help='a bundle, "demo" or an address')
    witness.add_argument("--key", type=Path, help="your key")
    witness.add_argument("--name", default="", help="yours as a witness, such as ethics.hospital.example")
    witness.add_argument("--out", type=Path, help="write the cosigned checkpoint to this file")
    witness.add_argument("--allow-simulated", action="store_true")
    witness.set_defaults(run=_witness)
    return line


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


def _log_commands(log: Any) -> None:
    fetch = log.add_parser("fetch", help="write the whole log to a bundle")
    fetch.add_argument("site", help='"demo" or an address')
    fetch.add_argument("bundle", type=Path)
    fetch.add_argument("--key", type=Path, help="your key, for a hospital's site")
    fetch.add_argument("--allow-simulated", action="store_true")
    fetch.set_defaults(run=_fetch_log)
    verify = log.add_parser(
        "verify", help="check a bundle offline, and name the first entry that does not hold"
    )
    verify.add_argument("bundle", type=Path)
    verify.add_argument("--key", help="the site's public key as you know it from elsewhere")
    verify.add_argument("--against", type=Path, nargs="+", default=[], help="what others hold of this log")
    verify.add_argument("--witness", nargs="+", default=[], metavar="VKEY", help="who must have cosigned")
    verify.set_defaults(run=_verify_log)
    prove = log.add_parser("prove", help="write one entry of a bundle and its proof, as files of their own")
    prove.add_argument("bundle", type=Path)
    prove.add_argument("index", type=int)
    prove.add_argument("entry", type=Path, help="the entry's file; the proof gets .tlog-proof appended")
    prove.set_defaults(run=_prove_entry)
    check = log.add_parser("check", help="check an entry against the proof beside it, offline")
    check.add_argument("entry", type=Path)
    check.add_argument("--key", required=True, help="the site's public key")
    check.set_defaults(run=_check_entry)


def _review_parsers(review: argparse.ArgumentParser) -> None:
    acts = review.add_subparsers(required=True)
    for name, words in (
        ("list", "what waits for a decision"),
        ("show", "one thing: what it is, what it asks and costs, what changed, what the checks found"),
        ("approve", "let a function run, or an answer leave"),
        ("refuse", "refuse it for good, with a reason"),
        ("veto", "end the policy at once"),
    ):
        act = acts.add_parser(name, help=words)
        act.add_argument("site", help="its address")
        if name in ("show", "approve", "refuse"):
            act.add_argument("subject", help="or its first letters")
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
    from rapha_lab.protocol.keys import PrivateKey

    people = args.patients or [line.strip() for line in sys.stdin if line.strip()]
    key = PrivateKey.load(args.key, _passphrase("Your passphrase: "))
    _hold_opt_out(args, str(key.public))
    path, salt = _opt_outs_of(args.config)
    sets = (people, []) if args.act == "add" else ([], people)
    version = add(path, args.dataset, key, salt, *sets)
    print(
        f"Version {version.number} of {args.dataset}: {len(people)} patient(s) {args.act}ed, from the next step on."
    )


def _hold_opt_out(args: argparse.Namespace, key: str) -> None:
    """Refuse a list that would apply to nothing, or that would close the dataset."""
    from rapha_lab.enclave.site import Config
    from rapha_lab.protocol.policy import Policy
    from rapha_lab.protocol.schema import Schema

    config = Config.load(args.config)
    served = [Schema.load(Path(each.schema)).name for each in config.datasets]
    if args.dataset not in served:
        what = f"The site serves no dataset {args.dataset!r}, so that nobody was opted out."
        raise RequestError(what, f"It serves {', '.join(served)}.", "Name one of them.", field="dataset")
    if key not in {each.key for each in Policy.parse(Path(config.policy).read_text()).custodians}:
        what = f"{args.key} is the key of none of the policy's custodians."
        raise RequestError(what, "Its list would close the dataset.", "Use a custodian's key.", field="key")


def _list_opt_outs(args: argparse.Namespace) -> None:
    from datetime import UTC, datetime

    from rapha_lab.curator.optouts import versions

    for v in versions(_opt_outs_of(args.config)[0]):
        when = f"{datetime.fromtimestamp(v.time, UTC):%Y-%m-%d %H:%M}"
        print(
            f"{v.dataset} {v.number}: {len(v.added)} added, {len(v.returned)} returned, {when} UTC, by {v.key}"
        )


def _which_opt_outs(args: argparse.Namespace) -> None:
    from rapha_lab.curator.optouts import label, versions

    path, salt = _opt_outs_of(args.config)
    numbers = [0, *(v.number for v in versions(path) if v.dataset == args.dataset)]
    found = [n for n in numbers if label(salt, args.dataset, n, args.of) == args.label]
    print(f"Version {found[0]} of {args.dataset}." if found else "No version of this site has that name.")


def _opt_outs_of(config: Path) -> tuple[Path, bytes]:
    """The file of a site's opt-outs, and the secret with which identifiers are hashed."""
    from rapha_lab.enclave.site import Config

    state = Path(Config.load(config).state)
    return state / "opt-outs", (state / "split.salt").read_bytes()


def _write_dossier(args: argparse.Namespace) -> None:
    import json

    from rapha_lab.client.dossier import write

    folder = write(args.model, args.folder or args.model.with_suffix(".dossier"))
    words = {True: "holds", False: "DOES NOT HOLD", None: "not tried"}
    for told in json.loads((folder / "dossier.json").read_text())["criteria"]:
        print(f"{words[told['holds']]:<14} {told['criterion']}")
    print(f"Written to {folder}: dossier.json, dossier.html, ro-crate-metadata.json.")


def _review(args: argparse.Namespace) -> None:
    from rapha_lab.client.custodian import Custodian, in_words
    from rapha_lab.client.site import connect
    from rapha_lab.protocol.keys import PrivateKey

    key = PrivateKey.load(args.key, _passphrase("Your passphrase: "))
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
    print(countersign(text, PrivateKey.load(args.key, _passphrase("Your passphrase: ")), print))


def _policy_parsers(policy: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from rapha_lab.client.drafting import QUESTIONS

    new = policy.add_parser(
        "new", help="write a page from a few answers, for the custodians to read and sign"
    )
    new.add_argument("policy", type=Path)
    for name, question in QUESTIONS.items():
        new.add_argument(f"--{name.replace('_', '-')}", dest=name, help=question)
    new.add_argument("--defaults", action="store_true", help="ask nothing: take what is proposed")
    new.set_defaults(run=_new_policy)
    diff = policy.add_parser("diff", help="what a new version changes, in plain English")
    diff.add_argument("old", type=Path)
    diff.add_argument("new", type=Path)
    diff.set_defaults(run=_diff_policy)


def _new_policy(args: argparse.Namespace) -> None:
    from rapha_lab.client.drafting import QUESTIONS, ask
    from rapha_lab.client.policies import plain_english
    from rapha_lab.protocol.errors import RequestError

    given = {name: getattr(args, name) for name in QUESTIONS if getattr(args, name) is not None}
    draft = ask(given, (lambda question: "") if args.defaults else input)
    page = draft.page()
    try:
        with args.policy.open("x") as file:
            file.write(page.text)
    except FileExistsError:
        raise RequestError(
            f"{args.policy} exists.", "A page is never written over.", "Give another name."
        ) from None
    print(plain_english(page))
    print(f"Written to {args.policy}. Each custodian: rapha-lab policy sign {args.policy} --key THEIR.key")


def _diff_policy(args: argparse.Namespace) -> None:
    from rapha_lab.client.policies import diff
    from rapha_lab.protocol.policy import Policy

    lines = diff(Policy.parse(args.old.read_text()), Policy.parse(args.new.read_text()))
    print(*(lines or ["They say the same."]), sep="\n")


def _fetch_log(args: argparse.Namespace) -> None:
    from rapha_lab.client.logs import fetch

    print(f"{fetch(_connected(args.site, args), args.bundle)} entries written to {args.bundle}.")


def _connected(where: str, args: argparse.Namespace) -> Any:
    from rapha_lab.client.site import connect

    passphrase = _passphrase("Your passphrase: ") if args.key else None
    return connect(where, key=args.key, passphrase=passphrase, allow_simulated=args.allow_simulated)


def _verify_log(args: argparse.Namespace) -> None:
    from rapha_lab.client.logs import summary, verify

    audit = verify(args.bundle, args.key, against=args.against, witnesses=args.witness)
    print(*summary(audit), sep="\n")
    if args.key is None:
        print("The key is the bundle's own: compare it with the one your site publishes.")
    if not args.against:
        print("That the site showed nobody another log is only known with --against what others hold.")


def _prove_entry(args: argparse.Namespace) -> None:
    from rapha_lab.client.bundles import prove
    from rapha_lab.client.logs import verify
    from rapha_lab.client.proofs import write_proof

    verify(args.bundle)
    proved, beside = prove(args.bundle, args.index), Path(f"{args.entry}.tlog-proof")
    args.entry.write_bytes(proved.entry)
    beside.write_text(write_proof(proved))
    print(f"Written: {args.entry} and {beside}.")


def _check_entry(args: argparse.Namespace) -> None:
    from rapha_lab.client.proofs import open_proof
    from rapha_lab.protocol.keys import signing_key

    proof = Path(f"{args.entry}.tlog-proof").read_text()
    head = open_proof(proof, args.entry.read_bytes(), signing_key(args.key))
    print(f"It is in the log {head.origin} of {head.size} entries.")


def _witness(args: argparse.Namespace) -> None:
    from rapha_lab.client import witness
    from rapha_lab.client.logs import cosign_bundle

    if Path(args.what).is_file():
        if args.key is None:
            raise RequestError("A witness signs.", "No key was given.", "--key FILE", field="key")
        key = PrivateKey.load(args.key, _passphrase("Your passphrase: "))
        note = cosign_bundle(args.what, key, args.name)
    else:
        channel = _connected(args.what, args)._channel
        key, head = channel.key, witness.witness(channel, args.name)
        note = str(witness.last_seen(head.origin, str(channel.site_key)))
    (args.out.write_text if args.out else print)(note)
    name = args.name or witness.witness_name(key.public)
    print(f"Others check your cosignature with --witness {witness.verifier_key(name, key.public)}")


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


def _build_demo(args: argparse.Namespace) -> None:
    from rapha_lab.client.demo import folder
    from rapha_lab.demo.build import build, provenance

    print(provenance(build(folder() / "data", args.name)))
    print("The demo site serves it from its next start.")


def _serve(args: argparse.Namespace) -> None:
    from rapha_lab.enclave.site import Config, Site, serve

    site = Site(Config.load(args.config))
    if site.simulated:
        print("SIMULATED ENCLAVE: no hardware protects this site.", file=sys.stderr)
    serve(site, lambda url: print(f"{site.config.name} answers at {url} (sandbox {site.tier}).", flush=True))


def _measure(args: argparse.Namespace) -> None:
    from rapha_lab.enclave.attester import measure
    from rapha_lab.protocol.builds import Build

    if args.sign is None:
        return print(measure())
    key = PrivateKey.load(args.sign, _passphrase("The release key's passphrase: "))
    build = Build.sign(metadata.version("rapha-lab"), [measure(), *args.also], key)
    print(msgspec.json.encode(build).decode())


def _passphrase(prompt: str) -> str:
    try:
        return os.environ.get("RAPHA_LAB_PASSPHRASE") or getpass.getpass(prompt)
    except EOFError:
        raise RequestError(
            "A passphrase is needed.", "There is nobody to ask.", "Set RAPHA_LAB_PASSPHRASE."
        ) from None


def _new_key(args: argparse.Namespace) -> None:
    key = PrivateKey.create()
    if args.file.exists():
        raise RequestError(
            f"{args.file} exists.", "A key is never written over.", "Give another name.", field="file"
        )
    passphrase = long_enough(_passphrase("A passphrase for it, 10 characters or more: "))
    if _passphrase("Once more: ") != passphrase:
        raise RequestError("The two differ.", "A key whose passphrase is a slip is lost.", "Try again.")
    key.save(args.file, passphrase)
    print(key.public)


def _nonce(args: argparse.Namespace) -> None:
    from rapha_lab.enclave.identity import token_nonce

    print(token_nonce(str(PublicKey.parse(args.key))))


def _show_key(args: argparse.Namespace) -> None:
    print(PrivateKey.load(args.file, _passphrase("Its passphrase: ")).public)


def _show_policy(args: argparse.Namespace) -> None:
    from rapha_lab.client.policies import plain_english
    from rapha_lab.protocol.policy import Policy

    print(plain_english(Policy.parse(args.policy.read_text())))


def _check_policy(args: argparse.Namespace) -> None:
    from rapha_lab.protocol.policy import Signed

    policy = Signed.load(args.policy).check()
    print(f"{policy.head.name}, version {policy.head.version}, is in force until {policy.head.expires}.")


def _state(args: argparse.Namespace) -> None:
    from rapha_lab.client.policies import plain_english
    from rapha_lab.protocol.policy import Policy, state

    policy = Policy.parse(args.policy.read_text())
    print(plain_english(policy))
    key = PrivateKey.load(args.key, _passphrase("Your passphrase: "))
    custodian = str(key.public) in {each.key for each in policy.custodians}
    if args.act != "sign" and not custodian:
        what = f"{args.key} is the key of none of this page's custodians."
        raise RequestError(what, f"Its {args.act} would not count.", "Use a custodian's key.", field="key")
    subjects = {name for each in policy.projects for name in (each.name, *each.researchers)}
    if args.act == "revoke" and args.subject not in subjects:
        what = f"The page names no project and no researcher {args.subject!r}, so that nothing was revoked."
        raise RequestError(
            what, f"It names {', '.join(sorted(subjects))}.", "Give one of them.", field="subject"
        )
    said = state(args.act, policy, key, args.subject, args.reason)
    with Path(f"{args.policy}.signatures").open("ab") as file:
        file.write(msgspec.json.encode(said) + b"\n")
    print(f"Written to {args.policy}.signatures: {args.act}, by {key.public}.")
    if not custodian:
        print(
            "It is the key of none of this page's custodians: it counts only if it is one of the page before."
        )
    print(f"What is missing, if anything: rapha-lab policy check {args.policy}")


def _spend(args: argparse.Namespace) -> None:
    from rapha_lab.protocol.keys import PrivateKey
    from rapha_lab.protocol.policy import Policy
    from rapha_lab.protocol.spend import spend

    key = PrivateKey.load(args.key, _passphrase("Your passphrase: "))
    where = args.project, args.dataset, args.split, args.reason
    said = spend(key, *where, epsilon=args.epsilon, rho=args.rho)
    said.check(Policy.parse(args.policy.read_text()))
    with Path(f"{args.policy}.spends").open("ab") as file:
        file.write(msgspec.json.encode(said) + b"\n")
    print(f"Written to {args.policy}.spends, by {key.public}. It holds from the site's next answer on.")


if __name__ == "__main__":
    sys.exit(main())
