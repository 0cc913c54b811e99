"""The log: hashed as RFC 9162 says, signed as C2SP says, and every alteration found."""

import json
import random

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from rapha_lab.curator.accounting import Gaussian
from rapha_lab.curator.ledger import Ledger
from rapha_lab.protocol.checkpoint import (
    Checkpoint,
    Receipt,
    leaf_hash,
    open_checkpoint,
    root_of,
    sign_checkpoint,
    verify_consistency,
    verify_inclusion,
    verify_receipt,
)
from rapha_lab.protocol.errors import LogError, RequestError, SiteError

SIZE = 70


@pytest.fixture
def log(ledger):
    """A log of SIZE entries."""
    while ledger.log.size() < SIZE:
        ledger.record("cell", hash=f"{ledger.log.size():064x}")
    return ledger.log


@pytest.fixture
def receipt(ledger, log):
    """The receipt of a job that released b"weights"."""
    ledger.reserve("job", "risk", "flchain", ["train"], Gaussian(20.0), bytes(32))
    ledger.touch("job", 1)
    return ledger.settle("job", b"weights")


class TestTree:
    def test_root_is_that_of_the_published_vector(self):
        """The eight leaves of Certificate Transparency's reference tests."""
        leaves = [
            "",
            "00",
            "10",
            "2021",
            "3031",
            "40414243",
            "5051525354555657",
            "606162636465666768696a6b6c6d6e6f",
        ]
        root = root_of([bytes.fromhex(leaf) for leaf in leaves])
        assert root.hex() == "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"

    def test_stored_subtrees_give_the_root_of_the_entries(self, log, key):
        """At every size on the way."""
        entries = log.entries()
        assert open_checkpoint(log.checkpoint(), key.public_key()) == Checkpoint(
            "rapha-lab", SIZE, root_of(entries)
        )
        assert all(log._root(0, size) == root_of(entries[:size]) for size in range(1, SIZE + 1))

    def test_every_entry_is_proved_in_every_tree(self, log):
        """And in no other place."""
        entries = log.entries()
        for size in range(1, SIZE + 1, 3):
            root = root_of(entries[:size])
            for index in range(size):
                proof = log.inclusion(index, size)
                verify_inclusion(index, size, leaf_hash(entries[index]), proof, root)
                with pytest.raises(LogError):
                    verify_inclusion(index, size, leaf_hash(entries[index - 1]), [*proof, root], root)
                if size > 1:
                    with pytest.raises(LogError):
                        verify_inclusion((index + 1) % size, size, leaf_hash(entries[index]), proof, root)

    def test_every_tree_is_proved_to_extend_every_earlier_one(self, log):
        """And an earlier one with another history is not."""
        entries = log.entries()
        for new in range(1, SIZE + 1, 3):
            for old in range(1, new + 1):
                roots = root_of(entries[:old]), root_of(entries[:new])
                proof = log.consistency(old, new)
                verify_consistency(old, new, *roots, proof)
                with pytest.raises(LogError):
                    verify_consistency(old, new, root_of([b"x", *entries[1:old]]), roots[1], proof)
                if proof:
                    with pytest.raises(LogError):
                        verify_consistency(old, new, *roots, proof[:-1])

    @pytest.mark.parametrize("ask", [(-1, 5), (5, 5), (0, SIZE + 1)])
    def test_proofs_of_what_is_not_there_are_refused(self, log, ask):
        """With a typed error, not a lookup's."""
        with pytest.raises(LogError):
            log.inclusion(*ask)


class TestEntries:
    @pytest.mark.parametrize("field", [1.5, b"bytes", "x" * 257, {"a": 0.1}, [None, object()]])
    def test_only_labels_hashes_and_whole_numbers_enter(self, ledger, field):
        """No number of a record can slip in as a float."""
        with pytest.raises(RequestError):
            ledger.record("cell", value=field)
        with pytest.raises(RequestError):
            ledger.record("gossip", value="x")

    def test_entries_are_canonical(self, ledger):
        """The same fields in any order are the same bytes."""
        first, second = ledger.record("cell", b=1, a="x"), ledger.record("cell", a="x", b=1)
        one, other = ledger.log.entries(first)[0], ledger.log.entries(second)[0]
        assert one == other == b'{"a":"x","b":1,"kind":"cell"}'

    @pytest.mark.parametrize(
        "statement",
        ["DELETE FROM entry", "UPDATE entry SET body = x'00'", "DELETE FROM subtree", "DELETE FROM job"],
    )
    def test_the_database_itself_refuses_to_forget(self, ledger, receipt, statement):
        """A slip of our own code can't rewrite history; an intruder's edit is found by the proofs."""
        with pytest.raises(SiteError), ledger._transaction() as db:
            db.execute(statement)

    def test_a_charge_says_what_was_spent_after_it(self, receipt):
        """So that a reset or a roll-back of the accounts shows."""
        entry = json.loads(receipt.entry)
        account = entry["accounts"]["risk/flchain/train"]
        assert account["spent"] == account["charged"] > 0
        assert entry["kind"] == "charge"


