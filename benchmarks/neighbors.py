"""Speed, memory and recall of `hub.neighbors` by method and size of the corpus.

    python -m benchmarks.neighbors --notes 1e6 2e6 --dim 64 --methods exact hnsw ivfpq --queries 10000

Every method has a process of its own, which reads the embeddings from a file, builds its index, finds the `k` nearest
notes of some of the notes, and measures the recall on a sample of these against exact search. The embeddings have unit
length. They are random, which leaves an index nothing to go by, or in groups of twenty notes on average, whose cosine
with one another is about 0.8. Peak memory is that of the process, its libraries included.
"""

import argparse
import itertools
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from benchmarks.measure import Limits, measure
from benchmarks.pairs import whole_number
from benchmarks.ranking import draw_embeddings
from hub.embeddings import embeddings_schema, load_embeddings
from hub.neighbors import Method, NeighborSearch
from pairs.files import write_file

Kind = Literal["random", "groups"]

GROUP = 20
"""Notes a group, on average."""

SPREAD = 0.5
"""Distance of a note from the middle of its group, before it is normalised: 1 / (1 + SPREAD²) is their mean cosine."""

ROWS_AT_ONCE = 2**18
"""Notes that are drawn and written at a time."""


def write_corpus(kind: Kind, num_notes: int, dim: int, path: Path) -> None:
    """Draws embeddings and writes them as `hub.encode` would, some at a time."""
    rng = np.random.default_rng(0)
    middles = draw_embeddings("random", -(-num_notes // GROUP), dim, rng)

    def tables() -> Any:
        for first in range(0, num_notes, ROWS_AT_ONCE):
            count = min(ROWS_AT_ONCE, num_notes - first)
            embeds = draw_embeddings("random", count, dim, rng)
            if kind == "groups":
                embeds = middles[rng.integers(0, len(middles), count)] + np.float32(SPREAD) * embeds
                embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
            ids = pa.array([str(note) for note in range(first, first + count)])
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeds.reshape(-1)), dim)
            yield pa.table([ids, vectors], schema=embeddings_schema(dim))

    write_file(tables(), embeddings_schema(dim), path)


def run(corpus: Path, method: Method, width: int | None, num_queries: int, num_sample: int, k: int) -> dict[str, Any]:
    """Search once in this process.

    Returns:
        build_seconds: of the index; search_seconds: of all queries; queries: how many; recall: on the sample.
    """
    notes = load_embeddings(corpus).vectors
    queries = np.sort(np.random.default_rng(1).choice(len(notes), min(num_queries, len(notes)), replace=False))
    started = time.perf_counter()
    search = NeighborSearch(notes, method, width)
    built = time.perf_counter()
    for _found in search.search(notes[queries], queries, k):
        pass
    searched = time.perf_counter()
    sample = np.random.default_rng(2).permutation(queries)[:num_sample]
    recall = 1.0 if method == "exact" else search.recall(notes[sample], sample, k)
    seconds = {"build_seconds": built - started, "search_seconds": searched - built}
    return {**seconds, "queries": len(queries), "recall": recall}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.neighbors", description=__doc__.splitlines()[0])
    parser.add_argument("--notes", type=whole_number, nargs="+", default=[1_000_000, 2_000_000], help="of the corpus")
    parser.add_argument("--dim", type=whole_number, default=64, help="width of the embeddings")
    parser.add_argument("--embeddings", choices=get_args(Kind), nargs="+", default=["groups"], help="kinds of them")
    parser.add_argument("--methods", choices=get_args(Method), nargs="+", default=list(get_args(Method)))
    parser.add_argument(
        "--width", type=whole_number, help="as of hub.neighbors, for hnsw and ivfpq; default: by the index"
    )
    parser.add_argument("--queries", type=whole_number, default=10_000, help="notes whose nearest ones are found")
    parser.add_argument("--recall-sample", type=whole_number, default=1000, help="queries that recall is measured on")
    parser.add_argument("--k", type=whole_number, default=100, help="nearest notes a query")
    parser.add_argument("--memory-limit-gb", type=float, default=16.0)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)  # one run, in this process, over this file
    parser.add_argument("--single", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = build_parser().parse_args(arguments)
    if options.single is not None:
        width = None if options.methods[0] == "exact" else options.width
        found = run(options.corpus, options.methods[0], width, options.queries, options.recall_sample, options.k)
        options.single.write_text(json.dumps(found), encoding="utf-8")
        return
    sys.stdout.write(
        f"| Embeddings | Notes | Method | Build (s) | Queries/s | All notes (min, estimated) | Recall@{options.k} "
        "| Peak memory (GB) |\n|:--|--:|:--|--:|--:|--:|--:|--:|\n"
    )
    for kind, num_notes in itertools.product(options.embeddings, options.notes):
        with tempfile.TemporaryDirectory() as temp:
            corpus, result = Path(temp) / "corpus.parquet", Path(temp) / "result.json"
            write_corpus(kind, num_notes, options.dim, corpus)
            for method in options.methods:
                command = [sys.executable, "-m", "benchmarks.neighbors", f"--methods={method}", f"--corpus={corpus}"]
                command += [f"--queries={options.queries}", f"--recall-sample={options.recall_sample}"]
                command += [f"--k={options.k}", f"--single={result}"]
                command += [] if options.width is None else [f"--width={options.width}"]
                usage = measure(command, temp, Limits(options.memory_limit_gb, 4 * 3600))
                if usage.failure:
                    raise SystemExit(f"{subprocess.list2cmdline(command)}: {usage.failure}")
                found = json.loads(result.read_text(encoding="utf-8"))
                rate = found["queries"] / found["search_seconds"]
                sys.stdout.write(
                    f"| {kind}, {options.dim} | {num_notes:,} | {method} | {found['build_seconds']:.1f} | {rate:,.1f} "
                    f"| {(found['build_seconds'] + num_notes / rate) / 60:,.1f} | {found['recall']:.4f} "
                    f"| {usage.peak_memory_gb:.2f} |\n"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
