"""The report: the best of each column marked, and the facts that make a figure repeatable."""

import json
from pathlib import Path

import pytest

from evaluation.report import ReportRow, collect_facts, markdown_table, text_table, write_report

ROWS = [
    ReportRow("chance", "-", {"recall@10": 0.0272, "mrr": 0.5}),
    ReportRow("a|b", "both", {"recall@10": 0.12345, "mrr": 0.5}, {"blank_notes": 2}),
]


def test_markdown_marks_the_best_of_each_column() -> None:
    assert markdown_table(ROWS).splitlines() == [
        "| system | modality | recall@10 | mrr |",
        "|:--|:--|--:|--:|",
        "| chance | - | 0.0272 | **0.5000** |",
        "| a\\|b | both | **0.1235** | **0.5000** |",
    ]


def test_text_is_aligned() -> None:
    assert text_table(ROWS).splitlines() == [
        "system  modality  recall@10      mrr",
        "-------------------------------------",
        "chance  -            0.0272   0.5000*",
        "a|b     both         0.1235*  0.5000*",
    ]


def test_bounds_are_never_the_best_and_may_lack_metrics() -> None:
    bound = ReportRow("best possible", "both", {"recall@10": 0.9}, is_bound=True)
    assert text_table([*ROWS, bound]).splitlines()[2:] == [
        "chance         -            0.0272   0.5000*",
        "a|b            both         0.1235*  0.5000*",
        "best possible  both         0.9000        -",
    ]


def test_rows_must_agree() -> None:
    with pytest.raises(ValueError, match="'other'.*same ks"):
        text_table([*ROWS, ReportRow("other", "-", {"mrr": 0.1, "recall@5": 0.1})])
    with pytest.raises(ValueError, match="rows is empty"):
        markdown_table([])


def test_write_report(tmp_path: Path) -> None:
    facts = collect_facts(queries=3)
    assert {"command", "commit", "time", "hardware", "versions", "queries"} == set(facts)
    assert facts["hardware"]["cores"] >= 1
    write_report(tmp_path / "new" / "folder", ROWS, facts)
    content = json.loads((tmp_path / "new" / "folder" / "report.json").read_text(encoding="utf-8"))
    assert content["facts"] == facts
    assert content["rows"][1] == {
        "system": "a|b",
        "modality": "both",
        "metrics": {"recall@10": 0.12345, "mrr": 0.5},
        "details": {"blank_notes": 2},
        "is_bound": False,
    }
    markdown = (tmp_path / "new" / "folder" / "report.md").read_text(encoding="utf-8")
    assert markdown_table(ROWS) in markdown
    assert "- queries: 3" in markdown
    assert facts["versions"]["torch"] in markdown
