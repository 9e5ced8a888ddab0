"""Evaluate models and baselines on notes and their related pairs: what they find, how sure that is, and whether they
look at the picture.

    python -m evaluation.run --model NoteLLM-2=checkpoints/best --splits splits --output reports/mine
    python -m evaluation.run --model DIR --notes notes.parquet --pairs pairs.parquet --baselines bm25 tfidf --output DIR

Each model answers three times: with text and image, with the text alone, and with the image alone.
"""

import argparse
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from datasets import Dataset
from transformers import AutoModel

from evaluation.attention import SPANS, AttentionCurves, attention_curves, plot_attention
from evaluation.baselines import BASELINES, BaselineInputs, NotesAndRelated
from evaluation.collaborative import load_train_viewers
from evaluation.encoders import default_device
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
from evaluation.sheet import choose_queries, picture_sheet
from evaluation.slices import pair_slices, popularity_of_notes, short_notes, topics_of
from evaluation.systems import (
    Measured,
    baseline_systems,
    chance_row,
    comparison_table,
    measure,
    model_systems,
    slice_table,
)
from modeling_notellm2 import NoteLLM2Model, NoteLLM2PreTrainedModel  # registers it with AutoModel
from modeling_notellm2.processing_notellm2 import Language
from pairs.subsets import load_subsets
from pairs.tables import load_notes, load_pairs, pair_positions, related_indices
from train.features import VisionFeatureStore, VisionFeatureTable

logger = logging.getLogger(__name__)

SHEET_SYSTEMS = 4
"""Systems that the picture sheet shows side by side, at most."""


@dataclass(frozen=True)
class NotesToFind:
    """The notes to evaluate on.

    Attributes:
        table: their table.
        notes: the same, as a list.
        task: what is to be found where.
        subsets: of their pairs, as from `pairs.subsets.load_subsets`; None: unknown.
    """

    table: Dataset
    notes: list[dict[str, Any]]
    task: Task
    subsets: Dataset | None


def load_notes_to_find(
    notes: str | Path, pairs: str | Path, protocol: Protocol = "graph", subsets: Dataset | None = None
) -> NotesToFind:
    """Read the tables of notes and pairs (see `pairs.tables`)."""
    table = load_notes(notes)
    positions, _rank = pair_positions(list(table["note_id"]), load_pairs(pairs))
    return NotesToFind(table, list(table), make_task(protocol, positions, len(table)), subsets)


