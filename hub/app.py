"""A page in the browser: what a model relates notes to, and where a new note lands.

    python -m hub.app MODEL --notes TABLE

`hub.space` writes the same page as a Space of the Hub.

Each note is shown with its nearest notes by text and picture, by text alone and by picture alone, side by side: whoever
looks sees whether the model uses its pictures. The page asks nothing of any other server.
"""

import argparse
import base64
import json
import logging
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pyarrow.dataset as ds

from evaluation.checkpoints import load_model
from evaluation.lexical import note_text
from evaluation.metrics import tie_order
from evaluation.modality import MODALITIES, Modality, encode_with_modality, fusion_weights, is_blank, with_modality
from evaluation.report import html_environment
from evaluation.sheet import field_text, note_label, thumbnail
from hub.embeddings import Manifest, text_only_ids
from hub.fingerprint import model_fingerprint
from modeling_notellm2 import NoteError, NoteLLM2Model, NoteLLM2PreTrainedModel
from modeling_notellm2.processing_notellm2 import TEXT_FIELDS, has_image, read_image
from pairs.command import CommandParser
from pairs.note_table import NoteTable
from pairs.tables import IMAGE_ROOT_HELP, load_notes
from train.data import without_bad_images

try:
    import gradio as gr
except ImportError as error:
    raise ImportError('the page in the browser needs Gradio: pip install "notellm2[app]".') from error

logger = logging.getLogger(__name__)

Note = Mapping[str, Any]

TITLES: dict[Modality, str] = {"both": "Text and picture", "text": "Text alone", "image": "Picture alone"}
PAGE_SIZE = 48
"""Notes of one page of the grid."""
MAX_CHARACTERS = 10_000
"""Of a new note's field: more than any model reads."""
MAX_FILE_SIZE = "20mb"
"""Of a new note's picture."""

# Of some KB each. They are part of the page's own text: no file of this machine is served.
_PICTURES_IN_MEMORY = 10_000
# Of notes that a line of the log is about.
_IDS_NAMED = 10

_CHOOSE = """
element.addEventListener('click', (event) => {
  const {note, page, back} = event.target.closest('button')?.dataset ?? {};
  if (note !== undefined) {
    document.querySelector('#notes button[aria-current]')?.removeAttribute('aria-current');
    document.querySelector(`#notes button[data-note="${note}"]`)?.setAttribute('aria-current', 'true');
    trigger('click', {note: Number(note)});
  } else if (page !== undefined) {
    trigger('select', {page: Number(page)});
  } else if (back !== undefined) {
    const target = document.querySelector(back) ?? document.querySelector('#notes button.note');
    target?.focus();
    target?.scrollIntoView({block: 'center'});
  }
});
"""
_WORKING = """(...inputs) => {
  document.querySelector('#working').textContent = 'Working …';
  return inputs;
}"""
# The answer may lie below the screen, and a screen reader must be told of it. A tab that opens is there a frame later.
_SHOW_ANSWER = """() => requestAnimationFrame(() => {
  document.querySelector('#working').textContent = '';
  const target = document.querySelector('ANSWER :is(h2, .message)');
  target?.focus({preventScroll: true});
  target?.scrollIntoView({block: matchMedia('(max-width: 48rem)').matches ? 'start' : 'nearest'});
})"""
_SHOW_NOTES = """() => { document.querySelector('#notes button.note')?.focus(); }"""


class Related(NamedTuple):
    """A note that was found.

    Attributes:
        position: among the notes of the space.
        similarity: cosine of its embedding with the query's, -1 to 1.
    """

    position: int
    similarity: float


class Column(NamedTuple):
    """What one modality finds.

    Attributes:
        title: of the modality.
        related: best first.
        reason: why there is nothing; "" if there is something.
    """

    title: str
    related: list[Related]
    reason: str


@dataclass(frozen=True)
class View:
    """One note and what it is related to.

    Attributes:
        note: the query.
        is_new: whether it is none of the space's notes.
        text: its words as the model reads them, cut where the model cuts them.
        picture: whether its picture was used, in words.
        fusion_weight: the weight of the image in late fusion, 0 to 1, the mean over the dimensions for the vector gate;
            0 for a note without image, None for a model without late fusion.
        columns: one for each modality of the space.
    """

    note: Note
    is_new: bool
    text: str
    picture: str
    fusion_weight: float | None
    columns: list[Column]


