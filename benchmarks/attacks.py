"""Hostile notes: texts and images as strangers may write them, made by seed, and what became of them.

The tests try some, benchmarks/reliability.py many. A text is tried on every field; an image as bytes and as a file.
"""

import io
import resource
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from modeling_notellm2 import NoteError, NoteLLM2Model, NoteLLM2Processor
from modeling_notellm2.processing_notellm2 import TEXT_FIELDS, prompt_template

TOLERANCE = 1e-5
"""Of an embedding's numbers, from one batch to another."""

KINDS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")

_CHARACTERS = {
    "control": "".join(map(chr, [*range(32), *range(127, 160)])),
    "right to left": "\u200f\u202b\u202e\u2066\u2067\u2069\u05d0\u0627",
    "joiners": "\u200b\u200c\u200d\u2060\ufeff\ufe0f",
    "surrogates": "\ud800\udbff\udc00\udfff",
    "combining": "\u0301\u0327\u0489\u20dd\u0e49\u094d",
    "no spaces": "笔記汉ไทยកខအကあア한",
    "compatibility": "\ufdfa\uff1c\uff29\uff2d\uff27\uff1e\u2126\u00a0\u3000\ufb03",
    "private": "\ue000\U000f0000\U0010ffff\ufffe\uffff",
    "emoji": "\U0001f600\U0001f469\u200d\U0001f52c\U0001f3fd\U0001f1e9",
    "letters": "aZ09 '\"{}<>|\\/.:\n\t",
}
_REPEATED = ("a", " ", "<", "\u0301", "笔", "ก", "\u200d", "\u202e", "\0", "\ufdfa", "\U0001f600", "\ud800", "<IMG>")
_MEGABYTE = 2**20


@dataclass(frozen=True)
class Tally:
    """What became of hostile inputs. Tallies add up.

    Attributes:
        inputs: how many were tried.
        refused: of them, how many were refused by a named error, as they may be.
        wrong: results that are not as promised: a structure token too many, too few or moved, n_v changed, an embedding
            of another note changed by more than `TOLERANCE`, an embedding that is not finite, pixels of another shape.
        lost: other notes that got no embedding.
        unnamed: exceptions other than `NoteError`.
        largest_difference: of the other notes' embeddings, any number of any.
        worst_seconds: of one input.
        peak_megabytes: that this process ever had resident.
        faults: what was wrong, the first few.
    """

    inputs: int = 0
    refused: int = 0
    wrong: int = 0
    lost: int = 0
    unnamed: int = 0
    largest_difference: float = 0.0
    worst_seconds: float = 0.0
    peak_megabytes: float = 0.0
    faults: tuple[str, ...] = field(default=())

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            inputs=self.inputs + other.inputs,
            refused=self.refused + other.refused,
            wrong=self.wrong + other.wrong,
            lost=self.lost + other.lost,
            unnamed=self.unnamed + other.unnamed,
            largest_difference=max(self.largest_difference, other.largest_difference),
            worst_seconds=max(self.worst_seconds, other.worst_seconds),
            peak_megabytes=max(self.peak_megabytes, other.peak_megabytes),
            faults=(self.faults + other.faults)[:20],
        )

    def and_wrong(self, fault: str) -> Self:
        """The same with one wrong result more."""
        return replace(self, wrong=self.wrong + 1, faults=(*self.faults, fault)[:20])


