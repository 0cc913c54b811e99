"""Says in plain English what a policy allows, and what a new version would change, for those who sign it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rapha_lab.protocol.policy import Dataset, Policy, Project

__all__ = ["DUO", "diff", "plain_english"]

DUO = {
    "DUO:0000004": "any purpose",
    "DUO:0000006": "health, medical and biomedical research",
    "DUO:0000007": "research on a named disease",
    "DUO:0000011": "research on populations and ancestry only",
    "DUO:0000012": "research of a named kind only",
    "DUO:0000015": "no research on methods alone",
    "DUO:0000016": "genetic studies only",
    "DUO:0000018": "use by not-for-profit organisations and for no profit",
    "DUO:0000019": "results must be published",
    "DUO:0000020": "use in collaboration with the custodians",
    "DUO:0000021": "use after ethics approval",
    "DUO:0000022": "use in a named region only",
    "DUO:0000024": "no publication before a named date",
    "DUO:0000025": "use for a named time",
    "DUO:0000026": "use by named people only",
    "DUO:0000027": "use in a named project only",
    "DUO:0000028": "use by a named institution only",
    "DUO:0000029": "results must come back to the custodians",
    "DUO:0000042": "general research",
    "DUO:0000043": "clinical care",
    "DUO:0000044": "no research on populations and ancestry",
    "DUO:0000045": "use by not-for-profit organisations",
    "DUO:0000046": "use for no commercial purpose",
}
"""The terms of GA4GH's Data Use Ontology in words."""

_WORDS = {
    "two custodians": "two custodians release it",
    "one custodian": "one custodian releases it",
    "auto": "released at once",
}
_FREEDOM = list(_WORDS)