class NoteSpace:
    """Notes where a model puts them: by text and image, by text alone, by image alone.

    Args:
        model: of the embeddings; new notes are encoded by it.
        notes: N notes. An image that cannot be read is an error when the note is shown.
        embeds: modality ─► (N, D) float32, L2-normalised, zero for a note that has nothing of the modality, and so is
            neither query nor answer.

    Raises:
        ValueError: embeddings of another number or width than notes and model have.
    """

    def __init__(
        self, model: NoteLLM2PreTrainedModel, notes: Sequence[Note], embeds: Mapping[Modality, np.ndarray]
    ) -> None:
        expected = (len(notes), model.config.embedding_dim or model.config.hidden_size)
        for modality, vectors in embeds.items():
            if vectors.shape != expected:
                raise ValueError(
                    f"embeds[{modality!r}] has shape {vectors.shape}, expected {expected}, one row a note and the "
                    "model's own width: encode these notes with this model, without truncation."
                )
        self.model = model
        self.notes = notes
        self.embeds = embeds
        self._is_present = {modality: (vectors != 0).any(axis=1) for modality, vectors in embeds.items()}
        self._ties = tie_order(len(notes))

    def related_to(self, position: int, top_k: int) -> View:
        """What one of the notes is related to, but for itself.

        Raises:
            ValueError: there is no such position.
            NoteError: the note's picture, which late fusion weighs, has gone since or cannot be read any more.
        """
        if not 0 <= position < len(self.notes):
            raise ValueError(f"note={position} is not among the {len(self.notes)} notes: choose one on the page.")
        queries = {modality: vectors[position] for modality, vectors in self.embeds.items()}
        return self._view(self.notes[position], queries, top_k, position)

    def place(self, note: Note, top_k: int) -> View:
        """Encode a new note, once for each modality, and find what it is related to.

        Raises:
            NoteError: the note cannot be read, or has nothing that the model reads.
        """
        queries: dict[Modality, np.ndarray] = {}
        for modality, vectors in self.embeds.items():
            (reduced,) = with_modality([note], modality)
            queries[modality] = np.zeros(vectors.shape[1], dtype=np.float32)
            if not is_blank(reduced):
                queries[modality] = np.asarray(self.model.encode([reduced])[0])
        if not any(query.any() for query in queries.values()):
            raise NoteError("the note has nothing that these notes are compared by: add a text or a picture.")
        return self._view(note, queries, top_k, None)

    def _view(self, note: Note, queries: Mapping[Modality, np.ndarray], top_k: int, itself: int | None) -> View:
        weight = None
        if isinstance(self.model, NoteLLM2Model) and self.model.late_fusion is not None:
            weight = 0.0
            if has_image(note):
                weight = float(fusion_weights(self.model, [note], show_progress_bar=False)[0])
        return View(
            note=note,
            is_new=itself is None,
            text=text_as_read(self.model, note),
            picture=_picture_use(self.model, note),
            fusion_weight=weight,
            columns=[self._column(modality, query, top_k, itself) for modality, query in queries.items()],
        )

    def _column(self, modality: Modality, query: np.ndarray, top_k: int, itself: int | None) -> Column:
        title = TITLES[modality]
        if not query.any():
            lacks = {"both": "text and no picture", "text": "text", "image": "picture"}[modality]
            return Column(title, [], f"This note has no {lacks}.")
        candidates: np.ndarray = self._is_present[modality].copy()
        if itself is not None:
            candidates[itself] = False
        similarity = self.embeds[modality] @ query
        order = np.lexsort((self._ties, -similarity))
        nearest = order[candidates[order]][:top_k]
        return Column(
            title,
            [Related(int(position), float(similarity[position])) for position in nearest],
            "" if len(nearest) else "No other note has what this column compares.",
        )


