"""The query equals plain Python on random logs, at the window's edges, and whatever the order of the views."""

import random
from collections import defaultdict
from dataclasses import replace

import pytest
from datasets import Dataset, Value

from pairs.build import SECONDS_PER_DAY, PairOptions, build_pairs, main
from pairs.tables import load_pairs, write_table


def as_views(rows):
    return Dataset.from_dict(
        {name: [row[i] for row in rows] for i, name in enumerate(("user_id", "note_id", "timestamp"))}
    )


def as_rows(pairs):
    return list(zip(*(pairs[name] for name in ("note_id", "related_note_id", "score", "rank")), strict=True))


def random_views(seed, n_users=12, n_notes=9, n_views=150, days=20):
    """A log with repeated views, equal seconds and users and notes of unequal activity."""
    rng = random.Random(seed)
    return [
        (
            f"u{int(n_users * rng.random() ** 2)}",
            f"n{int(n_notes * rng.random() ** 2)}",
            rng.randrange(days * 4) * SECONDS_PER_DAY // 4,
        )
        for _ in range(n_views)
    ]


def reference_pairs(rows, options, note_ids=None):
    """The same in plain Python, straight from the definition: every pair of views is looked at."""
    window = options.window_days * SECONDS_PER_DAY
    viewers, seen = defaultdict(set), defaultdict(set)
    for user, note, _ in rows:
        viewers[note].add(user)
    for user, a, time_a in rows:
        for other, b, time_b in rows:
            if user != other or a == b or (note_ids is not None and not {a, b} <= set(note_ids)):
                continue
            gap = time_b - time_a
            if 0 <= gap <= window or (options.direction == "both" and -window <= gap <= 0):
                seen[a, b].add(user)
    related = defaultdict(list)
    for (a, b), users in seen.items():
        count = len(users)
        score = float(count) if options.score == "count" else count / (len(viewers[a]) * len(viewers[b])) ** 0.5
        if count >= options.min_count and score >= options.min_score:
            related[a].append((-score, -count, b))
    return [
        (a, b, -score, rank)
        for a in sorted(related)
        for rank, (score, _, b) in enumerate(sorted(related[a])[: options.top_k], start=1)
    ]


CASES = [
    PairOptions(),
    PairOptions(direction="forward", top_k=100),
    PairOptions(score="cosine", top_k=3),
    PairOptions(score="cosine", direction="forward", min_count=2, window_days=2.5),
    PairOptions(score="cosine", min_score=0.4, min_count=2, top_k=100),
    PairOptions(min_score=3.0),
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_equal_to_plain_python(options):
    for seed in range(4):
        rows = random_views(seed)
        some_notes = ["n0", "n2", "n3", "n7", "never viewed"]
        for note_ids in (None, some_notes):
            expected = reference_pairs(rows, options, note_ids)
            assert expected
            assert as_rows(build_pairs(as_views(rows), options, note_ids)) == [
                (a, b, pytest.approx(score, rel=1e-12), rank) for a, b, score, rank in expected
            ]
        # Negative control: with another window the reference differs, so the comparison can fail.
        other = reference_pairs(rows, replace(options, window_days=options.window_days / 5))
        assert other != reference_pairs(rows, options)


def test_order_of_the_views_does_not_matter():
    rows = random_views(0)
    expected = as_rows(build_pairs(as_views(rows), PairOptions(score="cosine")))
    random.Random(1).shuffle(rows)
    assert as_rows(build_pairs(as_views(rows), PairOptions(score="cosine"))) == expected


def test_ties_are_broken_by_count_then_id():
    # cosine(a, b) = 1 / sqrt(4 * 1), cosine(a, c) = 2 / sqrt(4 * 4), cosine(a, d) = 1 / sqrt(4 * 1): all one half
    liked = {"b": "1", "d": "2", "c": "34567"[:4], "a": "1234"}
    rows = [(user, note, 0) for note, users in liked.items() for user in users]
    pairs = as_rows(build_pairs(as_views(rows), PairOptions(score="cosine")))
    assert [row for row in pairs if row[0] == "a"] == [("a", "c", 0.5, 1), ("a", "b", 0.5, 2), ("a", "d", 0.5, 3)]


@pytest.mark.parametrize(("gap", "found"), [(0, "ab ba"), (1, "ab"), (86_400, "ab"), (86_401, ""), (-1, "ba")])
def test_window_edges_and_direction(gap, found):
    views = as_views([("u", "a", 10**9), ("u", "b", 10**9 + gap)])
    forward = build_pairs(views, PairOptions(window_days=1, direction="forward"))
    assert " ".join(a + b for a, b, _, _ in as_rows(forward)) == found
    both = build_pairs(views, PairOptions(window_days=1, direction="both"))
    assert " ".join(a + b for a, b, _, _ in as_rows(both)) == ("ab ba" if found else "")


def test_a_user_counts_once_and_users_do_not_mix():
    rows = [("u", "a", 0), ("u", "b", 1), ("u", "a", 2), ("u", "b", 3), ("v", "a", 0), ("w", "b", 0)]
    assert as_rows(build_pairs(as_views(rows), PairOptions())) == [("a", "b", 1.0, 1), ("b", "a", 1.0, 1)]


def test_top_k_is_chosen_among_the_notes_given_but_views_of_all_count():
    rows = [("u", "a", 0), ("u", "b", 0), ("u", "c", 0), ("v", "a", 0), ("v", "b", 0), ("w", "c", 9**9)]
    options = PairOptions(score="cosine", top_k=1)
    pairs = as_rows(build_pairs(as_views(rows), options, {"a", "c"}))
    assert pairs == [("a", "c", 0.5, 1), ("c", "a", 0.5, 1)]  # w's lonely view of c makes 1 / sqrt(2 * 2)


def test_no_views_give_an_empty_table():
    views = as_views([("u", "a", 0)]).select([])
    pairs = build_pairs(views, PairOptions())
    assert len(pairs) == 0
    assert pairs.features == {
        "note_id": Value("string"),
        "related_note_id": Value("string"),
        "score": Value("float64"),
        "rank": Value("int32"),
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("window_days", 0),
        ("window_days", float("nan")),
        ("direction", "back"),
        ("score", "npmi"),
        ("min_score", -1),
        ("min_count", 0),
        ("top_k", 0),
    ],
)
def test_bad_options_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        PairOptions(**{field: value})


def test_command(tmp_path, capsys):
    rows = random_views(0)
    write_table(as_views(rows), tmp_path / "views.csv")
    arguments = ["--views", str(tmp_path / "views.csv"), "--output", str(tmp_path / "new" / "pairs.parquet")]
    main([*arguments, "--score", "cosine", "--top-k", "2"])
    expected = as_rows(build_pairs(as_views(rows), PairOptions(score="cosine", top_k=2)))
    assert as_rows(load_pairs(tmp_path / "new" / "pairs.parquet")) == expected
    assert f"150 views of 9 notes by 12 users ─► {len(expected)} pairs of 9 notes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*arguments, "--top-k", "0"])
    assert "top_k=0: give 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--memory-gb", "0"])
    assert "memory_gb=0.0: give a number above 0" in capsys.readouterr().err
