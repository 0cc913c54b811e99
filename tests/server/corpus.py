"""Sixty made-up notebooks, thirty with outputs that hold patients' rows and thirty without.

The tables are drawn by the libraries that draw them in real notebooks (pandas, polars, csv, json), so that
the check meets their true form. Every patient is made up.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import polars as pl

Output = dict[str, Any]
Case = tuple[str, bool, list[dict[str, Any]]]

FIRST = "Ann Bo Cleo Dan Eve Finn Gus Hana Ines Jon Kim Lea".split()
LAST = "Abel Brandt Costa Diaz Evans Fuchs Garcia Hughes Ito Jansen".split()
CODES = "I10 E11.9 I21.4 C50.1 J44.0 N18.3 F32.1 K35.8".split()


def corpus(seed: int = 20) -> Iterator[Case]:
    """(name, whether it leaks, cells) of each notebook."""
    for index, make in enumerate(LEAKY + CLEAN):
        rng = random.Random(seed * 1000 + index)
        yield f"{index:02d}-{make.__name__}", index < len(LEAKY), _cells(make(rng))


def _cells(made: list[tuple[str, list[Output]] | str]) -> list[dict[str, Any]]:
    cells = []
    for index, cell in enumerate(made):
        if isinstance(cell, str):
            cells.append({"id": f"c{index}", "cell_type": "markdown", "source": cell})
        else:
            cells.append({"id": f"c{index}", "cell_type": "code", "source": cell[0], "outputs": cell[1]})
    return cells


# -- how outputs look ----------------------------------------------------------------------------------


def _show(frame: pd.DataFrame | pl.DataFrame, *, html: bool = True) -> list[Output]:
    data = {"text/plain": repr(frame)}
    if html:
        data["text/html"] = frame._repr_html_()
    return [{"output_type": "execute_result", "data": data, "metadata": {}}]


def _print(text: Any) -> list[Output]:
    return [{"output_type": "stream", "name": "stdout", "text": f"{text}\n"}]


def _data(mime: str, content: Any) -> list[Output]:
    return [
        {"output_type": "display_data", "data": {"text/plain": "<object>", mime: content}, "metadata": {}}
    ]


# -- made-up patients ------------------------------------------------------------------------------------


def _nhs(rng: random.Random) -> str:
    while True:
        digits = [rng.randrange(10) for _ in range(9)]
        check = 11 - sum((10 - i) * d for i, d in enumerate(digits)) % 11
        if check != 10:
            return "".join(map(str, [*digits, check % 11]))


def _date(rng: random.Random) -> str:
    return f"20{rng.randrange(10, 25)}-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}"


def _people(
    rng: random.Random, n: int = 12, **columns: Callable[[random.Random], Any]
) -> dict[str, list[Any]]:
    return {name: [draw(rng) for _ in range(n)] for name, draw in columns.items()}


def age(rng: random.Random) -> int:
    """Years."""
    return rng.randrange(18, 99)


def sex(rng: random.Random) -> str:
    """F or M."""
    return rng.choice("FM")


def code(rng: random.Random) -> str:
    """A diagnosis."""
    return rng.choice(CODES)


def lab(rng: random.Random) -> float:
    """A laboratory value."""
    return round(rng.uniform(0.4, 9.0), 2)


def number(rng: random.Random) -> int:
    """A number as registries give them."""
    return rng.randrange(100000, 999999)


def name(rng: random.Random) -> str:
    """A person's name."""
    return f"{rng.choice(FIRST)} {rng.choice(LAST)}"


# -- notebooks that leak ---------------------------------------------------------------------------------


def pandas_head(rng):
    frame = pd.DataFrame(_people(rng, patient_id=number, age=age, sex=sex, creatinine=lab))
    return [("df.head(12)", _show(frame))]


def polars_frame(rng):
    return [("df", _show(pl.DataFrame(_people(rng, 300, subject_id=number, age=age, dx=code))))]


def plain_pandas(rng):
    return [("print(df)", _print(pd.DataFrame(_people(rng, mrn=number, sex=sex, lactate=lab))))]


def plain_polars(rng):
    return [("print(df)", _print(pl.DataFrame(_people(rng, eid=number, weight=lab, height=lab))))]


def nhs_numbers(rng):
    return [("df[['a', 'b']]", _show(pd.DataFrame(_people(rng, a=_nhs, b=lab))))]


