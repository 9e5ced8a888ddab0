"""Systems of one evaluation: what each makes of the notes, how well it ranks them, and how sure that is."""

import functools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedConfig

from evaluation.baselines import BaselineInputs, Scores, baseline_scores, check_baselines, clock_name, timed
from evaluation.encoders import count_parameters
from evaluation.metrics import Ranks, chance_metrics, mean_metrics, metrics_per_query, rank_related
from evaluation.modality import MODALITIES, Modality, NoteEncoder, encode_with_modality
from evaluation.protocols import Task
from evaluation.report import AtMost, Cell, Cost, ReportRow, Table, decimal, short_name
from evaluation.sheet import score_row
from evaluation.significance import (
    LEVEL,
    POWER,
    RESAMPLES,
    PairedTest,
    bootstrap_interval,
    holm,
    paired_test,
    queries_needed,
)
from modeling_notellm2.processing_notellm2 import has_image
from train.features import VisionFeatureTable

logger = logging.getLogger(__name__)

FAR_MORE = 100
"""A difference that only more than so many times the queries at hand would show is too small to matter for these."""


class System(NamedTuple):
    """What one system makes of N notes with one modality.

    Attributes:
        name: of its rows.
        modality: what it sees of a note: "both", "text", "image", or "-" for nothing.
        scores: (N, D) float32 embeddings, compared by their dot product, or a function of scores.
        details: what else is worth keeping, as the number of notes with nothing of the modality.
        cost: what encodes, and what it costs.
    """

    name: str
    modality: str
    scores: Scores
    details: dict[str, Any]
    cost: Cost

    @property
    def label(self) -> str:
        """Name and modality, which together are unique."""
        return f"{self.name} ({self.modality})" if self.modality in MODALITIES else self.name


@dataclass(frozen=True)
class Measured:
    """A system and its ranks.

    Attributes:
        system: the system.
        ranks: of all related notes.
        per_query: metric name ─► (Q,) float64, as `metrics_per_query` gives them.
        intervals: metric name ─► 95 % bootstrap interval of the mean over the queries; empty if not asked for, or of
            one query alone.
    """

    system: System
    ranks: Ranks
    per_query: dict[str, np.ndarray]
    intervals: dict[str, tuple[float, float]]

    @property
    def row(self) -> ReportRow:
        """Its line of the main table."""
        metrics = {name: float(values.mean()) for name, values in self.per_query.items()}
        system, cost = self.system, self.system.cost.copy()
        if isinstance(system.scores, np.ndarray):
            cost["dimensions"] = system.scores.shape[1]
        return ReportRow(system.name, system.modality, metrics, system.details, intervals=self.intervals, cost=cost)


def model_systems(
    model: NoteEncoder,
    notes: Sequence[Mapping[str, Any]],
    *,
    name: str,
    modalities: Iterable[Modality] = MODALITIES,
    batch_size: int = 32,
    vision_features: VisionFeatureTable | None = None,
    composition: Mapping[str, str | None] | None = None,
) -> list[System]:
    """Encode the notes once a modality.

    Args:
        model: anything with `NoteLLM2Model`'s `encode`.
        notes: N notes.
        name: of the system.
        modalities: which of "both", "text" and "image" to leave to the model. One that reads text alone is evaluated
            with "text" alone.
        batch_size: notes encoded at once.
        vision_features: what the model's tower sees in these notes' images, in place of running it.
        composition: settings that named the model's backbones, for `say_parts`.

    Returns:
        One system a modality; `details["blank_notes"]` counts the notes that it leaves with nothing (see
        `evaluation.modality`).
    """
    systems = []
    if model.config.vision_config is None or not any(map(has_image, notes)):
        modalities = ("text",)
    parts: Cost = {"made_of": say_parts(model.config, composition or {})}
    if isinstance(model, torch.nn.Module):
        parts["parameters"] = count_parameters(model)
    for modality in modalities:
        logger.info("%s: encoding the notes, modality: %s", name, modality)
        (embeds, num_blank), seconds = timed(
            functools.partial(encode_with_modality, model, notes, modality, batch_size, vision_features)
        )
        if num_blank:
            logger.warning("%d of %d notes have nothing to encode with %r.", num_blank, len(notes), modality)
        cost: Cost = {**parts, "notes": len(notes)}
        cost[clock_name()] = seconds
        if vision_features is not None and modality != "text":
            cost["left_out"] = "images and the tower"
        systems.append(System(name, modality, embeds, {"blank_notes": num_blank}, cost))
    return systems


