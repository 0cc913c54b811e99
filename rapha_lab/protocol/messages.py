"""What a session may ask the curator, and how any two processes of the site frame what they say.

Every request is one of the structs below: decoding knows nothing else, resolves no name and runs no code.
Tensors travel beside the JSON as one safetensors blob, never as a pickle.
"""

from __future__ import annotations

import re
import struct
from typing import Annotated, Any, BinaryIO, Literal

import msgspec
from msgspec import Meta

from rapha_lab.protocol.errors import RequestError
from rapha_lab.protocol.expression import Expression
from rapha_lab.protocol.program import Program

__all__ = [
    "ASKS",
    "BLOCK",
    "BUFFER",
    "PIPED",
    "PREPARES",
    "PYTHON",
    "REVIEWED",
    "Aggregate",
    "Ask",
    "Candidate",
    "Close",
    "Columns",
    "Correlation",
    "Count",
    "Describe",
    "Discover",
    "Evaluate",
    "Fit",
    "Gradient",
    "Histogram",
    "Mean",
    "Missing",
    "Open",
    "Optimizer",
    "Price",
    "Quantiles",
    "Review",
    "Rows",
    "Selection",
    "Shards",
    "Split",
    "Sum",
    "Survival",
    "Variance",
    "asked_for",
    "decode",
    "encode",
    "read_frame",
    "write_frame",
]

Split = Literal["all", "train", "validation", "test"]
Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$")]
Columns = Name | Annotated[list[Name], Meta(min_length=1, max_length=4096)]
Inputs = Annotated[dict[Name, Columns], Meta(min_length=1, max_length=64)]
# not gt=0: that compares with a denormal number, which is zero in the curator, so that zero would pass
Positive = Annotated[float, Meta(ge=1e-100, le=1e6)]
Clip = Annotated[float, Meta(ge=1e-6, le=1e6)]
Metric = Literal[
    "auroc",
    "auprc",
    "accuracy",
    "sensitivity",
    "specificity",
    "brier",
    "logloss",
    "calibration",
    "confusion",
    "concordance",
]

PREPARES = "preparing its first step"
"""What a card says of a loop that was opened and whose loss is made a program."""

PYTHON = "its own Python is at work"
"""What a card says of a cell that has asked for nothing yet."""

MAX_HEADER = 64 << 20
MAX_TENSORS = 1 << 30


class Ask(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, tag_field="op"):
    """A question about patients: `epsilon` is its own (ε, δ) guarantee, δ being the policy's.

    Attributes:
        derive: further columns by name, each of which may use those before it.
        where: which patients are meant; the others contribute nothing, all of them if not given.
    """

    dataset: Name
    split: Split = "all"
    epsilon: Positive
    derive: Annotated[dict[Name, Expression], Meta(max_length=100)] = {}
    where: Expression | None = None


Share = Annotated[float, Meta(ge=1e-100, lt=1.0)]
Keys = Annotated[list[Name], Meta(max_length=3)]
Several = Annotated[list[Name], Meta(min_length=1, max_length=100)]


class Aggregate(Ask, frozen=True):
    """A question answered by exact integers with noise; `by` has one answer for each of its public keys."""


class Count(Aggregate, frozen=True, tag="count"):
    """How many patients there are."""

    by: Keys = []


class Sum(Aggregate, frozen=True, tag="sum"):
    """The sum of a numeric or boolean column; a patient in whom it is not known adds 0."""

    column: Name
    by: Keys = []


class Mean(Aggregate, frozen=True, tag="mean"):
    """The mean of a numeric or boolean column over the patients in whom it is known."""

    column: Name
    by: Keys = []


class Variance(Aggregate, frozen=True, tag="variance"):
    """The mean, variance and standard deviation of a numeric column over the patients in whom it is known."""

    column: Name
    by: Keys = []


class Histogram(Aggregate, frozen=True, tag="histogram"):
    """Patients per bin of a column: equal bins of its public bounds, or its public categories."""

    column: Name
    bins: Annotated[int, Meta(ge=1, le=10_000)] = 20