def plain_english(policy: Policy) -> str:
    """The policy in sentences, one paragraph each."""
    head = policy.head
    people = "; ".join(f"{c.name}, {c.role}" for c in policy.custodians)
    paragraphs = [
        f"{head.name}, version {head.version}. It ends on {head.expires:%d %B %Y}. Purpose: {purposes(policy)}.",
        f"{head.quorum} of these {len(policy.custodians)} must sign, and any one of them can veto: {people}.",
        *(_dataset(part) for part in policy.datasets),
        *(_project(part) for part in policy.projects),
        "Epsilon bounds what a project's answers, those of a lane review apart, tell together of one patient: "
        "beside a world without that patient's records, "
        "no set of answers is more than e to the epsilon times as likely (1: 2.7 times; 3: 20; 8: 2,981), "
        "but for a chance of about delta.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def purposes(policy: Policy) -> str:
    """What it is for, in words with their codes."""
    unknown = "a term that this version has no words for: look it up"
    return "; ".join(f"{DUO.get(code, unknown)} ({code})" for code in policy.head.purpose)


def diff(old: Policy, new: Policy) -> list[str]:
    """What `new` changes, a sentence each: `+` gives more than before, `-` gives less, `~` is neither."""
    lines = [*_head(old, new), *_custodians(old, new)]
    for kind, changed in (("dataset", _datasets), ("project", _projects)):
        before, after = ({part.name: part for part in getattr(p, f"{kind}s")} for p in (old, new))
        lines += [f"+ The {kind} {name} is new." for name in after if name not in before]
        lines += [f"- The {kind} {name} is gone." for name in before if name not in after]
        for name in (name for name in before if name in after):
            lines += [
                f"{line[0]} {kind.capitalize()} {name}{line[1:]}"
                for line in changed(before[name], after[name])
            ]
    return lines


def _head(old: Policy, new: Policy) -> Iterator[str]:
    a, b = old.head, new.head
    if a.name != b.name:
        yield f"~ Its name was {a.name}, now {b.name}."
    if a.version != b.version:
        yield f"~ It is version {b.version}, after {a.version}."
    yield from (f"+ A new purpose: {DUO.get(c, '')} ({c})." for c in b.purpose if c not in a.purpose)
    yield from (f"- No longer a purpose: {DUO.get(c, '')} ({c})." for c in a.purpose if c not in b.purpose)
    if a.expires != b.expires:
        yield f"{_more(a.expires, b.expires)} It ends on {b.expires:%d %B %Y}, not on {a.expires:%d %B %Y}."
    if a.quorum != b.quorum:
        yield f"{_more(b.quorum, a.quorum)} {b.quorum} custodians must sign, not {a.quorum}."


def _custodians(old: Policy, new: Policy) -> Iterator[str]:
    before, after = ({(c.name, c.role): c.key for c in p.custodians} for p in (old, new))
    yield from (
        f"~ {name} ({role}) becomes a custodian." for name, role in after if (name, role) not in before
    )
    yield from (
        f"~ {name} ({role}) is no longer a custodian." for name, role in before if (name, role) not in after
    )
    for person in (person for person in before if after.get(person, before[person]) != before[person]):
        yield f"~ {person[0]} ({person[1]}) signs with another key, {after[person]}."


def _datasets(old: Dataset, new: Dataset) -> Iterator[str]:
    yield from _listed(
        " may also open in an enclave measured {}.",
        " no longer opens in {}.",
        old.measurements,
        new.measurements,
    )
    if old.sandbox != new.sandbox:
        yield f"{_more(new.sandbox, old.sandbox)} opens beside a sandbox of tier {new.sandbox}, not {old.sandbox}."
    if old.epsilon != new.epsilon:
        more = new.epsilon is None or (old.epsilon is not None and new.epsilon > old.epsilon)
        a, b = ("no cap" if part.epsilon is None else f"{part.epsilon:g}" for part in (old, new))
        yield f"{'+' if more else '-'} lets all projects together spend epsilon {b} per patient, not {a}."
    yield from _numbers(old, new, "sandbox", "measurements", "epsilon")


def _projects(old: Project, new: Project) -> Iterator[str]:
    yield from _listed(
        " gets a new researcher, {}.", " loses the researcher {}.", old.researchers, new.researchers
    )
    yield from _listed(
        " may use the dataset {}.", " may no longer use the dataset {}.", old.datasets, new.datasets
    )
    yield from _listed(
        " may ask for the metric {}.", " may no longer ask for the metric {}.", old.metrics, new.metrics
    )
    lanes, others = dict(old.lanes), dict(new.lanes)
    yield from (f"+ opens the lane {n}: {_WORDS[v.release]}." for n, v in others.items() if n not in lanes)
    yield from (f"- closes the lane {n}." for n in lanes if n not in others)
    for name in (n for n in lanes if n in others and lanes[n] != others[n]):
        a, b = lanes[name].release, others[name].release
        yield f"{_more(_FREEDOM.index(a), _FREEDOM.index(b))}, lane {name}: {_WORDS[b]}; it was that {_WORDS[a]}."
    yield from _numbers(old, new, "researchers", "datasets", "metrics", "lanes")


_SAID = {
    "epsilon": ("+", "may spend epsilon {} per patient, not {}"),
    "delta": ("+", "has delta {}, not {}"),
    "discovery_delta": ("+", "may spend a further delta of {} on discovered keys, not {}"),
    "largest_model": ("+", "may train {} parameters at most, not {}"),
    "smallest_cohort": ("-", "needs cohorts of {} patients, not {}"),
}


def _numbers(old: Any, new: Any, *others: str) -> Iterator[str]:
    """What is left of a part's fields: numbers, whose direction is known for those of `_SAID`."""
    for name in old.__struct_fields__:
        a, b = getattr(old, name), getattr(new, name)
        if a == b or name in others:
            continue
        way, words = _SAID.get(name, ("~", f"has {name} {{}}, not {{}}"))
        if a is None or b is None:
            yield f"~ {words.format(b, a)}."
        else:
            sign = way if way == "~" else _more(a, b) if way == "+" else _more(b, a)
            yield f"{sign} {words.format(*(f'{v:g}' if isinstance(v, float) else f'{v:,}' for v in (b, a)))}."


def _listed(gains: str, loses: str, before: list[str], after: list[str]) -> Iterator[str]:
    yield from ("+" + gains.format(item) for item in after if item not in before)
    yield from ("-" + loses.format(item) for item in before if item not in after)


def _more(before: Any, after: Any) -> str:
    return "+" if after > before else "-"


def _dataset(part: Dataset) -> str:
    simulated = "any SIMULATED enclave, which protects from nobody who owns the machine"
    where = " or ".join(
        simulated if each == "any simulated" else f"an enclave measured {each}" for each in part.measurements
    )
    together = (
        "No cap on what all projects together may learn of a patient"
        if part.epsilon is None
        else f"All projects together: per patient epsilon {part.epsilon:g} at most, delta {part.delta:g}{_keys(part)}"
    )
    return f"Dataset {part.name} opens only in {where}; sandbox {part.sandbox} or better. {together}."


def _keys(part: Dataset | Project) -> str:
    if not part.discovery_delta:
        return ""
    return f" and a further delta of {part.discovery_delta:g} for keys discovered in the records"


def _project(part: Project) -> str:
    lanes = [f"{lane} ({_WORDS[rule.release]})" for lane, rule in part.lanes.items()]
    reviewed = ""
    if "review" in part.lanes:
        reviewed = (
            " Answers of the lane review have NO differential privacy: the custodians who approve the function "
            "and release its answer are all that protects the patients."
        )
    count = f"{len(part.researchers)} researcher{'' if len(part.researchers) == 1 else 's'}"
    return (
        f"Project {part.name}: {count} may, on {', '.join(part.datasets)}: "
        f"{'; '.join(lanes) or 'nothing'}. Per patient epsilon {part.epsilon:g} at most, delta {part.delta:g}{_keys(part)}; "
        f"models of at most {part.largest_model:,} parameters; cohorts of at least {part.smallest_cohort:,} "
        f"patients; metrics: {', '.join(part.metrics) or 'none'}.{reviewed}"
    )
