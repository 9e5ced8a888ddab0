"""Prompts, bad input, saving and loading of the processor. (Hostile notes: test_hostile_text, test_hostile_images.)"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

from modeling_notellm2 import NoteError, NoteLLM2Model, NoteLLM2Processor
from modeling_notellm2.processing_notellm2 import prompt_template
from tests.backbones import TOKENIZERS, TOWERS, random_picture, save

FIELDS = {"title": "Oak shelf", "topics": ["home", "wood"], "content": "sanded, oiled"}

PROMPTS = {
    ("paper", "micl", "en"): "Note content: {'image': '<IMG><IMG>'}. Compress this note into one word: \"<IMG_EMB>\". "
    "Note content: {'title': 'Oak shelf', 'topic': 'home, wood', 'content': 'sanded, oiled'}. "
    'Compress this note into one word: "',
    ("paper", "basic", "en"): "Note content: {'image': '<IMG><IMG>', 'title': 'Oak shelf', 'topic': 'home, wood', "
    "'content': 'sanded, oiled'}. Compress this note into one word: \"",
    ("paper", "text", "en"): "Note content: {'title': 'Oak shelf', 'topic': 'home, wood', 'content': 'sanded, oiled'}. "
    'Compress this note into one word: "',
    ("paper", "micl", "zh"): '笔记：{"图片":"<IMG><IMG>"}，压缩为一个词：“<IMG_EMB>”。笔记：{"标题":"Oak shelf","话题":'
    '"home, wood","内容":"sanded, oiled"}，压缩为一个词：“',
    ("paper", "basic", "zh"): '笔记：{"图片":"<IMG><IMG>","标题":"Oak shelf","话题":"home, wood","内容":'
    '"sanded, oiled"}，压缩为一个词：“',
    ("paper", "text", "zh"): '笔记：{"标题":"Oak shelf","话题":"home, wood","内容":"sanded, oiled"}，压缩为一个词：“',
    ("compact", "micl", "en"): "In one word\n<IMG><IMG>:<IMG_EMB>Oak shelf\nhome, wood\nsanded, oiled:",
    ("compact", "basic", "en"): "In one word\n<IMG><IMG>Oak shelf\nhome, wood\nsanded, oiled:",
    ("compact", "text", "en"): "In one word\nOak shelf\nhome, wood\nsanded, oiled:",
    ("compact", "micl", "zh"): "一个词\n<IMG><IMG>：<IMG_EMB>Oak shelf\nhome, wood\nsanded, oiled：",
    ("compact", "basic", "zh"): "一个词\n<IMG><IMG>Oak shelf\nhome, wood\nsanded, oiled：",
    ("compact", "text", "zh"): "一个词\nOak shelf\nhome, wood\nsanded, oiled：",
}
each_template = pytest.mark.parametrize("template", ["paper", "compact"])


def image_processor() -> Any:
    return TOWERS["clip"]()[1]


def make(tokenizer: str = "byte_level", **settings: Any) -> NoteLLM2Processor:
    return NoteLLM2Processor(image_processor(), TOKENIZERS[tokenizer](), **{"num_visual_tokens": 2, **settings})


def decoded(processor: NoteLLM2Processor, note: Any) -> str:
    return processor.tokenizer.decode(processor.encode_note(note).input_ids)


@pytest.mark.parametrize("tokenizer", [name for name in TOKENIZERS if name != "unigram"])
@pytest.mark.parametrize(("template", "prompt", "language"), PROMPTS)
def test_prompts_decode_exactly(tokenizer: str, template: Any, prompt: Any, language: Any) -> None:
    processor = make(tokenizer, prompt=prompt, language=language, template=template)
    bos = processor.tokenizer.bos_token if tokenizer in ("bos", "prepend", "metaspace") else ""
    with_image = decoded(processor, {**FIELDS, "image": random_picture(0)})
    assert with_image == bos + PROMPTS[template, prompt, language]
    assert decoded(processor, FIELDS) == bos + PROMPTS[template, "text", language]


def test_a_plain_string_is_content_and_a_picture_is_an_image() -> None:
    processor = make()
    assert decoded(processor, "oak") == decoded(processor, {"content": "oak"})
    assert decoded(processor, random_picture(0)) == decoded(processor, {"image": random_picture(0)})
    assert decoded(processor, {"topics": "home, wood"}) == decoded(processor, {"topics": ["home", "wood"]})
    assert decoded(processor, {"title": " oak\n\t shelf "}) == decoded(processor, {"title": "oak shelf"})


@pytest.mark.parametrize("tokenizer", [name for name in TOKENIZERS if name != "unigram"])
@pytest.mark.parametrize("prompt", ["micl", "basic", "text"])
@each_template
def test_the_text_mask_marks_what_the_fields_say(tokenizer: str, prompt: Any, template: str) -> None:
    processor = make(tokenizer, prompt=prompt, template=template, max_content_tokens=8)
    hostile = {**FIELDS, "content": "Note content: <IMG> <IMG_EMB>", "image": random_picture(0)}
    for note in ({**FIELDS, "image": random_picture(0)}, FIELDS, hostile):
        encoded = processor.encode_note(note)
        marked = [token for token, own in zip(encoded.input_ids, encoded.text_mask, strict=True) if own]
        expected = [processor._text_ids(text, None) for text in ("Oak shelf", "home, wood", note["content"])]
        assert marked == expected[0] + expected[1] + expected[2][:8]
    assert not any(processor.encode_note(random_picture(0)).text_mask)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@each_template
def test_fields_are_cut_by_tokens_and_the_structure_stays(tokenizer: str, template: str) -> None:
    processor = make(tokenizer, template=template, max_title_tokens=5, max_topics_tokens=4, max_content_tokens=6)
    long = {"title": "oak shelf " * 99, "topics": ["wood"] * 99, "content": "sanded and oiled " * 999}
    ids = processor.encode_note({**long, "image": random_picture(0)}).input_ids
    empty = processor.encode_note({"image": random_picture(0)}).input_ids
    assert len(ids) == len(empty) + 5 + 4 + 6
    end = len(processor._text_ids(processor.template.split("{content}")[1], None))
    begin = empty.index(processor.image_embedding_token_id) + 1
    assert ids[-end:] == empty[-end:] and ids[:begin] == empty[:begin]
    none = make(tokenizer, template=template, max_title_tokens=0, max_topics_tokens=0, max_content_tokens=0)
    assert none.encode_note({**long, "image": random_picture(0)}).input_ids == empty


def test_a_control_token_in_the_text_is_spelled_out() -> None:
    """It is text about the token: nothing of it is lost, also where the vocabulary's merges would build the token."""
    for tokenizer in ("byte_level", "merging", "metaspace"):
        processor = make(tokenizer, max_title_tokens=200)
        assert "'title': 'a <|im_end|></s> z'" in decoded(processor, {"title": "a <|im_end|></s> z"})
    merging = TOKENIZERS["merging"]()
    assert merging.backend_tokenizer.model.tokenize("</s>")[0].id == merging.eos_token_id  # merges do build it


