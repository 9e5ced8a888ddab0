"""Images of strangers: refused by name or read as they look, bounded before they are decoded, on every way in."""

import io
import os
import stat
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageFile, ImageOps

from benchmarks.attacks import attack_images, hostile_images, many_scans, png, tiled_tiff
from hub.encode import encode_corpus
from modeling_notellm2 import NoteError, NoteLLM2Model, NoteLLM2Processor, image_notellm2
from modeling_notellm2.image_notellm2 import OUTSIDE, decode_image
from modeling_notellm2.processing_notellm2 import read_image
from pairs.images import check_image
from pairs.note_table import NoteTable
from pairs.scan import scan_notes
from pairs.tables import ANYWHERE, load_notes, load_written_notes, read_notes, write_table
from tests.backbones import TOKENIZERS, TOWERS, random_picture
from train.data import NoteReader, without_bad_images
from train.features import image_key


@pytest.fixture(scope="module")
def processor() -> NoteLLM2Processor:
    return NoteLLM2Processor(TOWERS["clip"]()[1], TOKENIZERS["byte_level"](), num_visual_tokens=2)


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
REFUSED: dict[str, tuple[bytes, str]] = {
    "bomb": (png(30_000, 30_000), r"Image size \(900000000 pixels\)"),
    "bomb that Pillow warns of": (png(12_000, 12_000), r"12000x12000 pixels, more than 67,108,864"),
    "long": (png(1, 20_000, zlib.compress(bytes(4 * 20_000))), r"1x20000 pixels: one side is more than 256 times"),
    "tile": (tiled_tiff(32_768, 2**20), r"tiles of 32768x32768 pixels"),
    "scans": (many_scans(101), r"more than 100 scans"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "it is none of AVIF, BMP"),
    "pdf": (saved(random_picture(0), "PDF"), "it is none of AVIF, BMP"),
    "eps": (EPS, "it is none of AVIF, BMP"),
    "psd": (b"8BPS\0\1" + bytes(40), "it is none of AVIF, BMP"),
    "text": (b"no picture", "it is none of AVIF, BMP"),
    "empty": (b"", "its file is empty, 0 bytes"),
    "headless": (saved(random_picture(0), "JPEG")[64:], "WEBP: of another kind, or its beginning is damaged"),
    "truncated png": (saved(random_picture(0, size=(400, 300)), "PNG")[:-60], "truncated|broken"),
    "truncated jpeg": (saved(random_picture(0, size=(400, 300)), "JPEG")[:2000], "truncated"),
    "corrupt header": (png(16, 16, zlib.compress(bytes(16 * 49)), color_type=5), "it is none of AVIF, BMP"),
    "32 bits": (saved(random_picture(0).convert("I"), "TIFF"), "mode I have no known range"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_refused_on_every_way_in(
    kind: str, processor: NoteLLM2Processor, shared_tiny_model: NoteLLM2Model, tmp_path: Path
) -> None:
    """The same words, wherever the image comes in; a note beside it is unharmed."""
    content, words = REFUSED[kind]
    path = tmp_path / "x.png"  # nothing is told by a file's name
    path.write_bytes(content)
    for value in (content, str(path), path, {"bytes": content, "path": None}, {"bytes": None, "path": str(path)}):
        with pytest.raises(NoteError, match=words) as error:
            read_image(value, 3)
        assert str(error.value).startswith("notes[3].image: ") and len(str(error.value)) < 600
        assert "leave it out (an empty cell" in str(error.value) and " at 0x" not in str(
            error.value
        )  # no addresses in memory
    for encode in (processor, shared_tiny_model.encode):
        with pytest.raises(NoteError, match=words):
            encode(["fine", {"title": "a", "image": str(path)}])
    (tmp_path / "notes.csv").write_text("note_id,title,image\na,oak,\nb,shelf,x.png\n", encoding="utf-8")
    notes = load_notes(tmp_path / "notes.csv")
    for features in (None, shared_tiny_model):
        reader = NoteReader(notes, features.processor if features else processor, bad_images="text-only")
        encoded, is_bad = reader.read(1)
        assert is_bad and encoded is not None and encoded.image is None
    found, bad = without_bad_images(list(notes))
    assert list(bad) == [1] and found[1]["image"] is None
    scan = scan_notes(notes, workers=1)
    assert scan.counts["unreadable_image"] == 1 and check_image(str(path)).hash is None


@pytest.mark.parametrize("kind", ["bomb", "bomb that Pillow warns of", "tile", "long", "scans"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_before_anything_is_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)  # as other code of a process may do
    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    with pytest.raises(NoteError, match=r"more than"):
        read_image(REFUSED[kind][0])
    with pytest.raises(AssertionError, match="decoded"):  # control
        read_image(saved(random_picture(0), "PNG"))


def test_a_picture_that_was_opened_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Image.open(io.BytesIO(png(9_000, 9_000)))
    monkeypatch.setattr(type(opened), "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(NoteError, match="9000x9000 pixels, more than"):
        read_image(opened)


def test_warnings_that_are_errors_are_named(recwarn: pytest.WarningsRecorder) -> None:
    import warnings

    with warnings.catch_warnings(), pytest.raises(NoteError, match="decompression bomb"):
        warnings.simplefilter("error")
        read_image(REFUSED["bomb that Pillow warns of"][0])


def test_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither decoded, nor hashed by what looks for repeated notes or keeps a tower's features."""
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(image_notellm2.MAX_BYTES + 1)
    for value in (str(path), bytes(image_notellm2.MAX_BYTES + 1)):
        with pytest.raises(NoteError, match=r"its file has 134,217,729 bytes, more than 134,217,728: scale"):
            read_image(value)
    monkeypatch.setattr(image_notellm2, "MAX_BYTES", 100)  # control: of a file that would be read
    path.write_bytes(saved(random_picture(0), "PNG"))
    with pytest.raises(NoteError, match="more than 100"):
        read_image(str(path))
    monkeypatch.undo()
    assert read_image(str(path)).size == (40, 30)


def test_a_file_that_grows_is_read_no_further(
    processor: NoteLLM2Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(saved(random_picture(0), "PNG"))
    note = processor.encode_note({"image": str(path)})
    monkeypatch.setattr(image_notellm2, "MAX_BYTES", 50)
    monkeypatch.setattr(image_notellm2, "_size_of_file", lambda _: 0)  # as a file of /proc says
    for read in (processor.load_image, lambda encoded: image_key(encoded, processor)):
        with pytest.raises(NoteError, match="has 51 bytes, more than 50"):
            read(note)
    assert note.content_digest() is not None  # of what can be known


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "regular file"),
        (Path.mkdir, "a folder"),
    ],
)
def test_pipes_devices_and_folders_are_no_files(
    make: Callable[[Path], Any], said: str, processor: NoteLLM2Processor, tmp_path: Path
) -> None:
    """A pipe would wait for a writer, a device never end."""
    make(tmp_path / "a.png")
    assert not stat.S_ISREG(os.stat(tmp_path / "a.png").st_mode)
    for value in (str(tmp_path / "a.png"), tmp_path / "a.png", {"bytes": None, "path": str(tmp_path / "a.png")}):
        with pytest.raises(NoteError, match=rf"notes\[0\]\.image: .*a\.png' is (no )?{said}\. Give"):
            processor([{"image": value}])
    assert check_image(str(tmp_path / "a.png")).fault == "missing"


ADDRESSES = [
    "http://host/a.png",
    "HTTPS://host/a.png",
    "file:///etc/hostname",
    "file:a.png",
    "data:image/png;base64,iVBORw0KGgo=",
    "s3://bucket/a.png",
    "hf://datasets/a/b/c.png",
    "ftp://host/a.png",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_nothing_is_fetched(
    address: str, processor: NoteLLM2Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was opened"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a name was looked up"))
    monkeypatch.chdir(tmp_path)
    for value in (address, {"bytes": None, "path": address}):
        with pytest.raises(NoteError, match="is an address, and nothing is fetched: download it and pass a path"):
            processor([{"image": value}])
    assert check_image(address).fault == "url"
    Dataset.from_dict({"note_id": ["a"], "image": [address]}).to_parquet(tmp_path / "notes.parquet")
    with pytest.raises(ValueError, match=r"row 1: 'image' .* is a URL, and nothing is fetched"):
        load_notes(tmp_path / "notes.parquet")
    assert list(NoteTable(tmp_path / "notes.parquet").rows(0, 1))[0]["image"] == address


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """notes/ with images of its own, links that stay and links that leave, and secret.png beside it."""
    folder = tmp_path / "notes"
    (folder / "images").mkdir(parents=True)
    random_picture(0).save(folder / "images" / "own.png")
    random_picture(1).save(tmp_path / "secret.png")
    (tmp_path / "elsewhere").mkdir()
    random_picture(2).save(tmp_path / "elsewhere" / "a.png")
    (folder / "link.png").symlink_to("images/own.png")
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "twice.png").symlink_to("out.png")
    (folder / "outfolder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "notes-2").mkdir()
    random_picture(3).save(tmp_path / "notes-2" / "a.png")  # a folder whose name begins alike
    return folder


INSIDE = ["images/own.png", "./images/../images/own.png", "link.png", "{folder}/images/own.png"]
LEAVING = [
    "../secret.png",
    "images/../../secret.png",
    "{folder}/../secret.png",
    "out.png",
    "twice.png",
    "outfolder/a.png",
    "outfolder/../secret.png",
    "{root}/secret.png",
    "../notes-2/a.png",
    "/etc/passwd",
    "/proc/self/mem",
    "..",
    "images/nul\0.png",
]


def table_of(world: Path, image: str, kind: str) -> Path:
    image = image.format(folder=world, root=world.parent)
    columns: dict[str, Any] = {"note_id": ["a", "b"], "title": ["oak", "shelf"]}
    if kind == "feature":
        features = Features({"note_id": Value("string"), "title": Value("string"), "image": ImageFeature(decode=False)})
        images = [{"bytes": saved(random_picture(5), "PNG"), "path": "/no/such.png"}, {"bytes": None, "path": image}]
        table = Dataset.from_dict({**columns, "image": images}, features=features)
        write_table(table, world / "notes.parquet")
        return world / "notes.parquet"
    Dataset.from_dict({**columns, "image": [None, image]}).to_json(world / "notes.jsonl")
    return world / "notes.jsonl"


@pytest.mark.parametrize("kind", ["paths", "feature"])
@pytest.mark.parametrize("image", LEAVING)
def test_a_table_names_no_file_out_of_its_folder(
    image: str, kind: str, world: Path, processor: NoteLLM2Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world / "images")
    path = table_of(world, image, kind)
    with pytest.raises(ValueError, match=r"row 2: 'image' .* is no file inside the table's folder, .*--image-root DIR"):
        load_notes(path)
    for note in (read_notes(path)[1], list(NoteTable(path).rows(0, 2))[1]):  # bad rows stand, and open nothing
        with pytest.raises(NoteError, match=r"notes\[7\]\.image: .* leads out of the notes' folder: move the file"):
            processor.encode_note(note, 7)
    scan = scan_notes(read_notes(path), workers=1)
    assert scan.counts["outside_image"] == 1 and scan.counts["unreadable_image"] == 0


@pytest.mark.parametrize("kind", ["paths", "feature"])
@pytest.mark.parametrize("image", INSIDE)
def test_a_table_names_files_of_its_folder(image: str, kind: str, world: Path) -> None:
    """The control: what stays inside is read, links resolved: one that is turned later leads nowhere else."""
    found = load_notes(table_of(world, image, kind))[1]["image"]
    place = found["path"] if kind == "feature" else found
    assert place == str(world / "images" / "own.png")
    assert np.array_equal(np.asarray(read_image(found)), np.asarray(random_picture(0)))


def test_the_folder_of_images_can_be_named(world: Path) -> None:
    path = table_of(world, "../secret.png", "paths")
    for root in (world.parent, ANYWHERE):
        assert load_notes(path, root)[1]["image"] == str(world.parent / "secret.png")
        assert list(NoteTable(path, root).rows(0, 2))[1]["image"] == str(world.parent / "secret.png")
    with pytest.raises(ValueError, match="is no file inside"):
        load_notes(path, world.parent / "elsewhere")
    write_table(load_notes(path, world.parent), world / "deep.arrow")  # as splits are written
    assert load_written_notes(world / "deep.arrow")[1]["image"] == str(world.parent / "secret.png")


def test_a_corpus_loses_only_the_notes_that_reach_out(world: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = table_of(world, "../secret.png", "paths")
    summary = encode_corpus(tiny_checkpoint, NoteTable(path), tmp_path / "out", max_failures=1, workers=1)
    assert summary is not None and (summary.encoded, summary.failed) == (1, 1)
    with_root = NoteTable(path, world.parent)
    summary = encode_corpus(tiny_checkpoint, with_root, tmp_path / "allowed", max_failures=1, workers=1)
    assert summary is not None and (summary.encoded, summary.failed) == (2, 0)


def test_outside_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a file has that very name."""
    monkeypatch.chdir(tmp_path)
    random_picture(0).save(tmp_path / f"{OUTSIDE}a.png")
    with pytest.raises(NoteError, match="leads out"):
        read_image(f"{OUTSIDE}a.png")


def oriented(orientation: int, kind: str, mode: str) -> bytes:
    """A picture as a camera stores it that was held otherwise: shown, it looks like `random_picture(0)`."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # members of Image.Transpose
    picture = grey16(random_picture(0)) if mode == "I;16" else random_picture(0)
    if orientation in undo:
        picture = picture.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(picture, kind, exif=exif)


def grey16(picture: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 256 + 77)


@pytest.mark.parametrize("mode", ["RGB", "I;16"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", [0, *range(1, 9), 9])
def test_pictures_are_turned_upright(orientation: int, kind: str, mode: str) -> None:
    upright = random_picture(0) if mode == "RGB" else random_picture(0).convert("L").convert("RGB")
    content = oriented(orientation, kind, mode)
    assert np.array_equal(np.asarray(decode_image(content)), np.asarray(upright))
    stored = np.asarray(Image.open(io.BytesIO(content)))
    if kind == "PNG":  # Pillow turns TIFF itself, when it is decoded
        assert (stored.shape[:2] != (30, 40)) == (orientation in (5, 6, 7, 8))  # control: some are stored lying down


def test_odd_pictures_look_as_they_should() -> None:
    picture = random_picture(0)
    grey = np.asarray(picture.convert("L"))
    # 16 bits, and one of its greys transparent.
    sixteen = grey16(picture)
    assert np.array_equal(np.asarray(decode_image(saved(sixteen, "PNG")))[..., 0], grey)
    value = int(np.asarray(sixteen)[0, 0])
    clear = np.where(grey == value // 256, 255, grey)
    assert np.array_equal(np.asarray(decode_image(saved(sixteen, "PNG", transparency=value)))[..., 0], clear)
    # A palette, one colour of which is transparent.
    palette = picture.quantize(8)
    index = palette.getpixel((0, 0))
    mask = np.asarray(palette) == index
    expected = np.where(mask[..., None], 255, np.asarray(palette.convert("RGB")))
    for kind in ("PNG", "GIF"):
        assert np.array_equal(np.asarray(decode_image(saved(palette, kind, transparency=index))), expected)
    # Inks.
    inks = random_picture(4, "CMYK")
    assert np.array_equal(np.asarray(decode_image(saved(inks, "TIFF"))), np.asarray(inks.convert("RGB")))
    # The first of several pictures.
    for kind in ("GIF", "PNG", "TIFF", "WEBP"):
        lossless = {"lossless": True} if kind == "WEBP" else {}
        first, second = picture.quantize(8).convert("RGB"), random_picture(1).quantize(8).convert("RGB")
        animated = saved(first, kind, save_all=True, append_images=[second], **lossless)
        shown = np.asarray(decode_image(animated))
        assert np.array_equal(shown, np.asarray(first)) and not np.array_equal(shown, np.asarray(second))
    # One pixel, and the longest one that is read.
    assert np.asarray(decode_image(saved(Image.new("RGB", (1, 1), "red"), "PNG"))).tolist() == [[[255, 0, 0]]]
    assert decode_image(saved(Image.new("RGB", (1, 256), "red"), "PNG")).size == (1, 256)
    assert ImageOps.exif_transpose(picture).size == picture.size


def on_white_at_once(picture: Image.Image) -> np.ndarray:
    """What strips must not differ from."""
    whole = ImageOps.exif_transpose(picture).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB"))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
@pytest.mark.parametrize("strip", [1, 100, 997, 2**20])
def test_transparent_pictures_are_put_on_white_strip_by_strip(
    strip: int, mode: str, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit as at once; from a file, and from a picture of the caller's, which stays as it is."""
    rng = np.random.default_rng(strip + orientation)
    pixels = rng.integers(0, 256, (37, 53, 4), dtype=np.uint8)
    picture = Image.fromarray(pixels).convert("P" if mode in ("P", "L") else mode)
    options: dict[str, Any] = {}
    if mode == "P":  # each of its colours is transparent in another degree
        options["transparency"] = rng.integers(0, 256, 256, dtype=np.uint8).tobytes()
    elif mode in ("RGB", "L"):  # one colour is
        picture = picture.convert(mode)
        options["transparency"] = picture.getpixel((0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(picture, "PNG", exif=exif, **options)
    opened = Image.open(io.BytesIO(content))
    expected, size = on_white_at_once(opened), opened.size
    assert opened.has_transparency_data and (expected.shape[:2] == (53, 37)) == (orientation == 6)
    # Control: the alpha channel, the white and the place of each pixel count.
    assert not np.array_equal(expected, np.asarray(ImageOps.exif_transpose(opened).convert("RGBA").convert("RGB")))
    assert not np.array_equal(expected, np.roll(expected, 1, axis=0))
    monkeypatch.setattr(image_notellm2, "_STRIP_PIXELS", strip)
    for value in (content, opened):
        assert np.array_equal(np.asarray(decode_image(value)), expected)
    assert opened.size == size and opened.getexif().get(0x0112) == orientation


PEAK = """
import re, runpy, sys
from pathlib import Path
from PIL import Image

decode_image = runpy.run_path(sys.argv[3])["decode_image"]  # without PyTorch, which is slow to import, and large
Image.init()

def peak():  # of this program; ru_maxrss would be its parent's where that has more
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])


start = peak()
picture = decode_image(sys.argv[1])
if sys.argv[2] == "as before":
    picture = picture.convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
print((peak() - start) * 1024 / (4 * picture.width * picture.height))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc elsewhere")
def test_a_transparent_picture_takes_its_pixels_twice(tmp_path: Path) -> None:
    """In units of its pixels: decoded, and on white; a third and a fourth copy, as there once were, are the control."""
    Image.effect_noise((256, 256), 99).resize((4096, 4096), Image.Resampling.NEAREST).convert("LA").save(
        tmp_path / "a.png", compress_level=1
    )
    taken = {}
    for way in ("now", "as before"):
        command = [sys.executable, "-c", PEAK, str(tmp_path / "a.png"), way, image_notellm2.__file__]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
        taken[way] = float(done.stdout)
    assert taken["now"] < 2.6 and taken["as before"] > 2.8


@pytest.mark.parametrize("tower", ["clip", "clip_dual", "siglip", "siglip2", "dinov2", "vit", "convnext"])
def test_the_smallest_and_longest_pictures_give_pixels(tower: str) -> None:
    processor = NoteLLM2Processor(TOWERS[tower]()[1], TOKENIZERS["byte_level"](), num_visual_tokens=2)
    for size in ((1, 1), (1, 256), (256, 1)):
        assert torch.isfinite(processor([{"image": Image.new("RGB", size, "red")}])["pixel_values"]).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize("name", ["a.jpg", "a.svg", "a.eps", "a.pdf", "a"])
def test_a_file_is_what_it_holds(kind: str, name: str, tmp_path: Path) -> None:
    if kind == "AVIF" and not PIL.features.check("avif"):
        pytest.skip("Pillow without AVIF")
    content = saved(random_picture(0), kind)
    (tmp_path / name).write_bytes(content)
    assert np.array_equal(np.asarray(read_image(tmp_path / name)), np.asarray(decode_image(content)))


def test_progressive_pictures_with_all_their_scans_are_read() -> None:
    """And what phones put behind a picture, such as a film, is no scan of it."""
    content = saved(random_picture(0), "JPEG", progressive=True)
    assert content.count(b"\xff\xda") > 5
    pixels = np.asarray(decode_image(content))
    assert np.array_equal(np.asarray(decode_image(content + b"\xff\xda" * 500)), pixels)
    assert decode_image(many_scans(50)).size
    with pytest.raises(ValueError, match="scans"):
        decode_image(many_scans(150))


@pytest.mark.filterwarnings("ignore")
def test_damaged_images_give_pixels_or_a_named_error(processor: NoteLLM2Processor, tmp_path: Path) -> None:
    """For some seconds; benchmarks/reliability.py tries more."""
    tally = attack_images(processor, tmp_path, 200, seed=0, seconds=8)
    assert tally.inputs > 20 and 0 < tally.refused < tally.inputs
    assert (tally.wrong, tally.unnamed) == (0, 0), tally.faults
    assert not list(tmp_path.iterdir())


def test_the_fuzzer_sees_what_is_wrong(
    processor: NoteLLM2Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its control: a decoder that lets an error through, and one that gives other pixels of a file than of bytes."""
    first, second = ([(i.attack, i.content) for i in hostile_images(tmp_path, 30, seed)] for seed in (1, 1))
    assert first == second != [(i.attack, i.content) for i in hostile_images(tmp_path, 30, 2)]
    monkeypatch.setattr(image_notellm2, "_DECODER_ERRORS", ())
    assert attack_images(processor, tmp_path, 10, seed=0).unnamed > 0
    monkeypatch.undo()
    read, calls = image_notellm2._rgb, [0]

    def unsteady(picture: Image.Image) -> Image.Image:
        calls[0] += 1
        return read(picture) if calls[0] % 2 else ImageOps.invert(read(picture))

    monkeypatch.setattr(image_notellm2, "_rgb", unsteady)
    assert attack_images(processor, tmp_path, 25, seed=0).wrong > 0
