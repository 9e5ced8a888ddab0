"""The nearest notes: exact search is sorting, ties included, and an index finds nearly as much."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.overrides import TorchFunctionMode

import hub.neighbors
import pairs.files
from evaluation.metrics import rank_related, tie_order
from hub.embeddings import EncodedRows, Manifest, load_embeddings, shard_file, write_shard
from hub.encode import encode_corpus
from hub.neighbors import Neighbors, NeighborSearch, main
from pairs.note_table import NoteTable


def unit_vectors(count: int, dim: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def clustered_vectors(count: int, dim: int, seed: int) -> np.ndarray:
    """Notes lie in groups, as real ones do."""
    centers = unit_vectors(count // 20, dim, seed)
    vectors = centers[np.random.default_rng(seed + 1).integers(0, len(centers), count)]
    vectors = vectors + 0.5 * unit_vectors(count, dim, seed + 2)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def all_found(search: NeighborSearch, queries: np.ndarray, own: np.ndarray, k: int) -> Neighbors:
    return Neighbors(*map(np.concatenate, zip(*search.search(queries, own, k), strict=True)))


def by_sorting(queries: np.ndarray, notes: np.ndarray, own: np.ndarray, k: int) -> Neighbors:
    """The definition: all float64 products, rounded to float32, sorted; ties in the order of the metrics."""
    order, rows = tie_order(len(notes)), []
    for query, vector in enumerate(queries):
        products = (notes.astype(np.float64) * vector.astype(np.float64)).sum(1).astype(np.float32)
        nearest = [note for note in np.lexsort((order, -products)).tolist() if note != own[query]][:k]
        rows += [(query, note, products[note], rank) for rank, note in enumerate(nearest, start=1)]
    return Neighbors(*map(np.array, zip(*rows, strict=True)))


def assert_same(found: Neighbors, expected: Neighbors) -> None:
    for name, values in found._asdict().items():
        np.testing.assert_array_equal(values, getattr(expected, name), err_msg=name)


@pytest.mark.parametrize("k", [1, 7, 40, 500])
@pytest.mark.parametrize("kind", ["random", "ties", "alike", "blank"])
def test_exact_search_is_sorting(kind: str, k: int, monkeypatch: pytest.MonkeyPatch):
    """Over many tiles and chunks, with fewer notes than asked for, equal notes, notes that float32 products hardly tell
    apart, and notes whose embedding is zero."""
    monkeypatch.setattr(hub.neighbors, "TILE_COLUMNS", 32)
    monkeypatch.setattr(hub.neighbors, "CHUNK", 50)
    notes = unit_vectors(230, 12, seed=0)
    if kind == "ties":
        notes = notes[np.random.default_rng(1).integers(0, 30, 230)]
    elif kind == "alike":
        notes = notes[:1] + np.float32(1e-4) * notes
    elif kind == "blank":
        notes[np.random.default_rng(1).random(230) < 0.3] = 0
    own = np.arange(230)
    found, expected = all_found(NeighborSearch(notes), notes, own, k), by_sorting(notes, notes, own, k)
    assert_same(found, expected)
    assert found.rank.dtype == np.int64 and found.similarity.dtype == np.float32
    assert not (found.query == found.note).any()
    # Control: another order of ties, or plain float32 products, would give others.
    if kind in ("ties", "blank") and k == 7:
        products = (notes.astype(np.float64) @ notes.astype(np.float64).T).astype(np.float32)
        np.fill_diagonal(products, -np.inf)
        naive = np.argsort(-products, axis=1, kind="stable")[:, :k].reshape(-1)
        assert (naive != found.note).any()


def test_candidates_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch):
    """All notes are equal: every one may be among the first."""
    monkeypatch.setattr(hub.neighbors, "TILE_COLUMNS", 16)
    monkeypatch.setattr(hub.neighbors, "WAITING", 100)
    notes, own = np.repeat(unit_vectors(1, 5, seed=0), 90, axis=0), np.arange(90)
    assert_same(all_found(NeighborSearch(notes), notes, own, 3), by_sorting(notes, notes, own, 3))


def test_new_queries_leave_out_themselves_alone():
    notes, queries = unit_vectors(60, 8, seed=0), unit_vectors(20, 8, seed=1)
    own = np.where(np.arange(20) % 2, np.arange(20) * 3, -1)
    found = all_found(NeighborSearch(notes), queries, own, 60)
    assert_same(found, by_sorting(queries, notes, own, 60))
    assert np.bincount(found.query).tolist() == [60, 59] * 10


def test_ranks_are_those_of_the_metrics():
    notes = unit_vectors(80, 6, seed=0)[np.random.default_rng(1).integers(0, 25, 80)]
    found = all_found(NeighborSearch(notes), notes, np.arange(80), 10)
    ranks = rank_related(notes, np.split(found.note, 80))
    np.testing.assert_array_equal(ranks.target, found.note)
    np.testing.assert_array_equal(ranks.rank, found.rank)


@pytest.mark.parametrize("method", ["hnsw", "ivfpq"])
def test_an_index_finds_nearly_as_much(method: hub.neighbors.Method, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub.neighbors, "IVFPQ_POINTS", 10)  # as small a corpus is for a test
    notes, own = clustered_vectors(2000, 16, seed=0), np.arange(2000)
    search, sample = NeighborSearch(notes, method), np.arange(0, 2000, 20)
    recall = search.recall(notes[sample], own[sample], 10)
    assert 0.9 < recall <= 1
    queries = notes[:50]
    found, expected = all_found(search, queries, own[:50], 10), by_sorting(queries, notes, own, 10)
    assert not (found.query == found.note).any() and found.rank.max() == 10
    # What is found is ordered and measured as exact search does.
    true = dict(zip(zip(expected.query, expected.note, strict=True), expected.similarity, strict=True))
    keys = list(zip(found.query, found.note, strict=True))
    hits = [(true[key], value) for key, value in zip(keys, found.similarity, strict=True) if key in true]
    assert len(hits) > 0.9 * len(true) and all(one == other for one, other in hits)
    steps = np.diff(found.similarity)[np.diff(found.query) == 0]
    assert (steps <= 0).all()
    # What it is measured by: the share of the true notes, which are all different here.
    keys = sample.repeat(10) * 2000
    of_sample = all_found(search, notes[sample], own[sample], 10)
    exact = all_found(NeighborSearch(notes), notes[sample], own[sample], 10)
    assert len(exact.note) == len(of_sample.note)
    assert recall == np.isin(keys + of_sample.note, keys + exact.note).mean()
    # Control: an index that is hardly looked at finds less, and recall says so.
    if method == "ivfpq":
        assert NeighborSearch(notes, method, 1).recall(notes[sample], own[sample], 10) < recall - 0.05


@pytest.mark.parametrize("method", ["hnsw", "ivfpq"])
def test_any_of_several_true_answers_counts(method: hub.neighbors.Method, monkeypatch: pytest.MonkeyPatch):
    """Each note is there twelve times: of eleven others with a similarity of one, ten are asked for."""
    monkeypatch.setattr(hub.neighbors, "IVFPQ_POINTS", 10)
    notes, own = unit_vectors(150, 8, seed=0).repeat(12, axis=0), np.arange(1800)
    search, sample = NeighborSearch(notes, method, 1800 if method == "hnsw" else 500), np.arange(0, 1800, 12)
    assert search.recall(notes[sample], own[sample], 10) == 1
    # Control: others that are less alike do not count.
    monkeypatch.setattr(search, "_proposed", lambda queries, own, k: search._exact(-queries, own, k))
    assert search.recall(notes[sample], own[sample], 10) == 0


@pytest.mark.parametrize("dim", [13, 17, 26, 31])
def test_codes_do_not_depend_on_divisors(dim: int, monkeypatch: pytest.MonkeyPatch):
    """A byte for two dimensions, also where D is a prime number, or 2 times one."""
    monkeypatch.setattr(hub.neighbors, "IVFPQ_POINTS", 10)
    notes, own = clustered_vectors(2000, dim, seed=0), np.arange(2000)
    search, sample = NeighborSearch(notes, "ivfpq"), np.arange(0, 2000, 20)
    assert search._index.code_size == (dim + 1) // 2
    assert search.recall(notes[sample], own[sample], 10) > 0.9


def test_an_index_is_built_in_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub.neighbors, "NOTES_AT_ONCE", 70)
    notes, own = clustered_vectors(500, 16, seed=0), np.arange(500)
    assert NeighborSearch(notes, "hnsw").recall(notes, own, 10) > 0.99


def test_rounded_factors_are_refused():
    """As TF32 and bfloat16 would have them, which the bound on rounding does not hold for."""
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ValueError, match=r"set_float32_matmul_precision\('highest'\)"):
            NeighborSearch(unit_vectors(50, 8, seed=0))
    finally:
        torch.set_float32_matmul_precision("highest")


class MovedSizes(TorchFunctionMode):
    """Rows of each matrix that is handed to `Tensor.to`."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.to and args[0].dim() == 2:
            self.sizes.append(len(args[0]))
        return function(*args, **(kwargs or {}))


