"""Evaluate models and baselines on notes and their related pairs: what they find, how sure that is, and whether they
look at the picture.

    python -m evaluation.run --model NoteLLM-2=checkpoints/best --splits splits --output reports/mine
    python -m evaluation.run --model DIR --notes notes.parquet --pairs pairs.parquet --baselines bm25 tfidf --output DIR

Each model answers three times: with text and image, with the text alone, and with the image alone.
"""

import argparse
import functools
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import datasets.utils.logging
import huggingface_hub.utils.logging
import numpy as np
import torch
import transformers.utils.logging
import yaml
from datasets import Dataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from evaluation.attention import SPANS, AttentionCurves, attention_curves, plot_attention
from evaluation.baselines import BASELINES, BaselineInputs, NotesAndRelated, check_baselines
from evaluation.checkpoints import check_model, is_missing_folder, load_model
from evaluation.collaborative import load_train_viewers
from evaluation.encoders import check_clip, check_llm, check_tower, default_device
from evaluation.head import HeadSettings
from evaluation.lexical import note_text
from evaluation.modality import (
    MODALITIES,
    Modality,
    NoteEncoder,
    Reliance,
    plot_fusion_weights,
    reliance,
    reliance_tables,
)
from evaluation.multimodal_llm import MultimodalLLM  # registers it with AutoModel
from evaluation.protocols import PROTOCOLS, Protocol, Task, make_task
from evaluation.report import Figure, ReportRow, Section, Table, collect_facts, text_table, write_report
from evaluation.sheet import choose_queries, picture_sheet, say_drawn
from evaluation.slices import pair_slices, popularity_of_notes, short_notes, topics_of
from evaluation.systems import (
    Measured,
    System,
    baseline_systems,
    chance_row,
    compare,
    comparison_table,
    knows_nothing,
    measure,
    model_systems,
    say_differences,
    say_knows_nothing,
    slice_table,
)
from modeling_notellm2 import NoteError, NoteLLM2Model
from modeling_notellm2.processing_notellm2 import Language, has_image
from pairs.command import CommandParser, interruption_said
from pairs.subsets import load_subsets
from pairs.tables import (
    ANYWHERE,
    IMAGE_ROOT_HELP,
    load_notes,
    load_pairs,
    load_written_notes,
    pair_positions,
    related_indices,
)
from train.data import without_bad_images
from train.features import VisionFeatureStore, VisionFeatureTable

logger = logging.getLogger(__name__)

BadImages = Literal["raise", "text-only"]

SHEET_SYSTEMS = 4
"""Systems that the picture sheet shows side by side, at most."""


@dataclass(frozen=True)
class NotesToFind:
    """The notes to evaluate on.

    Attributes:
        table: their table.
        notes: the same, as a list.
        task: what is to be found where.
        slices: name ─► (P,) bool, of the task's pairs in the order of `evaluation.metrics.Ranks`.
        known: for each note the positions of all its related notes, of which the task may ask for some alone.
    """

    table: Dataset
    notes: list[dict[str, Any]]
    task: Task
    slices: dict[str, np.ndarray]
    known: Sequence[np.ndarray]


def load_notes_to_find(
    notes: str | Path,
    pairs: str | Path,
    protocol: Protocol = "graph",
    subsets: Dataset | None = None,
    bad_images: BadImages | None = None,
    image_root: str | Path | None = None,
) -> NotesToFind:
    """Read the tables of notes and pairs (see `pairs.tables`), and try all images.

    Args:
        notes, pairs: the tables.
        protocol: what is asked for.
        subsets: of the pairs, as from `pairs.subsets.load_subsets`; None: unknown.
        bad_images: what becomes of a note whose image cannot be read: an error, or a note without image. None: images
            are not tried.
        image_root: see `pairs.tables.load_notes`.

    Raises:
        NoteError: an image cannot be read.
        ValueError: see `pairs.tables`.
    """
    table = load_notes(notes, image_root)
    note_ids = list(table["note_id"])
    positions, _rank = pair_positions(note_ids, load_pairs(pairs))
    task = make_task(protocol, positions, len(table))
    if not any(map(len, task.related)):
        raise ValueError(f"{pairs}: no pair of notes to measure with: give a table of related notes among {notes}.")
    found, is_changed = _tried(list(table), bad_images)
    if is_changed:  # what a tower's store reads
        table = table.remove_columns("image").add_column("image", [note["image"] for note in found])
    popularity = None if subsets is None else popularity_of_notes(note_ids, subsets)
    topics = [topics_of(note) for note in found]
    slices = pair_slices(*task.pairs, short_notes(table), popularity, topics)
    return NotesToFind(table, found, task, slices, make_task("graph", positions, len(table)).related)


