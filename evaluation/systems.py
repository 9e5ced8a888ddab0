"""Systems of one evaluation: what each makes of the notes, how well it ranks them, and how sure that is."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from evaluation.baselines import BaselineInputs, Scores, baseline_scores, check_baselines
from evaluation.metrics import Ranks, chance_metrics, mean_metrics, metrics_per_query, rank_related
from evaluation.modality import MODALITIES, Modality, NoteEncoder, encode_with_modality
from evaluation.protocols import Task
from evaluation.report import Cell, ReportRow, Table
from evaluation.significance import bootstrap_interval, paired_test
from train.features import VisionFeatureTable

logger = logging.getLogger(__name__)


class System(NamedTuple):
    """What one system makes of N notes with one modality.

    Attributes:
        name: of its rows.
        modality: what it sees of a note: "both", "text", "image", or "-" for nothing.
        scores: (N, D) float32 embeddings, compared by their dot product, or a function of scores.
        details: what else is worth keeping, as the number of notes with nothing of the modality.
    """

    name: str
    modality: str
    scores: Scores
    details: dict[str, Any]

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
        intervals: metric name ─► 95 % bootstrap interval of the mean over the queries; empty if not asked for.
    """

    system: System
    ranks: Ranks
    per_query: dict[str, np.ndarray]
    intervals: dict[str, tuple[float, float]]

    @property
    def row(self) -> ReportRow:
        """Its line of the main table."""
        metrics = {name: float(values.mean()) for name, values in self.per_query.items()}
        system = self.system
        return ReportRow(system.name, system.modality, metrics, system.details, intervals=self.intervals)


def model_systems(
    model: NoteEncoder,
    notes: Sequence[Mapping[str, Any]],
    *,
    name: str,
    modalities: Iterable[Modality] = MODALITIES,
    batch_size: int = 32,
    vision_features: VisionFeatureTable | None = None,
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

    Returns:
        One system a modality; `details["blank_notes"]` counts the notes that it leaves with nothing (see
        `evaluation.modality`).
    """
    systems = []
    if model.config.vision_config is None or all(note.get("image") is None for note in notes):
        modalities = ("text",)
    for modality in modalities:
        logger.info("%s: encoding the notes, modality: %s", name, modality)
        embeds, num_blank = encode_with_modality(model, notes, modality, batch_size, vision_features)
        if num_blank:
            logger.warning("%d of %d notes have nothing to encode with %r.", num_blank, len(notes), modality)
        systems.append(System(name, modality, embeds, {"blank_notes": num_blank}))
    return systems


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
        found = {name: bootstrap_interval(values, seed=seed) for name, values in per_query.items()} if intervals else {}
        measured.append(Measured(system, ranks, per_query, found))
    return measured


def chance_row(task: Task, ks: Sequence[int]) -> ReportRow:
    """What a random order is expected to find: exact, and so without an interval."""
    return ReportRow("chance", "-", chance_metrics(task.related, ks, task.candidates))


def comparison_table(measured: Sequence[Measured], reference: Measured, metric: str, seed: int = 0) -> Table:
    """Every other system minus the reference, query by query, by one metric."""
    rows: list[list[Cell]] = []
    for other in measured:
        if other is reference:
            continue
        found = paired_test(other.per_query[metric], reference.per_query[metric], seed=seed)
        rows.append([other.system.label, found.difference, found.low, found.high, found.p_value])
    return Table(
        ["system", "difference", "low", "high", "p"],
        rows,
        caption=f"{metric} minus that of {reference.system.label}, on the same queries",
        note="low and high: 95 % bootstrap interval of the mean difference over queries. p: paired randomisation test, "
        "two-sided, of each comparison alone: of twenty comparisons without any difference one is expected below 0.05. "
        "Both take queries for independent, which two related notes that are each other's targets are not: with such "
        "pairs they are somewhat too sure. Neither says what another training run would give.",
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
        "among the shortest quarter. Head, torso, tail: by users in training; cold: by nobody seen there.",
    )


__all__ = [
    "Measured",
    "System",
    "baseline_systems",
    "chance_row",
    "comparison_table",
    "measure",
    "model_systems",
    "slice_table",
]
