"""Quotes from a real site: free, binding, refused with a reason, and the price of what is then asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hospital
import pytest
import torch
import ward
from torch import nn

import rapha_lab as rapha
from rapha_lab.client.site import Dataset, Site
from rapha_lab.protocol.errors import BudgetError, RaphaError, RequestError

LINEAR = f"""
import torch
model = torch.nn.Linear({len(ward.FEATURES)}, 1)
"""
CHOICE = (
    f'patients.train.fit(model, inputs={ward.FEATURES}, target="died", epsilon=1, epochs=3, runs=2, '
    'candidates=[{"lr": 0.1}, {"lr": 1.0, "clip": 0.5}])'
)
FIT = f'patients.train.fit(model, inputs={ward.FEATURES}, target="died", epsilon=2, epochs=3)'
LOOP = f"""
for batch in patients.train.batches(size=200, epochs=1, epsilon=1.5):
    score = model(batch[{ward.FEATURES}]).squeeze(-1)
    torch.nn.functional.binary_cross_entropy_with_logits(score, batch["died"]).backward()
"""
EVALUATE = f'patients.test.evaluate(model, ["auroc"], inputs={ward.FEATURES}, target="died", epsilon=0.7)'

ASKED = [
    ("patients.count(epsilon=0.3)", "count", {"epsilon": 0.3}),
    ("patients.train.count(epsilon=0.3)", "count", {"epsilon": 0.3, "split": "train"}),
    ('patients.mean("potassium", epsilon=0.2)', "mean:potassium", {"epsilon": 0.2}),
    (
        'patients.test.histogram("chapter", epsilon=0.2)',
        "histogram:chapter",
        {"epsilon": 0.2, "split": "test"},
    ),
    ('patients.var("potassium", epsilon=0.2)', "variance:potassium", {"epsilon": 0.2}),
    (
        'patients.describe(["potassium", "chapter"], epsilon=0.2)',
        "describe:potassium,chapter",
        {"epsilon": 0.2},
    ),
    (
        'import polars as pl\npatients.where(pl.col("potassium") > 4).group_by("chapter").count(error=40)',
        "count",
        {"by": ["chapter"], "error": 40},
    ),
    (LINEAR + FIT, torch.nn.Linear(len(ward.FEATURES), 1), {"epsilon": 2, "epochs": 3}),
    (LINEAR + CHOICE, "fit", {"epsilon": 1, "epochs": 3, "runs": 2}),
    (LINEAR + LOOP, "fit", {"epsilon": 1.5, "epochs": 1, "batch": 200}),
    (LINEAR + EVALUATE, "evaluate:auroc", {"epsilon": 0.7}),
]


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[hospital.Site, Site]]]:
    """One whose schema declares its patients, and one whose schema does not."""
    declared, secret = ward.SCHEMA, ward.SCHEMA.replace(f"patients = {ward.PATIENTS}\n", "")
    first, second = (tmp_path_factory.mktemp(name) for name in ("declared", "undeclared"))
    here, key = hospital.prepare(first, declared, ward.frame(), "ward", epsilon=9.0, largest_model=100)
    there, other = hospital.prepare(second, secret, ward.frame(), "ward", epsilon=1.0)
    with hospital.running(here) as (site, url), hospital.running(there) as (bare, far):
        found = {
            "declared": (site, hospital.connected(url, key)),
            "undeclared": (bare, hospital.connected(far, other)),
        }
        yield found
        for _, connected in found.values():
            connected.end_sessions()


@pytest.fixture(scope="module")
def cohort(hospitals: Any) -> Dataset:
    """The ward of the site that declares its number of patients."""
    return hospitals["declared"][1].dataset("ward")


@pytest.fixture(scope="module")
def undeclared(hospitals: Any) -> Dataset:
    """The ward of the site that does not."""
    return hospitals["undeclared"][1].dataset("ward")


def accounts(cohort: Dataset) -> dict[str, dict[str, float]]:
    """What the project has in each split."""
    return cohort.budget["p"]


class TestPrices:
    @pytest.mark.parametrize(("source", "what", "settings"), ASKED, ids=lambda value: str(value)[:30])
    def test_what_is_charged_is_what_was_quoted(self, cohort, source, what, settings):
        """In every split that is looked at; nothing in the others."""
        quote, before = cohort.quote(what, **settings), accounts(cohort)
        cohort.site.run(source, "ward").wait()
        after = accounts(cohort)
        assert quote.fits
        for split, account in after.items():
            if split not in quote.accounts:
                assert account == before[split]
                continue
            standing = quote.accounts[split]
            assert standing.before == before[split]["spent"]
            assert standing.room == account["room"]
            assert (standing.spent, standing.left) == pytest.approx(
                (account["spent"], account["left"]), rel=1e-9
            )

    def test_the_error_quoted_is_the_error_released(self, cohort):
        """To the last digit for a count, whose error no patient moves."""
        quote = cohort.quote("count", error=20.0)
        (release,) = cohort.site.run(f"patients.count(epsilon={quote.epsilon!r})", "ward").wait().releases
        assert release.error == quote.error <= 20.0

    def test_the_error_quoted_for_a_mean_is_not_exceeded_by_much(self, cohort):
        """It is for a mean at a bound; the number of patients, and how many lack the value, differ a little."""
        quote = cohort.quote("mean:age", epsilon=0.5)
        (release,) = cohort.site.run('patients.mean("age", epsilon=0.5)', "ward").wait().releases
        least, most = quote.figures.values()
        assert 0.8 * least < release.error < 1.2 * most

    def test_a_question_quoted_as_too_dear_is_refused_and_the_proposed_one_is_not(self, undeclared):
        """Both by the same ledger; the evaluation is asked for by its own ε."""
        dear = undeclared.quote("evaluate:auroc", epsilon=5.0)
        assert not dear.fits
        assert (dear.spent, dear.largest is not None) == (dear.accounts["test"].before, True)
        evaluate = LINEAR + EVALUATE.replace("epsilon=0.7", "epsilon={}")
        with pytest.raises(BudgetError) as refusal:
            undeclared.site.run(evaluate.format(5.0), "ward").wait()
        assert repr(dear.largest) in str(refusal.value)
        undeclared.site.run(evaluate.format(dear.largest), "ward").wait()


class TestFree:
    def test_quotes_charge_nothing_and_are_not_logged(self, hospitals, cohort):
        """However many are asked for, the accounts and the log are as they were."""
        site = hospitals["declared"][0]
        before = accounts(cohort), site._curator.look_up("checkpoint")
        for _, what, settings in ASKED:
            cohort.quote(what, **settings)
            cohort.quote(what, **settings, patients=4000)
        assert (accounts(cohort), site._curator.look_up("checkpoint")) == before

    def test_a_quote_is_given_while_a_training_holds_its_reservation(self, cohort):
        """What is reserved counts as spent."""
        long = FIT.replace("epochs=3", "epochs=10_000").replace("epsilon=2", "epsilon=0.5")
        before = cohort.quote("fit", epsilon=0.5)
        job = cohort.site.run(LINEAR + long, "ward", session="long")
        while not job.told.get("step"):
            job.poll(0.5)
        assert cohort.quote("fit", epsilon=0.5).accounts["train"].before > before.accounts["train"].before
        job.cancel()
        with pytest.raises(RaphaError):
            job.wait()


class TestHostile:
    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"epsilon": -1}, "epsilon"),
            ({"epsilon": 1e300}, "epsilon"),
            ({"epsilon": "1"}, "epsilon"),
            ({"epsilon": None}, "epsilon"),
            ({"epsilon": 1e-5}, "epsilon"),
            ({"kind": "peek"}, "kind"),
            ({"split": "everybody"}, "split"),
            ({"patients": 0}, "patients"),
            ({"patients": 2**70}, "patients"),
            ({"kind": "fit"}, "batch"),
            ({"kind": "fit", "steps": 10**9, "batch": 10}, "steps"),
            ({"kind": "fit", "steps": 10, "batch": 10**6}, "batch"),
            ({"kind": "fit", "steps": 10, "batch": 10, "size": 10**6}, None),
            ({"kind": "mean"}, "column"),
            ({"kind": "mean", "column": "../../etc/passwd"}, "column"),
            ({"kind": "mean", "column": "hospital_number"}, "hospital_number"),
            ({"kind": "mean", "column": "sex"}, "sex"),
            ({"kind": "histogram", "column": "age", "bins": 10**9}, "bins"),
            ({"kind": "evaluate", "metrics": ["everything"]}, "metrics"),
            ({"kind": "evaluate", "metrics": []}, "metrics"),
            ({"kind": "evaluate", "prevalence": 0}, "prevalence"),
            ({"kind": "evaluate", "auroc": 1.0}, "auroc"),
            ({"records": True}, None),
        ],
    )
    def test_a_malformed_question_is_a_typed_error(self, cohort, change, field):
        """Which names the field, and the site goes on."""
        asks = [{"kind": "count", "epsilon": 0.1} | change]
        with pytest.raises(RaphaError) as refusal:
            cohort.site._channel.call("quote", {"dataset": "ward", "asks": asks})
        assert "internal" not in str(refusal.value)
        assert field is None or field in str(refusal.value.field)
        assert cohort.quote("count", epsilon=0.1).fits

    @pytest.mark.parametrize(
        "message",
        [
            {"dataset": "ward"},
            {"dataset": "ward", "asks": []},
            {"dataset": "ward", "asks": [{"kind": "count", "epsilon": 0.1}] * 17},
            {"dataset": "elsewhere", "asks": [{"kind": "count", "epsilon": 0.1}]},
            {"dataset": "ward", "project": "q", "asks": [{"kind": "count", "epsilon": 0.1}]},
            [[]],
            "ward",
        ],
    )
    def test_a_malformed_message_is_a_typed_error(self, cohort, message):
        """Nobody's other project, no other dataset, not as many as one likes."""
        with pytest.raises(RaphaError) as refusal:
            cohort.site._channel.call("quote", message)
        assert "internal" not in str(refusal.value)

    @pytest.mark.parametrize(
        "what", ["", "mean", "mean:", "count:age", "total:age", 5, None, torch.nn.ReLU()]
    )
    def test_what_is_no_question_is_refused_here(self, cohort, what):
        """Before anything is sent."""
        with pytest.raises(RequestError):
            cohort.quote(what, epsilon=1)