class Quantiles(Aggregate, frozen=True, tag="quantiles"):
    """Values below which these shares of the patients lie, all from one histogram of `bins` bins."""

    column: Name
    at: Annotated[tuple[Share, ...], Meta(min_length=1, max_length=100)] = (0.25, 0.5, 0.75)
    bins: Annotated[int, Meta(ge=2, le=10_000)] = 64


class Correlation(Aggregate, frozen=True, tag="correlation"):
    """Pearson's correlation of each two columns, over the patients in whom all are known."""

    columns: Annotated[list[Name], Meta(min_length=2, max_length=30)]


class Survival(Aggregate, frozen=True, tag="survival"):
    """The share of patients without an event by time (Kaplan and Meier 1958), on `bins` bins of the time's bounds."""

    time: Name
    event: Name
    by: Annotated[list[Name], Meta(max_length=1)] = []
    bins: Annotated[int, Meta(ge=2, le=1000)] = 40


class Missing(Aggregate, frozen=True, tag="missing"):
    """In how many patients each column is not known."""

    columns: Several


class Describe(Aggregate, frozen=True, tag="describe"):
    """Table 1 of a paper: mean and standard deviation of numbers, shares of categories, what is missing."""

    columns: Several


class Rows(Aggregate, frozen=True, tag="rows"):
    """A count, number of distinct patients, sum or mean over a table's rows in which `rows` holds.

    Attributes:
        of: what is counted or added up.
        column: of a sum or mean, a column of the table.
        by: a column of the table with public keys.
        cap: the most rows of one patient that count; the table's public cap if not given.
    """

    table: Name
    of: Literal["count", "patients", "sum", "mean"] = "count"
    column: Name | None = None
    by: Name | None = None
    rows: Expression | None = None
    cap: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None


class Discover(Ask, frozen=True, tag="discover"):
    """Distinct patients by the keys found in a text column of a table's rows, where enough patients have them.

    Attributes:
        column: a text column of the table, such as one of diagnosis codes.
        keys: for how many of their keys one patient counts at most.
        delta: what it spends of the policy's `discovery_delta`, a tenth of it if not given.
        rows: which rows are meant.
    """

    table: Name
    column: Name
    keys: Annotated[int, Meta(ge=1, le=100)] = 1
    delta: Annotated[float, Meta(ge=1e-15, lt=0.1)] | None = None
    rows: Expression | None = None


