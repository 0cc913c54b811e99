"""Caps over all projects, spends made elsewhere, and reservations that time out, as custodians and researchers meet them."""

from pathlib import Path

import msgspec
import pytest

from rapha_lab.cli import main
from rapha_lab.client.logs import verify
from rapha_lab.client.policies import plain_english
from rapha_lab.curator.accounting import Gaussian, SampledGaussian, noise_for, order_for, units
from rapha_lab.curator.funds import follow as funded
from rapha_lab.curator.funds import fund
from rapha_lab.curator.ledger import ALL, PATIENCE, Ledger
from rapha_lab.protocol.checkpoint import open_checkpoint
from rapha_lab.protocol.errors import BudgetError, PolicyError, RequestError
from rapha_lab.protocol.keys import PrivateKey
from rapha_lab.protocol.policy import Policy, Signed, state
from rapha_lab.protocol.spend import spend

CUSTODIAN, STRANGER = PrivateKey.create(), PrivateKey.create()
WORD = "ten or more characters"
TRAINING = SampledGaussian(1.0, 60.0, 10)


def page(cap: float | None = None, version: int = 1, projects: tuple[str, ...] = ("risk", "care")) -> str:
    """A policy of two projects of ε = 1 each."""
    lines = ["[policy]", 'name = "Test"', f"version = {version}", 'purpose = ["DUO:0000042"]']
    lines += ["expires = 2099-01-01", "quorum = 1"]
    lines += ["[[custodians]]", 'name = "C"', 'role = "Guardian"', f'key = "{CUSTODIAN.public}"']
    lines += ["[[datasets]]", 'name = "flchain"', 'measurements = ["any simulated"]', "delta = 1e-6"]
    lines += [f"epsilon = {cap}"] if cap else []
    for name in projects:
        lines += ["[[projects]]", f'name = "{name}"', "researchers = []", 'datasets = ["flchain"]']
        lines += ["epsilon = 1.0", "delta = 1e-6", "largest_model = 9", "smallest_cohort = 9"]
    return "\n".join(lines) + "\n"


def signed(folder: Path, text: str) -> Path:
    """The page on disk, in force."""
    path = folder / "policy.toml"
    path.write_text(text)
    said = state("sign", Policy.parse(text), CUSTODIAN)
    Path(f"{path}.signatures").write_bytes(msgspec.json.encode(said) + b"\n")
    return path


def follow(ledger: Ledger, path: Path):
    """The policy in force, with its funds in the ledger."""
    return funded(ledger, lambda: Signed.load(path).check(), path)


def answer(epsilon: float) -> Gaussian:
    """One answer of this guarantee."""
    return Gaussian(noise_for(Gaussian, epsilon, 1e-6))


def run(ledger: Ledger, job: str, project: str, epsilon: float, splits: tuple[str, ...] = ("train",)) -> None:
    """A job from its reservation to its release."""
    ledger.reserve(job, project, "flchain", splits, answer(epsilon), bytes(32))
    ledger.touch(job, 1)
    ledger.settle(job, job.encode())


@pytest.fixture
def capped(path, key, tmp_path):
    """A ledger that follows a policy with ε = 1.2 over both projects."""
    ledger = Ledger(path, key)
    follow(ledger, signed(tmp_path, page(1.2)))()
    yield ledger
    ledger.close()


