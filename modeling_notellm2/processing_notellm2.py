"""Notes ─► tensors: the prompts, the tokenizer's two new tokens, and the refusal of bad input.

The prompt's own structure is placed as token ids, field by field. A note's text is tokenised by a copy of the tokenizer
that knows no added token, and cut before it is placed: whatever a note says, it cannot forge `<IMG>`, end the prompt
early or push the prompt's last word out.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeGuard, get_args

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import custom_object_save

# Not from the top: transformers 5.6 hides it there without torchvision, which its PIL backend does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.processing_utils import ProcessorMixin

from .configuration_notellm2 import check_num_visual_tokens
from .image_notellm2 import ImageError, check_image, decode_image, image_value, read_bytes, shown

IMAGE_TOKEN = "<IMG>"
IMAGE_EMBEDDING_TOKEN = "<IMG_EMB>"
TEXT_FIELDS = ("title", "topics", "content")

# "basic" is the MLRM baseline, "micl" multimodal in-content learning; "text" shows no image.
Prompt = Literal["basic", "micl", "text"]
Language = Literal["en", "zh"]
Template = Literal["paper", "compact"]
PaddingSide = Literal["right", "left"]


class _Words(NamedTuple):
    """What the prompts of one template and language are made of."""

    start: str
    image_note: str
    basic_note: str
    text_note: str
    compress: str
    after_image: str


_TEMPLATES: dict[Template, dict[Language, _Words]] = {
    "paper": {  # NoteLLM-2; the Chinese wording is the one the paper's code was trained with
        "en": _Words(
            start="",
            image_note="Note content: {'image': '<IMG>'}",
            basic_note="Note content: {'image': '<IMG>', 'title': '{title}', 'topic': '{topics}', "
            "'content': '{content}'}",
            text_note="Note content: {'title': '{title}', 'topic': '{topics}', 'content': '{content}'}",
            compress='. Compress this note into one word: "',
            after_image='<IMG_EMB>". ',
        ),
        "zh": _Words(
            start="",
            image_note='笔记：{"图片":"<IMG>"}',
            basic_note='笔记：{"图片":"<IMG>","标题":"{title}","话题":"{topics}","内容":"{content}"}',
            text_note='笔记：{"标题":"{title}","话题":"{topics}","内容":"{content}"}',
            compress="，压缩为一个词：“",
            after_image="<IMG_EMB>”。",
        ),
    },
    # One token after a field: a line break, which no field can hold, as white space in them is folded; a colon where
    # the model reads. The instruction stands where all notes begin alike, which packing computes once.
    "compact": {
        "en": _Words(
            start="In one word\n",
            image_note="<IMG>",
            basic_note="<IMG>{title}\n{topics}\n{content}",
            text_note="{title}\n{topics}\n{content}",
            compress=":",
            after_image="<IMG_EMB>",
        ),
        "zh": _Words(
            start="一个词\n",
            image_note="<IMG>",
            basic_note="<IMG>{title}\n{topics}\n{content}",
            text_note="{title}\n{topics}\n{content}",
            compress="：",
            after_image="<IMG_EMB>",
        ),
    },
}


def prompt_template(prompt: Prompt, language: Language, template: Template = "paper") -> str:
    """The prompt of a note with an image, with `<IMG>`, `<IMG_EMB>`, `{title}`, `{topics}` and `{content}` in place.

    >>> prompt_template("micl", "zh")
    '笔记：{"图片":"<IMG>"}，压缩为一个词：“<IMG_EMB>”。笔记：{"标题":"{title}","话题":"{topics}","内容":"{content}"}，压缩为一个词：“'
    >>> prompt_template("micl", "en", "compact")
    'In one word\\n<IMG>:<IMG_EMB>{title}\\n{topics}\\n{content}:'
    """
    words = _TEMPLATES[template][language]
    note = words.basic_note if prompt == "basic" else words.text_note
    if prompt == "micl":
        note = words.image_note + words.compress + words.after_image + note
    return words.start + note + words.compress


def is_template_name(template: str) -> TypeGuard[Template]:
    """Whether it names templates, and is no template itself.

    >>> is_template_name("compact"), is_template_name("{title} in one word:")
    (True, False)
    """
    return template in get_args(Template)


class NoteError(ValueError):
    """A note that cannot be read. The message gives the note's index, the field, its value and the remedy."""


