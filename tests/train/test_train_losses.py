"""The contrastive loss against independent references, on random embeddings, with controls that must fail."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.losses import MultipleNegativesRankingLoss
from torch import Tensor
from torch.nn import functional

from train import losses
from train.losses import ContrastiveTargets, contrastive_loss, joint_loss, leading_dimensions


def random_embeds(rows: int, seed: int = 0, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(rows, width, generator=generator), dim=-1)


def random_targets(rows: int, seed: int = 0) -> ContrastiveTargets:
    """Several positives for some, none for others, further related notes, groups, log_q."""
    generator = np.random.default_rng(seed)

    def pairs(count: int) -> np.ndarray:
        drawn = generator.integers(0, rows, (count, 2))
        drawn = drawn[drawn[:, 0] != drawn[:, 1]]
        return np.unique(np.concatenate([drawn, drawn[:, ::-1]]), axis=0)

    groups = generator.integers(0, rows // 2, rows) * 10
    log_q = np.log(generator.dirichlet(np.ones(rows)))
    return ContrastiveTargets.of_plan(pairs(rows), pairs(rows // 2), groups, log_q)


def written_out(embeds: Tensor, scale: Tensor | float, targets: ContrastiveTargets) -> Tensor:
    """The formula in loops."""
    positives = [tuple(pair) for pair in targets.positives.tolist()]
    skipped = set(positives) | {tuple(pair) for pair in targets.related.tolist()}
    log_q = torch.zeros(len(embeds)) if targets.log_q is None else targets.log_q
    found = []
    for anchor, positive in positives:
        negatives = [
            note
            for note in range(len(embeds))
            if targets.groups[note] != targets.groups[anchor] and (anchor, note) not in skipped
        ]
        logits = torch.stack([scale * embeds[anchor] @ embeds[note] - log_q[note] for note in [positive, *negatives]])
        found.append(torch.logsumexp(logits, 0) - logits[0])
    return torch.stack(found).mean()


def of_pairs(rows: int) -> ContrastiveTargets:
    return ContrastiveTargets.of_pairs(rows // 2)


def test_equals_the_formula_of_the_paper():
    """Every one of 2N notes has its partner as positive, and all others as negatives."""
    embeds, half = random_embeds(10), 5
    logits = 20.0 * embeds @ embeds.T
    logits = logits.masked_fill(torch.eye(10, dtype=torch.bool), float("-inf"))
    expected = functional.cross_entropy(logits, torch.arange(10).roll(half))
    assert contrastive_loss(embeds, 20.0, of_pairs(10)).item() == pytest.approx(expected.item())
    # Controls: another scale, and the paper's bug of one direction only, must differ.
    assert contrastive_loss(embeds, 10.0, of_pairs(10)).item() != pytest.approx(expected.item(), abs=1e-3)
    one_way = of_pairs(10)._replace(positives=of_pairs(10).positives[:5])
    assert contrastive_loss(embeds, 20.0, one_way).item() != pytest.approx(expected.item(), abs=1e-3)


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
    assert contrastive_loss(embeds, 20.0, of_pairs(12)).item() == pytest.approx(expected.item(), abs=1e-6)
    # Control: one pass alone is another number.
    assert contrastive_loss(embeds, 20.0, of_pairs(12)).item() != pytest.approx(passes[0].item(), abs=1e-4)


@pytest.mark.parametrize("tile_size", [1, 3, 7, 64])
@pytest.mark.parametrize("seed", range(4))
def test_tiles_give_the_loss_and_the_gradients_of_the_whole(tile_size: int, seed: int):
    """Several positives an anchor, related notes, groups and logQ, against loops and autograd."""
    targets = random_targets(20, seed)
    raw = torch.randn(20, 16, generator=torch.Generator().manual_seed(seed))
    found, expected = [], []
    for result, loss_of in (
        (found, lambda x, s: contrastive_loss(x, s, targets, tile_size=tile_size)),
        (expected, lambda x, s: written_out(x, s, targets)),
    ):
        leaf, scale = raw.clone().requires_grad_(), torch.tensor(9.0, requires_grad=True)
        loss = loss_of(functional.normalize(leaf, dim=-1), scale)
        loss.backward()
        result += [loss.detach(), leaf.grad, scale.grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert expected[1].abs().max() > 1e-3 and expected[2].abs() > 1e-4


@pytest.mark.parametrize("name", ["positives", "related", "groups", "log_q"])
def test_every_part_of_the_targets_matters(name: str):
    """The control of the test above: without one part the loss is another."""
    embeds, targets = random_embeds(20, seed=5), random_targets(20)
    without = {
        "positives": targets.positives[1:],
        "related": targets.related[:0],
        "groups": torch.arange(20),
        "log_q": None,
    }
    whole = contrastive_loss(embeds, 9.0, targets)
    assert abs(whole - contrastive_loss(embeds, 9.0, targets._replace(**{name: without[name]}))) > 1e-3


def test_shares_add_up_to_the_loss():
    targets = random_targets(20)
    for count in (2, 3, 25):  # 25: some have no anchor
        leaf = random_embeds(20, seed=3).requires_grad_()
        contrastive_loss(leaf, 9.0, targets).backward()
        expected, leaf.grad = leaf.grad, None
        shares = [contrastive_loss(leaf, 9.0, targets, (index, count), tile_size=6) for index in range(count)]
        torch.stack(shares).sum().backward()
        assert sum(shares).item() == pytest.approx(contrastive_loss(leaf, 9.0, targets).item())
        torch.testing.assert_close(leaf.grad, expected)
        assert shares[0].item() != pytest.approx(sum(shares).item(), abs=1e-3)


def test_anchors_without_negatives_or_positives_are_finite():
    leaf = random_embeds(4).requires_grad_()
    all_alike = of_pairs(4)._replace(groups=torch.zeros(4, dtype=torch.int64))
    for targets in (all_alike, of_pairs(4)._replace(positives=torch.empty(0, 2, dtype=torch.int64))):
        leaf.grad = None
        loss = contrastive_loss(leaf, 20.0, targets)
        loss.backward()
        assert loss.item() == 0.0 and torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_autocast_does_not_round_the_loss():
    embeds = random_embeds(12).requires_grad_()
    expected = contrastive_loss(embeds, 20.0, of_pairs(12))
    (gradient,) = torch.autograd.grad(expected, embeds)
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(embeds, 20.0, of_pairs(12))
        assert loss.item() == expected.item()
        assert torch.equal(torch.autograd.grad(loss, embeds)[0], gradient)
        assert (embeds @ embeds.T).dtype == torch.bfloat16  # control: it would


def test_memory_is_that_of_a_tile(monkeypatch: pytest.MonkeyPatch):
    """The largest tensor that the loss makes of 4,096 notes is far below their 64 MB matrix, both ways."""
    largest = 0
    original = losses._tiles

    def watched(*arguments):
        nonlocal largest
        for rows, columns, masked in original(*arguments):
            largest = max(largest, masked.numel())
            yield rows, columns, masked

    monkeypatch.setattr(losses, "_tiles", watched)
    leaf = random_embeds(4096, width=8).requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        contrastive_loss(leaf, 20.0, of_pairs(4096), tile_size=256).backward()
    assert largest == 256 * 256
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 4096 * 4096 * 4 / 16


def test_joint_loss_weighs_both_and_learns_v_from_notes_with_image():
    embeds, visual = random_embeds(8, seed=1), random_embeds(8, seed=2)
    targets, everywhere = of_pairs(8), torch.ones(8, dtype=torch.bool)
    loss_m, loss_v = contrastive_loss(embeds, 20.0, targets), contrastive_loss(visual, 20.0, targets)
    loss, parts = joint_loss(embeds, visual, 20.0, everywhere, targets, 0.25)
    assert loss.item() == pytest.approx(((loss_m + 0.25 * loss_v) / 1.25).item())
    assert parts["loss_m"].item() == pytest.approx(loss_m.item()) and parts["loss_v"].item() == pytest.approx(loss_v)

    one_missing = everywhere.clone()
    one_missing[5] = False  # the partner of 1, which stays a negative of the others
    others = targets._replace(positives=torch.tensor([(0, 4), (2, 6), (3, 7), (4, 0), (6, 2), (7, 3)]))
    rows = [0, 1, 2, 3, 4, 6, 7]
    moved = others._replace(positives=others.positives - (others.positives > 5).long(), groups=torch.arange(7))
    expected = (loss_m + 0.25 * contrastive_loss(visual[rows], 20.0, moved)) / 1.25
    found, _ = joint_loss(embeds, visual, 20.0, one_missing, targets, 0.25)
    assert found.item() == pytest.approx(expected.item()) and found.item() != pytest.approx(loss.item())

    no_pair = torch.tensor([True, False, True, False, False, True, False, True])
    for arguments in ((visual, everywhere, 0.0), (visual, no_pair, 0.25), (None, everywhere, 0.25)):
        alone, parts = joint_loss(embeds, arguments[0], 20.0, arguments[1], targets, arguments[2])
        assert alone.item() == loss_m.item() and set(parts) == {"loss_m"}


def test_leading_dimensions_are_embeddings_of_their_own():
    embeds, visual, targets = random_embeds(8, seed=1), random_embeds(8, seed=2), of_pairs(8)
    everywhere = torch.ones(8, dtype=torch.bool)
    loss, parts = joint_loss(embeds, visual, 20.0, everywhere, targets, 0.25, dims=(4, 16))
    short = functional.normalize(embeds[:, :4], dim=-1)
    expected = (contrastive_loss(short, 20.0, targets) + contrastive_loss(embeds, 20.0, targets)) / 2
    assert parts["loss_m"].item() == pytest.approx(expected.item())
    assert torch.equal(leading_dimensions(embeds, 4), short) and torch.equal(leading_dimensions(embeds, 16), embeds)
    assert loss.item() != pytest.approx(joint_loss(embeds, visual, 20.0, everywhere, targets, 0.25)[0].item(), abs=1e-3)


def test_select_keeps_what_is_among_the_kept():
    targets = random_targets(20)
    kept = torch.rand(20, generator=torch.Generator().manual_seed(1)) > 0.3
    embeds = random_embeds(20)
    old = kept.nonzero().flatten().tolist()
    chosen = targets.select(kept)
    for name in ("positives", "related"):
        found = {(old[a], old[b]) for a, b in getattr(chosen, name).tolist()}
        everything = {tuple(pair) for pair in getattr(targets, name).tolist()}
        assert found == {(a, b) for a, b in everything if kept[a] and kept[b]} and found < everything
    assert torch.equal(chosen.groups, targets.groups[kept]) and torch.equal(chosen.log_q, targets.log_q[kept])
    assert contrastive_loss(embeds[kept], 9.0, chosen).isfinite()