def long_frame(rng):
    frame = pd.DataFrame(_people(rng, 400, hadm_id=number, admittime=_date, diagnosis=code))
    return [("admissions", _show(frame))]


def no_identifier(rng):
    return [("df", _show(pd.DataFrame(_people(rng, 80, age=age, sex=sex, icd10=code, creatinine=lab))))]


def laboratory(rng):
    columns = {"kappa": lab, "lambda": lab, "creatinine": lab, "mgus": lambda r: r.randrange(2)}
    return [("df.sample(12)", _show(pl.DataFrame(_people(rng, **columns))))]


def csv_text(rng):
    return [
        (
            "!head patients.csv",
            _print(pd.DataFrame(_people(rng, patient=number, dob=_date, sex=sex)).to_csv()),
        )
    ]


def tab_separated(rng):
    text = pd.DataFrame(_people(rng, person_id=number, gender=sex, visit_date=_date)).to_csv(
        sep="\t", index=False
    )
    return [("!cat omop.tsv", _print(text))]


def json_records(rng):
    text = pd.DataFrame(_people(rng, patientId=number, age=age, code=code)).to_json(orient="records")
    return [("print(response.text)", _print(text))]


def python_records(rng):
    people = _people(rng, patient_id=number, age=age, sex=sex)
    return [
        (
            "rows[:12]",
            _print([dict(zip(people, row, strict=True)) for row in zip(*people.values(), strict=True)]),
        )
    ]


def one_record(rng):
    record = {"patient_id": number(rng), "name": name(rng), "dob": _date(rng), "diagnosis": code(rng)}
    return [("rows[0]", _data("text/plain", repr(record)))]


def names_and_places(rng):
    people = _people(
        rng,
        surname=lambda r: r.choice(LAST),
        postcode=lambda r: f"OX{r.randrange(1, 9)} {r.randrange(1, 9)}AB",
    )
    return [("df", _show(pd.DataFrame(people)))]


def markdown_paste(rng):
    people = _people(rng, patient_id=number, age=age, outcome=lambda r: r.choice(["died", "alive"]))
    rows = "\n".join(f"| {a} | {b} | {c} |" for a, b, c in zip(*people.values(), strict=True))
    return [f"The odd cases:\n\n| {' | '.join(people)} |\n|---|---|---|\n{rows}\n"]


def literal_paste(rng):
    text = pd.DataFrame(_people(rng, study_id=number, age=age, sex=sex)).to_csv(index=False)
    return [(f'df = pd.read_csv(io.StringIO("""{text}"""))', [])]


def vega_points(rng):
    rows = pd.DataFrame(_people(rng, 30, patient_id=number, age=age, crp=lab)).to_dict("records")
    return [("chart", _data("application/vnd.vegalite.v5+json", {"mark": "point", "datasets": {"d": rows}}))]


def query_result(rng):
    frame = pd.DataFrame(_people(rng, encounter_id=number, ward=lambda r: r.choice("ABC"), los=lab))
    return [("cur.fetchall()", _show(frame, html=False))]


def indexed_by_patient(rng):
    frame = pd.DataFrame(_people(rng, patient_id=number, age=age, systolic=age)).set_index("patient_id")
    return [("df.set_index('patient_id')", _show(frame))]


def emails(rng):
    frame = pd.DataFrame(
        _people(rng, contact=lambda r: f"{r.choice(FIRST).lower()}{r.randrange(99)}@example.org", group=sex)
    )
    return [("df", _show(frame))]


def social_security(rng):
    frame = pd.DataFrame(
        _people(
            rng, x=lambda r: f"{r.randrange(100, 999)}-{r.randrange(10, 99)}-{r.randrange(1000, 9999)}", y=sex
        )
    )
    return [("df", _show(frame))]


def record_numbers(rng):
    return [("df", _show(pd.DataFrame(_people(rng, key=lambda r: f"MRN{number(r)}", value=lab))))]


def misclassified(rng):
    frame = pd.DataFrame(_people(rng, patient_id=number, predicted=lab, label=lambda r: r.randrange(2)))
    return [("df[df.label != (df.predicted > .5)]", _show(frame))]


def assertion(rng):
    frame = pd.DataFrame(_people(rng, 5, patient_id=number, age=age, sex=sex))
    return [
        (
            "check(df)",
            [
                {
                    "output_type": "error",
                    "ename": "ValueError",
                    "evalue": f"bad rows:\n{frame}",
                    "traceback": [],
                }
            ],
        )
    ]