def test_an_index_moves_a_tile_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """To where recall is measured, which may hold less than the corpus; exact search moves it once."""
    monkeypatch.setattr(hub.neighbors, "TILE_COLUMNS", 64)
    monkeypatch.setattr(hub.neighbors, "CHUNK", 50)
    notes, own = unit_vectors(230, 12, seed=0), np.arange(100)
    with MovedSizes() as moved:
        assert NeighborSearch(notes, "hnsw").recall(notes[:100], own, 5) > 0.9
    assert 64 in moved.sizes and max(moved.sizes) == 64
    with MovedSizes() as moved:
        all_found(NeighborSearch(notes), notes[:100], own, 5)
    assert moved.sizes.count(230) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_a_gpu_gives_the_same_answer(scale: float):
    notes = unit_vectors(20_000, 64, seed=0)
    notes = notes[:1] + np.float32(scale) * notes[np.random.default_rng(1).integers(0, 15_000, 20_000)]
    own = np.arange(0, 20_000, 40)
    found = all_found(NeighborSearch(notes, device="cuda"), notes[own], own, 50)
    assert_same(found, all_found(NeighborSearch(notes, device="cpu"), notes[own], own, 50))


def test_settings_are_checked():
    notes = unit_vectors(50, 8, seed=0)
    with pytest.raises(ValueError, match="take method='exact' or 'hnsw'"):
        NeighborSearch(notes, "ivfpq")
    with pytest.raises(ValueError, match="width=3 with method='exact'"):
        NeighborSearch(notes, "exact", 3)


