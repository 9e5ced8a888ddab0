"""The report: the best of each column marked, hostile text harmless, and the facts that make a figure repeatable."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from jinja2 import UndefinedError
from matplotlib.figure import Figure as Plot
from PIL import Image

from evaluation.report import (
    AtMost,
    Figure,
    Percent,
    ReportRow,
    Section,
    Table,
    collect_facts,
    cost_table,
    html_environment,
    markdown_table,
    table_markdown,
    text_table,
    write_report,
)
from evaluation.sheet import Answer, SheetQuery

ROWS = [
    ReportRow("chance", "-", {"recall@10": 0.0272, "mrr": 0.5}),
    ReportRow("a|b", "both", {"recall@10": 0.12345, "mrr": 0.5}, {"blank_notes": 2}),
]
HOSTILE = '<script>alert("it\'s")</script> & [x](javascript:y) *b* `c` | d\ne'
VOID = {"meta", "img", "image", "use"}


class Page(HTMLParser):
    """The tags of a page with their attributes, its text, and a check that tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def written_page(folder: Path, sections: list[Section], rows: list[ReportRow] = ROWS) -> Page:
    write_report(folder, rows, collect_facts(notes=3, queries=2), sections)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (20, 10), colour)


def sheet() -> list[SheetQuery]:
    red, blue = {"note_id": "r", "title": HOSTILE, "image": picture("red")}, {"note_id": "b", "image": picture("blue")}
    copy = {"note_id": "c", "title": "a red copy", "topics": ["one", "two"], "image": picture("red")}
    bare, broken = {"note_id": "x", "content": "words"}, {"note_id": "y", "title": "y", "image": "nowhere.jpg"}
    answers = {
        "bm25": [Answer(blue, 3.25, True), Answer(copy, 2.0, False), Answer(bare, 1.0, False)],
        HOSTILE: [Answer(blue, 0.5, True), Answer(broken, float("-inf"), True)],
    }
    missed = {"bm25": [Answer(red, -0.1, False, is_known=True)]}
    return [SheetQuery(red, 5, answers, [blue, bare]), SheetQuery(blue, 1, missed, num_known=2)]


def test_markdown_marks_the_best_of_each_column() -> None:
    assert markdown_table(ROWS).splitlines() == [
        "| system | modality | recall@10 | mrr |",
        "|:--|:--|--:|--:|",
        "| chance | - | 0.0272 | 0.5000 |",
        "| a\\|b | both | **0.1235** | 0.5000 |",
    ]


@pytest.mark.parametrize(("values", "best"), [((0.5, 0.5), 0), ((0.0, 0.0), 0), ((0.5, 0.4), 1), ((0.5, 0.5, 0.4), 2)])
def test_where_none_is_best_none_is_marked(tmp_path: Path, values: tuple[float, ...], best: int) -> None:
    rows = [ReportRow(f"s{number}", "-", {"mrr": value}) for number, value in enumerate(values)]
    rows.append(ReportRow("bound", "-", {"mrr": 0.9}, is_bound=True))  # that it is higher makes nothing the best
    assert markdown_table(rows).count("**") == 2 * best
    assert text_table(rows).count("*") == best + (best > 0)
    table = Table(["system", "mrr"], [[row.system, row.metrics["mrr"]] for row in rows[:-1]], best_of=["mrr"])
    assert table_markdown(table).count("**") == 2 * best
    page = written_page(tmp_path, [Section("Again", tables=[table])], rows)
    assert len(page.all("strong")) == 2 * best
    assert ("The best system" in page.text) is (best > 0)


def test_numbers_have_one_minus_sign_and_shares_do_not_break() -> None:
    cells = [
        -0.25,
        np.int64(-3),
        Percent(-0.8056),
        Percent(0.0),
        AtMost(0.0009995),
        -0.00001,
        float("nan"),
        Percent("nan"),
    ]
    table = Table(["name", *"abcdefgh"], [["x", *cells]])
    expected = "| x | −0.2500 | −3 | −80.6\u00a0% | +0.0\u00a0% | ≤\u00a00.0010 | 0.0000 | - | - |"
    assert table_markdown(table).splitlines()[1:] == ["|:--|--:|--:|--:|--:|--:|--:|:--|:--|", expected]


