"""Finds the tables in a notebook's outputs: HTML, frames printed as text, CSV, records in JSON or Python."""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import zip_longest
from typing import Any

from rapha_lab.notebook.listings import columns_in, is_series, records_in

__all__ = ["Table", "tables_in_json", "tables_in_text", "tables_of"]

MAX_ROWS = 200
MAX_TEXT = 400_000


@dataclass
class Table:
    """A header and rows of text; `total` is the number of rows it says it was cut from."""

    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    total: int | None = None

    def column(self, index: int) -> list[str]:
        """The cells of one column that hold something."""
        return [row[index] for row in self.rows if index < len(row) and row[index]]


def tables_of(data: dict[str, Any]) -> Iterator[Table]:
    """The tables of one MIME bundle, from whichever forms it comes in."""
    for mime, content in data.items():
        text = "".join(content) if _is_lines(content) else content
        if mime == "text/html" and isinstance(text, str):
            yield from _tables_in_html(text[:MAX_TEXT])
        elif isinstance(text, str) and mime.startswith(("text/", "application/vnd.jupyter.std")):
            yield from tables_in_text(text)
        elif mime.endswith("json"):
            yield from tables_in_json(content)


def tables_in_text(text: str) -> Iterator[Table]:
    """The tables printed in `text`."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text[:MAX_TEXT])
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.splitlines() if line.strip()]
        for read in (_boxed, _piped, _delimited, _aligned) if not is_series(lines) else ():
            if (table := read(lines)) is not None:
                table.total = _total(text)
                yield table
                break
    if (records := _literal(text)) is not None:
        yield from tables_in_json(records)
    for found in records_in(text):
        yield from tables_in_json(found)
    for columns in columns_in(text):
        yield Table([*columns], [[*row] for row in zip_longest(*columns.values(), fillvalue="")][:MAX_ROWS])


def tables_in_json(content: Any, depth: int = 0) -> Iterator[Table]:
    """Lists of like objects and objects of like lists, wherever they stand in a JSON document."""
    if depth > 6:
        return
    if isinstance(content, list):
        if len(content) > 1 and all(isinstance(item, dict) and item for item in content):
            yield _from_records(content[:MAX_ROWS], len(content))
        elif len(content) > 1 and all(isinstance(item, (str, int, float, list, tuple)) for item in content):
            rows = [[*item] if isinstance(item, (list, tuple)) else [item] for item in content[:MAX_ROWS]]
            width = max(map(len, rows))
            yield Table([""] * max(width, 2), [[_text(value) for value in row] for row in rows], len(content))
        else:
            for item in content[:50]:
                yield from tables_in_json(item, depth + 1)
    elif isinstance(content, dict):
        flat = [v for v in content.values() if isinstance(v, (str, int, float)) or v is None]
        if depth == 0 and len(flat) == len(content) > 2:
            yield Table([str(key) for key in content], [[_text(value) for value in content.values()]])
        lists = {k: v for k, v in content.items() if isinstance(v, list) and len(v) > 1}
        if len(lists) > 1 and len({len(v) for v in lists.values()}) == 1:
            rows = [[_text(value) for value in row] for row in zip(*lists.values(), strict=True)]
            yield Table([str(key) for key in lists], rows[:MAX_ROWS], len(rows))
        for value in list(content.values())[:50]:
            yield from tables_in_json(value, depth + 1)


def _from_records(records: list[dict[str, Any]], total: int) -> Table:
    header = list(dict.fromkeys(str(key) for record in records for key in record))
    rows = [[_text(record.get(key)) for key in header] for record in records]
    return Table(header, rows, total)


class _Reader(HTMLParser):
    """Collects the cells of every table of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[Table] = []
        self._row: list[str] | None = None
        self._cell: list[str] | None = None
        self._head = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append(Table([]))
            self._head = True
        elif tag == "tr" and self.tables:
            self._row, self._data = [], False
        elif tag in ("td", "th") and self._row is not None:
            self._cell = []
            self._data = self._data or tag == "td"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None and self._row is not None:
            self._row.append("".join(self._cell).strip().strip('"'))
            self._cell = None
        elif tag == "tr" and self._row is not None:
            self._keep(self._row)
            self._row = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)

    def _keep(self, row: list[str]) -> None:
        table = self.tables[-1]
        # A frame's own row of types under the header, as polars draws it, is no row of data.
        types = bool(row) and all(cell in _TYPES for cell in row)
        if not table.header:
            table.header = row
        elif types or (not self._data and not table.rows):
            table.header = (
                [a or b for a, b in zip(table.header, row, strict=False)] if not types else table.header
            )
        elif len(table.rows) < MAX_ROWS:
            table.rows.append(row)


