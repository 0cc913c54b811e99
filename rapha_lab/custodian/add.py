"""Walks a custodian from the tables in a folder to a schema: `rapha-lab data add`.

The draft holds names and types of columns, public knowledge, and what the custodian types. Of the records it holds
nothing, unless the custodian answers `copy` to one item, which is then said in the schema. `look` shows an item's
records to the custodian alone. What nobody has set is marked TO BE SET, and the schema is none until it is.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import polars as pl

from rapha_lab.curator.columns import identifiers
from rapha_lab.custodian.answers import BACK, Asker, BackError
from rapha_lab.custodian.columns import MARKS, UNSET, draft, fitting, lines, look, one_of, word
from rapha_lab.custodian.tables import Found, find, nameable, plain, said
from rapha_lab.protocol.errors import RequestError

__all__ = ["add"]

_PEOPLE = r"(^|[_. -])(persons?|patients?|subjects?|people|demographics?)$"
_IDENTIFIER = r"(person|patient|subject|pat)_?(id|no|nr|number)?|pid|mrn"


def add(folder: Path, asker: Asker, database: str = "") -> tuple[str, str]:
    """The name of the new schema, and its text.

    Args:
        folder: the data folder, whose tables are offered.
        asker: whom to ask.
        database: the address of a PostgreSQL database, whose tables are offered instead.

    Raises:
        RequestError: naming the question whose answer does not fit.
    """
    tables = find(folder, database)
    while True:
        try:
            return _draft(folder, tables, asker)
        except BackError:
            continue


def _draft(folder: Path, tables: list[Found], asker: Asker) -> tuple[str, str]:
    _tell_tables(asker, tables)
    question = "Which of them has one row for each patient: its number or name"
    given = asker.ask("table", question, _likely_table(tables), lambda said: _table_named(said, tables))
    main = _table_named(given, tables)
    patient = _patient(asker, main, "patient", unique=not main.source.endswith("/"))
    stem = re.split(r"[./]", main.source)[0] or folder.resolve().name
    name = word(asker, "name", "A short name for the dataset", stem)
    head = {
        "name": name,
        "title": asker.ask("title", "One line on what it is"),
        "citation": asker.ask("citation", "What to cite", "none"),
        "licence": asker.ask("licence", "Under which terms it may be used", "internal"),
        "patient": patient,
        "source": main.source,
    }
    number, columns = _number(asker), _columns(asker, main, name, {patient}, "columns")
    if not columns:
        what = (
            f"No column of {main.source} was described, so that nothing could be asked; nothing was written."
        )
        raise RequestError(what, "", "Give at least one a type, such as number or category.", field="type")
    page = [*lines(head), *number, *columns]
    for table in tables:
        if table is not main or main.source.endswith("/"):
            page += _table(asker, table, patient)
    return name, "\n".join(page) + "\n"


def _tell_tables(asker: Asker, tables: list[Found]) -> None:
    asker.tell(f"Tables found, with their columns ({BACK} goes to the question before, at any time):")
    for number, table in enumerate(tables, 1):
        kinds = ", ".join(f"{name} ({said(kind)})" for name, kind in table.columns.items())
        asker.tell(f"  {number}  {table.source}: {kinds}")
        if strange := [name for name in table.columns if not nameable(name)]:
            asker.tell(
                f"     {len(strange)} of its names no cell can write, such as {strange[0]!r}. A tidy copy mends"
                f" that and other ways of writing CSV: rapha-lab data tidy {shlex.quote(str(table.path))}"
            )


def _likely_table(tables: list[Found]) -> str:
    """The only table, or the one whose name speaks of patients; none is guessed otherwise."""
    named = [t.source for t in tables if re.search(_PEOPLE, plain(t.source), re.IGNORECASE)]
    return tables[0].source if len(tables) == 1 else named[0] if len(named) == 1 else ""


def _table_named(given: str, tables: list[Found]) -> Found:
    """The table of that number, source or short name."""
    sources = [table.source for table in tables]
    if given.isdecimal() and 0 < int(given) <= len(sources):
        return tables[int(given) - 1]
    found = [t for t in tables if given in (t.source, plain(t.source))]
    if len(found) != 1:
        one_of("table", *sources)(given)
    return found[0]


def _number(asker: Asker) -> list[str]:
    question = "A number of patients that is public already; leave empty if there is none"
    given = asker.ask("patients", question, "", fitting("patients", empty=True))
    if given:
        return [f"patients = {given}  {MARKS['custodian']}"]
    return ["# patients: no public number; models cannot be trained without one"]


def _table(asker: Asker, found: Found, patient: str) -> list[str]:
    key = re.sub(r"\W", "_", plain(found.source)).strip("_") or "events"
    question = f"Add {found.source} as a table with many rows a patient (yes or no)"
    if asker.ask(f"{key}.add", question, "no", one_of(f"{key}.add", "yes", "no")) == "no":
        return []
    name = word(asker, f"{key}.name", "A short name for this table", key)
    mine = _patient(asker, found, f"{name}.patient", unique=False, default=patient)
    dates = [each for each, kind in found.columns.items() if kind in (pl.Date, pl.Datetime)]
    question = "Its column with a row's time; - for none"
    times = one_of(f"{name}.time", "-", *found.columns)
    time = asker.ask(f"{name}.time", question, dates[0] if dates else "-", times)
    meaning = asker.ask(f"{name}.meaning", "What a row of it is")
    fields = {"name": name, "meaning": meaning, "patient": mine, "source": found.source}
    page = ["", "[[tables]]", *lines(fields | ({"time": time} if time != "-" else {}))]
    question = "How many rows of a patient may count, the same for everybody"
    most = asker.ask(f"{name}.most", question, "", fitting(f"{name}.most", empty=True))
    page.append(f"most = {most}  {MARKS['custodian']}" if most else f"most = {UNSET}")
    if time != "-":
        question = "Days before a patient's last row that are told apart"
        page.append(f"span = {asker.ask(f'{name}.span', question, '3650', fitting(f'{name}.span'))}")
    return page + _columns(asker, found, name, {mine, time}, "tables.columns")


def _columns(asker: Asker, found: Found, of: str, besides: set[str], header: str) -> list[str]:
    names = {name: "" for name in found.columns if name not in besides}
    if found.source.endswith("/"):
        names = _codes(asker, found, of)
    page = []
    for name, code in names.items():
        described = draft(asker, found, of, name, code)
        page += ["", f"[[{header}]]", *described] if described else []
    return page


def _codes(asker: Asker, found: Found, of: str) -> dict[str, str]:
    """Columns of a MEDS folder: what they are called, and the code that each speaks of."""
    key = f"{of}.codes"
    question = 'Columns as name = code, separated by semicolons ("sex = SEX//; hdl = LAB//HDL"); look shows the codes'
    pair = r"\s*\w+\s*=[^;=]+"
    check = fitting(key, f"{pair}(;{pair})*;?", empty=True)
    given = look(asker, key, question, "", lambda: found.column("code"), check)
    pairs = [each.partition("=") for each in given.split(";") if each.strip()]
    return {name.strip(): code.strip() for name, _, code in pairs}


def _patient(asker: Asker, found: Found, key: str, *, unique: bool, default: str = "") -> str:
    """The column that identifies patients, tried on the records at once."""

    def check(given: str) -> None:
        one_of(key, *found.columns)(given)
        if not nameable(given):
            what = f"The column {given!r} has a name that a schema cannot hold."
            instead = f"Make a tidy copy: rapha-lab data tidy {shlex.quote(str(found.path))}"
            raise RequestError(what, "", instead, field=key)
        names = identifiers(given, found.column(given))
        if unique and names.n_unique() < len(names):
            what = f"The column {given} does not identify patients: some occur in more than one row."
            instead = f"Choose another column; {BACK} chooses another table."
            raise RequestError(what, "", instead, field=key)

    likely = [name for name in found.columns if re.fullmatch(_IDENTIFIER, name, re.IGNORECASE)]
    default = default if default in found.columns else likely[0] if len(likely) == 1 else ""
    return asker.ask(key, f"Which column of {found.source} identifies the patient", default, check)
