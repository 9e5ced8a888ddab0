"""The query equals plain Python, to the last bit, on random logs and for every score and option."""

from dataclasses import fields, replace
from fractions import Fraction
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairs.build import build_pairs
from pairs.engines import connect
from pairs.query import WHOLE, PairOptions, Score, count_pairs, name_pairs, rank_pairs
from pairs.views import read_views
from tests.pairs.reference import NOTES, as_rows, as_views, random_views, reference_pairs, swing_terms

SCORES = get_args(Score)
WINDOWS = (1 / 86_400, 0.5, 1.0, 2.75)


@pytest.fixture(scope="module")
def engine():
    with connect(memory_gb=1) as opened:
        yield opened


@st.composite
def logs(draw):
    window = draw(st.sampled_from(WINDOWS))
    rows = random_views(
        seed=draw(st.integers(0, 2**32)),
        views=draw(st.integers(1, 70)),
        users=draw(st.integers(1, 8)),
        notes=draw(st.integers(2, 9)),
        window=int(window * 86_400),
    )
    return rows, window


@st.composite
def questions(draw):
    """A log, options and the notes that pairs are wanted of."""
    rows, window = draw(logs())
    options = PairOptions(
        window_days=window,
        direction=draw(st.sampled_from(("both", "forward"))),
        score=draw(st.sampled_from(SCORES)),
        min_score=draw(st.sampled_from((0.0, 0.0, 0.2, 0.5, 2.0))),
        max_score=draw(st.sampled_from((None, None, 2.0, 3.0))),
        min_count=draw(st.sampled_from((1, 1, 2, 3))),
        min_note_users=draw(st.sampled_from((1, 1, 2, 3))),
        top_k=draw(st.sampled_from((1, 3, 10))),
        max_as_related=draw(st.sampled_from((None, None, 1, 2))),
        max_swing_users=draw(st.sampled_from((1, 2, 3, 200))),
    )
    return rows, options, draw(st.none() | st.sets(st.sampled_from((*NOTES, "never viewed"))))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(questions())
def test_equal_to_plain_python(engine, question):
    rows, options, note_ids = question
    pairs = build_pairs(as_views(rows), options, note_ids, engine=engine)
    assert as_rows(pairs) == reference_pairs(rows, options, note_ids)


# Of each option a value that is not its default, and options under which it matters.
MATTERS = {
    "window_days": (0.5, {}),
    "direction": ("forward", {}),
    "score": ("cosine", {}),
    "min_score": (2.0, {}),
    "max_score": (2.0, {}),
    "min_count": (3, {}),
    "min_note_users": (4, {}),
    "top_k": (1, {}),
    "max_as_related": (2, {"score": "inverse_activity"}),
    "max_swing_users": (2, {"score": "swing"}),
}


@pytest.mark.parametrize("name", [field.name for field in fields(PairOptions)])
def test_each_option_matters_and_equals_plain_python(engine, name):
    value, others = MATTERS[name]
    rows = random_views(3, views=80)
    options = PairOptions(**{"window_days": 1, **others})
    changed = replace(options, **{name: value})
    pairs = as_rows(build_pairs(as_views(rows), changed, engine=engine))
    assert pairs == reference_pairs(rows, changed)
    assert pairs != reference_pairs(rows, options)  # negative control: the comparison can fail


@pytest.mark.parametrize("score", SCORES)
def test_each_score_ranks_in_its_own_way(engine, score):
    rows = random_views(5, views=120, users=9, notes=9)
    views = read_views(engine, as_views(rows)).log
    options = PairOptions(score=score, window_days=1)
    ranked = rank_pairs(count_pairs(views, options, engine), views, options, engine)
    pairs = as_rows(engine.fetch(name_pairs(ranked, views)).to_pydict())
    assert pairs == reference_pairs(rows, options)
    ranks = {(a, b): rank for a, b, _, rank in pairs}
    for other in set(SCORES) - {score}:  # negative control
        others = reference_pairs(rows, replace(options, score=other))
        assert ranks != {(a, b): rank for a, b, _, rank in others}


def test_activity_weighs_whatever_the_score(engine):
    rows = random_views(7)
    views = read_views(engine, as_views(rows)).log
    by_weight, by_count = PairOptions(score="inverse_activity"), PairOptions()
    counted = count_pairs(views, by_count, engine, weigh_activity=True)
    for options in (by_weight, by_count):
        pairs = engine.fetch(name_pairs(rank_pairs(counted, views, options, engine), views)).to_pydict()
        assert as_rows(pairs) == reference_pairs(rows, options)


