"""What may be a note's image, and its pixels: bounded before anything is decoded. Needs Pillow and NumPy alone.

Everything that reads an image of a note reads it here. Images come from strangers, so that

- a file is told by its content, never by its name, and only formats that posts come in are tried: no vector graphics
  and no documents, whose decoders run programs (EPS) or fetch what they name;
- its bytes, its announced pixels, the proportion of its sides and what else a decoder would take memory or time by are
  bounded before the decoder starts;
- a path must name a regular file: a pipe or a device could be read for ever;
- nothing is fetched: an address is refused, whatever its scheme.
"""

import io
import os
import re
import reprlib
import stat
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""As Pillow names them, which reads AVIF since 11.3. Of an animation or of several pages the first picture is read."""

MAX_BYTES = 2**27
"""Of an image's file."""

MAX_PIXELS = 2**26
"""Of an image. Below Pillow's own threshold, which any other code of the process may have set to None."""

MAX_SIDES = 256
"""How often the shorter side may go into the longer one. An image processor that brings the shorter side to 224 pixels
makes 3 GB of an image of 1 x 20,000."""

MAX_SCANS = 100
"""Of a JPEG image. A progressive one has about ten, and a scan of a few bytes costs a pass over all pixels. libtiff has
the same bound for JPEG inside of TIFF."""

_STRIP_PIXELS = 2**20
"""That a transparent picture is put on white at a time."""

OUTSIDE = "outside:"
"""In front of a path that a table of notes names, and that leads out of the notes' folder: an address like others."""

# What Pillow's decoders raise on files that the fuzzer in benchmarks/attacks.py made, and on older releases of theirs.
_DECODER_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # where warnings are errors
)

_ADDRESS = re.compile(rf"[A-Za-z][A-Za-z0-9+.-]*://|(?:data|file|ftp|hf|https?|s3|gs|{OUTSIDE[:-1]}):", re.IGNORECASE)
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of those that a length follows, or the end
_TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH = 322, 323


class ImageError(ValueError):
    """A value that is no image, or cannot be read. The message gives the value and the remedy."""


