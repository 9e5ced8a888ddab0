"""The retrieval metrics as a module of Hugging Face `evaluate`.

    import evaluate
    metric = evaluate.load("evaluation/note_retrieval")
    metric.compute(predictions=embeds, references=related, ks=[10, 100])

They are those of `evaluation.metrics`, which this checkout has to be on the path for.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from evaluation.metrics import retrieval_metrics

_DESCRIPTION = "Recall@K, NDCG@K, hit rate@K and MRR of related notes by the dot product of embeddings, exact."
_INPUTS = """
Args:
    predictions: N embeddings of D floats, normalised for the cosine.
    references: for each of the N notes the positions of its related notes; may be empty.
    ks: cuts.

Returns:
    `{"recall@10": …, "ndcg@10": …, "hit_rate@10": …, "mrr": …}`; see `evaluation.metrics`.
"""


class NoteRetrieval(evaluate.Metric):
    """See `_INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(
        self, predictions: Any, references: Sequence[Sequence[int]], ks: Sequence[int] = (10, 100)
    ) -> dict[str, float]:
        related = [np.asarray(positions, dtype=np.int64) for positions in references]
        return retrieval_metrics(np.asarray(predictions, dtype=np.float32), related, ks)
