"""What is wrong with a table of notes, found before training stops at it or learns from it.

`load_notes` refuses a table at its first bad row; this reads on, decodes every image and reports all bad rows. Images
that look alike are a suspicion only: the hash sees shapes, no colours, and finds too many among photographs on white.

    DIR/scan.json            the number of rows of each finding
    DIR/offenders.parquet    row (int64, from 1), note_id, finding, detail: each of these rows

    python -m pairs.scan --notes notes.csv --pairs pairs.parquet --output DIR
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from tqdm.auto import tqdm

from pairs.command import CommandParser, interruption_said
from pairs.files import to_arrow
from pairs.images import HASH_BITS, MAX_DISTANCE, CheckedImage, check_images, first_lookalikes
from pairs.tables import IMAGE_ROOT_HELP, TEXT_COLUMNS, load_pairs, read_notes, write_table

# Each finding: of what its share is told, and what it is.
FINDINGS: dict[str, tuple[str, str]] = {
    "empty_id": ("notes", "no note_id"),
    "duplicate_id": ("notes", "the note_id of an earlier row"),
    "no_text": ("notes", "no title, topics or content"),
    "no_text_no_image": ("notes", "neither text nor image (these are among no_text, too)"),
    "url_image": ("images", "a URL in place of a path"),
    "outside_image": ("images", "a path out of the folder that images must lie in"),
    "missing_image": ("images", "no such file"),
    "unreadable_image": ("images", "corrupt, truncated, too large or too long (a bomb) or of an unknown kind"),
    "near_duplicate_image": ("images", "looks like the image of an earlier row"),
    "unknown_note": ("pairs", "a pair of a note that the notes lack (its row is that of the pairs)"),
}


class Offender(NamedTuple):
    """One bad row: its number, from 1, its note id, one of `FINDINGS`, and what it is about."""

    row: int
    note_id: str
    finding: str
    detail: str


@dataclass(frozen=True)
class NoteScan:
    """What `scan_notes` found.

    Attributes:
        totals: the number of "notes", of "images" and, if pairs were given, of "pairs".
        counts: for each of `FINDINGS` the number of its rows; "unknown_note" only if pairs were given.
        offenders: row (int64), note_id, finding, detail (strings); in the order of `FINDINGS`, then of rows.
        max_distance: bits in which the hashes of look-alike images may differ.
    """

    totals: dict[str, int]
    counts: dict[str, int]
    offenders: Dataset
    max_distance: int

    def share(self, finding: str) -> float | None:
        """The finding's share of all notes, images or pairs, 0 to 1; None where there are none."""
        total = self.totals[FINDINGS[finding][0]]
        return self.counts[finding] / total if total else None

    def write(self, directory: str | Path) -> None:
        """Writes offenders.parquet and scan.json into `directory`, which is made if it is not there."""
        folder = Path(directory)
        write_table(self.offenders, folder / "offenders.parquet")
        record: dict[str, Any] = {
            **self.totals,
            "max_distance": self.max_distance,
            "findings": {name: {"count": count, "share": self.share(name)} for name, count in self.counts.items()},
        }
        (folder / "scan.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def scan_notes(
    notes: Dataset, pairs: Dataset | None = None, *, max_distance: int = 4, workers: int | None = None
) -> NoteScan:
    """Looks for everything of `FINDINGS`.

    Args:
        notes: a table as from `pairs.tables.read_notes`.
        pairs: a table as from `load_pairs`; None: pairs are not looked at.
        max_distance: the 64-bit pHashes of two look-alike images differ in at most so many bits, 0 to 10.
        workers: processes that decode images; None: one a core.

    Raises:
        ValueError: max_distance or workers is out of its range.
        ImportError: imagehash is not installed.
    """
    first_lookalikes(np.empty(0, np.uint64), max_distance)  # refuses a bad distance now, not after all the decoding
    table = to_arrow(notes)
    note_ids = table["note_id"].to_pylist()
    has_image = _has_image(table["image"])
    image_rows = (np.flatnonzero(has_image) + 1).tolist()
    workers = os.cpu_count() or 1 if workers is None else workers
    progress = tqdm(
        check_images(_image_sources(table["image"]), workers),
        "decode images",
        len(image_rows),
        unit=" images",
        leave=False,
    )
    found = [
        *_bad_ids(note_ids),
        *_bad_texts(note_ids, _has_text(table), has_image),
        *_bad_images(note_ids, image_rows, list(progress), max_distance),
    ]
    totals = {"notes": len(note_ids), "images": len(image_rows)}
    if pairs is not None:
        found += _bad_pairs(to_arrow(pairs), table["note_id"])
        totals["pairs"] = len(pairs)
    names = [name for name, (whole, _) in FINDINGS.items() if whole in totals]
    by_name: dict[str, list[Offender]] = {name: [] for name in names}
    for offender in found:
        by_name[offender.finding].append(offender)
    offenders = [offender for name in names for offender in by_name[name]]
    kinds = {"row": pa.int64(), "note_id": pa.string(), "finding": pa.string(), "detail": pa.string()}
    columns = {name: pa.array([getattr(row, name) for row in offenders], kind) for name, kind in kinds.items()}
    counts = {name: len(by_name[name]) for name in names}
    return NoteScan(totals, counts, Dataset(pa.table(columns)), max_distance)


def _bad_ids(note_ids: Sequence[str]) -> Iterator[Offender]:
    first_rows: dict[str, int] = {}
    for row, note_id in enumerate(note_ids, start=1):
        if not note_id:
            yield Offender(row, note_id, "empty_id", "")
        elif first_rows.setdefault(note_id, row) != row:
            yield Offender(row, note_id, "duplicate_id", f"first in row {first_rows[note_id]}")


