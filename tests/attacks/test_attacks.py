"""Every attack in attacks.py, outside and then at each tier: none gets through, and no canary leaves."""

import pytest
import suite
from attacks import ATTACKS
from suite import Results

from rapha_lab.enclave.sandbox import Zygote
from rapha_lab.protocol.errors import SiteError


@pytest.fixture(scope="module")
def results() -> Results:
    """All attacks, tried outside and at each tier this machine has."""
    with suite.battlefield() as battle:
        for tier in ("S3", "S2", "S1"):
            try:
                with Zygote(
                    "attack_cell:main", ("attacks", "site_attacks", "outside"), tier, bare=True
                ) as zygote:
                    suite.assault(battle, zygote)
            except SiteError:
                assert tier == "S3"  # the others need nothing that a container lacks
        try:
            with Zygote(
                "rapha_lab.session.shard:main", ("attacks", "site_attacks", "outside"), "S3", bare=True
            ) as zygote:
                suite.assault_from_a_shard(battle, zygote)
        except SiteError:
            assert "S3" not in battle.tiers
    suite.save(battle)
    return battle


@pytest.mark.parametrize("tier", ["S3", "S2", "S1", suite.SHARD])
def test_no_attack_gets_through(results, tier):
    """Not one of over two hundred."""
    if tier not in results.tiers:
        pytest.skip(f"no {tier} here")
    assert len(results.tiers[tier]) == len(ATTACKS) >= 200
    assert results.open_at(tier) == []


def test_most_attacks_succeed_where_there_are_no_walls(results):
    """The suite has teeth: the same code, run outside, does what it says."""
    assert sum(result["open"] for result in results.outside.values()) >= 100


def test_the_canary_is_had_outside_and_leaves_no_worker(results):
    """It is read outside in a dozen ways; inside it occurs in no byte that left."""
    had = [name for name, result in results.outside.items() if results.canary in result["how"]]
    assert len(had) >= 12
    assert results.canary.encode() not in results.left
    assert len(results.left) > 1000


def test_no_attack_is_refused_for_a_mistake_of_its_own(results):
    """An attack with a typing error would pass for a refused one."""
    mistakes = [
        name
        for outcomes in (results.outside, *results.tiers.values())
        for name, result in outcomes.items()
        if "mistake" in result["how"]
    ]
    assert mistakes == []


def test_the_page_shows_every_attack(results):
    """docs/attacks.md is this table."""
    page = suite.table(results)
    assert all(f"| {name.replace('_', ' ')} |" in page for name in ATTACKS)
