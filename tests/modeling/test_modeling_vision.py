"""Towers: what is read of each, and that a frozen one stays as it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig

from modeling_notellm2 import NoteLLM2Config, NoteLLM2Model
from modeling_notellm2.vision_notellm2 import VisionFeatures
from tests.backbones import NUM_PATCHES, TOWERS, random_picture

Compose = Callable[..., NoteLLM2Model]

# Patches, and the pooled vector as it follows from the tower's own output.
EXPECTED: dict[str, tuple[int, Callable[[Any], Tensor]]] = {
    "clip": (NUM_PATCHES, lambda output: output.last_hidden_state[:, 0]),
    "clip_dual": (NUM_PATCHES, lambda output: output.last_hidden_state[:, 0]),
    "siglip": (NUM_PATCHES, lambda output: output.pooler_output),
    "siglip2": (NUM_PATCHES, lambda output: output.pooler_output),
    "dinov2": (NUM_PATCHES, lambda output: output.last_hidden_state[:, 0]),
    "dinov2_with_registers": (NUM_PATCHES, lambda output: output.last_hidden_state[:, 0]),
    "vit": (NUM_PATCHES, lambda output: output.last_hidden_state[:, 0]),
    "convnext": (4, lambda output: output.pooler_output),
    "timm_cnn": (4, lambda output: output.last_hidden_state.mean((2, 3))),
    "timm_vit": (16, lambda output: output.last_hidden_state[:, 0]),
    "timm_vit_registers": (16, lambda output: output.pooler_output),
    "timm_channels_last": (4, lambda output: output.last_hidden_state.mean((1, 2))),  # its head widens the vector
}
PREFIX_TOKENS = {"clip": 1, "clip_dual": 1, "dinov2": 1, "dinov2_with_registers": 4, "vit": 1, "timm_vit": 1} | {
    "timm_vit_registers": 1
}


@pytest.mark.parametrize("tower", TOWERS)
def test_patches_and_pooled_vector(compose: Compose, tower_folder: Callable[[str], Path], tower: str) -> None:
    model = compose("llama", tower, moved=False)
    batch = model.processor([{"image": random_picture(i, size=(40 + 9 * i, 50))} for i in range(3)])
    pixels = {name: value for name, value in batch.items() if name.startswith(("pixel", "spatial"))}
    with torch.no_grad():
        features = model.get_image_features(**pixels)
        encoder = AutoModel.from_pretrained(tower_folder(tower)).eval()
        output = getattr(encoder, "vision_model", encoder)(**pixels)
    num_patches, pool = EXPECTED[tower]
    width = model.config.vision_hidden_size
    assert features.patch_embeds.shape == (3, num_patches, width)
    torch.testing.assert_close(features.pooled_embeds, pool(output))
    states = output.last_hidden_state
    if tower == "timm_vit_registers":  # its first token is no class token
        assert (features.pooled_embeds - states[:, 0]).abs().max() > 1e-2
    if states.dim() == 3:
        torch.testing.assert_close(features.patch_embeds, states[:, PREFIX_TOKENS.get(tower, 0) :])
    elif states.shape[1] == width:
        torch.testing.assert_close(features.patch_embeds[:, 1], states[:, :, 0, 1])
    else:
        torch.testing.assert_close(features.patch_embeds[:, 1], states[:, 0, 1])


def test_siglip2_patches_that_are_padding_change_nothing(compose: Compose) -> None:
    """NaFlex: pictures of each shape have their own number of patches, padded to one length."""
    model = compose("llama", "siglip2", processor={"prompt": "basic"})
    batch = model.processor([{"image": random_picture(i, size=size)} for i, size in enumerate([(60, 20), (40, 40)])])
    assert batch["spatial_shapes"].tolist()[0] != batch["spatial_shapes"].tolist()[1]
    assert batch["pixel_values"].dtype == torch.float32 and batch["pixel_values"].dim() == 3
    padding = batch["pixel_attention_mask"] == 0
    assert padding.any()
    with torch.no_grad():
        features = model.get_image_features(
            batch["pixel_values"], batch["pixel_attention_mask"], batch["spatial_shapes"]
        )
        assert torch.equal(features.patch_attention_mask, ~padding)
        expected = model(**batch).note_embeds
        batch["pixel_values"] = batch["pixel_values"].masked_fill(padding.unsqueeze(-1), 9.0)
        torch.testing.assert_close(model(**batch).note_embeds, expected, atol=1e-5, rtol=0)
        batch["pixel_attention_mask"] = torch.ones_like(batch["pixel_attention_mask"])
        assert (model(**batch).note_embeds - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("tower", "frozen"), [("timm_cnn", True), ("timm_cnn", False), ("clip", True), ("clip", False)]
)
def test_a_frozen_tower_stays_as_it_is(compose: Compose, tower: str, frozen: bool) -> None:
    model = compose("llama", tower, freeze_vision_tower=frozen).train()
    encoder = model.vision_tower.model
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    batch = model.processor([{"title": "oak", "image": random_picture(i)} for i in range(4)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(**batch).note_embeds[:, 0].sum().backward()
    optimizer.step()
    after = encoder.state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert encoder.training is not frozen
    if frozen:
        assert not moved and all(p.grad is None and not p.requires_grad for p in encoder.parameters())
        assert not model.get_image_features(batch["pixel_values"]).patch_embeds.requires_grad
    else:
        assert any("weight" in name for name in moved)
        assert tower == "clip" or any("running_mean" in name for name in moved)
    assert model.late_fusion.projection.weight.grad.abs().max() > 0  # what follows the tower trains either way


def test_a_text_only_model_refuses_pixels(compose: Compose) -> None:
    with pytest.raises(ValueError, match="text-only model"):
        compose(tower=None).get_image_features(torch.randn(1, 3, 32, 32))


def test_an_mlp_connector_refuses_a_varying_number_of_patches(compose: Compose) -> None:
    with pytest.raises(ValueError, match='use connector="qformer"'):
        compose("llama", "siglip2", connector="mlp").encode([random_picture(0)])


def test_query_tokens_differ_from_the_first_step(compose: Compose) -> None:
    model = compose(moved=False)
    with torch.no_grad():
        features = VisionFeatures(torch.randn(2, 5, model.config.vision_hidden_size), torch.randn(2, 24))
        tokens = model.connector(features)
        assert tokens.shape == (2, 3, model.config.hidden_size)
        spread = (tokens[:, 0] - tokens[:, 1]).abs().max()
        model.connector.query_tokens.zero_()
        assert spread > 1e-4
        same = model.connector(features)
        torch.testing.assert_close(same[:, 0], same[:, 1])  # what zeros, BLIP-2's default, would give


def test_mlp_connector_averages_patches_in_raster_order(compose: Compose) -> None:
    model = compose(connector="mlp", processor={"num_visual_tokens": 4})
    patches = torch.randn(2, 16, 24)
    with torch.no_grad():
        tokens = model.connector(VisionFeatures(patches, patches[:, 0]))
        means = patches.unflatten(1, (4, 4)).mean(2)
        first, _, second = model.connector.projector
        torch.testing.assert_close(tokens, second(torch.nn.functional.gelu(first(means))))


@pytest.mark.parametrize("change", ["few", "many", "none"])
def test_placeholders_must_match_the_visual_tokens(shared_tiny_model: NoteLLM2Model, change: str) -> None:
    config, processor = shared_tiny_model.config, shared_tiny_model.processor
    batch = processor([{"title": "no image"}, {"title": "oak", "image": random_picture(0)}])
    ids = batch["input_ids"]
    places = (ids[1] == config.image_token_id).nonzero().flatten().tolist()
    changed = {"few": places[:1], "none": places, "many": [places[-1] + 1]}[change]
    ids[1, changed] = config.image_token_id if change == "many" else 5
    found = {"few": 2, "none": 0, "many": 4}[change]
    with pytest.raises(ValueError, match=f"note 1 of the batch has {found} <IMG> placeholders.* 3 visual tokens"):
        shared_tiny_model(**batch)


def test_images_must_match_has_image(shared_tiny_model: NoteLLM2Model) -> None:
    batch = shared_tiny_model.processor([{"title": "oak", "image": random_picture(i)} for i in range(2)])
    with pytest.raises(ValueError, match="1 images were given for 2 notes"):
        shared_tiny_model(**{**batch, "pixel_values": batch["pixel_values"][:1]})
    with pytest.raises(ValueError, match="2 images were given for 1 notes"):
        shared_tiny_model(**{**batch, "has_image": torch.tensor([True, False])})
    with pytest.raises(ValueError, match="note 0 of the batch has 3 <IMG> placeholders.* 0 visual tokens"):
        shared_tiny_model(batch["input_ids"], batch["attention_mask"])


@pytest.mark.parametrize(
    ("settings", "width"),
    [({"hidden_sizes": [4, 8]}, 8), ({"hidden_size": 7}, 7), ({"num_features": 6}, 6)],
)
def test_the_towers_width_is_read_from_its_config(settings: dict[str, Any], width: int) -> None:
    assert NoteLLM2Config(vision_config=PreTrainedConfig(**settings)).vision_hidden_size == width
