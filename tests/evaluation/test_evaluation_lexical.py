"""BM25 and TF-IDF find words, in any script."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from evaluation.baselines import BaselineInputs
from evaluation.lexical import bm25_scores, note_text, tfidf_scores, tokenize
from evaluation.metrics import ScoreFunction
from evaluation.protocols import make_task
from evaluation.systems import baseline_systems, measure


def test_note_text_takes_topics_as_list_or_string() -> None:
    assert note_text({"title": "A", "topics": ["b", "c"], "content": "d"}) == "A\nb, c\nd"
    assert note_text({"topics": "b, c", "image": "x.jpg"}) == "b, c"
    assert note_text({"title": None, "topics": None, "content": "  "}) == ""


def test_tokens_are_lower_cased_words_of_any_script() -> None:
    assert tokenize("Ärger, naïve_2 don't 花瓶abc ВАЗА") == ["ärger", "naïve_2", "don", "t", "花", "瓶", "abc", "ваза"]


@pytest.mark.parametrize("scores_of", [bm25_scores, tfidf_scores])
def test_shared_rare_words_rank_first(scores_of: Callable[[Sequence[str]], ScoreFunction]) -> None:
    texts = ["a red vase", "a Blue VASE", "a blue chair", "a lamp", "", "a lamp of glass", "花瓶", "红色的花瓶"]
    scores = scores_of(texts)(np.arange(len(texts)))
    assert scores.shape == (8, 8)
    assert scores.dtype == np.float32
    assert np.argmax(np.delete(scores[0], 0)) == 0  # the other vase
    assert np.argmax(np.delete(scores[6], 6)) == 6  # the other 花瓶
    assert not scores[4].any() and not scores[:, 4].any()  # a text without words
    np.testing.assert_array_equal(scores_of(texts)(np.array([2, 3])), scores[2:4])


def test_bm25_is_lucenes_formula() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefgh花瓶"), size=rng.integers(1, 12))) for _ in range(30)]
    counts = [Counter(tokenize(text)) for text in texts]
    holding = Counter(word for count in counts for word in count)
    mean = sum(count.total() for count in counts) / 30

    def score(query: Counter[str], note: Counter[str], b: float) -> float:
        length = 1 - b + b * note.total() / mean
        rarity = {word: math.log(1 + (30 - holding[word] + 0.5) / (holding[word] + 0.5)) for word in query}
        return sum(times * rarity[word] * note[word] / (note[word] + 1.5 * length) for word, times in query.items())

    scores = bm25_scores(texts)(np.arange(30))
    for b, is_it in ((0.75, True), (0.0, False)):  # the control: lengths do not count
        expected = np.array([[score(query, note, b) for note in counts] for query in counts])
        assert np.allclose(scores, expected, atol=1e-5) == is_it


def test_texts_without_words() -> None:
    assert not bm25_scores(["", "!"])(np.arange(2)).any()
    with pytest.raises(ValueError, match="No note has a word: check the table's columns"):
        tfidf_scores(["", "!"])


def test_tfidf_is_the_cosine_of_weighted_counts() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefgh花瓶"), size=rng.integers(1, 12))) for _ in range(30)]
    counts = [Counter(tokenize(text)) for text in texts]
    holding = Counter(word for count in counts for word in count)

    def cosines(weight: Callable[[str], float]) -> np.ndarray:
        vectors = np.array([[count[word] * weight(word) for word in sorted(holding)] for count in counts])
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors @ vectors.T

    scores = tfidf_scores(texts)(np.arange(30))
    np.testing.assert_allclose(scores, cosines(lambda word: math.log(31 / (1 + holding[word])) + 1), atol=1e-6)
    assert np.abs(scores - cosines(lambda word: 1.0)).max() > 0.01  # the control: plain counts


@pytest.mark.parametrize(("name", "scores_of"), [("bm25", bm25_scores), ("tfidf", tfidf_scores)])
def test_words_are_counted_over_queries_and_pool_in_the_papers_protocol(
    name: str, scores_of: Callable[[Sequence[str]], ScoreFunction]
) -> None:
    """By brute force: the index of all test notes, of which the candidates are then ranked."""
    rng = np.random.default_rng(1)
    letters = list("abcdefghijkl")
    odds = np.arange(1.0, 13.0) / 78
    texts = []
    for note in range(80):  # what is common among the queries, the first half, is rare in the pool
        texts.append(" ".join(rng.choice(letters, size=rng.integers(3, 9), p=odds if note < 40 else odds[::-1])))
    task = make_task("paper", np.stack([np.arange(40), rng.permutation(np.arange(40, 80))], axis=1), 80)
    assert task.candidates is not None and task.candidates.sum() == 40
    notes = [{"content": text} for text in texts]
    (measured,) = measure(baseline_systems([name], BaselineInputs(notes)), task, (5,))

    def ranks(counted: Callable[[int], list[int]]) -> list[int]:
        found = []
        for query, target in zip(measured.ranks.query.tolist(), measured.ranks.target.tolist(), strict=True):
            among = counted(query)
            row = scores_of([texts[note] for note in among])(np.array([among.index(query)]))[0]
            scores = dict(zip(among, row.tolist(), strict=True))
            ahead = [scores[n] > scores[target] for n in range(40, 80)]
            ties = sum(scores[n] == scores[target] for n in range(40, 80)) - 1
            found.append((1 + sum(ahead), 1 + sum(ahead) + ties))
        return found

    def are_right(bounds: list[tuple[int, int]]) -> bool:
        return all(low <= rank <= high for (low, high), rank in zip(bounds, measured.ranks.rank.tolist(), strict=True))

    assert are_right(ranks(lambda query: list(range(80))))
    assert not are_right(ranks(lambda query: [query, *range(40, 80)]))  # control: of the pool, and of one query alone


def test_tfidf_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(ImportError, match=r"notellm2\[baselines\]"):
        tfidf_scores(["text"])
