"""What a user could do instead of training a NoteLLM-2: every baseline, what it needs, and the scores it gives.

    popularity, item-cf                  who viewed a note in training          (evaluation.collaborative)
    bm25, tfidf                          words                                  (evaluation.lexical)
    frozen-*, clip-*, zero-shot-llm      features of pretrained models, by cosine       (evaluation.encoders)
    head-*                               the same, through a small trained head         (evaluation.head)

A baseline gives embeddings or a function of scores: whoever asks ranks them.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.sparse import csr_array

from evaluation.collaborative import item_cf_scores, num_cold, popularity_scores
from evaluation.encoders import DualEncoder, ImageEncoder, LLMEncoder, TextEncoder, normalized
from evaluation.head import HeadSettings, train_head
from evaluation.lexical import bm25_scores, note_text, tfidf_scores
from evaluation.metrics import ScoreFunction
from evaluation.modality import Modality, is_blank, with_modality
from modeling_notellm2.processing_notellm2 import Language

logger = logging.getLogger(__name__)

Split = Literal["test", "train", "validation"]
Source = Literal["text", "image", "clip-text", "clip-image", "llm"]
Scores = np.ndarray | ScoreFunction


@dataclass
class NotesAndRelated:
    """Notes and their relatedness.

    Args:
        notes: N notes.
        related: for each note the positions of its related notes, integers; may be empty.
    """

    notes: Sequence[Mapping[str, Any]]
    related: Sequence[np.ndarray]


@dataclass
class BaselineInputs:
    """What baselines are made of. Encoders are loaded, and notes encoded, once, when a baseline first asks for them.

    Args:
        notes: N notes, which are queries and pool.
        text_encoder: folder or Hub id of a sentence-transformers model.
        vision: folder or Hub id of a vision tower.
        clip: folder or Hub id of a dual encoder, such as CLIP or SigLIP.
        llm: folder or Hub id of a decoder LLM.
        language: of the prompt that the LLM reads.
        train: notes that the heads train on.
        validation: notes that choose the heads' best step.
        viewers: (N, U), which users viewed which of the notes in training; see `load_train_viewers`.
        head: how the heads are built and trained; None: the defaults.
        batch_size: notes encoded at once.
    """

    notes: Sequence[Mapping[str, Any]]
    text_encoder: str | None = None
    vision: str | None = None
    clip: str | None = None
    llm: str | None = None
    language: Language = "en"
    train: NotesAndRelated | None = None
    validation: NotesAndRelated | None = None
    viewers: csr_array | None = None
    head: HeadSettings | None = None
    batch_size: int = 32
    _encoders: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _features: dict[tuple[Source, Split], np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def features(self, source: Source, split: Split = "test") -> np.ndarray:
        """What a frozen encoder makes of the notes of a split: (N, D) float32, of unit length, zero where a note has
        nothing for it to read.

        Raises:
            ValueError: the encoder, or the split, was not given.
        """
        needed = _ENCODER_OF[source]
        _refuse_missing(f"Features {source!r}", self, (needed, *(() if split == "test" else (split,))))
        if (source, split) not in self._features:
            if needed not in self._encoders:
                self._encoders[needed] = self._load(needed)
            encoder = self._encoders[needed]
            encode = {"clip-text": encoder.texts, "clip-image": encoder.images}[source] if needed == "clip" else encoder
            self._features[source, split] = encode(self.notes if split == "test" else getattr(self, split).notes)
        return self._features[source, split]

    def _load(self, needed: str) -> Any:
        path = getattr(self, needed)
        if needed == "llm":
            return LLMEncoder(path, self.language, self.batch_size)
        return {"text_encoder": TextEncoder, "vision": ImageEncoder, "clip": DualEncoder}[needed](path, self.batch_size)


class BaselineScores(NamedTuple):
    """What a baseline makes of N notes.

    Attributes:
        modality: what it sees of a note: "text", "image", "both", or "-" for nothing.
        scores: (N, D) float32 embeddings, to be compared by their dot product, or a function of scores.
        details: `cold_notes`, how many nobody viewed in training; or `blank_notes`, how many have nothing of this
            modality.
    """

    modality: Modality | Literal["-"]
    scores: Scores
    details: dict[str, Any]


class Baseline(NamedTuple):
    """One baseline.

    Attributes:
        modality: as in `BaselineScores`.
        needs: fields of `BaselineInputs` that must be given.
        score: makes the scores.
    """

    modality: Modality | Literal["-"]
    needs: tuple[str, ...]
    score: Callable[[BaselineInputs], Scores]


def baseline_scores(name: str, inputs: BaselineInputs) -> BaselineScores:
    """Score notes by one baseline of `BASELINES`.

    Raises:
        ImportError: a library that the baseline needs is not installed.
        ValueError: the baseline is unknown, or misses what it needs; no note has what it reads.
    """
    check_baselines([name], inputs)
    modality, _, score = BASELINES[name]
    if modality == "-":
        assert inputs.viewers is not None
        details = {"cold_notes": num_cold(inputs.viewers)}
        if details["cold_notes"]:
            logger.warning(
                "%s: nobody viewed %d of the %d notes in training; among those only their order in the table decides.",
                name,
                details["cold_notes"],
                len(inputs.notes),
            )
    else:
        details = {"blank_notes": sum(map(is_blank, with_modality(inputs.notes, modality)))}
    return BaselineScores(modality, score(inputs), details)


def check_baselines(names: Iterable[str], inputs: BaselineInputs) -> None:
    """Refuse baselines that are unknown or miss what they need, before any of them runs.

    Raises:
        ValueError: names the baseline, and the fields and options that it misses.
    """
    for name in names:
        if name not in BASELINES:
            raise ValueError(f"baselines has {name!r}: choose from {', '.join(BASELINES)}.")
        _refuse_missing(f"Baseline {name!r}", inputs, BASELINES[name].needs)
    if inputs.viewers is not None and inputs.viewers.shape[0] != len(inputs.notes):
        raise ValueError(
            f"viewers has {inputs.viewers.shape[0]} rows for {len(inputs.notes)} notes: load it with their note_ids."
        )


def _refuse_missing(what: str, inputs: BaselineInputs, needs: Iterable[str]) -> None:
    missing = [f"{name} ({_OPTIONS[name]})" for name in needs if getattr(inputs, name) is None]
    if missing:
        raise ValueError(f"{what} needs {', '.join(missing)}: give it, or leave the baseline out.")


def _viewed(score: Callable[[csr_array], ScoreFunction]) -> Baseline:
    return Baseline("-", ("viewers",), lambda inputs: score(inputs.viewers))


def _worded(score: Callable[[Sequence[str]], ScoreFunction]) -> Baseline:
    return Baseline("text", (), lambda inputs: score([note_text(note) for note in inputs.notes]))


def _frozen(modality: Modality, *sources: Source) -> Baseline:
    """The cosine of frozen features; those of several sources, all in one space, are added."""

    def embed(inputs: BaselineInputs) -> np.ndarray:
        return normalized(np.sum([inputs.features(source) for source in sources], axis=0))

    return Baseline(modality, _needs(sources), embed)


def _head(modality: Modality, *sources: Source) -> Baseline:
    """A head trained on frozen features; those of several sources stand side by side, brought to the same spread: the
    states of an LLM differ little from note to note, and would drown in what a vision tower gives."""

    def embed(inputs: BaselineInputs) -> np.ndarray:
        assert inputs.train is not None and inputs.validation is not None
        spread = {source: _spread(inputs.features(source, "train")) for source in sources}

        def side_by_side(split: Split) -> np.ndarray:
            return np.concatenate([inputs.features(source, split) / spread[source] for source in sources], axis=1)

        train, validation, test = side_by_side("train"), side_by_side("validation"), side_by_side("test")
        return train_head(train, inputs.train.related, validation, inputs.validation.related, inputs.head).encode(test)

    return Baseline(modality, (*_needs(sources), "train", "validation"), embed)


def _spread(features: np.ndarray) -> float:
    """The root mean square distance of (N, D) vectors from their mean; zero vectors, which stand for nothing, aside."""
    present = features[features.any(axis=1)]
    return max(float(np.sqrt(present.var(axis=0).sum())), 1e-12)


def _needs(sources: Iterable[Source]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_ENCODER_OF[source] for source in sources))


_ENCODER_OF: dict[Source, str] = {
    "text": "text_encoder",
    "image": "vision",
    "clip-text": "clip",
    "clip-image": "clip",
    "llm": "llm",
}
_OPTIONS = {
    "text_encoder": "--text-encoder",
    "vision": "--vision",
    "clip": "--clip",
    "llm": "--llm",
    "train": "--train",
    "validation": "--validation",
    "viewers": "--train-views",
}

BASELINES: dict[str, Baseline] = {
    "popularity": _viewed(popularity_scores),
    "item-cf": _viewed(item_cf_scores),
    "bm25": _worded(bm25_scores),
    "tfidf": _worded(tfidf_scores),
    "frozen-text": _frozen("text", "text"),
    "frozen-image": _frozen("image", "image"),
    "clip-text": _frozen("text", "clip-text"),
    "clip-image": _frozen("image", "clip-image"),
    "clip-sum": _frozen("both", "clip-text", "clip-image"),
    "zero-shot-llm": _frozen("text", "llm"),
    "head-text": _head("text", "text"),
    "head-image": _head("image", "image"),
    "head-both": _head("both", "text", "image"),
    "head-llm": _head("text", "llm"),
    "head-llm-both": _head("both", "llm", "image"),
}
"""Each baseline by its name, in the order in which tables show them."""
