"""MicroLens as notes and views: the public data set of short videos, each with a title and a cover.

From https://github.com/westlake-repl/MicroLens, which names who may use it and for what (Ni et al., 2023, "A
Content-Driven Micro-Video Recommendation Dataset at Scale", arXiv:2309.15379); nothing is downloaded here.

    MicroLens-50k_pairs.csv    user,item,timestamp in milliseconds since 1970; their "pairs" are our views
    MicroLens-50k_titles.csv   item,title; the file of MicroLens-100k lacks this header
    MicroLens-50k_covers/      <item>.jpg

    python -m pairs.microlens --pairs MicroLens-50k_pairs.csv --titles MicroLens-50k_titles.csv \\
        --covers MicroLens-50k_covers --output microlens
    python -m pairs.split --notes microlens/notes.parquet --views microlens/views.parquet --output splits \\
        --image-root MicroLens-50k_covers --score cosine

A title is a whole caption, hashtags included: train with a larger max_title_tokens than the default.
"""

import argparse
import csv
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value

from pairs.command import CommandParser, interruption_said
from pairs.files import read_table, to_arrow
from pairs.tables import NOTE_COLUMNS, write_table

# What was missing or left out, and how the command says it.
COUNTS: dict[str, str] = {
    "repeated_titles": "rows of the titles left out: their item has an earlier row",
    "viewed_without_title": "items that were viewed and have no title",
    "without_cover": "notes written without a cover: their image is null",
    "dropped_items": "items dropped: they have neither title nor cover",
    "dropped_by_max_notes": "notes dropped: they have fewer views than the --max-notes kept",
    "dropped_views": "views dropped with their notes",
}

_MILLISECONDS = 1000
# In milliseconds this is 1973, in seconds the year 5138: a smaller number is no time of MicroLens in milliseconds.
_MIN_MILLISECONDS = 10**11


@dataclass(frozen=True)
class MicroLens:
    """MicroLens as this package's tables.

    Attributes:
        notes: note_id, title, topics, content (both empty), image (absolute path or null), all string; in the order of
            the titles, then of the first views of items without one.
        views: user_id, note_id (string), timestamp (int64, seconds since 1970, UTC), in the file's order.
        counts: for each of `COUNTS` how many there were.
    """

    notes: Dataset
    views: Dataset
    counts: dict[str, int]

    def write(self, directory: str | Path) -> None:
        """Writes notes.parquet and views.parquet into `directory`, which is made if it is not there."""
        write_table(self.notes, Path(directory) / "notes.parquet")
        write_table(self.views, Path(directory) / "views.parquet")


def load_microlens(
    pairs: str | Path, titles: str | Path, covers: str | Path, max_notes: int | None = None
) -> MicroLens:
    """Reads MicroLens.

    A note is an item with a title, a cover or both; other items are dropped, and so are their views.

    Args:
        pairs: csv file with the header user,item,timestamp.
        titles: csv file of item,title, with or without this header.
        covers: folder of <item>.jpg.
        max_notes: keep only so many notes, those with most views (of equals the first in the table); None: all.

    Raises:
        FileNotFoundError: a file or the folder is not there.
        ValueError: a file is not what it should be, no cover belongs to any item, or max_notes is below 1.
    """
    if max_notes is not None and max_notes < 1:
        raise ValueError(f"max_notes={max_notes}: give 1 or more.")
    views = _read_views(pairs)
    title_of, repeated = _read_titles(titles)
    viewed = Counter(to_arrow(views)["note_id"].to_pylist())
    items = list(dict.fromkeys([*title_of, *viewed]))
    image_of = _find_covers(covers, items)
    note_ids = [item for item in items if title_of.get(item) or item in image_of]
    kept = note_ids
    if max_notes is not None:
        most_viewed = set(sorted(note_ids, key=lambda item: -viewed[item])[:max_notes])
        kept = [item for item in note_ids if item in most_viewed]
    features = Features({name: Value("string") for name in NOTE_COLUMNS})
    notes = Dataset.from_dict(
        {
            "note_id": kept,
            "title": [title_of.get(item, "") for item in kept],
            "topics": [""] * len(kept),
            "content": [""] * len(kept),
            "image": [image_of.get(item) for item in kept],
        },
        features=features,
    )
    kept_views = to_arrow(views).filter(pc.field("note_id").isin(kept))
    counts = {
        "repeated_titles": repeated,
        "viewed_without_title": sum(not title_of.get(item) for item in viewed),
        "without_cover": sum(item not in image_of for item in kept),
        "dropped_items": len(items) - len(note_ids),
        "dropped_by_max_notes": len(note_ids) - len(kept),
        "dropped_views": len(views) - len(kept_views),
    }
    return MicroLens(notes, Dataset(kept_views), counts)