@dataclass(frozen=True)
class EncodedNote:
    """A note as token ids, with its image still undecoded.

    Attributes:
        index: position of the note in the caller's sequence, for error messages.
        input_ids: the whole prompt, visual placeholders included.
        text_mask: for each of these ids, whether it is the note's own text: of its title, topics or content.
        image: whatever the note holds as its image; `None` without one.
        pixels: what the image processor makes of the image, where `load_image` was asked for it.
    """

    index: int
    input_ids: list[int]
    text_mask: list[bool]
    image: Any
    pixels: dict[str, torch.Tensor] | None = None

    def content_digest(self) -> bytes | None:
        """16 bytes by which notes that say and show the same are found, wherever their image's file is.

        None: its picture is in memory. To compare pixels would take as long as to decode a file.
        """
        content = hashlib.blake2b(digest_size=16)
        content.update(f"{len(self.input_ids)} {self.input_ids} {type(self.image).__name__}".encode())
        if self.pixels is not None:  # by now the file may have changed or gone
            for name in sorted(self.pixels):
                content.update(
                    f"{name} {tuple(self.pixels[name].shape)}".encode() + self.pixels[name].numpy().tobytes()
                )
        elif isinstance(self.image, bytes):
            content.update(self.image)
        elif isinstance(self.image, str | os.PathLike):
            with suppress(ImageError):  # `load_image` will name it
                content.update(read_bytes(self.image))
        elif self.image is not None:
            return None
        return content.digest()


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Add `<IMG>` and `<IMG_EMB>`.

    The LLM's embedding matrix is not resized: both tokens get their embeddings from NoteLLM-2's own parameters.
    """
    new_tokens = [AddedToken(token, special=True, normalized=False) for token in (IMAGE_TOKEN, IMAGE_EMBEDDING_TOKEN)]
    tokenizer.add_tokens(new_tokens, special_tokens=True)
    return tokenizer


class NoteLLM2Processor(ProcessorMixin):
    """Turns notes into the inputs of [`NoteLLM2Model`].

    Args:
        image_processor: the vision tower's image processor; `None` for a text-only model. `from_backbones` and
            `from_pretrained` take its PIL backend, which gives other pixels than the torchvision one.
        tokenizer: the LLM's tokenizer, with a `tokenizers` backend (a "fast" one), extended by `extend_tokenizer`.
        prompt: `"basic"`, `"micl"` or `"text"` (no visual tokens: text-only, or late fusion only).
        language: `"en"` or `"zh"`.
        num_visual_tokens: how many `<IMG>` placeholders an image takes.
        max_title_tokens, max_topics_tokens, max_content_tokens: each field is cut to so many tokens.
        padding_side: `"right"` or `"left"`; embeddings do not depend on it.
        template: prompt of a note with an image: `"paper"`, `"compact"` (few tokens; to be trained with), or words of
            your own. The first two are those of `prompt_template`. The attribute holds the words, and so does what is
            saved: a checkpoint keeps those it was trained with.
        text_template: the same for a note without an image; by default of the same name, `"paper"` beside words.

    Raises:
        ValueError: an unknown setting, a tokenizer without a `tokenizers` backend, a template that holds nothing of a
            note or breaks the order image, `<IMG_EMB>`, text.
    """

    settings: ClassVar[tuple[str, ...]] = (
        "prompt",
        "language",
        "num_visual_tokens",
        "max_title_tokens",
        "max_topics_tokens",
        "max_content_tokens",
        "padding_side",
        "template",
        "text_template",
    )
    """Names of the settings that `processor_config.json` holds."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prompt: Prompt = "micl",
        language: Language = "en",
        num_visual_tokens: int = 16,
        max_title_tokens: int = 32,
        max_topics_tokens: int = 32,
        max_content_tokens: int = 128,
        padding_side: PaddingSide = "right",
        template: str = "paper",
        text_template: str | None = None,
    ) -> None:
        for name, value, choices in (
            ("prompt", prompt, Prompt),
            ("language", language, Language),
            ("padding_side", padding_side, PaddingSide),
        ):
            if value not in get_args(choices):
                raise ValueError(f"{name}={value!r} is unknown: choose one of {get_args(choices)}.")
        check_num_visual_tokens(num_visual_tokens)
        for name, number in (
            ("max_title_tokens", max_title_tokens),
            ("max_topics_tokens", max_topics_tokens),
            ("max_content_tokens", max_content_tokens),
        ):
            if number < 0:
                raise ValueError(f"{name}={number} must be at least 0.")
        if tokenizer is None or not hasattr(tokenizer, "backend_tokenizer"):
            raise ValueError(
                f"tokenizer={type(tokenizer).__name__} has no `tokenizers` backend, which hostile text needs: load it "
                "with AutoTokenizer, or convert it to a tokenizer.json first."
            )
        # ProcessorMixin.__init__ insists on an image processor; a text-only model has none.
        self.chat_template = None
        self.image_processor = image_processor
        self.tokenizer = extend_tokenizer(tokenizer)
        self.prompt = prompt
        self.language = language
        self.num_visual_tokens = num_visual_tokens
        self.max_title_tokens = max_title_tokens
        self.max_topics_tokens = max_topics_tokens
        self.max_content_tokens = max_content_tokens
        self.padding_side = padding_side
        if text_template is None:
            text_template = template if is_template_name(template) else "paper"
        self.template = _template_words(template, prompt, language)
        self.text_template = _template_words(text_template, "text", language)
        _check_template("template", self.template)
        _check_template("text_template", self.text_template)
        if IMAGE_TOKEN in self.text_template:
            raise ValueError(f"text_template={self.text_template!r} must not hold {IMAGE_TOKEN}: it is for no image.")

    @classmethod
    def from_backbones(cls, llm: str | os.PathLike, vision: str | os.PathLike | None = None, **settings: Any) -> Self:
        """Take the tokenizer of an LLM and the image processor of a vision tower (local folders or Hub ids)."""
        if vision is None:
            settings.setdefault("prompt", "text")
        tokenizer = AutoTokenizer.from_pretrained(llm, trust_remote_code=False)
        return cls(_load_image_processor(vision), tokenizer, **settings)

    @property
    def image_token_id(self) -> int:
        """Id of `<IMG>`."""
        return int(self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))

    @property
    def image_embedding_token_id(self) -> int:
        """Id of `<IMG_EMB>`."""
        return int(self.tokenizer.convert_tokens_to_ids(IMAGE_EMBEDDING_TOKEN))

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that `__call__` may return."""
        image_names = [] if self.image_processor is None else list(self.image_processor.model_input_names)
        return ["input_ids", "attention_mask", "has_image", *image_names]

    def __call__(self, notes: Sequence[Any], padding_side: PaddingSide | None = None) -> BatchFeature:
        """Notes (mappings, strings or PIL images) ─► tensors.

        Returns:
            `input_ids` (B, T) int64, `attention_mask` (B, T) int64, `has_image` (B,) bool; where a note has an image
            also `pixel_values` (N, C, H, W) float32 for the N notes with one, in order.

        Raises:
            NoteError: a note that cannot be read.

        Example (see the README for a real one):
            >>> batch = processor([{"title": "Oak shelf", "image": "shelf.jpg"}, "just a text"])  # doctest: +SKIP
        """
        return self.collate([self.encode_note(note, index) for index, note in enumerate(notes)], padding_side)

    def encode_note(self, note: Any, index: int = 0) -> EncodedNote:
        """Check one note and turn it into token ids; its image is not decoded yet.

        Args:
            note: a mapping with any of `title`, `topics`, `content`, `image`; a string (its content); a PIL image; an
                encoded note, which is returned as it is.
            index: position of the note, named in errors.

        Raises:
            NoteError: not a note, a field of the wrong type, or neither text nor image.
        """
        if isinstance(note, EncodedNote):
            return note
        fields = _as_mapping(note, index)
        texts = {name: _field_text(fields.get(name), name, index) for name in TEXT_FIELDS}
        image = _image_reference(fields.get("image"), index)
        if image is None and not any(texts.values()):
            raise NoteError(
                f"notes[{index}] has neither text nor image (its keys: {shown(sorted(map(str, fields)))}): fill one of "
                "title, topics, content, image, or leave the note out."
            )
        if self.image_processor is None:
            if not any(texts.values()):
                raise NoteError(f"notes[{index}].image is all this note has, but the model is text-only: add a text.")
            image = None
        template = self.template if image is not None else self.text_template
        return EncodedNote(index, *self._tokenize(template, texts), image)

    def collate(
        self, notes: Sequence[EncodedNote], padding_side: PaddingSide | None = None, decode_images: bool = True
    ) -> BatchFeature:
        """Pad encoded notes into one batch and decode their images. Returns what `__call__` returns.

        Args:
            notes: from `encode_note`.
            padding_side: by default the processor's.
            decode_images: `False` leaves the pixels out, for callers that hold the tower's output already.
        """
        if decode_images:
            notes = [self.load_image(note) for note in notes]
        rows = [self.token_ids(note) for note in notes]
        length = max(map(len, rows), default=0)
        left = (padding_side or self.padding_side) == "left"
        # Padding is masked, so that any token will do; a tokenizer's own one may lie beyond its LLM's matrix.
        input_ids = torch.zeros(len(notes), length, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(rows):
            span = slice(length - len(ids), None) if left else slice(len(ids))
            input_ids[row, span] = torch.tensor(ids)
            attention_mask[row, span] = 1
        has_image = torch.tensor([note.image is not None for note in notes], dtype=torch.bool)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "has_image": has_image}
        images = [note.pixels for note in notes if decode_images and note.pixels is not None]
        if images:
            batch |= {name: torch.cat([image[name] for image in images]) for name in images[0]}
        return BatchFeature(batch)

    def token_ids(self, note: EncodedNote) -> list[int]:
        """The ids that the model reads of a note, for a subclass whose images take as many as they are large."""
        return note.input_ids

    def load_image(self, note: EncodedNote) -> EncodedNote:
        """Decode and process a note's image now, and keep the result.

        Raises:
            NoteError: the image cannot be read.
        """
        return note if note.image is None or note.pixels is not None else replace(note, pixels=self._pixels(note))

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `processor_config.json` (the image processor inside it), the tokenizer and this code."""
        if push_to_hub:
            raise ValueError("push_to_hub=True is not supported here: save to a folder and publish the folder whole.")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        settings = self.to_dict()
        if self._auto_class is not None:
            custom_object_save(self, folder, config=settings)  # copies the code and sets settings["auto_map"]
        self.tokenizer.save_pretrained(folder)
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (folder / "processor_config.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "NoteLLM2Processor":
        """Load what `save_pretrained` wrote, from a folder or a Hub repository.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            kwargs: settings of `__init__` to override (`padding_side="left"`); the rest (`revision`, `token`,
                `cache_dir`, …) goes to the Hub.
        """
        settings, hub = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        overrides = {name: hub.pop(name) for name in cls.settings if name in hub}
        hub = {name: value for name, value in hub.items() if not name.startswith("_") and name != "trust_remote_code"}
        # Not AutoTokenizer, which would load our config first and, from remote code, ask for consent once more.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, **hub)
        has_images = "image_processor" in settings
        image_processor = _load_image_processor(pretrained_model_name_or_path if has_images else None, **hub)
        saved = {name: settings[name] for name in cls.settings if name in settings}
        if is_template_name(overrides.get("template", "")):
            saved.pop("text_template", None)  # a name is for both
        return cls(image_processor, tokenizer, **{**saved, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """The settings that `processor_config.json` holds."""
        settings: dict[str, Any] = {name: getattr(self, name) for name in self.settings}
        settings["processor_class"] = type(self).__name__
        if self.image_processor is not None:
            settings["image_processor"] = _image_processor_dict(self.image_processor)
        return settings

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.to_dict(), indent=2, ensure_ascii=False)}"

    def _tokenize(self, template: str, texts: Mapping[str, str]) -> tuple[list[int], list[bool]]:
        """A template's static parts, placeholders and fields ─► one list of ids, and which of them a field gave."""
        ids = list(self._leading_ids)
        text_mask = [False] * len(ids)
        for part in _template_parts(template):
            field = part.strip("{}") if part.startswith("{") else None
            if part == IMAGE_TOKEN:
                piece = [self.image_token_id] * self.num_visual_tokens
            elif part == IMAGE_EMBEDDING_TOKEN:
                piece = [self.image_embedding_token_id]
            elif field in TEXT_FIELDS:
                piece = self._text_ids(texts[field], getattr(self, f"max_{field}_tokens"))
            else:
                piece = self._text_ids(part, None)
            ids += piece
            text_mask += [field in TEXT_FIELDS] * len(piece)
        return ids, text_mask

    def _text_ids(self, text: str, max_tokens: int | None) -> list[int]:
        """Plain text ─► ids, none of which is an added token."""
        if max_tokens is not None:
            # Bounds the time a megabyte of text takes; no field of sensible text is cut here before it is cut below.
            text = text[: 64 * max_tokens]
        encoding = self._text_tokenizer.encode(text, add_special_tokens=False)
        unknown = self.tokenizer.unk_token_id
        spelled: dict[str, list[int]] = {}  # so that a run of one letter, however long, is tokenised once
        ids: list[int] = []
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id not in self._structure_ids:
                ids.append(token_id)
                continue
            # Some vocabularies also spell a control token in plain letters; its letters one by one cannot be it.
            for letter in set(text[start:end]) - spelled.keys():
                letter_ids = self._text_tokenizer.encode(letter, add_special_tokens=False).ids
                spelled[letter] = [i for i in letter_ids if i == unknown or i not in self._structure_ids]
            letters = [letter_id for letter in text[start:end] for letter_id in spelled[letter]]
            # A run of letters that the vocabulary lacks is one unknown token, as it was.
            ids += letters if set(letters) != {unknown} else [unknown]
        return ids[:max_tokens]

    @cached_property
    def _text_tokenizer(self) -> Tokenizer:
        return _without_added_tokens(self.tokenizer)

    @cached_property
    def _structure_ids(self) -> frozenset[int]:
        """Ids that no text may produce: every added token and every special one."""
        return frozenset(self.tokenizer.added_tokens_decoder) | frozenset(self.tokenizer.all_special_ids)

    @cached_property
    def _leading_ids(self) -> list[int]:
        """The begin-of-sequence token, where the tokenizer would put one. (An end-of-sequence token is never added:
        the prompt's last token is the one that is read.)"""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("").input_ids[:1] == [bos] else []

    def _pixels(self, note: EncodedNote) -> dict[str, torch.Tensor]:
        image = read_image(note.image, note.index)
        try:
            # One image a call: a failure names its note, and one note's image cannot change another's tensor.
            return dict(self.image_processor(images=[image], return_tensors="pt"))
        except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
            raise NoteError(
                f"notes[{note.index}].image of {image.width}x{image.height} pixels was refused by the image processor "
                f"({error}): resize it, or leave the image out."
            ) from error


def _template_words(template: str, prompt: Prompt, language: Language) -> str:
    return prompt_template(prompt, language, template) if is_template_name(template) else template


def _template_parts(template: str) -> list[str]:
    fields = "|".join(rf"\{{{name}\}}" for name in TEXT_FIELDS)
    return [part for part in re.split(f"({IMAGE_EMBEDDING_TOKEN}|{IMAGE_TOKEN}|{fields})", template) if part]


def _check_template(name: str, template: str) -> None:
    parts = _template_parts(template)
    order = [part for part in parts if part in (IMAGE_TOKEN, IMAGE_EMBEDDING_TOKEN) or part.startswith("{")]
    images, ends = order.count(IMAGE_TOKEN), order.count(IMAGE_EMBEDDING_TOKEN)
    if images > 1 or ends > 1:
        raise ValueError(f"{name}={template!r} holds {IMAGE_TOKEN} or {IMAGE_EMBEDDING_TOKEN} twice: keep one of each.")
    # n_v must have seen the image and no text, and its position must hold a token of the template.
    if ends and (order[:2] != [IMAGE_TOKEN, IMAGE_EMBEDDING_TOKEN] or template.endswith(IMAGE_EMBEDDING_TOKEN)):
        raise ValueError(f"{name}={template!r}: put {IMAGE_TOKEN} first, then {IMAGE_EMBEDDING_TOKEN}, then the text.")
    if not parts or parts[-1] in order:
        raise ValueError(f"{name}={template!r} must end in its own words: the last token is what the model reads.")
    if not order:
        raise ValueError(
            f"{name}={template!r} is unknown, and holds nothing of a note: choose one of {get_args(Template)}, or give "
            "words with {title}, {topics} and {content} in them."
        )


def _as_mapping(note: Any, index: int) -> Mapping[str, Any]:
    if isinstance(note, Mapping):
        return note
    if isinstance(note, str):
        return {"content": note}
    if isinstance(note, Image.Image):
        return {"image": note}
    raise NoteError(
        f"notes[{index}] is a {type(note).__name__}: pass a mapping with title, topics, content, image, or a string, "
        "or a PIL image."
    )


def _field_text(value: Any, field: str, index: int) -> str:
    """One field as clean text: white space folded, what UTF-8 cannot hold replaced."""
    if value is None:
        return ""
    if field == "topics" and isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for topic in value:
            if not isinstance(topic, str):
                raise NoteError(f"notes[{index}].topics holds {shown(topic)}: every topic must be a string.")
        value = ", ".join(value)
    if not isinstance(value, str):
        kind = "a string or a list of strings" if field == "topics" else "a string"
        raise NoteError(
            f"notes[{index}].{field} is {shown(value)} ({type(value).__name__}): pass {kind}, or leave it empty."
        )
    return " ".join(value.encode("utf-8", "replace").decode("utf-8").split())


def has_image(note: Mapping[str, Any]) -> bool:
    """Whether a note's `image` is filled, readable or not. An empty path, like None, is no image.

    >>> has_image({"image": "vase.jpg"}), has_image({"image": ""}), has_image({"title": "Vase"})
    (True, False, False)
    """
    return image_value(note.get("image")) is not None


def _image_reference(value: Any, index: int) -> Any:
    """Check an image's kind without decoding it; None where there is none."""
    try:
        return check_image(value)
    except ImageError as error:
        raise _image_error(index, error) from (error.__cause__ or error)


def read_image_file(path: str | os.PathLike, index: int = 0) -> bytes:
    """The content of an image's file, bounded as `image_notellm2` says. `index` and errors as for `read_image`."""
    try:
        return read_bytes(path)
    except ImageError as error:
        raise _image_error(index, error) from (error.__cause__ or error)


def read_image(value: Any, index: int = 0) -> Image.Image:
    """An RGB picture, turned the way its EXIF data says, transparent parts on white.

    Args:
        value: a note's `image`; see `image_notellm2.check_image`.
        index: position of the note, named in errors.

    Raises:
        NoteError: it is no image, exceeds a bound of `image_notellm2`, or cannot be read.
    """
    try:
        return decode_image(value)
    except ImageError as error:
        raise _image_error(index, error) from (error.__cause__ or error)  # what may pass is told by its cause


def _image_error(index: int, error: ImageError) -> NoteError:
    return NoteError(f"notes[{index}].image: {error}")


def _load_image_processor(source: str | os.PathLike | None, **hub: Any) -> Any:
    """The PIL backend wherever there is one: the torchvision backend resizes a little differently, and embeddings must
    not depend on whether torchvision is installed."""
    if source is None:
        return None
    return AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False, **hub)