def test_text_is_aligned() -> None:
    assert text_table(ROWS).splitlines() == [
        "system  modality  recall@10      mrr",
        "-------------------------------------",
        "chance  -            0.0272   0.5000",
        "a|b     both         0.1235*  0.5000",
        "* best of the column",
    ]


def test_expectations_are_never_the_best_and_may_lack_metrics(tmp_path: Path) -> None:
    bound = ReportRow("best possible", "both", {"recall@10": 0.9}, is_bound=True)
    page = written_page(tmp_path, [], [*ROWS, bound, bound])
    assert "best possible: computed as an expectation, no system and no bound; on few queries luck" in page.text
    assert page.text.count("expected") == 2 and "computed" not in written_page(tmp_path, []).text
    assert text_table([*ROWS, bound]).splitlines()[2:] == [
        "chance         -            0.0272   0.5000",
        "a|b            both         0.1235*  0.5000",
        "best possible  both         0.9000        -",
        "* best of the column",
    ]


def test_rows_must_agree() -> None:
    with pytest.raises(ValueError, match="'other'.*same ks"):
        text_table([*ROWS, ReportRow("other", "-", {"mrr": 0.1, "recall@5": 0.1})])
    with pytest.raises(ValueError, match="rows is empty"):
        markdown_table([])
    with pytest.raises(ValueError, match="'one'.*intervals of.*'ndcg@10'"):
        markdown_table([ReportRow("one", "-", {"mrr": 0.1}, intervals={"ndcg@10": (0.0, 0.2)})])


def test_intervals_stand_beside_their_values(tmp_path: Path) -> None:
    row = ReportRow("one", "text", {"mrr": 0.25, "recall@10": 0.5}, intervals={"mrr": (0.2, 0.31)})
    assert markdown_table([row]).splitlines()[2] == "| one | text | 0.2500 (0.2000, 0.3100) | 0.5000 |"
    assert "0.3100" not in text_table([row])
    page = written_page(tmp_path, [], [row])
    assert len(page.all("small")) == 1 and "0.2000, 0.3100" in page.text
    assert "bootstrap" in page.text and "bootstrap" not in written_page(tmp_path, []).text
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["intervals"] == {}


def test_what_a_row_costs_has_a_table_of_its_own(tmp_path: Path) -> None:
    cost = {"made_of": "LLM org/a|b, tower c", "dimensions": 64, "parameters": 134_515_008}
    cost |= {"cpu_seconds": 12.345, "notes": 37}
    rows = [
        ReportRow("one", "both", {"mrr": 0.25}, cost={**cost, "left_out": "images and the tower"}),
        ReportRow("one", "text", {"mrr": 0.2}, cost=cost),
        ReportRow("bm25", "text", {"mrr": 0.1}, cost={"made_of": "words", "cpu_seconds": 0.0123, "notes": 37}),
        ReportRow("cf", "-", {"mrr": 0.1}, cost={"made_of": "views", "cpu_seconds": 0.0009, "notes": 37}),
        ReportRow("bound", "both", {"mrr": 1.0}, is_bound=True),
    ]
    page = written_page(tmp_path, [], rows)
    expected = [
        "| system | modality | dimensions | million parameters | seconds | made of |",
        "|:--|:--|--:|--:|--:|:--|",
        "| one | both | 64 | 135 | 12.3 without images and the tower | LLM org/a\\|b, tower c |",
        "| one | text | 64 | 135 | 12.3 | LLM org/a\\|b, tower c |",
        "| bm25 | text | - | - | 0.0123 | words |",
        "| cf | - | - | - | \\<0.001 | views |",
    ]
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "**What each system is and costs**\n\n" + "\n".join(expected) + "\n\nDimensions: " in markdown
    assert len(page.all("tr")) == 6 + 5 and "12.3 without images and the tower" in page.text
    assert "Seconds: of this process on all processors" in page.text and "by the clock" not in page.text
    assert "to encode all 37 notes, queries and pool" in page.text and "shares" not in page.text
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["rows"]
    assert written[1]["cost"] == cost and written[4]["cost"] == {}
    assert cost_table(ROWS) is None and "costs" not in written_page(tmp_path, []).text