class TestCheckpoints:
    @given(st.binary(min_size=32, max_size=32), st.integers(0, 2**40))
    def test_what_was_signed_opens(self, root, size):
        """Under the same key and name only."""
        key, head = Ed25519PrivateKey.generate(), Checkpoint("rapha-lab/site", size, root)
        note = sign_checkpoint(head, key)
        assert open_checkpoint(note, key.public_key(), "rapha-lab/site") == head
        with pytest.raises(LogError):
            open_checkpoint(note, Ed25519PrivateKey.generate().public_key())
        with pytest.raises(LogError):
            open_checkpoint(note, key.public_key(), "rapha-lab/other")

    @pytest.mark.parametrize("origin", ["", "two words", " led", "one+one", "line\nbreak"])
    def test_a_name_that_notes_cannot_carry_is_refused_at_once(self, path, key, origin):
        """Not only when the first client fails to read a checkpoint."""
        with pytest.raises(LogError, match="named"):
            Ledger(path, key, origin)

    def test_others_may_sign_too(self, log, key):
        """A witness's line is passed over."""
        note = log.checkpoint() + "— witness.example AAAAAAAA\n"
        assert open_checkpoint(note, key.public_key()).size == SIZE

    def test_no_altered_checkpoint_opens(self, log, key):
        """Every single character changed, dropped or doubled."""
        note, public = log.checkpoint(), key.public_key()
        head = open_checkpoint(note, public)
        for i in range(len(note)):
            for changed in (
                note[:i] + "7" + note[i + 1 :],
                note[:i] + note[i + 1 :],
                note[: i + 1] + note[i:],
            ):
                try:
                    assert open_checkpoint(changed, public) == head
                except LogError:
                    continue
                assert changed.split("\n\n")[0] == note.split("\n\n")[0]

    @pytest.mark.parametrize("note", ["", "\n\n", "a\n1\n", "a\n1\n\n\n— a \n", "a\n-1\nAAAA\n\n— a AAAA\n"])
    def test_what_is_no_checkpoint_is_refused(self, note, key):
        """With a typed error."""
        with pytest.raises(LogError):
            open_checkpoint(note, key.public_key())


class TestReceipts:
    def test_a_receipt_proves_charge_and_release(self, receipt, key):
        """And survives the wire."""
        sent = msgspec.json.decode(msgspec.json.encode(receipt), type=Receipt)
        assert verify_receipt(sent, key.public_key(), b"weights").size == SIZE + 2

    def test_another_release_is_not_proved(self, receipt, key):
        """Not one byte of it."""
        with pytest.raises(LogError, match="other bytes"):
            verify_receipt(receipt, key.public_key(), b"weightz")

    def test_no_altered_receipt_verifies(self, receipt, key):
        """Any bit of the entry or the proof, the job, the index, or a missing hash."""
        chance = random.Random(7)
        altered = [
            msgspec.structs.replace(receipt, job="other"),
            msgspec.structs.replace(receipt, index=receipt.index - 1),
            msgspec.structs.replace(receipt, index=-1),
            msgspec.structs.replace(receipt, proof=receipt.proof[1:]),
            msgspec.structs.replace(receipt, proof=[]),
        ]
        for _ in range(200):
            entry = bytearray(receipt.entry)
            entry[chance.randrange(len(entry))] ^= 1 << chance.randrange(8)
            altered.append(msgspec.structs.replace(receipt, entry=bytes(entry)))
            which, proof = chance.randrange(len(receipt.proof)), [bytearray(part) for part in receipt.proof]
            proof[which][chance.randrange(32)] ^= 1 << chance.randrange(8)
            altered.append(msgspec.structs.replace(receipt, proof=[bytes(part) for part in proof]))
        for bad in altered:
            with pytest.raises(LogError):
                verify_receipt(bad, key.public_key(), b"weights")

    def test_another_entry_is_no_receipt(self, ledger, receipt, key):
        """The reservation is in the log too, but charges nothing for good."""
        size = open_checkpoint(receipt.checkpoint, key.public_key()).size
        reserved = receipt.index - 1
        forged = Receipt(
            "job",
            reserved,
            ledger.log.entries(reserved)[0],
            ledger.log.inclusion(reserved, size),
            receipt.checkpoint,
        )
        with pytest.raises(LogError, match="not the charge"):
            verify_receipt(forged, key.public_key())


class TestTampering:
    @pytest.mark.parametrize(
        "how", ["edit", "drop", "swap", "double", "cut the tail", "rewrite from the start"]
    )
    def test_no_history_but_the_true_one_extends_what_a_client_saw(self, log, how):
        """Even by somebody with the file and the key, who recomputes every hash."""
        entries = log.entries()
        seen = root_of(entries)
        forged = {
            "edit": [*entries[:9], b"{}", *entries[10:]],
            "drop": [*entries[:9], *entries[10:]],
            "swap": [*entries[:9], entries[10], entries[9], *entries[11:]],
            "double": [*entries[:9], entries[9], *entries[9:]],
            "cut the tail": entries[:-1],
            "rewrite from the start": [b"{}"] * SIZE,
        }[how] + [b"later"] * (how != "cut the tail")
        with pytest.raises(LogError):
            verify_consistency(SIZE, len(forged), seen, root_of(forged), honest_proof(forged, SIZE))


def honest_proof(entries: list[bytes], old: int) -> list[bytes]:
    """The proof an RFC 9162 log over `entries` would give (section 2.1.4.1), by its definition."""

    def subproof(low: int, high: int, whole: bool) -> list[bytes]:
        if old == high:
            return [] if whole else [root_of(entries[low:high])]
        middle = low + (1 << ((high - low - 1).bit_length() - 1))
        if old <= middle:
            return [*subproof(low, middle, whole), root_of(entries[middle:high])]
        return [*subproof(middle, high, False), root_of(entries[low:middle])]

    return subproof(0, len(entries), True) if 0 < old < len(entries) else []


def test_every_receipt_carries_the_sites_labels(tmp_path, key):
    """The tier of the sandbox stands in the entry that the receipt proves."""
    ledger = Ledger(tmp_path / "labelled.sqlite", key, origin="ward", about={"tier": "S3"})
    ledger.open_account("p", "d", "train", 3.0, 1e-5)
    ledger.reserve("job", "p", "d", ["train"], Gaussian(20.0), bytes(32))
    ledger.touch("job", 1)
    assert json.loads(ledger.settle("job", b"release").entry)["tier"] == "S3"
    ledger.close()
