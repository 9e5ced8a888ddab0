"""A checkpoint gives the same embeddings under the oldest transformers the package declares. Slow: it installs one."""

import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

from hub.verify import TOLERANCE, verify


@pytest.mark.slow
def test_oldest_transformers_gives_the_same_embeddings(tiny_checkpoint: Path, tmp_path: Path):
    declared = next(line for line in requires("notellm2") or [] if line.startswith("transformers"))
    oldest = re.findall(r">=([\d.]+)", declared)[0]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    # transformers 5.6 has no image processor without torchvision; later releases have.
    packages = [f"transformers~={oldest}.0", "torch", "torchvision", "pillow", "peft"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    assert verify(tiny_checkpoint, str(python)) <= TOLERANCE