def test_seconds_say_their_clock_and_what_was_shared() -> None:
    cost = {"made_of": "tower c", "seconds": 2.0, "notes": 9}
    rows = [
        ReportRow("frozen-image", "image", {"mrr": 0.1}, cost=cost),
        ReportRow("head-image", "image", {"mrr": 0.1}, cost={**cost, "shared_with": ["frozen-image"]}),
    ]
    table = cost_table(rows)
    assert table is not None and "Seconds: by the clock, with a GPU" in table.note
    assert table.note.count("was not encoded again") == 1
    assert "head-image was not encoded again: it shares what frozen-image measured" in table.note
    untimed = cost_table([ReportRow("chance", "-", {"mrr": 0.1}, cost={"made_of": "a random order"})])
    assert untimed is not None and "Seconds" not in untimed.note


def test_what_is_not_finite_is_missing(tmp_path: Path) -> None:
    rows = [
        ReportRow("nan", "-", {"mrr": float("nan")}, {"inf": [np.inf]}, intervals={"mrr": (float("nan"), np.nan)}),
        ReportRow("one", "-", {"mrr": 0.25}),
        ReportRow("two", "-", {"mrr": 0.2}),
    ]
    page = written_page(tmp_path, [Section("More", tables=[Table(["a", "b"], [["x", float("-inf")]])])], rows)
    assert markdown_table(rows).splitlines()[2:] == [
        "| nan | - | - (-, -) |",
        "| one | - | **0.2500** |",
        "| two | - | 0.2000 |",
    ]
    assert "nan%" not in (tmp_path / "report.html").read_text(encoding="utf-8") and "inf" not in page.text

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    read = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert read["rows"][0]["metrics"] == {"mrr": None} and read["rows"][0]["details"] == {"inf": [None]}
    assert read["rows"][1]["metrics"] == {"mrr": 0.25} and read["sections"][0]["tables"][0]["rows"] == [["x", None]]


def test_templates_escape_and_miss_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text("<p>{{ given }}</p>")
    template = html_environment(tmp_path).get_template("a.jinja")
    assert template.render(given="<b>") == "<p>&lt;b&gt;</p>"
    with pytest.raises(UndefinedError, match="'given' is undefined"):
        template.render()


def test_write_report(tmp_path: Path) -> None:
    facts = collect_facts(queries=3)
    assert {"command", "commit", "time", "hardware", "versions", "queries"} == set(facts)
    assert facts["hardware"]["cores"] >= 1 and facts["hardware"]["load"] >= 0
    write_report(tmp_path / "new" / "folder", ROWS, facts)
    content = json.loads((tmp_path / "new" / "folder" / "report.json").read_text(encoding="utf-8"))
    assert content["facts"] == facts
    assert content["sections"] == []
    assert content["rows"][1] == {
        "system": "a|b",
        "modality": "both",
        "metrics": {"recall@10": 0.12345, "mrr": 0.5},
        "details": {"blank_notes": 2},
        "is_bound": False,
        "intervals": {},
        "cost": {},
    }
    markdown = (tmp_path / "new" / "folder" / "report.md").read_text(encoding="utf-8")
    assert markdown_table(ROWS) in markdown
    assert "- queries: 3" in markdown
    assert facts["versions"]["torch"] in markdown
    page = Page((tmp_path / "new" / "folder" / "report.html").read_text(encoding="utf-8"))
    assert len(page.all("tr")) == 3
    assert len(page.all("strong")) == 1
    assert facts["command"] in page.text and facts["versions"]["torch"] in page.text