def test_unknown_letters_are_unknown_tokens() -> None:
    processor = make("unigram")
    unknown = processor.tokenizer.unk_token_id
    empty = processor.encode_note({"image": random_picture(0)}).input_ids.count(unknown)

    def unknowns(title: str) -> int:
        return processor.encode_note({"title": title, "image": random_picture(0)}).input_ids.count(unknown) - empty

    assert unknowns("oak") == 0 and unknowns("\u05d0") == 1 and unknowns("\u05d0\u05d1\u05d2") == 1
    assert unknowns("<unk>") == processor._text_ids("<", None).count(unknown) + processor._text_ids(">", None).count(
        unknown
    )


BAD_NOTES: dict[str, tuple[Any, str]] = {
    "number": (7, "is a int: pass a mapping with title, topics, content, image, or a string, or a PIL image"),
    "none": (None, "is a NoneType: pass a mapping"),
    "list": (["a"], "is a list: pass a mapping"),
    "empty": ({}, "has neither text nor image (its keys: []): fill one of title"),
    "blank": ({"title": " \n", "note_id": "x"}, "has neither text nor image (its keys: ['note_id', 'title'])"),
    "empty string": ("", "has neither text nor image"),
    "title": ({"title": 3.5}, ".title is 3.5 (float): pass a string, or leave it empty"),
    "nan": ({"content": float("nan")}, ".content is nan (float): pass a string, or leave it empty"),
    "bytes": ({"content": b"oak" * 10_000}, ".content is b'oak"),
    "topics": ({"topics": 3}, ".topics is 3 (int): pass a string or a list of strings"),
    "topic": ({"topics": ["a", None]}, ".topics holds None: every topic must be a string"),
    "missing file": (
        {"image": "/no/such.jpg"},
        ".image: no file '/no/such.jpg'. Give the path of an image's file",
    ),
    "path": ({"image": Path("/no/such.jpg")}, ".image: no file '/no/such.jpg'"),
    "folder": ({"image": "/"}, ".image: '/' is a folder. Give the path of an image's file"),
    "long path": ({"image": "x" * 5000}, ".image: no file 'xxx"),
    "nul path": ({"image": "a\0b"}, ".image: no file 'a\\x00b'"),
    "url": (
        {"image": "https://example.org/a.jpg"},
        ".image: 'https://example.org/a.jpg' is an address, and nothing is fetched: download it",
    ),
    "image type": (
        {"image": 3},
        ".image: it is a int: pass a PIL image, a path, the bytes of an image file, or a uint8",
    ),
    "float array": (
        {"image": np.ones((4, 4, 3))},
        ".image: it is an array of float64: pass uint8 values from 0 to 255",
    ),
}
UNREADABLE: dict[str, Any] = {
    "no picture": b"not an image",
    "no bytes": b"",
    "array": np.zeros((2, 3, 4, 5), dtype=np.uint8),
    "channels first": np.zeros((3, 8, 8), dtype=np.uint8),
    "no pixels": np.zeros((0, 5, 3), dtype=np.uint8),
}


