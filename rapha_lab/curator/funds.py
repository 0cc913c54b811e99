"""Keeps the ledger's accounts as the custodians signed them: budgets, caps, and what was spent elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

from rapha_lab.curator.accounting import Gaussian, Loss, Pure
from rapha_lab.curator.ledger import ALL, Ledger
from rapha_lab.curator.watched import Watched
from rapha_lab.protocol.errors import PolicyError
from rapha_lab.protocol.policy import Policy
from rapha_lab.protocol.schema import SPLITS
from rapha_lab.protocol.spend import Spend, spends

__all__ = ["follow", "fund"]


def fund(ledger: Ledger, policy: Policy, project: str, dataset: str, splits: Iterable[str]) -> None:
    """Open the accounts of a project on a dataset's splits, and those of all projects if there is a cap on them.

    A cap that was signed once stays until another is signed.

    Raises:
        PolicyError: more is spent already than a new budget or cap has.
    """
    mine, whole = policy.project(project), policy.dataset(dataset)
    for split in splits:
        ledger.open_account(project, dataset, split, mine.epsilon, mine.delta, mine.discovery_delta)
        if whole.epsilon is not None:
            ledger.open_account(ALL, dataset, split, whole.epsilon, whole.delta, whole.discovery_delta)


def follow(ledger: Ledger, page: Callable[[], Policy], path: str | Path) -> Callable[[], Policy]:
    """Gives what gives the policy in force, once the ledger has its accounts and the spends signed beside it.

    An account that has spent more than is signed now keeps its budget until `fund`, which refuses it, can lower it.

    Args:
        ledger: has the accounts.
        page: gives the policy in force, read anew each time.
        path: where it is; a spend that is signed beside it holds from the next request on.
    """
    last: tuple[Policy, list[Spend]] | None = None
    stated = Watched(lambda: spends(path), f"{path}.spends")

    def in_force() -> Policy:
        nonlocal last
        policy, elsewhere = page(), stated()
        if (policy, elsewhere) != last:
            short = False
            for project in policy.projects:
                for dataset, split in product(project.datasets, SPLITS):
                    if project.name not in policy.revoked:
                        try:
                            fund(ledger, policy, project.name, dataset, [split])
                        except (
                            PolicyError
                        ):  # whoever asks this account is told; nobody else's is a matter of it
                            short = True
            for spend in elsewhere:
                if not ledger.has(spend.name):
                    spend.check(policy)
                    where = spend.project, spend.dataset, [spend.split]
                    ledger.add(spend.name, *where, _loss(spend), spend.digest)
            last = None if short else (policy, elsewhere)
        return policy

    return in_force


def _loss(spend: Spend) -> Loss:
    """The curve of what was spent: of any (ε, 0)-private answer, or of ρ-zCDP, which is that of a Gaussian."""
    return Pure(spend.epsilon) if spend.epsilon is not None else Gaussian((2 * (spend.rho or 0.0)) ** -0.5)