def shown(value: Any) -> str:
    """A value in an error message, short however long the value is, and without control characters."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 200
    return shortener.repr(os.fspath(value) if isinstance(value, os.PathLike) else value)


def is_address(reference: str) -> bool:
    """Whether an image's reference is an address, which nothing fetches, and not a path.

    >>> [is_address(text) for text in ("https://host/a.jpg", "data:image/png;base64,AA", "file:a.jpg", "s3://b/a.jpg")]
    [True, True, True, True]
    >>> [is_address(text) for text in ("a.jpg", "/a/b.jpg", "C:/a.jpg", "12:30.jpg")]
    [False, False, False, False]
    """
    return _ADDRESS.match(reference) is not None


def image_value(value: Any) -> Any:
    """What a note's `image` holds; None if nothing. An empty path is none; of an undecoded image of `datasets`, a
    mapping, its bytes count before its path."""
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    return None if isinstance(value, str) and not value else value


def check_image(value: Any) -> Any:
    """Refuse what cannot be an image, without reading it.

    Args:
        value: a note's `image`: a path, the bytes of a file, a PIL image, a uint8 array (H, W, 3) or (H, W), or a
            mapping with `bytes` or `path`.

    Returns:
        The value, None for none.

    Raises:
        ImageError: a value of another kind, an address, a path of no regular file, a file of too many bytes.
    """
    value = image_value(value)
    if value is None or isinstance(value, Image.Image):
        return value
    if isinstance(value, str | os.PathLike):
        path = os.fspath(value)
        if isinstance(path, str) and is_address(path):
            if path.startswith(OUTSIDE):
                raise ImageError(
                    f"{shown(path.removeprefix(OUTSIDE))} leads out of the notes' folder: move the file into it, or "
                    "name the folder that images may lie in: --image-root DIR (image_root)."
                )
            raise ImageError(f"{shown(path)} is an address, and nothing is fetched: download it and pass a path.")
        _check_bytes(_size_of_file(path))
        return value
    if isinstance(value, bytes):
        _check_bytes(len(value))
        return value
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8:
            raise ImageError(f"it is an array of {value.dtype}: pass uint8 values from 0 to 255.")
        return value
    raise ImageError(
        f"it is a {type(value).__name__}: pass a PIL image, a path, the bytes of an image file, or a uint8 array "
        "(H, W, 3)."
    )


def read_bytes(path: str | os.PathLike) -> bytes:
    """The content of an image's file.

    Raises:
        ImageError: see `check_image`; or it cannot be read, the OSError being the cause.
    """
    check_image(path)
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)  # files of /proc say that they are empty, others may grow meanwhile
    except OSError as error:
        raise _unreadable(path, error) from error
    _check_bytes(len(content))
    return content


def decode_image(value: Any) -> Image.Image:
    """An RGB picture, turned the way its EXIF data says, transparent parts on white; of 16 bits the upper 8.

    Of the largest pictures it takes up to 1.1 GB, the file included (WebP, progressive JPEG), of most kinds 0.7 GB.

    Args:
        value: see `check_image`; not None.

    Raises:
        ImageError: it is no image, exceeds a bound of this file, or cannot be read.
    """
    value = check_image(value)
    content = read_bytes(value) if isinstance(value, str | os.PathLike) else value
    try:
        if isinstance(content, bytes):
            with _open(content) as picture:
                _check_size(picture)
                ImageOps.exif_transpose(picture, in_place=True)  # decodes it; a copy would take as much again
            return _rgb(picture)  # what the decoder has read of the file is given back by now
        picture = Image.fromarray(content) if isinstance(content, np.ndarray) else content
        _check_size(picture)
        return _rgb(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError as error:  # its own message tells an address in memory
        complaint = f"it is none of {', '.join(FORMATS)}: of another kind, or its beginning is damaged"
        raise _unreadable(value, complaint if content else "its file is empty, 0 bytes") from error
    except _DECODER_ERRORS as error:
        raise _unreadable(value, error) from error


def _size_of_file(path: str | bytes) -> int:
    remedy = "Give the path of an image's file, or leave the image out (an empty cell; None in Python)."
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # a ValueError for NUL and for lone surrogates
        raise ImageError(f"no file {shown(path)}. {remedy}") from error
    if stat.S_ISDIR(found.st_mode):
        raise ImageError(f"{shown(path)} is a folder. {remedy}")
    if not stat.S_ISREG(found.st_mode):
        raise ImageError(f"{shown(path)} is no regular file. {remedy}")
    return found.st_size


def _check_bytes(size: int) -> None:
    if size > MAX_BYTES:
        raise ImageError(f"its file has {size:,} bytes, more than {MAX_BYTES:,}: scale the image down.")


def _open(content: bytes) -> Image.Image:
    """The image of a file, its header read and what its decoder would do bounded."""
    if content.startswith(b"\xff\xd8") and _num_scans(content) > MAX_SCANS:
        raise ValueError(f"more than {MAX_SCANS} scans")
    Image.init()  # does nothing where it was called before
    picture = Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN])
    tags = getattr(picture, "tag_v2", {})
    tile = tags.get(_TIFF_TILE_WIDTH, 1), tags.get(_TIFF_TILE_LENGTH, 1)
    if tile[0] * tile[1] > MAX_PIXELS:  # decoded whole, however little of it the image shows
        raise ValueError(f"tiles of {tile[0]}x{tile[1]} pixels, more than {MAX_PIXELS:,}")
    return picture


def _num_scans(content: bytes) -> int:
    """Of the first image of a JPEG file, up to one more than are allowed."""
    scans, place = 0, 2
    while scans <= MAX_SCANS and (found := _JPEG_MARKER.search(content, place)) and found[0] != b"\xff\xd9":
        scans += found[0] == b"\xff\xda"
        place = found.end() + int.from_bytes(content[found.end() : found.end() + 2], "big")
    return scans


def _check_size(picture: Image.Image) -> None:
    width, height = picture.size
    if not width * height:
        raise ValueError(f"{width}x{height} pixels: there is nothing to see")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels, more than {MAX_PIXELS:,}")
    if max(width, height) > MAX_SIDES * min(width, height):
        raise ValueError(f"{width}x{height} pixels: one side is more than {MAX_SIDES} times the other")
    if picture.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {picture.mode} have no known range; convert them to 8 bits")


def _rgb(picture: Image.Image) -> Image.Image:
    """An upright picture ─► its pixels on white. Beside the picture it takes the memory of the result alone."""
    if picture.mode.startswith("I;16"):  # Pillow would cut 16 bits at 255, not scale them
        picture = _upper_bits(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    width, height = picture.size
    on_white = Image.new("RGB", picture.size)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):  # each pixel is for itself, and a strip's copies are small
        strip = picture.crop((0, top, width, min(top + rows, height))).convert("RGBA")
        on_white.paste(Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB"), (0, top))
    return on_white


def _upper_bits(picture: Image.Image) -> Image.Image:
    """16 bits of grey ─► 8, with an alpha channel where one grey is transparent."""
    values = np.asarray(picture)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray((values != transparent).astype(np.uint8) * np.uint8(255)))
    return grey


def _unreadable(value: Any, complaint: Any) -> ImageError:
    what = shown(value) if isinstance(value, str | os.PathLike) else f"the {type(value).__name__}"
    return ImageError(
        f"{what} cannot be read ({complaint}): replace it, or leave it out (an empty cell; None in Python) "
        "to encode the text alone."
    )


__all__ = ["ImageError", "check_image", "decode_image", "image_value", "is_address", "read_bytes", "shown"]
