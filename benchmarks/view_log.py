"""Simulated logs of views, of any size: a power law of note popularity, and as many views of every user.

With N notes, the note of rank r (1 being the most viewed) is viewed with probability

    p(r) = ∫ x^-s dx from r to r + 1  /  ∫ x^-s dx from 1 to N + 1  ≈  r^-s / Σ i^-s,        s = `LogShape.exponent`

Views have independent times, over `DAYS` days, and the log is sorted by time, as logs are. Numbers come from hashes of
the row's number, so that the same shape and seed give the same rows whatever the number of threads.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import duckdb

VIEWS_PER_USER = 50
VIEWS_PER_NOTE = 100
DAYS = 28
START = 1_700_000_000  # seconds since 1970: November 2023

_SECONDS = DAYS * 86_400


@dataclass(frozen=True)
class LogShape:
    """What a log looks like.

    Attributes:
        views: rows; a multiple of 100.
        exponent: s of the power law; 0 means that all notes are equally popular.
        seed: another seed gives another log.
    """

    views: int
    exponent: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.views < VIEWS_PER_NOTE or self.views % VIEWS_PER_NOTE:
            raise ValueError(f"views={self.views}: give a multiple of {VIEWS_PER_NOTE}, as that many make a note.")
        if not self.exponent >= 0:
            raise ValueError(f"exponent={self.exponent}: give 0 or more.")

    @property
    def users(self) -> int:
        return self.views // VIEWS_PER_USER

    @property
    def notes(self) -> int:
        """Notes that there are; of the least popular ones some may have no view."""
        return self.views // VIEWS_PER_NOTE

    @property
    def file_name(self) -> str:
        return f"views-{self.views}-exponent-{self.exponent:g}-seed-{self.seed}.parquet"


def generate_log(shape: LogShape, folder: str | Path, memory_gb: float = 2.0) -> Path:
    """Writes a log, unless it is there already.

    Args:
        shape: what it looks like.
        folder: where it goes, under a name that says its shape; made if need be.
        memory_gb: memory for DuckDB, in 10^9 bytes.

    Returns:
        The path of a Parquet file: user_id, note_id (string), timestamp (int64, seconds since 1970).
    """
    path = Path(folder) / shape.file_name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".unfinished-{os.getpid()}")  # what is cut off must not be taken for a log
    try:
        with duckdb.connect(config={"memory_limit": f"{memory_gb}GB", "temp_directory": f"{unfinished}-spill"}) as db:
            db.execute(f"COPY ({_query(shape)}) TO '{str(unfinished).replace(chr(39), chr(39) * 2)}' (FORMAT parquet)")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _query(shape: LogShape) -> str:
    def random_integer(what: str, salt: int) -> str:
        return f"(hash({what}, {salt}, {shape.seed}) % 4294967296)::BIGINT"

    uniform = f"{random_integer('i', 5)} / 4294967296.0"
    span = shape.notes + 1.0
    if shape.exponent == 1:
        rank = f"pow({span}, {uniform})"
    else:
        rest = 1.0 - shape.exponent
        rank = f"pow(1 + {uniform} * {span**rest - 1.0}, {1.0 / rest})"
    # Every row is a place in a table of `VIEWS_PER_USER` × users. Shifting each row of it by a random amount, then each
    # column, and so again, is a shuffle which keeps every user's number of views without sorting anything.
    return f"""
        WITH places AS (SELECT i, i // {shape.users} AS y, i % {shape.users} AS x FROM range({shape.views}) AS r(i)),
        once AS (SELECT i, x, (y + {random_integer("x", 1)}) % {VIEWS_PER_USER} AS y FROM places),
        twice AS (SELECT i, (x + {random_integer("y", 2)}) % {shape.users} AS x, y FROM once),
        again AS (SELECT i, x, (y + {random_integer("x", 3)}) % {VIEWS_PER_USER} AS y FROM twice),
        shuffled AS (SELECT i, (x + {random_integer("y", 4)}) % {shape.users} AS person FROM again),
        viewed AS (SELECT i, person, least(greatest(floor({rank})::BIGINT, 1), {shape.notes}) AS note FROM shuffled)
        -- Odd multipliers keep distinct numbers below 2^32 distinct: the order of ids tells nothing of popularity.
        SELECT 'u' || (person * 2654435761 % 4294967296)::VARCHAR AS user_id,
            'n' || (note * 2246822519 % 4294967296)::VARCHAR AS note_id,
            {START} + floor(i * ({_SECONDS}.0 / {shape.views}))::BIGINT AS timestamp
        FROM viewed
    """
