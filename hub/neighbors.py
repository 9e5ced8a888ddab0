"""Related notes: the nearest embeddings of each note of a corpus.

    python -m hub.neighbors EMBEDDINGS --k 100 --output related.parquet

writes note_id, related_note_id, similarity (float32) and rank (int32, from 1), the notes in the order of EMBEDDINGS.
The similarity is the dot product, which is the cosine of what `hub.encode` writes.

Exact search compares all with all, in tiles of float32 products, on the GPU if there is one. Whatever may be among the
first k, by a bound on the rounding of such a product, is compared again by the float64 product rounded to float32, on
the processor, and equal ones come in the fixed random order of `evaluation.metrics.tie_order`. So the answer is that of
the metrics, and depends neither on tiles nor on the device.

Beyond a million queries times a million notes, an index of FAISS proposes notes (`pip install notellm2[faiss]`): a
graph (HNSW, Malkov and Yashunin, arXiv 1603.09320) or, as that takes more memory than the embeddings themselves, lists
of product-quantised embeddings (IVF-PQ, Jégou, Douze and Schmid, https://doi.org/10.1109/TPAMI.2010.57). What it
proposes is compared and ordered as above. How many of the true first k it finds is measured on a sample.
"""

import argparse
import importlib
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from tqdm.auto import tqdm

from evaluation.encoders import default_device
from evaluation.metrics import EXACT_NUMBERS, TILE_COLUMNS, tie_order
from hub.embeddings import Embeddings, Manifest, load_embeddings
from pairs.command import CommandParser, interruption_said
from pairs.files import refuse_unwritable, write_file

logger = logging.getLogger(__name__)

Method = Literal["exact", "hnsw", "ivfpq"]

EXACT_PRODUCTS = 10**12
"""`choose_method`: up to so many products of two embeddings all are computed."""

HNSW_NOTES = 10**7
"""`choose_method`: notes that a graph is built of, at most. Beside the embeddings it takes 4 · D bytes a note, as FAISS
copies them, and some 270 for its links: 527 in all, as measured for D = 64."""

CHUNK = 256
"""Queries that are searched for at a time."""

ROW_GROUP = 2**20
"""Rows of the result that are written at a time, about."""

NOTES_AT_ONCE = 2**16
"""Notes that are added to an index at a time."""

WAITING = 2**22
"""Candidates that wait for being sorted, at most, unless one tile has more."""

HNSW_LINKS = 32
IVFPQ_POINTS = 64
"""Embeddings a list that IVF-PQ is trained on."""

SCHEMA = pa.schema(
    {"note_id": pa.string(), "related_note_id": pa.string(), "similarity": pa.float32(), "rank": pa.int32()}
)


class Neighbors(NamedTuple):
    """The nearest notes of some queries, P in all: query by query, the nearest first.

    Attributes:
        query: (P,) int64, positions of queries.
        note: (P,) int64, positions of their neighbours.
        similarity: (P,) float32.
        rank: (P,) int64, from 1.
    """

    query: np.ndarray
    note: np.ndarray
    similarity: np.ndarray
    rank: np.ndarray


def choose_method(num_queries: int, num_notes: int) -> Method:
    """Exact search up to a million queries times a million notes, then a graph up to ten million notes, then IVF-PQ.

    >>> choose_method(10**6, 10**6), choose_method(2 * 10**6, 2 * 10**6), choose_method(10**8, 10**8)
    ('exact', 'hnsw', 'ivfpq')
    """
    if num_queries * num_notes <= EXACT_PRODUCTS:
        return "exact"
    return "hnsw" if num_notes <= HNSW_NOTES else "ivfpq"