class TestUndeclared:
    def test_what_needs_no_number_of_patients_has_a_quote(self, undeclared):
        """A count with its error; a mean and an evaluation with a price."""
        assert undeclared.quote("count", epsilon=0.1).error > 0
        assert undeclared.quote("mean:age", epsilon=0.1).error is None
        assert undeclared.quote("evaluate:auroc", epsilon=0.1).error is None

    @pytest.mark.parametrize(("what", "settings"), [("fit", {"epsilon": 1}), ("mean:age", {"error": 1})])
    def test_what_needs_one_says_so_and_can_be_planned_for_a_supposed_one(self, undeclared, what, settings):
        """Which is then marked hypothetical."""
        with pytest.raises(RequestError, match="declares no public number of patients"):
            undeclared.quote(what, **settings)
        quote = undeclared.quote(what, **settings, patients=2000)
        assert quote.hypothetical
        assert "Hypothetical" in repr(quote)


class TestShown:
    def test_a_budget_shows_gauges_and_is_still_a_dict(self, cohort):
        """By project and split, in words too."""
        budget = cohort.budget
        shown = budget._repr_mimebundle_()
        assert budget["p"]["train"]["epsilon"] == 9.0
        assert isinstance(budget, dict)
        assert shown["text/html"].count("<svg") == 3
        assert "p, train: ε" in shown["text/plain"] == repr(budget)

    def test_a_quote_says_that_nothing_was_spent(self, cohort):
        """In HTML and in text, with each account."""
        shown = cohort.quote("histogram:age", epsilon=0.5)._repr_mimebundle_()
        for text in shown.values():
            assert "nothing was spent" in text
            assert "validation" in text
        assert float(cohort.quote("count", epsilon=0.25)) == 0.25