@pytest.mark.parametrize("parts", [2, 5])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(questions())
def test_parts_make_no_difference(engine, parts, question):
    rows, options, note_ids = question
    whole = build_pairs(as_views(rows), options, note_ids, engine=engine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "parts_of", lambda encounters: parts)
        divided = build_pairs(as_views(rows), options, note_ids, engine=engine)
    assert as_rows(divided) == as_rows(whole)
    assert divided.features == whole.features


def test_little_memory_makes_more_parts():
    with connect(memory_gb=0.5) as little, connect(memory_gb=1) as more:
        assert little.parts_of(10) == more.parts_of(10) == 1
        assert little.parts_of(10**9) == 2 * more.parts_of(10**9) == 64


def test_a_part_that_is_left_out_shows(engine, monkeypatch):
    """The negative control of the parts: to count one of them alone is another answer."""
    rows = random_views(5, views=120, users=9, notes=9)
    views = read_views(engine, as_views(rows)).log
    keep, kept = engine.keep, []

    def forget_the_first(expression, cluster_by=None):
        table = keep(expression, cluster_by)
        kept.append(table)
        return table

    options = PairOptions(window_days=1)
    whole = engine.fetch(count_pairs(views, options, engine)).num_rows
    monkeypatch.setattr(engine, "parts_of", lambda encounters: 3)
    monkeypatch.setattr(engine, "keep", forget_the_first)
    assert engine.fetch(count_pairs(views, options, engine)).num_rows == whole
    parts = [2 * engine.fetch(table).num_rows for table in kept[-3:]]
    assert sum(parts) == whole
    assert min(parts) > 0


@settings(max_examples=8, deadline=None, derandomize=True)
@given(logs())
def test_rounding_is_at_most_a_step_a_term(engine, log):
    rows, window = log
    notes_of = {user: {note for who, note, _ in rows if who == user} for user, _, _ in rows}
    everything = PairOptions(window_days=window, top_k=100)
    counts = {(a, b): int(count) for a, b, count, _ in reference_pairs(rows, everything)}
    step = Fraction(1, WHOLE)
    for score in ("inverse_activity", "swing"):
        options = replace(everything, score=score)
        for a, b, found, _ in as_rows(build_pairs(as_views(rows), options, engine=engine)):
            users = seers(rows, a, b, window)
            assert len(users) == counts[a, b]
            if score == "swing":
                terms = [Fraction(term) for term in swing_terms(users, notes_of, options)]
            else:
                terms = [Fraction(1, len(notes_of[user])) for user in users]
            assert 0 <= sum(terms) - Fraction(found) <= len(terms) * step


def seers(rows, a, b, window):
    """Who viewed a and b within the window."""
    return {
        user
        for user, note, time in rows
        for other, related, second in rows
        if user == other and (note, related) == (a, b) and abs(time - second) <= window * 86_400
    }


def test_rounding_shows():
    """Negative control: thirds are no multiples of 2^-32."""
    rows = [("u", note, 0) for note in "abc"]
    score = as_rows(build_pairs(as_views(rows), PairOptions(score="inverse_activity")))[0][2]
    assert 0 < Fraction(1, 3) - Fraction(score) <= Fraction(1, WHOLE)


def test_only_the_middle_visit_is_within_the_window(engine):
    day = 86_400
    rows = [("u", "a", 0), ("u", "a", 50 * day), ("u", "a", 99 * day), ("u", "b", 50 * day + 1), ("v", "b", 0)]
    for rows_in_order in (rows, [(user, {"a": "b", "b": "a"}[note], time) for user, note, time in rows]):
        pairs = as_rows(build_pairs(as_views(rows_in_order), PairOptions(window_days=1), engine=engine))
        assert pairs == [("a", "b", 1.0, 1), ("b", "a", 1.0, 1)]
    without = [row for row in rows if row[2] != 50 * day]  # negative control
    assert as_rows(build_pairs(as_views(without), PairOptions(window_days=1), engine=engine)) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("window_days", 0),
        ("window_days", float("nan")),
        ("window_days", 100_000),
        ("direction", "back"),
        ("score", "npmi"),
        ("min_score", -1),
        ("min_score", float("nan")),
        ("max_score", -1.0),
        ("min_count", 0),
        ("min_note_users", 0),
        ("top_k", 0),
        ("max_as_related", 0),
        ("max_swing_users", 0),
    ],
)
def test_bad_options_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"{field}=.*: (give|use) "):
        PairOptions(**{field: value})