def timeline(rng):
    frame = pl.DataFrame(_people(rng, 40, subject_id=number, charttime=_date, heart_rate=age, spo2=age))
    return [("events.head(40)", _show(frame))]


def generic_id(rng):
    return [("df", _show(pd.DataFrame(_people(rng, id=number, age=age, bmi=lab))))]


def survival_rows(rng):
    frame = pd.DataFrame(_people(rng, 60, age=age, sex=sex, futime=number, death=lambda r: r.randrange(2)))
    return [("load_flchain()", _show(frame))]


def written_columns(rng):
    people = _people(rng, patient_id=number, dob=_date, icd=code)
    return [("df.to_dict('list')", _print(people))]


def wide_frame(rng):
    people = _people(rng, 20, pat_id=number, age=age, **{f"snp{i}": sex for i in range(14)})
    return [("genotypes", _show(pd.DataFrame(people)))]


def notes(rng):
    frame = pd.DataFrame(_people(rng, patient_no=number, note=lambda r: f"{name(r)} seen, {code(r)}"))
    return [("notes", _show(frame))]


# -- notebooks that do not ------------------------------------------------------------------------------


def described(rng):
    frame = pd.DataFrame(_people(rng, 200, age=age, creatinine=lab, weight=lab))
    return [("df.describe()", _show(frame.describe()))]


def described_by_polars(rng):
    return [("df.describe()", _show(pl.DataFrame(_people(rng, 200, age=age, creatinine=lab)).describe()))]


def value_counts(rng):
    return [
        (
            "df.sex.value_counts()",
            _show(pd.DataFrame(_people(rng, 200, sex=sex)).value_counts("sex").to_frame()),
        )
    ]


def grouped(rng):
    frame = pd.DataFrame(_people(rng, 200, sex=sex, age=age))
    return [
        (
            "df.groupby('sex').age.agg(['mean', 'count'])",
            _show(frame.groupby("sex").age.agg(["mean", "count"])),
        )
    ]


def correlation(rng):
    return [("df.corr()", _show(pd.DataFrame(_people(rng, 200, age=age, creatinine=lab, bmi=lab)).corr()))]


def training_log(rng):
    lines = [
        f"epoch {i:3d}  loss {1 / (i + 1):.4f}  auroc {0.7 + i / 100:.3f}  epsilon {i / 10:.2f}"
        for i in range(10)
    ]
    return [("fit()", _print("\n".join(lines)))]


def history(rng):
    frame = pd.DataFrame({"epoch": range(30), "loss": [lab(rng) for _ in range(30)], "auroc": [0.8] * 30})
    return [("history", _show(frame))]


def hyperparameters(rng):
    frame = pd.DataFrame(
        {"model": ["mlp", "gru", "linear"], "lr": [0.1, 0.01, 1.0], "batch": [256, 512, 1024]}
    )
    return [("grid", _show(frame))]


def coefficients(rng):
    names = ["age", "sex", "creatinine", "smoking"]
    frame = pd.DataFrame({"feature": names, "coef": [lab(rng) for _ in names], "p_value": [0.01] * 4})
    return [("summary", _show(frame))]


def confusion(rng):
    return [
        (
            "confusion",
            _show(pd.DataFrame([[812, 40], [77, 301]], index=["alive", "died"], columns=["alive", "died"])),
        )
    ]


def schema(rng):
    frame = pl.DataFrame(
        {
            "name": ["age", "sex", "creatinine"],
            "type": ["number", "category", "number"],
            "unit": ["years", "", "mg/dL"],
        }
    )
    return [("cohort.schema", _show(frame))]


def info(rng):
    out = io.StringIO()
    pd.DataFrame(_people(rng, 50, patient_id=number, age=age, sex=sex)).info(buf=out)
    return [("df.info()", _print(out.getvalue()))]


def types(rng):
    return [("df.dtypes", _print(pd.DataFrame(_people(rng, patient_id=number, age=age, sex=sex)).dtypes))]


def mock_patients(rng):
    frame = pl.DataFrame(_people(rng, 50, age=age, sex=sex, creatinine=lab))
    return [("mock = cohort.mock()\nmock", _show(frame)), ("mock.head()", _show(frame.head()))]


def release_card(rng):
    card = {"title": "Patients by age", "rows": [{"name": "50 to 60", "value": 512.0, "error": 3.0}]}
    return [
        (
            "%%enclave flchain\npatients.histogram('age', epsilon=.1)",
            _data("application/vnd.rapha.release+json", card),
        )
    ]


