"""Loaders accept what they promise, refuse the rest by name, and tables survive being written and moved."""

import shutil

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from modeling_notellm2.processing_notellm2 import read_image
from pairs.tables import load_notes, load_pairs, read_notes, related_indices, write_table


def write_lines(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_csv_notes_keep_ids_as_text_and_resolve_images(tmp_path):
    path = write_lines(
        tmp_path / "notes.csv",
        "note_id,title,topics,content,image,likes",
        '007,,"a, b","two\nlines",images/7.png,3',
        "8,Eight,,,,4",
    )
    notes = load_notes(path)
    assert notes[0] == {
        "note_id": "007",
        "title": "",
        "topics": "a, b",
        "content": "two\nlines",
        "image": str(tmp_path / "images" / "7.png"),
        "likes": 3,
    }
    assert notes[1]["image"] is None and notes[1]["topics"] == ""
    assert notes.column_names[:5] == ["note_id", "title", "topics", "content", "image"]


def test_missing_columns_become_empty_texts_and_null_images(tmp_path):
    notes = load_notes(write_lines(tmp_path / "notes.jsonl", '{"note_id": 1, "more": [1, 2]}', "", '{"note_id": "b"}'))
    assert notes[0] == {"note_id": "1", "title": "", "topics": "", "content": "", "image": None, "more": [1, 2]}
    assert notes.features["image"] == Value("string")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_topics_may_be_lists(tmp_path, suffix):
    table = {"note_id": ["a", "b", "c"], "topics": [["x", "y"], [], None]}
    write_table(Dataset.from_dict(table), tmp_path / f"notes{suffix}")
    notes = load_notes(tmp_path / f"notes{suffix}")
    assert notes["topics"][:] == [["x", "y"], [], []]
    assert notes.features["topics"] == List(Value("string"))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_written_notes_move_with_their_images(tmp_path, suffix):
    image = tmp_path / "old" / "images" / "a.png"
    image.parent.mkdir(parents=True)
    PILImage.new("RGB", (2, 2)).save(image)
    notes = Dataset.from_dict({"note_id": ["a", "b"], "title": ["", "1999-01-01"], "image": [str(image), None]})
    write_table(notes, tmp_path / "old" / "tables" / f"notes{suffix}")
    shutil.move(tmp_path / "old", tmp_path / "new")
    loaded = load_notes(tmp_path / "new" / "tables" / f"notes{suffix}", tmp_path / "new")
    assert loaded["image"][:] == [str(tmp_path / "new" / "images" / "a.png"), None]
    assert loaded["title"][:] == ["", "1999-01-01"]
    assert [file.name for file in (tmp_path / "new" / "tables").iterdir()] == [f"notes{suffix}"]


def test_image_features_stay(tmp_path):
    features = Features({"note_id": Value("int64"), "image": Image()})
    notes = Dataset.from_dict({"note_id": [5], "image": [PILImage.new("RGB", (3, 2), "red")]}, features=features)
    notes.save_to_disk(tmp_path / "saved")
    write_table(load_notes(tmp_path / "saved"), tmp_path / "notes.parquet")
    loaded = load_notes(tmp_path / "notes.parquet")
    assert loaded[0]["note_id"] == "5"
    image = read_image(loaded[0]["image"])
    assert image.size == (3, 2) and image.getpixel((0, 0)) == (255, 0, 0)


def test_read_notes_lets_bad_rows_stand(tmp_path):
    lines = ["note_id,title,image", "a,x,https://host/a.png", "a,,", ",z,b.png"]
    notes = read_notes(write_lines(tmp_path / "notes.csv", *lines))
    assert notes["note_id"][:] == ["a", "a", ""]
    assert notes["image"][:] == ["https://host/a.png", None, str(tmp_path / "b.png")]
    good = write_lines(tmp_path / "good.csv", "note_id,title,image", "a,x,a.png", "b,,")
    assert read_notes(good)[:] == load_notes(good)[:]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["note_id,title", "a,x", "a,y"], "rows 1 and 2: 'note_id' 'a' twice"),
        (["note_id,title", "a,x", ",y"], "row 2: 'note_id' is empty"),
        (["id,title", "a,x"], "no column 'note_id'"),
        (
            ["note_id,image", "a,https://host/a.png"],
            "row 1: 'image' 'https://host/a.png' is a URL, and nothing is fetched; download",
        ),
        (["note_id,title", "a,x,z"], "not a readable .csv table"),
    ],
)
def test_bad_notes_are_refused(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        load_notes(write_lines(tmp_path / "notes.csv", *lines))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"note_id": "a"}', "{"], "line 2: not JSON"),
        (["[1]"], "line 1: list found"),
        (['{"note_id": "a", "topics": "x"}', '{"note_id": "b", "topics": ["y"]}'], "column 'topics' mixes types"),
        (['{"note_id": "a", "title": {"en": "x"}}'], "column 'title' is struct.*make it text"),
        (['{"note_id": "a", "topics": [1]}'], "column 'topics' is list"),
    ],
)
def test_bad_json_lines_are_refused(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        load_notes(write_lines(tmp_path / "notes.jsonl", *lines))


def test_tables_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_notes(tmp_path / "notes.csv")
    with pytest.raises(ValueError, match=r"unknown kind of table '.xlsx'"):
        load_notes(write_lines(tmp_path / "notes.xlsx", "x"))
    with pytest.raises(ValueError, match=r"unknown kind of table '.xlsx'"):
        write_table(Dataset.from_dict({"note_id": ["a"]}), tmp_path / "notes.xlsx")


def test_a_failed_write_leaves_the_old_table(tmp_path):
    path = write_lines(tmp_path / "notes.csv", "note_id", "old")
    with pytest.raises(ValueError, match="column 'topics' .* cannot be written as CSV"):
        write_table(Dataset.from_dict({"note_id": ["a"], "topics": [["x"]]}), path)
    assert load_notes(path)["note_id"][:] == ["old"]
    assert [file.name for file in tmp_path.iterdir()] == ["notes.csv"]


def test_pairs_round_trip(tmp_path):
    pairs = Dataset.from_dict({"note_id": ["1"], "related_note_id": ["02"], "score": [0.1], "rank": [1]})
    for suffix in (".csv", ".jsonl", ".parquet", ".arrow"):
        write_table(pairs, tmp_path / f"pairs{suffix}")
        loaded = load_pairs(tmp_path / f"pairs{suffix}")
        assert loaded[:] == pairs[:]
        assert (loaded.features["score"], loaded.features["rank"]) == (Value("float64"), Value("int32"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,a,1,1", "row 1: 'related_note_id' is the note itself"),
        ("a,b,1,0", "row 1: 'rank' is below 1"),
        ("a,b,high,1", "column 'score' is not double"),
        ("a,b,1,", "row 1: 'rank' is empty"),
    ],
)
def test_bad_pairs_are_refused(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        load_pairs(write_lines(tmp_path / "pairs.csv", "note_id,related_note_id,score,rank", row))


@pytest.mark.parametrize(
    ("header", "missing"),
    [
        ("note_id,other", "no column 'related_note_id', only"),
        ("note,related_note_id", "no column 'note_id', only"),
        ("a,b", r"no column 'note_id' and no column 'related_note_id', only \['a', 'b'\]"),
    ],
)
def test_all_missing_columns_of_pairs_are_named_at_once(tmp_path, header, missing):
    with pytest.raises(ValueError, match=missing):
        load_pairs(write_lines(tmp_path / "pairs.csv", header, "x,y"))


def test_pairs_need_no_score_and_rank_in_the_order_of_their_rows(tmp_path):
    draw = np.random.default_rng(0)
    ids = [f"n{number}" for number in range(9)]
    rows = [(a, b) for a in ids for b in ids if a != b]
    rows = [rows[place] for place in draw.permutation(len(rows))[:40]]
    pairs = load_pairs(write_lines(tmp_path / "pairs.csv", "note_id,related_note_id", *map(",".join, rows)))
    assert pairs.column_names == ["note_id", "related_note_id", "score", "rank"]
    assert (pairs.features["score"], pairs.features["rank"]) == (Value("float64"), Value("int32"))
    assert pairs["score"][:] == [None] * 40
    expected = {note_id: [b for a, b in rows if a == note_id] for note_id in ids}
    assert all(expected[row["note_id"]][row["rank"] - 1] == row["related_note_id"] for row in pairs)
    related = related_indices(ids, pairs)
    assert {ids[row]: [ids[other] for other in others] for row, others in enumerate(related)} == expected
    backwards = load_pairs(write_lines(tmp_path / "back.csv", "note_id,related_note_id", *map(",".join, rows[::-1])))
    assert [list(others) for others in related_indices(ids, backwards)] == [list(others)[::-1] for others in related]
    write_table(pairs, tmp_path / "again.csv")
    assert load_pairs(tmp_path / "again.csv")[:] == pairs[:]
    assert len(load_pairs(write_lines(tmp_path / "none.csv", "note_id,related_note_id"))) == 0


def test_related_indices_are_in_rank_order():
    rows = [("b", "a", 2), ("b", "c", 1), ("a", "b", 1), ("b", "x", 3), ("x", "a", 1)]
    note_ids, related_ids, ranks = zip(*rows, strict=True)
    pairs = Dataset.from_dict(
        {"note_id": note_ids, "related_note_id": related_ids, "score": [1.0] * 5, "rank": list(ranks)}
    )
    related = related_indices(["a", "b", "c"], pairs, missing="drop")
    assert [indices.tolist() for indices in related] == [[1], [2, 0], []]
    assert all(indices.dtype == np.int64 for indices in related)
    with pytest.raises(ValueError, match=r"\('b', 'x'\) has a note outside the 3 notes given"):
        related_indices(["a", "b", "c"], pairs)
    with pytest.raises(ValueError, match="'a' twice"):
        related_indices(["a", "a"], pairs)
    assert related_indices([], pairs, missing="drop") == []
