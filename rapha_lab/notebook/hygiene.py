"""Finds outputs that look like patients' rows, before a notebook is saved or shared.

Help, not a wall: it reads names and shapes of tables, so it can miss rows and can doubt a harmless table.
Tables of groups, metrics and settings pass; a column of identifiers, or records of persons, do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from rapha_lab.notebook.listings import note_in
from rapha_lab.notebook.tables import Table, tables_in_text, tables_of

__all__ = ["find_rows"]

_OWN = tuple(
    f"application/vnd.rapha.{kind}+json" for kind in ("release", "blocked", "job", "site", "dataset")
)

_WHO = (
    r"(patient|pat|subject|subj|person|participant|member|case|enrollee|client|resident|donor|mother|infant)"
)
_IDENTIFIER = re.compile(
    rf"({_WHO}_?(id|no|nr|num|number|key|code|identifier|uid|ref)|{_WHO}|p?id_{_WHO}|eid|mrn|hadm_id|stay_id|"
    r"icustay_id|encounter(_id)?|admission_id|visit_id|episode_id|usubjid|subjid|pseudo(nym)?(_id)?|hospital_(no|number)|"
    r"nhs(_?(no|number))?|chi(_number)?|ssn|social_security(_number)?|medical_record(_number)?|insurance_(no|number)|"
    r"pid|pat_?id|study_(id|no|number)|accession(_number)?|specimen_id|sample_id|row_?id|record_(id|no))"
)
_PERSONAL = {
    "age": r"(age|years|yob)(_|$)|_age$|^age|birth_year|year_of_birth",
    "sex": r"^(sex|gender|male|female)$|_sex$|^is_(male|female)$",
    "birth": r"birth|^dob",
    "name": r"^((first|last|given|family|full|sur|fore|patient)_?name|name|surname)$",
    "place": r"post_?code|^zip|address|^lsoa|^town$|^city$|^county$",
    "contact": r"phone|e?mail$|mobile",
    "origin": r"ethnic|^race$",
    "time": r"(admi|disch|visit|encounter|diagnos|death|died|operation|sample|event|start|end|chart|in|out).*"
    r"(date|time|year|yr)$|_(date|time|at|on)$|^(date|futime|follow_?up)",
    "clinical": r"diag|icd|^dx|^drug|medic|^dose$|creatinine|hba1c|glucose|sodium|potassium|ha?emoglobin|"
    r"platelet|lactate|cholesterol|bmi|weight|height|blood|systolic|diastolic|^s?bp|^dbp|heart_rate|^hr$|spo2|"
    r"temperature|smok|stage|tumou?r|grade|biopsy|kappa|lambda|mgus|flc|egfr|troponin|crp|albumin|wbc|symptom|"
    r"treatment|outcome|survival|mortality|^note|comorbid|allerg|ward|los$",
}
_SUMMARY = re.compile(
    r"(^|_)(n|count|counts|freq|frequency|pct|percent|percentage|share|proportion|rate|mean|avg|average|median|std|sd|sem|"
    r"var|min|max|sum|total|lower|upper|ci|quantile|iqr|p_?value|coef|coefficient|estimate|odds(_ratio)?|hr_ci|se|error|"
    r"epoch|step|loss|auroc|auc|auprc|accuracy|precision|recall|f1|brier|epsilon|delta|sigma|noise|lr|learning_rate|"
    r"batch|seed|fold|threshold|fpr|tpr|importance|shap|gain|dtype|type|bounds|missing|non_null|null_count|unique|nunique|"
    r"bin|bins|model|metric|value|score|param|parameter|setting|unit|description|categories)(_|$|\d)"
)
_RATES = re.compile(r"(heart|pulse|respiratory|resp|filtration)_rate")
_DESCRIBE = {
    "count",
    "mean",
    "std",
    "min",
    "max",
    "25%",
    "50%",
    "75%",
    "median",
    "null_count",
    "unique",
    "top",
    "freq",
}
_DIRECT = {
    "e-mail addresses": re.compile(r"[\w.+-]+@[\w-]+\.[\w.]{2,}"),
    "social security numbers": re.compile(r"\d{3}-\d{2}-\d{4}"),
    "health record numbers": re.compile(r"(MRN|PAT|PT|NHS|HOSP|UHB|SUBJ|P|S)[-_: ]?\d{4,}"),
    "UK postcodes": re.compile(r"[A-Z]{1,2}\d[A-Z\d]? \d[A-Z]{2}"),
}
_VALUES = {
    "date": re.compile(r"\d{4}-\d\d-\d\d([T ].*)?|\d{1,2}[./]\d{1,2}[./]\d{4}"),
    "sex": re.compile(r"[FMfm]|(fe)?male|(Fe|M)ale"),
    "diagnosis": re.compile(r"[A-Z]\d\d(\.?\d{1,2})?"),
}


def find_rows(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where a notebook's cells look as if they held patients' rows.

    Args:
        cells: the cells in nbformat 4. Outputs are read, and text that was pasted into a cell.

    Returns:
        One {cell, index, reason} each, `index` the output's place in its cell, or -1 for the cell's own text.
    """
    found, mocks = [], _mock_names(cells)
    for cell in cells:
        source = _joined(cell.get("source", ""))
        if reason := _doubt(_pasted(source, cell.get("cell_type", ""))) or _note(cell):
            found.append({"cell": cell.get("id", ""), "index": -1, "reason": reason})
        if ".mock(" in source or mocks & set(re.findall(r"[A-Za-z_]\w*", source)):
            continue
        for index, output in enumerate(cell.get("outputs", [])):
            if reason := _doubt(_tables(output)) or _note(output):
                found.append({"cell": cell.get("id", ""), "index": index, "reason": reason})
    return found