def encode_notes(
    model: NoteLLM2PreTrainedModel, notes: Sequence[Note], batch_size: int = 32, both: np.ndarray | None = None
) -> dict[Modality, np.ndarray]:
    """Encode notes with each modality that model and notes have.

    Args:
        model: whose embeddings.
        notes: N notes, whose images can be read.
        batch_size: notes a forward pass.
        both: (N, D) float32, their embeddings by text and image where they are known, in place of encoding.

    Returns:
        Modality ─► (N, D) float32, zero for a note that has nothing of it; "text" alone where model or notes have no
        image, "image" alone where no note has a text.

    Raises:
        NoteError: a note cannot be read.
        ValueError: no note has anything that the model reads.
    """
    modalities: Sequence[Modality] = MODALITIES
    if model.config.vision_config is None or not any(map(has_image, notes)):
        modalities = ("text",)
    elif not any(map(note_text, notes)):
        modalities = ("image",)
    embeds = {}
    for modality in modalities:
        if both is not None and modality == modalities[0]:  # the only one is all that a note has
            embeds[modality] = both
            continue
        logger.info("Encoding %d notes: %s", len(notes), TITLES[modality].lower())
        embeds[modality], num_blank = encode_with_modality(model, notes, modality, batch_size)
        if num_blank:
            logger.info("%d of them have nothing of it.", num_blank)
    return embeds