class TestCaps:
    def test_projects_together_are_stopped_where_each_alone_is_not(self, capped):
        """The refusal says whose budget it is, and what it says would fit does."""
        run(capped, "first", "risk", 0.9)
        with pytest.raises(BudgetError, match="all projects together") as refused:
            run(capped, "second", "care", 0.9)
        fits = float(refused.value.instead.rsplit("=", 1)[1].rstrip("."))
        assert 0.3 < fits < 0.9
        run(capped, "second", "care", fits)

    def test_the_room_of_a_project_is_what_the_cap_leaves(self, capped):
        """And what it quotes is admitted, no more."""
        run(capped, "first", "risk", 0.9)
        room = capped.statement("care", "flchain", "train").room
        assert room < 0.9
        assert not capped.quote("care", "flchain", "train", answer(0.9)).fits
        assert capped.quote("care", "flchain", "train", answer(room)).fits
        run(capped, "second", "care", room)

    def test_splits_are_disjoint_patients_under_a_cap_too(self, capped):
        """What is spent on one leaves the other as it was."""
        run(capped, "first", "risk", 0.9)
        run(capped, "second", "care", 0.9, ("test",))
        assert capped.statement("care", "flchain", "validation").room == pytest.approx(1.0, abs=1e-3)

    def test_a_cap_signed_later_counts_what_was_spent_before_and_what_runs(self, ledger):
        """At its own order; the bundle of the log still adds up, and a running job settles."""
        ledger.open_account("care", "flchain", "train", 1.0, 1e-6)
        run(ledger, "first", "risk", 0.5)
        ledger.reserve("void", "risk", "flchain", ["train"], TRAINING, bytes(32))
        ledger.abandon("void", "cancelled")
        ledger.reserve("open", "care", "flchain", ["train"], TRAINING, bytes(32))
        ledger.touch("open", 3)
        fund(ledger, Policy.parse(page(2.0)), "risk", "flchain", ["train"])
        order = order_for(2.0, 1e-6)
        row = "SELECT spent FROM account WHERE project = '*'"
        before = units(answer(0.5), order.alpha)
        assert ledger._db.execute(row).fetchone() == (before + units(TRAINING, order.alpha),)
        ledger.settle("open", b"weights")
        assert ledger._db.execute(row).fetchone() == (before + units(TRAINING.part(3), order.alpha),)
        bundled(ledger)

    def test_a_cap_below_what_was_spent_is_refused(self, ledger):
        """Nothing is written of it."""
        run(ledger, "first", "risk", 0.9)
        size = ledger.log.size()
        with pytest.raises(PolicyError, match="cannot become"):
            ledger.open_account(ALL, "flchain", "train", 0.5, 1e-6)
        assert ledger.log.size() == size
        assert ledger._db.execute("SELECT count(*) FROM account WHERE project = '*'").fetchone() == (0,)

    def test_a_cap_stays_until_another_is_signed(self, capped, tmp_path):
        """A page that forgets it lifts nothing."""
        run(capped, "first", "risk", 0.9)
        follow(capped, signed(tmp_path, page(None, version=2)))()
        with pytest.raises(BudgetError, match="all projects together"):
            run(capped, "second", "care", 0.9)
        follow(capped, signed(tmp_path, page(3.0, version=3)))()
        run(capped, "second", "care", 0.9)

    def test_a_smaller_budget_that_cannot_be_yet_closes_its_own_account_alone(self, ledger, tmp_path):
        """Others go on, and it is in force once what it lacks has come back."""
        follow(ledger, signed(tmp_path, page()))()
        ledger.reserve("open", "risk", "flchain", ["train"], answer(0.9), bytes(32))
        smaller = page(version=2).replace("epsilon = 1.0", "epsilon = 0.5", 1)
        in_force = follow(ledger, signed(tmp_path, smaller))
        policy = in_force()
        with pytest.raises(PolicyError, match="cannot become"):
            fund(ledger, policy, "risk", "flchain", ["train"])
        fund(ledger, policy, "care", "flchain", ["train"])
        run(ledger, "other", "care", 0.5)
        assert ledger.statement("risk", "flchain", "test").epsilon == 0.5
        ledger.abandon("open", "cancelled")
        in_force()
        assert ledger.statement("risk", "flchain", "train").epsilon == 0.5

    def test_it_stands_on_the_page_in_words(self):
        """For those who sign it."""
        assert "All projects together: per patient epsilon 1.2 at most" in plain_english(
            Policy.parse(page(1.2))
        )
        assert "No cap on what all projects together" in plain_english(Policy.parse(page()))


