"""A checkpoint stands on its own, and `hub.verify` notices when one does not."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModel

from hub.verify import (
    CHECKSUMS,
    RECORD,
    Loader,
    VerificationError,
    encode_in_fresh_process,
    main,
    read_record,
    sample_notes,
    verify,
    write_checksums,
)


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that the test may spoil."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def test_checkpoint_gives_the_same_embeddings_without_this_repository(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
):
    main([str(tiny_checkpoint)])
    assert "verified" in capsys.readouterr().out


def test_notices_code_that_computes_something_else(checkpoint: Path):
    code = checkpoint / "modeling_notellm2.py"
    text = code.read_text()
    assert text.count("unit_length(self.head(states).float())") == 1
    code.write_text(text.replace("self.head(states).float())", "self.head(states).float() + 0.01)"))
    with pytest.raises(VerificationError, match="modeling_notellm2.py is not that of the installed"):
        verify(checkpoint)
    with pytest.raises(VerificationError, match="differ by"):
        verify(checkpoint, allow_other_code=True)


def test_notices_missing_code(checkpoint: Path):
    (checkpoint / "fusion_notellm2.py").unlink()
    with pytest.raises(VerificationError, match="fusion_notellm2"):
        verify(checkpoint)


def test_the_fresh_process_cannot_import_the_repository(checkpoint: Path):
    code = checkpoint / "modeling_notellm2.py"
    code.write_text(code.read_text() + "\nimport pairs\n")
    with pytest.raises(VerificationError, match="pairs is hidden"):
        encode_in_fresh_process(checkpoint, sample_notes(with_images=True))


def test_sample_notes_reach_every_path(tiny_checkpoint: Path):
    notes = sample_notes(with_images=True)
    encoded = [
        AutoModel.from_pretrained(tiny_checkpoint).processor.encode_note(note, i) for i, note in enumerate(notes)
    ]
    assert {note.image is None for note in encoded} == {True, False}
    embeds = encode_in_fresh_process(tiny_checkpoint, notes, sys.executable)
    assert embeds.shape == (4, 16) and embeds.dtype == np.float32
    assert np.abs(np.diff(embeds, axis=0)).max(1).min() > 1e-3  # four notes, four embeddings


@pytest.mark.parametrize("broken", ["transformers", "sentence-transformers"])
def test_each_library_must_give_the_recorded_embeddings(
    tiny_export: Path, broken: str, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def encode(folder: Path, notes: list, python: str, loader: Loader) -> np.ndarray:
        asked.append(loader)
        return read_record(folder)[1] + (0.01 if loader == broken else 0)

    monkeypatch.setattr("hub.verify.encode_in_fresh_process", encode)
    with pytest.raises(VerificationError, match=rf"differ by .* in a fresh process \({broken}\)"):
        verify(tiny_export)
    broken = "neither"  # the control
    asked.clear()
    verify(tiny_export)
    assert asked == ["transformers", "sentence-transformers"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", "no weights", "cannot be loaded"),
        ("config.json", "{", "cannot be loaded"),
        ("config.json", '{"model_type": "nobody knows"}', "cannot be loaded"),
    ],
)
def test_a_broken_checkpoint_fails_with_a_sentence(checkpoint: Path, name: str, content: str, message: str):
    (checkpoint / name).write_text(content)
    with pytest.raises(SystemExit, match=f"FAILED: .*{message}"):
        main([str(checkpoint)])


def test_a_file_that_cannot_be_read_fails_with_a_sentence(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: object) -> float:
        raise PermissionError(13, "Permission denied", "tokenizer.json")

    monkeypatch.setattr("hub.verify.verify", fail)
    with pytest.raises(SystemExit, match=r"FAILED: .*Permission denied: 'tokenizer.json'"):
        main([str(tiny_checkpoint)])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{}", "configs do not name its code .*auto_map"),
        ("modules.json", None, "configs do not name its code .*modules.json"),
        (RECORD, "{}", f"{RECORD} cannot be read .*notes"),
        (RECORD, '{"notes": [3], "embeddings": []}', f"{RECORD} cannot be read"),
    ],
)
def test_a_broken_export_fails_with_a_sentence(
    tiny_export: Path, tmp_path: Path, name: str, content: str | None, message: str
):
    folder = shutil.copytree(tiny_export, tmp_path / "export")
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    write_checksums(folder)  # somebody's own list
    with pytest.raises(SystemExit, match=f"FAILED: .*{message}"):
        main([str(folder)])
    (folder / CHECKSUMS).write_bytes(b"\xff")
    with pytest.raises(SystemExit, match=f"FAILED: .*{CHECKSUMS} cannot be read"):
        main([str(folder)])


def test_a_library_that_was_not_tried_is_named(
    tiny_export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("hub.verify.verify", lambda *arguments: 0.0)
    main([str(tiny_export)])
    assert "not tried" not in capsys.readouterr().out
    monkeypatch.setattr("hub.verify.available_loaders", lambda python: ["transformers"])
    main([str(tiny_export)])
    assert "sentence-transformers loads it was not tried: it is not installed" in capsys.readouterr().out


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for folder, message in ((tmp_path, "holds no config.json"), (tmp_path / "nothing", "there is no such folder")):
        with pytest.raises(SystemExit) as stopped:
            main([str(folder)])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
