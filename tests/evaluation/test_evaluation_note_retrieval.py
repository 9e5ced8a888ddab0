"""The module of Hugging Face `evaluate` gives what the functions give."""

from pathlib import Path

import evaluate
import numpy as np
import pytest

import evaluation
from evaluation.metrics import retrieval_metrics


def test_the_module_equals_the_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(evaluation.__file__).parent / "note_retrieval"
    metric = evaluate.load(str(folder), cache_dir=str(tmp_path), experiment_id="test")
    rng = np.random.default_rng(0)
    embeds = rng.normal(size=(30, 6)).astype(np.float32)
    related = [rng.choice(np.delete(np.arange(30), note), size=note % 4, replace=False) for note in range(30)]
    computed = metric.compute(predictions=embeds, references=[own.tolist() for own in related], ks=[1, 5])
    assert computed == pytest.approx(retrieval_metrics(embeds, related, (1, 5)))
    in_parts = evaluate.load(str(folder), cache_dir=str(tmp_path), experiment_id="parts")
    for start in range(0, 30, 7):
        in_parts.add_batch(
            predictions=embeds[start : start + 7], references=[own.tolist() for own in related[start : start + 7]]
        )
    assert in_parts.compute(ks=[1, 5]) == computed
