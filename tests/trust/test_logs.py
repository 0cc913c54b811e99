"""A log as a regulator gets it: one file, verified offline, in which nothing can be changed unnoticed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PublicKey
from trust_material import DEEP

from rapha_lab.cli import main
from rapha_lab.client import bundles, logs
from rapha_lab.client.bundles import prove
from rapha_lab.client.cosignatures import cosign, cosigned_at, verifier_keys, witness_name
from rapha_lab.client.logs import cosign_bundle, verify
from rapha_lab.client.proofs import open_proof, write_proof
from rapha_lab.client.witness import last_seen
from rapha_lab.curator.accounting import Gaussian, Thresholded
from rapha_lab.curator.ledger import Ledger
from rapha_lab.protocol.builds import KIND, Build
from rapha_lab.protocol.checkpoint import Checkpoint, root_of, sign_checkpoint
from rapha_lab.protocol.errors import LogError
from rapha_lab.protocol.keys import PrivateKey

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = str(PrivateKey("ed25519", (KEY,)).public)
WITNESS = PrivateKey("ed25519", (Ed25519PrivateKey.from_private_bytes(bytes([9]) * 32),))
MEASUREMENT = "sha256:" + "ab" * 32
TAMPERINGS = 10_000 if DEEP else 300


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a witness remembers is of this test alone."""
    monkeypatch.setenv("RAPHA_LAB_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[bytes, str]]:
    """The entries of a ledger's log and the log's signatures: settled, abandoned and open jobs, a build, a policy."""
    ledger = Ledger(tmp_path_factory.mktemp("ledger") / "ledger.sqlite", KEY, origin="ward")
    ledger.open_account("p", "d", "train", 3.0, 1e-5)
    ledger.record("policy", hash="00" * 32)
    ledger.record(KIND, version="1", measurements=[MEASUREMENT], signer="", signature="")
    for job in ("settled", "abandoned", "open", "second", "third"):
        ledger.reserve(job, "p", "d", ["train"], Gaussian(20.0), bytes(32))
        ledger.record("cell", source="00" * 32, project="p", researcher="r")
    for job in ("settled", "second", "third"):
        ledger.touch(job, 1)
        ledger.settle(job, b"release")
    ledger.abandon("abandoned", "cancelled")
    found = ledger.log.signed(0, 10**6)
    ledger.close()
    return found


def head(bodies: list[bytes], origin: str = "ward", key: Ed25519PrivateKey = KEY) -> str:
    """The checkpoint over `bodies`."""
    return sign_checkpoint(Checkpoint(origin, len(bodies), root_of(bodies)), key)


def signed(bodies: list[bytes], key: Ed25519PrivateKey = KEY) -> list[tuple[bytes, str]]:
    """`bodies` with the signatures that the site itself would give."""
    notes = [head(bodies[: number + 1], key=key) for number in range(len(bodies))]
    return list(zip(bodies, (note.rsplit(" ", 1)[1].strip() for note in notes), strict=True))


def write(path: Path, pairs: list[tuple[bytes, str]], note: str, key: str = PUBLIC) -> Path:
    """A bundle of `pairs` under `note`."""
    lines = [json.dumps({"checkpoint": note, "key": key})]
    lines += [json.dumps([body.decode(), code]) for body, code in pairs]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def bundle(tmp_path: Path, pairs: list[tuple[bytes, str]]) -> Path:
    """The honest bundle."""
    return write(tmp_path / "bundle.jsonl", pairs, head([body for body, _ in pairs]))


class TestHonest:
    def test_it_verifies_and_its_books_are_told(self, bundle: Path) -> None:
        """Jobs, kinds, builds and what each account spent come out of the log alone."""
        audit = verify(bundle, PUBLIC)
        assert audit.jobs == {
            "settled": "charge", "abandoned": "abandon", "open": "reserve", "second": "charge", "third": "charge",
        }  # fmt: skip
        account = audit.accounts["p/d/train"]
        assert account["spent"] == 4 * next(iter(account["open"].values()))
        assert audit.builds == [Build(version="1", measurements=[MEASUREMENT])]

    def test_the_log_signs_as_the_definition_says(self, pairs: list[tuple[bytes, str]]) -> None:
        """Each stored-subtree signature is that over the root of all entries up to this one."""
        assert pairs == signed([body for body, _ in pairs])

    def test_every_entry_has_a_proof_of_its_own(self, bundle: Path, pairs: list[tuple[bytes, str]]) -> None:
        """In C2SP's form, which verifies without the bundle, for this entry and no other."""
        for index, (body, _) in enumerate(pairs):
            text = write_proof(prove(bundle, index))
            assert text.startswith(f"c2sp.org/tlog-proof@v1\nindex {index}\n")
            assert open_proof(text, body, KEY.public_key(), "ward").size == len(pairs)
            with pytest.raises(LogError):
                open_proof(text, body + b" ", KEY.public_key())

    def test_the_form_of_a_proof_is_the_published_one(
        self, bundle: Path, pairs: list[tuple[bytes, str]]
    ) -> None:
        """First line, index, hashes, an empty line, the checkpoint verbatim; extra data is passed over."""
        text = write_proof(prove(bundle, 3))
        first, index, rest = text.split("\n", 2)
        hashes, note = rest.split("\n\n", 1)
        assert (first, index, len(hashes.split("\n"))) == ("c2sp.org/tlog-proof@v1", "index 3", 5)
        assert note == head([body for body, _ in pairs])
        extra = f"{first}\nextra AAAA\n{index}\n{rest}"
        assert open_proof(extra, pairs[3][0], KEY.public_key()).origin == "ward"

    def test_no_altered_proof_verifies(self, bundle: Path, pairs: list[tuple[bytes, str]]) -> None:
        """One character anywhere in it."""
        text, rng = write_proof(prove(bundle, 3)), random.Random(3)
        for at in range(len(text)):
            changed = text[:at] + rng.choice("abcXYZ0189") + text[at + 1 :]
            if changed != text:
                with pytest.raises(LogError):
                    open_proof(changed, pairs[3][0], KEY.public_key())

    def test_another_machine_needs_the_bundle_only(self, bundle: Path, tmp_path: Path) -> None:
        """An empty folder, an empty home, no network, one command; and one that fails where an entry was changed."""
        alone = tmp_path / "regulator"
        alone.mkdir()
        shutil.copy(bundle, alone / "log.jsonl")
        command = [sys.executable, "-I", "-m", "rapha_lab.cli", "log", "verify", "log.jsonl", "--key", PUBLIC]
        if shutil.which("unshare") and os.geteuid() == 0:
            command = ["unshare", "--net", *command]
        env = {"HOME": str(alone), "PATH": os.environ["PATH"]}
        done = subprocess.run(command, cwd=alone, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "entries of the log ward hold" in done.stdout
        assert f"Enclave 1 ran, signed by nobody: {MEASUREMENT}." in done.stdout
        lines = (alone / "log.jsonl").read_text().splitlines()
        at = next(n for n, line in enumerate(lines) if "settled" in line)
        lines[at] = lines[at].replace("settled", "sett1ed")
        (alone / "log.jsonl").write_text("\n".join(lines) + "\n")
        done = subprocess.run(command, cwd=alone, env=env, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"Entry {at - 1} is the first that does not hold" in done.stderr


Pairs = list[tuple[bytes, str]]


def _edit(rng: random.Random, pairs: Pairs) -> tuple[Pairs, int]:
    at = rng.randrange(len(pairs))
    body = bytearray(pairs[at][0])
    where = rng.randrange(len(body))
    body[where] = ord(rng.choice([c for c in "abcdefghijkl0123456789" if ord(c) != body[where]]))
    return [*pairs[:at], (bytes(body), pairs[at][1]), *pairs[at + 1 :]], at


def _drop(rng: random.Random, pairs: Pairs) -> tuple[Pairs, int]:
    at = rng.randrange(len(pairs))
    return [*pairs[:at], *pairs[at + 1 :]], at


def _truncate(rng: random.Random, pairs: Pairs) -> tuple[Pairs, int]:
    at = rng.randrange(len(pairs))
    return pairs[:at], at


def _swap(rng: random.Random, pairs: Pairs) -> tuple[Pairs, int]:
    a, b = sorted(rng.sample(range(len(pairs)), 2))
    moved = list(pairs)
    moved[a], moved[b] = moved[b], moved[a]
    return moved, a


def _insert(rng: random.Random, pairs: Pairs) -> tuple[Pairs, int]:
    at = rng.randrange(len(pairs) + 1)
    return [*pairs[:at], rng.choice(pairs), *pairs[at:]], at


def _move(rng: random.Random, pairs: Pairs) -> tuple[Pairs, int]:
    a, b = rng.sample(range(len(pairs)), 2)
    moved = list(pairs)
    moved.insert(b, moved.pop(a))
    return moved, min(a, b)


def _unsign(rng: random.Random, pairs: Pairs) -> tuple[Pairs, int]:
    at = rng.randrange(len(pairs))
    return [*pairs[:at], (pairs[at][0], pairs[at - 1][1]), *pairs[at + 1 :]], at


def _replace(rng: random.Random, pairs: Pairs) -> tuple[Pairs, int]:
    """Everything from an entry on is another history, well signed by a key of the forger's own."""
    at = rng.randrange(len(pairs))
    other = Ed25519PrivateKey.from_private_bytes(bytes([7]) * 32)
    bodies = [*(body for body, _ in pairs[:at]), *(b'{"kind":"cell"}' for _ in pairs[at:])]
    codes = [head(bodies[: n + 1], key=other).rsplit(" ", 1)[1].strip() for n in range(len(bodies))]
    return [*pairs[:at], *zip(bodies[at:], codes[at:], strict=True)], at


HOWS: list[Callable[[random.Random, Pairs], tuple[Pairs, int]]] = [
    _edit, _drop, _truncate, _swap, _insert, _move, _unsign, _replace,
]  # fmt: skip


class TestTampered:
    def test_the_first_bad_entry_is_named(self, pairs: Pairs, tmp_path: Path) -> None:
        """Edited, dropped, cut, swapped, doubled, moved, unsigned, rewritten: 300 logs, 10,000 in a deep run."""
        rng, honest, path = random.Random(11), head([body for body, _ in pairs]), tmp_path / "bad.jsonl"
        done = 0
        while done < TAMPERINGS:
            how = HOWS[done % len(HOWS)]
            changed, first = how(rng, pairs)
            if changed == pairs:
                continue
            while first < min(len(changed), len(pairs)) and changed[first] == pairs[first]:
                first += 1  # a doubled entry beside its like is bad from the next one on
            write(path, changed, honest)
            with pytest.raises(LogError, match=f"^Entry {first} is the first that does not hold"):
                verify(path, PUBLIC)
            done += 1

    def test_another_sites_key_does_not_verify_it(self, bundle: Path) -> None:
        """Whose log it is is known from elsewhere."""
        with pytest.raises(LogError, match="another site's"):
            verify(bundle, str(PrivateKey.create().public))

    def test_no_changed_character_verifies(self, bundle: Path) -> None:
        """One character anywhere, 500 times (seeded)."""
        rng, text = random.Random(7), bundle.read_text()
        for _ in range(500):
            at = rng.randrange(len(text))
            changed = text[:at] + rng.choice("abcXYZ0189 ") + text[at + 1 :]
            if changed != text:
                bundle.write_text(changed)
                with pytest.raises(LogError):
                    verify(bundle, PUBLIC)

    def test_books_that_the_site_itself_falsified_are_named(self, pairs: Pairs, tmp_path: Path) -> None:
        """Every signature holds, and a charge is smaller than what was reserved says it must be."""
        bodies = [body for body, _ in pairs]
        at = next(n for n, body in enumerate(bodies) if b'"reserve"' in body)
        entry = json.loads(bodies[at])
        entry["accounts"]["p/d/train"]["charged"] = 1
        bodies[at] = json.dumps(entry).encode()
        path = write(tmp_path / "books.jsonl", signed(bodies), head(bodies))
        with pytest.raises(LogError, match=f"Entry {at} is the first .* does not add up"):
            verify(path, PUBLIC)

    @pytest.mark.parametrize("told", ["delta_charged", "delta_spent"])
    def test_the_delta_of_discovered_keys_has_to_add_up_too(self, tmp_path: Path, told: str) -> None:
        """An honest ledger's does; one that says less of it is named."""
        ledger = Ledger(tmp_path / "ledger.sqlite", KEY, origin="ward")
        ledger.open_account("p", "d", "train", 3.0, 1e-5, 1e-6)
        ledger.reserve("keys", "p", "d", ["train"], Thresholded(20.0, 10**11), bytes(32))
        ledger.touch("keys", 1)
        ledger.settle("keys", b"release")
        bodies = [body for body, _ in ledger.log.signed(0, 10)]
        ledger.close()
        audit = verify(write(tmp_path / "honest.jsonl", signed(bodies), head(bodies)), PUBLIC)
        assert audit.accounts["p/d/train"]["delta_spent"] == 10**11
        entry = json.loads(bodies[-1])
        entry["accounts"]["p/d/train"][told] = 1
        bodies[-1] = json.dumps(entry).encode()
        with pytest.raises(LogError, match="does not add up"):
            verify(write(tmp_path / "books.jsonl", signed(bodies), head(bodies)), PUBLIC)

    def test_mutant_without_entry_signatures_only_the_last_entry_is_suspected(
        self, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They are what names the first entry: without, only the head says that something is wrong."""
        monkeypatch.setattr(logs, "_check_signature", lambda head, code, key: None)
        changed = [*pairs[:2], (pairs[2][0].replace(b'"1"', b'"2"'), pairs[2][1]), *pairs[3:]]
        path = write(tmp_path / "bad.jsonl", changed, head([body for body, _ in pairs]))
        with pytest.raises(LogError, match=f"Entry {len(pairs) - 1} is the first"):
            verify(path)

    def test_mutant_without_the_head_a_cut_passes(
        self, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A shorter log with honest signatures is one that once was; only the head's size says that it is old."""
        cut = pairs[:5]
        assert (
            verify(write(tmp_path / "cut.jsonl", cut, head([body for body, _ in cut]))).checkpoint.size == 5
        )
        with pytest.raises(LogError, match="Entry 5 is the first"):
            verify(write(tmp_path / "cut.jsonl", cut, head([body for body, _ in pairs])))


class TestTwoHistories:
    """A site that holds the key can sign anything; who remembers shows it."""

    @pytest.fixture
    def forked(self, pairs: Pairs, tmp_path: Path) -> Path:
        """A perfect bundle of another history, which leaves the first one at entry 6."""
        bodies = [body for body, _ in pairs]
        bodies[6] = b'{"hash":"' + b"11" * 32 + b'","kind":"policy"}'
        bodies[7:] = [body for body in bodies[7:] if b'"kind":"cell"' in body]
        return write(tmp_path / "forked.jsonl", signed(bodies), head(bodies))

    def test_alone_it_verifies(self, forked: Path) -> None:
        """Nothing in it is wrong: this is why somebody must remember."""
        assert verify(forked, PUBLIC).checkpoint.size < 18

    def test_against_a_bundle_the_first_other_entry_is_named(self, forked: Path, bundle: Path) -> None:
        """Whichever of the two is asked about."""
        for one, other in ((forked, bundle), (bundle, forked)):
            with pytest.raises(LogError, match=r"Entry 6 is the first .* two histories"):
                verify(one, PUBLIC, against=[other])

    def test_against_a_checkpoint_it_is_refused(self, forked: Path, pairs: Pairs, tmp_path: Path) -> None:
        """One that a client, a witness or a receipt kept, of any size beyond the fork."""
        bodies = [body for body, _ in pairs]
        note = tmp_path / "note"
        for size in (7, 8, len(forked.read_text().splitlines()) - 1):
            note.write_text(head(bodies[:size]))
            with pytest.raises(LogError, match=f"one of the entries 0 to {size - 1} was another then"):
                verify(forked, PUBLIC, against=[note])
        note.write_text(head(bodies[:6]))
        verify(forked, PUBLIC, against=[note])

    def test_a_tampered_file_accuses_nobody(self, bundle: Path, pairs: Pairs, tmp_path: Path) -> None:
        """What is compared with has to hold itself, or anybody could make two histories of one."""
        changed = [*pairs[:6], (b'{"kind":"cell"}', pairs[6][1]), *pairs[7:]]
        other = write(tmp_path / "slander.jsonl", changed, head([body for body, _ in pairs]))
        with pytest.raises(LogError, match=r"slander.jsonl does not hold itself. Entry 6 is the first"):
            verify(bundle, PUBLIC, against=[other])

    def test_a_receipts_proof_serves_as_well(self, forked: Path, bundle: Path, tmp_path: Path) -> None:
        """A release's proof holds the checkpoint of its day."""
        proof = tmp_path / "entry.tlog-proof"
        proof.write_text(write_proof(prove(bundle, 3)))
        verify(bundle, PUBLIC, against=[proof])
        with pytest.raises(LogError):
            verify(forked, PUBLIC, against=[proof])

    def test_a_roll_back_is_named(self, pairs: Pairs, bundle: Path, tmp_path: Path) -> None:
        """The log ends before what was seen of it."""
        short = write(tmp_path / "short.jsonl", pairs[:9], head([body for body, _ in pairs[:9]]))
        with pytest.raises(LogError, match=r"Entry 9 is the first .* rolled back"):
            verify(short, PUBLIC, against=[bundle])
        assert verify(bundle, PUBLIC, against=[short]).checkpoint.size == len(pairs)

    def test_another_logs_checkpoint_is_no_witness(self, bundle: Path, tmp_path: Path) -> None:
        """Of another name, or signed by another key."""
        note = tmp_path / "note"
        for text in (head([], origin="other"), head([], key=Ed25519PrivateKey.generate()), "", "no note"):
            note.write_text(text)
            with pytest.raises(LogError):
                verify(bundle, PUBLIC, against=[note])


class TestWitness:
    NAME = "ethics.hospital.example"

    def test_a_cosignature_is_as_published(self, bundle: Path) -> None:
        """Key ids with the 4 for Ed25519 and the 6 for ML-DSA-44, time, and a signature over what C2SP says, byte by byte."""
        plain = bundles.read(bundle).note
        note = cosign(plain, self.NAME, WITNESS, now=1679315147)
        assert note.startswith(plain)
        text, lines = plain.rpartition("\n\n")[0] + "\n", note.removeprefix(plain).splitlines()
        assert [line.startswith(f"— {self.NAME} ") for line in lines] == [True, True]
        first, second = (base64.b64decode(line.split(" ")[2]) for line in lines)
        assert first[4:12] == second[4:12] == (1679315147).to_bytes(8, "big")
        keys = [base64.b64decode(vkey.split("+", 2)[2]) for vkey in verifier_keys(self.NAME, WITNESS)]
        for told, key, kind in ((first, keys[0], b"\x04"), (second, keys[1], b"\x06")):
            assert key[:1] == kind
            assert told[:4] == hashlib.sha256(self.NAME.encode() + b"\n" + key).digest()[:4]
        message = f"cosignature/v1\ntime 1679315147\n{text}".encode()
        Ed25519PublicKey.from_public_bytes(keys[0][1:]).verify(first[12:], message)
        origin, size, root = text.split("\n")[:3]
        message = b"subtree/v1\n\0" + bytes([len(self.NAME)]) + self.NAME.encode() + second[4:12]
        message += (
            bytes([len(origin)])
            + origin.encode()
            + bytes(8)
            + int(size).to_bytes(8, "big")
            + base64.b64decode(root)
        )
        MLDSA44PublicKey.from_public_bytes(keys[1][1:]).verify(second[12:], message)
        for vkey in verifier_keys(self.NAME, WITNESS):
            assert cosigned_at(note, vkey) == 1679315147

    def test_either_stands_alone(self, bundle: Path) -> None:
        """A note that lacks one kind is not confirmed by it; a signature of one kind is none of the other."""
        plain = bundles.read(bundle).note
        note, vkeys = cosign(plain, self.NAME, WITNESS), verifier_keys(self.NAME, WITNESS)
        lines = note.removeprefix(plain).splitlines(keepends=True)
        for mine, other in ((0, 1), (1, 0)):
            assert cosigned_at(plain + lines[mine], vkeys[mine])
            with pytest.raises(LogError, match="not cosigned"):
                cosigned_at(plain + lines[mine], vkeys[other])

    def test_the_second_key_is_not_to_be_had_from_the_first(self) -> None:
        """It is of the seed, the same each time, and another for another witness."""
        assert verifier_keys("a", WITNESS) == verifier_keys("a", WITNESS)
        assert verifier_keys("a", WITNESS)[1] != verifier_keys("a", PrivateKey.create())[1]
        assert str(WITNESS.public) not in verifier_keys("a", WITNESS)[1]

    def test_the_name_is_signed_by_the_second_kind(self, bundle: Path) -> None:
        """One key under two names is one witness to Ed25519 and two to ML-DSA-44."""
        plain = bundles.read(bundle).note
        mine, renamed = cosign(plain, "a", WITNESS), list[str]()
        for line, vkey in zip(
            mine.removeprefix(plain).splitlines(), verifier_keys("b", WITNESS), strict=True
        ):
            told = base64.b64decode(line.split(" ")[2])
            identifier = bytes.fromhex(vkey.split("+")[1])
            renamed.append(f"{plain}— b {base64.b64encode(identifier + told[4:]).decode()}\n")
        assert cosigned_at(renamed[0], verifier_keys("b", WITNESS)[0])
        with pytest.raises(LogError, match="does not hold"):
            cosigned_at(renamed[1], verifier_keys("b", WITNESS)[1])

    def test_the_log_still_opens_its_own_note(self, bundle: Path, pairs: Pairs) -> None:
        """A cosigned checkpoint is the checkpoint."""
        note = cosign(bundles.read(bundle).note, self.NAME, WITNESS)
        path = bundle.with_name("cosigned.jsonl")
        assert verify(write(path, pairs, note), PUBLIC).checkpoint.size == len(pairs)

    @pytest.mark.parametrize("kind", [0, 1])
    def test_no_altered_cosignature_counts(self, bundle: Path, kind: int) -> None:
        """Another time, another size, another key, another name; of either kind."""
        plain, vkey = bundles.read(bundle).note, verifier_keys(self.NAME, WITNESS)[kind]
        note = plain + cosign(plain, self.NAME, WITNESS).removeprefix(plain).splitlines(keepends=True)[kind]
        rng = random.Random(2)
        for at in range(0, len(note), 1 if len(note) < 1000 else 7):
            changed = note[:at] + rng.choice("abcXYZ019") + note[at + 1 :]
            body, mine = (text.splitlines() for text in (note, changed))
            same = body[:3] == mine[:3] and body[-1] == mine[-1] and len(body) == len(mine) and mine[3] == ""
            if same:
                continue  # the log's own line is the log's business
            with pytest.raises(LogError):
                cosigned_at(changed, vkey)
        other = PrivateKey.create()
        for wrong in (
            verifier_keys(self.NAME, other)[kind],
            verifier_keys("x", WITNESS)[kind],
            vkey[:-1],
            "",
            "a+b+c",
        ):
            with pytest.raises(LogError):
                cosigned_at(note, wrong)

    @pytest.mark.parametrize("name", ["a b", "a+b", "a\nb"])
    def test_a_name_that_notes_cannot_carry_is_refused(self, name: str, bundle: Path) -> None:
        """As for a log."""
        with pytest.raises(LogError, match="cannot be named"):
            cosign(bundles.read(bundle).note, name, WITNESS)

    def test_a_fork_signed_by_another_key_is_not_cosigned_for_the_first(
        self, pairs: Pairs, tmp_path: Path
    ) -> None:
        """The site signs the same fork's head too, and puts the witness's line beneath: it would confirm two histories."""
        bodies, thief = [body for body, _ in pairs], Ed25519PrivateKey.generate()
        fork = [body.replace(b'"hash":"00', b'"hash":"11') for body in bodies]
        assert fork != bodies
        name = str(PrivateKey("ed25519", (thief,)).public)
        cosign_bundle(write(tmp_path / "b.jsonl", pairs, head(bodies)), WITNESS, self.NAME)
        trap = write(tmp_path / "trap.jsonl", signed(fork, thief), head(fork, key=thief), name)
        assert verify(trap).checkpoint.size == len(fork)
        with pytest.raises(LogError, match="signed by another key"):
            cosign_bundle(trap, WITNESS, self.NAME)
        assert last_seen("ward", name) is None

    def test_it_follows_one_history_and_keeps_what_it_saw(self, pairs: Pairs, tmp_path: Path) -> None:
        """It cosigns a log that grew; not one that shrank, nor one that was rewritten."""
        bodies = [body for body, _ in pairs]

        def bundle(bodies: list[bytes]) -> Path:
            return write(tmp_path / "b.jsonl", signed(bodies), head(bodies))

        first = cosign_bundle(bundle(bodies[:8]), WITNESS, self.NAME)
        cosign_bundle(bundle(bodies[:12]), WITNESS, self.NAME)
        with pytest.raises(LogError, match="rolled back"):
            cosign_bundle(bundle(bodies[:8]), WITNESS, self.NAME)
        forged = [*bodies[:10], b'{"hash":"","kind":"policy"}', *bodies[11:14]]
        forged = [body for body in forged if b'"p"' not in body or b'"reserve"' in body or b"account" in body]
        with pytest.raises(LogError):
            cosign_bundle(bundle(forged), WITNESS, self.NAME)
        cosign_bundle(bundle(bodies), WITNESS, self.NAME)
        note = tmp_path / "note"
        note.write_text(first)
        vkey, quantum = verifier_keys(self.NAME, WITNESS)
        told = verify(bundle(bodies), PUBLIC, against=[note], witnesses=[vkey, quantum])
        assert told.checkpoint.size == len(bodies)
        stranger = verifier_keys("someone", PrivateKey.create())[1]
        with pytest.raises(LogError, match="someone does not confirm"):
            verify(bundle(bodies), PUBLIC, against=[note], witnesses=[vkey, stranger])
        with pytest.raises(LogError, match="does not confirm"):
            verify(bundle(bodies), PUBLIC, witnesses=[vkey])

    def test_the_commands_do_all_of_it(
        self, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        """A witness cosigns, an auditor demands it, an entry is proved and checked."""
        monkeypatch.setenv("RAPHA_LAB_PASSPHRASE", "correct horse")
        WITNESS.save(tmp_path / "w.key", "correct horse")
        note, entry = tmp_path / "note", tmp_path / "entry.json"
        arguments = ["witness", str(bundle), "--key", str(tmp_path / "w.key"), "--out", str(note)]
        assert main(arguments) == 0
        vkeys = verifier_keys(witness_name(WITNESS.public), WITNESS)
        told = capsys.readouterr().out
        assert all(vkey in told for vkey in vkeys)
        check = ["log", "verify", str(bundle), "--key", PUBLIC, "--against", str(note), "--witness", *vkeys]
        assert main(check) == 0
        assert main(["log", "prove", str(bundle), "3", str(entry)]) == 0
        assert main(["log", "check", str(entry), "--key", PUBLIC]) == 0
        entry.write_bytes(entry.read_bytes() + b" ")
        assert main(["log", "check", str(entry), "--key", PUBLIC]) == 1
        assert main(["log", "prove", str(bundle), "999", str(entry)]) == 1
        assert main(["log", "verify", str(bundle), "--against", str(tmp_path)]) == 1
        assert main(["log", "check", str(tmp_path / "none"), "--key", PUBLIC]) == 1
        assert main(["log", "verify", str(tmp_path / "w.key"), "--key", "no key"]) == 1
        assert main(["witness", str(bundle)]) == 1
        assert "LogError" in capsys.readouterr().err
