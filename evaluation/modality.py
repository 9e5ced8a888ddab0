"""What a model finds with the text alone, with the image alone, and with both; and how far it relies on each.

A model that scores the same without its images neglects them. A note needs text or image, so one that is left with
neither cannot be encoded: its embedding is zero, it scores 0 against every note and so finds and is found by chance
of its position only. Such notes stay in the pool and among the queries, so that all modalities answer the same
questions, and the report counts them.

`reliance` also gives notes what belongs to others. A modality is *shuffled* where every note has another note's, in
the queries and in the pool: what the other modality still finds beside it. It is *swapped* where the query alone has
another note's, and the pool is intact: the query then finds what is related to the one or to the other, whichever it
follows.
"""

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
import torch
from tqdm.auto import tqdm

from evaluation.lexical import note_text
from evaluation.metrics import Ranks, ScoreFunction, chance_metrics, metrics_per_query, rank_related
from evaluation.report import Percent, Table, decimal
from evaluation.significance import PairedTest, bootstrap_interval, paired_test
from modeling_notellm2 import NoteLLM2Model
from modeling_notellm2.processing_notellm2 import TEXT_FIELDS, has_image
from train.data import NoteReader
from train.features import VisionFeatureTable
from train.states import WINDOW_BATCHES, NoteStateTable

if TYPE_CHECKING:  # matplotlib is an extra
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

