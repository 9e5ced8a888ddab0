"""What a user could do instead of training a NoteLLM-2: every baseline, what it needs, and the scores it gives.

    popularity, item-cf                  who viewed a note in training          (evaluation.collaborative)
    bm25, tfidf                          words                                  (evaluation.lexical)
    frozen-*, clip-*, zero-shot-llm      features of pretrained models, by cosine       (evaluation.encoders)
    head-*                               the same, through a small trained head         (evaluation.head)

A baseline gives embeddings or a function of scores: whoever asks ranks them.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from scipy.sparse import csr_array

from evaluation.collaborative import item_cf_scores, num_cold, popularity_scores
from evaluation.encoders import (
    DualEncoder,
    ImageEncoder,
    LLMEncoder,
    TextEncoder,
    count_parameters,
    normalized,
)
from evaluation.head import HeadSettings, train_head
from evaluation.lexical import bm25_scores, note_text, tfidf_scores
from evaluation.metrics import ScoreFunction
from evaluation.modality import Modality, is_blank, with_modality
from evaluation.report import Cost, short_name
from modeling_notellm2.processing_notellm2 import Language

logger = logging.getLogger(__name__)

Split = Literal["test", "train", "validation"]
Source = Literal["text", "image", "clip-text", "clip-image", "llm"]
Scores = np.ndarray | ScoreFunction
Made = TypeVar("Made")


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
    """What baselines are made of. Notes are encoded once, when a baseline first asks for them; of the encoders only the
    last one that was asked stays in memory.

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
        dtype: of the encoders' weights.
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
    dtype: torch.dtype = torch.float32
    _encoder: tuple[str, Any] | None = field(default=None, init=False, repr=False)
    _features: dict[tuple[Source, Split], np.ndarray] = field(default_factory=dict, init=False, repr=False)
    _seconds: dict[tuple[Source, Split], float] = field(default_factory=dict, init=False, repr=False)
    _encoded_for: dict[Source, str] = field(default_factory=dict, init=False, repr=False)
    _parameters: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    def features(self, source: Source, split: Split = "test") -> np.ndarray:
        """What a frozen encoder makes of the notes of a split: (N, D) float32, of unit length, zero where a note has
        nothing for it to read.

        Raises:
            ValueError: the encoder, or the split, was not given.
        """
        needed = _ENCODER_OF[source]
        _refuse_missing(f"Features {source!r}", self, (needed, *(() if split == "test" else (split,))))
        if (source, split) not in self._features:
            if self._encoder is None or self._encoder[0] != needed:
                self._encoder = None  # gone before the next one is loaded
                self._encoder = (needed, self._load(needed))
            encoder = self._encoder[1]
            self._parameters[needed] = encoder.num_parameters
            encode = {"clip-text": encoder.texts, "clip-image": encoder.images}[source] if needed == "clip" else encoder
            notes = self.notes if split == "test" else getattr(self, split).notes
            self._features[source, split], self._seconds[source, split] = timed(lambda: encode(notes))
        return self._features[source, split]

    def cost(self, sources: Iterable[Source]) -> Cost:
        """What the test notes' features of some sources, which have been asked for, have cost: each encoder counts
        once, each source's encoding once, whenever that was."""
        sources = tuple(sources)
        needs = _needs(sources)
        cost: Cost = {
            "made_of": ", ".join(f"{_TITLES[needed]} {short_name(getattr(self, needed))}" for needed in needs),
            "parameters": sum(self._parameters[needed] for needed in needs),
        }
        cost[clock_name()] = sum(self._seconds[source, "test"] for source in sources)
        return cost

    def share(self, sources: Iterable[Source], name: str) -> list[str]:
        """Note that a baseline has asked for the features of some sources; names those that asked before it."""
        return sorted({self._encoded_for.setdefault(source, name) for source in sources} - {name})

    def _load(self, needed: str) -> Any:
        path = getattr(self, needed)
        if needed == "llm":
            return LLMEncoder(path, self.language, self.batch_size, self.dtype)
        kinds = {"text_encoder": TextEncoder, "vision": ImageEncoder, "clip": DualEncoder}
        return kinds[needed](path, self.batch_size, self.dtype)


class BaselineScores(NamedTuple):
    """What a baseline makes of N notes.

    Attributes:
        modality: what it sees of a note: "text", "image", "both", or "-" for nothing.
        scores: (N, D) float32 embeddings, to be compared by their dot product, or a function of scores.
        details: `cold_notes`, how many nobody viewed in training; or `blank_notes`, how many have nothing of this
            modality.
        cost: what encodes, and what it costs.
    """

    modality: Modality | Literal["-"]
    scores: Scores
    details: dict[str, Any]
    cost: Cost