class NeighborSearch:
    """Finds the nearest of N notes.

    Args:
        notes: (N, D) float32, finite.
        method: exact search, or the index of FAISS that proposes notes. An index of HNSW differs a little from run to
            run, as threads build it together.
        width: how much of an index a query looks at: notes kept in mind in the graph, or lists of IVF-PQ. Wider finds
            more, and takes longer. Default: 512 notes, or twice the k nearest if these are more; a 16th of the lists,
            or 64 if these are more.
        device: where exact search computes float32 products, with a copy of the notes. FAISS is on the processor, and
            `recall` then moves the notes there tile by tile. Default: the GPU if there is one.

    Raises:
        ImportError: FAISS is missing.
        ValueError: too few notes for IVF-PQ; a width below 1, or for exact search; PyTorch is set to round the factors
            of float32 products, as to TF32.
    """

    def __init__(
        self,
        notes: np.ndarray,
        method: Method = "exact",
        width: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if width is not None and (width < 1 or method == "exact"):
            raise ValueError(f"width={width} with method={method!r}: it is a number of at least 1, for hnsw and ivfpq.")
        if (precision := torch.get_float32_matmul_precision()) != "highest":
            raise ValueError(
                f"torch.get_float32_matmul_precision() is {precision!r}, and nothing is exact with it: call "
                "torch.set_float32_matmul_precision('highest'), and unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE."
            )
        self.method = method
        self._width = width
        self._notes = torch.from_numpy(np.ascontiguousarray(notes, dtype=np.float32))
        self._order = torch.from_numpy(tie_order(len(notes)))
        self._device = torch.device(device or default_device())
        # Exact search goes through all of them for each chunk of queries. An index may have more than a GPU holds.
        self._tiles = self._notes.to(self._device) if method == "exact" else self._notes
        self._largest_norm = self._tiles.norm(dim=1).max().to(self._device)
        self._index = None if method == "exact" else _build_index(self._notes.numpy(), method)

    def search(self, queries: np.ndarray, own: np.ndarray, k: int) -> Iterator[Neighbors]:
        """The k nearest notes of each query, of `CHUNK` queries at a time. Fewer where there are no more, or where an
        index proposes no more.

        Args:
            queries: (Q, D) float32, finite.
            own: (Q,) int64, the position of each query itself among the notes, which is left out; −1: it is none of
                them.
            k: how many.
        """
        for first in range(0, len(queries), CHUNK):
            rows = torch.from_numpy(np.ascontiguousarray(queries[first : first + CHUNK], dtype=np.float32))
            own_rows = torch.from_numpy(own[first : first + CHUNK])
            found = (self._exact if self._index is None else self._proposed)(rows, own_rows, k)
            ranks = _places(found.row)
            query, note = found.row.numpy() + first, found.note.numpy()
            yield Neighbors(query, note, found.value.numpy(), ranks.numpy() + 1)

    def recall(self, queries: np.ndarray, own: np.ndarray, k: int) -> float:
        """The share of the k nearest notes of some queries that `search` finds. What is as similar as the true k-th one
        counts: where notes are alike, there are several true answers."""
        hits = total = 0
        for first, found in zip(range(0, len(queries), CHUNK), self.search(queries, own, k), strict=True):
            rows = torch.from_numpy(np.ascontiguousarray(queries[first : first + CHUNK], dtype=np.float32))
            exact = self._exact(rows, torch.from_numpy(own[first : first + CHUNK]), k)
            least = np.full(len(rows), np.inf, dtype=np.float32)
            least[exact.row.numpy()] = exact.value.numpy()  # the last of a row stays: its k-th, or where it ends
            hits += int((found.similarity >= least[found.query - first]).sum())
            total += len(exact.row)
        return hits / total if total else 1.0

    def _exact(self, queries: Tensor, own: Tensor, k: int) -> "_Candidates":
        device = self._device
        factors, own = queries.to(device), own.to(device)
        # Rounding moves a float32 product of D terms by no more than D + 4 half-units in the last place of |a| · |b|.
        error = (queries.shape[1] + 4) * 2.0**-24 * factors.norm(dim=1) * self._largest_norm
        least = torch.finfo(torch.float32).min  # above the −∞ of the query itself
        floor = torch.full((len(queries),), -torch.inf, device=device)  # the k-th best so far
        best, waiting, num_waiting, sorted_at = _Candidates.none(), [], 0, 0
        for first in range(0, len(self._tiles), TILE_COLUMNS):
            some = self._tiles[first : first + TILE_COLUMNS].to(device)
            tile = factors @ some.T
            inside = (own >= first) & (own < first + len(some))
            tile[inside, own[inside] - first] = -torch.inf
            bound = floor - error
            if first == 0 and len(some) > k:  # k of the tile are certainly better than this
                bound = tile.topk(k).values[:, -1] - 2 * error
            row, column = (tile >= bound.clamp(min=least).unsqueeze(1)).nonzero(as_tuple=True)
            waiting.append(self._candidates(queries, row.cpu(), (column + first).cpu()))
            num_waiting += len(row)
            seen = first + len(some)
            # Sorting costs more than multiplying: it is done when twice as many notes have been seen.
            if seen >= 2 * sorted_at or num_waiting > WAITING or seen == len(self._notes):
                best = _Candidates.joined([best, *waiting]).nearest(k, self._order)
                waiting, num_waiting, sorted_at = [], 0, seen
                is_last = _places(best.row) == k - 1
                floor[best.row[is_last].to(device)] = best.value[is_last].to(device)
        return best

    def _proposed(self, queries: Tensor, own: Tensor, k: int) -> "_Candidates":
        assert self._index is not None
        # Codes of IVF-PQ are coarse: among four times as many proposals, the embeddings themselves tell better.
        wanted = min(len(self._notes), k + 1 if self.method == "hnsw" else 4 * k + 1)
        vectors = _padded(queries.numpy(), self._index.d)
        _scores, notes = self._index.search(vectors, wanted, params=self._parameters(wanted))
        proposed = torch.from_numpy(notes)
        row, column = ((proposed >= 0) & (proposed != own.unsqueeze(1))).nonzero(as_tuple=True)
        return self._candidates(queries, row, proposed[row, column]).nearest(k, self._order)

    def _parameters(self, wanted: int) -> Any:
        faiss = _faiss()
        if self.method == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=self._width or max(512, 2 * wanted))
        assert self._index is not None
        return faiss.SearchParametersIVF(nprobe=self._width or max(64, self._index.nlist // 16))

    def _candidates(self, queries: Tensor, row: Tensor, note: Tensor) -> "_Candidates":
        """With their float64 products, rounded: equal embeddings have equal ones."""
        size = max(1, EXACT_NUMBERS // queries.shape[1])
        parts = zip(row.split(size), note.split(size), strict=True)
        products = [(queries[some].double() * self._notes[others].double()).sum(1).float() for some, others in parts]
        return _Candidates(row, note, torch.cat(products) if products else torch.empty(0))


@dataclass(frozen=True)
class _Candidates:
    """C notes that may be near: row of the query (C,), position of the note (C,), float32 similarity (C,)."""

    row: Tensor
    note: Tensor
    value: Tensor

    @classmethod
    def none(cls) -> "_Candidates":
        return cls(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0))

    @classmethod
    def joined(cls, parts: list["_Candidates"]) -> "_Candidates":
        columns = zip(*((part.row, part.note, part.value) for part in parts), strict=True)
        return cls(*map(torch.cat, columns))

    def nearest(self, k: int, order: Tensor) -> "_Candidates":
        """The first k of each row, sorted: by similarity, and equal ones by `order` (N,)."""
        sort = torch.from_numpy(np.lexsort((order[self.note].numpy(), -self.value.numpy(), self.row.numpy())))
        kept = sort[_places(self.row[sort]) < k]
        return _Candidates(self.row[kept], self.note[kept], self.value[kept])


def _places(rows: Tensor) -> Tensor:
    """(C,) ascending rows ─► the place of each entry within its row, from 0."""
    if not len(rows):
        return rows
    _rows, counts = torch.unique_consecutive(rows, return_counts=True)
    return torch.arange(len(rows)) - (counts.cumsum(0) - counts).repeat_interleave(counts)


def _faiss() -> Any:
    """The library, whose type stubs lack what is used here."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError(
            "methods hnsw and ivfpq need FAISS: pip install 'notellm2[faiss]', or -e '.[faiss]' in a checkout; or take "
            "method exact."
        ) from error


def _build_index(notes: np.ndarray, method: Method) -> Any:
    faiss = _faiss()
    count, dim = notes.shape
    started = time.perf_counter()
    if method == "hnsw":
        index = faiss.IndexHNSWFlat(dim, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    else:
        lists = max(16, 4 * int(count**0.5))
        if count < IVFPQ_POINTS * lists:
            raise ValueError(
                f"method='ivfpq' with {count} notes: its {lists} lists take {IVFPQ_POINTS * lists} notes to train; "
                "take method='exact' or 'hnsw'."
            )
        codes = -(-dim // 2)  # bytes a note: each stands for two dimensions, of which the last one may be added
        index = faiss.index_factory(2 * codes, f"IVF{lists},PQ{codes}x8", faiss.METRIC_INNER_PRODUCT)
        index.do_polysemous_training = False  # takes most of the time, for a kind of search that is not used here
        sample = np.random.default_rng(0).choice(count, IVFPQ_POINTS * lists, replace=False)
        index.train(_padded(notes[np.sort(sample)], index.d))
    with tqdm(total=count, desc=f"build {method}", unit="note") as progress:
        for first in range(0, count, NOTES_AT_ONCE):
            some = notes[first : first + NOTES_AT_ONCE]
            index.add(_padded(some, index.d))
            progress.update(len(some))
    logger.info("Index %s of %d notes built in %.1f s", method, count, time.perf_counter() - started)
    return index


def _padded(vectors: np.ndarray, dim: int) -> np.ndarray:
    """(n, D) with zeros up to width `dim`, which change no product."""
    return np.pad(vectors, ((0, 0), (0, dim - vectors.shape[1]))) if vectors.shape[1] < dim else vectors


def write_neighbors(
    search: NeighborSearch, notes: Embeddings, queries: Embeddings, own: np.ndarray, k: int, path: str | Path
) -> int:
    """Writes the k nearest notes of all queries, some queries at a time.

    Args:
        search: over `notes`.
        notes, queries, own, k: as in `NeighborSearch.search`.
        path: a .parquet file, or another kind of table.

    Returns:
        The number of rows.
    """
    written = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal written
        waiting: list[pa.Table] = []
        with tqdm(total=len(own), desc="neighbors", unit="note") as progress:
            for found in search.search(queries.vectors, own, k):
                columns = [
                    queries.note_ids.take(pa.array(found.query)).cast(pa.string()),
                    notes.note_ids.take(pa.array(found.note)).cast(pa.string()),
                    pa.array(found.similarity),
                    pa.array(found.rank.astype(np.int32)),
                ]
                waiting.append(pa.table(columns, schema=SCHEMA))
                written += len(found.query)
                progress.update(min(CHUNK, len(own) - progress.n))
                if sum(map(len, waiting)) >= ROW_GROUP:
                    yield pa.concat_tables(waiting).combine_chunks()
                    waiting = []
        if waiting:
            yield pa.concat_tables(waiting).combine_chunks()

    write_file(tables(), SCHEMA, path)
    return written


def refuse_other_model(queries: Path, notes: Path) -> None:
    """Two models' embeddings have nothing to do with one another, of whatever width they are. Of files alone, nobody
    knows what they are of; the log says so.

    Args:
        queries, notes: where the embeddings are.

    Raises:
        ValueError: both are folders that `hub.encode` wrote, of two models.
        FileNotFoundError: a folder that is not there, or that it did not write.
    """
    if queries.is_file() or notes.is_file():
        logger.warning("No folder says which models %s and %s are of: see to it that it is one.", queries, notes)
        return
    theirs, ours = Manifest.read(queries), Manifest.read(notes)
    if theirs.model_fingerprint != ours.model_fingerprint:
        raise ValueError(
            f"--query {queries} is of the model {theirs.model_fingerprint} ({theirs.model}), {notes} of "
            f"{ours.model_fingerprint} ({ours.model}): encode both with one model."
        )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m hub.neighbors",
        description="Write the nearest notes of each note of a corpus that hub.encode encoded.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("embeddings", type=Path, help="folder that hub.encode wrote, or a file like those in it")
    parser.add_argument("--k", type=int, default=100, help="related notes a note")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="table to write: .parquet, .csv, .jsonl or .arrow"
    )
    parser.add_argument(
        "--query",
        type=Path,
        metavar="EMBEDDINGS",
        help="find the related notes of these instead, as of new notes; one that is also in the corpus does not find "
        "itself (None: those of the corpus)",
    )
    parser.add_argument(
        "--method",
        choices=("auto", *get_args(Method)),
        default="auto",
        help="auto: exact up to a million queries times a million notes, then hnsw up to ten million notes, then ivfpq",
    )
    parser.add_argument(
        "--width",
        type=int,
        metavar="N",
        help="how much of an index a query looks at: notes of hnsw, lists of ivfpq; wider finds more and takes longer "
        "(None: by k and the size of the index)",
    )
    parser.add_argument(
        "--recall-sample", type=int, default=1000, metavar="N", help="queries that recall is measured on, for an index"
    )
    return parser


@interruption_said("the table was not written; give the same command to begin again.")
def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = build_parser()
    options = parser.parse_args(argv)
    for name, value in (("--k", options.k), ("--recall-sample", options.recall_sample)):
        if value < 1:
            parser.error(f"{name} {value}: give 1 or more")
    started = time.perf_counter()
    try:
        refuse_unwritable(options.output)
        if options.query is not None:
            refuse_other_model(options.query, options.embeddings)
        notes = load_embeddings(options.embeddings)
        queries = notes if options.query is None else load_embeddings(options.query)
        if queries.vectors.shape[1] != notes.vectors.shape[1]:
            raise ValueError(
                f"--query {options.query} has embeddings of width {queries.vectors.shape[1]}, {options.embeddings} of "
                f"{notes.vectors.shape[1]}: encode both with one model and one --truncate-dim."
            )
        own = np.arange(len(notes.vectors))
        if options.query is not None:
            own = pc.fill_null(pc.index_in(queries.note_ids, value_set=notes.note_ids), -1).to_numpy().astype(np.int64)
        method = options.method
        if method == "auto":
            method = choose_method(len(own), len(notes.vectors))
        search = NeighborSearch(notes.vectors, method, options.width)
        written = write_neighbors(search, notes, queries, own, options.k, options.output)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    sentence = (
        f"{options.output}: {written:,} related notes of {len(own):,} notes among {len(notes.vectors):,}, method "
        f"{method}, in {time.perf_counter() - started:,.1f} s"
    )
    if lacking := options.k * len(own) - written:
        others = len(notes.vectors) - int((own >= 0).any())  # that every query has
        reason = f"there are {others:,} others" if options.k > others else f"{method} proposed no more (see --width)"
        sentence += f"; {lacking:,} fewer than --k {options.k:,} asks for: {reason}"
    if method != "exact":
        sample = np.sort(np.random.default_rng(0).choice(len(own), min(options.recall_sample, len(own)), replace=False))
        recall = search.recall(queries.vectors[sample], own[sample], options.k)
        sentence += f"; recall@{options.k} against exact search on {len(sample):,} of the notes: {recall:.4f}"
    sys.stdout.write(sentence + "\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    main()
