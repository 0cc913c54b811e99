"""Says in plain English what a policy allows, and what a new version would change, for those who sign it."""

from __future__ import annotations

from typing import Any

import msgspec

from rapha_lab.protocol.policy import Dataset, Policy, Project

__all__ = ["diff", "plain_english"]

# the terms of GA4GH's Data Use Ontology that a hospital meets most
_DUO = {
    "DUO:0000004": "any purpose",
    "DUO:0000006": "health, medical and biomedical research",
    "DUO:0000007": "research on a named disease",
    "DUO:0000011": "research on populations and ancestry",
    "DUO:0000018": "use by not-for-profit organisations and for no profit",
    "DUO:0000021": "use after ethics approval",
    "DUO:0000042": "general research",
    "DUO:0000043": "clinical care",
    "DUO:0000045": "use by not-for-profit organisations",
    "DUO:0000046": "use for no commercial purpose",
}
_LESS_IS_MORE = {"quorum", "sandbox", "smallest_cohort"}
_WORDS = {
    "two custodians": "two custodians release it",
    "one custodian": "one custodian releases it",
    "auto": "released at once",
}
_FREEDOM = list(_WORDS)


def plain_english(policy: Policy) -> str:
    """The policy in sentences, one paragraph each."""
    head = policy.head
    purposes = "; ".join(f"{_DUO.get(code, 'the purpose')} ({code})" for code in head.purpose)
    people = "; ".join(f"{c.name}, {c.role}" for c in policy.custodians)
    paragraphs = [
        f"{head.name}, version {head.version}. It ends on {head.expires:%d %B %Y}. Purpose: {purposes}.",
        f"{head.quorum} of these {len(policy.custodians)} must sign, and any one of them can veto: {people}.",
        *(_dataset(part) for part in policy.datasets),
        *(_project(part) for part in policy.projects),
    ]
    return "\n\n".join(paragraphs) + "\n"


def diff(old: Policy, new: Policy) -> list[str]:
    """What `new` changes, a line each: `+` gives more than before, `-` gives less, `~` is neither or both."""
    lines = _changes("policy", old.head, new.head)
    for kind in ("custodians", "datasets", "projects"):
        before = {part.name: part for part in getattr(old, kind)}
        after = {part.name: part for part in getattr(new, kind)}
        sign = "~~" if kind == "custodians" else "+-"
        lines += [f"{sign[0]} {kind} {name!r} is new" for name in after if name not in before]
        lines += [f"{sign[1]} {kind} {name!r} is gone" for name in before if name not in after]
        for name in (name for name in before if name in after):
            lines += _changes(f"{kind} {name!r}", before[name], after[name])
    return lines


def _changes(where: str, old: Any, new: Any) -> list[str]:
    pairs = [
        (f, *(msgspec.to_builtins(getattr(part, f)) for part in (old, new))) for f in old.__struct_fields__
    ]
    return [f"{_sign(f, a, b)} {where}: {f} was {a}, is {b}" for f, a, b in pairs if a != b]


def _sign(field: str, before: Any, after: Any) -> str:
    if field in ("lanes", "measurements", "metrics", "researchers", "datasets"):
        more = any(_opens(before, after, item) for item in after)
        less = any(_opens(after, before, item) for item in before)
        return "~" if more == less else "+" if more else "-"
    if field in ("epsilon", "delta", "largest_model", "expires", *_LESS_IS_MORE):
        return "+" if (after > before) != (field in _LESS_IS_MORE) else "-"
    return "~"


def _opens(before: Any, after: Any, item: str) -> bool:
    """Whether `item` is in `after` and was not, or not as freely, in `before`."""
    if item not in before:
        return True
    if not isinstance(after, dict):
        return False
    return _FREEDOM.index(after[item]["release"]) > _FREEDOM.index(before[item]["release"])


def _dataset(part: Dataset) -> str:
    where = " or ".join(part.measurements)
    return f"Dataset {part.name} opens only in an enclave measured {where}; sandbox {part.sandbox} or better."


def _project(part: Project) -> str:
    lanes = [f"{lane} ({_WORDS[rule.release]})" for lane, rule in part.lanes.items()]
    return (
        f"Project {part.name}: {len(part.researchers)} researcher(s) may, on {', '.join(part.datasets)}: "
        f"{'; '.join(lanes) or 'nothing'}. Per patient epsilon {part.epsilon:g} at most, delta {part.delta:g}; "
        f"models of at most {part.largest_model:,} parameters; cohorts of at least {part.smallest_cohort:,} "
        f"patients; metrics: {', '.join(part.metrics) or 'none'}."
    )