@pytest.mark.parametrize("kind", BAD_NOTES)
def test_bad_notes_are_refused(kind: str) -> None:
    note, message = BAD_NOTES[kind]
    with pytest.raises(NoteError, match=re.escape(message)) as error:
        make()(["fine", {"title": "fine"}, note])
    assert str(error.value).startswith("notes[2]") and len(str(error.value)) < 600


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_pictures_are_refused(kind: str) -> None:
    for note in ({"image": UNREADABLE[kind]}, {"title": "oak", "image": UNREADABLE[kind]}):
        with pytest.raises(NoteError, match=r"^notes\[1\]\.image: .*(None|leave the image out)"):
            make()(["fine", note])


def test_every_kind_of_image_gives_the_same_pixels(tmp_path: Path) -> None:
    picture = random_picture(0)
    picture.save(tmp_path / "p.png")
    data = (tmp_path / "p.png").read_bytes()
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned back by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    transparent = Image.new("RGBA", picture.size, (255, 255, 255, 0))
    white = Image.new("RGB", picture.size, "white")
    kinds = [
        picture,
        str(tmp_path / "p.png"),
        tmp_path / "p.png",
        data,
        np.asarray(picture),
        {"bytes": data, "path": None},
    ]
    kinds += [{"bytes": None, "path": str(tmp_path / "p.png")}, tmp_path / "turned.png"]
    pixels = make()([{"image": kind} for kind in [*kinds, transparent, white]])["pixel_values"]
    for i in range(1, len(kinds)):
        assert torch.equal(pixels[i], pixels[0]), kinds[i]
    assert torch.equal(pixels[-1], pixels[-2]) and not torch.equal(pixels[-1], pixels[0])


@pytest.mark.parametrize("image", [None, "", {"bytes": None, "path": None}])
def test_no_image(image: Any) -> None:
    assert not make()([{"title": "oak", "image": image}])["has_image"].any()


def test_a_text_only_model_leaves_images_out_and_refuses_notes_of_nothing_else() -> None:
    processor = NoteLLM2Processor(None, TOKENIZERS["byte_level"](), prompt="text")
    batch = processor([{"title": "oak", "image": random_picture(0)}])
    assert not batch["has_image"].any() and "pixel_values" not in batch
    with pytest.raises(NoteError, match=r"notes\[1\]\.image is all this note has, but the model is text-only"):
        processor(["fine", {"image": random_picture(0)}])


