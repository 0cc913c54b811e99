"""One warm zygote for shards, one bare for sessions, and the channel as a curator has it."""

from collections.abc import Iterator

import pytest

from rapha_lab.curator.workers import EnclaveWorkers
from rapha_lab.enclave.cores import ALL
from rapha_lab.enclave.sandbox import Zygote
from rapha_lab.enclave.shards import ShardWorkers


@pytest.fixture(scope="session")
def sessions() -> Iterator[Zygote]:
    """Where sessions come from."""
    with Zygote("session_cell:main", (), bare=True) as zygote:
        yield zygote


@pytest.fixture(scope="session")
def enclave(sessions: Zygote) -> Iterator[ShardWorkers]:
    """What gives the curator its workers."""
    giver = ShardWorkers(lambda: sessions)
    yield giver
    giver.close()


@pytest.fixture
def workers(enclave: ShardWorkers) -> Iterator[EnclaveWorkers]:
    """The curator's end."""
    fd = enclave.connect().detach()
    yield (mine := EnclaveWorkers(fd, len(ALL)))
    mine._channel.close()