def load_notes_and_related(folder: Path, bad_images: BadImages | None = None) -> NotesAndRelated:
    """Read a folder with notes.arrow and pairs.parquet, as `pairs.split` writes it; `bad_images` as in
    `load_notes_to_find`."""
    table = load_written_notes(folder / "notes.arrow")
    related = related_indices(list(table["note_id"]), load_pairs(folder / "pairs.parquet"))
    return NotesAndRelated(_tried(list(table), bad_images)[0], related)


def _tried(notes: list[dict[str, Any]], bad_images: BadImages | None) -> tuple[list[dict[str, Any]], bool]:
    """The notes with the images that can be read, and whether some cannot."""
    if bad_images is None:
        return notes, False
    found, bad = without_bad_images(notes)
    for row, error in bad.items():
        note_id = notes[row]["note_id"]
        if bad_images == "raise":
            raise NoteError(f"note_id {note_id!r}: {error} Or take it as a note without: --bad-images text-only")
        logger.warning("note_id %r: %s", note_id, error)
    return found, bool(bad)


def evaluate_model(
    model: NoteEncoder,
    notes: Sequence[Mapping[str, Any]],
    related: Sequence[np.ndarray],
    *,
    name: str,
    ks: Sequence[int] = (10, 100),
    modalities: Iterable[Modality] = MODALITIES,
    batch_size: int = 32,
    vision_features: VisionFeatureTable | None = None,
    composition: Mapping[str, str | None] | None = None,
) -> list[ReportRow]:
    """The rows of a model, one a modality: `model_systems`, measured over the whole graph of related notes."""
    systems = model_systems(
        model,
        notes,
        name=name,
        modalities=modalities,
        batch_size=batch_size,
        vision_features=vision_features,
        composition=composition,
    )
    return [one.row for one in measure(systems, Task(related), ks)]


def evaluate_baselines(
    notes: Sequence[Mapping[str, Any]],
    related: Sequence[np.ndarray],
    baselines: Iterable[str],
    *,
    ks: Sequence[int] = (10, 100),
    **inputs: Any,
) -> list[ReportRow]:
    """The rows of baselines, in the order asked for, measured over the whole graph of related notes. One that knows
    nothing of these notes (`evaluation.systems.knows_nothing`) has none, which is logged.

    Args:
        notes: N notes, which are queries and pool.
        related: for each note the positions of its related notes, integers; may be empty.
        baselines: "chance", or names of `evaluation.baselines.BASELINES`.
        ks: cuts of the metrics.
        inputs: further fields of `BaselineInputs`.

    Raises:
        ValueError: a baseline is unknown, or misses what it needs.
    """
    names, task = list(baselines), Task(related)
    systems = []
    for system in baseline_systems([name for name in names if name != "chance"], BaselineInputs(notes, **inputs)):
        if knows_nothing(system, task):
            logger.warning("%s", say_knows_nothing(system, len(notes)))
        else:
            systems.append(system)
    rows = {one.system.name: one.row for one in measure(systems, task, ks)}
    rows["chance"] = chance_row(task, ks)
    return [rows[name] for name in names if name in rows]