class HostileImage(NamedTuple):
    """An image's file: what was done to it, its name, its content."""

    attack: str
    path: Path
    content: bytes


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Every added and every special token."""
    ids = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    return [str(tokenizer.convert_ids_to_tokens(token_id)) for token_id in sorted(ids)]


def prompt_imitations() -> list[str]:
    """All prompts, of all templates and both languages, whole and from where a field ends."""
    prompts = [
        prompt_template(prompt, language, template)
        for template in ("paper", "compact")
        for language in ("en", "zh")
        for prompt in ("micl", "basic", "text")
    ]
    ends = [prompt.split("{" + name + "}")[1] for prompt in prompts for name in TEXT_FIELDS]
    return [*prompts, *ends]


def hostile_texts(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> Iterator[str]:
    """Texts: first each control token, each imitation of a prompt, and a megabyte of each of some characters; then
    random ones that mix all of these. The random ones depend on the seed alone."""
    tokens, imitations = control_tokens(tokenizer), prompt_imitations()
    full_width = "".join(chr(ord(letter) + 0xFEE0) for letter in "<IMG_EMB>")
    odd = [
        "".join(tokens),
        " ".join(tokens),
        full_width,
        "<IMG_<IMG_EMB>EMB>",
        "\u200b<IMG>",
        "a\nb",
        "\r\n:",
        "a\u2028b",
    ]
    fixed = [*tokens, *imitations, *odd, *_CHARACTERS.values()]
    fixed += [character * (_MEGABYTE // len(character.encode("utf-8", "replace"))) for character in _REPEATED]
    yield from fixed[:count]
    rng = np.random.default_rng(seed)
    alphabets = list(_CHARACTERS.values())
    for _ in range(count - len(fixed)):
        pieces = []
        for _ in range(int(rng.integers(1, 12))):
            kind = rng.integers(0, 5)
            if kind == 0:
                pieces.append(tokens[rng.integers(len(tokens))])
            elif kind == 1:
                imitation = imitations[rng.integers(len(imitations))]
                cut = sorted(rng.integers(0, len(imitation) + 1, 2))
                pieces.append(imitation[cut[0] : cut[1]])
            elif kind == 2:
                pieces.append(_REPEATED[rng.integers(len(_REPEATED))] * int(rng.integers(1, 300)))
            elif kind == 3:  # any code points
                pieces.append("".join(map(chr, rng.integers(0, 0x110000, rng.integers(1, 30)))))
            else:
                alphabet = alphabets[rng.integers(len(alphabets))]
                pieces.append("".join(alphabet[i] for i in rng.integers(0, len(alphabet), rng.integers(1, 40))))
        yield "".join(pieces)


def attack_texts(model: NoteLLM2Model, count: int, seed: int, seconds: float | None = None) -> Tally:
    """Encode hostile texts among ordinary notes.

    Args:
        model: with a vision tower; not changed.
        count: texts.
        seed: of the random ones.
        seconds: no text is begun later; None: no limit.
    """
    processor = model.processor
    picture = _picture(np.random.default_rng(seed))
    others = [{"title": "Oak shelf", "content": "sanded"}, {"image": picture}, {"title": "Noodles", "image": picture}]
    expected = model.encode(others)
    empty = processor.encode_note({"image": picture})
    visual = _visual_embeds(model, {"image": picture})
    tally, started = Tally(), time.monotonic()
    for number, text in enumerate(hostile_texts(processor.tokenizer, count, seed)):
        if seconds is not None and time.monotonic() - started > seconds:
            break
        note = {"title": text, "topics": [text, text] if number % 2 else text, "content": text, "image": picture}
        begun = time.perf_counter()
        try:
            encoded = processor.encode_note(note)
            embeds = model.encode([others[0], note, *others[1:]])
            found = _visual_embeds(model, note)
        except NoteError:
            tally += Tally(inputs=1, refused=1)
        except Exception as error:  # what is counted here
            tally += Tally(inputs=1, unnamed=1, faults=(f"text {number}: {type(error).__name__}: {error}",))
        else:
            tally += Tally(inputs=1)
            own = [token for token, is_text in zip(encoded.input_ids, encoded.text_mask, strict=True) if not is_text]
            if own != empty.input_ids or _forged(processor, encoded.input_ids, encoded.text_mask):
                tally = tally.and_wrong(f"text {number}: the prompt's structure changed")
            if len(embeds) == len(others) + 1:
                tally = _compared(tally, embeds[[0, 2, 3]], expected, f"text {number}")
                if not np.isfinite(embeds[1]).all():
                    tally = tally.and_wrong(f"text {number}: its embedding is not finite")
            else:
                tally += _miscounted(len(others) + 1 - len(embeds), f"text {number}")
            if visual is not None and found is not None and (found - visual).abs().max() > TOLERANCE:
                tally = tally.and_wrong(f"text {number}: n_v changed")
        tally = replace(tally, worst_seconds=max(tally.worst_seconds, time.perf_counter() - begun))
    return replace(tally, peak_megabytes=_peak_megabytes())


def _compared(tally: Tally, embeds: Any, expected: Any, name: str) -> Tally:
    """With what other notes' embeddings differ by from what they are without a hostile note."""
    difference = float(np.abs(embeds - expected).max())
    tally = replace(tally, largest_difference=max(tally.largest_difference, difference))
    return tally if difference <= TOLERANCE else tally.and_wrong(f"{name}: embeddings differ by {difference:.1e}")


def _miscounted(missing: int, name: str) -> Tally:
    """What notes without an embedding, or embeddings without a note, where missing < 0, count for."""
    if missing < 0:
        return Tally().and_wrong(f"{name}: {-missing} embeddings too many")
    return Tally(lost=missing, faults=(f"{name}: {missing} notes without an embedding",))


