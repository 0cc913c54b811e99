"""Keys, a binding, and a policy of three custodians."""

from __future__ import annotations

import pytest
from trust_material import CUSTODIANS, fixed, page

from rapha_lab.protocol.evidence import Binding
from rapha_lab.protocol.keys import PrivateKey
from rapha_lab.protocol.policy import Policy, Signed, state


@pytest.fixture
def text() -> str:
    """The policy's text."""
    return page()


@pytest.fixture
def policy(text: str) -> Policy:
    """The policy, parsed."""
    return Policy.parse(text)


@pytest.fixture
def signed(text: str, policy: Policy) -> Signed:
    """The policy with two of three signatures, as many as it needs."""
    return Signed(text, tuple(state("sign", policy, key) for key in CUSTODIANS[:2]))


@pytest.fixture(scope="session")
def site() -> tuple[PrivateKey, PrivateKey]:
    """A site's sealing key and signing key."""
    return PrivateKey.create("x-wing"), fixed(5)


@pytest.fixture
def binding(site: tuple[PrivateKey, PrivateKey]) -> Binding:
    """What a site's evidence is bound to."""
    return Binding(
        nonce=bytes(range(32)),
        sealing_key=str(site[0].public),
        signing_key=str(site[1].public),
        policy_hash=b"p" * 32,
        checkpoint_hash=b"c" * 32,
    )
