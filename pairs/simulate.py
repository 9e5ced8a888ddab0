"""A simulated world of notes, users and views, of which the best possible result is known.

A note has a subject, told by its text alone, and a look, shown by its picture alone; the two are independent. A user
likes one or a few cells (subject, look), each for a week, and views notes of them, popular ones more often; some views
are of any note. So two notes are truly related if they share subject *and* look, and

- who reads the text only cannot tell a related note from others of its subject,
- who sees the picture only cannot tell it from others of its look,
- who does both can. `pairs.ceilings` says how well each can do at best.

BM25 stays below the ceiling of text, because a note says only a few of the many words of its subject.

    python -m pairs.simulate --output world
    python -m pairs.split --notes world/notes.jsonl --views world/views.csv --output splits --score cosine --min-count 2
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from pairs.command import CommandParser, interruption_said
from pairs.options import add_options, parsed_options
from pairs.pictures import LOOKS, draw_picture
from pairs.query import SECONDS_PER_DAY
from pairs.tables import write_table
from pairs.vocabulary import COMMON_WORDS, SUBJECTS

START = 1_700_000_000  # of the first week: 2023-11-14, in seconds since 1970
SECONDS_PER_WEEK = 7 * SECONDS_PER_DAY
WORDS_PER_SUBJECT = min(map(len, SUBJECTS.values()))


@dataclass(frozen=True)
class SimulationOptions:
    """The settings of a world. Each field's metadata says what it is; the command's --help repeats it."""

    notes: int = field(default=2000, metadata={"help": "number of notes, shared evenly by the cells"})
    subjects: int = field(default=12, metadata={"help": f"number of subjects, at most {len(SUBJECTS)}"})
    looks: int = field(default=8, metadata={"help": f"number of looks, at most {len(LOOKS)}"})
    subject_words: int = field(
        default=5, metadata={"help": f"words that a note says of the {WORDS_PER_SUBJECT} of its subject"}
    )
    common_words: int = field(default=12, metadata={"help": "words that a note says and that tell nothing"})
    image_size: int = field(default=32, metadata={"help": "side of a picture, in pixels"})
    users: int = field(default=3000, metadata={"help": "number of users"})
    views_per_user: float = field(default=15.0, metadata={"help": "mean number of views of a user"})
    cells_per_user: int = field(default=1, metadata={"help": "cells (subject, look) that a user likes"})
    noise: float = field(default=0.2, metadata={"help": "share of views of any note instead of one of a liked cell"})
    popularity: float = field(
        default=0.6, metadata={"help": "a note is viewed in proportion to 1 / rank ** POPULARITY"}
    )
    weeks: int = field(default=4, metadata={"help": "weeks in which a liking begins; each lasts one week more"})
    seed: int = field(default=0, metadata={"help": "the same settings and seed give the same world"})

    def __post_init__(self) -> None:
        bounds: dict[str, tuple[float, float]] = {
            "subjects": (1, len(SUBJECTS)),
            "looks": (1, len(LOOKS)),
            "notes": (self.subjects * self.looks, np.inf),
            "subject_words": (0, WORDS_PER_SUBJECT),
            "common_words": (5, len(COMMON_WORDS)),
            "image_size": (8, 4096),
            "users": (1, np.inf),
            "views_per_user": (1, np.inf),
            "cells_per_user": (1, np.inf),
            "noise": (0, 1),
            "popularity": (0, 10),
            "weeks": (1, 1000),
            "seed": (0, np.inf),
        }
        for name, (lowest, highest) in bounds.items():
            value = getattr(self, name)
            if not lowest <= value <= highest:
                raise ValueError(f"{name}={value}: give at least {lowest} and at most {highest}.")


@dataclass(frozen=True)
class World:
    """A simulated world.

    Attributes:
        notes: note_id, title, topics (list of strings), content, image (path relative to the world's folder), then
            subject and look (strings), which are the answer and which no model reads.
        pictures: the drawn image of each note, RGB, image_size x image_size pixels.
        views: user_id, note_id, timestamp (int64, seconds since 1970, UTC), in the order of time.
    """

    notes: Dataset
    pictures: list[Image.Image]
    views: Dataset

    def write(self, directory: str | Path) -> None:
        """Writes notes.jsonl, views.csv and images/*.png into `directory`, for `load_notes` and `read_views`."""
        folder = Path(directory)
        (folder / "images").mkdir(parents=True, exist_ok=True)
        files = zip(self.notes["image"], self.pictures, strict=True)
        for name, picture in tqdm(files, "write pictures", len(self.pictures), unit=" pictures", leave=False):
            picture.save(folder / name)
        write_table(self.notes, folder / "notes.jsonl")
        write_table(self.views, folder / "views.csv")


def simulate(options: SimulationOptions) -> World:
    """Makes the world of `options`; the same options give the same world."""
    # One stream of random numbers for each part: with more users, say, the notes stay the same.
    cell_rng, text_rng, picture_rng, view_rng = np.random.default_rng(options.seed).spawn(4)
    n_cells = options.subjects * options.looks
    cells = cell_rng.permutation(np.arange(options.notes) % n_cells)
    subjects = [list(SUBJECTS)[cell // options.looks] for cell in cells]
    looks = [LOOKS[cell % options.looks] for cell in cells]
    note_ids = [f"n{i:0{len(str(options.notes - 1))}d}" for i in range(options.notes)]
    texts = [_write_text(subject, options, text_rng) for subject in subjects]
    pictures = [
        draw_picture(look, options.image_size, picture_rng)
        for look in tqdm(looks, "draw pictures", unit=" pictures", leave=False)
    ]
    notes = Dataset.from_dict(
        {
            "note_id": note_ids,
            "title": [title for title, _, _ in texts],
            "topics": [topics for _, topics, _ in texts],
            "content": [content for _, _, content in texts],
            "image": [f"images/{note_id}.png" for note_id in note_ids],
            "subject": subjects,
            "look": looks,
        }
    )
    users, viewed, timestamps = _view_notes(cells, n_cells, options, view_rng)
    views = Dataset.from_dict(
        {
            "user_id": [f"u{user}" for user in users],
            "note_id": [note_ids[note] for note in viewed],
            "timestamp": timestamps,
        }
    )
    return World(notes, pictures, views)


def _write_text(subject: str, options: SimulationOptions, rng: np.random.Generator) -> tuple[str, list[str], str]:
    """Title, topics and content: words of the subject strewn among common ones."""
    words = np.concatenate(
        [
            rng.choice(SUBJECTS[subject], options.subject_words, replace=False),
            rng.choice(COMMON_WORDS, options.common_words, replace=False),
        ]
    )
    shuffled: list[str] = rng.permutation(words).tolist()
    title, topics, content = shuffled[:3], shuffled[3:5], shuffled[5:]
    return " ".join(title).capitalize(), topics, " ".join(content).capitalize() + "."


def _view_notes(
    cells: np.ndarray, n_cells: int, options: SimulationOptions, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, notes (positions) and seconds of all views, int64, in the order of time."""
    popularity = (1.0 + rng.permutation(len(cells))) ** -options.popularity
    by_cell = np.argsort(cells, kind="stable")
    # Notes of one cell lie side by side on a line, each as long as it is popular: a random point there is a random
    # note of the cell, a random point of the whole line any note.
    ends = np.cumsum(popularity[by_cell])
    cell_ends = ends[np.searchsorted(cells[by_cell], np.arange(n_cells), side="right") - 1]
    cell_starts = np.concatenate([[0.0], cell_ends[:-1]])

    users = np.repeat(np.arange(options.users), 1 + rng.poisson(options.views_per_user - 1, options.users))
    liked_cells = rng.integers(n_cells, size=(options.users, options.cells_per_user))
    liked_from = rng.integers(options.weeks * SECONDS_PER_WEEK, size=liked_cells.shape)
    liking = rng.integers(options.cells_per_user, size=len(users))
    cell = liked_cells[users, liking]
    random_view = rng.uniform(size=len(users)) < options.noise
    lowest = np.where(random_view, 0.0, cell_starts[cell])
    highest = np.where(random_view, ends[-1], cell_ends[cell])
    notes = by_cell[np.searchsorted(ends, rng.uniform(lowest, highest), side="right")]

    in_week = rng.integers(SECONDS_PER_WEEK, size=len(users))
    at_any_time = rng.integers((options.weeks + 1) * SECONDS_PER_WEEK, size=len(users))
    seconds = START + np.where(random_view, at_any_time, liked_from[users, liking] + in_week)
    order = np.argsort(seconds, kind="stable")
    return users[order], notes[order], seconds[order]


@interruption_said("the world is not whole; give the same command to begin again.")
def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = CommandParser(
        prog="python -m pairs.simulate",
        description="Simulate notes with drawn pictures, users and their views.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", required=True, help="folder for notes.jsonl, views.csv and images/")
    add_options(parser, SimulationOptions)
    args = parser.parse_args(argv)
    try:
        options = parsed_options(args, SimulationOptions)
    except ValueError as error:
        parser.error(str(error))
    world = simulate(options)
    world.write(args.output)
    sys.stdout.write(f"{len(world.notes)} notes and {len(world.views)} views by {options.users} users: {args.output}\n")


if __name__ == "__main__":
    main()