_TYPES = {"str", "date", "bool", "cat", "enum", "binary", "null", "object"} | {
    f"{kind}{bits}" for kind in "iuf" for bits in (8, 16, 32, 64)
}


def _tables_in_html(text: str) -> Iterator[Table]:
    reader = _Reader()
    reader.feed(text)
    for table in reader.tables:
        table.total = _total(re.sub(r"<[^>]+>", " ", text))
        table.rows = [row for row in table.rows if not _is_gap(row)]
        yield table


def _boxed(lines: list[str]) -> Table | None:
    rows = [
        re.split(r"[│┆|]", line.strip().strip("│|"))
        for line in lines
        if re.match(r"\s*[│|].*[│┆|]\s*$", line)
    ]
    if len(rows) < 3 or not any("┌" in line or "╞" in line or "+--" in line for line in lines):
        return None
    cells = [[cell.strip().strip('"') for cell in row] for row in rows]
    body = [row for row in cells[1:] if not _is_gap(row) and not set(row) <= _TYPES | {"---", ""}]
    return Table(cells[0], body[:MAX_ROWS])


def _piped(lines: list[str]) -> Table | None:
    if len(lines) < 3 or not re.fullmatch(r"[\s|:-]*-{2,}[\s|:-]*", lines[1]) or "|" not in lines[1]:
        return None
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return Table(rows[0], rows[2 : MAX_ROWS + 2])


def _delimited(lines: list[str]) -> Table | None:
    lines = [line for line in lines if re.search(r"[,;\t]", line)]
    for mark in "\t,;":
        rows = list(csv.reader(lines[: MAX_ROWS + 1], delimiter=mark, skipinitialspace=True))
        width = len(rows[0]) if rows else 0
        if width > 2 and len(rows) > 2 and sum(len(row) == width for row in rows) >= 0.9 * len(rows):
            return Table([cell.strip() for cell in rows[0]], [[c.strip() for c in row] for row in rows[1:]])
    return None


def _aligned(lines: list[str]) -> Table | None:
    """A frame printed by pandas, its index first and without a name; a line of prose may stand above it."""
    found = (_aligned_from(lines[start:]) for start in range(min(3, len(lines))))
    return next((table for table in found if table is not None), None)


def _aligned_from(lines: list[str]) -> Table | None:
    lines = [line for line in lines if not re.match(r"\s*\[\d+ rows x \d+ columns\]|shape: ", line)]
    if len(lines) < 2:
        return None
    header = lines[0].replace("\\", " ").split()
    if index := _index_names(lines):
        width, rows = len(index) + len(header), [line.split() for line in lines[2 : MAX_ROWS + 2]]
        # rows that share a label of the index print it once
        return Table([*index, *header], [[""] * (width - len(row)) + row for row in rows])
    # A value with a blank in it ("2019-03-01 10:20:00", "Anna Lee") takes two words: split at two blanks there.
    rows = []
    for line in lines[1 : MAX_ROWS + 1]:
        words = line.split()
        if len(words) > len(header) + 1:
            words = re.split(r"\s{2,}", line.strip())
        rows.append(words)
    rows = [row for row in rows if not _is_gap(row)]
    indexed = sum(len(row) == len(header) + 1 for row in rows)
    bare = sum(len(row) == len(header) for row in rows)
    if not rows or len(header) < 2 or max(indexed, bare) < 0.8 * len(rows):
        return None
    return Table(["", *header] if indexed >= bare else header, rows)


def _index_names(lines: list[str]) -> list[str]:
    """The names of a printed frame's index, which pandas puts in a line of their own under the header."""
    beside = len(lines[0]) - len(lines[0].lstrip())
    alone = len(lines) > 2 and 0 < len(lines[1].rstrip()) <= beside and not lines[1][0].isspace()
    return lines[1].split() if alone and not re.search(r"\d", lines[1]) else []


def _literal(text: str) -> Any:
    """A list or dictionary that the whole text is, in JSON or Python."""
    text = text.strip()
    if text[:1] not in "[{" or text[-1:] not in "]}":
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _total(text: str) -> int | None:
    match = re.search(r"(\d[\d,_]*)\s+rows\s+[x×]\s+\d+\s+columns", text) or re.search(
        r"shape: \((\d[\d,_]*?),", text
    )
    return int(re.sub(r"\D", "", match[1])) if match else None


def _is_gap(row: list[str]) -> bool:
    return all(cell in ("...", "…", "..", "") for cell in row)


def _is_lines(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(line, str) for line in content)


def _text(value: Any) -> str:
    return "" if value is None else str(value)