def make_sections(
    test: NotesToFind, findings: "Findings", reference: Measured | None, num_sheet_queries: int, seed: int
) -> list[Section]:
    """The parts of the report after the main table: what failed, comparisons, slices, reliance, attention, and the
    picture sheet. A part that fails is one more failure.

    Args:
        test: the notes.
        findings: what was measured.
        reference: the system that others are compared with; None: none.
        num_sheet_queries: queries of the picture sheet; 0: none.
        seed: of the resampling, and of the sheet's queries.
    """
    measured, ks = findings.measured, findings.ks
    metric = f"recall@{ks[0]}"
    parts: dict[str, Callable[[], Section]] = {}
    if reference is not None and len(measured) > 1:
        parts["How sure are we?"] = lambda: comparison_section(measured, reference, metric, seed)
    if measured and not all(mask.all() for mask in test.slices.values()):
        parts["Slices"] = lambda: Section("Slices", tables=[slice_table(measured, test.slices, metric, ks)])
    for name, found in findings.reliances.items():
        parts[f"Does {name} look at the picture?"] = functools.partial(reliance_section, name, found)
    if findings.curves:
        parts["Where the LLM looks"] = lambda: attention_section(findings.curves)
    if num_sheet_queries and measured:
        parts["Look for yourself"] = lambda: sheet_section(test, measured, reference, ks, num_sheet_queries, seed)
    sections = []
    for title, make in parts.items():
        with findings.noting_failures(title):
            sections.append(make())
    first = {"What could not be measured": list(findings.failures), "What to know of the rows": findings.remarks}
    return [Section(title, text) for title, text in first.items() if text] + sections


def comparison_section(measured: Sequence[Measured], reference: Measured, metric: str, seed: int) -> Section:
    """Which differences from the reference are more than luck: sentences, and the tests behind them."""
    tests, label = compare(measured, reference, metric, seed), reference.system.label
    tables = [comparison_table(tests, label, metric)] if len(reference.ranks.queries) > 1 else []
    return Section("How sure are we?", say_differences(tests, label, metric), tables)


def reliance_section(name: str, found: Reliance) -> Section:
    """Whether a model looks at the picture: sentences, tables, and its fusion weights."""
    figures = []
    if found.fusion_weights is not None:
        caption = f"Weight of the image in late fusion, {name}"
        alt = f"Histogram of {len(found.fusion_weights)} fusion weights, mean {found.fusion_weights.mean():.3f}"
        figures.append(Figure.from_matplotlib(plot_fusion_weights(found.fusion_weights), caption, alt))
    return Section(f"Does {name} look at the picture?", found.conclusion, reliance_tables(found), figures)


def attention_section(curves: Mapping[str, AttentionCurves]) -> Section:
    """Where the LLM looks, layer by layer, and what to make of it."""
    text = [
        "n_m is the note's state, read at the prompt's last position: the note's embedding is made of it. n_v is the "
        "image's state, read just before <IMG_EMB>, where the mICL prompt has shown the image and not yet the text; "
        "other prompts have none.",
        "Attention: where the LLM looks. Saliency: where looking changes the loss. Neither says that the image helps: "
        "that is what the exchange of images tells.",
    ]
    caption = "Saliency and attention share by layer: what the prompt's last position and n_v's read"
    alt = "Curves by layer for image, text and the rest; the table above has the numbers of the last position"
    figure = Figure.from_matplotlib(plot_attention(curves), caption, alt)
    return Section("Where the LLM looks", text, attention_tables(curves), [figure])


def sheet_section(
    test: NotesToFind,
    measured: Sequence[Measured],
    reference: Measured | None,
    ks: Sequence[int],
    num_queries: int,
    seed: int,
) -> Section:
    """What `sheet_systems` answer to some notes."""
    chosen = sheet_systems(measured, reference, f"recall@{ks[0]}")
    queries = choose_queries({one.system.label: one.ranks for one in chosen}, num_queries, seed=seed)
    scores = {one.system.label: one.system.scores for one in chosen}
    sheet = picture_sheet(
        test.notes, test.task.related, scores, queries, candidates=test.task.candidates, known=test.known
    )
    text = say_drawn(len(chosen))
    left_out = {one.system.name for one in measured} - {one.system.name for one in chosen}
    if left_out:
        text += (
            f" Not shown, as the sheet has room for {SHEET_SYSTEMS}, the reference, then models, then baselines, the "
            f"better before the worse: {', '.join(sorted(left_out))}."
        )
    return Section("Look for yourself", [text], sheet=sheet)


def sheet_systems(measured: Sequence[Measured], reference: Measured | None, metric: str) -> list[Measured]:
    """The systems to look at, `SHEET_SYSTEMS` at most: of each the row that sees most; the reference, then models, then
    baselines, the better before the worse."""
    widest: dict[str, Measured] = {}
    for one in measured:
        kept = widest.get(one.system.name)
        if kept is None or one.system.modality == "both":
            widest[one.system.name] = one
    first = None if reference is None else reference.system.name

    def order(one: Measured) -> tuple[bool, bool, float]:
        name = one.system.name
        return name != first, name in BASELINES, -one.row.metrics[metric]

    return sorted(widest.values(), key=order)[:SHEET_SYSTEMS]