def _forged(processor: NoteLLM2Processor, ids: Sequence[int], text_mask: Sequence[bool]) -> bool:
    """Whether a text made a control token. (A letter that the vocabulary lacks is its unknown token.)"""
    control = set(processor.tokenizer.added_tokens_decoder) | set(processor.tokenizer.all_special_ids)
    control -= {processor.tokenizer.unk_token_id}
    return any(is_text and token in control for token, is_text in zip(ids, text_mask, strict=True))


@torch.no_grad()
def _visual_embeds(model: NoteLLM2Model, note: Any) -> torch.Tensor | None:
    batch = {name: value.to(model.device) for name, value in model.processor([note]).items()}
    embeds: torch.Tensor | None = model.eval()(**batch).visual_embeds
    return embeds


def png(width: int, height: int, data: bytes = b"", color_type: int = 2, bit_depth: int = 8) -> bytes:
    """A PNG file that announces these sides, whatever `data` inflates to."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiled_tiff(tile_side: int, inflated: int) -> bytes:
    """A grey TIFF file of 1 x 1 pixel, in a tile of another size, whose data inflate to so many zeros."""
    deflate = zlib.compressobj(9)
    zeros = bytes(_MEGABYTE)
    pieces = [deflate.compress(zeros) for _ in range(inflated // _MEGABYTE)]
    data = b"".join([*pieces, deflate.compress(bytes(inflated % _MEGABYTE)), deflate.flush()])
    fields = [(256, 1), (257, 1), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile_side), (323, tile_side)]
    fields += [(324, 8 + 2 + 12 * (len(fields) + 2) + 4), (325, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields)
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(4) + data


def many_scans(scans: int) -> bytes:
    """A progressive JPEG file that begins its last scan again and again."""
    buffer = io.BytesIO()
    _picture(np.random.default_rng(0)).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * scans + content[-2:]


def hostile_images(folder: Path, count: int, seed: int) -> Iterator[HostileImage]:
    """Files of images: first bombs and files that are something else, then real ones that are cut, have bytes changed,
    put in, left out or doubled, or lie about their size. Each is written to a file in `folder`, under the ending of
    some kind of image, right or wrong, which is deleted when the next one is asked for."""
    rng = np.random.default_rng(seed)
    fixed = [
        ("bomb", png(30_000, 30_000)),
        ("bomb below Pillow's threshold of errors", png(12_000, 12_000)),
        ("long", png(1, 20_000, zlib.compress(bytes(4 * 20_000)))),
        ("tile", tiled_tiff(32_768, 2**24)),
        ("scans", many_scans(500)),
        ("svg", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
        ("pdf", b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n"),
        ("eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"),
        ("html", b"<html><img src=x></html>"),
        ("empty", b""),
    ]
    for number in range(count):
        if number < len(fixed):
            attack, content = fixed[number]
        else:
            kind = KINDS[rng.integers(len(KINDS))]
            attack, content = _mutated(_real(rng, kind), rng)
            attack = f"{kind} {attack}"
        path = folder / f"{number}.{KINDS[rng.integers(len(KINDS))].lower()}"
        path.write_bytes(content)
        try:
            yield HostileImage(attack, path, content)
        finally:  # also where nobody asks for the next one
            path.unlink()


def _real(rng: np.random.Generator, kind: str) -> bytes:
    """A whole file, of random mode and with what else such files hold."""
    modes = {"JPEG": ("RGB", "L", "CMYK"), "GIF": ("P",), "WEBP": ("RGB", "RGBA"), "BMP": ("RGB", "L", "1")}
    mode = str(rng.choice(modes.get(kind, ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"))))
    picture = _picture(rng)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 200)
    else:
        picture = picture.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(1, 9) if kind == "TIFF" else rng.integers(0, 10))
    options: dict[str, Any] = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    if kind in ("GIF", "WEBP", "PNG") and mode != "I;16" and rng.integers(2):
        options |= {"save_all": True, "append_images": [_picture(rng).resize(picture.size).convert(mode)]}
    if kind == "TIFF" and mode != "I;16":
        options["compression"] = str(rng.choice(["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"]))
    if kind == "JPEG":
        options["progressive"] = bool(rng.integers(2))
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _mutated(content: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    damaged = bytearray(content)
    attack = str(rng.choice(["cut", "bytes", "header", "numbers", "left out", "doubled", "put in", "whole"]))
    if attack == "cut":
        damaged = damaged[: rng.integers(0, len(damaged))]
    elif attack in ("bytes", "header"):
        end = len(damaged) if attack == "bytes" else min(64, len(damaged))
        for place in rng.integers(0, end, rng.integers(1, 8)):
            damaged[place] = rng.integers(0, 256)
    elif attack == "numbers":  # sizes, lengths and offsets as large as can be
        for place in rng.integers(0, max(1, min(256, len(damaged) - 4)), rng.integers(1, 4)):
            damaged[place : place + 4] = struct.pack(
                rng.choice(["<I", ">I"]), int(rng.choice([0, 1, 2**16 - 1, 2**31 - 1, 2**32 - 1]))
            )
    elif attack in ("left out", "doubled"):
        start, end = sorted(rng.integers(0, len(damaged) + 1, 2))
        damaged[start:end] = b"" if attack == "left out" else damaged[start:end] * 2
    elif attack == "put in":
        place = rng.integers(0, len(damaged))
        damaged[place:place] = rng.bytes(int(rng.integers(1, 64)))
    return attack, bytes(damaged)


def attack_images(
    processor: NoteLLM2Processor | NoteLLM2Model, folder: Path, count: int, seed: int, seconds: float | None = None
) -> Tally:
    """Give hostile images to a processor, each as bytes and as a file, which must come to the same; and each beside a
    good note, which must be encoded: with the image's note, or without it where that is refused by its index.

    Args:
        processor: with an image processor; of a model, its own. A model's embedding of the good note must be the one
            that it has alone.
        folder: for files, each deleted after use.
        count: images.
        seed: of the random ones.
        seconds: no image is begun later; None: no limit.
    """
    model = processor if isinstance(processor, NoteLLM2Model) else None
    if isinstance(processor, NoteLLM2Model):
        processor = processor.processor
    encode = partial(_rows, processor) if model is None else model.encode
    good = {"title": "Oak shelf", "image": _picture(np.random.default_rng(seed))}
    expected = encode([good])
    whole = processor([{"image": _picture(np.random.default_rng(0))}])
    shapes = {name: whole[name].shape for name in processor.image_processor.model_input_names if name in whole}
    tally, started = Tally(), time.monotonic()
    for image in hostile_images(folder, count, seed):
        if seconds is not None and time.monotonic() - started > seconds:
            break
        begun = time.perf_counter()
        results = []
        tally += Tally(inputs=1)
        for value in (image.content, str(image.path)):
            try:
                results.append({name: processor([{"image": value}])[name] for name in shapes})
            except NoteError:
                results.append({})
            except Exception as error:  # what is counted here
                fault = f"{image.path.name} ({image.attack}): {type(error).__name__}: {error}"
                tally += Tally(unnamed=1, faults=(fault,))
        name = f"{image.path.name} ({image.attack})"
        try:
            embeds, kept = _encoded_beside(encode, good, {"image": image.content})
        except Exception as error:  # what is counted here
            tally += Tally(unnamed=1, lost=1, faults=(f"{name}, beside a good note: {type(error).__name__}: {error}",))
        else:
            if len(embeds) != kept or not kept:
                tally += _miscounted(max(kept, 1) - len(embeds), name)
            elif model is not None:
                tally = _compared(tally, embeds[:1], expected, name)
        if not any(results):
            tally += Tally(refused=1)
        elif len(results) == 2:
            first, second = results
            same = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
            if not same or any(first[name].shape != shape for name, shape in shapes.items()):
                tally = tally.and_wrong(f"{name}: file and bytes differ")
        tally = replace(tally, worst_seconds=max(tally.worst_seconds, time.perf_counter() - begun))
    return replace(tally, peak_megabytes=_peak_megabytes())


def _rows(processor: NoteLLM2Processor, notes: Sequence[Any]) -> np.ndarray:
    rows: np.ndarray = processor(list(notes))["input_ids"].numpy()
    return rows


def _encoded_beside(encode: Callable[[list[Any]], Any], good: Any, hostile: Any) -> tuple[np.ndarray, int]:
    """What `encode` makes of a good note and a hostile one, or of what is left once the one that it refuses is taken
    out, as a user would; and of how many notes. 0: it is the good note that is refused."""
    try:
        return encode([good, hostile]), 2
    except NoteError as error:
        if not str(error).startswith("notes[1]"):
            return np.empty((0, 0)), 0
    return encode([good]), 1


def _picture(rng: np.random.Generator) -> Image.Image:
    spots = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return spots.resize((int(rng.integers(8, 48)), int(rng.integers(8, 48))), Image.Resampling.NEAREST)


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


__all__ = [
    "HostileImage",
    "Tally",
    "attack_images",
    "attack_texts",
    "control_tokens",
    "hostile_images",
    "hostile_texts",
    "many_scans",
    "png",
    "prompt_imitations",
    "tiled_tiff",
]
