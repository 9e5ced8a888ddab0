"""Notes compared by who viewed them in training: popularity and item-to-item collaborative filtering.

Neither looks at what a note says, so that both can only find notes that were viewed in training. A split by note tests
notes that training has never seen: there they find nothing, which is what embeddings of content are for.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from ibis import _
from scipy.sparse import csr_array

from evaluation.metrics import ScoreFunction
from pairs.engines import Engine, connect
from pairs.split import SPLITS, load_split
from pairs.views import ViewOptions, read_views


def load_train_viewers(
    directory: str | Path,
    views: str | Path | Dataset | pa.Table,
    note_ids: Sequence[str],
    *,
    engine: Engine | None = None,
) -> csr_array:
    """Loads which users viewed which notes in training, and nothing that came after or lies beside it.

    The training views of a split by note are those of the training notes; by time, those of the training period; by
    both, those of the training notes in the training period. Which views count is what the split was made with.

    Args:
        directory: the `output_dir` of `pairs.split.make_splits`.
        views: the log that the splits were made from.
        note_ids: ids of the N notes of the pool, each once.
        engine: what computes; None: DuckDB with its defaults.

    Returns:
        (N, U) int32, 1 where a user viewed a note in training; U users viewed one of these notes.

    Raises:
        FileNotFoundError: no splits in `directory`, or nothing is at `views`.
        ValueError: see `pairs.views.read_views`; the log is not the one that the splits were made from.
    """
    if engine is None:
        with connect() as engine:
            return load_train_viewers(directory, views, note_ids, engine=engine)
    ids = {name: load_split(directory, name).notes["note_id"][:] for name in SPLITS}
    record = json.loads((Path(directory) / "splits.json").read_text(encoding="utf-8"))
    # The rules looked at the views of all notes when the splits were made, and have to find the same now.
    options = ViewOptions(**record["view_options"])
    read = read_views(engine, views, options, {note_id for part in ids.values() for note_id in part})
    made_from = {name: record["views"][name] for name in ("rows", "kept")}
    if made_from != {"rows": read.rows, "kept": read.kept}:
        raise ValueError(
            f"views: {read.rows} rows, of which {read.kept} count; the splits in {directory} were made from a log of "
            f"{made_from['rows']} rows, of which {made_from['kept']} counted. Give that log, or split again."
        )
    visits = read.log.visits
    if "periods" in record:
        visits = visits.filter(_.timestamp < record["periods"]["train"][1])
    wanted = pa.array(sorted(set(note_ids).intersection(ids["train"])), pa.string())
    notes = read.log.notes.semi_join(engine.from_arrow(pa.table({"note_id": wanted})), "note_id")
    viewed = engine.fetch(visits.join(notes, "note").select("person", "note_id").distinct())
    rows = pc.index_in(viewed["note_id"], value_set=pa.array(note_ids, pa.string())).to_numpy()
    people, columns = np.unique(viewed["person"].to_numpy(), return_inverse=True)  # Spark's numbers have gaps
    ones = np.ones(len(rows), dtype=np.int32)
    return csr_array((ones, (rows, columns)), shape=(len(note_ids), len(people)))


def popularity_scores(viewers: csr_array) -> ScoreFunction:
    """Always the most viewed notes: a note's score is how many users viewed it, whatever the query.

    Args:
        viewers: (N, U), see `load_train_viewers`.

    Returns:
        A function for `rank_related`: (R,) positions to (R, N) int64 scores.
    """
    users = _num_users(viewers)

    def score(rows: np.ndarray) -> np.ndarray:
        return np.broadcast_to(users, (len(rows), len(users)))

    return score


def item_cf_scores(viewers: csr_array) -> ScoreFunction:
    """Item-to-item collaborative filtering: the cosine of the users of two notes, over all of training.

    users of both / sqrt(users of one · users of the other), Ochiai's coefficient, as `pairs.query` scores by `cosine`
    but without a window of time (Sarwar et al., 2001, https://doi.org/10.1145/371920.372071). A note without a view
    scores 0.

    Args:
        viewers: (N, U), see `load_train_viewers`.

    Returns:
        A function for `rank_related`: (R,) positions to (R, N) float64 scores.
    """
    users = np.maximum(_num_users(viewers), 1)
    transposed = viewers.T.tocsr()

    def score(rows: np.ndarray) -> np.ndarray:
        both = (viewers[rows] @ transposed).toarray()
        return both / np.sqrt(np.multiply.outer(users[rows], users))

    return score


def num_cold(viewers: csr_array) -> int:
    """How many of the N notes nobody viewed in training."""
    return int((_num_users(viewers) == 0).sum())


def _num_users(viewers: csr_array) -> np.ndarray:
    return np.asarray(viewers.sum(axis=1), dtype=np.int64)  # (N,)
