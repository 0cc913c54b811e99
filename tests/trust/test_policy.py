"""The custodians' policy: what it allows, and that nothing of it changes without their signatures."""

from __future__ import annotations

import contextlib
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trust_material import CUSTODIANS, PEOPLE, RESEARCHER, fixed, page

from rapha_lab.client.policies import diff, plain_english
from rapha_lab.protocol.errors import PolicyError, RequestError
from rapha_lab.protocol.keys import PublicKey
from rapha_lab.protocol.policy import Policy, Signed, Statement, state

NOW = datetime(2027, 1, 1, tzinfo=UTC)
ME = str(RESEARCHER.public)
PAGE = page()
POLICY = Policy.parse(PAGE)
SIGNATURES = tuple(state("sign", POLICY, key) for key in CUSTODIANS)
relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def edited(old: str, new: str) -> Policy:
    """The policy with one place of its page changed."""
    assert old in PAGE
    return Policy.parse(PAGE.replace(old, new, 1))


class TestSigning:
    def test_two_of_three_put_it_in_force(self, signed: Signed) -> None:
        """As many as its quorum says."""
        assert signed.check(NOW).hash == POLICY.hash

    def test_a_missing_signature_is_named(self) -> None:
        """With the person's name and role, and what to do."""
        with pytest.raises(PolicyError) as refused:
            Signed(PAGE, SIGNATURES[:1]).check(NOW)
        text = str(refused.value)
        assert "needs 2 custodians' signatures and has 1" in text
        assert "Missing: Bo Ek (data protection officer), Cy Roe (general counsel)." in text
        assert "rapha-lab policy sign" in text

    def test_signing_twice_counts_once(self) -> None:
        """However often."""
        with pytest.raises(PolicyError, match="and has 1"):
            Signed(PAGE, (SIGNATURES[0], state("sign", POLICY, CUSTODIANS[0]), SIGNATURES[0])).check(NOW)

    def test_a_stranger_does_not_count(self) -> None:
        """Nor does the researcher."""
        with pytest.raises(PolicyError, match="and has 1"):
            Signed(PAGE, (SIGNATURES[0], state("sign", POLICY, RESEARCHER))).check(NOW)

    def test_the_last_day_counts_and_the_next_does_not(self, signed: Signed) -> None:
        """In UTC."""
        signed.check(datetime(2030, 6, 30, 23, 59, tzinfo=UTC))
        with pytest.raises(PolicyError, match="expired"):
            signed.check(datetime(2030, 7, 1, tzinfo=UTC))

    def test_an_edit_is_named_with_those_who_had_signed(self) -> None:
        """So that they can be asked again."""
        with pytest.raises(PolicyError, match=r"edited.*Ada Lim \(Caldicott Guardian\), Bo Ek"):
            Signed(PAGE.replace("epsilon = 4.0", "epsilon = 4.1"), SIGNATURES[:2]).check(NOW)

    @relaxed
    @given(st.integers(0, len(PAGE.encode()) - 1), st.integers(1, 255))
    def test_no_byte_can_change(self, at: int, change: int) -> None:
        """Any byte of the page, comments and blanks too, by any difference."""
        altered = bytearray(PAGE.encode())
        altered[at] ^= change
        try:
            text = altered.decode()
        except UnicodeDecodeError:
            return
        with pytest.raises((PolicyError, RequestError)):
            Signed(text, SIGNATURES).check(NOW)

    @relaxed
    @given(st.sets(st.integers(0, 2)), st.sets(st.integers(0, 2)))
    def test_it_is_in_force_exactly_with_a_quorum_and_no_veto(self, sign: set[int], veto: set[int]) -> None:
        """For every set of custodians who sign and who veto."""
        vetoes = tuple(state("veto", POLICY, CUSTODIANS[n]) for n in veto)
        signed = Signed(PAGE, tuple(SIGNATURES[n] for n in sign) + vetoes)
        if len(sign) >= 2 and not veto:
            assert signed.check(NOW).text == PAGE
        else:
            with pytest.raises(PolicyError):
                signed.check(NOW)

    def test_no_flipped_bit_of_a_statement_counts(self) -> None:
        """A thousand random bits of the file of signatures: it counts no more, if it reads at all."""
        chance = random.Random(7)
        line = msgspec.json.encode(SIGNATURES[0])
        for _ in range(1000):
            altered = bytearray(line)
            bit = chance.randrange(len(line) * 8)
            altered[bit // 8] ^= 1 << bit % 8
            with pytest.raises((PolicyError, RequestError)):
                Signed(PAGE, (Statement.decode(bytes(altered)), SIGNATURES[1])).check(NOW)

    def test_a_signature_does_not_become_another_act(self) -> None:
        """What is signed says what it does, so a revocation is no signature."""
        revoke = state("revoke", POLICY, CUSTODIANS[0], ME)
        with pytest.raises(PolicyError, match="and has 1"):
            Signed(PAGE, (msgspec.structs.replace(revoke, act="sign"), SIGNATURES[1])).check(NOW)

    def test_it_is_read_from_the_page_and_the_file_beside_it(self, tmp_path: Path) -> None:
        """One statement a line."""
        (tmp_path / "policy.toml").write_text(PAGE)
        lines = [msgspec.json.encode(statement) for statement in SIGNATURES]
        (tmp_path / "policy.toml.signatures").write_bytes(b"\n".join(lines) + b"\n")
        assert Signed.load(tmp_path / "policy.toml").check(NOW).hash == POLICY.hash

    def test_a_damaged_file_closes_the_policy(self, tmp_path: Path) -> None:
        """A line that does not read is not skipped: it may have been a veto."""
        (tmp_path / "policy.toml").write_text(PAGE)
        (tmp_path / "policy.toml.signatures").write_bytes(msgspec.json.encode(SIGNATURES[0])[:-3] + b"\n")
        with pytest.raises(RequestError, match="cannot be read"):
            Signed.load(tmp_path / "policy.toml")
        with pytest.raises(PolicyError, match="no policy"):
            Signed.load(tmp_path / "other.toml")


class TestVetoAndRevocation:
    def test_a_veto_closes_it_with_its_reason(self, signed: Signed) -> None:
        """By one custodian alone, also one who has not signed."""
        veto = state("veto", POLICY, CUSTODIANS[2], reason="The ethics approval lapsed.")
        with pytest.raises(PolicyError, match=r"Cy Roe \(general counsel\) vetoed .* ethics approval lapsed"):
            Signed(PAGE, (*signed.statements, veto)).check(NOW)

    def test_a_veto_outlives_a_later_signature(self, signed: Signed) -> None:
        """What was closed opens only by a new version."""
        later = state("veto", POLICY, CUSTODIANS[0]), state("sign", POLICY, CUSTODIANS[0])
        with pytest.raises(PolicyError, match="vetoed"):
            Signed(PAGE, (*signed.statements, *later)).check(NOW)

    def test_a_strangers_veto_is_none(self, signed: Signed) -> None:
        """Nor is one that a custodian made on another page."""
        for veto in (
            state("veto", POLICY, fixed(9)),
            state("veto", edited("4.0", "5.0"), CUSTODIANS[2]),
            msgspec.structs.replace(state("veto", POLICY, fixed(9)), key=str(CUSTODIANS[2].public)),
        ):
            Signed(PAGE, (*signed.statements, veto)).check(NOW)

    def test_one_custodian_can_revoke_a_researcher(self, signed: Signed) -> None:
        """From the next check on, whoever else is still allowed."""
        revoke = state("revoke", POLICY, CUSTODIANS[2], ME)
        policy = Signed(PAGE, (*signed.statements, revoke)).check(NOW)
        assert policy.projects_of(ME) == []
        with pytest.raises(PolicyError, match="revoked"):
            policy.allows(ME, "risk", "flchain", "aggregate")

    def test_one_custodian_can_revoke_a_project(self, signed: Signed) -> None:
        """The same."""
        revoke = state("revoke", POLICY, CUSTODIANS[2], "risk")
        policy = Signed(PAGE, (*signed.statements, revoke)).check(NOW)
        assert policy.projects_of(ME) == []
        with pytest.raises(PolicyError):
            policy.allows(ME, "risk", "flchain", "aggregate")


class TestSuccession:
    """A new page cannot name its own judges: those of the page before must agree."""

    def coup(self, quorum: str = "quorum = 1") -> tuple[Policy, str]:
        """A next version in which a stranger is a custodian, alone suffices, and the budget grows."""
        text = PAGE.replace("version = 3", "version = 4").replace("quorum = 2", quorum)
        text = text.replace("epsilon = 4.0", "epsilon = 400.0")
        text = text.replace(str(CUSTODIANS[0].public), str(fixed(9).public))
        return Policy.parse(text), text

    def test_new_custodians_alone_change_nothing(self) -> None:
        """Whatever their own page says of them."""
        policy, text = self.coup()
        mine = Signed(text, (state("sign", policy, fixed(9)),))
        assert mine.check(NOW).head.quorum == 1
        with pytest.raises(PolicyError, match="Version 3 needs 2 custodians' signatures and has 0"):
            mine.check(NOW, after=POLICY)

    def test_with_the_old_quorum_it_is_theirs_to_change(self) -> None:
        """Two of the old custodians, and one of the new as the new page asks."""
        policy, text = self.coup()
        keys = (CUSTODIANS[0], CUSTODIANS[1])
        signed = Signed(text, tuple(state("sign", policy, key) for key in keys))
        assert signed.check(NOW, after=POLICY).head.version == 4

    def test_an_old_custodian_can_veto_a_successor(self) -> None:
        """Even one whom it no longer names."""
        policy, text = self.coup()
        signed = tuple(state("sign", policy, key) for key in (*CUSTODIANS[:2], fixed(9)))
        with pytest.raises(PolicyError, match="Ada Lim"):
            Signed(text, (*signed, state("veto", policy, CUSTODIANS[0]))).check(NOW, after=POLICY)

    def test_an_older_version_does_not_come_back(self) -> None:
        """However well it is signed."""
        newer, _ = self.coup("quorum = 2")
        with pytest.raises(PolicyError, match="older version"):
            Signed(PAGE, SIGNATURES).check(NOW, after=newer)

    def test_a_page_changed_under_its_version_is_told_to_take_the_next(self) -> None:
        """It is not older; its signatures alone do not let it in, either."""
        first = Signed(PAGE, SIGNATURES).check(NOW)
        changed = Policy.parse(
            PAGE.replace("\n[policy]", "\n# another word\n[policy]", 1) + "\n# another word\n"
        )
        said = tuple(state("sign", changed, key) for key in CUSTODIANS)
        with pytest.raises(PolicyError, match=rf"changed and is still version {first.head.version}"):
            Signed(changed.text, said).check(NOW, after=first)

    def test_the_same_page_succeeds_itself(self, signed: Signed) -> None:
        """A restart changes nothing."""
        assert signed.check(NOW, after=POLICY).hash == POLICY.hash


class TestAllowance:
    def test_what_is_written_is_allowed(self, policy: Policy) -> None:
        """With the release mode that the lane names; a person's, where it names none."""
        assert policy.allows(ME, "risk", "flchain", "aggregate") == "auto"
        assert policy.allows(ME, "risk", "flchain", "train", metrics=["auroc"]) == "one custodian"

    @pytest.mark.parametrize(
        ("asked", "reason"),
        [
            (("ed25519:x", "risk", "flchain", "train", []), "not in project"),
            ((ME, "other", "flchain", "train", []), "no project 'other'"),
            ((ME, "risk", "mimic", "train", []), "does not open the dataset 'mimic'"),
            ((ME, "risk", "flchain", "review", []), "may not review"),
            ((ME, "risk", "flchain", "evaluate", []), "Its lanes are: aggregate, train"),
            ((ME, "risk", "flchain", "train", ["auroc", "calibration"]), "'calibration' may not leave"),
            ((ME, "", "", "", []), "no project ''"),
        ],
    )
    def test_what_is_not_written_is_refused_by_name(self, policy: Policy, asked: Any, reason: str) -> None:
        """Researcher, project, dataset, lane, metric: the message names the one at fault."""
        *where, metrics = asked
        with pytest.raises(PolicyError, match=reason):
            policy.allows(*where, metrics=metrics)

    def test_a_dataset_opens_in_signed_releases_only(self, policy: Policy) -> None:
        """By measurement, simulation by its own word, and sandbox by tier."""
        zeros = "sha384:" + "0" * 96
        policy.admits("flchain", zeros, simulated=False, tier="S3")
        policy.admits("flchain", "sha256:" + "1" * 64, simulated=True, tier="S2")
        for measurement, simulated, tier in (
            ("sha256:" + "1" * 64, False, "S3"),
            ("any simulated", False, "S3"),
            (zeros, False, "S1"),
            (zeros, False, "S1'"),
            (zeros, False, "S0"),
            (zeros, False, ""),
            (zeros, False, "s9"),
        ):
            with pytest.raises(PolicyError):
                policy.admits("flchain", measurement, simulated=simulated, tier=tier)

    def test_a_large_model_is_refused(self, policy: Policy) -> None:
        """With its size and the limit."""

        class Program:
            size = 1_000_001

        with pytest.raises(PolicyError, match="1,000,001 parameters"):
            policy.project("risk").within_size(Program())  # type: ignore[arg-type]


class TestPage:
    @pytest.mark.parametrize(
        ("old", "new", "reason"),
        [
            ("epsilon = 4.0", "epsilon = nan", "epsilon"),
            ("epsilon = 4.0", "epsilon = inf", "epsilon"),
            ("epsilon = 4.0", "epsilon = 0", "epsilon"),
            ("epsilon = 4.0", "epsilon = -4", "epsilon"),
            ("epsilon = 4.0", 'epsilon = "4"', "epsilon"),
            ("epsilon = 4.0", "", "epsilon"),
            ("delta = 1e-6", "delta = 0.5", "delta"),
            ("delta = 1e-6", "delta = 1e-4", "larger delta than its dataset"),
            ("quorum = 2", "quorum = 0", "quorum"),
            ("quorum = 2", "quorum = 4", "4 signatures of 3"),
            ("quorum = 2", "quorum = 2\nqourum = 1", "qourum"),
            ("expires = 2030-06-30", 'expires = "later"', "expires"),
            ('"DUO:0000042"', '"anything"', "purpose"),
            ('sandbox = "S2"', 'sandbox = "S9"', "sandbox"),
            ('datasets = ["flchain"]', 'datasets = ["mimic"]', "does not have: 'mimic'"),
            ('release = "auto"', 'release = "nobody"', "release"),
            ("train = {}", "browse = {}", "browse"),
            ('name = "Bo Ek"', 'name = "Ada Lim"', "names one twice"),
            (str(CUSTODIANS[1].public), str(CUSTODIANS[0].public), "names one twice"),
            (str(CUSTODIANS[1].public), "ed25519:AAAA", "no public key"),
            (str(CUSTODIANS[1].public), str(PublicKey("x25519", bytes(32))), "does not sign"),
            ("[policy]", "[policy", "wrong"),
            ("largest_model = 1_000_000", "largest_model = true", "largest_model"),
        ],
    )
    def test_mistakes_are_named(self, old: str, new: str, reason: str) -> None:
        """Each field's bounds, and what contradicts what."""
        with pytest.raises(RequestError, match=reason):
            edited(old, new)

    @pytest.mark.parametrize(
        "unseen", ["\u202e", "\u200b", "\ufeff", "\r", "\0", "\x1b", "\u2028", "\U000e0041", "\\u202e"]
    )
    def test_nothing_unseen_is_signed(self, unseen: str) -> None:
        """No character that shows as nothing, or turns others around."""
        with pytest.raises(RequestError, match="invisible"):
            Policy.parse("# " + unseen + "\n" + PAGE)

    @relaxed
    @given(st.text(max_size=300))
    def test_any_text_is_a_policy_or_a_clear_error(self, text: str) -> None:
        """Parsing never raises anything else."""
        for candidate in (text, PAGE + text):
            with contextlib.suppress(RequestError):
                Policy.parse(candidate)

    def test_its_hash_is_that_of_the_file(self, policy: Policy) -> None:
        """As sha256sum prints it."""
        import hashlib

        assert policy.hash.hex() == hashlib.sha256(PAGE.encode()).hexdigest()

    def test_it_reads_as_english(self, policy: Policy) -> None:
        """Who, what, how much, until when."""
        text = plain_english(policy)
        for part in (
            "Light chains and survival, version 3. It ends on 30 June 2030.",
            "general research (DUO:0000042)",
            "2 of these 3 must sign",
            *(f"{name}, {role}" for name, role in PEOPLE),
            "aggregate (released at once); train (one custodian releases it)",
            "Per patient epsilon 4 at most, delta 1e-06",
        ):
            assert part in text

    def test_a_diff_says_what_opens_and_what_closes(self, policy: Policy) -> None:
        """`+` for more, `-` for less, whichever way the number goes."""
        for old, new, sign in (
            ("epsilon = 4.0", "epsilon = 5.0", "+"),
            ("epsilon = 4.0", "epsilon = 3.0", "-"),
            ("quorum = 2", "quorum = 1", "+"),
            ("smallest_cohort = 100", "smallest_cohort = 200", "-"),
            ('sandbox = "S2"', 'sandbox = "S1"', "+"),
            ("expires = 2030-06-30", "expires = 2031-06-30", "+"),
            ('metrics = ["auroc", "brier"]', 'metrics = ["auroc"]', "-"),
            ("train = {}", 'train = { release = "auto" }', "+"),
            ("train = {}", 'train = { release = "two custodians" }', "-"),
            ("train = {}", "train = {}\nreview = {}", "+"),
            (ME, str(fixed(9).public), "+-"),
            ("Ada Lim", "Eve Ray", "~"),
            ("delta = 1e-6", "delta = 1e-6\ndiscovery_delta = 1e-7", "+"),
        ):
            lines = diff(policy, edited(old, new))
            assert {line[0] for line in lines} == set(sign), (old, new, lines)
        assert diff(policy, policy) == []


class TestDiscoveryDelta:
    """A further δ for keys discovered in records is signed like any budget, and is none unless it is written."""

    WRITTEN = ("delta = 1e-6", "delta = 1e-6\ndiscovery_delta = 1e-7")

    def test_it_is_none_by_default_and_said_where_it_is_some(self, policy: Policy) -> None:
        """In the sentences that custodians read before they sign."""
        assert policy.project("risk").discovery_delta == 0.0
        assert "discovered" not in plain_english(policy)
        assert "delta 1e-06 and a further delta of 1e-07 for keys" in plain_english(edited(*self.WRITTEN))

    def test_old_signatures_do_not_hold_for_it(self) -> None:
        """Whoever adds it needs the quorum anew."""
        with pytest.raises(PolicyError, match="not in force"):
            Signed(PAGE.replace(*self.WRITTEN), SIGNATURES).check(NOW)

    @pytest.mark.parametrize("wrong", ["-1e-7", "nan", "inf", "0.1", '"1e-7"'])
    def test_no_other_number_is_one(self, wrong: str) -> None:
        """The error names the field."""
        with pytest.raises(RequestError, match="discovery_delta"):
            edited(self.WRITTEN[0], f"delta = 1e-6\ndiscovery_delta = {wrong}")

    def test_a_capped_dataset_caps_it(self) -> None:
        """A project cannot have more of it than its dataset has; a dataset without a cap cannot cap this alone."""
        mine = PAGE.replace(*self.WRITTEN)
        capped = mine.replace("delta = 1e-5", "delta = 1e-5\nepsilon = 9.0")
        with pytest.raises(RequestError, match="larger discovery_delta"):
            Policy.parse(capped)
        Policy.parse(capped.replace("epsilon = 9.0", "epsilon = 9.0\ndiscovery_delta = 1e-7"))
        with pytest.raises(RequestError, match="not its epsilon"):
            Policy.parse(PAGE.replace("delta = 1e-5", "delta = 1e-5\ndiscovery_delta = 1e-7"))


class TestMutants:
    """Each check taken out lets its attack through: the tests above have teeth."""

    def test_without_the_signature_check_a_forgery_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A statement that names a custodian and is signed by nobody."""
        forged = tuple(msgspec.structs.replace(s, signature=b"") for s in SIGNATURES)
        with pytest.raises(PolicyError):
            Signed(PAGE, forged).check(NOW)
        monkeypatch.setattr(Statement, "holds", lambda self: True)
        Signed(PAGE, forged).check(NOW)

    def test_without_the_hash_an_edit_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A page with another budget under old signatures."""
        richer = PAGE.replace("epsilon = 4.0", "epsilon = 400.0")
        monkeypatch.setattr(Policy, "hash", property(lambda self: bytes.fromhex(SIGNATURES[0].policy)))
        assert Signed(richer, SIGNATURES).check(NOW).project("risk").epsilon == 400.0
