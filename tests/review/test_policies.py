"""Drafting, comparing and succeeding policies: nothing opens without the signatures it needs."""

from __future__ import annotations

import itertools
import os
import socket
from pathlib import Path

import clinic
import hospital
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from rapha_lab.cli import main
from rapha_lab.client.drafting import Draft
from rapha_lab.client.policies import diff
from rapha_lab.curator.inforce import InForce
from rapha_lab.curator.ledger import Ledger
from rapha_lab.enclave.site import Config, _bound
from rapha_lab.protocol.errors import PolicyError, RaphaError, RequestError, SiteError
from rapha_lab.protocol.keys import PrivateKey
from rapha_lab.protocol.policy import Policy, Signed, state

DEEP = 10_000 if os.environ.get("RAPHA_LAB_DEEP") else 100
PASSPHRASE = "a long passphrase"


def fixed(number: int) -> PrivateKey:
    return PrivateKey("ed25519", (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32),))


CUSTODIANS, STRANGERS, RESEARCHER = [fixed(n) for n in (1, 2, 3)], [fixed(8), fixed(9)], fixed(4)
FIRST = Policy.parse(clinic.page(RESEARCHER, CUSTODIANS).text.replace("quorum = 3", "quorum = 2"))
EDITS = (
    ("epsilon = 900.0", "epsilon = 990.0"),
    ("delta = 1e-5", "delta = 1e-4"),
    ('lanes.train.release = "two custodians"', 'lanes.train.release = "auto"'),
    ('sandbox = "S1"', 'sandbox = "S3"'),
    ("quorum = 2", "quorum = 1"),
    ("quorum = 2", "quorum = 3"),
    (str(CUSTODIANS[0].public), str(STRANGERS[0].public)),
    (f'["{RESEARCHER.public}"]', f'["{RESEARCHER.public}", "{STRANGERS[1].public}"]'),
    ("expires = 2099-01-01", "expires = 2199-01-01"),
    ("smallest_cohort = 10", "smallest_cohort = 1"),
)


GROWN = (
    ("epsilon = 900.0", "epsilon = 900.0000001"),
    ("delta = 1e-5", "delta = 1.1e-5"),
    ('lanes.train.release = "two custodians"', 'lanes.train.release = "one custodian"'),
    ('lanes.aggregate.release = "one custodian"', 'lanes.aggregate.release = "auto"'),
    ('lanes.review.release = "one custodian"\n', ""),
    (f'["{RESEARCHER.public}"]', f'["{STRANGERS[0].public}"]'),
    ("expires = 2099-01-01", "expires = 2099-01-02"),
    ("smallest_cohort = 10", "smallest_cohort = 9"),
    ('measurements = ["any simulated"]', f'measurements = ["any simulated", "sha256:{"0" * 64}"]'),
    ("quorum = 2", "quorum = 1"),
    (str(CUSTODIANS[0].public), str(STRANGERS[0].public)),
)
"""Changes of the page, most of which grant more than it did; the smallest that count."""


def granted(policy: Policy) -> object:
    """All that a page allows to anybody, and who judges the next one."""
    return policy.head.expires, policy.head.quorum, policy.custodians, policy.datasets, policy.projects