class Optimizer(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """An update rule by name with its public settings; it only ever sees private gradients."""

    name: Literal["sgd", "adam", "adamw", "rmsprop", "adagrad", "nadam", "radam", "adamax", "adadelta"]
    settings: dict[str, float | bool | list[float]] = {}


Decay = Annotated[float, Meta(ge=0.0, lt=1.0)]

JUDGES = "validation"
"""The split whose patients score the runs of a selection."""


class Candidate(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Numbers to train with in place of the fit's own; none of them moves what a run takes."""

    lr: Positive | None = None
    momentum: Decay | None = None
    weight_decay: Annotated[float, Meta(ge=0.0, le=1e6)] | None = None
    clip: Clip | None = None
    average: Decay | None = None


class Selection(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Train with candidates drawn at random and release the best by a private score on the validation patients.

    Attributes:
        runs: how many runs count on average; how many do is hidden.
        bound: as much of one patient's loss counts in a score, and no less than 0; if not given the score is Brier's, for
            losses that are minus the logarithm of a probability.
    """

    candidates: Annotated[list[Candidate], Meta(min_length=2, max_length=64)]
    runs: Annotated[float, Meta(ge=1.0, le=20.0)] = 5.0
    bound: Positive | None = None


class Fit(Ask, frozen=True, tag="fit"):
    """Train by DP-SGD: `program` is one patient's loss, its parameters come in the tensors blob.

    `bands` of noise that later steps take back (1: independent noise); `average`, the decay of the average of the
    weights that is released in place of the last ones; `corrected`, Adam without the noise in its second moment;
    `clip_quantile`, the share of patients whose gradient a clip that begins at `clip` comes to leave whole;
    `selection`, of several settings the best.
    """

    program: Program
    inputs: Inputs
    steps: Annotated[int, Meta(ge=1, le=1_000_000)]
    batch: Annotated[int, Meta(ge=1, le=1_000_000)]
    clip: Clip
    optimizer: Optimizer
    bands: Annotated[int, Meta(ge=1, le=256)] = 1
    average: Decay = 0.0
    corrected: bool = False
    clip_quantile: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    selection: Selection | None = None


class Open(Ask, frozen=True, tag="open"):
    """Begin a training loop of `steps` private gradients; its whole price is reserved, none is paid yet."""

    steps: Annotated[int, Meta(ge=1, le=1_000_000)]
    batch: Annotated[int, Meta(ge=1, le=1_000_000)]
    clip: Clip


class Gradient(
    msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="gradient"
):
    """One private gradient of an open loop: `program` is one patient's loss at the parameters in the tensors blob.

    A program is sent once; afterwards its `digest` stands for it.
    """

    loop: Annotated[str, Meta(max_length=128)]
    inputs: Inputs
    reduction: Literal["mean", "sum"] = "mean"
    digest: Annotated[str, Meta(max_length=64)]
    program: Program | None = None


class Close(
    msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="close"
):
    """End a loop: the steps that ran are charged, the rest is refunded."""

    loop: Annotated[str, Meta(max_length=128)]


class Evaluate(Ask, frozen=True, tag="evaluate"):
    """Judge scores on held-out patients: `program` is one patient's logit, `target` a boolean column.

    Attributes:
        threshold: the probability from which on a score counts as a yes.
        by: a column with public values, to judge each group of patients and their gaps.
        time: of a concordance, which is asked for alone: when the target was seen, or follow-up ended.
    """

    program: Program
    inputs: Inputs
    target: Name
    metrics: Annotated[list[Metric], Meta(min_length=1, max_length=16)]
    threshold: Annotated[float, Meta(ge=0.001, le=0.999)] = 0.5
    by: Annotated[list[Name], Meta(max_length=2)] = []
    time: Name | None = None


class Shards(Ask, kw_only=True, frozen=True, tag="shards"):
    """The average of what a function returns on `k` disjoint shards of patients; `source` is any Python.

    `bounds` has one pair for all entries of the result, or one each; `default` stands for a shard that fails.
    """

    source: Annotated[str, Meta(min_length=1, max_length=100_000)]
    name: Name
    columns: Annotated[list[Name], Meta(min_length=1, max_length=4096)]
    shape: Annotated[list[Annotated[int, Meta(ge=1, le=100)]], Meta(max_length=4)] = []
    bounds: Annotated[list[tuple[float, float]], Meta(min_length=1, max_length=100)]
    default: Annotated[list[float], Meta(max_length=100)] | None = None
    k: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    seconds: Annotated[float, Meta(ge=1e-100, le=60.0)] = 0.2


Question = (
    Count | Sum | Mean | Variance | Histogram | Quantiles | Correlation | Survival | Missing | Describe | Rows
)


class Price(
    msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="price"
):
    """The ε that a standard error costs: free, since it follows from public figures; `ask`'s own ε is ignored."""

    ask: Question
    error: Positive


REVIEWED = 1 << 20
"""Bytes that a reviewed function's answer always has: shorter ones are filled up."""


class Review(Ask, kw_only=True, frozen=True, tag="review"):
    """What a function returns on the records themselves, once custodians approved it, and then its answer.

    `source` is any Python; `inputs` describes values whose tensors come in the tensors blob.
    """

    epsilon: Annotated[float, Meta(ge=0.0, le=0.0)] = 0.0
    source: Annotated[str, Meta(min_length=1, max_length=100_000)]
    name: Name
    columns: Annotated[list[Name], Meta(min_length=1, max_length=4096)]
    tables: Annotated[list[Name], Meta(max_length=100)] = []
    inputs: dict[str, Any] = {}
    seconds: Annotated[float, Meta(ge=1e-100, le=60.0)] = 10.0


ASKS = Question | Discover | Fit | Open | Gradient | Close | Evaluate | Shards | Review | Price
_decoder = msgspec.json.Decoder(ASKS)


def encode(message: Any) -> bytes:
    """A message as JSON."""
    return msgspec.json.encode(message)


def decode(data: bytes) -> ASKS:
    """The request in `data`.

    Raises:
        RequestError: naming the field that is missing, unknown, of the wrong type or out of range.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise malformed(error) from None


class _Asked(msgspec.Struct):
    epsilon: float = 0.0
    loop: str = ""


_asked = msgspec.json.Decoder(_Asked)


def asked_for(request: bytes) -> tuple[float, str]:
    """The ε that a request asks for, and the loop that it is a step of: what it says, for those who only show it."""
    try:
        told = _asked.decode(request)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return 0.0, ""
    return told.epsilon, told.loop


def malformed(error: Exception) -> RequestError:
    """What to tell the sender of a message that did not decode."""
    text = str(error)
    place = re.search(r"`\$\.([^`]*)`$", text)
    name = re.search(r"(?:unknown|required) field `([^`]*)`", text)
    field = ".".join(found[1] for found in (place, name) if found) or None
    return RequestError(
        f"{field or 'The request'} is malformed.",
        f"{_in_words(text.split(' - at')[0])}.",
        "Mend it, or leave it out for what is usual." if place else "docs/questions.md has the words.",
        field=field,
    )


def _in_words(text: str) -> str:
    """A decoder's complaint as a sentence: "Expected `float` < 1.0" is "It must be a number below 1"."""
    if kinds := re.fullmatch(r"Expected `(int|float|str|bool)(?: \| null)?`, got `\w+`", text):
        return f"It must be {_KINDS[kinds[1]]}"
    found = re.fullmatch(r"Expected `(int|float)` (<=?|>=?) (\S+)", text)
    if found is None:
        return text
    kind, bound, limit = found.groups()
    number = "a whole number" if kind == "int" else "a number"
    return f"It must be {number} {_BOUNDS[bound]} {limit.removesuffix('.0')}"


_KINDS = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "True or False"}
_BOUNDS = {"<": "below", "<=": "of at most", ">": "above", ">=": "of at least"}

BUFFER = 1 << 18
"""Bytes of the buffer at either end of a pipe: the message of a small step passes in one piece, and wakes its reader once."""

PIPED, BLOCK = 1 << 13, 1 << 26
"""Bytes of a loop's step's tensors that still pass through pipes, which copy them four times; and of the memory that a session
and the curator share, where larger ones are, unless they are larger than it."""

_PREFIX = struct.Struct(">4sIQ")
_MAGIC = b"RPH1"


def write_frame(stream: BinaryIO, header: bytes, tensors: bytes = b"", *, more: bool = False) -> None:
    """Write one message: 4 magic bytes, two lengths, the JSON header, the tensors blob; at once if no `more` follow."""
    stream.write(_PREFIX.pack(_MAGIC, len(header), len(tensors)) + header)
    stream.write(tensors)
    if not more:
        stream.flush()


def read_frame(
    stream: BinaryIO, *, max_header: int = MAX_HEADER, max_tensors: int = MAX_TENSORS
) -> tuple[bytes, bytes] | None:
    """The next message as (header, tensors), or None at a clean end.

    Raises:
        RequestError: if the stream ends inside a message, or it is none, or is larger than allowed.
    """
    prefix = stream.read(_PREFIX.size)
    if not prefix:
        return None
    if len(prefix) < _PREFIX.size:
        raise RequestError("The message is truncated.", "The stream ended inside its first 16 bytes.")
    magic, header, tensors = _PREFIX.unpack(prefix)
    if magic != _MAGIC:
        raise RequestError("This is no message of this protocol.", "It does not begin with RPH1.")
    if header > max_header or tensors > max_tensors:
        raise RequestError("The message is too large.", f"Limits: {max_header} and {max_tensors} bytes.")
    # memory that nothing was written to is not taken, so that it grows only with what really arrives
    body = stream.read(header), stream.read(tensors)
    if (len(body[0]), len(body[1])) != (header, tensors):
        raise RequestError("The message is truncated.", "The stream ended before its stated length.")
    return body