class TestSpendsElsewhere:
    def say(self, path: Path, *, key: PrivateKey = CUSTODIAN, **fields) -> None:
        """Append a custodian's statement."""
        told = {"project": "risk", "dataset": "flchain", "split": "train", "reason": "an earlier paper"}
        with Path(f"{path}.spends").open("ab") as file:
            file.write(msgspec.json.encode(spend(key, **(told | {"epsilon": 0.3} | fields))) + b"\n")

    def test_a_custodians_word_is_charged_once_and_from_then_on(self, capped, tmp_path):
        """To the project and to the cap, whatever happens to the file; it is in the log."""
        path = signed(tmp_path, page(1.2))
        in_force = follow(capped, path)
        in_force()
        before = capped.statement("risk", "flchain", "train").spent
        self.say(path)
        for _ in range(3):
            in_force()
        told = capped.statement("risk", "flchain", "train")
        assert before == 0.0
        assert 0.29 < told.spent < 0.32
        assert told.jobs == 1
        cap = capped._db.execute(
            "SELECT spent FROM account WHERE project = '*' AND split = 'train'"
        ).fetchone()
        assert cap[0] > 0
        Path(f"{path}.spends").unlink()
        follow(capped, path)()
        assert capped.statement("risk", "flchain", "train") == told
        assert bundled(capped).kinds["elsewhere"] == 1

    def test_more_than_there_is_closes_the_account(self, capped, tmp_path):
        """What happened happened: it is charged in full, and nothing more is admitted."""
        path = signed(tmp_path, page(1.2))
        self.say(path, rho=2.0, epsilon=None)
        follow(capped, path)()
        assert capped.statement("risk", "flchain", "train").left == 0.0
        assert capped.statement("risk", "flchain", "train").room == 0.0
        for project in ("risk", "care"):
            with pytest.raises(BudgetError):
                run(capped, project, project, 0.01)
        run(capped, "elsewhere", "care", 0.5, ("test",))
        bundled(capped)

    def test_a_spend_of_no_project_is_charged_to_the_cap_alone(self, capped, tmp_path):
        """Both projects then have less room, and neither spent it."""
        path = signed(tmp_path, page(1.2))
        self.say(path, project="*", epsilon=0.8)
        follow(capped, path)()
        told = capped.statement("risk", "flchain", "train")
        assert told.spent == 0.0
        assert told.room < 1.0

    @pytest.mark.parametrize(
        ("wrong", "why"),
        [
            ({"key": STRANGER}, "no custodian"),
            ({"project": "other"}, "no budget"),
            ({"dataset": "other"}, "no budget"),
        ],
    )
    def test_a_statement_that_does_not_hold_closes_the_site(self, capped, tmp_path, wrong, why):
        """What is left cannot be known, so the policy is not in force."""
        path = signed(tmp_path, page(1.2))
        self.say(path, **wrong)
        with pytest.raises(RequestError, match=why) as refused:
            follow(capped, path)()
        assert refused.value.field == "spends"

    def test_an_altered_or_garbled_line_closes_the_site(self, capped, tmp_path):
        """Each way of altering it."""
        path = signed(tmp_path, page(1.2))
        self.say(path)
        beside = Path(f"{path}.spends")
        good = beside.read_bytes()
        for bad in (
            good.replace(b"0.3", b"0.1"),
            good[:-9] + b"\n",
            b"{}\n",
            good.replace(b'"epsilon":0.3', b'"epsilon":null'),
        ):
            beside.write_bytes(bad)
            with pytest.raises(RequestError) as refused:
                follow(capped, path)()
            assert refused.value.field == "spends"
        beside.write_bytes(good)
        follow(capped, path)()

    def test_what_is_charged_stays_when_its_custodian_goes(self, capped, tmp_path):
        """A later policy need not know who said it."""
        path = signed(tmp_path, page(1.2))
        self.say(path)
        follow(capped, path)()
        changed = page(1.2, version=2).replace(str(CUSTODIAN.public), str(STRANGER.public))
        path.write_text(changed)
        said = state("sign", Policy.parse(changed), STRANGER)
        Path(f"{path}.signatures").write_bytes(msgspec.json.encode(said) + b"\n")
        follow(capped, path)()
        assert capped.statement("risk", "flchain", "train").spent > 0.29

    @pytest.mark.parametrize(
        "amount", [{"epsilon": -1.0}, {"epsilon": None}, {"rho": 0.1}, {"epsilon": float("nan")}]
    )
    def test_an_amount_that_is_none_is_refused_before_it_is_signed(self, tmp_path, amount):
        """Nothing negative gives anything back."""
        with pytest.raises(RequestError):
            self.say(tmp_path / "policy.toml", **amount)

    def test_a_custodian_says_it_on_the_command_line(self, capped, tmp_path, monkeypatch, capsys):
        """And is refused there what the site would refuse."""
        monkeypatch.setenv("RAPHA_LAB_PASSPHRASE", WORD)
        path = signed(tmp_path, page(1.2))
        CUSTODIAN.save(tmp_path / "key", WORD)
        line = ["policy", "spend", str(path), "--key", str(tmp_path / "key"), "--dataset", "flchain"]
        line += ["--split", "train", "--epsilon", "0.2", "--reason", "a table in the annual report"]
        assert main([*line, "--project", "nobody"]) == 1
        assert "no budget" in capsys.readouterr().err
        assert main([*line, "--project", "risk"]) == 0
        follow(capped, path)()
        assert 0.19 < capped.statement("risk", "flchain", "train").spent < 0.21