def say_parts(config: Any, composition: Mapping[str, str | None]) -> str:
    """What a model is made of: the name of each backbone as far as it is known, and its kind.

    Args:
        config: a `NoteLLM2Config` or a `MultimodalLLMConfig`; "" is said of another.
        composition: settings that named the backbones: `llm`, `vision` and `multimodal_llm`. Where they lack one, a
            Hub id that the configuration keeps is its name.

    >>> from modeling_notellm2 import NoteLLM2Config
    >>> say_parts(NoteLLM2Config(), {"llm": "/models/SmolLM2-135M"})
    'LLM SmolLM2-135M (llama)'
    """
    parts = {"multimodal LLM": ("backbone_config", "multimodal_llm")}
    if not hasattr(config, "backbone_config"):
        parts = {"LLM": ("text_config", "llm"), "tower": ("vision_config", "vision")}
    said = []
    for title, (attribute, setting) in parts.items():
        part = getattr(config, attribute, None)
        if isinstance(part, PreTrainedConfig):
            kind = getattr(part, "architecture", part.model_type)  # timm's name of it
            name = composition.get(setting) or part.name_or_path
            said.append(f"{title} {short_name(name)} ({kind})" if name else f"{title} {kind}")
    return ", ".join(said)


def baseline_systems(names: Iterable[str], inputs: BaselineInputs) -> list[System]:
    """Baselines of `evaluation.baselines.BASELINES`, in the order asked for.

    Raises:
        ValueError: a baseline is unknown, or misses what it needs; said before any of them runs.
    """
    names = list(names)
    check_baselines(names, inputs)
    systems = []
    for name in names:
        logger.info("Baseline %s", name)
        systems.append(System(name, *baseline_scores(name, inputs)))
    return systems


def measure(
    systems: Iterable[System], task: Task, ks: Sequence[int], intervals: bool = False, seed: int = 0
) -> list[Measured]:
    """Rank the related notes by each system.

    Args:
        systems: the systems.
        task: what is to be found where.
        ks: cuts of the metrics.
        intervals: whether to bootstrap intervals.
        seed: of the bootstrap.
    """
    measured = []
    for system in systems:
        ranks = rank_related(system.scores, task.related, task.candidates)
        per_query = metrics_per_query(ranks, ks)
        found = {}
        if intervals and len(ranks.queries) > 1:
            found = {name: bootstrap_interval(values, seed=seed) for name, values in per_query.items()}
        measured.append(Measured(system, ranks, per_query, found))
    return measured


def knows_nothing(system: System, task: Task) -> bool:
    """Whether each query scores its whole pool alike, so that ranks are those of the one fixed order of ties: chance,
    drawn once. Queries are asked until one tells notes apart.

    Raises:
        ValueError: scores are NaN or of the wrong shape.
    """
    scores = system.scores
    queries = np.flatnonzero([len(positions) > 0 for positions in task.related])
    in_pool = np.ones(len(task.related), dtype=bool) if task.candidates is None else task.candidates
    if isinstance(scores, np.ndarray):  # a vector of zeros, as of a blank note, scores all notes alike
        queries = queries[scores[queries].any(axis=1)]
    for query in queries.tolist():
        others = in_pool.copy()
        others[query] = False
        row = score_row(system.name, scores, query, len(in_pool))[others]
        if (row != row[:1]).any():
            return False
    return True


def say_knows_nothing(system: System, num_notes: int) -> str:
    """Why a system of which `knows_nothing` is true has no row; `num_notes` are queries and pool."""
    reason = "it scores all notes of a pool alike, so it is chance"
    if system.details.get("cold_notes") == num_notes:
        reason = f"nobody viewed any of the {num_notes} notes in training, so it is chance; split by time to measure it"
    return f"{system.label} knows nothing here and has no row: {reason}."


def chance_row(task: Task, ks: Sequence[int]) -> ReportRow:
    """What a random order is expected to find: exact, and so without an interval."""
    metrics = chance_metrics(task.related, ks, task.candidates)
    return ReportRow("chance", "-", metrics, is_bound=True, cost={"made_of": "a random order"})


def compare(measured: Sequence[Measured], reference: Measured, metric: str, seed: int = 0) -> dict[str, PairedTest]:
    """Every other system minus the reference, query by query, by one metric: label of the system ─► the test.

    The exchanges are so many that the least p-value, 2 / (exchanges + 1), stays below `LEVEL` when `holm` has raised it
    for the number of the tests.
    """
    others = [one for one in measured if one is not reference]
    resamples = max(RESAMPLES, math.ceil(2 * len(others) / LEVEL))
    return {
        other.system.label: paired_test(
            other.per_query[metric], reference.per_query[metric], resamples=resamples, seed=seed
        )
        for other in others
    }