def attention_tables(curves: Mapping[str, AttentionCurves]) -> list[Table]:
    """The numbers of `plot_attention`, of the last position: a line a system and layer."""
    columns = ["system", "layer", *(f"{kind} {span}" for kind in ("saliency", "attention") for span in SPANS)]
    rows: list[list[Any]] = [
        [name, layer + 1, *saliency.tolist(), *share.tolist()]
        for name, found in curves.items()
        for layer, (saliency, share) in enumerate(zip(found.note.normalized_saliency, found.note.share, strict=True))
    ]
    name, layer, *values = rows[-1]
    note = (
        f"How to read it: of what the last position reads that matters in layer {layer} of {name}, {values[0]:.2f} "
        f"comes from the image, {values[1]:.2f} from the text and {values[2]:.2f} from the rest. Saliency, "
        "|Σ_heads A ⊙ ∂L/∂A|, is attention times what the loss would change with it, a mean over the flows; a line "
        "adds up to 1. Attention says only where the position looks. Other: the prompt's own words, <IMG_EMB>, the "
        "begin-of-sequence token and the position itself; in saliency also flows between other positions."
    )
    return [Table(columns, rows, caption="What the last position reads, by layer", note=note)]


def load_inputs(options: argparse.Namespace) -> tuple[NotesToFind, BaselineInputs]:
    """The notes to evaluate on, and what the baselines are made of.

    Raises:
        FileNotFoundError: a table is missing.
        ValueError: a table, or a combination of options, is of no use.
    """
    notes, pairs, subsets, train, validation = options.notes, options.pairs, None, options.train, options.validation
    image_root = options.image_root
    if options.splits is not None:
        notes, pairs = options.splits / "test" / "notes.arrow", options.splits / "test" / "pairs.parquet"
        if not notes.is_file():
            inside = options.splits / "data"
            hint = f"; {inside} is one" if (inside / "test" / "notes.arrow").is_file() else ""
            raise ValueError(f"--splits {options.splits}: no folder that pairs.split wrote (no test/notes.arrow){hint}")
        subsets = load_subsets(options.splits, "test")
        image_root = ANYWHERE  # they were checked when the splits were made
        train, validation = train or options.splits / "train", validation or options.splits / "validation"
    images = [name for name in options.baselines if name != "chance" and BASELINES[name].modality in ("image", "both")]
    bad_images = options.bad_images if images or named_models(options) else None
    trained_on = options.bad_images if any("train" in BASELINES[name].needs for name in images) else None
    found = load_notes_to_find(notes, pairs, options.protocol, subsets, bad_images, image_root)
    viewers = None
    if options.train_views is not None:
        if options.splits is None:
            raise ValueError("--train-views needs --splits: the folder whose splits.json says what training saw.")
        viewers = load_train_viewers(options.splits, options.train_views, found.table["note_id"][:])
    needs_training = any("train" in BASELINES[name].needs for name in options.baselines if name != "chance")

    def read(folder: Path | None) -> NotesAndRelated | None:
        return load_notes_and_related(folder, trained_on) if needs_training and folder is not None else None

    inputs = BaselineInputs(
        found.notes,
        text_encoder=options.text_encoder,
        vision=options.vision,
        clip=options.clip,
        llm=options.llm,
        language=options.language,
        train=read(train),
        validation=read(validation),
        viewers=viewers,
        head=HeadSettings(steps=options.head_steps, seed=options.seed),
        dtype=getattr(torch, options.dtype),
        batch_size=options.batch_size,
    )
    return found, inputs


