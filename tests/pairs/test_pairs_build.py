"""Pairs by hand: ties, the window's edges, what counts; and the command from files to files."""

import random

import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Value

from pairs.build import build_pairs, main
from pairs.engines import connect
from pairs.query import PairOptions
from pairs.tables import load_pairs, write_table
from pairs.views import RULES, ViewOptions
from tests.pairs.reference import as_rows, as_views, random_views, reference_pairs


@pytest.fixture(scope="module")
def engine():
    with connect(memory_gb=1) as opened:
        yield opened


def test_order_of_the_views_does_not_matter(engine):
    rows = random_views(0)
    expected = as_rows(build_pairs(as_views(rows), PairOptions(score="swing"), engine=engine))
    random.Random(1).shuffle(rows)
    assert as_rows(build_pairs(as_views(rows), PairOptions(score="swing"), engine=engine)) == expected


def test_ties_are_broken_by_count_then_id(engine):
    # cosine(a, b) = 1 / sqrt(4 * 1), cosine(a, c) = 2 / sqrt(4 * 4), cosine(a, d) = 1 / sqrt(4 * 1): all one half
    liked = {"d": "2", "b": "1", "c": "3456", "a": "1234"}
    rows = [(user, note, 0) for note, users in liked.items() for user in users]
    pairs = as_rows(build_pairs(as_views(rows), PairOptions(score="cosine"), engine=engine))
    assert [row for row in pairs if row[0] == "a"] == [("a", "c", 0.5, 1), ("a", "b", 0.5, 2), ("a", "d", 0.5, 3)]


@pytest.mark.parametrize(("gap", "found"), [(0, "ab ba"), (1, "ab"), (86_400, "ab"), (86_401, ""), (-1, "ba")])
def test_window_edges_and_direction(engine, gap, found):
    views = as_views([("u", "a", 10**9), ("u", "b", 10**9 + gap)])
    forward = build_pairs(views, PairOptions(window_days=1, direction="forward"), engine=engine)
    assert " ".join(a + b for a, b, _, _ in as_rows(forward)) == found
    both = build_pairs(views, PairOptions(window_days=1, direction="both"), engine=engine)
    assert " ".join(a + b for a, b, _, _ in as_rows(both)) == ("ab ba" if found else "")


def test_a_user_counts_once_and_users_do_not_mix(engine):
    rows = [("u", "a", 0), ("u", "b", 1), ("u", "a", 2), ("u", "b", 3), ("v", "a", 0), ("w", "b", 0)]
    assert as_rows(build_pairs(as_views(rows), PairOptions(), engine=engine)) == [
        ("a", "b", 1.0, 1),
        ("b", "a", 1.0, 1),
    ]


def test_scores_by_hand(engine):
    # u and v saw (a, b); they viewed 2 and 3 notes and have 2 in common, of 3 users; w viewed a alone.
    rows = [("u", "a", 0), ("u", "b", 0), ("v", "a", 0), ("v", "b", 0), ("v", "c", 9**9), ("w", "a", 0)]
    exact = {
        "count": 2.0,
        "inverse_activity": 1 / 2 + 1 / 3,
        "cosine": 2 / 6**0.5,
        "lift": 2 * 3 / (3 * 2),
        "swing": 1 / (6**0.5 * 3),
    }
    for score, expected in exact.items():
        pairs = as_rows(build_pairs(as_views(rows), PairOptions(score=score), engine=engine))
        assert pairs == [(a, b, pytest.approx(expected, abs=2**-31), 1) for a, b in ("ab", "ba")]


def test_a_note_is_related_to_those_where_it_scores_best(engine):
    # a is seen with b by three, with c by two, with d by two: of b, c, d it stays related to b, then to c
    rows = [(f"{other}{user}", note, 0) for other, users in (("b", 3), ("c", 2), ("d", 2)) for user in range(users)
            for note in ("a", other)]  # fmt: skip
    pairs = as_rows(build_pairs(as_views(rows), PairOptions(max_as_related=2), engine=engine))
    assert [note for note, related, _, _ in pairs if related == "a"] == ["b", "c"]
    assert [related for note, related, _, _ in pairs if note == "a"] == ["b", "c", "d"]


def test_top_k_is_chosen_among_the_notes_given_but_views_of_all_count(engine):
    rows = [("u", "a", 0), ("u", "b", 0), ("u", "c", 0), ("v", "a", 0), ("v", "b", 0), ("w", "c", 9**9)]
    options = PairOptions(score="cosine", top_k=1)
    pairs = as_rows(build_pairs(as_views(rows), options, {"a", "c"}, engine=engine))
    assert pairs == [("a", "c", 0.5, 1), ("c", "a", 0.5, 1)]  # w's lonely view of c makes 1 / sqrt(2 * 2)


def test_no_pairs_are_an_empty_table(engine):
    pairs = build_pairs(as_views([("u", "a", 0)]), PairOptions(), engine=engine)
    assert len(pairs) == 0
    assert pairs.features == {
        "note_id": Value("string"),
        "related_note_id": Value("string"),
        "score": Value("float64"),
        "rank": Value("int32"),
    }


def test_no_views_are_an_error(engine):
    with pytest.raises(ValueError, match=r"views: no view is left of 0 rows \(it is empty\): see the log"):
        build_pairs(as_views([("u", "a", 0)]).select([]), PairOptions(), engine=engine)


def test_view_options_count_and_an_engine_is_opened_where_none_is_given():
    rows = random_views(3)
    bots = build_pairs(as_views(rows), PairOptions(), view_options=ViewOptions(max_user_views=3))
    assert as_rows(bots) != reference_pairs(rows, PairOptions()) == as_rows(build_pairs(as_views(rows), PairOptions()))