def _read_views(path: str | Path) -> Dataset:
    table = to_arrow(read_table(path, ("user", "item")))
    for name in ("user", "item", "timestamp"):
        if name not in table.column_names:
            raise ValueError(
                f"{path}: no column {name!r}, only {table.column_names}; give MicroLens's csv file of pairs, with the"
                " header user,item,timestamp."
            )
    times = table["timestamp"]
    if not pa.types.is_integer(times.type):
        raise ValueError(f"{path}: column 'timestamp' is {times.type}; MicroLens gives whole milliseconds.")
    too_small = pc.index(pc.less(times, _MIN_MILLISECONDS), True).as_py()
    if too_small >= 0:
        raise ValueError(
            f"{path}, row {too_small + 1}: 'timestamp' {times[too_small]} is before 1973 in milliseconds; MicroLens has"
            " milliseconds since 1970: multiply seconds by 1000."
        )
    for name in ("user", "item"):
        empty = pc.index(pc.or_kleene(pc.is_null(table[name]), pc.equal(table[name], "")), True).as_py()
        if empty >= 0:
            raise ValueError(f"{path}, row {empty + 1}: {name!r} is empty; give it, or remove the row.")
    columns = {name: table[column].cast(pa.string()) for name, column in (("user_id", "user"), ("note_id", "item"))}
    return Dataset(pa.table({**columns, "timestamp": pc.divide(times, _MILLISECONDS)}))


def _read_titles(path: str | Path) -> tuple[dict[str, str], int]:
    """The title of each item, and how many rows were left out because their item had an earlier one."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; give MicroLens's csv file of titles.")
    title_of: dict[str, str] = {}
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except csv.Error as error:
        raise ValueError(f"{path}: not a readable .csv table ({error}); is a quotation mark missing?") from error
    if rows and rows[0][0] == "item":
        del rows[0]
    for number, (item, *title) in enumerate(rows, start=1):
        if not item.strip().isdecimal() or not title:
            raise ValueError(f"{path}, row {number}: {item!r} is no item number with a title; give MicroLens's titles.")
        # A comma in a title that is not quoted is part of the title: there are no more columns.
        title_of.setdefault(item.strip(), ",".join(title).strip())
    return title_of, len(rows) - len(title_of)


def _find_covers(folder: str | Path, items: list[str]) -> dict[str, str]:
    """The absolute path of each item's cover, for the items that have one."""
    covers = Path(folder).resolve()
    if not covers.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the one that holds the covers, <item>.jpg.")
    names = {path.name for path in covers.iterdir()}
    found = {item: str(covers / f"{item}.jpg") for item in items if f"{item}.jpg" in names}
    if items and not found:
        raise ValueError(f"{folder}: holds no cover such as {items[0]}.jpg; give the folder that holds them itself.")
    return found


@interruption_said("the tables are not whole; give the same command to begin again.")
def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = CommandParser(
        prog="python -m pairs.microlens",
        description="Make notes.parquet and views.parquet of the public MicroLens data set.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--pairs", required=True, help="MicroLens-*_pairs.csv: user,item,timestamp in milliseconds")
    parser.add_argument("--titles", required=True, help="MicroLens-*_titles.csv: item,title")
    parser.add_argument("--covers", required=True, help="folder of covers, <item>.jpg")
    parser.add_argument("--output", required=True, help="folder for notes.parquet and views.parquet")
    parser.add_argument(
        "--max-notes", type=int, help="keep only so many notes, those with most views; all if not given"
    )
    args = parser.parse_args(argv)
    try:
        microlens = load_microlens(args.pairs, args.titles, args.covers, args.max_notes)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    microlens.write(args.output)
    for name, count in microlens.counts.items():
        sys.stdout.write(f"{count:>8} {COUNTS[name]}\n")
    users = len(microlens.views.unique("user_id"))
    sys.stdout.write(f"{len(microlens.notes)} notes and {len(microlens.views)} views by {users} users: {args.output}\n")


if __name__ == "__main__":
    main()