def baseline_table(rng):
    text = "| characteristic | n | % |\n|---|---|---|\n| Age 50 to 64 | 3120 | 39.6 |\n| Female | 4350 | 55.2 |\n"
    return [f"Table 1. Who was enrolled.\n\n{text}"]


def survival_curve(rng):
    frame = pd.DataFrame(
        {
            "years": range(12),
            "survival": [1 - i / 30 for i in range(12)],
            "lower": [0.9 - i / 30 for i in range(12)],
            "upper": [1.0] * 12,
        }
    )
    return [("km", _show(frame))]


def roc_points(rng):
    frame = pd.DataFrame(
        {
            "fpr": [i / 20 for i in range(20)],
            "tpr": [min(1, i / 12) for i in range(20)],
            "threshold": [1 - i / 20 for i in range(20)],
        }
    )
    return [("roc", _show(frame))]


def picture(rng):
    return [("plt.show()", _data("image/png", "iVBORw0KGgo="))]


def files(rng):
    return [
        (
            "!ls -l",
            _print(
                "total 12\n-rw-r--r-- 1 u u 1200 Jan  3 10:00 a.py\n-rw-r--r-- 1 u u  300 Jan  3 10:00 b.py\n"
            ),
        )
    ]


def packages(rng):
    return [
        (
            "!pip list",
            _print(
                "Package    Version\n---------- -------\nnumpy      2.4.0\ntorch      2.13.0\npolars     2.1.0\n"
            ),
        )
    ]


def benchmark(rng):
    frame = pd.DataFrame(
        {"engine": ["polars", "pandas", "duckdb"], "seconds": [0.1, 0.9, 0.2], "rows": [10**6] * 3}
    )
    return [("timings", _show(frame))]


def countries(rng):
    frame = pd.DataFrame(
        {"country": ["NO", "SE", "DK"], "hospitals": [51, 70, 40], "beds": [14000, 20000, 14500]}
    )
    return [("hospitals", _show(frame))]


def jobs_list(rng):
    rows = [
        {"id": "a1b2", "state": "done", "epsilon": 0.1},
        {"id": "c3d4", "state": "running", "epsilon": 1.0},
    ]
    return [("site.jobs()", _print(rows))]


def budget(rng):
    return [
        (
            "cohort.budget",
            _print(
                {
                    "train": {"epsilon": 4.0, "spent": 1.2, "left": 2.8},
                    "test": {"epsilon": 4.0, "spent": 0.1, "left": 3.9},
                }
            ),
        )
    ]


def missingness(rng):
    frame = pd.DataFrame(
        {"column": ["age", "creatinine", "diagnosis"], "missing": [0, 1350, 12], "share": [0.0, 0.17, 0.002]}
    )
    return [("missing", _show(frame))]


def metrics(rng):
    return [
        ("scores", _print(json.dumps({"auroc": 0.829, "brier": 0.14, "accuracy": 0.78, "sensitivity": 0.7})))
    ]


def model_summary(rng):
    return [
        (
            "model",
            _data(
                "text/plain", "Sequential(\n  (0): Linear(in_features=8, out_features=64)\n  (1): GELU()\n)"
            ),
        )
    ]


def prose(rng):
    return [
        "# Plan\n\nWe train on age, sex and creatinine, and evaluate on held-out patients.\n\n- one\n- two\n"
    ]


def sites_compared(rng):
    frame = pl.DataFrame({"site": ["north", "south"], "auroc": [0.81, 0.83], "patients_count": [1200, 1800]})
    return [("by_site", _show(frame))]


LEAKY = [
    pandas_head, polars_frame, plain_pandas, plain_polars, nhs_numbers, long_frame, no_identifier, laboratory, csv_text,
    tab_separated, json_records, python_records, one_record, names_and_places, markdown_paste, literal_paste, vega_points,
    query_result, indexed_by_patient, emails, social_security, record_numbers, misclassified, assertion, timeline,
    generic_id, survival_rows, written_columns, wide_frame, notes,
]  # fmt: skip
CLEAN = [
    described, described_by_polars, value_counts, grouped, correlation, training_log, history, hyperparameters,
    coefficients, confusion, schema, info, types, mock_patients, release_card, baseline_table, survival_curve, roc_points,
    picture, files, packages, benchmark, countries, jobs_list, budget, missingness, metrics, model_summary, prose,
    sites_compared,
]  # fmt: skip
