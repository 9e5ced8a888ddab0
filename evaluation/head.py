"""A small contrastively trained head on frozen features: the minute's alternative to a fine-tuned model.

Features are standardised, go through two layers, and are compared by their cosine. The head trains on related pairs
with the loss that trains NoteLLM-2 itself (`train.losses.contrastive_loss`), and the step with the best Recall@10 on
the validation notes is kept.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from evaluation.metrics import retrieval_metrics
from train.batches import distinct_notes
from train.losses import ContrastiveTargets, contrastive_loss
from train.related import RelatedNotes

logger = logging.getLogger(__name__)


@dataclass
class HeadSettings:
    """How a head is built and trained.

    Args:
        hidden_dim: width of the hidden layer.
        embedding_dim: width of the embeddings.
        dropout: share of features, and of hidden units, dropped in training.
        steps: optimiser steps.
        batch_pairs: pairs a step; all pairs at most.
        learning_rate: AdamW's, decayed to 0 along a cosine.
        weight_decay: AdamW's.
        temperature: divides the similarities in the loss.
        eval_steps: steps between two validations.
        seed: of the initial weights, the batches and the dropout.
    """

    hidden_dim: int = 512
    embedding_dim: int = 128
    dropout: float = 0.2
    steps: int = 200
    batch_pairs: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    temperature: float = 0.07
    eval_steps: int = 10
    seed: int = 0


class ContrastiveHead(nn.Module):
    """Standardise, Linear, GELU, Linear, L2-normalise.

    Args:
        features: (N, F) float training features, whose mean (each feature's own) and deviation (one for all)
            standardise all that come later.
        settings: the head's widths and dropout.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, features: np.ndarray, settings: HeadSettings) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(features.mean(axis=0), dtype=torch.float32))
        # One scale for all features: were each brought to unit variance, a wide encoder would drown a narrow one when
        # the two stand side by side. (Measured on movies and rooms: text and image together then found a quarter less.)
        deviation = float(np.sqrt(features.var(axis=0).mean()))
        self.register_buffer("scale", torch.tensor(1 / max(deviation, 1e-12), dtype=torch.float32))
        self.layers = nn.Sequential(
            nn.Dropout(settings.dropout),
            nn.Linear(features.shape[1], settings.hidden_dim),
            nn.GELU(),
            nn.Dropout(settings.dropout),
            nn.Linear(settings.hidden_dim, settings.embedding_dim),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, F) float32 features to (B, D) float32 embeddings, L2-normalised."""
        return nn.functional.normalize(self.layers((features - self.mean) * self.scale), dim=-1)

    @torch.inference_mode()
    def encode(self, features: np.ndarray) -> np.ndarray:
        """Map (N, F) float features to (N, D) float32 embeddings, without dropout."""
        training = self.training
        embeds = self.eval()(torch.tensor(features, dtype=torch.float32)).numpy()
        self.train(training)
        return embeds


def train_head(
    train_features: np.ndarray,
    train_related: Sequence[np.ndarray],
    validation_features: np.ndarray,
    validation_related: Sequence[np.ndarray],
    settings: HeadSettings | None = None,
) -> ContrastiveHead:
    """Train a head on related pairs of frozen features, and keep its best step by Recall@10 on validation notes.

    Training happens on the CPU, and the same arguments give the same head.

    Args:
        train_features: (N, F) float features of the training notes.
        train_related: for each of the N notes the positions of its related notes; each is a pair.
        validation_features: (M, F) float features of the validation notes.
        validation_related: for each of the M notes the positions of its related notes.
        settings: how the head is built and trained; default: `HeadSettings()`.

    Returns:
        The head, in evaluation mode.

    Raises:
        ValueError: if there is no training pair, or if features are not finite.
    """
    settings = settings if settings is not None else HeadSettings()
    anchors = np.repeat(np.arange(len(train_related)), [len(positions) for positions in train_related])
    if len(anchors) == 0:
        raise ValueError("train_related has no pair: check that the training pairs' note ids occur among the notes.")
    if not (np.isfinite(train_features).all() and np.isfinite(validation_features).all()):
        raise ValueError("Features contain NaN or infinity: check the encoder that made them.")
    positives = np.concatenate([np.asarray(positions, dtype=np.int64) for positions in train_related])
    pairs = np.stack([anchors, positives], axis=1)  # (P, 2)
    known = RelatedNotes(pairs, num_notes=len(train_related))
    features = torch.tensor(train_features, dtype=torch.float32)

    # The caller's random state is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        head = ContrastiveHead(train_features, settings)
        best_recall, best_state = -1.0, copy.deepcopy(head.state_dict())
        optimizer = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
        for step in tqdm(range(1, settings.steps + 1), desc="Head", unit="step"):
            notes, together = distinct_notes(pairs[torch.randperm(len(pairs))[: settings.batch_pairs].numpy()])
            targets = ContrastiveTargets.of_plan(together, known.among(notes), notes)
            loss = contrastive_loss(head(features[notes]), 1 / settings.temperature, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % settings.eval_steps == 0 or step == settings.steps:
                recall = retrieval_metrics(head.encode(validation_features), validation_related, ks=(10,))["recall@10"]
                if recall > best_recall:
                    best_recall, best_state = recall, copy.deepcopy(head.state_dict())
                    logger.info("step %d: validation recall@10 %.4f", step, recall)
    head.load_state_dict(best_state)
    return head.eval()
