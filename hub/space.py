"""Write the page of `hub.app` as the folder of a Space, which the Hub runs.

    python -m hub.space MODEL FOLDER --notes TABLE --model-id ORG/NAME
    hf upload ORG/SPACE FOLDER --repo-type space

    FOLDER/README.md                          what the Hub reads: Gradio, its version, the model
           app.py                             starts the page
           requirements.txt                   what it needs, in the versions that are installed here
           notes.jsonl, images/               the notes
           embeddings.safetensors             where the model puts them, by each modality
           space.json                         the model's id and fingerprint, and what the page says
           hub/, evaluation/, …               what the page needs of this package

The Space loads the model from the Hub by its id, and runs none of that repository's code. It has nothing to encode
before it can show the notes, and refuses a model that these embeddings are not of.
"""

import argparse
import configparser
import importlib.metadata
import io
import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCard, SpaceCardData
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from safetensors.numpy import load_file, save_file

from evaluation.checkpoints import load_model
from evaluation.modality import MODALITIES
from hub.app import NotePage, NoteSpace, add_arguments, build_page, launch_page, make_space, refuse_bad_numbers
from hub.fingerprint import model_fingerprint
from hub.private import PrivateError, refuse_private
from hub.repo_id import check_repo_id
from modeling_notellm2.processing_notellm2 import TEXT_FIELDS, has_image, read_image
from pairs.command import CommandParser, interruption_said
from pairs.disk import new_folder, refuse_taken
from pairs.tables import load_notes

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE_FILES = ("hub/app.css", "hub/app.html.jinja")
"""What the page reads besides code."""

_APP = '''"""Starts the page of this Space. Written by `python -m hub.space`."""

from pathlib import Path

from hub.space import serve

serve(Path(__file__).parent)
'''
_README = """---
{card}
---

# {title}

What {model} relates notes to: by text and picture, by text alone and by picture alone; and where a note of your own
lands. {lede}.

Written by `python -m hub.space` of NoteLLM-2: write it again to change notes, model or versions.
"""


@dataclass(frozen=True)
class SpaceSettings:
    """What a Space is of.

    Attributes:
        model: its id on the Hub.
        model_fingerprint: of the model that the embeddings are of.
        title, lede: heading of the page, and the sentence below.
        top_k: notes a column.
    """

    model: str
    model_fingerprint: str
    title: str
    lede: str
    top_k: int


