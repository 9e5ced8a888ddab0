"""Images of notes: which can be read, and which look alike.

An image is decoded as the processor decodes it (see `pairs.decoding`).
Two images look alike if their perceptual hashes differ in few bits. They are found without comparing all with all: cut
into d + 2 blocks, two hashes that differ in at most d bits agree in two blocks at least (the pigeonhole principle).
"""

import os
import signal
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import combinations, islice, pairwise
from types import ModuleType
from typing import NamedTuple

import numpy as np
from PIL import Image

from pairs.decoding import OUTSIDE, decode_image, is_address, shown

HASH_BITS = 64
MAX_DISTANCE = 10  # beyond it different pictures are "alike", and the blocks are too short to find them quickly

_IMAGES_PER_PROCESS = 64  # before the results are collected; as many images may be in memory


class CheckedImage(NamedTuple):
    """What is known of one image.

    Attributes:
        hash: 64-bit pHash; None if the image cannot be read.
        fault: "url", "outside", "missing" or "unreadable"; None if the image can be read.
        detail: what is wrong, in words; "" if nothing is.
    """

    hash: int | None
    fault: str | None
    detail: str


def perceptual_hash(picture: Image.Image) -> int:
    """The 64-bit pHash: which of the 8 x 8 lowest frequencies of the 32 x 32 grey picture are above their median.

    It sees shapes and no colours: two products of one shape, photographed on white, may have nearly the same hash, and
    pictures of one plain colour have, whichever the colour.

    Raises:
        ImportError: imagehash is not installed.
    """
    bits = _imagehash().phash(picture).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _imagehash() -> ModuleType:
    try:
        import imagehash
    except ImportError as error:
        raise ImportError(
            "perceptual hashes need imagehash: pip install 'notellm2[scan]', or -e '.[scan]' in a checkout."
        ) from error
    return imagehash


def check_image(source: str | bytes) -> CheckedImage:
    """Decodes and hashes one image; no fault of the image raises.

    Args:
        source: path or content of an image file.

    Raises:
        ImportError: imagehash is not installed.
    """
    _imagehash()  # below, its absence would pass for a fault of the image
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on images that it reads all the same
            return CheckedImage(perceptual_hash(decode_image(source)), None, "")
    except ValueError as error:  # its words name the image and the remedy
        return CheckedImage(None, _fault_of(source), str(error))


def _fault_of(source: str | bytes) -> str:
    """What is wrong with an image that cannot be read."""
    if isinstance(source, bytes):
        return "unreadable"
    if is_address(source):
        return "outside" if source.startswith(OUTSIDE) else "url"
    return "unreadable" if os.path.isfile(source) else "missing"


def _ignore_interrupts() -> None:
    """In a worker: Ctrl-C reaches all processes, and the one that is the command ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_images(sources: Iterable[str | bytes], workers: int) -> Iterator[CheckedImage]:
    """Checks images in worker processes, in order. An image that kills the process that decodes it is unreadable, too.

    Args:
        sources: paths or contents of image files; a few hundred of them are held in memory at a time.
        workers: number of processes, at least 1.

    Raises:
        ValueError: workers is below 1.
        ImportError: imagehash is not installed.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: give 1 or more.")
    _imagehash()  # before there are processes
    remaining = iter(sources)
    pool = ProcessPoolExecutor(workers, initializer=_ignore_interrupts)
    try:
        while batch := list(islice(remaining, workers * _IMAGES_PER_PROCESS)):
            checked: list[CheckedImage] = []
            try:
                for image in pool.map(check_image, batch, chunksize=8):
                    checked.append(image)
                    yield image
            except BrokenProcessPool:
                pool = ProcessPoolExecutor(workers, initializer=_ignore_interrupts)
                yield from _check_one_by_one(batch[len(checked) :])
    finally:
        pool.shutdown(cancel_futures=True)


def _check_one_by_one(sources: Iterable[str | bytes]) -> Iterator[CheckedImage]:
    """In one process, so that it is known which image kills it; the next image then gets a new process."""
    pool = ProcessPoolExecutor(1, initializer=_ignore_interrupts)
    try:
        for source in sources:
            try:
                yield pool.submit(check_image, source).result()
            except BrokenProcessPool:
                pool = ProcessPoolExecutor(1, initializer=_ignore_interrupts)
                what = shown(source) if isinstance(source, str) else "an image inside the table"
                yield CheckedImage(None, "unreadable", f"{what}: the process that decoded it died")
    finally:
        pool.shutdown(cancel_futures=True)


def first_lookalikes(hashes: np.ndarray, max_distance: int) -> np.ndarray:
    """For each hash the first one that differs from it in at most `max_distance` bits.

    Args:
        hashes: (N,) uint64.
        max_distance: 0 to 10.

    Returns:
        (N,) int64 positions; a hash that is like none before it has its own.

    Raises:
        ValueError: another max_distance.

    >>> first_lookalikes(np.array([0b1111, 0b0000, 0b0111, 0b1111], np.uint64), max_distance=1)
    array([0, 1, 0, 0])
    """
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(f"max_distance={max_distance}: give a number of bits from 0 to {MAX_DISTANCE}.")
    different, positions, inverse = np.unique(hashes.astype(np.uint64), return_index=True, return_inverse=True)
    first = positions.astype(np.int64)
    ends = [HASH_BITS * i // (max_distance + 2) for i in range(max_distance + 3)]
    blocks = [(1 << end) - (1 << start) for start, end in pairwise(ends)]
    for block, other_block in combinations(blocks, 2):
        key = different & np.uint64(block | other_block)
        order = np.argsort(key, kind="stable")
        # Hashes with the same key lie side by side; each is compared with the next one, the one after it and so on.
        group_ends = np.searchsorted(key[order], key[order], side="right")
        left = np.arange(len(order))
        for offset in range(1, len(order)):
            left = left[left + offset < group_ends[left]]
            if not len(left):
                break
            a, b = order[left], order[left + offset]
            near = np.bitwise_count(different[a] ^ different[b]) <= max_distance
            a, b = a[near], b[near]
            np.minimum.at(first, a, positions[b])
            np.minimum.at(first, b, positions[a])
    return first[inverse]
