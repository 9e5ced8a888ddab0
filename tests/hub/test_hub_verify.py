"""A checkpoint stands on its own, and `hub.verify` notices when one does not."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModel

from hub.verify import VerificationError, encode_in_fresh_process, main, sample_notes, verify


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
    assert text.count("functional.normalize(self.head(states).float(), dim=-1)") == 1
    code.write_text(text.replace("self.head(states).float(), dim=-1)", "self.head(states).float() + 0.01, dim=-1)"))
    with pytest.raises(VerificationError, match="differ by"):
        verify(checkpoint)


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


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path)])
    assert stopped.value.code == 2 and "config.json" in capsys.readouterr().err