def test_tables_of_sections(tmp_path: Path) -> None:
    rows = [
        ["short", 12, np.float32(0.25), None],
        ["long_name", np.int64(7), 0.125, float("nan")],
        ["-", 3, 0.1, "n|a"],
    ]
    table = Table(["slice", "queries", "recall@10", "p"], rows, "By length", "p: a paired test", best_of=["recall@10"])
    page = written_page(tmp_path, [Section("Slices", ["What_is_ *this*?"], tables=[table])])
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (
        "## Slices\n\nWhat_is\\_ \\*this\\*?\n\n**By length**\n\n"
        "| slice | queries | recall@10 | p |\n|:--|--:|--:|:--|\n"
        "| short | 12 | **0.2500** | - |\n| long_name | 7 | 0.1250 | - |\n| - | 3 | 0.1000 | n\\|a |\n\n"
        "p: a paired test\n"
    ) in markdown
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len([div for div in page.all("div") if div.get("class") == "scroll"]) == 2  # one a table
    assert "var(--shade), transparent) right" in html  # that a wide one goes on is seen
    assert len(page.all("caption")) == 1 and "By length" in page.text and "What_is_ *this*?" in page.text
    assert len(page.all("strong")) == 1 + 1
    assert sum(attributes.get("scope") == "row" for attributes in page.all("th")) == 2 + 3
    section = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["sections"][0]
    expected_rows = [["short", 12, 0.25, None], ["long_name", 7, 0.125, None], ["-", 3, 0.1, "n|a"]]
    assert section["tables"] == [
        {"caption": "By length", "columns": table.columns, "rows": expected_rows, "note": "p: a paired test"}
    ]
    # Nothing is marked unless asked for.
    assert len(written_page(tmp_path, [Section("Slices", tables=[Table(table.columns, rows)])]).all("strong")) == 1


def test_tables_are_checked() -> None:
    with pytest.raises(ValueError, match=r"rows\[1\].*1 cells, expected 2"):
        Table(["a", "b"], [["x", 1.0], ["y"]])
    with pytest.raises(ValueError, match="best_of names.*'c'"):
        Table(["a", "b"], [], best_of=["c"])


def test_figures(tmp_path: Path) -> None:
    plot = Plot(figsize=(2, 1))
    plot.subplots().plot([1, 2], [0.1, 0.2])
    figures = [Figure.from_matplotlib(plot, "Recall by K", 'It "rises"'), Figure(png_bytes(), "A square", "A square")]
    page = written_page(tmp_path, [Section("Curves", figures=figures)])
    assert [image["alt"] for image in page.all("img")] == ['It "rises"', "A square"]
    assert len(page.all("figcaption")) == 2
    assert Image.open(tmp_path / "figures" / "figure-1.png").size == (384, 192)
    assert (tmp_path / "figures" / "figure-2.png").read_bytes() == png_bytes()
    assert "![A square](figures/figure-2.png)" in (tmp_path / "report.md").read_text(encoding="utf-8")
    section = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["sections"][0]
    assert section["figures"][0] == {"file": "figures/figure-1.png", "caption": "Recall by K", "alt": 'It "rises"'}
    with pytest.raises(ValueError, match="png starts with b'GIF'"):
        Figure(b"GIF", "a", "b")
    with pytest.raises(ValueError, match="alt is empty"):
        Figure(png_bytes(), "a", " ")


def png_bytes() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, format="PNG")
    return file.getvalue()