def _bad_texts(note_ids: Sequence[str], has_text: np.ndarray, has_image: np.ndarray) -> Iterator[Offender]:
    for index in np.flatnonzero(~has_text).tolist():
        yield Offender(index + 1, note_ids[index], "no_text", "")
        if not has_image[index]:
            yield Offender(index + 1, note_ids[index], "no_text_no_image", "")


def _bad_images(
    note_ids: Sequence[str], rows: Sequence[int], images: Sequence[CheckedImage], max_distance: int
) -> Iterator[Offender]:
    """Of the images of these rows, those with a fault and those like an earlier one."""
    readable: list[tuple[int, int]] = []
    for row, image in zip(rows, images, strict=True):
        if image.hash is None:
            yield Offender(row, note_ids[row - 1], f"{image.fault}_image", image.detail)
        else:
            readable.append((row, image.hash))
    firsts = first_lookalikes(np.array([phash for _, phash in readable], np.uint64), max_distance)
    for (row, phash), first in zip(readable, firsts.tolist(), strict=True):
        like, its_hash = readable[first]
        if like != row:
            bits = (phash ^ its_hash).bit_count()
            detail = f"like {note_ids[like - 1]!r} of row {like}, {bits} of {HASH_BITS} bits differ"
            yield Offender(row, note_ids[row - 1], "near_duplicate_image", detail)


def _bad_pairs(pairs: pa.Table, note_ids: pa.ChunkedArray) -> Iterator[Offender]:
    names = ("note_id", "related_note_id")
    known = {name: pc.is_in(pairs[name], value_set=pc.unique(note_ids)) for name in names}
    unknown = pc.invert(pc.and_(*known.values()))
    for index in pc.indices_nonzero(unknown).to_pylist():
        said = [f"{name} {pairs[name][index].as_py()!r}" for name in names if not known[name][index].as_py()]
        yield Offender(index + 1, pairs["note_id"][index].as_py(), "unknown_note", f"no note {' and '.join(said)}")


def _has_text(table: pa.Table) -> np.ndarray:
    """(N,) bool: any of title, topics and content holds more than white space."""
    has_text = np.zeros(len(table), bool)
    for name in TEXT_COLUMNS:
        column = table[name]
        if pa.types.is_list(column.type):
            topics = [" ".join(filter(None, row)) for row in column.to_pylist()]
            column = pa.chunked_array([pa.array(topics, pa.string())])
        blank = pc.or_(pc.equal(column, ""), pc.utf8_is_space(column))
        has_text |= ~blank.to_numpy()
    return has_text


def _has_image(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) bool: the note gives an image, whether that can be read or not."""
    if not pa.types.is_struct(column.type):
        return column.is_valid().to_numpy()
    content, path = (pc.struct_field(column, name) for name in ("bytes", "path"))
    return pc.or_(content.is_valid(), pc.not_equal(pc.fill_null(path, ""), "")).to_numpy()


def _image_sources(column: pa.ChunkedArray) -> Iterator[str | bytes]:
    """Path or content of every image, one by one: the contents of all need not fit into memory."""
    for scalar in column:
        value = scalar.as_py()
        if isinstance(value, dict):  # of an `Image` feature
            value = value["path"] if value["bytes"] is None else value["bytes"]
        if value is not None and value != "":
            yield value


def _text_table(scan: NoteScan) -> str:
    """One line a finding: its name, number, share, and the first row that has it."""
    examples: dict[str, str] = {}
    for offender in scan.offenders:
        where = f"row {offender['row']}, {offender['note_id']!r}"
        examples.setdefault(offender["finding"], f"{where}: {offender['detail']}".removesuffix(": "))
    lines = [("finding", "number", "share", "example")]
    for name, count in scan.counts.items():
        share = scan.share(name)
        told = "-" if share is None else f"{share:.2%} of {FINDINGS[name][0]}"
        lines.append((name, str(count), told, examples.get(name, "-")))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    return "".join(
        f"{name:<{widths[0]}}  {number:>{widths[1]}}  {share:>{widths[2]}}  {example}\n"
        for name, number, share, example in lines
    )


@interruption_said("nothing was written; give the same command to begin again.")
def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = CommandParser(
        prog="python -m pairs.scan",
        description="Look for what is wrong with a table of notes before training: "
        + "; ".join(f"{name}: {meaning}" for name, (_, meaning) in FINDINGS.items())
        + ".",
        epilog="Exit codes: 0, the table was scanned; 1, with --strict, something was found; 2, it cannot be read.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--notes", required=True, help="table of notes: note_id, title, topics, content, image")
    parser.add_argument("--image-root", metavar="DIR", help=IMAGE_ROOT_HELP)
    parser.add_argument("--pairs", help="table of pairs, to look for notes that it names and the notes lack")
    parser.add_argument("--output", required=True, help="folder for offenders.parquet and scan.json")
    parser.add_argument(
        "--max-distance",
        type=int,
        default=4,
        help=f"images look alike if their {HASH_BITS}-bit perceptual hashes differ in at most so many bits,"
        f" 0 to {MAX_DISTANCE}; 0 for products photographed on white",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that decode images")
    parser.add_argument("--strict", action="store_true", help="exit with code 1 if anything was found")
    args = parser.parse_args(argv)
    try:
        scan = scan_notes(
            read_notes(args.notes, args.image_root),
            load_pairs(args.pairs) if args.pairs is not None else None,
            max_distance=args.max_distance,
            workers=args.workers,
        )
    except (ValueError, FileNotFoundError, ImportError) as error:
        parser.error(str(error))
    scan.write(args.output)
    sys.stdout.write(_text_table(scan))
    sys.stdout.write(f"{len(scan.offenders)} findings in {scan.totals['notes']} notes: {args.output}\n")
    if args.strict and len(scan.offenders):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