def embeddings_of(folder: str | Path, model: NoteLLM2PreTrainedModel, note_ids: Sequence[str]) -> np.ndarray:
    """What `hub.encode` wrote of some notes; only these are read into memory.

    The log says which of them have no embedding, or one of their text alone.

    Args:
        folder: the folder that it wrote.
        model: that the folder must be of.
        note_ids: N ids.

    Returns:
        (N, D) float32, zero for a note that is not there.

    Raises:
        FileNotFoundError: it is no such folder.
        ValueError: it is of another model, or has none of the notes.
    """
    manifest, fingerprint = Manifest.read(folder), model_fingerprint(model)
    if manifest.model_fingerprint != fingerprint:
        raise ValueError(
            f"embeddings={folder} are of the model {manifest.model_fingerprint} ({manifest.model}), and this one is "
            f"{fingerprint}: encode the notes with this model, or leave the embeddings out."
        )
    dtype = str(model.dtype).removeprefix("torch.")
    if manifest.dtype != dtype:
        logger.warning(
            "%s was computed in %s, and a new note is in %s: their similarities are off by the coarser one's rounding.",
            folder,
            manifest.dtype,
            dtype,
        )
    columns = ds.dataset(Path(folder) / "embeddings", format="parquet")
    found = columns.to_table(filter=ds.field("note_id").isin(list(note_ids)))
    if not len(found):
        raise ValueError(f"embeddings={folder} has none of the {len(note_ids)} notes: encode this table of notes.")
    rows = {note_id: row for row, note_id in enumerate(note_ids)}
    embeds = np.zeros((len(note_ids), manifest.dim), dtype=np.float32)
    vectors = found["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, manifest.dim)
    there = found["note_id"].to_pylist()
    embeds[[rows[note_id] for note_id in there]] = vectors
    text_only = text_only_ids(folder, manifest)
    for state, ids in (
        ("no embedding", rows.keys() - set(there)),
        ("an embedding of their text alone, as their picture could not be read", rows.keys() & text_only),
    ):
        if ids:
            named = [note_id for note_id in note_ids if note_id in ids]
            logger.warning(
                "%d of %d notes have %s, in %s: %s. hub.encode --retry-failures encodes what can be read now.",
                len(named),
                len(note_ids),
                state,
                folder,
                ", ".join(named[:_IDS_NAMED]) + (", …" if len(named) > _IDS_NAMED else ""),
            )
    return embeds


def warn_of_other_notes(folder: str | Path, notes: str | Path) -> None:
    """Says in the log if what `hub.encode` wrote into a folder is of another table than `notes`, or of what this one
    held then: embeddings are found by note id, whatever the note says now. Pictures in files may change unseen.

    Raises:
        FileNotFoundError: it is no such folder, or there is no such table.
        ValueError: one of them cannot be read.
    """
    manifest = Manifest.read(folder)
    if manifest.notes_fingerprint != NoteTable(notes).fingerprint():
        logger.warning(
            "embeddings=%s were made of %s, whose content was not that of notes=%s now: a note that has changed since "
            "keeps the similarities of what it was. Encode this table into a new folder, or leave --embeddings out.",
            folder,
            manifest.notes,
            notes,
        )


def text_as_read(model: NoteLLM2PreTrainedModel, note: Note) -> str:
    """The words of a note that reach the model, field by field; "…" where the processor cuts one."""
    processor, fields = model.processor, []
    for name in TEXT_FIELDS:
        if not (whole := field_text(note, name)):
            continue
        encoded = processor.encode_note({name: note[name]})
        ids = [token for token, is_text in zip(encoded.input_ids, encoded.text_mask, strict=True) if is_text]
        read = processor.tokenizer.decode(ids).strip()
        is_cut = len(ids) == getattr(processor, f"max_{name}_tokens") and read != whole
        fields.append(read + "…" if is_cut else read)
    return " · ".join(fields)


def new_note(picture: str | None, title: str, topics: str, content: str) -> Note:
    """A note out of what a visitor filled in; the image is decoded.

    Args:
        picture: path of an image file, or None.
        title, topics, content: texts, which may be empty.

    Raises:
        NoteError: nothing was filled in, or the file is no image that can be read. The message is for the visitor.
    """
    note: dict[str, Any] = {"title": title, "topics": topics, "content": content}
    if picture is not None:
        try:
            note["image"] = read_image(picture)
        except NoteError as error:
            logger.info("A visitor's picture was refused: %s", error)
            raise NoteError(
                f"The picture {Path(picture).name} cannot be read: choose another file (JPEG, PNG, WebP or GIF), or "
                "remove it."
            ) from error
    if is_blank(note):
        raise NoteError("The note is empty: drop in a picture, or write a title or some text.")
    return note


def find_notes(notes: Sequence[Note], words: str) -> list[int]:
    """Positions of the notes whose text or id holds all these words, in any case; of all notes for no words."""
    wanted = words.lower().split()
    texts = (f"{note.get('note_id', '')} {note_text(note)}".lower() for note in notes)
    return [position for position, text in enumerate(texts) if all(word in text for word in wanted)]


class NotePage:
    """The page's parts as HTML: what its events answer with.

    Args:
        space: the notes.
        top_k: notes a column.
    """

    def __init__(self, space: NoteSpace, top_k: int = 8) -> None:
        self.space = space
        self.top_k = top_k
        environment = html_environment(Path(__file__).parent)
        environment.globals |= {
            "picture_source": self._picture_source,
            "has_image": has_image,
            "note_label": note_label,
            "field_text": field_text,
        }
        self._parts = environment.get_template("app.html.jinja").module
        self._positions = {id(note): position for position, note in enumerate(space.notes)}
        self._stored_picture = lru_cache(_PICTURES_IN_MEMORY)(lambda position: thumbnail(space.notes[position]))

    def hint(self, is_new: bool) -> str:
        """What stands where the related notes will be, those of a new note or of one that is chosen."""
        return self._part("hint", is_new)

    def grid(self, words: str = "", page: int = 0) -> str:
        """One page of the notes that hold these words."""
        found = find_notes(self.space.notes, words)
        pages = max(1, -(-len(found) // PAGE_SIZE))
        page = min(max(page, 0), pages - 1)
        shown = found[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        return self._part("grid", self.space.notes, len(found), shown, page, pages)

    def related(self, position: int) -> str:
        """What a note of the grid is related to; a message if that cannot be told."""
        try:
            return self._part("related", self.space.notes, self.space.related_to(position, self.top_k))
        except NoteError as error:  # it names a file of this machine, which is nothing for visitors
            note = self.space.notes[position]
            logger.warning("Note %s cannot be shown: %s", note.get("note_id"), error)
            words = f"The picture of “{note_label(note)}” cannot be read any more: choose another note."
            return self._part("message", words)
        except ValueError as error:
            return self._part("message", str(error))

    def preview(self, picture: str | None) -> str:
        """A new note's picture, before anything is encoded; nothing without one, a message if it cannot be read."""
        if picture is None:
            return ""
        try:
            return self._part("picture", new_note(picture, "", "", ""))
        except NoteError as error:
            return self._part("message", str(error))

    def place(self, picture: str | None, title: str, topics: str, content: str) -> str:
        """Where a new note lands; a message if it cannot be read."""
        try:
            view = self.space.place(new_note(picture, title, topics, content), self.top_k)
        except NoteError as error:  # it knows no file: the picture is decoded
            return self._part("message", str(error))
        return self._part("related", self.space.notes, view)

    def _part(self, name: str, *arguments: Any) -> str:
        return str(getattr(self._parts, name)(*arguments))

    def _picture_source(self, note: Note) -> str | None:
        """A note's picture as a data URL; None if it has none, or none that can be read."""
        position = self._positions.get(id(note))
        file = thumbnail(note) if position is None else self._stored_picture(position)
        return None if file is None else "data:image/jpeg;base64," + base64.b64encode(file).decode()


def build_page(page: NotePage, title: str, lede: str) -> gr.Blocks:
    """The Gradio page; start it with `launch_page`.

    Args:
        page: answers its events.
        title: heading of the page.
        lede: a sentence below it.
    """
    heading = jinja2.Template(
        "<h1>{{ title }}</h1><p class='lede'>{{ lede }}</p><p id='working' role='status'></p>", autoescape=True
    )
    # Visitors' pictures are deleted after an hour.
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.HTML(heading.render(title=title, lede=lede), js_on_load=None)
        with gr.Tabs(selected="notes") as tabs:
            with gr.Tab("Notes", id="notes"), gr.Row():
                with gr.Column(scale=5, min_width=320):
                    words = gr.Textbox(label="Find notes by their words", max_length=200, placeholder="e.g. vase")
                    grid = gr.HTML(page.grid(), elem_id="notes", js_on_load=_CHOOSE)
                with gr.Column(scale=6, min_width=320):
                    related = gr.HTML(page.hint(False), elem_id="related", elem_classes="answer", js_on_load=_CHOOSE)
            with gr.Tab("A new note", id="new"), gr.Row():
                with gr.Column(scale=5, min_width=320):
                    # A file of any type may come: what is no picture is refused in the page's own words.
                    picture = gr.File(label="Picture (JPEG, PNG, WebP or GIF)", height=140)
                    preview = gr.HTML("", elem_id="preview", js_on_load=None)
                    fields = [
                        gr.Textbox(label="Title", max_length=MAX_CHARACTERS, elem_id="new-title"),
                        gr.Textbox(label="Topics, with commas between", max_length=MAX_CHARACTERS),
                        gr.Textbox(label="Text", lines=4, max_length=MAX_CHARACTERS),
                    ]
                    submit = gr.Button("Show where it lands", variant="primary")
                with gr.Column(scale=6, min_width=320):
                    placed = gr.HTML(page.hint(True), elem_id="placed", elem_classes="answer", js_on_load=_CHOOSE)

        def choose(event: gr.EventData) -> tuple[str, Any]:
            return page.related(int(event.note)), gr.Tabs(selected="notes")

        def turn(text: str, event: gr.EventData) -> str:
            return page.grid(text, int(event.page))

        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        for clickable in (grid, related, placed):
            clickable.click(choose, None, [related, tabs], js=_WORKING, **private).then(
                None, js=_SHOW_ANSWER.replace("ANSWER", "#related")
            )
        grid.select(turn, words, grid, **private).then(None, js=_SHOW_NOTES)
        words.input(page.grid, words, grid, trigger_mode="always_last", **private)
        gr.on(
            [submit.click, fields[0].submit, fields[1].submit],
            page.place,
            [picture, *fields],
            placed,
            js=_WORKING,
            **private,
        ).then(None, js=_SHOW_ANSWER.replace("ANSWER", "#placed"))
        picture.change(page.preview, picture, preview, **private)
        # What was found belonged to another picture.
        picture.change(None, None, placed, js=f"() => {json.dumps(page.hint(True))}")
    return blocks


def launch_page(blocks: gr.Blocks, host: str = "127.0.0.1", port: int = 7860) -> str:
    """Start serving the page in a thread of its own.

    Returns:
        Its address.

    Raises:
        OSError: the port is in use.
    """
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(
        button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800"
    )
    _app, address, _shared = blocks.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        run_history=False,  # a visitor's notes are not kept in the browser
        footer_links=[],
        max_file_size=MAX_FILE_SIZE,
        theme=theme,
        css=Path(__file__).with_name("app.css").read_text(encoding="utf-8"),
    )
    return address


def refuse_taken_port(host: str, port: int) -> None:
    """Raises ValueError if the page cannot be served there."""
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"--port={port} of --host={host} cannot be had ({error}): give another --port.") from error


def _picture_use(model: NoteLLM2PreTrainedModel, note: Note) -> str:
    if not has_image(note):
        return "this note has none"
    return "not used: this model reads text alone" if model.config.vision_config is None else "read by the model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what the page shows."""
    parser.add_argument("--notes", required=True, help="table of notes: note_id, title, topics, content, image")
    parser.add_argument("--image-root", metavar="DIR", help=IMAGE_ROOT_HELP)
    parser.add_argument(
        "--limit", type=int, default=500, metavar="N", help="show the first N notes, each encoded up to three times"
    )
    parser.add_argument(
        "--embeddings", metavar="DIR", help="what hub.encode wrote of these notes with this model, to start sooner"
    )
    parser.add_argument("--top-k", type=int, default=8, metavar="K", help="related notes of a column")
    parser.add_argument("--batch-size", type=int, default=32, help="notes encoded at once")
    parser.add_argument("--title", default="Related notes", help="heading of the page")


def refuse_bad_numbers(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends the command where an option of `add_arguments` is out of range."""
    for name in ("limit", "top_k", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')}={getattr(arguments, name)} must be at least 1")


def make_space(arguments: argparse.Namespace, model_name: str) -> tuple[NoteSpace, str]:
    """Encode the notes of a command with `model` and the options of `add_arguments`.

    Args:
        arguments: of the command.
        model_name: what the model is called on the page.

    Returns:
        The notes where the model puts them, and a sentence that says which they are.

    Raises:
        OSError: there is no such model or table.
        ValueError: model, notes or embeddings cannot be used.
    """
    if arguments.embeddings is not None:
        warn_of_other_notes(arguments.embeddings, arguments.notes)  # refused before anything that takes time
    model = load_model(arguments.model)
    table = load_notes(arguments.notes, arguments.image_root)
    shown = table.select(range(min(arguments.limit, len(table))))
    both = None
    if arguments.embeddings is not None:
        both = embeddings_of(arguments.embeddings, model, list(shown["note_id"]))
    notes, bad = without_bad_images(shown)
    for fault in bad.values():
        logger.warning("%s", fault)
    space = NoteSpace(model, notes, encode_notes(model, notes, arguments.batch_size, both))
    which = f"all {len(notes)}" if len(notes) == len(table) else f"the first {len(notes)} of {len(table)}"
    return space, f"{model_name}: {which} notes of {Path(arguments.notes).name}"


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = CommandParser(
        prog="python -m hub.app",
        description="Look at what a model relates notes to, and at where a new note lands, on a page in the browser.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", help="the checkpoint: a folder or a Hub id")
    add_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to be reached from other machines")
    parser.add_argument("--port", type=int, default=7860, help="where the page is served")
    arguments = parser.parse_args(argv)
    refuse_bad_numbers(parser, arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    folder = Path(arguments.model)
    try:
        refuse_taken_port(arguments.host, arguments.port)
        # Visitors need not know where on this machine it is.
        space, lede = make_space(arguments, folder.resolve().name if folder.is_dir() else arguments.model)
        blocks = build_page(NotePage(space, arguments.top_k), arguments.title, lede)
        address = launch_page(blocks, arguments.host, arguments.port)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(f"Open {address} (Ctrl-C ends it).\n")
    sys.stdout.flush()
    blocks.block_thread()


if __name__ == "__main__":
    main()
