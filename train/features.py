"""The frozen tower is run once for every image: a store of its output on disk, mapped into memory.

    FOLDER/<fingerprint>/<part>/keys.npy, patch_embeds.npy, pooled_embeds.npy (, patch_attention_mask.npy)
    FOLDER/<fingerprint>/<part>/checksums.json          of these files, compared when a process first opens a part

The fingerprint is of all that decides what the tower sees but the image: its weights, its configuration, the image
processor, the libraries' versions, dtype and kind of device. Images are known by their content. So nothing in a store
is ever stale: what has changed is not found, and is computed. Parts are written under another name and renamed, so that
a part is whole or absent. Runs may share a store, and fill it at once: an image that two compute is there twice.
"""

import hashlib
import json
import shutil
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from modeling_notellm2 import NoteError, NoteLLM2Model, NoteLLM2Processor
from modeling_notellm2.processing_notellm2 import EncodedNote, read_image_file
from pairs.disk import DamagedError, disk_errors_named, sha256

PART_BYTES = 2**28
"""A part is written when it has so many bytes."""

STORE_VERSION = 2
"""Raised when this package reads images, or reduces the tower's output, in another way."""

MAX_OPEN_PARTS = 128
"""Parts that are mapped at a time: each array of one takes a file descriptor."""

CHECKSUMS = "checksums.json"

KEY_TYPE = "S32"
"""32 hexadecimal digits: 16 bytes of BLAKE2b."""


class VisionFeatureStore:
    """What one tower sees in images.

    Exact: the same tensors that the tower would give in every step, as it is frozen and its image processor draws
    nothing at random. (Run in the tower's own dtype: under mixed precision a step would round more.) All processes of a
    run must reach the folder. Size: (P + 1) · d_v numbers an image in the tower's dtype; in float32 250 kB for
    EfficientNet-Lite0, 605 kB for CLIP ViT-B/16, 1.7 MB for ViT-bigG/14 at 224 pixels; half of it in 16 bits.

    Args:
        folder: where stores are kept; any number of towers share it.
        model: the model whose tower and image processor are run.

    Raises:
        ValueError: the model has no tower, or its tower trains, so that its output would change.
    """

    def __init__(self, folder: str | Path, model: NoteLLM2Model) -> None:
        if not model.config.has_vision:
            raise ValueError("the model has no vision tower, so there are no features to keep.")
        if not model.config.freeze_vision_tower:
            raise ValueError("freeze_vision_tower=False: the features of a tower that trains cannot be kept.")
        self.model = model
        self.fingerprint = fingerprint(model)
        self.folder = Path(folder) / self.fingerprint
        self._parts = _Parts([])
        self._keys = np.array([], KEY_TYPE)  # sorted
        self._places = np.empty((0, 2), np.int64)  # of each key: part, row
        self._reload()

    def table(
        self,
        notes: Sequence[Any],
        batch_size: int = 32,
        on_error: Callable[[NoteError], None] | None = None,
    ) -> "VisionFeatureTable":
        """The features of the images of some notes; those that the store lacks are computed, by all processes together.

        Args:
            notes: notes as `encode` takes them; those without image have no features.
            batch_size: images a forward pass.
            on_error: told of each image that cannot be read; None: the error is raised.

        Raises:
            NoteError: an image cannot be read.
        """
        state = PartialState()
        if state.is_main_process:
            self._remove_leftovers()
        rows = range(state.process_index, len(notes), state.num_processes)
        found: list[tuple[int, bytes]] = []
        errors: dict[int, str] = {}
        missing: dict[bytes, int] = {}  # rows: the pictures may be in memory, and are many
        is_main = state.is_main_process
        for row in tqdm(rows, desc="images", unit="note", disable=not is_main):
            try:
                encoded = _cover_of(notes[row], row, self.model.processor)
                if encoded.image is not None:
                    found.append((row, key := image_key(encoded, self.model.processor)))
                    if key not in self:
                        missing.setdefault(key, row)
            except NoteError as error:
                errors[row] = str(error)
        unread = self._add(notes, missing, batch_size, show_progress_bar=is_main)
        errors |= {row: unread[key] for row, key in found if key in unread}
        state.wait_for_everyone()
        self._reload()
        if state.num_processes > 1:
            found = gather_object(found)
            errors = dict(gather_object(list(errors.items())))
        for row in sorted(errors):
            if on_error is None:
                raise NoteError(errors[row])
            on_error(NoteError(errors[row]))
        places = np.full((len(notes), 2), -1)
        for row, key in found:
            if row not in errors:
                places[row] = self._place(key)
        return VisionFeatureTable(self._parts, places, errors)

    def __contains__(self, key: bytes) -> bool:
        place = np.searchsorted(self._keys, key)
        return bool(place < len(self._keys) and self._keys[place] == key)

    def __len__(self) -> int:
        return len(self._keys)

    def _place(self, key: bytes) -> np.ndarray:
        if key not in self:
            raise RuntimeError(
                f"{self.folder} lacks an image that was just computed: let all processes reach the same folder "
                "(vision_features_dir), and do not change it meanwhile."
            )
        place: np.ndarray = self._places[np.searchsorted(self._keys, key)]
        return place

    def _reload(self) -> None:
        self._parts, keys, places = _Parts(sorted(self.folder.glob("part-*"))), [], []
        for number, part in enumerate(self._parts.folders):
            _refuse_damaged(part, ["keys.npy"])
            keys.append(_load(part / "keys.npy"))
            places.append(np.stack([np.full(len(keys[-1]), number), np.arange(len(keys[-1]))], axis=1))
        if keys:  # an image that two processes computed at once is there twice: either will do
            self._keys, firsts = np.unique(np.concatenate(keys), return_index=True)
            self._places = np.concatenate(places)[firsts]

    def _remove_leftovers(self) -> None:
        """What a killed run was writing; a day later nobody is."""
        for folder in self.folder.glob("unfinished-*"):
            if time.time() - folder.stat().st_mtime > 86_400:
                shutil.rmtree(folder, ignore_errors=True)

    def _add(
        self, notes: Sequence[Any], missing: Mapping[bytes, int], batch_size: int, show_progress_bar: bool
    ) -> dict[bytes, str]:
        """Compute and write features; returns the messages of the images that cannot be read."""
        unread: dict[bytes, str] = {}
        keys: list[bytes] = []
        arrays: dict[str, list[np.ndarray]] = {}
        size = 0
        with tqdm(total=len(missing), desc="vision features", unit="image", disable=not show_progress_bar) as progress:
            for batch in self._readable(notes, missing, batch_size, unread):
                keys += batch
                features = self._run([note for note in batch.values()])
                for name, values in features.items():
                    arrays.setdefault(name, []).append(values)
                    size += values.nbytes
                if size >= PART_BYTES:
                    self._write(keys, arrays)
                    keys, arrays, size = [], {}, 0
                progress.update(len(batch))
        if keys:
            self._write(keys, arrays)
        return unread

    def _readable(
        self, notes: Sequence[Any], missing: Mapping[bytes, int], batch_size: int, unread: dict[bytes, str]
    ) -> Iterator[dict[bytes, EncodedNote]]:
        batch: dict[bytes, EncodedNote] = {}
        for key, row in missing.items():
            try:
                batch[key] = self.model.processor.load_image(_cover_of(notes[row], row, self.model.processor))
            except NoteError as error:
                unread[key] = str(error)
            if len(batch) == batch_size:
                yield batch
                batch = {}
        if batch:
            yield batch

    @torch.no_grad()
    def _run(self, notes: Sequence[EncodedNote]) -> dict[str, np.ndarray]:
        model = self.model
        batch = model.processor.collate(notes)
        names = model.processor.image_processor.model_input_names
        images = {name: batch[name].to(_tower_device(model)) for name in names if name in batch}
        features = model.get_image_features(**images)
        return {name: _to_numpy(value) for name, value in features._asdict().items() if value is not None}

    def _write(self, keys: list[bytes], arrays: Mapping[str, list[np.ndarray]]) -> None:
        name = uuid.uuid4().hex
        unfinished = self.folder / f"unfinished-{name}"
        with disk_errors_named(self.folder):
            unfinished.mkdir(parents=True)
            try:
                np.save(unfinished / "keys.npy", np.array(keys, KEY_TYPE))
                for field, values in arrays.items():
                    np.save(unfinished / f"{field}.npy", np.concatenate(values))
                checksums = {file.name: sha256(file) for file in sorted(unfinished.iterdir())}
                (unfinished / CHECKSUMS).write_text(json.dumps(checksums), encoding="utf-8")
                unfinished.rename(self.folder / f"part-{name}")
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise


