"""NoteLLM-2 as a module of sentence-transformers; the only file that imports it.

    SentenceTransformer(DIR, trust_remote_code=True)              the published folder's own code
    SentenceTransformer(modules=[NoteLLM2Module.load(DIR)])       this package's code, none from the folder

Inputs are notes as `NoteLLM2Model.encode` takes them, and the embeddings are the same. `SentenceTransformer(DIR)` alone
is refused: since its release 6.0 the library takes no class of another package, installed or not, on a folder's word.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor
from transformers.utils.versions import require_version

# Out of a local folder, transformers 5.6 to 5.9 takes the files that are named here, and not those which these name:
# what is not used is named for that.
from .configuration_notellm2 import NoteLLM2Config  # noqa: F401
from .connector_notellm2 import build_connector  # noqa: F401
from .fusion_notellm2 import LateFusion  # noqa: F401
from .image_notellm2 import ImageError  # noqa: F401
from .modeling_notellm2 import NoteLLM2Model
from .packing_notellm2 import pack  # noqa: F401
from .processing_notellm2 import NoteLLM2Processor
from .vision_notellm2 import VisionTower  # noqa: F401

# Said here, before the first name that 5.3 lacks.
require_version("sentence-transformers>=5.4", 'Older ones know texts alone: pip install "sentence-transformers>=5.4".')

from sentence_transformers.base.modules import InputModule  # noqa: E402

# What sentence-transformers calls the parts of a multimodal input. Notes have other fields, and a note table may have
# a column `text` that means something else, so that the name counts only in an input that has no other.
_MULTIMODAL_INPUT = frozenset({"text", "image"})


class NoteLLM2Module(InputModule):
    """Notes ─► `sentence_embedding` (B, D) float32, L2-normalised.

    Args:
        model: the model.
        processor: the processor saved beside it.

    Attributes:
        notes_by_id: `None`, or id ─► note. Where it is set, every input is an id, and stands for its note: for the
            parts of sentence-transformers that take strings only, as `mine_hard_negatives` does.
    """

    def __init__(self, model: NoteLLM2Model, processor: NoteLLM2Processor) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.notes_by_id: Mapping[str, Any] | None = None

    @property
    def modalities(self) -> list[Any]:
        """What sentence-transformers lets through; "message" is its name for a batch of several kinds of input."""
        return ["text", "image", "message"] if self.processor.image_processor is not None else ["text", "message"]

    @property
    def max_seq_length(self) -> None:
        """None: the processor cuts each field of a note, and never the prompt around them.

        Raises:
            ValueError: it is set to a number, which would cut what the embedding is read from.
        """
        return None

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        if value is not None:
            raise ValueError(
                f"max_seq_length={value}: the prompt around a note cannot be cut. Cut the note's fields: load the "
                'model with processor_kwargs={"max_content_tokens": …}, max_title_tokens or max_topics_tokens.'
            )

    def get_embedding_dimension(self) -> int:
        """D."""
        return self.model.config.embedding_dim or self.model.config.hidden_size

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """B notes ─► the model's inputs, each with one row a note: sentence-transformers cuts batches by rows.

        Returns:
            What `NoteLLM2Processor` returns, but `pixel_values` and what else describes images with B rows instead of
            N, those of notes without an image zero.

        Raises:
            NoteError: a note that cannot be read.
            ValueError: a prompt was given, or an input is no id of `notes_by_id`.
        """
        if prompt:
            raise ValueError(
                f"prompt={prompt!r}: the prompt around a note belongs to the model's processor, and encodes queries "
                "and documents alike; leave prompt and prompt_name out."
            )
        batch = self.processor([self._note(given) for given in inputs])
        has_image = batch["has_image"]
        return {
            name: value if value.shape[0] == len(has_image) else _spread(value, has_image)
            for name, value in batch.items()
        }

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` to what `preprocess` returned."""
        has_image = features["has_image"].bool()
        inputs = {name: features[name] for name in ("input_ids", "attention_mask")}
        if bool(has_image.any()):
            names = self.processor.image_processor.model_input_names
            inputs |= {name: features[name][has_image] for name in names if name in features}
        features["sentence_embedding"] = self.model(**inputs, has_image=has_image).note_embeds
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write model, processor, tokenizer and the model's code, always as safetensors."""
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)

    @classmethod
    def load(  # type: ignore[override]
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        **kwargs: Any,
    ) -> Self:
        """Load a checkpoint with the code that this class belongs to.

        Args:
            model_name_or_path: folder or Hub id.
            subfolder, token, cache_folder, revision, local_files_only: where and how to find its files.
            model_kwargs, config_kwargs: for `NoteLLM2Model.from_pretrained`, as `{"dtype": torch.bfloat16}`.
            processor_kwargs: settings of the processor, as `{"max_content_tokens": 64}`.
            backend: "torch".
            kwargs: whatever else sentence-transformers passes to every module.

        Raises:
            ValueError: another backend.
        """
        if backend != "torch":
            raise ValueError(
                f'backend={backend!r} is not supported by NoteLLM-2 in sentence-transformers: use "torch".'
            )
        source: dict[str, Any] = {
            "token": token,
            "cache_dir": cache_folder,
            "revision": revision or "main",
            "local_files_only": local_files_only,
        }
        if subfolder:
            source["subfolder"] = subfolder
        model = NoteLLM2Model.from_pretrained(
            model_name_or_path, **source, **{**(config_kwargs or {}), **(model_kwargs or {})}
        )
        processor = NoteLLM2Processor.from_pretrained(model_name_or_path, **source, **(processor_kwargs or {}))
        return cls(model, processor)

    def _note(self, given: Any) -> Any:
        if self.notes_by_id is not None:
            if not isinstance(given, str) or given not in self.notes_by_id:
                raise ValueError(
                    f"input {given!r:.200} is no id of notes_by_id ({len(self.notes_by_id)} notes): add its note, or "
                    "set notes_by_id to None to encode notes themselves."
                )
            return self.notes_by_id[given]
        if isinstance(given, Mapping) and "text" in given and given.keys() <= _MULTIMODAL_INPUT:
            return {"content": given["text"], "image": given.get("image")}
        return given


def _spread(rows: Tensor, has_image: Tensor) -> Tensor:
    """(N, …) of the notes with an image ─► (B, …)."""
    spread = rows.new_zeros(has_image.shape[0], *rows.shape[1:])
    spread[has_image] = rows
    return spread


__all__ = ["NoteLLM2Module"]