def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path) -> None:
    table = Table([HOSTILE, "b"], [[HOSTILE, 1.0]], HOSTILE, HOSTILE)
    sections = [Section(HOSTILE, [HOSTILE], [table], [Figure(png_bytes(), HOSTILE, HOSTILE)], sheet())]
    page = written_page(tmp_path, sections, [ReportRow(HOSTILE, "both", {"mrr": 0.1})])
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.all("img")[0]["alt"] == HOSTILE  # whole, so no quote ended the attribute
    assert page.text.count('<script>alert("it\'s")</script> &') >= 8
    attributes = {name for _, attributes in page.tags for name in attributes}
    assert not {name for name in attributes if name.startswith("on")}
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    shown = '\\<script\\>alert("it\'s")\\</script\\> \\& \\[x\\](javascript:y) \\*b\\* \\`c\\` \\| d e'
    assert shown in markdown and not re.search(r"(?<!\\)<script|(?<!\\)\[x", markdown)


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    page = written_page(tmp_path, [Section("Sheet", figures=[Figure(png_bytes(), "a", "b")], sheet=sheet())])
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http://" not in html and "https://" not in html and "url(" not in html and "@import" not in html
    links = [value for _, tag in page.tags for name, value in tag.items() if name in ("href", "src", "srcset")]
    assert len(links) > 10 and all(value and re.match(r"#|data:image/(png|jpeg);base64,", value) for value in links)
    policy = page.all("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy" and str(policy["content"]).startswith("default-src 'none'")
    # Every link within the page leads somewhere.
    ids = [tag["id"] for _, tag in page.tags if "id" in tag]
    assert len(set(ids)) == len(ids) and {value[1:] for value in links if value and value[0] == "#"} <= set(ids)


def test_sheet(tmp_path: Path) -> None:
    page = written_page(tmp_path, [Section("Sheet", sheet=sheet())])
    assert len(page.all("article")) == 2
    classes = [attributes.get("class") for attributes in page.all("li")]
    assert [classes.count(name) for name in ("related", "unrelated", "known")] == [3, 2, 1]
    signs = [page.text.count(sign) for sign in ("✓", "✗", "(✓)")]
    assert signs == [4 + 2, 2 + 1, 1 + 1]  # and once each in the legend
    said = ["\nrelated, similarity", "\nnot related, similarity", "\nrelated, not asked for, similarity"]
    assert [page.text.count(words) for words in said] == [3, 2, 1]
    assert {"3.250", "2.000", "0.500", "−0.100", "5 related notes", "1 related note asked for, of 3", "one, two"} <= {
        line.strip() for line in page.text.splitlines()
    }
    assert (
        "1 of its first 3 answers is related\n" in page.text and "2 of its first 2 answers are related\n" in page.text
    )
    assert "0 of its first 1 answers are related, 1 more not asked for" in page.text
    # Two pictures, red and blue: each once, though blue is shown four times, and red is of two notes.
    assert len(page.all("symbol")) == len(page.all("image")) == 2
    used = [attributes["href"] for attributes in page.all("use")]
    assert used.count("#picture-0") == 3 and used.count("#picture-1") == 4
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.all("svg"))
    assert page.text.count("no picture") == 3  # bare, twice, and broken

    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "[report.html](report.html#section-1)" in markdown
    assert "- bm25: ✓ b 3.250; ✗ a red copy 2.000; ✗ words 1.000\n" in markdown
    assert "(5 related notes)\n" in markdown and "(1 related note asked for, of 3)\n\n- bm25: (✓) " in markdown
    assert "but not asked for; ✗" in markdown
    written_page(tmp_path / "all", [Section("Sheet", sheet=sheet()[:1])])
    assert "asked" not in (tmp_path / "all" / "report.md").read_text(encoding="utf-8")  # of one kind nothing is said
    shown = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["sections"][0]["sheet"][0]
    assert shown["note_id"] == "r" and shown["num_related"] == 5
    assert shown["answers"]["bm25"][0] == {"note_id": "b", "score": 3.25, "is_related": True, "is_known": False}
    assert shown["answers"][HOSTILE][1] == {"note_id": "y", "score": None, "is_related": True, "is_known": False}


def test_half_a_character_is_written(tmp_path: Path) -> None:
    written_page(tmp_path, [Section("Half \ud83d")])
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["sections"][0]["title"] == "Half \ud83d"


def test_facts_must_be_json(tmp_path: Path) -> None:
    write_report(tmp_path, ROWS, {"loss": np.float32(0.5)})
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["facts"] == {"loss": 0.5}
    with pytest.raises(TypeError, match="set.*is not JSON"):
        write_report(tmp_path, ROWS, {"loss": {1}})