# The command

ROWS = random_views(0)
OPTIONS = PairOptions(score="cosine", top_k=2, max_as_related=3, window_days=0.5)
WORDS = "--score cosine --top-k 2 --max-as-related 3 --window-days 0.5 --memory-gb 1".split()


@pytest.fixture
def views(tmp_path):
    write_table(as_views(ROWS), tmp_path / "views.csv")
    return tmp_path / "views.csv"


@pytest.mark.parametrize("name", ["new/pairs.parquet", "pairs.csv", "pairs.jsonl", "folder"])
def test_command(views, tmp_path, capsys, name):
    main(["--views", str(views), "--output", str(tmp_path / name), *WORDS])
    expected = reference_pairs(ROWS, OPTIONS)
    if name == "folder":
        assert as_rows(pq.read_table(tmp_path / name).to_pydict()) == expected
    else:
        assert as_rows(load_pairs(tmp_path / name)) == expected
    assert expected != reference_pairs(ROWS, PairOptions())  # negative control
    out, with_pairs = capsys.readouterr().out, len({note for note, _, _, _ in expected})
    kept, notes, users = (len(set(part)) for part in (ROWS, [row[1] for row in ROWS], [row[0] for row in ROWS]))
    assert f"{len(ROWS)} rows read, {kept} views kept, from 2008-05-03 to 2008-05-22\n" in out
    assert f"{len(ROWS) - kept} dropped by duplicate_view: the user, note and second of another row\n" in out
    assert out.endswith(
        f"{kept} views of {notes} notes by {users} users ─► {len(expected)} pairs of {with_pairs} notes "
        f"({len(expected) / with_pairs:.2f} a note) in {tmp_path / name}\n"
    )


def test_command_with_other_columns_and_only_some_notes(tmp_path, capsys):
    some = sorted({note for _, note, _ in ROWS})[:4]
    table = as_views(ROWS).rename_columns({"user_id": "who", "note_id": "what", "timestamp": "when"})
    table = table.map(lambda row: {"when": row["when"] * 1000 + 7})
    write_table(table, tmp_path / "views.parquet")
    write_table(Dataset.from_dict({"note_id": [*some, "new"], "title": ["t"] * 5}), tmp_path / "notes.csv")
    columns = "--user-column who --note-column what --time-column when --time-unit ms".split()
    files = ["--views", str(tmp_path / "views.parquet"), "--notes", str(tmp_path / "notes.csv")]
    main([*files, "--output", str(tmp_path / "pairs.parquet"), *columns, *WORDS])
    known = [row for row in ROWS if row[1] in some]
    assert as_rows(load_pairs(tmp_path / "pairs.parquet")) == reference_pairs(known, OPTIONS)
    out = capsys.readouterr().out
    assert f"{len(ROWS) - len(known)} dropped by unknown_note: a note that the notes lack" in out
    assert " views of 4 notes by " in out


def test_command_lists_offenders_and_strict_refuses_them(tmp_path, capsys):
    path = tmp_path / "views.csv"
    path.write_text("user_id,note_id,timestamp\nu,a,9\nu,b,soon\nu,b,5\n,b,5\nu,a,9\nu,a,1970-01-01T00:00:09Z\n")
    arguments = [
        "--views",
        str(path),
        "--output",
        str(tmp_path / "pairs.csv"),
        "--offenders",
        str(tmp_path / "bad.csv"),
    ]
    main(arguments)
    bad = pa_csv.read_csv(tmp_path / "bad.csv").to_pylist()
    assert {row["file"] for row in bad} == {str(path)}
    assert [(row["rule"], row["row"], row["timestamp"]) for row in bad] == [
        ("bad_timestamp", 2, "soon"),
        ("time_backwards", 3, "5"),
        ("empty_user_id", 4, "5"),
        ("duplicate_view", 5, "9"),
        ("duplicate_view", 6, "1970-01-01T00:00:09Z"),
    ]
    out = capsys.readouterr().out
    assert "6 rows read, 2 views kept" in out
    assert "2 dropped by duplicate_view" in out
    assert "1 kept by time_backwards" in out

    (tmp_path / "pairs.csv").unlink()
    for words, said in (
        (["--strict"], f"{path}, row 4: empty_user_id: no user_id: "),
        (["--refuse", "duplicate_view", "bot"], f"{path}, row 5: duplicate_view: "),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*arguments, *words])
        assert caught.value.code == 2
        assert f"error: {said}" in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "pairs.csv").exists()
    main([*arguments, "--refuse", "bot", "user_cap"])  # negative control: nothing breaks these
    assert (tmp_path / "pairs.csv").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--top-k 0", "top_k=0: give 1 or more"),
        ("--memory-gb 0", "memory_gb=0.0: give a number above 0"),
        ("--max-user-views 0", "max_user_views=0: give 1 or more"),
        ("--time-column when", "no column 'when', only ['user_id', 'note_id', 'timestamp']; say which one it is with"),
        ("--spark-master local", "spark_master='local' needs engine='spark'"),
        ("--refuse late", "argument --refuse: invalid choice: 'late'"),
        ("--notes missing.csv", "missing.csv: no such file"),
    ],
)
def test_command_refuses_what_it_cannot_do(views, tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as caught:
        main(["--views", str(views), "--output", str(tmp_path / "pairs.csv"), *words.split()])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_command_does_not_write_over_a_folder(views, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--views", str(views), "--output", str(tmp_path)])
    assert f"{tmp_path}: is there already; remove it or give another path" in capsys.readouterr().err


def test_help_names_every_rule_and_option(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for word in ("--max-as-related", "--max-swing-users", "--drop-time-backwards", "--strict", *RULES):
        assert word in text