def load_notes_and_related(folder: Path) -> NotesAndRelated:
    """Read a folder with notes.arrow and pairs.parquet, as `pairs.split` writes it."""
    table = load_notes(folder / "notes.arrow")
    return NotesAndRelated(list(table), related_indices(list(table["note_id"]), load_pairs(folder / "pairs.parquet")))


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
) -> list[ReportRow]:
    """The rows of a model, one a modality: `model_systems`, measured over the whole graph of related notes."""
    systems = model_systems(
        model, notes, name=name, modalities=modalities, batch_size=batch_size, vision_features=vision_features
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
    """The rows of baselines, in the order asked for, measured over the whole graph of related notes.

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
    systems = baseline_systems([name for name in names if name != "chance"], BaselineInputs(notes, **inputs))
    rows = {one.system.name: one.row for one in measure(systems, task, ks)}
    return [chance_row(task, ks) if name == "chance" else rows[name] for name in names]


def load_model(name_or_path: str) -> NoteLLM2PreTrainedModel:
    """Load a model from a folder or the Hub, onto the GPU if there is one.

    Raises:
        OSError: there is none, or it is of another kind.
    """
    model = AutoModel.from_pretrained(name_or_path)
    if not isinstance(model, NoteLLM2PreTrainedModel):
        raise OSError(f"{name_or_path!r} is a {type(model).__name__}, no NoteLLM-2: train it first, or use --llm.")
    return model.eval().to(default_device())


def make_sections(
    test: NotesToFind,
    measured: Sequence[Measured],
    reliances: Mapping[str, Reliance],
    curves: Mapping[str, AttentionCurves],
    *,
    reference: Measured | None,
    ks: Sequence[int],
    num_sheet_queries: int,
    seed: int,
) -> list[Section]:
    """The parts of the report after the main table: comparisons, slices, reliance, attention, and the picture sheet."""
    metric, sections = f"recall@{ks[0]}", []
    if reference is not None and len(measured) > 1:
        sections.append(Section("How sure", tables=[comparison_table(measured, reference, metric, seed)]))
    if measured:
        slices = slices_of(test, measured[0])
        sections.append(Section("Slices", tables=[slice_table(measured, slices, metric, ks)]))
    for name, found in reliances.items():
        figures = []
        if found.fusion_weights is not None:
            caption = f"Weight of the image in late fusion, {name}"
            alt = f"Histogram of {len(found.fusion_weights)} fusion weights, mean {found.fusion_weights.mean():.3f}"
            figures.append(Figure.from_matplotlib(plot_fusion_weights(found.fusion_weights), caption, alt))
        sections.append(Section(f"Does {name} look at the picture?", found.conclusion, reliance_tables(found), figures))
    if curves:
        caption = "Saliency and attention share by layer: what the prompt's last position and n_v's read"
        alt = "Curves by layer for image, text and the rest; the table above has the numbers of the last position"
        figure = Figure.from_matplotlib(plot_attention(curves), caption, alt)
        sections.append(Section("Where the LLM looks", figures=[figure], tables=attention_tables(curves)))
    if num_sheet_queries and measured:
        chosen = sheet_systems(measured)
        queries = choose_queries({one.system.label: one.ranks for one in chosen}, num_sheet_queries, seed=seed)
        scores = {one.system.label: one.system.scores for one in chosen}
        sheet = picture_sheet(test.notes, test.task.related, scores, queries, candidates=test.task.candidates)
        text = (
            "Half of these queries were drawn where systems differ, a quarter where all do equally well, a quarter "
            "where none finds anything: worth a look, and no fair sample."
        )
        sections.append(Section("Look for yourself", [text], sheet=sheet))
    return sections


def slices_of(test: NotesToFind, measured: Measured) -> dict[str, np.ndarray]:
    """The slices of the test's pairs, in the order of `measured.ranks`."""
    popularity = None if test.subsets is None else popularity_of_notes(test.table["note_id"][:], test.subsets)
    return pair_slices(measured.ranks, short_notes(test.table), popularity, [topics_of(note) for note in test.notes])


def sheet_systems(measured: Sequence[Measured]) -> list[Measured]:
    """The systems to look at: of each the row that sees most, models before baselines, `SHEET_SYSTEMS` at most."""
    widest: dict[str, Measured] = {}
    for one in measured:
        kept = widest.get(one.system.name)
        if kept is None or one.system.modality == "both":
            widest[one.system.name] = one
    models = [one for name, one in widest.items() if name not in BASELINES]
    baselines = [one for name, one in widest.items() if name in BASELINES]
    return (models + baselines)[:SHEET_SYSTEMS]


def attention_tables(curves: Mapping[str, AttentionCurves]) -> list[Table]:
    """The numbers of `plot_attention`, of the last position: a line a system and layer."""
    columns = ["system", "layer", *(f"{kind} {span}" for kind in ("saliency", "attention") for span in SPANS)]
    rows: list[list[Any]] = [
        [name, layer + 1, *saliency.tolist(), *share.tolist()]
        for name, found in curves.items()
        for layer, (saliency, share) in enumerate(zip(found.note.normalized_saliency, found.note.share, strict=True))
    ]
    note = "Saliency: mean of |Σ_heads A ⊙ ∂L/∂A| over a kind's flows, normalised to add up to 1. Attention: its sum."
    return [Table(columns, rows, caption="What the last position reads, by layer", note=note)]


def load_inputs(options: argparse.Namespace) -> tuple[NotesToFind, BaselineInputs]:
    """The notes to evaluate on, and what the baselines are made of.

    Raises:
        FileNotFoundError: a table is missing.
        ValueError: a table, or a combination of options, is of no use.
    """
    notes, pairs, subsets, train, validation = options.notes, options.pairs, None, options.train, options.validation
    if options.splits is not None:
        notes, pairs = options.splits / "test" / "notes.arrow", options.splits / "test" / "pairs.parquet"
        subsets = load_subsets(options.splits, "test")
        train, validation = train or options.splits / "train", validation or options.splits / "validation"
    found = load_notes_to_find(notes, pairs, options.protocol, subsets)
    viewers = None
    if options.train_views is not None:
        if options.splits is None:
            raise ValueError("--train-views needs --splits: the folder whose splits.json says what training saw.")
        viewers = load_train_viewers(options.splits, options.train_views, found.table["note_id"][:])
    needs_training = any("train" in BASELINES[name].needs for name in options.baselines if name != "chance")
    inputs = BaselineInputs(
        found.notes,
        text_encoder=options.text_encoder,
        vision=options.vision,
        clip=options.clip,
        llm=options.llm,
        language=options.language,
        train=load_notes_and_related(train) if needs_training and train is not None else None,
        validation=load_notes_and_related(validation) if needs_training and validation is not None else None,
        viewers=viewers,
        head=HeadSettings(steps=options.head_steps, seed=options.seed),
        batch_size=options.batch_size,
    )
    return found, inputs


def opened_models(options: argparse.Namespace) -> Iterator[tuple[str, str, Any]]:
    """(name, path, model) of each model that the options name, one in memory at a time."""
    for name, path, is_released in named_models(options):
        try:
            if is_released:
                model = MultimodalLLM.from_backbone(path, max_image_pixels=options.max_image_pixels, embedding_dim=None)
                yield name, path, model.eval().to(default_device())
                del model
            else:
                yield name, path, load_model(path)
        except OSError as error:  # no such folder, and no such repository on the Hub
            raise SystemExit(f"--model {path}: {error}") from error


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
    return min(sum(note.get("image") is not None for note in notes), sum(bool(note_text(note)) for note in notes)) > 1


def find_reference(
    parser: argparse.ArgumentParser, wanted: str | None, measured: Sequence[Measured], models: Sequence[str]
) -> Measured | None:
    """The system that others are compared with: by name, or the first row of the first model that was given."""
    if wanted is None:
        wanted = next(iter(models), None)
    for one in measured:
        if wanted in (one.system.name, one.system.label):
            return one
    if wanted is None:
        return None
    parser.error(f"--compare-to {wanted!r} is none of {', '.join(one.system.label for one in measured)}")


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
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
    data.add_argument("--pairs", help="table of related pairs among these notes")
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
        help="the log of views that --splits were made from, for popularity and item-cf, which see its training part",
    )
    data.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="graph",
        help="graph: every note with a related note is a query, all its related notes are to be found among all "
        "others; paper: one related note a query, queries are not in the pool",
    )
    encoders = parser.add_argument_group("what baselines are made of")
    encoders.add_argument("--text-encoder", metavar="PATH", help="sentence-transformers model of *-text and head-both")
    encoders.add_argument("--vision", metavar="PATH", help="vision tower of *-image, head-both and head-llm-both")
    encoders.add_argument("--clip", metavar="PATH", help="dual encoder, such as CLIP or SigLIP, of clip-*")
    encoders.add_argument("--llm", metavar="PATH", help="decoder LLM of zero-shot-llm, head-llm and head-llm-both")
    encoders.add_argument("--language", choices=get_args(Language), default="en", help="of the prompt that --llm reads")
    encoders.add_argument("--head-steps", type=int, default=HeadSettings.steps, help="training steps of head-*")
    how = parser.add_argument_group("how")
    how.add_argument("--ks", nargs="+", type=int, default=[10, 100], metavar="K", help="cuts of the metrics")
    how.add_argument(
        "--modalities", nargs="+", choices=MODALITIES, default=list(MODALITIES), help="what the models see of a note"
    )
    how.add_argument(
        "--compare-to",
        metavar="NAME",
        help="the row that others are tested against: a name, or 'NAME (text)'; else the first row of the first model",
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; `arguments` default to the process's own."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if not (options.model or options.baselines or options.zero_shot_multimodal_llm):
        parser.error("nothing to evaluate: give --model or --baselines")
    if (options.splits is None) == (options.notes is None or options.pairs is None):
        parser.error("give --splits, or --notes and --pairs")
    names = [*options.baselines, *(name for name, _path, _is_released in named_models(options))]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        parser.error(f"two rows would be called {repeated[0]!r}: give names of their own, --model NAME=DIR")
    if options.compare_to is not None and re.sub(r" \(.*\)$", "", options.compare_to) not in names:
        parser.error(f"--compare-to {options.compare_to!r} is none of {', '.join(names)}")
    if options.attention_pairs == 1:
        parser.error("--attention-pairs 1: one pair has no negatives to compare with; give 2 or more, or 0")
    if min(options.ks) < 1 or len(set(options.ks)) < len(options.ks):
        parser.error(f"--ks must be distinct integers of at least 1, got {options.ks}")
    try:
        test, inputs = load_inputs(options)
        names = [name for name in options.baselines if name != "chance"]
        systems = baseline_systems(names, inputs)
    except (ValueError, FileNotFoundError, ImportError) as error:
        parser.error(str(error))
    reliances: dict[str, Reliance] = {}
    curves: dict[str, AttentionCurves] = {}
    model_names = []
    for name, path, model in opened_models(options):
        model_names.append(name)
        features = None
        if options.vision_features_dir is not None and isinstance(model, NoteLLM2Model) and model.config.has_vision:
            logger.info("%s: what its tower sees in the images of %s", name, path)
            features = VisionFeatureStore(options.vision_features_dir, model).table(test.table, options.batch_size)
        own = model_systems(
            model,
            test.notes,
            name=name,
            modalities=options.modalities,
            batch_size=options.batch_size,
            vision_features=features,
        )
        systems += own
        if options.reliance and {one.modality for one in own} == set(MODALITIES) and has_two_of_each(test.notes):
            reliances[name] = reliance(
                model,
                test.notes,
                test.task.related,
                options.ks,
                options.batch_size,
                features,
                slices_of(test, measure(own[:1], test.task, options.ks)[0]),
                test.task.candidates,
                embeds={one.modality: one.scores for one in own if isinstance(one.scores, np.ndarray)},
                seed=options.seed,
            )
        if options.attention_pairs and isinstance(model, NoteLLM2Model) and model.connector is not None:
            logger.info("%s: attention", name)
            curves[name] = attention_curves(
                model, test.notes, test.task.related, max_pairs=options.attention_pairs, seed=options.seed
            )
    measured = measure(systems, test.task, options.ks, intervals=True, seed=options.seed)
    rows = [chance_row(test.task, options.ks)] if "chance" in options.baselines else []
    rows += [one.row for one in measured]
    sections = make_sections(
        test,
        measured,
        reliances,
        curves,
        reference=find_reference(parser, options.compare_to, measured, model_names),
        ks=options.ks,
        num_sheet_queries=options.sheet_queries,
        seed=options.seed,
    )
    queries = sum(len(positions) > 0 for positions in test.task.related)
    facts = collect_facts(notes=len(test.notes), queries=queries, protocol=options.protocol, seed=options.seed)
    write_report(options.output, rows, facts, sections)
    lines = [f"{name}: {sentence}" for name, found in reliances.items() for sentence in found.conclusion]
    sys.stdout.write("\n".join(["", text_table(rows), *lines, "", f"Report: {options.output / 'report.html'}", ""]))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    main()