class TestTimeOuts:
    @pytest.fixture
    def slow(self, path, key):
        """A ledger whose clock stands still until it is moved."""
        self.now = 0.0
        ledger = Ledger(path, key, clock=lambda: self.now)
        ledger.open_account("risk", "flchain", "train", 1.0, 1e-6)
        yield ledger
        ledger.close()

    def test_what_never_began_is_given_back_to_others(self, slow):
        """A reservation that nobody uses blocks nobody for ever, and cannot be used any more."""
        slow.reserve("idle", "risk", "flchain", ["train"], answer(0.9), bytes(32))
        with pytest.raises(BudgetError):
            run(slow, "other", "risk", 0.9)
        self.now = PATIENCE + 1
        run(slow, "other", "risk", 0.9)
        with pytest.raises(RequestError, match="not open"):
            slow.touch("idle", 1)

    def test_what_ran_stays_charged_and_the_rest_comes_back(self, slow):
        """A loop that was left open."""
        slow.reserve("loop", "risk", "flchain", ["train"], TRAINING, bytes(32))
        slow.touch("loop", 4)
        self.now = PATIENCE + 1
        slow.statement("risk", "flchain", "train")
        assert slow._db.execute("SELECT spent FROM account").fetchone() == (
            units(TRAINING.part(4), order_for(1.0, 1e-6).alpha),
        )
        with pytest.raises(RequestError, match="not open"):
            slow.settle("loop", b"weights")

    def test_one_long_step_does_not_time_out(self, slow):
        """All it reserved is touched: there is nothing to give back, and its answer is paid for."""
        slow.reserve("long", "risk", "flchain", ["train"], answer(0.5), bytes(32))
        slow.touch("long", 1)
        self.now = 100 * PATIENCE
        slow.statement("risk", "flchain", "train")
        slow.settle("long", b"answer")


def bundled(ledger: Ledger):
    """The log as a bundle, verified from its first entry to its last."""
    import json

    from rapha_lab.protocol.keys import PublicKey

    public = PublicKey("ed25519", ledger._key.public_key().public_bytes_raw())
    head = {"checkpoint": ledger.log.checkpoint(), "key": str(public)}
    path = Path(ledger._db.execute("PRAGMA database_list").fetchone()[2]).parent / "bundle"
    signed = ledger.log.signed(0, 1000)
    lines = [json.dumps(head), *(json.dumps([body.decode(), said]) for body, said in signed)]
    path.write_text("\n".join(lines) + "\n")
    audit = verify(path)
    spent = {account.label: account.spent for account in map(ledger._numbered, numbers(ledger))}
    assert {name: account["spent"] for name, account in audit.accounts.items()} == spent
    assert audit.checkpoint == open_checkpoint(ledger.log.checkpoint(), ledger._key.public_key())
    return audit


def numbers(ledger: Ledger) -> list[int]:
    """The accounts' numbers."""
    return [number for (number,) in ledger._db.execute("SELECT number FROM account").fetchall()]
