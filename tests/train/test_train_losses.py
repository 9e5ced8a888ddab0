"""The contrastive loss against independent references, on random embeddings, with controls that must fail."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.losses import MultipleNegativesRankingLoss
from torch import Tensor
from torch.nn import functional

from train.losses import RelatedNotes, contrastive_loss, false_negative_mask, joint_loss


def random_embeds(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(rows, 16, generator=generator), dim=-1)


def written_out(embeds: Tensor, scale: float, negatives: list[list[int]]) -> Tensor:
    """The formula in loops: `negatives[i]` are the negatives of anchor i."""
    half = len(embeds) // 2
    losses = []
    for i, others in enumerate(negatives):
        positive = scale * embeds[i] @ embeds[(i + half) % len(embeds)]
        logits = torch.stack([positive, *(scale * embeds[i] @ embeds[j] for j in others)])
        losses.append(torch.logsumexp(logits, 0) - positive)
    return torch.stack(losses).mean()


def all_others(rows: int) -> list[list[int]]:
    return [[j for j in range(rows) if j not in (i, (i + rows // 2) % rows)] for i in range(rows)]


def test_equals_the_formula_written_out():
    embeds = random_embeds(10)
    assert contrastive_loss(embeds, 20.0).item() == pytest.approx(written_out(embeds, 20.0, all_others(10)).item())
    # Controls: another scale, and the paper's bug of one direction only, must differ.
    assert contrastive_loss(embeds, 10.0).item() != pytest.approx(written_out(embeds, 20.0, all_others(10)).item())
    one_way = written_out(embeds, 20.0, all_others(10)[:5])
    assert contrastive_loss(embeds, 20.0).item() != pytest.approx(one_way.item())


def test_equals_two_swapped_passes_of_sentence_transformers():
    """The mean of two joint passes over query→doc and query→query, on (q, d) and (d, q), is the anchor-both loss."""
    embeds = random_embeds(12, seed=1)
    loss = MultipleNegativesRankingLoss(
        SentenceTransformer(modules=[torch.nn.Identity()]),
        scale=20.0,
        directions=("query_to_doc", "query_to_query"),
        partition_mode="joint",
    )
    first, second = embeds.chunk(2)
    passes = [loss.compute_loss_from_embeddings(list(pair), None) for pair in ((first, second), (second, first))]
    expected = torch.stack(passes).mean()
    assert contrastive_loss(embeds, 20.0).item() == pytest.approx(expected.item(), abs=1e-6)
    # Control: one pass alone is another number.
    assert contrastive_loss(embeds, 20.0).item() != pytest.approx(passes[0].item(), abs=1e-4)


def test_the_same_note_and_related_notes_are_no_negatives():
    embeds = random_embeds(8, seed=2)
    note_ids = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0])  # the first note is the partner of the last pair, too
    related = RelatedNotes(np.array([(1, 6), (0, 4), (9, 2)]), num_notes=10)
    negatives = all_others(8)
    negatives[0].remove(7)
    negatives[7].remove(0)
    negatives[1].remove(6)
    negatives[6].remove(1)
    negatives[7].remove(4)  # row 7 is note 0, which is related to note 4
    negatives[4].remove(7)
    masked = contrastive_loss(embeds, 20.0, false_negative_mask(note_ids, related))
    assert masked.item() == pytest.approx(written_out(embeds, 20.0, negatives).item())
    assert masked.item() != pytest.approx(contrastive_loss(embeds, 20.0).item())  # the mask matters


def test_the_partner_stays_though_it_is_a_related_note():
    embeds = random_embeds(4, seed=3)
    related = RelatedNotes(np.array([(0, 2), (1, 3)]), num_notes=4)
    mask = false_negative_mask(torch.arange(4), related)
    assert mask[0, 2] and mask[1, 3]
    assert contrastive_loss(embeds, 20.0, mask).item() == pytest.approx(contrastive_loss(embeds, 20.0).item())


def test_related_notes_count_both_ways_and_only_where_known():
    related = RelatedNotes(np.array([(3, 1)]), num_notes=5)
    matrix = related.matrix(torch.tensor([1, 3, 4, 1]))
    assert matrix.nonzero().tolist() == [[0, 1], [1, 0], [1, 3], [3, 1]]
    assert not RelatedNotes(np.array([]), num_notes=5).matrix(torch.arange(5)).any()


def test_gradients_reach_embeddings_and_scale():
    embeds = torch.randn(6, 8, generator=torch.Generator().manual_seed(4), requires_grad=True)
    log_scale = torch.tensor(2.0, requires_grad=True)
    contrastive_loss(functional.normalize(embeds, dim=-1), log_scale.exp()).backward()
    assert embeds.grad is not None and (embeds.grad.abs().sum(1) > 0).all()
    numeric = (
        contrastive_loss(functional.normalize(embeds, dim=-1), torch.tensor(2.001).exp())
        - contrastive_loss(functional.normalize(embeds, dim=-1), torch.tensor(1.999).exp())
    ) / 0.002
    assert log_scale.grad is not None and log_scale.grad.item() == pytest.approx(numeric.item(), rel=1e-2)


@pytest.mark.parametrize("rows", [0, 3])
def test_refuses_rows_that_are_no_pairs(rows: int):
    with pytest.raises(ValueError, match=f"{rows} rows"):
        contrastive_loss(torch.randn(rows, 4), 20.0)


def test_joint_loss_weighs_both_and_leaves_pairs_without_two_images_out():
    embeds, visual = random_embeds(8, seed=1), random_embeds(8, seed=2)
    masked, everywhere = torch.eye(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool)
    loss_m, loss_v = contrastive_loss(embeds, 20.0), contrastive_loss(visual, 20.0)
    loss, parts = joint_loss(embeds, visual, 20.0, everywhere, masked, 0.25)
    assert loss.item() == pytest.approx(((loss_m + 0.25 * loss_v) / 1.25).item())
    assert parts["loss_m"].item() == pytest.approx(loss_m.item()) and parts["loss_v"].item() == pytest.approx(loss_v)

    one_missing = everywhere.clone()
    one_missing[5] = False  # the partner of 1
    rows = [0, 2, 3, 4, 6, 7]
    expected = (loss_m + 0.25 * contrastive_loss(visual[rows], 20.0)) / 1.25
    found, _ = joint_loss(embeds, visual, 20.0, one_missing, masked, 0.25)
    assert found.item() == pytest.approx(expected.item()) and found.item() != pytest.approx(loss.item())

    no_pair = torch.tensor([True, False, True, False, False, True, False, True])
    for arguments in ((visual, everywhere, 0.0), (visual, no_pair, 0.25), (None, everywhere, 0.25)):
        alone, parts = joint_loss(embeds, arguments[0], 20.0, arguments[1], masked, arguments[2])
        assert alone.item() == loss_m.item() and set(parts) == {"loss_m"}


def test_related_notes_answer_for_every_pair():
    generator = torch.Generator().manual_seed(0)
    pairs = {(a, b) for a, b in torch.randint(40, (60, 2), generator=generator).tolist() if a != b}
    ids = torch.randint(40, (50,), generator=generator)
    found = RelatedNotes(np.array(sorted(pairs)), 40).matrix(ids)
    expected = [[(a, b) in pairs or (b, a) in pairs for b in ids.tolist()] for a in ids.tolist()]
    assert found.tolist() == expected and found.any() and not found.all()
    assert not RelatedNotes(np.array([]), 40).matrix(ids).any()