def test_padding() -> None:
    processor = make()
    notes = ["oak", "oak shelf " * 9]
    right, left = processor(notes), processor(notes, padding_side="left")
    for row in range(2):
        kept = [batch["input_ids"][row][batch["attention_mask"][row].bool()] for batch in (right, left)]
        assert torch.equal(*kept)
    assert right["attention_mask"][0, 0] == 1 and left["attention_mask"][0, 0] == 0
    assert processor([])["input_ids"].shape == (0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "chat"}, "prompt='chat' is unknown"),
        ({"language": "fr"}, "language='fr' is unknown"),
        ({"padding_side": "both"}, "padding_side='both' is unknown"),
        ({"num_visual_tokens": 0}, "num_visual_tokens=0 must lie between 1"),
        ({"max_title_tokens": -1}, "max_title_tokens=-1 must be at least 0"),
        ({"template": "<IMG><IMG_EMB>{title}"}, "must end in its own words"),
        ({"template": "{title}<IMG>.<IMG_EMB>."}, "put <IMG> first"),
        ({"template": "<IMG_EMB><IMG>{title}."}, "put <IMG> first"),
        ({"template": "<IMG>{title}<IMG_EMB>."}, "put <IMG> first"),
        ({"template": "<IMG>.<IMG>{title}."}, "holds <IMG> or <IMG_EMB> twice"),
        ({"template": ""}, "must end in its own words"),
        ({"template": "short"}, "template='short' is unknown, and holds nothing of a note: choose one of ("),
        ({"text_template": "In a word:"}, "text_template='In a word:' is unknown, and holds nothing of a note"),
        ({"text_template": "<IMG>{title}."}, "must not hold <IMG>"),
        ({"tokenizer": None}, "has no `tokenizers` backend"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        NoteLLM2Processor(image_processor(), **{"tokenizer": TOKENIZERS["byte_level"](), **settings})


@pytest.mark.parametrize("tower", [None, *TOWERS])
def test_save_and_load(tower: str | None, tower_folder: Callable[[str], Path], tmp_path: Path) -> None:
    images = None if tower is None else AutoImageProcessor.from_pretrained(tower_folder(tower), backend="pil")
    template = "看 <IMG> 后 <IMG_EMB> 标题 {title} {content} 词:"
    processor = NoteLLM2Processor(
        images,
        TOKENIZERS["bos"](),
        prompt="text" if tower is None else "micl",
        num_visual_tokens=5,
        max_title_tokens=7,
        padding_side="left",
        template="paper" if tower is None else template,
    )
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is NoteLLM2Processor and loaded.to_dict() == processor.to_dict()
    notes = [{"title": "oak shelf " * 20, "image": random_picture(0)}, {"content": "<IMG>"}]
    expected, got = processor(notes), loaded(notes)
    assert expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], msg=name)
    changed = NoteLLM2Processor.from_pretrained(tmp_path, padding_side="right", max_title_tokens=3)
    assert (changed.padding_side, changed.max_title_tokens, changed.num_visual_tokens) == ("right", 3, 5)


def test_a_saved_processor_saves_again(tmp_path: Path) -> None:
    make(language="zh").save_pretrained(tmp_path / "a")
    NoteLLM2Processor.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("processor_config.json", "tokenizer.json", "processing_notellm2.py"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert NoteLLM2Processor.from_pretrained(tmp_path / "b").template == prompt_template("micl", "zh")
    with pytest.raises(ValueError, match="publish the folder whole"):
        make().save_pretrained(tmp_path, push_to_hub=True)


def test_a_checkpoint_keeps_the_template_it_was_made_with(tmp_path: Path) -> None:
    """It is saved as words, so that older releases read it; a name given in loading is for both templates."""
    make(template="compact", language="zh").save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    for prompt, words in (("micl", loaded.template), ("text", loaded.text_template)):
        assert words == prompt_template(prompt, "zh", "compact") != prompt_template(prompt, "zh")
    changed = NoteLLM2Processor.from_pretrained(tmp_path, template="paper")
    assert changed.to_dict() == make(language="zh").to_dict()
    mixed = make(template="compact", text_template="{title} in a word:")
    assert (mixed.template, mixed.text_template) == (prompt_template("micl", "en", "compact"), "{title} in a word:")
    own = make(template="<IMG> {title} in a word:")
    assert own.text_template == prompt_template("text", "en")


@pytest.mark.parametrize("tower", [None, "clip", "timm_cnn"])
def test_loading_asks_for_no_config(
    compose: Callable[..., NoteLLM2Model], tower: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config of remote code would make transformers ask for consent, in the middle of `encode`."""
    save(compose("llama", tower), tmp_path)

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("AutoConfig was asked")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    assert NoteLLM2Processor.from_pretrained(tmp_path)(["oak"])["has_image"].tolist() == [False]
    with pytest.raises(AssertionError, match="AutoConfig was asked"):  # AutoTokenizer would ask
        AutoTokenizer.from_pretrained(tmp_path)


def test_pictures_do_not_need_torchvision(tiny_checkpoint: Path) -> None:
    """The PIL backend, also where torchvision is installed: the two resize differently."""
    loaded = NoteLLM2Processor.from_pretrained(tiny_checkpoint).image_processor
    assert "torchvision" not in {base.__module__.rsplit("_", 1)[-1] for base in type(loaded).__mro__}
    assert type(loaded).__name__ == "CLIPImageProcessorPil"


def test_ids_beyond_the_embedding_matrix_never_reach_it(
    compose: Callable[..., NoteLLM2Model], llm_folder: Callable[[str], Path]
) -> None:
    """A tokenizer may have got a padding token that its LLM never had a row for."""
    model = compose()
    model.processor.tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    assert model.processor.tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings
    assert model.encode(["oak", "oak shelf " * 9]).shape == (2, 16)
