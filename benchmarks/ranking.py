"""Time and memory of the retrieval metrics on a large pool, and their exactness on a sample of the queries.

    python -m benchmarks.ranking --notes 1e6 --queries 21000 --dim 64 --related 1 10
    python -m benchmarks.ranking --notes 2e5 --queries 5000 --dim 576 --related 1 --embeddings anisotropic blank

Embeddings are of unit length and random; anisotropic ones, as an LLM's states, have a cosine of 0.99, so
that float32 products hardly tell them apart; of blank ones a tenth is zero. Related notes are drawn at random, so that
their ranks are anywhere in the pool. A sample of queries is ranked once more by sorting all of the pool by the float64
products rounded to float32; any difference ends the benchmark.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from benchmarks.measure import Limits, measure
from benchmarks.pairs import whole_number
from evaluation.metrics import mean_metrics, rank_related, tie_order

SAMPLE = 50
Kind = Literal["random", "anisotropic", "blank"]


def draw_embeddings(kind: Kind, num_notes: int, dim: int, rng: np.random.Generator) -> np.ndarray:
    """(N, D) float32 of a kind, see above."""
    embeds = rng.standard_normal((num_notes, dim), dtype=np.float32)
    if kind == "anisotropic":  # |mean|² / (|mean|² + |own|²) is the mean cosine
        embeds = 10 * rng.standard_normal(dim, dtype=np.float32) + embeds
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    if kind == "blank":
        embeds[rng.random(num_notes) < 0.1] = 0
    return embeds


def run(kind: Kind, num_notes: int, num_queries: int, dim: int, num_related: int) -> dict[str, Any]:
    """Rank once in this process.

    Returns:
        seconds: of ranking and of the metrics; pairs: queries and related notes; checked: pairs of the sample.

    Raises:
        RuntimeError: a rank is not that of the sorted pool.
    """
    rng = np.random.default_rng(0)
    embeds = draw_embeddings(kind, num_notes, dim, rng)
    related: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * num_notes
    queries = np.sort(rng.choice(num_notes, num_queries, replace=False))
    for query in queries.tolist():
        drawn = np.unique(rng.integers(0, num_notes - 1, num_related))
        related[query] = drawn + (drawn >= query)
    started = time.perf_counter()
    ranks = rank_related(embeds, related)
    mean_metrics(ranks, (10, 100, 1000, 10_000, 100_000))
    seconds = time.perf_counter() - started
    exact, ties = embeds.astype(np.float64), tie_order(num_notes)
    checked = 0
    for query in rng.choice(queries, min(SAMPLE, num_queries), replace=False).tolist():
        scores = (exact @ exact[query]).astype(np.float32)
        scores[query] = -np.inf
        place = np.empty(num_notes, dtype=np.int64)
        place[np.lexsort((ties, -scores))] = np.arange(1, num_notes + 1)
        own = ranks.query == query
        if not np.array_equal(place[ranks.target[own]], ranks.rank[own]):
            raise RuntimeError(f"query {query}: ranks {ranks.rank[own]}, by sorting {place[ranks.target[own]]}.")
        checked += int(own.sum())
    return {"seconds": seconds, "pairs": len(ranks.query), "checked": checked}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranking", description=__doc__.splitlines()[0])
    parser.add_argument("--notes", type=whole_number, default=1_000_000, help="notes of the pool")
    parser.add_argument("--queries", type=whole_number, default=21_000)
    parser.add_argument("--dim", type=whole_number, default=64, help="width of the embeddings")
    parser.add_argument("--related", type=whole_number, nargs="+", default=[1, 10], help="related notes a query")
    parser.add_argument("--embeddings", choices=get_args(Kind), nargs="+", default=["random"], help="kinds of them")
    parser.add_argument("--memory-limit-gb", type=float, default=16.0)
    parser.add_argument("--single", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # one run, in this process
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = build_parser().parse_args(arguments)
    if options.single is not None:
        found = run(options.embeddings[0], options.notes, options.queries, options.dim, options.related[0])
        options.single.write_text(json.dumps(found), encoding="utf-8")
        return
    sys.stdout.write(
        "| Embeddings | Notes | Queries | Related | Time (s) | Peak memory (GB) | Checked pairs |\n"
        "|:--|--:|--:|--:|--:|--:|--:|\n"
    )
    for kind, num_related in itertools.product(options.embeddings, options.related):
        with tempfile.TemporaryDirectory() as temp:
            file = Path(temp) / "result.json"
            settings = [f"--notes={options.notes}", f"--queries={options.queries}", f"--dim={options.dim}"]
            settings += [f"--related={num_related}", f"--embeddings={kind}"]
            command = [sys.executable, "-m", "benchmarks.ranking", *settings]
            usage = measure([*command, "--single", str(file)], temp, Limits(options.memory_limit_gb, 3600))
            if usage.failure:
                raise SystemExit(f"{subprocess.list2cmdline(command)}: {usage.failure}")
            found = json.loads(file.read_text(encoding="utf-8"))
        sys.stdout.write(
            f"| {kind}, {options.dim} | {options.notes:,} | {options.queries:,} | {num_related} "
            f"| {found['seconds']:.1f} | {usage.peak_memory_gb:.2f} | {found['checked']} |\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