class Baseline(NamedTuple):
    """One baseline.

    Attributes:
        modality: as in `BaselineScores`.
        needs: fields of `BaselineInputs` that must be given.
        score: makes the scores, and says what that cost.
        sources: of the features that it is made of.
    """

    modality: Modality | Literal["-"]
    needs: tuple[str, ...]
    score: Callable[[BaselineInputs], tuple[Scores, Cost]]
    sources: tuple[Source, ...] = ()


def baseline_scores(name: str, inputs: BaselineInputs) -> BaselineScores:
    """Score notes by one baseline of `BASELINES`.

    Raises:
        ImportError: a library that the baseline needs is not installed.
        ValueError: the baseline is unknown, or misses what it needs; no note has what it reads.
    """
    check_baselines([name], inputs)
    modality, _, score, sources = BASELINES[name]
    if modality == "-":
        assert inputs.viewers is not None
        details = {"cold_notes": num_cold(inputs.viewers)}
        if details["cold_notes"]:
            logger.warning(
                "%s: nobody viewed %d of the %d notes in training; among those a fixed random order decides.",
                name,
                details["cold_notes"],
                len(inputs.notes),
            )
    else:
        details = {"blank_notes": sum(map(is_blank, with_modality(inputs.notes, modality)))}
    scores, cost = score(inputs)
    cost["notes"] = len(inputs.notes)
    if shared_with := inputs.share(sources, name):
        cost["shared_with"] = shared_with
    return BaselineScores(modality, scores, details, cost)


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
    return Baseline("-", ("viewers",), lambda inputs: _indexed("views in training", lambda: score(inputs.viewers)))


def _worded(score: Callable[[Sequence[str]], ScoreFunction]) -> Baseline:
    def index(inputs: BaselineInputs) -> tuple[Scores, Cost]:
        return _indexed("words", lambda: score([note_text(note) for note in inputs.notes]))

    return Baseline("text", (), index)


def _indexed(made_of: str, make: Callable[[], ScoreFunction]) -> tuple[Scores, Cost]:
    scores, seconds = timed(make)
    cost: Cost = {"made_of": made_of}
    cost[clock_name()] = seconds
    return scores, cost


def clock_name() -> Literal["seconds", "cpu_seconds"]:
    """What `timed` measures, as `evaluation.report.Cost` names it: the time of processors does not depend on what else
    is at work on the machine; what a GPU does is not in it."""
    return "seconds" if torch.cuda.is_available() else "cpu_seconds"


def timed(make: Callable[[], Made]) -> tuple[Made, float]:
    """What `make` makes, and the seconds it takes: of this process on all processors or, where there is a GPU, by the
    clock."""
    clock = time.perf_counter if clock_name() == "seconds" else time.process_time
    start = clock()
    return make(), clock() - start


def _frozen(modality: Modality, *sources: Source) -> Baseline:
    """The cosine of frozen features; those of several sources, all in one space, are added."""

    def embed(inputs: BaselineInputs) -> tuple[Scores, Cost]:
        embeds = normalized(np.sum([inputs.features(source) for source in sources], axis=0))
        return embeds, inputs.cost(sources)

    return Baseline(modality, _needs(sources), embed, sources)


def _head(modality: Modality, *sources: Source) -> Baseline:
    """A head trained on frozen features; those of several sources stand side by side, brought to the same spread: the
    states of an LLM differ little from note to note, and would drown in what a vision tower gives."""

    def embed(inputs: BaselineInputs) -> tuple[Scores, Cost]:
        assert inputs.train is not None and inputs.validation is not None
        parts: dict[Split, list[np.ndarray]] = {"train": [], "validation": [], "test": []}
        for source in sources:  # one encoder after the other: they are not in memory together
            spread = _spread(inputs.features(source, "train"))
            for split, features in parts.items():
                features.append(inputs.features(source, split) / spread)
        train, validation, test = (np.concatenate(features, axis=1) for features in parts.values())
        head = train_head(train, inputs.train.related, validation, inputs.validation.related, inputs.head)
        embeds, seconds = timed(lambda: head.encode(test))
        cost = inputs.cost(sources)
        cost["made_of"] = f"head on {cost['made_of']}"
        cost["parameters"] += count_parameters(head)
        cost[clock_name()] += seconds
        return embeds, cost

    return Baseline(modality, (*_needs(sources), "train", "validation"), embed, sources)


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
_TITLES = {"text_encoder": "text encoder", "vision": "tower", "clip": "dual encoder", "llm": "LLM"}
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