def say_differences(tests: Mapping[str, PairedTest], reference: str, metric: str) -> list[str]:
    """In plain sentences, which differences from the reference are more than luck, by the p-values of `compare` raised
    for their number (`holm`); for the others, how many queries would show them if they are true. One query shows none.

    Args:
        tests: at least one, as from `compare`.
        reference: label of the system that is compared with.
        metric: name of the metric.
    """
    raised = dict(zip(tests, holm([test.p_value for test in tests.values()]), strict=True))
    queries = next(iter(tests.values())).queries
    if queries == 1:
        return [f"One query cannot tell any difference from {reference} from luck: evaluate more of them."]
    more: dict[str, list[str]] = {"worse": [], "better": []}
    luck, same, is_counted = [], [], False
    for label, test in tests.items():
        way = "worse" if test.difference < 0 else "better"
        if test.difference == 0 and not test.deviation > 0:  # NaN of one query
            same.append(label)
        elif test.difference == 0:
            luck.append(f"{label} (equal on average)")
        elif raised[label] <= LEVEL:
            more[way].append(f"{label} (by {decimal(abs(test.difference))})")
        else:
            needed = _needed(test, len(tests))
            luck.append(f"{label} ({decimal(abs(test.difference))} {way}{_say_needed(needed, queries)})")
            is_counted = is_counted or queries < needed <= FAR_MORE * queries
    sentences = [
        f"By {metric}, {way} than {reference}, and by more than luck: {', '.join(labels)}."
        for way, labels in more.items()
        if labels
    ]
    if luck:
        sentences.append(f"Perhaps luck alone, beside {reference} on {queries} queries: {', '.join(luck)}.")
    if same:
        sentences.append(f"The same as {reference} on every query: {', '.join(same)}.")
    count = "one comparison" if len(tests) == 1 else f"{len(tests)} comparisons"
    rule = (
        f"The rule: a difference is more than luck where its p-value, raised for {count} (Holm), is at most {LEVEL}; "
        "the probability that luck is called a difference anywhere here is no more than that, if queries are "
        "independent (see below the tests)."
    )
    if is_counted:
        rule += (
            " The numbers of queries are those that would show such a difference with a probability of "
            f"{100 * POWER:.0f}\u00a0%."
        )
    return [*sentences, rule]


def _needed(test: PairedTest, num_tests: int) -> float:
    """How many queries would show this difference, if it is the true one; NaN where that cannot be told."""
    if not (test.difference and test.deviation > 0):
        return math.nan
    return float(f"{queries_needed(test.deviation, test.difference, LEVEL / num_tests):.2g}")


def _say_needed(needed: float, queries: int) -> str:
    if needed > FAR_MORE * queries:
        return "; too small to matter for these queries"
    return f"; if true, about {needed:,.0f} queries would show it" if needed > queries else ""


def comparison_table(tests: Mapping[str, PairedTest], reference: str, metric: str) -> Table:
    """The tests of `compare`, a line each; `reference` is the label of the system that is compared with."""
    raised = holm([test.p_value for test in tests.values()])
    # Tests of which a bound is known have the least p-values: up to the highest that comes of these all are bounds.
    bound = max((p for p, test in zip(raised, tests.values(), strict=True) if test.is_bound), default=0.0)
    rows: list[list[Cell]] = []
    for (label, found), p in zip(tests.items(), raised, strict=True):
        p_value = AtMost(found.p_value) if found.is_bound else found.p_value
        rows.append([label, found.difference, found.low, found.high, p_value, AtMost(p) if p <= bound < 1 else p])
    return Table(
        ["system", "difference", "low", "high", "p", "p (Holm)"],
        rows,
        caption=f"{metric} minus that of {reference}, on the same queries",
        note="low and high: 95\u00a0% bootstrap interval of the mean difference over queries. p: paired randomisation "
        "test, two-sided, of each comparison alone: of twenty comparisons without any difference one is expected below "
        f"0.05. It has a ≤ where none of the random exchanges, {RESAMPLES} at least, gave so large a difference. p "
        "(Holm): raised for the number of comparisons, as the sentences take it. Interval and p take queries for "
        "independent, which two related notes that are each other's targets are not: where the differences of such two "
        "are alike, luck is called a difference up to three times as often. Neither says what another training run "
        "would give.",
    )


def slice_table(
    measured: Sequence[Measured], slices: Mapping[str, np.ndarray], metric: str, ks: Sequence[int]
) -> Table:
    """One metric of each system on each slice of the pairs; the slices are the lines.

    Args:
        measured: at least one system; all of the same pairs.
        slices: name ─► (P,) bool, as from `evaluation.slices.pair_slices`; none is empty.
        metric: its name.
        ks: the cuts that the metric is among.
    """
    rows: list[list[Cell]] = []
    for name, mask in slices.items():
        parts = [one.ranks.select(mask) for one in measured]
        values = [mean_metrics(part, ks)[metric] for part in parts]
        rows.append([name, len(parts[0].queries), int(mask.sum()), *values])
    return Table(
        ["slice", "queries", "pairs", *(one.system.label for one in measured)],
        rows,
        caption=f"{metric} by slice",
        note="A slice keeps some of the pairs; its queries are searched for among all notes as before. Short: a text "
        "among the shortest quarter. Head, torso, tail: by users in training; cold: by nobody seen there. A slice "
        "without a pair has no line, and of a slice of few queries the value says little.",
    )


__all__ = [
    "Measured",
    "System",
    "baseline_systems",
    "chance_row",
    "compare",
    "comparison_table",
    "knows_nothing",
    "measure",
    "model_systems",
    "say_differences",
    "say_knows_nothing",
    "say_parts",
    "slice_table",
]
