"""The benchmark of the nearest notes runs, on embeddings of which an index has something to go by."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hub.neighbors
from benchmarks import neighbors
from hub.embeddings import load_embeddings


def test_prints_a_line_for_each_method(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--notes", "600", "--dim", "8", "--queries", "40", "--recall-sample", "20", "--k", "5"]
    neighbors.main([*size, "--methods", "hnsw"])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert lines[2][:3] == ["groups, 8", "600", "hnsw"] and len(lines) == 3
    assert lines[0][6] == "Recall@5" and 0.95 < float(lines[2][6]) <= 1
    assert float(lines[2][7]) > 0.1  # libraries alone take more


@pytest.mark.parametrize("kind", ["random", "groups"])
def test_kinds_of_embeddings(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "ROWS_AT_ONCE", 150)
    neighbors.write_corpus(kind, 400, 16, tmp_path / "corpus.parquet")
    notes = load_embeddings(tmp_path / "corpus.parquet")
    assert notes.note_ids.to_pylist() == [str(note) for note in range(400)] and notes.vectors.shape == (400, 16)
    np.testing.assert_allclose(np.linalg.norm(notes.vectors, axis=1), 1, atol=1e-6)
    cosines = np.sort(notes.vectors @ notes.vectors.T, axis=1)
    near = float(np.mean(cosines[:, -11]))  # of the tenth neighbour: within a group of about twenty, or among all
    assert near > 0.75 if kind == "groups" else near < 0.65


def test_a_search_that_finds_less_has_less_recall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.neighbors, "IVFPQ_POINTS", 10)
    neighbors.write_corpus("random", 2000, 16, tmp_path / "corpus.parquet")
    recalls = [neighbors.run(tmp_path / "corpus.parquet", "ivfpq", width, 50, 50, 5)["recall"] for width in (1, 500)]
    assert recalls[0] < 0.5 < 0.95 < recalls[1]