MISCALLED = {
    "cohort.plan()": ("what", "cohort.plan(model)"),
    "cohort.plan('fit', epsilom=1)": ("epsilom", "epsilon=?"),
    "cohort.quote()": ("what", "cohort.quote("),
    "cohort.quote('fit', epsilon=1, bach=3)": ("bach", "batch=?"),
    "cohort.quote('evaluate:aurocc', epsilon=1)": ("metrics", "auroc?"),
    "cohort.quote('count', epsilon=1, split='tain')": ("split", "train?"),
    "cohort.quote('count', epsilon='1')": ("epsilon", "a number"),
    "cohort.quote(nn.Linear)": ("what", "Linear(...)"),
    "cohort.quotes(3)": ("asks", "cohort.quote("),
    "cohort.mock(n=5)": ("n", "patients=200"),
    "cohort.mock(-3)": ("patients", "0 or more"),
    "cohort.mock(seed='x')": ("seed", "a whole number"),
    "cohort.inputs(cohort.mock())": ("columns", "cohort.inputs(frame, FEATURES)"),
    "cohort.inputs(cohort.mock(), 3)": ("columns", "age"),
    "site.dataset()": ("name", "site.dataset("),
    "site.attach(3)": ("job", "site.jobs()"),
    "site.cancel()": ("job", "site.jobs()"),
    "rapha.connect(3)": ("where", "https://"),
    "rapha.connect(wher='demo')": ("wher", "where=?"),
    "rapha.check()": ("model", "of=cohort"),
    "rapha.check(nn.Linear(1, 1), None, 3, 'died', of=cohort)": ("columns", "age"),
    "rapha.fix(3)": ("model", "nn.Module"),
    "rapha.fix()": ("model", "rapha.fix(model)"),
}


@pytest.mark.parametrize("call", MISCALLED)
def test_a_call_that_is_made_otherwise_names_the_argument_and_says_how_it_is_made(cohort: Dataset, call: str):
    """Where Python's own error would name neither the fix nor an example, and where nothing was said at all."""
    field, says = MISCALLED[call]
    Dataset.plan = rapha.plan  # as the notebook's extension does
    try:
        with pytest.raises(RequestError) as refused:
            eval(call, {"cohort": cohort, "site": cohort.site, "rapha": rapha, "nn": nn})
    finally:
        del Dataset.plan
    assert refused.value.field == field
    assert says in f"{refused.value}"