def _note(shown: dict[str, Any]) -> str:
    """Why an output or a markdown cell looks like a note about a person, or nothing."""
    texts = [shown.get(key, "") for key in ("text", "evalue")] + [shown.get("data", {}).get("text/plain", "")]
    if shown.get("cell_type") == "markdown":
        texts.append(shown.get("source", ""))
    own = any(mime in shown.get("data", {}) for mime in _OWN)
    said = not own and any(note_in(_joined(text)) for text in texts)
    return "it names a person by a record number or a date of birth." if said else ""


def _mock_names(cells: list[dict[str, Any]]) -> set[str]:
    """Names that hold made-up patients: what is shown of them is nobody's."""
    text = "\n".join(_joined(cell.get("source", "")) for cell in cells if cell.get("cell_type") == "code")
    mock = set(re.findall(r"^\s*([A-Za-z_]\w*)\s*=.*\.mock\(", text, re.MULTILINE))
    real = set(re.findall(r"^\s*([A-Za-z_]\w*)\s*=.*\b(?:read|scan)_\w+\(", text, re.MULTILINE))
    return mock - real


def _tables(output: dict[str, Any]) -> Iterator[Table]:
    if output.get("output_type") == "stream":
        yield from tables_in_text(_joined(output.get("text", "")))
    elif output.get("output_type") == "error":
        yield from tables_in_text(_joined(output.get("evalue", "")))
    elif not any(mime in output.get("data", {}) for mime in _OWN):
        yield from tables_of(output.get("data", {}))


def _pasted(source: str, kind: str) -> Iterator[Table]:
    """Tables in a markdown cell, or in the long strings of a code cell."""
    texts = [source] if kind != "code" else re.findall(r'"""(.*?)"""|\'\'\'(.*?)\'\'\'', source, re.DOTALL)
    for text in texts:
        yield from tables_in_text(text if isinstance(text, str) else "".join(text))


def _doubt(tables: Iterator[Table]) -> str:
    """Why one of these tables looks like patients' rows, or nothing."""
    return next((reason for table in tables if (reason := _reason(table))), "")


def _reason(table: Table) -> str:
    names = [_plain(name) for name in table.header]
    if not table.rows or len(names) < 2:
        return ""
    if kind := _direct_identifiers(table):
        return f"it holds {kind}."
    if not any(names):
        return "its rows describe single persons." if _are_persons(table) else ""
    if _is_statistics(table, names):
        return ""
    for index, name in enumerate(names):
        if _IDENTIFIER.fullmatch(name) and _is_distinct(table.column(index)):
            return f"its column {table.header[index]} looks like an identifier of patients."
    if any(_SUMMARY.search(_RATES.sub("", name)) for name in names):
        return ""
    traits = {trait for name in names for trait, pattern in _PERSONAL.items() if re.search(pattern, name)}
    if "id" in names and traits and _is_distinct(table.column(names.index("id"))):
        return "its column id looks like an identifier of patients."
    clinical = sum(bool(re.search(_PERSONAL["clinical"], name)) for name in names)
    if len(traits) >= 2 or clinical >= 3:
        return "its columns describe single persons, a row each."
    return ""


def _direct_identifiers(table: Table) -> str:
    """The kind of identifier that most values of some column are, whatever the column is called."""
    for index in range(len(table.header)):
        values = table.column(index)
        if len(values) > 1 and sum(map(_is_nhs_number, values)) > 0.8 * len(values):
            return "NHS numbers"
        for kind, pattern in _DIRECT.items():
            if len(values) > 1 and sum(bool(pattern.fullmatch(v)) for v in values) > 0.8 * len(values):
                return kind
    return ""


def _are_persons(table: Table) -> bool:
    """Whether columns without names hold dates, sexes and diagnoses, two of them at least."""
    columns = [table.column(index) for index in range(len(table.header))]
    kinds = {
        kind
        for kind, pattern in _VALUES.items()
        for values in columns
        if len(values) > 1 and all(map(pattern.fullmatch, values))
    }
    return len(kinds) > 1


def _is_nhs_number(text: str) -> bool:
    digits = re.sub(r"[ -]", "", text)
    if not re.fullmatch(r"\d{10}", digits):
        return False
    check = 11 - sum((10 - i) * int(d) for i, d in enumerate(digits[:9])) % 11
    return check % 11 == int(digits[9])


def _is_statistics(table: Table, names: list[str]) -> bool:
    """Whether rows are statistics of columns, by the labels of the left edge."""
    labels = {row[0].strip().lower() for row in table.rows if row}
    if len(labels & _DESCRIBE) >= 3:
        return True
    if len(table.rows) == 1 and all(re.fullmatch(r"[\d.,]*", cell) for cell in table.rows[0]):
        return True  # one row of counts, such as of missing values
    # a matrix of columns by columns: correlation, confusion
    return len(table.rows) > 1 and bool(({_plain(label) for label in labels} - {""}) & set(names[1:]))


def _is_distinct(values: list[str]) -> bool:
    return bool(values) and len(set(values)) >= 0.5 * len(values)


def _plain(name: str) -> str:
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name.strip())
    return re.sub(r"[^a-z0-9%]+", "_", words.lower()).strip("_")


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)