def write_space(space: NoteSpace, folder: str | Path, settings: SpaceSettings) -> None:
    """Write the folder, which appears when it is whole.

    Args:
        space: the notes, whose pictures go as they are, with whatever their files say of camera and place.
        folder: where to; must not exist, or be empty.
        settings: what the Space is of.

    Raises:
        FileExistsError: the place is taken.
        ValueError: the model's id is none; another run is writing the folder.
        DiskError: the disk is full.
        NoteError: a picture cannot be read.
        PrivateError: a file would name a folder of a machine or hold a credential.
    """
    check_repo_id("model", settings.model)
    with new_folder(folder) as staging:
        (staging / "images").mkdir()
        _write_notes(space, staging)
        save_file({str(name): vectors for name, vectors in space.embeds.items()}, staging / "embeddings.safetensors")
        (staging / "space.json").write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")
        (staging / "app.py").write_text(_APP, encoding="utf-8")
        (staging / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")
        SpaceCard(_readme(settings)).save(staging / "README.md")
        for source in page_code():
            copy = staging / source.relative_to(REPOSITORY)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
        places: list[str | Path] = [str(space.model.name_or_path or "."), Path(folder).parent, Path.cwd(), Path.home()]
        refuse_private(staging, places, notes=["notes.jsonl"])


def read_space(folder: str | Path) -> tuple[NoteSpace, SpaceSettings]:
    """What `write_space` wrote, with the model from the Hub.

    Raises:
        OSError: the model cannot be reached.
        ValueError: it is another one than the embeddings are of.
    """
    folder = Path(folder)
    settings = SpaceSettings(**json.loads((folder / "space.json").read_text(encoding="utf-8")))
    model = load_model(settings.model)
    if (found := model_fingerprint(model)) != settings.model_fingerprint:
        raise ValueError(
            f"model={settings.model!r} has the fingerprint {found}, and the embeddings of this Space are of "
            f"{settings.model_fingerprint}: the model has changed, so write the Space again (python -m hub.space)."
        )
    embeds = load_file(folder / "embeddings.safetensors")
    # The columns in their order, whatever that of the file is.
    ordered = {modality: embeds[modality] for modality in MODALITIES if modality in embeds}
    return NoteSpace(model, list(load_notes(folder / "notes.jsonl")), ordered), settings


def serve(folder: str | Path) -> None:
    """Show a Space's page until the process ends; on GRADIO_SERVER_PORT, if the environment has it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    space, settings = read_space(folder)
    blocks = build_page(NotePage(space, settings.top_k), settings.title, settings.lede)
    launch_page(blocks, "0.0.0.0", int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
    blocks.block_thread()


def page_code() -> list[Path]:
    """The files of this repository that a Space needs: all modules that this one imports, and `PAGE_FILES`."""
    files: list[str | None] = [getattr(module, "__file__", None) for module in _imports().modules.values()]
    modules = {Path(file).resolve() for file in files if file}  # one that is built in has none
    return sorted({*modules, *(REPOSITORY / name for name in PAGE_FILES)})


def requirements() -> list[str]:
    """Of this package's requirements and those of the page what `page_code` imports, in the versions installed here.
    What timm towers need is among them where it is installed: whether torchvision is there decides how pictures are
    resized."""
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    extras = config["options.extras_require"]
    known = f"{config['options']['install_requires']}\n{extras['app']}".split("\n")
    packages = importlib.metadata.packages_distributions()
    modules = {name.partition(".")[0] for name in _imports().badmodules}  # those of other packages, not looked for
    imported = {canonicalize_name(package) for module in modules for package in packages.get(module, [])}
    needed = [line for line in known if line.strip() and canonicalize_name(Requirement(line).name) in imported]
    return [_pinned(line) for line in (*needed, *filter(_is_installed, extras["timm"].split("\n")))]


@cache
def _imports() -> ModuleFinder:
    """All that this module imports, within functions too; found are the modules of this repository."""
    finder = ModuleFinder(path=[str(REPOSITORY)])
    finder.run_script(__file__)
    return finder


def _is_installed(line: str) -> bool:
    try:
        return bool(line.strip()) and bool(importlib.metadata.version(Requirement(line).name))
    except importlib.metadata.PackageNotFoundError:
        return False


def _pinned(line: str) -> str:
    requirement = Requirement(line)
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    version = importlib.metadata.version(requirement.name).partition("+")[0]  # "+cpu" is a build that PyPI has not
    return f"{requirement.name}{extras}=={version}"


def _write_notes(space: NoteSpace, folder: Path) -> None:
    lines = []
    for row, note in enumerate(space.notes):
        fields = {name: note[name] for name in ("note_id", *TEXT_FIELDS) if note.get(name)}
        if has_image(note):
            content, kind = _image_file(note["image"], row)
            name = f"images/{row:06d}.{kind.lower()}"
            (folder / name).write_bytes(content)
            fields["image"] = name
        lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
    (folder / "notes.jsonl").write_text("".join(lines), encoding="utf-8")


def _image_file(value: Any, row: int) -> tuple[bytes, str]:
    """The bytes of a picture's file and its format, as "JPEG"; a picture that is in memory becomes a PNG."""
    picture = read_image(value, row)  # names the note if that cannot be done
    if isinstance(value, Mapping):  # an undecoded image of `datasets`
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if not isinstance(value, str | os.PathLike | bytes):
        file = io.BytesIO()
        picture.save(file, "PNG")
        return file.getvalue(), "PNG"
    content = value if isinstance(value, bytes) else Path(value).read_bytes()
    with Image.open(io.BytesIO(content)) as opened:
        return content, str(opened.format)


def _readme(settings: SpaceSettings) -> str:
    card = SpaceCardData(
        title=settings.title,
        emoji="🖼️",
        colorFrom="blue",
        colorTo="gray",
        sdk="gradio",
        sdk_version=importlib.metadata.version("gradio"),
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        short_description="Related notes by text and picture",
        models=[settings.model],
        preload_from_hub=[settings.model],
    )
    return _README.format(card=card.to_yaml(), title=settings.title, model=settings.model, lede=settings.lede)


@interruption_said("the folder was not written, or is not whole; give the same command to begin again.")
def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = CommandParser(
        prog="python -m hub.space",
        description="Write the page of hub.app as the folder of a Space. Pictures go as they are, with what their "
        "files say of camera and place.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", help="the checkpoint: a folder or a Hub id")
    parser.add_argument("folder", help="where to write it; must not exist, or be empty")
    parser.add_argument("--model-id", metavar="ORG/NAME", help="where the Hub has this model, if MODEL is a folder")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    refuse_bad_numbers(parser, arguments)
    model_id = arguments.model_id
    if model_id is None:
        if Path(arguments.model).is_dir():
            parser.error(f"model={arguments.model!r} is a folder: say with --model-id ORG/NAME where the Hub has it")
        model_id = arguments.model
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        check_repo_id("--model-id" if arguments.model_id is not None else "model", model_id)
        refuse_taken(arguments.folder)  # before notes are encoded
        space, lede = make_space(arguments, model_id)
        settings = SpaceSettings(model_id, model_fingerprint(space.model), arguments.title, lede, arguments.top_k)
        write_space(space, arguments.folder, settings)
    except (PrivateError, ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(
        f"{arguments.folder}: {len(space.notes)} notes\n"
        f"Try it with:     python {Path(arguments.folder) / 'app.py'}\n"
        f"Publish it with: hf upload ORG/SPACE {arguments.folder} --repo-type space\n"
    )


if __name__ == "__main__":
    main()
