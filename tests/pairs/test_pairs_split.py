"""Training sees nothing of what is tested, by note, by time or by both; what crosses the cut is counted."""

import json
import random
from collections import defaultdict
from dataclasses import replace

import pyarrow as pa
import pytest
from datasets import Dataset

from pairs.build import build_pairs
from pairs.query import SECONDS_PER_DAY, PairOptions
from pairs.split import SPLITS, SplitOptions, load_split, main, make_splits, split_notes
from pairs.subsets import load_subsets
from pairs.tables import load_notes, write_table

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
    make_splits(notes, views, OPTIONS, SplitOptions(validation=0, test=0), tmp_path)
    assert load_split(tmp_path, "train").notes["note_id"][:] == notes["note_id"][:]
    assert len(load_split(tmp_path, "test").notes) == 0


def test_nothing_leaks(tmp_path, notes, views):
    make_splits(notes, views, OPTIONS, SplitOptions(validation=0.2, test=0.3), tmp_path)
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
    make_splits(notes, views, OPTIONS, SplitOptions(validation=0.2, test=0.3), tmp_path)
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


def rows_of(pairs):
    return list(zip(pairs["note_id"], pairs["related_note_id"], strict=True))


def within(views, start, stop, note_ids=None):
    """The views of a period, and of some notes."""
    return views.filter(
        lambda view: start <= view["timestamp"] < stop and (note_ids is None or view["note_id"] in note_ids)
    )


DAYS = SplitOptions(by="time", validation_days=1.5, test_days=3)


def test_by_time_every_split_has_the_pairs_of_its_period(tmp_path, notes, views):
    views = within(views, 0, 10**6, set(notes["note_id"]))  # so that the activity of users is the same, too
    options = PairOptions(score="inverse_activity", window_days=2, top_k=5)
    make_splits(notes, views, options, DAYS, tmp_path)
    record = json.loads((tmp_path / "splits.json").read_text())
    end = max(views["timestamp"]) + 1
    test = end - 3 * SECONDS_PER_DAY
    cuts = [min(views["timestamp"]), test - int(1.5 * SECONDS_PER_DAY), test, end]
    assert record["periods"] == {name: list(cuts[i : i + 2]) for i, name in enumerate(SPLITS)}
    trained = set()
    counted = {}
    for i, name in enumerate(SPLITS):
        split = load_split(tmp_path, name)
        assert split.notes["note_id"][:] == notes["note_id"][:]
        every = build_pairs(within(views, *cuts[i : i + 2]), replace(options, top_k=10**6))
        counted[name] = set(rows_of(every))
        if name == "train":
            expected = rows_of(build_pairs(within(views, *cuts[:2]), options))
            trained = set(expected) | {(b, a) for a, b in expected}
        else:
            new = [pair for pair in rows_of(every) if pair not in trained]
            assert record["pairs_known_from_training"][name] == len(every) - len(new) > 0
            place = defaultdict(int)
            expected = []
            for a, b in new:
                place[a] += 1
                if place[a] <= options.top_k:
                    expected.append((a, b))
            assert not set(expected) & trained
        assert rows_of(split.pairs) == expected and expected
    unsplit = rows_of(build_pairs(views, options))
    across = [pair for pair in unsplit if not any(pair in inside for inside in counted.values())]
    assert record["pairs_across_splits"] == len(across) > 0
    # Negative control: the whole log has pairs that no period has.
    assert set(unsplit) - set.union(*counted.values())


def test_by_both_test_notes_are_new_and_so_are_the_days(tmp_path, notes, views):
    split = replace(DAYS, by="both", validation=0.2, test=0.4, validation_days=2, test_days=4)
    make_splits(notes, views, OPTIONS, split, tmp_path)
    record = json.loads((tmp_path / "splits.json").read_text())
    parts = split_notes(notes["note_id"], 0.2, 0.4, seed=0)
    known = within(views, 0, 10**6, set(notes["note_id"]))
    for name in SPLITS:
        loaded = load_split(tmp_path, name)
        assert set(loaded.notes["note_id"]) == set(parts[name])
        expected = build_pairs(within(known, *record["periods"][name]), OPTIONS, parts[name])
        assert loaded.pairs[:] == expected[:] and len(expected)
        assert loaded.pairs[:] != build_pairs(known, OPTIONS, parts[name])[:]  # the days matter
    assert "pairs_known_from_training" not in record


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "user"}, "by='user'"),
        ({"test": 1.5}, "test=1.5"),
        ({"by": "time", "test_days": -1}, "test_days=-1"),
        ({"by": "time", "test_days": 30}, "validation_days=3.0, test_days=30: nothing is left .* of the 11.5. days"),
    ],
)
def test_bad_splits_are_refused(tmp_path, notes, views, options, message):
    with pytest.raises(ValueError, match=message):
        make_splits(notes, views, OPTIONS, SplitOptions(**options), tmp_path)


def test_subsets_lie_beside_the_pairs(tmp_path, notes, views):
    make_splits(notes, views, OPTIONS, replace(DAYS, test_days=1), tmp_path)
    split, subsets = load_split(tmp_path, "test"), load_subsets(tmp_path, "test")
    assert rows_of(subsets) == rows_of(split.pairs)
    assert {"head", "torso", "tail"} <= set(subsets["query_popularity"])
    assert not (tmp_path / "train" / "subsets.parquet").exists()


def test_notes_stay_on_disk(tmp_path):
    """A table of notes far larger than what reading it may take: its pages are read when a row is asked for."""
    count, size = 2000, 50_000
    table = Dataset.from_dict({"note_id": [f"n{i}" for i in range(count)], "content": ["x" * size] * count})
    write_table(table, tmp_path / "notes.arrow")
    del table
    before = pa.total_allocated_bytes()
    notes = load_notes(tmp_path / "notes.arrow")
    assert len(notes[1234]["content"]) == size
    assert pa.total_allocated_bytes() - before < count * size / 20
    write_table(notes, tmp_path / "notes.parquet")
    in_memory = load_notes(tmp_path / "notes.parquet")
    assert pa.total_allocated_bytes() - before > count * size / 2  # the measure sees what is in memory
    assert in_memory[7] == notes[7]


def test_views_that_count_nowhere_are_said(tmp_path, notes, views, capsys):
    write_table(notes, tmp_path / "notes.csv")
    write_table(views, tmp_path / "views.csv")
    arguments = ["--notes", str(tmp_path / "notes.csv"), "--views", str(tmp_path / "views.csv")]
    main([*arguments, "--output", str(tmp_path / "out"), "--by", "time", "--test-days", "2", "--validation-days", "1"])
    unknown = sum(int(note_id[1:]) >= 60 for note_id in views["note_id"])
    printed = capsys.readouterr().out
    assert f"{unknown} dropped by unknown_note" in printed and "are known from training and left out" in printed
    record = json.loads((tmp_path / "out" / "splits.json").read_text())
    assert record["views"]["broken_rules"]["unknown_note"] == unknown > 0
    with pytest.raises(SystemExit):
        main([*arguments, "--output", str(tmp_path / "strict"), "--strict"])
    assert "unknown_note" in capsys.readouterr().err and not (tmp_path / "strict" / "splits.json").exists()