class TestSuccession:
    @settings(max_examples=DEEP, deadline=None)
    @given(
        st.lists(st.sampled_from(EDITS), max_size=4, unique=True),
        st.integers(1, 3),
        st.sets(st.sampled_from(range(5))),
        st.sets(st.sampled_from(range(5)), max_size=1),
        st.integers(0, 2**32),
    )
    def test_no_byte_changes_without_the_signatures_it_needs(
        self, edits: list[tuple[str, str]], version: int, sign: set[int], veto: set[int], seed: int
    ) -> None:
        """Budgets, lanes, people, a single byte anywhere: the old page's quorum and the new one's, and no veto."""
        text = FIRST.text.replace("version = 1", f"version = {version}")
        for old, new in edits:
            text = text.replace(old, new)
        if seed % 2:  # one byte anywhere, too
            raw = bytearray(text.encode())
            raw[seed % len(raw)] ^= 1 << (seed >> 16) % 7
            text = raw.decode(errors="replace")
        try:
            page = Policy.parse(text)
        except RequestError:
            return  # it does not even read
        people = [*CUSTODIANS, *STRANGERS]
        said = [state("sign", page, people[n]) for n in sign] + [state("veto", page, people[n]) for n in veto]
        said += [state("sign", FIRST, key) for key in CUSTODIANS]  # of the old page: no good for another
        try:
            found = Signed(page.text, tuple(said)).check(after=FIRST)
        except PolicyError:
            return
        names = {str(people[n].public) for n in sign}
        if found.hash != FIRST.hash:
            assert found.head.version > FIRST.head.version
            assert len(names & {c.key for c in FIRST.custodians}) >= FIRST.head.quorum
            assert len(names & {c.key for c in found.custodians}) >= found.head.quorum
        judges = {c.key for c in (*FIRST.custodians, *found.custodians)}
        assert not {str(people[n].public) for n in veto} & judges

    @pytest.mark.parametrize("grown", range(len(GROWN)))
    def test_no_budget_grows_and_no_lane_opens_without_the_signatures_it_needs(self, grown: int) -> None:
        """Whoever of five people signs, all 32 ways: what is granted is the old page's, or both quorums are there."""
        old, new = GROWN[grown]
        assert old in FIRST.text
        page = Policy.parse(FIRST.text.replace("version = 1", "version = 2").replace(old, new))
        assert granted(page) != granted(FIRST)
        people = [*CUSTODIANS, *STRANGERS]
        words = [(state("sign", page, key), state("sign", FIRST, key)) for key in people]
        for chosen in itertools.product((False, True), repeat=len(people)):
            said = tuple(both[0] for both, yes in zip(words, chosen, strict=True) if yes)
            signers = {str(key.public) for key, yes in zip(people, chosen, strict=True) if yes}
            enough = all(len(signers & {c.key for c in p.custodians}) >= p.head.quorum for p in (FIRST, page))
            try:
                # what was signed of the old page comes along, and is good for nothing
                found = Signed(page.text, (*said, *(both[1] for both in words))).check(after=FIRST)
            except PolicyError:
                assert not enough
                continue
            assert enough
            assert granted(found) == granted(page)

    def test_a_page_with_new_judges_does_not_put_itself_in_force(self, tmp_path: Path) -> None:
        """Not at the next request, not after a restart; with the old judges' signatures it does."""
        coup = Policy.parse(
            clinic.page(RESEARCHER, [*STRANGERS, CUSTODIANS[2]], version=2, train="auto").text
        )
        clinic.write(tmp_path, FIRST, CUSTODIANS)
        ledger = Ledger(tmp_path / "ledger.sqlite", fixed(7).parts[0])
        assert InForce(tmp_path / "policy.toml", ledger)().hash == FIRST.hash
        clinic.write(tmp_path, coup, [*STRANGERS, CUSTODIANS[2]])
        for _ in range(2):
            with pytest.raises(PolicyError, match="Version 1 needs 2 custodians' signatures and has 1"):
                InForce(tmp_path / "policy.toml", ledger)()
        clinic.write(tmp_path, coup, [*STRANGERS, *CUSTODIANS])
        assert InForce(tmp_path / "policy.toml", ledger)().hash == coup.hash
        clinic.write(tmp_path, FIRST, CUSTODIANS)
        with pytest.raises(PolicyError, match="older version"):
            InForce(tmp_path / "policy.toml", ledger)()
        told = [msgspec.json.decode(entry) for entry in ledger.log.entries()]
        assert [t["hash"] for t in told if t["kind"] == "policy"] == [FIRST.hash.hex(), coup.hash.hex()]
        ledger.close()

    def test_a_veto_outlives_its_line_in_the_file(self, tmp_path: Path) -> None:
        """Once seen it holds, also after a restart, whoever takes it out of the file."""
        clinic.write(tmp_path, FIRST, CUSTODIANS)
        ledger = Ledger(tmp_path / "ledger.sqlite", fixed(7).parts[0])
        path = tmp_path / "policy.toml"
        whole = Path(f"{path}.signatures").read_bytes()
        in_force = InForce(path, ledger)
        in_force()
        in_force.state(state("revoke", FIRST, CUSTODIANS[1], str(RESEARCHER.public)))
        assert in_force().projects_of(str(RESEARCHER.public)) == []
        Path(f"{path}.signatures").write_bytes(whole)
        assert InForce(path, ledger)().projects_of(str(RESEARCHER.public)) == []
        in_force.state(state("veto", FIRST, CUSTODIANS[2], reason="The ethics approval lapsed."))
        Path(f"{path}.signatures").write_bytes(whole)
        for found in (in_force, InForce(path, ledger)):
            with pytest.raises(PolicyError, match="ethics approval lapsed"):
                found()
        ledger.close()

    def test_a_strangers_word_closes_nothing(self, tmp_path: Path) -> None:
        """Nor does a signature sent as one, or a veto of another page."""
        clinic.write(tmp_path, FIRST, CUSTODIANS)
        ledger = Ledger(tmp_path / "ledger.sqlite", fixed(7).parts[0])
        in_force = InForce(tmp_path / "policy.toml", ledger)
        for said in (
            state("veto", FIRST, STRANGERS[0]),
            state("sign", FIRST, CUSTODIANS[0]),
            state("veto", "0" * 64, CUSTODIANS[0]),
            msgspec.structs.replace(state("veto", FIRST, STRANGERS[0]), key=str(CUSTODIANS[0].public)),
        ):
            with pytest.raises(PolicyError, match="closes nothing"):
                in_force.state(said)
        assert in_force().hash == FIRST.hash
        ledger.close()

    def test_a_page_that_closes_this_enclave_holds_from_the_next_request(self, tmp_path: Path) -> None:
        """A stronger sandbox is demanded: nothing is answered, and the page before does not come back."""
        stronger = FIRST.text.replace('sandbox = "S1"', 'sandbox = "S3"').replace(
            "version = 1", "version = 2"
        )
        clinic.write(tmp_path, FIRST, CUSTODIANS)
        ledger = Ledger(tmp_path / "ledger.sqlite", fixed(7).parts[0])

        def admits(policy: Policy) -> None:
            policy.admits("ward", "sha256:" + "0" * 64, simulated=True, tier="S2")

        in_force = InForce(tmp_path / "policy.toml", ledger, admits)
        assert in_force().hash == FIRST.hash
        clinic.write(tmp_path, Policy.parse(stronger), CUSTODIANS)
        for _ in range(2):
            with pytest.raises(PolicyError, match="sandbox is too weak"):
                in_force()
        clinic.write(tmp_path, FIRST, CUSTODIANS)
        with pytest.raises(PolicyError, match="older version"):
            in_force()
        ledger.close()

    def test_without_its_memory_the_coup_succeeds(self, tmp_path: Path) -> None:
        """The mutant that forgets the page before: the test above has teeth."""
        coup = Policy.parse(clinic.page(RESEARCHER, STRANGERS, version=2, train="auto").text)
        clinic.write(tmp_path, FIRST, CUSTODIANS)
        ledger = Ledger(tmp_path / "ledger.sqlite", fixed(7).parts[0])
        in_force = InForce(tmp_path / "policy.toml", ledger)
        in_force()
        clinic.write(tmp_path, coup, STRANGERS)
        with pytest.raises(PolicyError):
            in_force()
        in_force._before = None
        assert in_force().hash == coup.hash
        ledger.close()


