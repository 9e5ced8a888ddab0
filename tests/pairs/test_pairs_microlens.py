"""MicroLens becomes tables that the rest of the package reads, and what is missing from it is counted."""

import pytest
from datasets import Dataset
from PIL import Image

from pairs.microlens import COUNTS, load_microlens, main
from pairs.query import PairOptions
from pairs.split import SplitOptions, load_split, make_splits
from pairs.tables import load_notes

TITLES = """item,title
1,"Duck, fried # food"
2,Sea urchins
3,
4,Unviewed
2,Sea urchins again
"""
PAIRS = """user,item,timestamp
7,1,1669600000999
7,2,1669600001000
8,1,1669700000000
8,3,1669700000001
8,5,1669700000002
9,6,1669700000003
9,2,1669700000004
9,1,1669700000005
"""


@pytest.fixture
def files(tmp_path):
    """Covers of 1, 3, 5 and of an item that nobody knows; 2, 4 and 6 have none; 3, 5 and 6 have no title."""
    (tmp_path / "covers").mkdir()
    for item in (1, 3, 5, 99):
        Image.new("RGB", (4, 4), (item, 0, 0)).save(tmp_path / "covers" / f"{item}.jpg")
    (tmp_path / "titles.csv").write_text(TITLES, encoding="utf-8")
    (tmp_path / "pairs.csv").write_text(PAIRS, encoding="utf-8")
    return {name: tmp_path / (name if name == "covers" else f"{name}.csv") for name in ("pairs", "titles", "covers")}


def arguments(files, output):
    return [part for name, path in files.items() for part in (f"--{name}", str(path))] + ["--output", str(output)]


def test_written_tables_are_notes_and_views(tmp_path, files):
    main(arguments(files, tmp_path / "out"))
    notes, views = (
        load_notes(tmp_path / "out" / "notes.parquet", tmp_path),
        Dataset.from_parquet(str(tmp_path / "out" / "views.parquet")),
    )
    cover = {item: str(tmp_path / "covers" / f"{item}.jpg") for item in (1, 3, 5)}
    assert notes["note_id"][:] == ["1", "2", "3", "4", "5"]
    assert notes["title"][:] == ["Duck, fried # food", "Sea urchins", "", "Unviewed", ""]
    assert notes["image"][:] == [cover[1], None, cover[3], None, cover[5]]
    assert notes["topics"][:] == notes["content"][:] == [""] * 5
    assert list(zip(views["user_id"], views["note_id"], views["timestamp"], strict=True)) == [
        ("7", "1", 1669600000),
        ("7", "2", 1669600001),
        ("8", "1", 1669700000),
        ("8", "3", 1669700000),
        ("8", "5", 1669700000),
        ("9", "2", 1669700000),
        ("9", "1", 1669700000),
    ]


def test_what_is_missing_is_counted_and_printed(tmp_path, files, capsys):
    counts = load_microlens(**files).counts
    assert counts == {
        "repeated_titles": 1,
        "viewed_without_title": 3,
        "without_cover": 2,
        "dropped_items": 1,
        "dropped_by_max_notes": 0,
        "dropped_views": 1,
    }
    assert list(counts) == list(COUNTS)
    main(arguments(files, tmp_path / "out"))
    printed = capsys.readouterr().out
    assert all(f"{count} {COUNTS[name]}\n" in printed for name, count in counts.items())
    assert f"5 notes and 7 views by 3 users: {tmp_path / 'out'}\n" in printed


def test_max_notes_keeps_the_most_viewed(files):
    microlens = load_microlens(**files, max_notes=3)
    assert microlens.notes["note_id"][:] == ["1", "2", "3"]  # 3 and 5 have one view each
    assert set(microlens.views["note_id"]) == {"1", "2", "3"}
    assert (microlens.counts["dropped_by_max_notes"], microlens.counts["dropped_views"]) == (2, 2)
    with pytest.raises(ValueError, match="max_notes=0: give 1 or more"):
        load_microlens(**files, max_notes=0)


def test_titles_need_no_header_and_no_quotation_marks(files):
    expected = load_microlens(**files).notes[:]
    files["titles"].write_text("\ufeff" + TITLES.replace("item,title\n", "").replace('"', ""), encoding="utf-8")
    assert load_microlens(**files).notes[:] == expected


def test_splits_are_made_of_it(tmp_path, files):
    microlens = load_microlens(**files)
    options = PairOptions(window_days=100)
    make_splits(microlens.notes, microlens.views, options, SplitOptions(validation=0, test=0), tmp_path / "splits")
    train = load_split(tmp_path / "splits", "train")
    assert train.notes["image"][0] == str(tmp_path / "covers" / "1.jpg")
    pairs = set(zip(train.pairs["note_id"], train.pairs["related_note_id"], strict=True))
    assert {("1", "2"), ("2", "1"), ("1", "3")} <= pairs and ("1", "4") not in pairs


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("pairs", "userID,item,timestamp\n7,1,1669600000999\n", "no column 'user', only .* header user,item,timestamp"),
        ("pairs", "user,item,timestamp\n7,1,1669600000\n", "row 1: 'timestamp' 1669600000 is before 1973.*by 1000"),
        (
            "pairs",
            "user,item,timestamp\n7,1,2022-11-28\n",
            "column 'timestamp' is .*; MicroLens gives whole milliseconds",
        ),
        ("pairs", "user,item,timestamp\n7,,1669600000999\n", "row 1: 'item' is empty"),
        ("titles", "item,title\n1,a\nx,b\n", "row 2: 'x' is no item number with a title"),
        ("titles", "item,title\n1\n", "row 1: '1' is no item number with a title"),
        ("titles", 'item,title\n1,"' + "a" * 200_000, "field larger than .*is a quotation mark missing"),
        ("titles", "item,title\n", "holds no cover such as 6.jpg"),
    ],
)
def test_other_files_are_refused(files, name, text, message):
    if "cover such as" in message:
        files["pairs"].write_text("user,item,timestamp\n9,6,1669700000003\n", encoding="utf-8")
    files[name].write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_microlens(**files)


@pytest.mark.parametrize("name", ["pairs", "titles", "covers"])
def test_missing_files_end_the_command(tmp_path, files, name, capsys):
    files[name] = tmp_path / f"no-{name}.csv"
    with pytest.raises(SystemExit) as stopped:
        main(arguments(files, tmp_path / "out"))
    assert stopped.value.code == 2
    assert "no such f" in capsys.readouterr().err