@dataclass
class Findings:
    """What was measured so far.

    Attributes:
        ks: cuts of the metrics.
        seed: of the bootstrap.
        measured: the systems, each with its ranks.
        reliances: name of a model ─► how far it relies on text and on images.
        curves: name of a model ─► where its LLM looks.
        failures: what could not be measured, and why; the rest is worth a report all the same.
        ignorant: systems that know nothing of these notes and are not measured (`evaluation.systems.knows_nothing`).
        notices: what else the reader must know.
    """

    ks: Sequence[int]
    seed: int = 0
    measured: list[Measured] = field(default_factory=list)
    reliances: dict[str, Reliance] = field(default_factory=dict)
    curves: dict[str, AttentionCurves] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    ignorant: list[System] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def remarks(self) -> list[str]:
        """What the reader of a row, or of one that is not there, must know."""
        sentences = list(self.notices)
        sentences += [
            f"{one.system.name}: nobody viewed {cold} notes in training; among those a fixed random order decides."
            for one in self.measured
            if (cold := one.system.details.get("cold_notes"))
        ]
        pool = max((int(one.ranks.pool.max()) for one in self.measured), default=0)
        sentences += [f"A pool holds {pool} notes: all are among the first {k}." for k in self.ks if pool and k >= pool]
        return sentences

    def add(self, systems: Iterable[System], task: Task) -> None:
        """Measure systems; one that cannot be ranked, as its scores are not finite, is a failure, and of one that knows
        nothing there is a notice."""
        for system in systems:
            with self.noting_failures(system.label):
                if knows_nothing(system, task):
                    self.ignorant.append(system)
                    self.notices.append(say_knows_nothing(system, len(task.related)))
                    continue
                self.measured += measure([system], task, self.ks, intervals=True, seed=self.seed)

    @contextmanager
    def noting_failures(self, what: str) -> Iterator[None]:
        """Keep the failure of a part, whatever it is, from losing what other parts found, perhaps after hours."""
        try:
            yield
        except Exception as error:
            logger.exception("%s", what)
            self.failures.append(f"{what}: {type(error).__name__}: {error}")


def evaluate_named_model(
    name: str, path: str, is_released: bool, test: NotesToFind, options: argparse.Namespace, findings: Findings
) -> None:
    """Load a model and measure what the options ask for; it is gone when the next one is loaded."""
    model: Any
    dtype = getattr(torch, options.dtype)
    if is_released:
        limits = {"max_image_pixels": options.max_image_pixels, "embedding_dim": None}
        model = MultimodalLLM.from_backbone(path, dtype=dtype, **limits).eval().to(default_device())
        composition = {"multimodal_llm": path}
    else:
        model, composition = load_model(path, dtype), composition_of(path)
    features = None
    if options.vision_features_dir is not None and isinstance(model, NoteLLM2Model) and model.config.has_vision:
        logger.info("%s: what its tower sees in the images of %s", name, path)
        features = VisionFeatureStore(options.vision_features_dir, model).table(test.table, options.batch_size)
    if model.config.vision_config is not None and not any(map(has_image, test.notes)):
        findings.notices.append(f"No note has an image (column image): {name} is measured on its text alone.")
    own = model_systems(
        model,
        test.notes,
        name=name,
        modalities=options.modalities,
        batch_size=options.batch_size,
        vision_features=features,
        composition=composition,
    )
    findings.add(own, test.task)
    ranks = {one.system.modality: one.ranks for one in findings.measured if one.system.name == name}
    sees_all = "both" in ranks and {one.modality for one in own} == set(MODALITIES)
    sees_images = model.config.vision_config is not None and any(map(has_image, test.notes))
    if options.reliance and sees_images and not (sees_all and has_two_of_each(test.notes)):
        findings.notices.append(
            f"What {name} relies on was not measured: it needs --modalities both text image, a row of each, and two "
            "notes with a text and two with an image."
        )
    elif options.reliance and sees_images:
        with findings.noting_failures(f"What {name} relies on"):
            findings.reliances[name] = reliance(
                model,
                test.notes,
                test.task.related,
                options.ks,
                options.batch_size,
                features,
                test.slices,
                test.task.candidates,
                embeds={one.modality: one.scores for one in own if isinstance(one.scores, np.ndarray)},
                ranks=ranks,
                seed=options.seed,
            )
    shows_images = isinstance(model, NoteLLM2Model) and model.connector is not None
    if options.attention_pairs and not shows_images:
        why = "it has no visual tokens" if isinstance(model, NoteLLM2Model) else "it is no NoteLLM-2"
        findings.notices.append(f"Where {name} looks was not measured: {why}.")
    elif options.attention_pairs:
        logger.info("%s: attention", name)
        with findings.noting_failures(f"Where {name} looks"):
            findings.curves[name] = attention_curves(
                model, test.notes, test.task.related, max_pairs=options.attention_pairs, seed=options.seed
            )


