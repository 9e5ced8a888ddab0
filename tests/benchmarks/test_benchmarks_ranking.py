"""The benchmark of the metrics runs, and sees a wrong rank."""

from typing import get_args

import numpy as np
import pytest

from benchmarks import ranking
from evaluation.metrics import Ranks


def test_prints_a_line_for_each_number_of_related_notes(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["--embeddings", "random", "anisotropic"]
    ranking.main(["--notes", "400", "--queries", "60", "--dim", "8", "--related", "1", "5", *kinds])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[2].startswith("| random, 8 | 400 | 60 | 1 |") and lines[2].endswith("| 50 |")
    assert lines[5].startswith("| anisotropic, 8 | 400 | 60 | 5 |")


def test_kinds_of_embeddings() -> None:
    cosines, blank = {}, {}
    for kind in get_args(ranking.Kind):
        embeds = ranking.draw_embeddings(kind, 300, 32, np.random.default_rng(0))
        cosines[kind], blank[kind] = float(np.mean(embeds @ embeds.T)), float(np.mean(~embeds.any(axis=1)))
    assert cosines["anisotropic"] > 0.98 > 0.1 > abs(cosines["random"])
    assert 0.05 < blank["blank"] < 0.15 and blank["random"] == 0


@pytest.mark.parametrize("kind", get_args(ranking.Kind))
def test_a_wrong_rank_ends_it(kind: ranking.Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = ranking.rank_related

    def off_by_one(embeds: np.ndarray, related: list[np.ndarray]) -> Ranks:
        found = rank(embeds, related)
        return Ranks(found.query, found.target, found.rank + 1, found.pool)

    assert ranking.run(kind, 100, 20, 4, 2)["pairs"] > 30
    monkeypatch.setattr(ranking, "rank_related", off_by_one)
    with pytest.raises(RuntimeError, match="by sorting"):
        ranking.run(kind, 100, 20, 4, 2)
