"""No note is in two splits, no pair crosses the cut, and a split depends on ids and seed alone."""

import json
import random

import pytest
from datasets import Dataset

from pairs.build import PairOptions, build_pairs
from pairs.split import SPLITS, load_split, main, make_splits, split_notes
from pairs.tables import write_table

OPTIONS = PairOptions(score="cosine", top_k=5)


@pytest.fixture
def notes():
    return Dataset.from_dict({"note_id": [f"n{i}" for i in range(60)], "title": [f"Note {i}" for i in range(60)]})


@pytest.fixture
def views():
    rng = random.Random(0)
    rows = [(f"u{rng.randrange(30)}", f"n{rng.randrange(65)}", rng.randrange(10**6)) for _ in range(900)]
    return Dataset.from_dict(
        {name: [row[i] for row in rows] for i, name in enumerate(("user_id", "note_id", "timestamp"))}
    )


def test_notes_are_shared_out_exactly():
    note_ids = [f"n{i}" for i in range(103)]
    parts = split_notes(note_ids, 0.1, 0.25, seed=3)
    assert {name: len(ids) for name, ids in parts.items()} == {"train": 67, "validation": 10, "test": 26}
    assert sorted(sum(parts.values(), [])) == sorted(note_ids)


def test_split_depends_on_ids_and_seed_alone():
    note_ids = [f"n{i}" for i in range(200)]
    parts = split_notes(note_ids, 0.1, 0.2, seed=0)
    assert split_notes(random.Random(0).sample(note_ids, 200), 0.1, 0.2, seed=0) == parts
    assert split_notes(note_ids, 0.1, 0.2, seed=1) != parts
    more = split_notes([*note_ids, "another"], 0.1, 0.2, seed=0)
    assert len(set(more["test"]) ^ set(parts["test"])) <= 2


@pytest.mark.parametrize(
    ("note_ids", "validation", "test", "message"),
    [
        (["a", "a"], 0.1, 0.1, "twice"),
        (["a", "b"], -0.1, 0.1, "validation=-0.1"),
        (["a", "b"], 0.1, 1.0, "test=1.0"),
        (["a", "b"], 0.5, 0.5, "nothing of 2 notes is left to train on"),
    ],
)
def test_bad_shares_are_refused(note_ids, validation, test, message):
    with pytest.raises(ValueError, match=message):
        split_notes(note_ids, validation, test, seed=0)


def test_notes_side_by_side_may_be_a_split(tmp_path, notes, views):
    make_splits(notes, views, OPTIONS, validation=0, test=0, seed=0, output_dir=tmp_path)
    assert load_split(tmp_path, "train").notes["note_id"][:] == notes["note_id"][:]
    assert len(load_split(tmp_path, "test").notes) == 0


def test_nothing_leaks(tmp_path, notes, views):
    make_splits(notes, views, OPTIONS, validation=0.2, test=0.3, seed=0, output_dir=tmp_path)
    record = json.loads((tmp_path / "splits.json").read_text())
    seen: set[str] = set()
    for name in SPLITS:
        split = load_split(tmp_path, name)
        note_ids = set(split.notes["note_id"])
        assert not note_ids & seen
        seen |= note_ids
        assert len(split.pairs)
        assert set(split.pairs["note_id"]) | set(split.pairs["related_note_id"]) <= note_ids
        expected = build_pairs(views, OPTIONS, note_ids)
        assert split.pairs[:] == expected[:]
        assert record["counts"][name] == {
            "notes": len(note_ids),
            "notes_with_pairs": len(set(expected["note_id"])),
            "pairs": len(expected),
        }
    assert seen == set(notes["note_id"])
    # Negative control: without a split most pairs do cross the cut, and they are counted.
    unsplit = build_pairs(views, OPTIONS, seen)
    split_of = {note_id: name for name in SPLITS for note_id in load_split(tmp_path, name).notes["note_id"]}
    crossing = [
        a for a, b in zip(unsplit["note_id"], unsplit["related_note_id"], strict=True) if split_of[a] != split_of[b]
    ]
    assert record["pairs_across_splits"] == len(crossing) > len(unsplit) / 3


def test_splits_keep_rows_whole_and_in_order(tmp_path, notes, views):
    make_splits(notes, views, OPTIONS, validation=0.2, test=0.3, seed=0, output_dir=tmp_path)
    for name in SPLITS:
        split_notes_table = load_split(tmp_path, name).notes
        positions = [int(note_id[1:]) for note_id in split_notes_table["note_id"]]
        assert positions == sorted(positions)
        assert split_notes_table["title"][:] == [f"Note {position}" for position in positions]


def test_command(tmp_path, notes, views, capsys):
    write_table(notes, tmp_path / "notes.csv")
    write_table(views, tmp_path / "views.csv")
    arguments = ["--notes", str(tmp_path / "notes.csv"), "--views", str(tmp_path / "views.csv")]
    main([*arguments, "--output", str(tmp_path / "out"), "--validation", "0", "--score", "cosine", "--top-k", "5"])
    assert len(load_split(tmp_path / "out", "validation").notes) == 0
    record = json.loads((tmp_path / "out" / "splits.json").read_text())
    assert PairOptions(**record["pair_options"]) == OPTIONS
    assert "pairs cross the cut" in capsys.readouterr().out
    with pytest.raises(ValueError, match="name='dev'"):
        load_split(tmp_path / "out", "dev")
    with pytest.raises(FileNotFoundError, match="no splits.json"):
        load_split(tmp_path / "nowhere", "test")
