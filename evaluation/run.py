"""Evaluate models and baselines on notes and their related pairs, and write one table.

    python -m evaluation.run --model NoteLLM-2=checkpoints/best --notes notes.parquet --pairs pairs.parquet \\
        --output reports/mine

Each model answers three times: with text and image, with the text alone, and with the image alone.
"""

import argparse
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from transformers import AutoModel

from evaluation.baselines import bm25_scores, default_device, encode_texts, note_text, pooled_image_features
from evaluation.head import HeadSettings, train_head
from evaluation.metrics import chance_metrics, retrieval_metrics
from evaluation.modality import MODALITIES, Modality, NoteEncoder, encode_with_modality
from evaluation.report import ReportRow, collect_facts, text_table, write_report
from modeling_notellm2 import NoteLLM2Model  # registers it with AutoModel
from pairs.tables import load_notes, load_pairs, related_indices
from train.features import VisionFeatureStore, VisionFeatureTable

logger = logging.getLogger(__name__)

Baseline = Literal["chance", "bm25", "frozen-text", "frozen-image", "head-text", "head-image", "head-both"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
_NEEDS_TEXT = {"frozen-text", "head-text", "head-both"}
_NEEDS_IMAGE = {"frozen-image", "head-image", "head-both"}
_NEEDS_TRAINING = {"head-text", "head-image", "head-both"}


@dataclass
class NotesAndRelated:
    """Notes and their relatedness.

    Args:
        notes: N notes.
        related: for each note the positions of its related notes, integers; may be empty.
    """

    notes: Sequence[Mapping[str, Any]]
    related: Sequence[np.ndarray]


def load_notes_and_related(notes: str | Path, pairs: str | Path) -> NotesAndRelated:
    """Read the tables of notes and pairs (see `pairs.tables`)."""
    table = load_notes(notes)
    return NotesAndRelated(list(table), related_indices(list(table["note_id"]), load_pairs(pairs)))


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
    """Encode the notes once a modality, and measure the retrieval of related notes.

    Args:
        model: anything with `NoteLLM2Model`'s `encode`.
        notes: N notes, which are queries and pool.
        related: for each note the positions of its related notes, integers; may be empty.
        name: of the system in the table.
        ks: cuts of the metrics.
        modalities: which of "both", "text" and "image" to leave to the model. One that reads text alone is
            evaluated with "text" alone.
        batch_size: notes encoded at once.
        vision_features: what the model's tower sees in these notes' images, in place of running it.

    Returns:
        One row a modality; `details["blank_notes"]` counts the notes that it leaves with nothing (see
        `evaluation.modality`).
    """
    rows = []
    if model.config.vision_config is None or all(note.get("image") is None for note in notes):
        modalities = ("text",)
    for modality in modalities:
        embeds, num_blank = encode_with_modality(model, notes, modality, batch_size, vision_features)
        if num_blank:
            logger.warning("%d of %d notes have nothing to encode with %r.", num_blank, len(notes), modality)
        metrics = retrieval_metrics(embeds, related, ks)
        rows.append(ReportRow(name, modality, metrics, {"blank_notes": num_blank}))
    return rows


def evaluate_baselines(
    notes: Sequence[Mapping[str, Any]],
    related: Sequence[np.ndarray],
    baselines: Iterable[Baseline],
    *,
    ks: Sequence[int] = (10, 100),
    text_encoder: str | None = None,
    vision: str | None = None,
    train: NotesAndRelated | None = None,
    validation: NotesAndRelated | None = None,
    head: HeadSettings | None = None,
    batch_size: int = 32,
) -> list[ReportRow]:
    """Measure what a user could do instead.

    Args:
        notes: N notes, which are queries and pool.
        related: for each note the positions of its related notes, integers; may be empty.
        baselines: "chance"; "bm25"; "frozen-text" and "frozen-image", the cosine of frozen features; "head-text",
            "head-image" and "head-both", a small head trained on them, or on both side by side.
        ks: cuts of the metrics.
        text_encoder: folder or Hub id of a sentence-transformers model, for frozen-text, head-text and head-both.
        vision: folder or Hub id of a vision tower, for frozen-image, head-image and head-both.
        train: notes that the heads train on.
        validation: notes that choose the heads' best step.
        head: how the heads are built and trained.
        batch_size: notes encoded at once.

    Returns:
        One row a baseline, in the order asked for.

    Raises:
        ValueError: if a baseline is unknown, or misses what it needs.
    """
    baselines = list(baselines)
    _check_baselines(baselines, text_encoder, vision, train, validation)
    splits = [NotesAndRelated(notes, related)]
    if train is not None and validation is not None and not _NEEDS_TRAINING.isdisjoint(baselines):
        splits += [train, validation]
    # Modality to one array of features a split, made once for all baselines that use them; each vector of unit length,
    # so that text and image weigh the same side by side.
    features: dict[str, list[np.ndarray]] = {}
    if text_encoder is not None and not _NEEDS_TEXT.isdisjoint(baselines):
        features["text"] = [encode_texts(text_encoder, list(map(note_text, part.notes)), batch_size) for part in splits]
    if vision is not None and not _NEEDS_IMAGE.isdisjoint(baselines):
        features["image"] = [_normalized(pooled_image_features(vision, part.notes, batch_size)) for part in splits]
    if "head-both" in baselines:
        features["both"] = [
            np.concatenate(parts, axis=1) for parts in zip(features["text"], features["image"], strict=True)
        ]

    rows = []
    for baseline in baselines:
        if baseline == "chance":
            rows.append(ReportRow("chance", "-", chance_metrics(related, ks)))
            continue
        if baseline == "bm25":
            scores = bm25_scores(list(map(note_text, notes)))
            rows.append(ReportRow("bm25", "text", retrieval_metrics(scores, related, ks)))
            continue
        kind, modality = baseline.split("-")
        embeds = features[modality][0]
        if kind == "head":
            _, train_features, validation_features = features[modality]
            trained = train_head(train_features, splits[1].related, validation_features, splits[2].related, head)
            embeds = trained.encode(embeds)
        rows.append(ReportRow(baseline, modality, retrieval_metrics(embeds, related, ks)))
    return rows


def _check_baselines(
    baselines: Sequence[str],
    text_encoder: str | None,
    vision: str | None,
    train: NotesAndRelated | None,
    validation: NotesAndRelated | None,
) -> None:
    for baseline in baselines:
        if baseline not in BASELINES:
            raise ValueError(f"baselines has {baseline!r}: choose from {', '.join(BASELINES)}.")
        needs = {
            "text_encoder (--text-encoder)": baseline in _NEEDS_TEXT and text_encoder is None,
            "vision (--vision)": baseline in _NEEDS_IMAGE and vision is None,
            "train (--train)": baseline in _NEEDS_TRAINING and train is None,
            "validation (--validation)": baseline in _NEEDS_TRAINING and validation is None,
        }
        missing = [name for name, is_missing in needs.items() if is_missing]
        if missing:
            raise ValueError(f"Baseline {baseline!r} needs {', '.join(missing)}: give it, or leave the baseline out.")


def _normalized(embeds: np.ndarray) -> np.ndarray:
    # A zero vector, which stands for a missing text or image, stays zero.
    return embeds / np.maximum(np.linalg.norm(embeds, axis=1, keepdims=True), 1e-12)


def load_model(name_or_path: str) -> NoteLLM2Model:
    """Load a NoteLLM-2 from a folder or the Hub, onto the GPU if there is one."""
    model: NoteLLM2Model = AutoModel.from_pretrained(name_or_path)
    return model.eval().to(default_device())


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.run",
        description="Measure how well models and baselines find the related notes of each note among all others, with "
        "text and image, with the text alone and with the image alone. Writes report.md and report.json.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="checkpoint folder or Hub id of a NoteLLM-2; NAME is its row's name. May be given several times",
    )
    parser.add_argument("--notes", required=True, help="table of notes: a CSV, JSON lines or Parquet file, a folder")
    parser.add_argument("--pairs", required=True, help="table of related pairs among these notes")
    parser.add_argument("--output", required=True, type=Path, metavar="REPORT_DIR", help="folder for the report")
    parser.add_argument("--ks", nargs="+", type=int, default=[10, 100], metavar="K", help="cuts of Recall and NDCG")
    parser.add_argument(
        "--modalities", nargs="+", choices=MODALITIES, default=list(MODALITIES), help="what the models see of a note"
    )
    parser.add_argument(
        "--baselines",
        nargs="*",
        choices=BASELINES,
        default=["chance", "bm25"],
        help="rows to compare with: frozen-* compare frozen features, head-* train a small head on them",
    )
    parser.add_argument("--text-encoder", metavar="PATH", help="sentence-transformers model of *-text and head-both")
    parser.add_argument("--vision", metavar="PATH", help="vision tower of *-image and head-both")
    parser.add_argument(
        "--train",
        type=Path,
        metavar="DIR",
        help="folder with notes.arrow and pairs.parquet, as pairs.split writes it, that head-* train on",
    )
    parser.add_argument("--validation", type=Path, metavar="DIR", help="likewise, to choose the best step of head-*")
    parser.add_argument("--batch-size", type=int, default=32, help="notes encoded at once")
    parser.add_argument(
        "--vision-features-dir",
        metavar="DIR",
        help="keep here what the tower of a --model sees in images, so that it runs once for all modalities, and for "
        "all models that share it; train/run.py takes the same folder",
    )
    parser.add_argument("--head-steps", type=int, default=HeadSettings.steps, help="training steps of head-*")
    parser.add_argument("--seed", type=int, default=0, help="seed of head-*")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; `arguments` default to the process's own."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if not options.model and not options.baselines:
        parser.error("nothing to evaluate: give --model or --baselines")
    try:
        folders = [
            load_notes_and_related(folder / "notes.arrow", folder / "pairs.parquet") if folder is not None else None
            for folder in (options.train, options.validation)
        ]
        split = load_notes_and_related(options.notes, options.pairs)
        rows = evaluate_baselines(
            split.notes,
            split.related,
            options.baselines,
            ks=options.ks,
            text_encoder=options.text_encoder,
            vision=options.vision,
            train=folders[0],
            validation=folders[1],
            head=HeadSettings(steps=options.head_steps, seed=options.seed),
            batch_size=options.batch_size,
        )
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    for specification in options.model:
        name, _, path = specification.rpartition("=")
        model = load_model(path)
        features = None
        if options.vision_features_dir is not None and model.config.has_vision:
            features = VisionFeatureStore(options.vision_features_dir, model).table(split.notes, options.batch_size)
        rows += evaluate_model(
            model,
            split.notes,
            split.related,
            name=name or Path(path).name,
            ks=options.ks,
            modalities=options.modalities,
            batch_size=options.batch_size,
            vision_features=features,
        )
    queries = sum(len(positions) > 0 for positions in split.related)
    write_report(options.output, rows, collect_facts(notes=len(split.notes), queries=queries, seed=options.seed))
    sys.stdout.write(f"\n{text_table(rows)}\nReport: {options.output / 'report.md'}\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    main()
