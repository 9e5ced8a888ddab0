"""The benchmark of the metrics runs, and sees a wrong rank."""

import numpy as np
import pytest

from benchmarks import ranking
from evaluation.metrics import Ranks


def test_prints_a_line_for_each_number_of_related_notes(capsys: pytest.CaptureFixture[str]) -> None:
    ranking.main(["--notes", "400", "--queries", "60", "--dim", "8", "--related", "1", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].startswith("| 400 | 60 | 1 |") and lines[2].endswith("| 50 |")


def test_a_wrong_rank_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = ranking.rank_related

    def off_by_one(embeds: np.ndarray, related: list[np.ndarray]) -> Ranks:
        found = rank(embeds, related)
        return Ranks(found.query, found.target, found.rank + 1, found.pool)

    assert ranking.run(100, 20, 4, 2)["pairs"] > 30
    monkeypatch.setattr(ranking, "rank_related", off_by_one)
    with pytest.raises(RuntimeError, match="by sorting"):
        ranking.run(100, 20, 4, 2)
