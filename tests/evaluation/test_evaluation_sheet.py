"""The picture sheet: answers in the order of the metrics, a mixed draw of queries, pictures of every kind."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.metrics import Ranks, rank_related
from evaluation.sheet import Pictures, choose_queries, field_text, note_label, picture_sheet, say_drawn, say_found

NOTES = [{"note_id": f"n{position}", "title": f"note {position}"} for position in range(30)]


def random_embeds() -> np.ndarray:
    """(30, 4), some of them equal, so that there are ties."""
    generator = np.random.default_rng(0)
    return generator.normal(size=(12, 4)).astype(np.float32)[generator.integers(12, size=30)]


@pytest.mark.parametrize("with_candidates", [False, True])
def test_answers_have_the_first_ranks_of_the_metrics(with_candidates: bool) -> None:
    embeds, related = random_embeds(), [np.array([], dtype=np.int64)] * 30
    candidates = np.arange(30) % 3 != 0 if with_candidates else None
    sheet = picture_sheet(NOTES, related, {"system": embeds}, range(30), 6, candidates)
    found = [[NOTES.index(answer.note) for answer in query.answers["system"]] for query in sheet]
    for query, answered in enumerate(found):
        ranks = rank_related(embeds, [np.array(answered if note == query else []) for note in range(30)], candidates)
        assert dict(zip(ranks.target.tolist(), ranks.rank.tolist(), strict=True)) == {
            note: place for place, note in enumerate(answered, start=1)
        }
    assert found != [sorted(answered) for answered in found]
    # Ties matter here: the higher position first gives other answers.
    products = [embeds.astype(np.float64) @ embeds[query] for query in range(30)]
    backwards = [[note for note in np.lexsort((-np.arange(30), -row)) if note != q] for q, row in enumerate(products)]
    assert found != [order[:6] for order in backwards]


def test_functions_answer_like_embeddings_and_right_answers_are_known() -> None:
    embeds = random_embeds()
    related = [np.array([(query + 1) % 30, (query + 2) % 30]) for query in range(30)]
    scores = {"embeds": embeds, "function": lambda rows: embeds[rows] @ embeds.T, "other": embeds[::-1]}
    sheet = picture_sheet(NOTES, related, scores, [3, 17], top_k=29)
    for query, position in zip(sheet, (3, 17), strict=True):
        assert query.note is NOTES[position]
        assert query.num_related == 2
        assert query.related == [NOTES[position + 1], NOTES[position + 2]]
        right = {answer.note["note_id"] for answer in query.answers["embeds"] if answer.is_related}
        assert right == {f"n{position + 1}", f"n{position + 2}"}
        by_system = {name: [answer.score for answer in found] for name, found in query.answers.items()}
        np.testing.assert_allclose(by_system["embeds"], by_system["function"], rtol=1e-5)
        assert not np.allclose(by_system["embeds"], by_system["other"])


def test_what_a_protocol_does_not_ask_for_is_no_wrong_answer() -> None:
    """The paper's protocol: one related note a query, of those in the table of pairs."""
    embeds = random_embeds()
    known = [np.array([(query + 2) % 30, (query + 1) % 30, (query + 7) % 30]) for query in range(30)]
    related = [positions[1:2] for positions in known]
    (asked,) = picture_sheet(NOTES, related, {"system": embeds}, [3], top_k=29)
    (query,) = picture_sheet(NOTES, related, {"system": embeds}, [3], top_k=29, known=known)
    found = {answer.note["note_id"]: answer.sign for answer in query.answers["system"]}
    assert {name: sign for name, sign in found.items() if sign != "✗"} == {"n4": "✓", "n5": "(✓)", "n10": "(✓)"}
    assert (query.num_related, query.num_known, query.related) == (1, 2, [NOTES[4]])
    assert say_found(query.answers["system"]) == "1 of its first 29 answers is related, 2 more not asked for"
    assert say_found(asked.answers["system"]) == "1 of its first 29 answers is related"  # control
    with pytest.raises(ValueError, match="known is of 29 notes, notes are 30"):
        picture_sheet(NOTES, related, {"system": embeds}, [3], known=known[1:])


