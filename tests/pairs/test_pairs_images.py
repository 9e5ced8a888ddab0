"""Images are read as the processor reads them, none ends the work, and look-alikes are those of brute force."""

import multiprocessing
import os
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from modeling_notellm2.processing_notellm2 import NoteError, read_image
from pairs import images
from pairs.images import check_image, check_images, decode_image, first_lookalikes, perceptual_hash


def picture(seed, size=(96, 72), mode="RGB"):
    """A smooth random picture: compression and scaling change it little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def bomb():
    """A PNG file of 41 bytes that announces 900 million pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def save_all(folder):
    """One file of every kind; the first seven can be read."""
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation: a quarter turn
    picture(0).save(folder / "rotated.jpg", exif=rotated)
    picture(1, mode="L").save(folder / "grey.png")
    clear = picture(2, mode="RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(folder / "transparent.png")
    picture(3).quantize(16).save(folder / "palette.gif", transparency=3)
    picture(4, mode="CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.asarray(picture(5, mode="L")).astype(np.uint16) * 200).save(folder / "16bit.png")
    picture(6).save(folder / "modern.webp")
    picture(7, mode="F").save(folder / "float.tiff")
    picture(8, mode="I").save(folder / "32bit.tiff")
    whole = folder / "rotated.jpg"
    (folder / "truncated.jpg").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (folder / "truncated.png").write_bytes((folder / "grey.png").read_bytes()[:200])
    (folder / "corrupt.png").write_bytes((folder / "grey.png").read_bytes().replace(b"IDAT", b"IDAT\x00", 1))
    (folder / "text.jpg").write_text("not found")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "bomb.png").write_bytes(bomb())
    return sorted(map(str, folder.iterdir()))


def test_images_are_read_as_the_processor_reads_them(tmp_path):
    refused = []
    for path in save_all(tmp_path):
        try:
            expected = read_image(path)
        except NoteError:
            refused.append(os.path.basename(path))
            checked = check_image(path)
            assert (checked.hash, checked.fault) == (None, "unreadable")
            assert checked.detail.startswith(f"{path!r} cannot be read (")
            continue
        assert np.array_equal(np.asarray(decode_image(path)), np.asarray(expected))
        assert check_image(path) == (perceptual_hash(expected), None, "")
    assert refused == [
        "32bit.tiff",
        "bomb.png",
        "corrupt.png",
        "empty.jpg",
        "float.tiff",
        "text.jpg",
        "truncated.jpg",
        "truncated.png",
    ]


def test_contents_are_checked_as_files_are(tmp_path):
    picture(0).save(tmp_path / "a.png")
    assert check_image((tmp_path / "a.png").read_bytes()) == check_image(str(tmp_path / "a.png"))
    assert check_image(b"").fault == "unreadable" and "its file is empty" in check_image(b"").detail


def test_urls_and_missing_files_are_told_apart(tmp_path):
    assert check_image("https://host/a.png") == (
        None,
        "url",
        "'https://host/a.png' is an address, and nothing is fetched: download it and pass a path.",
    )
    missing, folder = check_image(str(tmp_path / "a.png")), check_image(str(tmp_path))
    assert missing.fault == folder.fault == "missing"
    assert missing.detail.startswith(f"no file {str(tmp_path / 'a.png')!r}. ")
    assert folder.detail.startswith(f"{str(tmp_path)!r} is a folder. ")


def test_hashes_survive_compression_and_scaling_and_tell_pictures_apart(tmp_path):
    picture(0).save(tmp_path / "a.png")
    picture(0).resize((48, 36)).save(tmp_path / "smaller.jpg", quality=60)
    a, smaller = (check_image(str(tmp_path / name)).hash for name in ("a.png", "smaller.jpg"))
    others = [perceptual_hash(picture(seed)) for seed in range(1, 20)]
    assert (a ^ smaller).bit_count() <= 4
    assert min((a ^ other).bit_count() for other in others) > 8


def test_images_come_back_in_order(tmp_path):
    for seed in range(40):
        picture(seed, size=(16, 16)).save(tmp_path / f"{seed}.png")
    sources = [str(tmp_path / f"{seed}.png") for seed in range(40)]
    sources[5] = str(tmp_path / "missing.png")
    checked = list(check_images(sources, workers=2))
    assert checked == [check_image(source) for source in sources]
    assert checked != [check_image(source) for source in reversed(sources)]


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="only forked workers see the patched decoder")
def test_an_image_that_kills_its_process_is_only_one_bad_image(tmp_path, monkeypatch):
    def decode(source):
        if "killer" in source:
            os._exit(1)
        return decode_image(source)

    monkeypatch.setattr(images, "decode_image", decode)
    monkeypatch.setattr(images, "_IMAGES_PER_PROCESS", 6)
    sources = []
    for seed in range(30):
        sources.append(str(tmp_path / f"{'killer' if seed in (3, 4, 20) else 'good'}{seed}.png"))
        picture(seed, size=(16, 16)).save(sources[-1])
    checked = list(check_images(sources, workers=2))
    assert [i for i, image in enumerate(checked) if image.fault == "unreadable"] == [3, 4, 20]
    assert checked[3].detail == f"{sources[3]!r}: the process that decoded it died"
    assert [image.hash for image in checked if image.hash is not None] == [
        check_image(source).hash for source in sources if "good" in source
    ]