class _Parts:
    """The arrays of a store's parts, mapped when asked for. Pickles as paths, as worker processes want it."""

    def __init__(self, folders: list[Path]) -> None:
        self.folders = folders
        self._open: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()
        self._checked: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"folders": self.folders, "_open": OrderedDict(), "_checked": self._checked}

    def arrays(self, part: int) -> dict[str, np.ndarray]:
        """The features of a part by name."""
        if part not in self._open:
            files = sorted(self.folders[part].glob("*.npy"))
            if part not in self._checked:
                _refuse_damaged(self.folders[part])
                self._checked.add(part)
            self._open[part] = {file.stem: _load(file, "r") for file in files if file.stem != "keys"}
            if len(self._open) > MAX_OPEN_PARTS:
                self._open.popitem(last=False)
        self._open.move_to_end(part)
        return self._open[part]


def _refuse_damaged(part: Path, names: Sequence[str] | None = None) -> None:
    """Raises DamagedError for the first file of a part, or the first of these, that is not as it was written."""
    try:
        checksums = json.loads((part / CHECKSUMS).read_text(encoding="utf-8"))
        for name in names or sorted(checksums):
            if sha256(part / name) != checksums[name]:
                raise DamagedError(
                    f"{part / name} is damaged, by its checksum: delete the folder {part}, it is computed anew."
                )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DamagedError(
            f"{part} is damaged, as its {CHECKSUMS} or a file that it names cannot be read ({error!r}): delete that "
            "folder, it is computed anew."
        ) from error


