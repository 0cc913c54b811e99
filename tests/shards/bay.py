"""Patients, questions and pretended workers for the tests of shards."""

from collections.abc import Callable, Iterable

import polars as pl

from rapha_lab.curator.cohort import Cohort
from rapha_lab.protocol.messages import Shards
from rapha_lab.protocol.schema import Schema

SALT = b"a salt of sixteen"
SCHEMA = Schema.from_dict(
    {
        "name": "ward",
        "title": "A ward",
        "citation": "none",
        "licence": "none",
        "patient": "pid",
        "source": "ward.parquet",
        "patients": 8000,
        "columns": [
            {"name": "age", "type": "number", "bounds": [0, 100], "meaning": "age", "public": "made up"},
            {"name": "visits", "type": "integer", "bounds": [0, 9], "meaning": "visits", "public": "made up"},
            {"name": "dead", "type": "boolean", "meaning": "died", "public": "made up"},
            {
                "name": "sex",
                "type": "category",
                "categories": ["f", "m"],
                "meaning": "sex",
                "public": "made up",
                "missing": "possible",
            },
        ],
    }
)
CANARY = 61.8033988749


def ward(patients: Iterable[int]) -> Cohort:
    """A cohort of the patients with these numbers; number 7 has the canary's age."""
    numbers = sorted(patients)
    columns = {
        "pid": [f"p{n}" for n in numbers],
        "age": [CANARY if n == 7 else float(n % 90) for n in numbers],
        "visits": [n % 10 for n in numbers],
        "dead": [n % 3 == 0 for n in numbers],
        "sex": [("f", "m", None)[n % 3] for n in numbers],
    }
    kinds = {"pid": pl.String, "age": pl.Float64, "visits": pl.Int64, "dead": pl.Boolean, "sex": pl.String}
    return Cohort(SCHEMA, pl.DataFrame(columns, schema=kinds), SALT)


def asked(source: str, **terms: object) -> Shards:
    """A question whose function is the only one in `source`."""
    name = source.split("def ")[1].split("(")[0]
    fields = {"dataset": "ward", "epsilon": 1.0, "columns": ["age"], "bounds": [(0.0, 100.0)], "k": 4}
    return Shards(source=source, name=name, **(fields | terms))  # type: ignore[arg-type]


class Here:
    """Workers that are a function of the job, in this process, and that note what happened in which order."""

    def __init__(self, answer: Callable[[bytes], bytes]) -> None:
        self.answer, self.jobs, self.order = answer, list[bytes](), list[str]()

    def waves(self, k: int) -> int:
        """One each."""
        return k

    def answers(
        self,
        jobs: Iterable[bytes],
        k: int,
        size: int,
        seconds: float,
        started: Callable[[], None],
        beat: Callable[[], None],
    ) -> list[bytes]:
        """Each job's answer."""
        started()
        self.order.append("started")
        for job in jobs:
            self.order.append("job")
            self.jobs.append(job)
        return [self.answer(job) for job in self.jobs]