def test_no_workers_are_refused():
    with pytest.raises(ValueError, match="workers=0: give 1 or more"):
        list(check_images([], workers=0))


def clustered_hashes(rng, clusters=60, copies=6):
    """Random hashes, each with copies in which up to eight random bits are flipped, in random order."""
    rows = []
    for center in rng.integers(0, 2**64, clusters, dtype=np.uint64):
        for _ in range(copies):
            bits = rng.choice(64, rng.integers(0, 9), replace=False)
            rows.append(int(center) ^ sum(1 << int(bit) for bit in bits))
    return rng.permutation(np.array(rows, np.uint64))


def brute_force(hashes, max_distance):
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    return np.argmax(distances <= max_distance, axis=1)


@pytest.mark.parametrize("max_distance", [0, 1, 4, 7, 10])
def test_lookalikes_are_those_of_brute_force(max_distance):
    hashes = clustered_hashes(np.random.default_rng(max_distance))
    found = first_lookalikes(hashes, max_distance)
    assert found.dtype == np.int64
    assert np.array_equal(found, brute_force(hashes, max_distance))
    assert 0 < np.sum(found != np.arange(len(hashes))) < len(hashes)
    assert not np.array_equal(found, first_lookalikes(hashes, max_distance - 1 if max_distance else 1))


def test_few_pairs_of_hashes_are_compared(monkeypatch):
    compared = []
    count = np.bitwise_count
    monkeypatch.setattr(np, "bitwise_count", lambda bits: compared.append(len(bits)) or count(bits))
    n = 20_000
    first_lookalikes(np.random.default_rng(0).integers(0, 2**64, n, dtype=np.uint64), max_distance=4)
    assert 0 < sum(compared) < n * n / 2 / 50_000
    compared.clear()
    first_lookalikes(np.full(n, 7, np.uint64), max_distance=4)  # equal ones are counted as one
    assert sum(compared) == 0


@pytest.mark.parametrize("max_distance", [-1, 11])
def test_bad_distances_are_refused(max_distance):
    with pytest.raises(ValueError, match=f"max_distance={max_distance}: give a number of bits from 0 to 10"):
        first_lookalikes(np.empty(0, np.uint64), max_distance)


def test_a_missing_library_is_no_fault_of_the_image(tmp_path, monkeypatch):
    picture(0).save(tmp_path / "good.png")
    assert check_image(str(tmp_path / "good.png")).fault is None
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(ImportError, match="pip install 'notellm2"):
        check_image(str(tmp_path / "good.png"))
    with pytest.raises(ImportError, match="pip install 'notellm2"):
        next(check_images([str(tmp_path / "good.png")], workers=1))
