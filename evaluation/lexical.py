"""Notes compared by their words: BM25 and TF-IDF.

How rare a word is, and how long a text is beside others, is counted over all notes that are given: the pool and the
queries, whatever the protocol, and so alike for every query. Training notes are no part of it.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import bm25s
import numpy as np

from evaluation.metrics import ScoreFunction

# Kana and Chinese characters are words of their own, since no space separates them; elsewhere a word is a run of
# letters, digits and underscores in any script.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_CJK}]|[^\\W{_CJK}]+")


def note_text(note: Mapping[str, Any]) -> str:
    """A note's title, topics and content, one a line; without the empty ones, so "" for a note without text.

    >>> note_text({"title": "Vase", "topics": ["glass", "blue"], "content": None})
    'Vase\\nglass, blue'
    """
    fields = []
    for name in ("title", "topics", "content"):
        value = note.get(name)
        text = value if isinstance(value, str) else ", ".join(value if value is not None else ())
        if text.strip():
            fields.append(text.strip())
    return "\n".join(fields)


def tokenize(text: str) -> list[str]:
    """Lower-cased words; a Chinese or Japanese character is a word.

    No stop words and no stemming: they are of one language, and both scores give a word that is everywhere little
    weight.

    >>> tokenize("Blue VASE, 20cm 花瓶")
    ['blue', 'vase', '20cm', '花', '瓶']
    """
    return _WORD.findall(text.lower())


def bm25_scores(texts: Sequence[str]) -> ScoreFunction:
    """BM25 between all texts, each in turn the query, a word as often as it occurs in it.

    Lucene's variant with k1 = 1.5 and b = 0.75, the defaults of bm25s. A text without words scores 0.

    Args:
        texts: N texts, as `note_text` makes them.

    Returns:
        A function for `rank_related`: (R,) positions to (R, N) float32 scores.
    """
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # bm25s sets itself to DEBUG when imported
    words = [tokenize(text) for text in texts]
    index = bm25s.BM25()
    if any(words):
        index.index(words, show_progress=False)

    def score(rows: np.ndarray) -> np.ndarray:
        scores = np.zeros((len(rows), len(words)), dtype=np.float32)
        for row, query in zip(scores, rows.tolist(), strict=True):
            if words[query]:
                row[:] = index.get_scores(words[query])
        return scores

    return score


def tfidf_scores(texts: Sequence[str]) -> ScoreFunction:
    """The cosine of TF-IDF vectors: counts of words times ln((1 + N) / (1 + texts with the word)) + 1.

    These are the defaults of scikit-learn's `TfidfVectorizer`. A text without words scores 0.

    Args:
        texts: N texts, as `note_text` makes them.

    Returns:
        A function for `rank_related`: (R,) positions to (R, N) float32 scores.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if no text has a word.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ImportError(
            'The baseline tfidf needs scikit-learn: pip install "notellm2[baselines]", or leave the baseline out.'
        ) from error
    if not any(map(tokenize, texts)):
        raise ValueError("No note has a word: check the table's columns title, topics and content, or leave tfidf out.")
    vectors = TfidfVectorizer(analyzer=tokenize, dtype=np.float32).fit_transform(texts)  # (N, words), of unit length
    transposed = vectors.T.tocsr()

    def score(rows: np.ndarray) -> np.ndarray:
        return (vectors[rows] @ transposed).toarray()

    return score
