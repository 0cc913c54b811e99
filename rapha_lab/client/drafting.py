"""Drafts a policy's page from a few answers; every line says what it means, and nothing is in force before it is signed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import get_args

from rapha_lab.client.policies import DUO
from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.policy import LaneName, Policy

__all__ = ["QUESTIONS", "Draft", "ask"]

LANES = get_args(LaneName)
RELEASES = ("auto", "one custodian", "two custodians")
SEMICOLONS = "Separate them with semicolons."


@dataclass
class Draft:
    """What a policy needs to know; lists as they are typed, with semicolons between their items.

    Attributes:
        custodians: "Name, role, ed25519:..." each.
        datasets: "name" or "name, measurement" each.
        researchers: public keys.
        lanes: "aggregate" or "aggregate = auto" each; a lane that names no one asks one custodian.
    """

    name: str = "Research policy"
    purpose: str = "DUO:0000006"
    expires: str = field(default_factory=lambda: str((datetime.now(UTC) + timedelta(days=365)).date()))
    custodians: str = ""
    quorum: str = ""
    datasets: str = ""
    project: str = "study"
    researchers: str = ""
    epsilon: str = "3"
    delta: str = "1e-6"
    smallest_cohort: str = "100"
    largest_model: str = "1_000_000"
    lanes: str = "aggregate; train; evaluate"
    metrics: str = "auroc; brier; calibration"

    def page(self) -> Policy:
        """The page, which reads as a policy.

        Raises:
            RequestError: naming the answer that does not fit.
        """
        people = [_split(person, 3, "custodians", "Name, role, key") for person in _items(self.custodians)]
        datasets = [(*(part.strip() for part in text.split(",")), "")[:2] for text in _items(self.datasets)]
        for name, _ in datasets:
            if "sha256:" in name:
                raise RequestError(
                    f"{name!r} is no dataset.", "", "Put a comma before its measurement.", field="datasets"
                )
        if not people or not datasets:
            raise _missing("custodians" if not people else "datasets")
        lines = [
            "# Who may ask what of which patients. Nothing here is in force before it is signed.",
            "[policy]",
            f"name = {json.dumps(self.name)}",
            "version = 1                # one more at every change; the custodians of this one must sign it",
            f"purpose = {_list(_items(self.purpose))}  # {'; '.join(DUO.get(c, '?') for c in _items(self.purpose))}",
            f"expires = {self.expires}         # the last day, UTC",
            f"quorum = {self.quorum or len(people)}                 # so many custodians must sign; any one of them can veto",
        ]
        for name, role, key in people:
            lines += [
                "",
                "[[custodians]]",
                f"name = {json.dumps(name)}",
                f"role = {json.dumps(role)}",
                f'key = "{key}"',
            ]
        for name, measurement in datasets:
            lines += [
                "",
                "[[datasets]]",
                f"name = {json.dumps(name)}",
                f'measurements = ["{measurement or "any simulated"}"]  # rapha-lab measure; "any simulated" protects from nobody',
                'sandbox = "S3"             # the weakest walls beside which it may be opened',
                f"delta = {self.delta}",
            ]
        lines += [
            "",
            "[[projects]]",
            f"name = {json.dumps(self.project)}",
            f"researchers = {_list(_items(self.researchers))}",
            f"datasets = {_list([name for name, _ in datasets])}",
            f"epsilon = {self.epsilon}              # per patient, for the whole project, for ever",
            f"delta = {self.delta}",
            f"largest_model = {self.largest_model}    # parameters",
            f"smallest_cohort = {self.smallest_cohort}      # patients",
            f"metrics = {_list(_items(self.metrics))}",
            '# who looks at each answer before it leaves: "one custodian", "two custodians", or "auto" for nobody',
            *(self._lane(lane) for lane in _items(self.lanes)),
        ]
        return Policy.parse("\n".join(lines) + "\n")

    @staticmethod
    def _lane(text: str) -> str:
        name, _, mode = (part.strip() for part in text.partition("="))
        if name not in LANES:
            raise RequestError(
                f"{name!r} is no lane.", f"There are {', '.join(LANES)}.", SEMICOLONS, field="lanes"
            )
        if mode not in ("", *RELEASES):
            raise RequestError(
                f"{mode!r} is no release.", f"There are {', '.join(RELEASES)}.", SEMICOLONS, field="lanes"
            )
        return f'lanes.{name}.release = "{mode or "one custodian"}"'


QUESTIONS = {
    "name": "What is the policy called?",
    "purpose": "What for? Codes of GA4GH's Data Use Ontology, such as DUO:0000006 for health research",
    "expires": "Until which day is it in force?",
    "custodians": "Who are the custodians? Name, role, public key; the next one after a semicolon",
    "quorum": "How many of them must sign? All, if you say nothing",
    "datasets": "Which datasets? Name, comma, measurement of the enclave that may open it; the next one after a semicolon",
    "project": "What is the project called?",
    "researchers": "Public keys of its researchers; semicolons between them",
    "epsilon": "Privacy budget epsilon, per patient, for the whole project",
    "delta": "And its delta; well below one over the number of patients",
    "smallest_cohort": "The fewest patients that may be asked about",
    "largest_model": "The largest model, in parameters",
    "lanes": f"Which lanes, of {', '.join(LANES)}? Each by one custodian's release unless you add "
    "= auto or = two custodians; semicolons between them",
    "metrics": "Which metrics may leave? Semicolons between them",
}


def ask(given: dict[str, str], answer: Callable[[str], str]) -> Draft:
    """A draft from what is given, asking for the rest; an empty answer takes what is proposed.

    Args:
        given: by the names of `QUESTIONS`.
        answer: shows a question and returns what was typed.
    """
    draft = Draft(**given)
    for name, question in QUESTIONS.items():
        if name not in given:
            said = answer(f"{question} [{getattr(draft, name)}]: ").strip()
            setattr(draft, name, said or getattr(draft, name))
    return draft


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(";") if item.strip()]


def _split(text: str, count: int, field: str, form: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != count:
        raise RequestError(f"{text!r} does not fit.", f"It should read: {form}.", field=field)
    return parts


def _list(items: list[str]) -> str:
    return json.dumps(items)


def _missing(what: str) -> RequestError:
    return RequestError(
        f"The policy has no {what}.", "", f"Say --{what}, or answer the question.", field=what
    )