def _load(file: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    try:
        array: np.ndarray = np.load(file, mmap_mode=mmap_mode)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{file} is damaged ({error}): delete the folder {file.parent}, it is computed anew."
        ) from error
    return array


class VisionFeatureTable:
    """The features of the images of some notes, in a store. Made by `VisionFeatureStore.table`.

    Args:
        parts: the store's parts.
        places: (N, 2) int64, the part and row of each note; −1: the note has no features.
        errors: for notes whose image cannot be read, why.
    """

    def __init__(self, parts: _Parts, places: np.ndarray, errors: Mapping[int, str]) -> None:
        self._parts = parts
        self._places = places
        self._errors = errors

    def check(self, index: int) -> None:
        """Raises NoteError if the image of this note cannot be read."""
        if index in self._errors:
            raise NoteError(self._errors[index])

    def select(self, indices: Sequence[int]) -> "VisionFeatureTable":
        """The same for a part of the notes, or for the notes in another order."""
        errors = {new: self._errors[old] for new, old in enumerate(indices) if old in self._errors}
        return VisionFeatureTable(self._parts, self._places[np.asarray(indices, dtype=np.int64)], errors)

    def __call__(self, notes: Sequence[EncodedNote]) -> dict[str, Tensor]:
        """Inputs of the model in place of the pixels of these notes, whose `index` is their position here."""
        return self.stack([note.index for note in notes if note.image is not None])

    def stack(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Inputs of the model for the notes at these positions, in order, those without image left out.

        Returns:
            `patch_embeds` (N, P, d_v), `pooled_embeds` (N, d_v) and any `patch_attention_mask` (N, P); nothing if no
            note has an image.
        """
        places = self._places[np.asarray(indices, dtype=np.int64)]
        places = places[places[:, 0] >= 0].tolist()
        rows: dict[str, list[Tensor]] = {}
        for part, row in places:
            for name, values in self._parts.arrays(part).items():
                rows.setdefault(name, []).append(_to_tensor(values[row]))
        return {name: torch.stack(values) for name, values in rows.items()}


def image_key(note: EncodedNote, processor: NoteLLM2Processor) -> bytes:
    """What an image is known by: a hash of its file or its bytes, or of what `processor` makes of one in memory.

    Raises:
        NoteError: it cannot be read.
    """
    value = note.image
    content = hashlib.blake2b(digest_size=16)
    if isinstance(value, Image.Image | np.ndarray):  # rotation and transparency are not in the pixels alone
        for name, tensor in sorted((processor.load_image(note).pixels or {}).items()):
            content.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
        return content.hexdigest().encode()
    content.update(value if isinstance(value, bytes) else read_image_file(value, note.index))
    return content.hexdigest().encode()


def image_groups(
    notes: Sequence[Mapping[str, Any]], processor: NoteLLM2Processor, show_progress_bar: bool = True
) -> np.ndarray:
    """(N,) int64: the same number for notes whose images have the same content (a file by its bytes); a number of its
    own for each note without image, or with none that can be opened."""
    firsts: dict[bytes, int] = {}
    groups = np.arange(len(notes))
    for row in tqdm(range(len(notes)), desc="cover images", unit="note", disable=not show_progress_bar):
        try:
            encoded = _cover_of(notes[row], row, processor)
            if encoded.image is not None:
                groups[row] = firsts.setdefault(image_key(encoded, processor), row)
        except NoteError:
            continue
    return groups


def _cover_of(note: Any, row: int, processor: NoteLLM2Processor) -> EncodedNote:
    """A note with its image alone, and no text to tokenise."""
    image = note.get("image") if isinstance(note, Mapping) else None if isinstance(note, str) else note
    return processor.encode_note({"image": image, "content": "-"}, row)


def fingerprint(model: NoteLLM2Model) -> str:
    """A name for all that decides what the tower sees in an image."""
    if model.vision_tower is None:
        raise ValueError("the model has no vision tower.")
    content = hashlib.blake2b(digest_size=16)
    settings = {
        "tower": model.config.vision_config.to_diff_dict(),
        "image_processor": json.loads(model.processor.image_processor.to_json_string()),
        "versions": {name: _version(name) for name in ("torch", "transformers", "pillow", "torchvision", "timm")},
        "store": STORE_VERSION,
        "device": _tower_device(model).type,
    }
    content.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.vision_tower.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return content.hexdigest()


def _tower_device(model: NoteLLM2Model) -> torch.device:
    return next(model.vision_tower.parameters()).device  # type: ignore[union-attr]  # stores are of models with a tower


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _to_numpy(values: Tensor) -> np.ndarray:
    """NumPy has no bfloat16: its bits are kept as float16's are, under a type of their own."""
    values = values.detach().cpu().contiguous()
    if values.dtype == torch.bfloat16:
        return values.view(torch.uint16).numpy()
    array: np.ndarray = values.numpy()
    return array


def _to_tensor(values: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.array(values))
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


__all__ = ["VisionFeatureStore", "VisionFeatureTable", "fingerprint", "image_groups", "image_key"]