def composition_of(path: str) -> dict[str, Any]:
    """The settings that named a checkpoint's backbones, as `train/run.py` keeps them in the folder of the run; none
    where there are none, as in a repository of the Hub."""
    folder = Path(path)
    run = folder.parent if folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") else folder
    if not (run / "settings.yaml").is_file():
        return {}
    try:
        settings = yaml.safe_load((run / "settings.yaml").read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        logger.warning("%s is no YAML, so backbones have no names: %s", run / "settings.yaml", error)
        return {}
    composition = settings.get("composition") if isinstance(settings, dict) else None
    return composition if isinstance(composition, dict) else {}


def named_models(options: argparse.Namespace) -> list[tuple[str, str, bool]]:
    """Name and path of each model that the options name, and whether it is a released multimodal LLM."""
    released = [named_path(specification) for specification in options.zero_shot_multimodal_llm]
    trained = [named_path(specification) for specification in options.model]
    return [(f"zero-shot {name}", path, True) for name, path in released] + [(*one, False) for one in trained]


def named_path(specification: str) -> tuple[str, str]:
    """`[NAME=]DIR` ─► the name, by default that of the folder, and the path. Folders may have "=" in their names.

    >>> named_path("mine=runs/variant=basic-seed0"), named_path("org/model")
    (('mine', 'runs/variant=basic-seed0'), ('model', 'org/model'))
    """
    name, equals, path = specification.partition("=")
    if not equals or Path(specification).exists():
        return Path(specification).name, specification
    return name, path


def has_two_of_each(notes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether images, and texts, can be exchanged between notes."""
    return min(sum(map(has_image, notes)), sum(bool(note_text(note)) for note in notes)) > 1


def comparable_names(options: argparse.Namespace) -> list[str]:
    """What --compare-to may name: systems, and their rows."""
    names = []
    for name in options.baselines:
        if name != "chance":
            names += [name] if BASELINES[name].modality == "-" else [name, f"{name} ({BASELINES[name].modality})"]
    for name, _path, _is_released in named_models(options):
        names += [name, *(f"{name} ({modality})" for modality in options.modalities)]
    return names


def find_reference(wanted: str | None, findings: Findings, models: Sequence[str]) -> Measured | None:
    """The system that others are compared with: by name, or the first row of the first model that was given; None where
    nobody asked and no model was given, or nothing was measured.

    If the one that was asked for could not be measured, that is one more failure, or a notice where it knows nothing,
    and the first row takes its place.
    """
    name = wanted if wanted is not None else next(iter(models), None)
    for one in findings.measured:
        if name in (one.system.name, one.system.label):
            return one
    if wanted is None or not findings.measured:
        return None
    is_ignorant = any(wanted in (one.name, one.label) for one in findings.ignorant)
    said = findings.notices if is_ignorant else findings.failures
    said.append(f"{wanted} has no row: others are compared with {findings.measured[0].system.label}.")
    return findings.measured[0]


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = CommandParser(
        prog="python -m evaluation.run",
        description="Measure how well models and baselines find the related notes of each note among all others, with "
        "text and image, with the text alone and with the image alone; how sure that is; and how far models rely on "
        "the picture. Writes report.html, report.md and report.json.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    what = parser.add_argument_group("what is evaluated")
    what.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="checkpoint folder or Hub id of a NoteLLM-2, or of a fine-tuned multimodal LLM; NAME is its row's name. "
        "May be given several times",
    )
    what.add_argument(
        "--baselines",
        nargs="*",
        choices=("chance", *BASELINES),
        default=["chance", "bm25"],
        metavar="NAME",
        help="rows to compare with: chance, " + ", ".join(BASELINES) + ". frozen-*, clip-* and zero-shot-llm compare "
        "frozen features, head-* train a small head on them, popularity and item-cf know who viewed what in training",
    )
    what.add_argument(
        "--zero-shot-multimodal-llm",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="a multimodal LLM (BLIP-2, Qwen2-VL, Qwen2.5-VL, Qwen3-VL) as it is, without any training. May be given "
        "several times",
    )
    what.add_argument(
        "--max-image-pixels",
        type=int,
        metavar="N",
        help="scale larger images of a Qwen-VL in --zero-shot-multimodal-llm down to so many pixels (the paper's 448 "
        "by 448: 200704); its own bound is often thousands of tokens an image",
    )
    data = parser.add_argument_group("notes and pairs")
    data.add_argument(
        "--splits",
        type=Path,
        metavar="DIR",
        help="folder that pairs.split wrote: its test notes, pairs and subsets, and train and validation for head-*. "
        "In place of --notes and --pairs",
    )
    data.add_argument("--notes", help="table of notes: a CSV, JSON lines or Parquet file, a folder")
    data.add_argument("--image-root", metavar="DIR", help=IMAGE_ROOT_HELP)
    data.add_argument("--pairs", help="table of related pairs among these notes: note_id, related_note_id")
    data.add_argument(
        "--train",
        type=Path,
        metavar="DIR",
        help="folder with notes.arrow and pairs.parquet, as pairs.split writes it, that head-* train on",
    )
    data.add_argument("--validation", type=Path, metavar="DIR", help="likewise, to choose the best step of head-*")
    data.add_argument(
        "--train-views",
        metavar="LOG",
        help="the log of views that --splits were made from, for popularity and item-cf, which see its training part; "
        "where the splits are by note, nobody has viewed a test note there, and both know nothing",
    )
    data.add_argument(
        "--bad-images",
        choices=("raise", "text-only"),
        default="raise",
        help="what becomes of a note whose image cannot be read, which is tried first: nothing runs, or the note is "
        "one without image",
    )
    data.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="graph",
        help="graph: every note with a related note is a query, all its related notes are to be found among all "
        "others; paper: one related note a query, queries are not in the pool",
    )
    encoders = parser.add_argument_group("what baselines are made of")
    encoders.add_argument(
        "--text-encoder", metavar="PATH", help="sentence-transformers model of frozen-text, head-text, head-both"
    )
    encoders.add_argument(
        "--vision", metavar="PATH", help="vision tower of frozen-image and head-image, -both, -llm-both"
    )
    encoders.add_argument("--clip", metavar="PATH", help="dual encoder, such as CLIP or SigLIP, of clip-*")
    encoders.add_argument("--llm", metavar="PATH", help="decoder LLM of zero-shot-llm, head-llm and head-llm-both")
    encoders.add_argument("--language", choices=get_args(Language), default="en", help="of the prompt that --llm reads")
    encoders.add_argument("--head-steps", type=int, default=HeadSettings.steps, help="training steps of head-*")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--ks",
        nargs="+",
        type=int,
        default=[10, 100],
        metavar="K",
        help="cuts of the metrics; recall at the first is what tests, slices and sentences are about",
    )
    how.add_argument(
        "--modalities", nargs="+", choices=MODALITIES, default=list(MODALITIES), help="what the models see of a note"
    )
    how.add_argument(
        "--compare-to",
        metavar="NAME",
        help="the row that others are tested against: a name, or 'NAME (text)'; else the first row of the first model, "
        "of --zero-shot-multimodal-llm if there is one",
    )
    how.add_argument(
        "--reliance",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure how far models that read images rely on them: images and texts are dropped, shuffled and "
        "swapped, for which the notes are encoded two times more",
    )
    how.add_argument(
        "--attention-pairs",
        type=int,
        default=0,
        metavar="N",
        help="analyse attention and saliency, layer by layer, on so many pairs (0: not at all), with a backward pass",
    )
    how.add_argument(
        "--sheet-queries", type=int, default=12, metavar="N", help="queries of the picture sheet (0: none)"
    )
    how.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights of models and encoders; bfloat16 halves memory and is fast on a GPU, float16 may overflow",
    )
    how.add_argument("--batch-size", type=int, default=32, help="notes encoded at once")
    how.add_argument(
        "--vision-features-dir",
        metavar="DIR",
        help="keep here what the tower of a --model sees in images, so that it runs once for all modalities, and for "
        "all models that share it; train/run.py takes the same folder",
    )
    how.add_argument("--seed", type=int, default=0, help="seed of head-*, of the bootstrap, of shuffles and draws")
    parser.add_argument("--output", required=True, type=Path, metavar="REPORT_DIR", help="folder for the report")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Refuse what the options say before anything runs, and make the folder of the report.

    Raises:
        OSError: a folder or a model is not there, or the report's cannot be made.
        ValueError: options do not go together, or one is out of range; a model is of another kind.
    """
    if not (options.model or options.baselines or options.zero_shot_multimodal_llm):
        raise ValueError("nothing to evaluate: give --model or --baselines")
    if (options.splits is None) == (options.notes is None or options.pairs is None):
        raise ValueError("give --splits, or --notes and --pairs")
    names = [*options.baselines, *(name for name, _path, _is_released in named_models(options))]
    if repeated := sorted({name for name in options.baselines if options.baselines.count(name) > 1}):
        raise ValueError(f"--baselines names {repeated[0]} twice")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two rows would be called {repeated[0]!r}: give names of their own, --model NAME=DIR")
    if options.compare_to is not None and options.compare_to not in comparable_names(options):
        wrong = f"--compare-to {options.compare_to!r} is none of {', '.join(comparable_names(options))}"
        if options.compare_to == "chance":
            wrong += "; chance is a computed expectation, and has no values of single queries to test others against"
        raise ValueError(wrong)
    if options.attention_pairs == 1:
        raise ValueError("--attention-pairs 1: one pair has no negatives to compare with; give 2 or more, or 0")
    if min(options.ks) < 1 or len(set(options.ks)) < len(options.ks):
        raise ValueError(f"--ks must be distinct integers of at least 1, got {options.ks}")
    if options.attention_pairs and not options.model:
        raise ValueError("--attention-pairs needs a --model, whose LLM is looked into")
    for option in ("text_encoder", "vision", "clip", "llm"):
        if is_missing_folder(getattr(options, option)):
            raise ValueError(f"--{option.replace('_', '-')} {getattr(options, option)}: no such folder")
    for option, check in (("llm", check_llm), ("vision", check_tower), ("clip", check_clip)):
        if getattr(options, option) is not None:
            check(getattr(options, option))
    options.output.mkdir(parents=True, exist_ok=True)  # now, not after hours
    for _name, path, is_released in named_models(options):
        check_model(path, is_released)
    if named_models(options) and options.reliance and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the figures need matplotlib: pip install 'notellm2[report]', or -e '.[report]' in a checkout")


@interruption_said(
    "no report was written (--vision-features-dir keeps what towers saw); give the same command to begin again."
)
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; `arguments` default to the process's own."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    findings = Findings(options.ks, options.seed)
    baselines = [name for name in options.baselines if name != "chance"]
    try:
        check_options(options)
        test, inputs = load_inputs(options)
        check_baselines(baselines, inputs)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for name in baselines:
        with findings.noting_failures(f"Baseline {name}"):
            findings.add(baseline_systems([name], inputs), test.task)
    del inputs  # with its encoder
    for name, path, is_released in named_models(options):
        with findings.noting_failures(name):
            evaluate_named_model(name, path, is_released, test, options, findings)
    # A report has a row: where nothing knows anything, or could be measured, it is chance.
    has_chance = "chance" in options.baselines or not findings.measured
    rows = [chance_row(test.task, options.ks)] if has_chance else []
    rows += [one.row for one in findings.measured]
    reference = find_reference(options.compare_to, findings, [name for name, *_ in named_models(options)])
    sections = make_sections(test, findings, reference, options.sheet_queries, options.seed)
    queries = sum(len(positions) > 0 for positions in test.task.related)
    facts = collect_facts(
        notes=len(test.notes), queries=queries, protocol=options.protocol, dtype=options.dtype, seed=options.seed
    )
    write_report(options.output, rows, facts, sections)
    lines = [f"{name}: {sentence}" for name, found in findings.reliances.items() for sentence in found.conclusion]
    sys.stdout.write("\n".join(["", text_table(rows), *lines, "", f"Report: {options.output / 'report.html'}", ""]))
    if findings.failures:
        sys.exit("\n".join(["Not measured:", *findings.failures]))


def start_logging() -> None:
    """Show this package's log lines from INFO on, each line once: Hugging Face's libraries have handlers of their own,
    and hand lines on to the root's as well. Of the Hub's requests, a line each, only the trouble is shown."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    datasets.utils.logging.disable_propagation()
    huggingface_hub.utils.logging.disable_propagation()
    transformers.utils.logging.disable_propagation()  # it propagates where the variable CI is set
    logging.getLogger("httpx").setLevel(logging.WARNING)


if __name__ == "__main__":
    start_logging()
    main()