Modality = Literal["both", "text", "image"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
CONDITIONS = (*MODALITIES, "image shuffled", "text shuffled", "image swapped", "text swapped")
ALL_PAIRS = "all"
"""The slice of all pairs."""

NEGLIGIBLE = 0.02
"""A relative change of a metric that does not matter: the paper calls 71.94 and 71.49 neglect, a change of 0.6 %."""
_CHANGE_COLUMNS = ("change", "low", "high", "relative")
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class NoteEncoder(Protocol):
    """What the evaluation asks of a model: `encode`, and `config.vision_config`, as `NoteLLM2Model` has them."""

    config: Any
    """Its `vision_config` is None if the model reads text alone."""

    def encode(
        self,
        notes: Sequence[Mapping[str, Any]],
        *,
        batch_size: int,
        show_progress_bar: bool,
        vision_features: VisionFeatureTable | None = None,
    ) -> Any:
        """Return a NumPy array, (N, D) float32 embeddings, L2-normalised, in the order of the notes."""


def with_modality(notes: Iterable[Mapping[str, Any]], modality: Modality) -> list[dict[str, Any]]:
    """The notes with only this modality: without `image` for "text"; without the text fields for "image".

    Raises:
        ValueError: if the modality is unknown.

    >>> with_modality([{"note_id": "a", "title": "Vase", "image": "a.jpg"}], "image")
    [{'note_id': 'a', 'image': 'a.jpg'}]
    """
    dropped = {"both": set(), "text": {"image"}, "image": set(TEXT_FIELDS)}
    if modality not in dropped:
        raise ValueError(f"modality is {modality!r}: choose one of {', '.join(MODALITIES)}.")
    return [{name: value for name, value in note.items() if name not in dropped[modality]} for note in notes]


def is_blank(note: Mapping[str, Any]) -> bool:
    """Whether a note has neither text nor image, so that no model can encode it."""
    return not has_image(note) and not note_text(note)


def encode_with_modality(
    model: NoteEncoder,
    notes: Iterable[Mapping[str, Any]],
    modality: Modality,
    batch_size: int = 32,
    vision_features: VisionFeatureTable | None = None,
) -> tuple[np.ndarray, int]:
    """Encode the notes with only this modality; `vision_features` are of these notes, in place of running the tower.

    Returns:
        (N, D) float32 embeddings, zero for the notes that are blank without the other modality, and their number.

    Raises:
        ValueError: if no note has this modality.
    """
    reduced = with_modality(notes, modality)
    num_blank = sum(map(is_blank, reduced))
    if num_blank == len(reduced):
        raise ValueError(
            f"No note has anything left with modality {modality!r}: evaluate other modalities, or check the table's "
            "columns title, topics, content and image."
        )
    return _encode(model, reduced, batch_size, vision_features), num_blank


@dataclass(frozen=True)
class Swap:
    """What S queries find that have a modality of another note, in place of their own, among intact notes.

    The two notes that a query is made of are not in its pool. Queries that would have nothing to find of one of the two
    are left out.

    Attributes:
        own: metric name to (S,) float64, of the related notes of the query's own note.
        other: the same of the related notes of the note that the modality is from.
    """

    own: dict[str, np.ndarray]
    other: dict[str, np.ndarray]


@dataclass(frozen=True)
class Reliance:
    """How far a model relies on text and on images.

    Attributes:
        metric: the metric that the conclusion is about, Recall at the first K.
        per_query: slice ─► condition ─► metric name ─► (Q,) float64, the same queries in the same order for all
            conditions of a slice. The first slice, `ALL_PAIRS`, is the whole.
        chance: metric name to what a random order of the pools is expected to reach.
        swaps: "image" and "text" ─► whom the queries follow; lacks one that leaves no query.
        fusion_weights: (M,) float32, the weight of the image in each of the M notes that have one, in their order, the
            mean over the dimensions for the vector gate; None for a model without late fusion.
        blank_notes: for each of `MODALITIES` how many notes it leaves with nothing.
        conclusion: plain sentences, that on images first.
    """

    metric: str
    per_query: dict[str, dict[str, dict[str, np.ndarray]]]
    chance: dict[str, float]
    swaps: dict[str, Swap]
    fusion_weights: np.ndarray | None
    blank_notes: dict[str, int]
    conclusion: list[str]

    def metrics(self, condition: str, part: str = ALL_PAIRS) -> dict[str, float]:
        """The means over the queries of a slice."""
        return {name: float(values.mean()) for name, values in self.per_query[part][condition].items()}

    def change(self, condition: str, part: str = ALL_PAIRS, metric: str | None = None) -> PairedTest:
        """The condition minus "both", query by query; of `self.metric` unless another one is named."""
        values = self.per_query[part]
        name = metric or self.metric
        return paired_test(values[condition][name], values["both"][name])


def reliance(
    model: NoteEncoder,
    notes: Iterable[Mapping[str, Any]],
    related: Sequence[np.ndarray],
    ks: Sequence[int] = (10, 100),
    batch_size: int = 32,
    vision_features: VisionFeatureTable | None = None,
    slices: Mapping[str, np.ndarray] | None = None,
    candidates: np.ndarray | None = None,
    embeds: Mapping[str, np.ndarray] | None = None,
    ranks: Mapping[str, Ranks] | None = None,
    seed: int = 0,
) -> Reliance:
    """Measure a model under each of `CONDITIONS`, on the same queries. The notes are encoded five times and ranked
    nine times, or less often where `embeds` and `ranks` have what is known.

    Args:
        model: anything with `NoteLLM2Model`'s `encode` that reads images; of a `NoteLLM2Model` with late fusion, the
            fusion weights are taken in another pass over the notes that have an image.
        notes: N notes, which are queries and pool.
        related: for each note the positions of its related notes, integers; may be empty.
        ks: cuts of the metrics; the conclusion is about Recall at the first.
        batch_size: notes encoded at once.
        vision_features: what the model's tower sees in these notes' images, in place of running it.
        slices: name ─► (P,) bool, some of the pairs in the order of `Ranks`, as from `evaluation.slices.pair_slices`.
        candidates: (N,) bool, the notes that pools are made of. Default: all.
        embeds: modality ─► (N, D) float32, what `encode_with_modality` made of these notes already.
        ranks: modality ─► what `rank_related` made of these embeddings, of `related` and of `candidates` already.
        seed: of who gets whose image and text.

    Raises:
        ValueError: the model reads no images; fewer than two notes have an image, or a text; a slice is no mask of the
            pairs, or empty; `ranks` are of other pairs; and what `rank_related` refuses.
    """
    if model.config.vision_config is None:
        raise ValueError("The model reads text alone (config.vision_config is None): there is no reliance to measure.")
    notes = list(notes)
    rng = np.random.default_rng(seed)
    donors = {
        "image": draw_donors(np.array([has_image(note) for note in notes]), rng, "an image"),
        "text": draw_donors(np.array([bool(note_text(note)) for note in notes]), rng, "a text"),
    }
    scores = _scores_of_conditions(model, notes, donors, batch_size, vision_features, embeds or {})
    found = dict(ranks or {})
    for condition in CONDITIONS:
        if condition not in found:
            found[condition] = rank_related(scores[condition], related, candidates)
    for name in MODALITIES:
        if not _are_same_pairs(found[name], found["image shuffled"]):
            raise ValueError(f"ranks[{name!r}] is of other pairs: rank the same related notes among the same notes.")
    swaps = {
        name: swap
        for name in donors
        if (swap := _follow(scores[f"{name} swapped"], donors[name], related, ks, candidates)) is not None
    }
    per_query = {
        name: {condition: metrics_per_query(found[condition].select(mask), ks) for condition in CONDITIONS}
        for name, mask in _checked_slices(slices or {}, found["both"]).items()
    }
    chance = chance_metrics(related, ks, candidates)
    weights = None
    if isinstance(model, NoteLLM2Model) and model.late_fusion is not None:
        weights = fusion_weights(model, notes, batch_size, vision_features)
    blank_notes = {str(name): sum(map(is_blank, with_modality(notes, name))) for name in MODALITIES}
    metric = f"recall@{ks[0]}"
    values = {condition: found[metric] for condition, found in per_query[ALL_PAIRS].items()}
    conclusion = conclude(values, chance[metric], metric, swaps)
    return Reliance(metric, per_query, chance, swaps, weights, blank_notes, conclusion)


def draw_donors(has_field: np.ndarray, rng: np.random.Generator, what: str) -> np.ndarray:
    """Whose image or text each note gets: those that have one in a random circle, each from the one before it.

    So nobody gets its own, and each is given once. (Two notes may have the same picture all the same.)

    Args:
        has_field: (N,) bool.
        rng: draws the circle.
        what: what the notes have, for the error.

    Returns:
        (N,) int64 positions of notes; a note that has none gets none, and is its own donor.

    Raises:
        ValueError: fewer than two notes have it.

    >>> draw_donors(np.array([True, False, True]), np.random.default_rng(0), "an image").tolist()
    [2, 1, 0]
    """
    circle = rng.permutation(np.flatnonzero(has_field))
    if len(circle) < 2:
        raise ValueError(
            f"{len(circle)} of {len(has_field)} notes have {what}, and an exchange takes two: evaluate more notes, or "
            "check the table's columns title, topics, content and image."
        )
    donors = np.arange(len(has_field))
    donors[circle] = np.roll(circle, 1)
    return donors


def with_fields_of_others(
    notes: Sequence[Mapping[str, Any]], donors: np.ndarray, fields: Sequence[str]
) -> list[dict[str, Any]]:
    """The notes, each with these fields of its donor; what the donor lacks is left out.

    >>> notes = [{"title": "Vase", "image": "a.jpg"}, {"content": "Blue.", "image": "b.jpg"}]
    >>> with_fields_of_others(notes, np.array([1, 0]), ("title", "content"))
    [{'image': 'a.jpg', 'content': 'Blue.'}, {'image': 'b.jpg', 'title': 'Vase'}]
    """
    return [
        {name: value for name, value in note.items() if name not in fields}
        | {name: notes[donor][name] for name in fields if name in notes[donor]}
        for note, donor in zip(notes, donors.tolist(), strict=True)
    ]


def asymmetric_scores(queries: np.ndarray, pool: np.ndarray) -> ScoreFunction:
    """Queries that are not the pool's own embeddings: (N, D) each ─► float64 dot products, rounded to float32.

    So equal vectors have equal scores, as where `rank_related` compares embeddings.
    """
    columns = pool.T.astype(np.float64)

    def score(rows: np.ndarray) -> np.ndarray:
        scores: np.ndarray = (queries[rows].astype(np.float64) @ columns).astype(np.float32)
        return scores

    return score


def fusion_weights(
    model: NoteLLM2Model,
    notes: Sequence[Mapping[str, Any]],
    batch_size: int = 32,
    vision_features: VisionFeatureTable | None = None,
    show_progress_bar: bool = True,
) -> np.ndarray:
    """The weight of the image in late fusion, of the M notes that have one, in their order.

    Returns:
        (M,) float32 in [0, 1], the mean over the dimensions for the vector gate.

    Raises:
        ValueError: the model has no late fusion.
        NoteError: a note cannot be read.
    """
    if model.late_fusion is None:
        raise ValueError("The model has no late fusion (late_fusion=None), so there are no weights to look at.")
    rows = torch.tensor([row for row, note in enumerate(notes) if has_image(note)], dtype=torch.int64)
    reader = NoteReader(notes, model.processor, vision_features)
    weights = [np.zeros(0, dtype=np.float32)]
    bar = tqdm(total=len(rows), desc="fusion weights", unit="note", disable=not show_progress_bar)
    with bar as progress, torch.no_grad():
        for window in rows.split(WINDOW_BATCHES * batch_size):
            states = NoteStateTable(model, reader, window, batch_size, show_progress_bar=False).select(window)
            weight = model.embed_states(states).fusion_weight
            assert weight is not None  # the model has late fusion
            weights.append(weight.float().mean(1).cpu().numpy())
            progress.update(len(window))
    return np.concatenate(weights)


def conclude(
    values: Mapping[str, np.ndarray], chance: float, metric: str, swaps: Mapping[str, Swap] | None = None
) -> list[str]:
    """Say in plain sentences what the model relies on: `say_use`, `say_exchange` and `say_alone` of images, then of
    text, `say_swap`.

    Args:
        values: condition ─► (Q,) floats, a metric of each query, of "both", "text" and "image" at least; also of "image
            shuffled" and "text shuffled".
        chance: what a random order is expected to reach.
        metric: its name.
        swaps: as in `Reliance`.
    """
    if not values["both"].any():
        return [f"With text and image {metric} is 0: what the model relies on cannot be told."]
    both, sentences, read = values["both"], [], set()
    uses: tuple[tuple[Literal["images", "text"], Literal["image", "text"], str], ...]
    uses = (("images", "image", "text"), ("text", "text", "image"))
    for what, own, other in uses:
        lost = paired_test(values[other], both)
        sentences.append(say_use(what, both, values[other], metric, lost))
        if (exchanged := values.get(f"{own} shuffled")) is not None:
            test = paired_test(exchanged, both)
            sentences.append(say_exchange(what, both, values[other], exchanged, metric, test, lost))
            if _is_read(*_relative_bounds(test, both)):
                read.add(own)
        sentences.append(say_alone(own, values[own], chance, float(both.mean()), metric))
    return sentences + [say_swap(swap, modality, metric, read) for modality, swap in (swaps or {}).items()]


def say_use(
    what: Literal["images", "text"],
    both: np.ndarray,
    without: np.ndarray,
    metric: str,
    test: PairedTest | None = None,
) -> str:
    """Whether a model uses, neglects or is harmed by its images or its text.

    The rule looks at the 95 % interval of the paired difference, divided by the mean with both:

    - all of it within `NEGLIGIBLE` of 0: the model neglects them, also where enough queries tell it from 0;
    - below 0: the model uses them; above 0: they harm it;
    - 0 in it, and wider, or one query, which has no interval: the queries are too few to tell.

    Args:
        what: is left out.
        both: (Q,) floats, the metric of each query with text and image, not all 0.
        without: (Q,) floats, the same queries.
        metric: its name.
        test: `paired_test(without, both)`, where it was made before.
    """
    them, they_harm = ("them", "they harm") if what == "images" else ("it", "it harms")
    test = test or paired_test(without, both)
    low, high = _relative_bounds(test, both)
    is_little = max(-low, high) <= NEGLIGIBLE
    if is_little:
        verdict = f"the model neglects {them}"
    elif high < 0:
        verdict = f"the model uses its {what}"
    elif low > 0:
        verdict = f"{they_harm} the model"
    else:
        verdict = f"{_too_few(test.queries)} to tell whether it uses its {what}"
    return f"Without {what} {_say_change(test, both, without, metric)}: {verdict}."


def say_exchange(
    what: Literal["images", "text"],
    both: np.ndarray,
    without: np.ndarray,
    exchanged: np.ndarray,
    metric: str,
    test: PairedTest | None = None,
    lost: PairedTest | None = None,
) -> str:
    """Whether a model reads what its images show, or what its text says: each note has another note's instead.

    Without images a note has another prompt, so that a loss there may be of the prompt and not of the images. The
    rule looks at the 95 % interval of the paired difference between exchanged and own ones, in this order:

    - all of it within `NEGLIGIBLE` of 0: the model neglects what they show, also where queries tell it from 0;
    - below 0: the model reads them; above 0: other notes' do better;
    - 0 in it, and without them the model surely loses, and surely more than with exchanged ones: that they are there
      matters more than what they show;
    - otherwise, or of one query: the queries are too few to tell.

    Args:
        what: is exchanged between all notes.
        both: (Q,) floats, the metric of each query with its own text and image, not all 0.
        without: (Q,) floats, the same queries without.
        exchanged: (Q,) floats, the same queries.
        metric: its name.
        test, lost: `paired_test(exchanged, both)` and `paired_test(without, both)`, where they were made before.
    """
    show, there = ("what they show", "there are images") if what == "images" else ("what it says", "there is a text")
    test, lost = test or paired_test(exchanged, both), lost or paired_test(without, both)
    low, high = _relative_bounds(test, both)
    if max(-low, high) <= NEGLIGIBLE:
        verdict = f"the model neglects {show}"
    elif _is_read(low, high):
        verdict = f"the model reads {show}"
    elif low > 0:
        verdict = "other notes' do better than its own"
    elif lost.high < 0 and paired_test(exchanged, without).low > 0:
        verdict = f"that {there} matters more than {show}"
    else:
        verdict = f"{_too_few(test.queries)} to tell whether it reads {show}"
    return f"With other notes' {what} {_say_change(test, both, exchanged, metric)}: {verdict}."


def _is_read(low: float, high: float) -> bool:
    """Whether the model reads what was exchanged, by the interval of `say_exchange`."""
    return high < 0 and -low > NEGLIGIBLE


def _relative_bounds(test: PairedTest, both: np.ndarray) -> tuple[Percent, Percent]:
    """The interval of a difference, as shares of the mean with both; a metric cannot lose more than all; NaN stays."""
    return Percent(np.maximum(-1.0, test.low / both.mean())), Percent(test.high / both.mean())


def _say_change(test: PairedTest, both: np.ndarray, other: np.ndarray, metric: str) -> str:
    """From where to where the metric moves, and by how much."""
    low, high = _relative_bounds(test, both)
    interval = "" if math.isnan(test.low) else f", 95\u00a0% interval {low} … {high}"
    direction = "falls" if test.difference < 0 else "rises"
    moved = f"{direction} from {both.mean():.4f} to" if test.difference else "stays at"
    return f"{metric} {moved} {other.mean():.4f} ({Percent(test.difference / both.mean())}{interval})"


def say_alone(modality: Literal["image", "text"], values: np.ndarray, chance: float, both: float, metric: str) -> str:
    """Whether the image or the text alone finds more than chance.

    The rule looks at the 95 % interval of the mean:

    - above chance: more; below it: less;
    - chance in it, and its upper end above chance by no more than `NEGLIGIBLE` of what both find: no more;
    - chance in it, and wider, or one query, which has no interval: the queries are too few to tell.

    Args:
        modality: what is left.
        values: (Q,) floats.
        chance: the expectation of their mean if pools are in random order.
        both: the mean with text and image.
        metric: its name.
    """
    low, high = bootstrap_interval(values)
    if low > chance:
        verdict = "more than chance"
    elif high < chance:
        verdict = "less than chance"
    elif high - chance <= NEGLIGIBLE * both:
        verdict = "no more than chance"
    else:
        verdict = f"{_too_few(len(values))} to tell it from chance"
    interval = "" if math.isnan(low) else f"95\u00a0% interval {low:.4f} … {high:.4f}; "
    return f"The {modality} alone reaches {metric} {values.mean():.4f} ({interval}chance {chance:.4f}): {verdict}."


def _too_few(queries: int) -> str:
    return "one query is too little" if queries == 1 else f"{queries} queries are too few"


def say_swap(swap: Swap, modality: str, metric: str, read: Collection[str] = ()) -> str:
    """Which of two notes a query follows that is made of both: the one it finds more related notes of, if the 95 %
    interval of the paired difference excludes 0. A model that reads the modality that loses, too, only leans on the
    other.

    Args:
        swap: what such queries find.
        modality: "image" or "text", which the lender gave.
        metric: its name.
        read: of "image" and "text" what the model reads, by the rule of `say_exchange`.
    """
    own, other = swap.own[metric], swap.other[metric]
    test = paired_test(own, other)
    kept = "text" if modality == "image" else "image"
    verdict = "it follows neither more than the other"
    if test.low > 0 or test.high < 0:
        winner, loser = (kept, modality) if test.low > 0 else (modality, kept)
        verdict = f"it {'leans on' if loser in read else 'follows'} the {winner}"
    interval = "" if math.isnan(test.low) else f", 95\u00a0% interval {decimal(test.low)} … {decimal(test.high)}"
    queries = "one query that has" if test.queries == 1 else f"{test.queries} queries that have"
    return (
        f"With its own {kept} and another note's {modality}, a query reaches {metric} {own.mean():.4f} of its own "
        f"note's related notes and {other.mean():.4f} of the lender's (difference {decimal(test.difference)}{interval}"
        f"; {queries} something to find of both): {verdict}."
    )


def reliance_tables(found: Reliance) -> list[Table]:
    """Tables for a report; those of which there is nothing are left out.

    - each condition, the change of `found.metric` from "both" with its 95 % interval, and its metrics;
    - for swapped queries, what they find of each of the two notes;
    - for each slice but the whole, the same metric in each condition, and the change without images;
    - mean, standard deviation and quantiles of the fusion weights.
    """
    metric, names = found.metric, list(found.chance)
    rows = [[name, *_change_cells(found, name), *map(found.metrics(name).get, names)] for name in CONDITIONS]
    rows.append(["chance", None, None, None, None, *map(found.chance.get, names)])
    queries = len(found.per_query[ALL_PAIRS]["both"][metric])
    blank = ", ".join(f"{number} with {modality}" for modality, number in found.blank_notes.items())
    tables = [
        Table(
            ["condition", *_CHANGE_COLUMNS, *names],
            rows,
            caption=f"What the model relies on ({queries} queries)",
            note=f"Change: {metric} minus that with both; low and high: its 95\u00a0% bootstrap interval over queries; "
            "relative: the change as a share of that with both. Shuffled: every note has another note's. Swapped: the "
            f"query alone has. Notes left with nothing: {blank}.",
        )
    ]
    if found.swaps:
        tables.append(
            Table(
                ["swapped", "queries", f"{metric}, own note", f"{metric}, lender"],
                [
                    [name, len(swap.own[metric]), float(swap.own[metric].mean()), float(swap.other[metric].mean())]
                    for name, swap in found.swaps.items()
                ],
                caption="Which note a query follows that has the image or the text of another, the lender",
            )
        )
    slices = [name for name in found.per_query if name != ALL_PAIRS]
    if slices:
        tables.append(
            Table(
                ["slice", "queries", *_CHANGE_COLUMNS, *CONDITIONS],
                [
                    [
                        name,
                        len(found.per_query[name]["both"][metric]),
                        *_change_cells(found, "text", name),
                        *(found.metrics(condition, name)[metric] for condition in CONDITIONS),
                    ]
                    for name in slices
                ],
                caption=f"What the model relies on by slice, {metric}",
                note="Change: without images (text) minus with both.",
            )
        )
    weights = found.fusion_weights
    if weights is not None:  # notes with an image there are, or they could not have been exchanged
        quantiles = np.quantile(weights, QUANTILES).tolist()
        shares = [f"{100 * share:.0f}\u00a0% quantile" for share in QUANTILES[1:-1]]
        tables.append(
            Table(
                ["notes with image", "mean", "standard deviation", "least", *shares, "most"],
                [[len(weights), float(weights.mean()), float(weights.std()), *quantiles]],
                caption="Weight of the image in late fusion",
            )
        )
    return tables


def plot_fusion_weights(weights: np.ndarray) -> "Figure":
    """Histogram of the fusion weights, with their mean.

    Args:
        weights: (M,) floats in [0, 1], at least one.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no weight.
    """
    if not len(weights):
        raise ValueError("weights is empty: no note has an image, so there is nothing to plot.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'notellm2[report]'.") from error
    figure = Figure(figsize=(8, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    # A gate that has not trained gives every note one weight, which still needs bins of some width.
    low, high = max(0.0, float(weights.min()) - 0.005), min(1.0, float(weights.max()) + 0.005)
    axes.hist(weights, bins=40, range=(low, high), color="#2a6fb0")
    mean, spread = float(weights.mean()), float(weights.std())
    label = f"mean {mean:.3f}, standard deviation {spread:.3f}"
    axes.axvline(mean, color="#d9772b", linestyle="--", label=label)
    axes.set(title="Weight of the image in late fusion", xlabel="weight of the image", ylabel="notes")
    axes.locator_params(axis="y", integer=True)
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _scores_of_conditions(
    model: NoteEncoder,
    notes: Sequence[Mapping[str, Any]],
    donors: Mapping[str, np.ndarray],
    batch_size: int,
    vision_features: VisionFeatureTable | None,
    known: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """For each of `CONDITIONS` embeddings or a `ScoreFunction`."""
    scores: dict[str, Any] = {modality: known[modality] for modality in MODALITIES if modality in known}
    for modality in MODALITIES:
        if modality not in scores:
            logger.info("Encoding the notes, modality: %s.", modality)
            scores[modality], _blank = encode_with_modality(model, notes, modality, batch_size, vision_features)
    for name, fields in (("image", ("image",)), ("text", TEXT_FIELDS)):
        logger.info("Encoding the notes, each with the %s of another one.", name)
        features = vision_features
        if vision_features is not None and name == "image":
            features = vision_features.select(donors[name].tolist())
        mixed = with_fields_of_others(notes, donors[name], fields)
        scores[f"{name} shuffled"] = _encode(model, mixed, batch_size, features)
        scores[f"{name} swapped"] = asymmetric_scores(scores[f"{name} shuffled"], scores["both"])
    return scores


def _encode(
    model: NoteEncoder,
    notes: Sequence[Mapping[str, Any]],
    batch_size: int,
    vision_features: VisionFeatureTable | None,
) -> np.ndarray:
    """(N, D) float32 embeddings, zero for blank notes; at least one must not be."""
    present = [position for position, note in enumerate(notes) if not is_blank(note)]
    encoded = model.encode(
        [notes[position] for position in present],
        batch_size=batch_size,
        show_progress_bar=True,
        vision_features=None if vision_features is None else vision_features.select(present),
    )  # (present, D)
    embeds = np.zeros((len(notes), encoded.shape[1]), dtype=np.float32)
    embeds[present] = encoded
    return embeds


def _follow(
    score: ScoreFunction,
    donors: np.ndarray,
    related: Sequence[np.ndarray],
    ks: Sequence[int],
    candidates: np.ndarray | None,
) -> Swap | None:
    """What swapped queries find of each of the two notes that they are made of; None where there are none."""

    def score_without_donor(rows: np.ndarray) -> np.ndarray:
        scores = score(rows)
        scores[np.arange(len(rows)), donors[rows]] = -np.inf  # `rank_related` leaves out the query itself
        return scores

    nothing = np.zeros(0, dtype=np.int64)
    own, other = [nothing] * len(donors), [nothing] * len(donors)
    for query, donor in enumerate(donors.tolist()):
        mine, theirs = np.asarray(related[query]), np.asarray(related[donor])
        mine, theirs = mine[mine != donor], theirs[theirs != query]
        if query != donor and len(mine) and len(theirs):
            own[query], other[query] = mine, theirs
    if not any(map(len, own)):
        return None
    found = [metrics_per_query(rank_related(score_without_donor, wanted, candidates), ks) for wanted in (own, other)]
    return Swap(*found)


def _are_same_pairs(first: Ranks, second: Ranks) -> bool:
    return np.array_equal(first.query, second.query) and np.array_equal(first.target, second.target)


def _checked_slices(slices: Mapping[str, np.ndarray], ranks: Ranks) -> dict[str, np.ndarray]:
    """The slices, that of all pairs first."""
    shape = ranks.query.shape
    for name, mask in slices.items():
        if mask.shape != shape or mask.dtype != bool or not mask.any() or name == ALL_PAIRS:
            raise ValueError(
                f"slices[{name!r}] has shape {mask.shape}, dtype {mask.dtype} and {np.count_nonzero(mask)} pairs, "
                f"expected a bool mask {shape} of at least one, not named {ALL_PAIRS!r}: take it from pair_slices."
            )
    return {ALL_PAIRS: np.ones(shape, dtype=bool), **slices}


def _change_cells(found: Reliance, condition: str, part: str = ALL_PAIRS) -> list[Any]:
    """Difference to "both", the bounds of its interval, and the difference relative to "both"."""
    if condition == "both":
        return [None] * 4
    test, both = found.change(condition, part), found.metrics("both", part)[found.metric]
    return [test.difference, test.low, test.high, Percent(test.difference / both) if both else None]