class TestCommands:
    @pytest.fixture(autouse=True)
    def passphrase(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAPHA_LAB_PASSPHRASE", PASSPHRASE)

    def test_a_page_is_drafted_signed_checked_and_compared(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As a custodian would, from the answers to its end."""
        keys = []
        for name in ("guardian", "officer"):
            assert main(["keys", "new", str(tmp_path / name)]) == 0
            keys.append(capsys.readouterr().out.strip())
        page, people = (
            tmp_path / "policy.toml",
            f"A. Guardian, Caldicott Guardian, {keys[0]}; B. Officer, DPO, {keys[1]}",
        )
        answers = iter(["Ward study", "", "2099-12-31", people, "2", "ward", "mortality", keys[0], *[""] * 6])
        monkeypatch.setattr("builtins.input", lambda question: next(answers))
        assert main(["policy", "new", str(page)]) == 0
        assert "2 of these 2 must sign" in capsys.readouterr().out
        assert "#" in page.read_text()
        assert (
            main(["policy", "new", str(page), "--defaults", "--custodians", people, "--datasets", "w"]) == 1
        )
        assert "exists" in capsys.readouterr().err
        assert main(["policy", "sign", str(page), "--key", str(tmp_path / "guardian")]) == 0
        assert main(["policy", "check", str(page)]) == 1
        assert "Missing: B. Officer (DPO)" in capsys.readouterr().err
        assert main(["policy", "sign", str(page), "--key", str(tmp_path / "officer")]) == 0
        assert main(["policy", "check", str(page)]) == 0
        RESEARCHER.save(tmp_path / "stranger", os.environ["RAPHA_LAB_PASSPHRASE"])
        capsys.readouterr()
        for act, who, told in (
            (["veto", str(page), "--reason", "no"], "stranger", "none of this page's custodians"),
            (["revoke", str(page), "mortalty"], "guardian", "It names ed25519:"),
        ):
            before = Path(f"{page}.signatures").read_bytes()
            assert main(["policy", *act, "--key", str(tmp_path / who)]) == 1
            assert told in capsys.readouterr().err
            assert Path(f"{page}.signatures").read_bytes() == before
        richer = page.read_text().replace("version = 1", "version = 2").replace("epsilon = 3", "epsilon = 5")
        (tmp_path / "next.toml").write_text(richer + 'lanes.review.release = "two custodians"\n')
        capsys.readouterr()
        assert main(["policy", "diff", str(page), str(tmp_path / "next.toml")]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "~ It is version 2, after 1.",
            "+ Project mortality opens the lane review: two custodians release it.",
            "+ Project mortality may spend epsilon 5 per patient, not 3.",
        ]

    @pytest.mark.parametrize("listen", ["8470", ":8470", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:70000"])
    def test_a_site_that_would_listen_elsewhere_is_refused(self, tmp_path: Path, listen: str) -> None:
        """A port alone is not every interface."""
        config = tmp_path / "site.toml"
        config.write_text(f'name = "a"\nstate = "s"\npolicy = "p"\nlisten = "{listen}"\ndatasets = []\n')
        with pytest.raises(RequestError, match="no address and port") as refused:
            Config.load(config)
        assert refused.value.field == "listen"

    def test_an_address_in_use_is_named(self) -> None:
        """With what to set."""
        taken = socket.create_server(("127.0.0.1", 0))
        with taken, pytest.raises(SiteError, match="set another `listen`"):
            _bound("127.0.0.1", taken.getsockname()[1])

    def test_answers_that_do_not_fit_are_named(self) -> None:
        """With the form they should have."""
        whole = {"custodians": f"A, DPO, {CUSTODIANS[0].public}", "datasets": "ward"}
        assert Draft(**whole).page().projects[0].lanes["train"].release == "one custodian"
        for wrong, field in (
            ({"custodians": "A. Guardian"}, "custodians"),
            ({"datasets": ""}, "datasets"),
            ({"lanes": "browse"}, "lanes"),
            ({"lanes": "review = auto"}, "policy"),
            ({"epsilon": "much"}, "policy"),
        ):
            with pytest.raises(RequestError) as refused:
                Draft(**(whole | wrong)).page()
            assert refused.value.field == field

    def test_a_diff_names_people_keys_and_lanes(self) -> None:
        """In sentences that need no TOML."""
        pages = FIRST.text, FIRST.text
        for old, new in EDITS:
            pages = pages[0], pages[1].replace(old, new)
        text = "\n".join(diff(FIRST, Policy.parse(pages[1])))
        for said in (
            "+ Project p may spend epsilon 990 per patient, not 900.",
            "+ Project p, lane train: released at once; it was that two custodians release it.",
            "- Dataset ward opens beside a sandbox of tier S3, not S1.",
            f"+ Project p gets a new researcher, {STRANGERS[1].public}.",
            "~ C0 (Caldicott Guardian) signs with another key",
            "+ Project p needs cohorts of 1 patients, not 10.",
        ):
            assert said in text, said


def test_a_veto_over_the_network_ends_a_running_training(tmp_path: Path) -> None:
    """At its next step; what ran stays charged, and the next request is refused with the reason."""
    from test_running_cells import LONG, until

    with clinic.open_clinic(tmp_path, train="auto") as opened:
        job = opened.connect().run(LONG, "ward")
        while not job.told.get("step"):
            job.poll(0.2)
        opened.custodian(1).veto("A patient complained.")
        cell = opened.site.cells.get(str(opened.researcher.public), job.id)
        until(lambda: cell.state in ("failed", "lost"))  # at its next step, or its session ended before
        assert hospital.spent(tmp_path)["train"] > 0
        with pytest.raises(RaphaError, match="A patient complained"):
            job.poll()