def write_folder(folder: Path, ids: list[str], vectors: np.ndarray, **facts: Any) -> Path:
    """What `hub.encode` writes; the manifest says `facts`."""
    settings = {"model": "one", "model_fingerprint": "1", "notes": "n", "notes_fingerprint": "2", "dtype": "float32"}
    count, dim = vectors.shape
    (folder / "embeddings").mkdir(parents=True)
    manifest = Manifest(**settings | {"num_notes": count, "shard_size": count, "dim": dim} | facts)
    manifest.write(folder)
    write_shard(folder, manifest, 0, EncodedRows(np.arange(count), ids, vectors), [])
    return folder


def write_embeddings(folder: Path, ids: list[str], vectors: np.ndarray) -> Path:
    """The same as a file."""
    return shard_file(write_folder(folder, ids, vectors), "embeddings", 0)


def test_command_on_an_encoded_corpus(
    tiny_checkpoint: Path, world_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "embeddings"
    encode_corpus(tiny_checkpoint, NoteTable(world_folder / "notes.jsonl"), output, shard_size=40)
    notes = load_embeddings(output)
    assert len(notes.note_ids) == len(notes.vectors) == 96
    main([str(output), "--k", "5", "--output", str(tmp_path / "related.parquet")])
    assert "480 related notes of 96 notes among 96, method exact" in capsys.readouterr().out
    table = pq.read_table(tmp_path / "related.parquet")
    assert table.schema.equals(hub.neighbors.SCHEMA)
    expected = by_sorting(notes.vectors, notes.vectors, np.arange(96), 5)
    ids = np.array(notes.note_ids.to_pylist())
    assert table["note_id"].to_pylist() == ids[expected.query].tolist()
    assert table["related_note_id"].to_pylist() == ids[expected.note].tolist()
    np.testing.assert_array_equal(table["similarity"].to_numpy(), expected.similarity)
    assert table["rank"].to_pylist() == [1, 2, 3, 4, 5] * 96

    main([str(output), "--k", "5", "--method", "hnsw", "--output", str(tmp_path / "hnsw.parquet")])
    assert "recall@5 against exact search on 96 of the notes: 1.0000" in capsys.readouterr().out
    assert pq.read_table(tmp_path / "hnsw.parquet").equals(table)

    shard_file(output, "embeddings", 1).unlink()
    with pytest.raises(ValueError, match=r"2 of 3 shards: run hub\.encode again"):
        load_embeddings(output)


def test_command_with_queries(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A query that is also in the corpus does not find itself; the result is written in several parts."""
    corpus = write_embeddings(tmp_path / "corpus", list("abcd"), unit_vectors(4, 3, seed=0))
    queries = write_embeddings(tmp_path / "queries", ["c", "x"], unit_vectors(4, 3, seed=0)[2:])
    main([str(corpus), "--query", str(queries), "--output", str(tmp_path / "related.parquet")])
    rows = pq.read_table(tmp_path / "related.parquet").to_pylist()
    assert [row["note_id"] for row in rows] == ["c"] * 3 + ["x"] * 4
    assert "c" not in [row["related_note_id"] for row in rows[:3]]
    assert rows[3]["related_note_id"] == "d" and rows[3]["similarity"] == pytest.approx(1)
    assert "7 related notes of 2 notes among 4" in (said := capsys.readouterr().out)
    assert "193 fewer than --k 100 asks for: there are 3 others" in said
    main([str(corpus), "--query", str(queries), "--output", str(tmp_path / "related.csv"), "--k", "3"])
    assert "asks for" not in capsys.readouterr().out and (tmp_path / "related.csv").read_text().count("\n") == 7
    narrow = write_embeddings(tmp_path / "narrow", ["x"], unit_vectors(1, 2, seed=0))
    with pytest.raises(SystemExit):
        main([str(corpus), "--query", str(narrow), "--output", str(tmp_path / "related.parquet")])
    assert "width 2" in capsys.readouterr().err


def test_an_index_that_proposes_too_few_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hub.neighbors, "IVFPQ_POINTS", 5)
    corpus = write_embeddings(tmp_path / "corpus", list(map(str, range(2000))), unit_vectors(2000, 16, seed=0))
    options = ["--k", "900", "--method", "ivfpq", "--output", str(tmp_path / "related.parquet")]
    main([str(corpus), *options, "--width", "1", "--recall-sample", "1"])
    said = capsys.readouterr().out
    written = len(pq.read_table(tmp_path / "related.parquet"))
    assert f"{900 * 2000 - written:,} fewer than --k 900 asks for: ivfpq proposed no more (see --width)" in said


def test_help_names_the_kinds_of_tables():
    (output,) = (action for action in hub.neighbors.build_parser()._actions if action.dest == "output")
    assert output.help is not None and all(kind in output.help for kind in pairs.files._WRITERS)


def test_queries_of_another_model_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    notes = write_folder(tmp_path / "notes", list("abcd"), unit_vectors(4, 3, seed=0))
    same = write_folder(tmp_path / "same", list("xy"), unit_vectors(2, 3, seed=1), notes="m", dtype="bfloat16")
    other = write_folder(tmp_path / "other", list("xy"), unit_vectors(2, 3, seed=1), model="two", model_fingerprint="3")
    options = ["--output", str(tmp_path / "related.parquet"), "--query"]
    main([str(notes), *options, str(same)])
    assert not caplog.records
    (tmp_path / "related.parquet").unlink()
    with pytest.raises(SystemExit):
        main([str(notes), *options, str(other)])
    assert re.search(r"is of the model 3 \(two\), .* of 1 \(one\): encode both with one", capsys.readouterr().err)
    assert not (tmp_path / "related.parquet").exists()
    main([str(notes), *options, str(shard_file(other, "embeddings", 0))])  # of a file alone, nobody knows
    assert "see to it" in caplog.text
    caplog.clear()
    with pytest.raises(SystemExit):
        main([str(notes), *options, str(tmp_path / "nowhere")])
    assert "nowhere" in capsys.readouterr().err and not caplog.records