def _image_processor_dict(image_processor: Any) -> dict[str, Any]:
    """What `AutoImageProcessor` needs to build the same image processor again."""
    settings = json.loads(image_processor.to_json_string())
    if "data_config" in settings:
        # timm's image processor leaves its settings to the tower's config.json, which a checkpoint of ours has not.
        settings["pretrained_cfg"] = settings.pop("data_config")
    return settings


def _without_added_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The same vocabulary and merges, blind to added tokens and adding no space in front.

    Pieces are placed one after another inside a prompt, so a dummy prefix space, right for the start of a text, would
    put a stray space into the middle of one.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    state["normalizer"] = _without_prefix_space(state["normalizer"])
    state["pre_tokenizer"] = _without_prefix_space(state["pre_tokenizer"])
    return Tokenizer.from_str(json.dumps(state))


def _without_prefix_space(component: dict[str, Any] | None) -> dict[str, Any] | None:
    if component is None or component["type"] == "Prepend":
        return None
    for key in ("normalizers", "pretokenizers"):
        if key in component:
            kept = [_without_prefix_space(part) for part in component[key]]
            return {**component, key: [part for part in kept if part is not None]}
    if component["type"] == "Metaspace":
        return {**component, "prepend_scheme": "never"}
    if component["type"] == "ByteLevel":
        return {**component, "add_prefix_space": False}
    return component


NoteLLM2Processor.register_for_auto_class()

__all__ = [
    "EncodedNote",
    "NoteError",
    "NoteLLM2Processor",
    "extend_tokenizer",
    "has_image",
    "prompt_template",
    "read_image",
    "read_image_file",
]
