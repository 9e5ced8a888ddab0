"""A table of notes that is read in parts is the one that is read whole."""

import random
from pathlib import Path

import pytest
from datasets import Dataset

import pairs.note_table
from pairs.files import to_arrow
from pairs.note_table import NoteTable
from pairs.tables import ANYWHERE, load_notes, write_table


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl", "folder"])
def test_it_gives_the_rows_of_load_notes(kind: str, world_folder: Path, tmp_path: Path):
    notes = load_notes(world_folder / "notes.jsonl").select(range(30))
    path = tmp_path / ("notes" if kind == "folder" else f"notes.{kind}")
    if kind == "folder":
        notes.save_to_disk(str(path))
    else:
        write_table(notes, path)
    expected, table = (
        to_arrow(load_notes(path, ANYWHERE)).select(["note_id", "title", "topics", "content", "image"]),
        None,
    )
    for start, stop in [(0, 30), (0, 0), (29, 30), *(sorted(random.Random(i).sample(range(31), 2)) for i in range(4))]:
        table = NoteTable(path, ANYWHERE)
        assert list(table.rows(start, stop)) == expected.slice(start, stop - start).to_pylist()
    assert table is not None and len(table) == 30 and Path(expected["image"][0].as_py()).is_file()
    assert table.fingerprint() == NoteTable(path).fingerprint()
    table.check_ids()


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["id", "title"], r"no column 'note_id', only \['id', 'title'\]"),
        (
            ["user_id", "note_id"],
            r"no column of \['title', 'topics', 'content', 'image'\], only \['user_id', 'note_id'\]",
        ),
        (["note_id", "image"], None),
    ],
)
def test_other_tables_are_refused_by_their_columns(kind: str, names: list[str], complaint: str | None, tmp_path: Path):
    path = tmp_path / f"table.{kind}"
    write_table(Dataset.from_dict({name: ["a", "b"] for name in names}), path)
    if complaint is None:  # control
        assert [note["note_id"] for note in NoteTable(path).rows(0, 2)] == ["a", "b"]
    else:
        with pytest.raises(ValueError, match=complaint):
            NoteTable(path)


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [(["a", "b", "a"], r"rows 1 and 3: 'note_id' 'a' twice"), (["a", None, "b"], r"row 2: 'note_id' is")],
)
def test_ids_name_one_note_each(ids: list[str | None], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pairs.note_table, "ROWS_AT_ONCE", 2)
    Dataset.from_dict({"note_id": ids, "title": ["one", "two", "three"]}).to_parquet(tmp_path / "notes.parquet")
    with pytest.raises(ValueError, match=complaint):
        NoteTable(tmp_path / "notes.parquet").check_ids()
