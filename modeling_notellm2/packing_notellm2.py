"""A batch of notes through an LLM without its padding, what all of them begin with once.

    padded   [prompt  note 1 ……………]        packed   [prompt  note 1 ……………  note 2 ……  note 3 …………]
             [prompt  note 2 ……      ]
             [prompt  note 3 …………  ]

All parts of a decoder but attention treat tokens one by one, so that they take one long row of them. Attention sees
each note as it was, with the keys and values of the common beginning put in front of it again, and needs no mask:
padding at the end is never looked at by what stands before it.

The sums are those of the padded batch, and so are the results up to the rounding of float32; but that in training
with dropout, the notes of a batch share what is dropped of their common beginning.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

PACKED_ATTENTION = "notellm2_packed"
"""Name of the attention implementation that packs; for a batch that is not packed, the same as "sdpa"."""

PACKABLE_MODEL_TYPES = frozenset(
    {
        "cohere",
        "gemma",
        "gemma3_text",
        "gpt2",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "starcoder2",
    }
)
"""LLMs that are known to pass their keywords on to each attention, and to tell positions by `position_ids` alone."""


class PackedBatch(NamedTuple):
    """Where the T packed tokens of B notes, of S tokens at most, come from and go to.

    Attributes:
        tokens: (T,) int64, their places in the flattened padded batch.
        position_ids: (1, T) int64, their positions in their notes.
        rows: (B, S) int64, the packed tokens of each note, from its first to its last; any after that.
        places: (T,) int64, where in the flattened `rows` each of them stands first.
        masks: window ─► (S, S) bool, True where a token sees another; made for the first layer that has the window.
    """

    tokens: Tensor
    position_ids: Tensor
    rows: Tensor
    places: Tensor
    masks: dict[int, Tensor]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        """Each note's attention to itself: (1, H, T, d_h) queries, keys and values ─► (1, T, H, d_h).

        Raises:
            ValueError: the layer caps its logits or has an attention sink, which "sdpa" would leave out unsaid.
        """
        for name in ("softcap", "s_aux"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{type(module).__name__} attends with {name}, which packing does not know: use another attention, "
                    'model.language_model.set_attn_implementation("eager").'
                )
        query, key, value = (
            _take(states[0].transpose(0, 1), self.rows).transpose(1, 2) for states in (query, key, value)
        )
        mask = self._mask(kwargs.get("sliding_window"))
        attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
        attended, _ = attention(module, query, key, value, mask, **{**kwargs, "is_causal": mask is None})
        return attended.flatten(0, 1).index_select(0, self.places).unsqueeze(0)

    def _mask(self, window: int | None) -> Tensor | None:
        """(S, S) bool of a sliding window; None where no note is longer."""
        length = self.rows.shape[1]
        if window is None or length <= window:
            return None
        if window not in self.masks:
            place = torch.arange(length, device=self.rows.device)
            distance = place.unsqueeze(1) - place
            self.masks[window] = (distance >= 0) & (distance < window)
        return self.masks[window]


def pack(input_ids: Tensor, attention_mask: Tensor, image_token_id: int) -> PackedBatch:
    """Plan a batch: which of its tokens are computed, and what each note consists of.

    Args:
        input_ids: (B, L) int64.
        attention_mask: (B, L) of any dtype, 1 for real tokens; padding on either side.
        image_token_id: `<IMG>`, whose embedding differs from note to note: a common beginning ends before it.
    """
    attention_mask = attention_mask.long()
    lengths = attention_mask.sum(1)
    first = attention_mask.argmax(1)
    place = torch.arange(int(lengths.max()), device=input_ids.device)  # (S,)
    columns = (first.unsqueeze(1) + place).clamp(max=input_ids.shape[1] - 1)  # (B, S)
    ids = input_ids.gather(1, columns)
    note = torch.arange(len(ids), device=input_ids.device)
    shared, owner = torch.zeros_like(note), note.clone()
    is_image = ids == image_token_id
    # Without a question to the device, which would have to finish its work for the answer: a group may be empty.
    for group in (is_image.any(1), ~is_image.any(1)):  # their prompts differ
        leader = group.int().argmax(0, keepdim=True)  # (1,)
        same = ((ids == ids[leader]) | ~group.unsqueeze(1)).all(0) & ~is_image[leader].squeeze(0)  # (S,)
        # The last token is each note's own: it is the one that is read.
        same &= place < lengths.masked_fill(~group, ids.shape[1]).min() - 1
        shared = torch.where(group, same.int().cumprod(0).sum(), shared)
        owner = torch.where(group, leader, owner)
    is_shared = place < shared.unsqueeze(1)
    is_computed = (place < lengths.unsqueeze(1)) & (~is_shared | (owner == note).unsqueeze(1))
    number = (is_computed.flatten().cumsum(0) - 1).clamp(min=0).view_as(ids)
    places = is_computed.flatten().nonzero().squeeze(1)
    return PackedBatch(
        tokens=(note.unsqueeze(1) * input_ids.shape[1] + columns).flatten().index_select(0, places),
        position_ids=(places % ids.shape[1]).unsqueeze(0),
        rows=torch.where(is_shared, number[owner], number),
        places=places,
        masks={},
    )


def packed_states(language_model: PreTrainedModel, inputs_embeds: Tensor, batch: PackedBatch) -> Tensor:
    """(B, L, d) embeddings ─► (B, L, d) last hidden states; zero for padding, and for a common beginning in all notes
    but the first that has it."""
    embeds = inputs_embeds.flatten(0, 1)
    states = language_model(
        # Not embeds[batch.tokens]: on a processor its gradients would be added in another order each time.
        inputs_embeds=embeds.index_select(0, batch.tokens).unsqueeze(0),
        position_ids=batch.position_ids,
        # A mask of four dimensions is passed on as it is; another one would be made from the positions. An attention
        # that does not get `packed` would use it, and tokens would see those of other notes: better no number at all.
        attention_mask=embeds.new_full((1, 1, 1, 1), torch.nan),
        use_cache=False,
        packed=batch,
    ).last_hidden_state[0]
    return states.new_zeros(embeds.shape).index_copy(0, batch.tokens, states).view_as(inputs_embeds)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: PackedBatch | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as `transformers` calls it: (1, H, T, d_h) queries, keys and values ─► (1, T, H, d_h).

    All releases of this code that a process has loaded register one name, so that a packed batch brings its own.
    """
    if packed is not None:
        return packed.attend(module, query, key, value, **kwargs), None
    output: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask, **kwargs
    )
    return output


def _take(states: Tensor, rows: Tensor) -> Tensor:
    """(T, …) states ─► (B, S, …), those at `rows` (B, S)."""
    return states.index_select(0, rows.flatten()).unflatten(0, rows.shape)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])

__all__ = ["PACKABLE_MODEL_TYPES", "PACKED_ATTENTION", "PackedBatch", "pack", "packed_attention", "packed_states"]