def test_one_system_alone_differs_from_none() -> None:
    assert "systems differ" in say_drawn(2) and "a quarter where none" in say_drawn(2)
    assert "differ" not in say_drawn(1) and "its first 4 answers" in say_drawn(1, top_k=4)


def test_scores_are_checked() -> None:
    related = [np.array([], dtype=np.int64)] * 30
    with pytest.raises(ValueError, match="'short'.*shape"):
        picture_sheet(NOTES, related, {"short": np.ones((29, 4), dtype=np.float32)}, [0])
    with pytest.raises(ValueError, match="'broken'.*of note 2 contain NaN"):
        picture_sheet(NOTES, related, {"broken": np.full((30, 4), np.nan, dtype=np.float32)}, [2])
    with pytest.raises(ValueError, match="top_k"):
        picture_sheet(NOTES, related, {}, [0], top_k=0)


def ranks_of(places: list[int]) -> Ranks:
    """One related note for each query, on the places given."""
    queries = np.arange(len(places))
    return Ranks(queries, (queries + 1) % len(places), np.array(places), np.full(len(places), len(places) - 1))


def test_queries_are_a_mix_where_systems_differ() -> None:
    # Of 400 queries 100 differ (0-99), 100 are found by both (100-199), 200 by neither.
    first = ranks_of([1] * 200 + [50] * 200)
    second = ranks_of([9] * 100 + [2] * 100 + [60] * 200)
    chosen = choose_queries({"first": first, "second": second}, count=40, top_k=6)
    assert chosen == sorted(set(chosen))
    kinds = np.digitize(chosen, [100, 200])
    np.testing.assert_array_equal(np.bincount(kinds), [20, 10, 10])
    assert choose_queries({"first": first, "second": second}, count=40, top_k=6) == chosen
    assert choose_queries({"first": first, "second": second}, count=40, top_k=6, seed=1) != chosen
    # Too few of a kind, and fewer queries than asked for.
    assert np.bincount(np.digitize(choose_queries({"first": first}, count=40), [100, 200])).sum() == 40
    assert choose_queries({"first": first}, count=1000) == list(range(400))


def test_queries_must_agree() -> None:
    with pytest.raises(ValueError, match="'second'.*other queries"):
        choose_queries({"first": ranks_of([1, 2, 3]), "second": ranks_of([1, 2])})
    with pytest.raises(ValueError, match="at least one system"):
        choose_queries({})


def test_pictures_of_every_kind_and_each_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(200, 400, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    file = io.BytesIO()
    picture.save(file, format="PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    same = [pixels, picture, file.getvalue(), str(tmp_path / "a.png"), tmp_path / "a.png", {"bytes": file.getvalue()}]
    other = Image.new("L", (10, 10))
    missing = [None, "", {"bytes": None, "path": None}]
    bad = [tmp_path / "broken.jpg", "nowhere.jpg", "https://example.org/a.jpg", b"", np.zeros((0, 3, 3), np.uint8), 7]
    notes = [{"image": image} for image in (*same, other, *missing, *bad)]
    pictures = Pictures()
    for note in (*notes, *notes):
        pictures.add(note)
    places = [pictures.place(note) for note in notes]
    assert places == [0] * len(same) + [1] + [None] * (len(missing) + len(bad))
    assert [Image.open(io.BytesIO(one)).size for one in pictures.files] == [(160, 80), (10, 10)]
    assert [Image.open(io.BytesIO(one)).format for one in pictures.files] == ["JPEG", "JPEG"]
    assert picture.size == (400, 200)  # the caller's picture stays whole
    # Each is said once.
    assert sum("cannot be shown" in record.message for record in caplog.records) == len(bad)


def test_labels() -> None:
    assert note_label({"title": " ", "content": "a  b"}) == "a b"
    assert note_label({"note_id": "n1", "title": None}) == "n1"
    assert note_label({}) == "a note without text"
    assert field_text({"title": "花" * 100}, "title", 10) == "花" * 9 + "…"  # no space to cut at
