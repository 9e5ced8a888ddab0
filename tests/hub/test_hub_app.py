"""The page in the browser: what it finds, what it says, and (slow, in headless Chromium) that people can use it."""

import argparse
import io
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

import hub.app
from evaluation.checkpoints import load_model
from evaluation.modality import fusion_weights, with_modality
from hub.app import (
    MODALITIES,
    PAGE_SIZE,
    TITLES,
    NotePage,
    NoteSpace,
    add_arguments,
    build_page,
    embeddings_of,
    encode_notes,
    find_notes,
    launch_page,
    main,
    make_space,
    new_note,
    text_as_read,
)
from hub.encode import encode_corpus
from modeling_notellm2 import NoteError, NoteLLM2Model
from pairs.note_table import NoteTable
from pairs.tables import load_notes
from tests.backbones import random_picture, save

HOSTILE = "<script>x</script><IMG_EMB>&"  # no longer than the tiny model reads


def make_notes() -> list[dict[str, Any]]:
    """Notes with picture and text, two without picture, one without text, one with neither."""
    words = ["oak shelf", "red shoes", "blue hat", "garden tools", "spicy noodles"]
    notes: list[dict[str, Any]] = [
        {"note_id": f"n{i}", "title": words[i % 5], "content": f"{words[i % 3]} {i}", "image": random_picture(i)}
        for i in range(8)
    ]
    notes += [
        {"note_id": "hostile", "title": HOSTILE, "topics": ["<b>", "x"], "content": "${1+1} {{value}}", "image": None},
        {"note_id": "long", "title": "red " * 60, "content": "blue hat " * 300, "image": None},
        {"note_id": "image", "title": "", "content": None, "image": random_picture(20)},
        {"note_id": "nothing", "title": "", "content": "", "image": None},
    ]
    return notes


@pytest.fixture(scope="module")
def space(shared_tiny_model: NoteLLM2Model) -> NoteSpace:
    notes = make_notes()
    return NoteSpace(shared_tiny_model, notes, encode_notes(shared_tiny_model, notes))


@pytest.fixture(scope="module")
def page(space: NoteSpace) -> NotePage:
    return NotePage(space, top_k=4)


def found(column: Any) -> list[int]:
    return [related.position for related in column.related]


def test_each_column_is_the_order_of_its_own_embeddings(space: NoteSpace, shared_tiny_model: NoteLLM2Model):
    """Against embeddings made one by one; the columns differ, so that none stands for another."""
    view = space.related_to(2, top_k=5)
    assert [column.title for column in view.columns] == list(TITLES.values())
    for modality, column in zip(MODALITIES, view.columns, strict=True):
        reduced = with_modality(space.notes, modality)
        similarity = {}
        for position, note in enumerate(reduced):
            if position != 2 and any(note.get(name) for name in ("title", "content", "image")):
                query, other = shared_tiny_model.encode([reduced[2], note])
                similarity[position] = float(query @ other)
        expected = sorted(similarity, key=lambda position: -similarity[position])[:5]
        assert found(column) == expected
        values = [related.similarity for related in column.related]
        np.testing.assert_allclose(values, [similarity[position] for position in expected], atol=1e-5)
    assert len({tuple(found(column)) for column in view.columns}) == 3


def test_a_note_is_no_answer_where_it_has_nothing(space: NoteSpace):
    """The notes without picture are not found by picture, nor the blank one by anything."""
    for position in range(len(space.notes)):
        both, text, image = space.related_to(position, top_k=100).columns
        assert 11 not in found(both) + found(text) + found(image)
        assert not {8, 9} & set(found(image)) and 10 not in found(text)
        assert position not in found(both)
    text_only, image_only = space.related_to(8, 3), space.related_to(10, 3)
    assert [bool(column.related) for column in text_only.columns] == [True, True, False]
    assert text_only.columns[2].reason == "This note has no picture." and text_only.picture == "this note has none"
    assert [bool(column.related) for column in image_only.columns] == [True, False, True]
    assert image_only.columns[1].reason == "This note has no text." and image_only.text == ""
    assert not any(column.related for column in space.related_to(11, 3).columns)


@pytest.mark.parametrize(("position", "alone", "lacks"), [(8, "text", "picture"), (10, "image", "text")])
def test_what_a_note_lacks_is_said(position: int, alone: Any, lacks: str, space: NoteSpace, page: NotePage):
    """Two columns of such a note ask with one embedding, and find others, as the others have both."""
    np.testing.assert_allclose(space.embeds["both"][position], space.embeds[alone][position], atol=1e-5)
    columns = dict(zip(MODALITIES, space.related_to(position, 12).columns, strict=True))
    assert columns["both"].related[0].similarity != pytest.approx(columns[alone].related[0].similarity, abs=1e-4)
    html = page.related(position)
    assert f"This note has no {lacks}, so that two columns ask with the same embedding" in html
    assert ("<meter" in html) == (lacks == "text")
    assert ("none: the embedding is of the text alone" in html) == (lacks == "picture")
    for other in (2, 11):  # it has both; it has neither
        assert "so that two columns ask" not in page.related(other)


def test_a_new_picture_is_shown_before_it_is_encoded(page: NotePage, tmp_path: Path):
    random_picture(1).save(tmp_path / "good.png")
    (tmp_path / "notes.txt").write_text("no picture")
    assert page.preview(str(tmp_path / "good.png")).count('<img class="picture" src="data:image/jpeg;base64,') == 1
    refused = page.preview(str(tmp_path / "notes.txt"))
    assert "The picture notes.txt cannot be read: choose another file" in refused and str(tmp_path) not in refused
    assert page.preview(None) == ""


def test_a_new_note_lands_where_the_same_note_already_is(space: NoteSpace):
    note = {name: value for name, value in space.notes[4].items() if name != "note_id"}
    view, known = space.place(note, 4), space.related_to(4, 3)
    assert view.is_new and not known.is_new
    for new, old in zip(view.columns, known.columns, strict=True):
        assert found(new) == [4, *found(old)]
        assert new.related[0].similarity == pytest.approx(1.0, abs=1e-5)
    other = space.place({**note, "image": random_picture(99)}, 4)
    assert found(other.columns[1]) == found(view.columns[1])  # the text is the same
    # Another picture moves it by more than rounding does.
    assert other.columns[2].related[0].similarity < view.columns[2].related[0].similarity - 2e-5


def test_the_fusion_weight_is_that_of_both(space: NoteSpace, compose: Callable[..., NoteLLM2Model]):
    weights = fusion_weights(space.model, [space.notes[0], space.notes[5]])
    shown = [space.related_to(position, 1).fusion_weight for position in (0, 5)]
    np.testing.assert_allclose(shown, weights, atol=1e-6)
    assert abs(weights[0] - weights[1]) > 1e-6
    assert space.related_to(8, 1).fusion_weight == 0.0  # no picture
    without = compose(late_fusion=None)
    notes = space.notes[:3]
    view = NoteSpace(without, notes, encode_notes(without, notes)).related_to(0, 1)
    assert view.fusion_weight is None
    assert "no late fusion" in NotePage(NoteSpace(without, notes, encode_notes(without, notes))).related(0)


def test_the_text_is_shown_as_the_model_reads_it(shared_tiny_model: NoteLLM2Model):
    notes = make_notes()
    assert text_as_read(shared_tiny_model, notes[0]) == "oak shelf · oak shelf 0"
    assert text_as_read(shared_tiny_model, notes[8]) == f"{HOSTILE} · <b>, x · ${{1+1}} {{{{value}}}}"
    title, content = text_as_read(shared_tiny_model, notes[9]).split(" · ")
    prompt = shared_tiny_model.processor.encode_note(notes[9]).input_ids
    read = shared_tiny_model.processor.tokenizer.decode(prompt)
    assert title.endswith("…") and content.endswith("…")
    assert f"'title': '{title[:-1]}" in read and f"'content': '{content[:-1]}" in read
    assert f"'content': '{content[:-1]} b" not in read
    assert text_as_read(shared_tiny_model, notes[10]) == ""


def test_text_of_notes_is_text_in_the_page(page: NotePage):
    for html in (page.grid(), page.related(8), page.place(None, HOSTILE, HOSTILE, HOSTILE)):
        assert "<script" not in html and "&lt;script&gt;" in html and "<IMG_EMB>" not in html


def test_the_grid_has_pictures_with_words_and_cards_without(page: NotePage):
    html = page.grid()
    assert html.count("<img") == 9 and html.count('<img class="picture" src="data:image/jpeg;base64,') == 9
    assert len(re.findall(r'<img[^>]* alt="Picture of “[^"]+”"', html)) == 9
    assert html.count('class="picture none"') == 3 and "a note without text" not in html  # its id is its name
    assert re.findall(r'data-note="(\d+)"', html) == [str(position) for position in range(12)]
    assert "12 notes." in html and "data-page" not in html


def test_the_grid_turns_pages_and_finds_words(space: NoteSpace):
    notes = [{"note_id": f"{i:03d}", "title": "vase" if i % 2 else "lamp", "image": None} for i in range(2 * PAGE_SIZE)]
    embeds = {"text": np.ones((len(notes), 16), dtype=np.float32) / 4}
    page = NotePage(NoteSpace(space.model, notes, embeds))
    last = page.grid("", 1)
    assert f'data-note="{2 * PAGE_SIZE - 1}"' in last and 'data-note="0"' not in last
    assert re.search(r'data-page="2" disabled', last) and not re.search(r'data-page="0" disabled', last)
    assert page.grid("", 99) == last and page.grid("", -3) == page.grid("", 0) != last
    assert find_notes(notes, " VASE 01 ") == [1, 11, 13, 15, 17, 19]
    assert f"{PAGE_SIZE} notes." in page.grid("lamp") and "No note has these words" in page.grid("sofa")
    # All are alike: the order is fixed all the same.
    assert found(page.space.related_to(0, 5).columns[0]) == found(page.space.related_to(0, 9).columns[0])[:5]


def test_related_notes_are_shown_with_similarity_and_weight(page: NotePage, space: NoteSpace):
    html, view = page.related(2), space.related_to(2, 4)
    shown = re.findall(r"similarity </span>(-?\d\.\d{3})", html)
    assert shown == [f"{related.similarity:.3f}" for column in view.columns for related in column.related]
    assert re.findall(r'data-note="(\d+)"', html) == [str(p) for column in view.columns for p in found(column)]
    assert (
        f"<strong>{view.fusion_weight:.3f}</strong> for the picture’s own vector" in html
        and "blue hat · blue hat 2" in html
    )
    assert all(f"<h3>{title}</h3>" in html for title in TITLES.values()) and "--columns: 3" in html
    assert "Where the new note lands" in page.place(None, "red shoes", "", "")
    assert "Where the new note lands" not in html


def test_what_cannot_be_shown_is_said(page: NotePage, tmp_path: Path):
    broken = tmp_path / "holiday.jpg"
    broken.write_bytes(b"no picture")
    buffer = io.BytesIO()
    random_picture(1, size=(200, 200)).save(buffer, "JPEG")
    (tmp_path / "half.jpg").write_bytes(buffer.getvalue()[:-400])
    for html, words in (
        (page.place(str(broken), "Oak", "", ""), "The picture holiday.jpg cannot be read"),
        (page.place(str(tmp_path / "half.jpg"), "Oak", "", ""), "The picture half.jpg cannot be read"),
        (page.place(None, " ", "", "\n"), "The note is empty"),
        (page.related(12), "note=12 is not among the 12 notes"),
        (page.related(-1), "note=-1 is not among"),
    ):
        assert words in html and 'role="alert"' in html and "Traceback" not in html and str(tmp_path) not in html
    with pytest.raises(NoteError, match="empty"):
        new_note(None, "", "", "")
    assert 'role="alert"' not in page.place(None, "Oak", "", "")


def test_columns_are_those_that_model_and_notes_have(space: NoteSpace, compose: Callable[..., NoteLLM2Model]):
    text_only = compose(tower=None)
    notes = [note for note in space.notes if note["note_id"] not in ("image", "nothing")]
    assert list(encode_notes(text_only, notes)) == ["text"]
    view = NoteSpace(text_only, notes, encode_notes(text_only, notes)).related_to(0, 2)
    assert [column.title for column in view.columns] == ["Text alone"] and view.picture.startswith("not used")
    with pytest.raises(NoteError, match="nothing that these notes are compared by"):
        NoteSpace(text_only, notes, encode_notes(text_only, notes)).place({"image": random_picture(0)}, 2)
    assert list(encode_notes(space.model, [note for note in notes if note["image"] is None])) == ["text"]
    assert list(encode_notes(space.model, [{"image": random_picture(0)}, {"image": random_picture(1)}])) == ["image"]


def test_known_embeddings_stand_for_both(
    tiny_checkpoint: Path, compose: Callable[..., NoteLLM2Model], world_folder: Path, tmp_path: Path
):
    model, table = load_model(str(tiny_checkpoint)), load_notes(world_folder / "notes.jsonl").select(range(12))
    table.to_parquet(tmp_path / "notes.parquet")
    encode_corpus(
        tiny_checkpoint, NoteTable(tmp_path / "notes.parquet", world_folder), tmp_path / "embeddings", shard_size=5
    )
    notes, ids = list(table), list(table["note_id"])
    both = embeddings_of(tmp_path / "embeddings", model, ids[::-1])[::-1]
    expected = encode_notes(model, notes)
    np.testing.assert_allclose(both, expected["both"], atol=1e-5)
    assert np.abs(both - expected["text"]).max() > 1e-2
    known = encode_notes(model, notes, both=both)
    assert known["both"] is both and list(known) == list(expected)
    np.testing.assert_allclose(known["image"], expected["image"], atol=1e-5)
    some = embeddings_of(tmp_path / "embeddings", model, ["new", ids[3]])
    assert not some[0].any() and some[1].any()
    with pytest.raises(ValueError, match="has none of the 1 notes"):
        embeddings_of(tmp_path / "embeddings", model, ["new"])
    other = load_model(str(save(compose(moved=False), tmp_path / "other")))
    with pytest.raises(ValueError, match="encode the notes with this model"):
        embeddings_of(tmp_path / "embeddings", other, ids)
    with pytest.raises(ValueError, match=r"embeds\['both'\] has shape \(12, 5\), expected \(12, 16\)"):
        NoteSpace(model, notes, {"both": both[:, :5]})


def test_embeddings_of_another_dtype_are_of_the_same_model(
    tiny_checkpoint: Path, world_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """What `hub.encode --dtype bfloat16` wrote is shown, and the log says that it is coarser."""
    model, table = load_model(str(tiny_checkpoint)), load_notes(world_folder / "notes.jsonl").select(range(6))
    table.to_parquet(tmp_path / "notes.parquet")
    encode_corpus(
        tiny_checkpoint, NoteTable(tmp_path / "notes.parquet", world_folder), tmp_path / "embeddings", dtype="bfloat16"
    )
    both, expected = embeddings_of(tmp_path / "embeddings", model, table["note_id"]), model.encode(list(table))
    assert 1e-4 < np.abs(both - expected).max() < 0.1
    assert "was computed in bfloat16, and a new note is in float32" in caplog.text


def test_nobody_sees_the_places_of_this_machine(
    tiny_checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):
    """Visitors hear of a picture that has gone by its note's name; the log has the rest, and no bar a click."""
    places = [tmp_path / "first.png", tmp_path / "second.png"]
    for place in places:
        random_picture(len(place.name)).save(place)
    notes = [{"note_id": place.stem, "title": f"vase {place.stem}", "image": str(place)} for place in places]
    model = load_model(str(tiny_checkpoint))
    page = NotePage(NoteSpace(model, notes, encode_notes(model, notes)))
    capfd.readouterr()
    assert 'role="alert"' not in page.related(1) and capfd.readouterr().err == ""
    places[0].unlink()
    html = page.related(0)
    assert 'role="alert"' in html and "The picture of “vase first” cannot be read any more" in html
    assert str(tmp_path) not in html and "first.png" not in html and str(places[0]) in caplog.text
    assert 'role="alert"' not in page.related(1)  # what was read once is shown still


def test_embeddings_that_are_not_of_the_notes_as_they_are_are_named(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """A note whose picture could not be read, one that has failed, and a table that was edited since."""
    rows = [{"note_id": f"n{i}", "title": f"vase {i}", "image": str(tmp_path / f"{i}.png")} for i in range(4)]
    for i, row in enumerate(rows):
        random_picture(i).save(row["image"])
    rows[3]["title"] = ""
    Dataset.from_list(rows).to_parquet(tmp_path / "notes.parquet")
    for i in (1, 3):
        (tmp_path / f"{i}.png").rename(tmp_path / f"away-{i}.png")
    embeddings = tmp_path / "embeddings"
    table = NoteTable(tmp_path / "notes.parquet")
    encode_corpus(tiny_checkpoint, table, embeddings, bad_images="text-only", max_failures=1)
    for i in (1, 3):
        (tmp_path / f"away-{i}.png").rename(tmp_path / f"{i}.png")

    def said(notes: str) -> str:
        caplog.clear()
        options = ["--notes", str(tmp_path / notes), "--embeddings", str(embeddings)]
        parser = argparse.ArgumentParser()
        parser.add_argument("model")
        add_arguments(parser)
        make_space(parser.parse_args([str(tiny_checkpoint), *options]), "a model")
        return caplog.text

    text = said("notes.parquet")
    assert "1 of 4 notes have an embedding of their text alone, as their picture could not be read" in text
    assert re.search(r"of their text alone.*: n1\. hub\.encode --retry-failures", text)
    assert re.search(r"1 of 4 notes have no embedding, in .*: n3\. hub", text)
    assert "whose content was not that of" not in text
    rows[0]["title"] = "another vase"
    Dataset.from_list(rows).to_parquet(tmp_path / "edited.parquet")
    assert re.search(
        r"notes\.parquet, whose content was not that of notes=.*edited\.parquet now", said("edited.parquet")
    )
    encode_corpus(tiny_checkpoint, table, embeddings, retry_failures=True)
    assert "have" not in said("notes.parquet")


@pytest.mark.parametrize("is_folder", [True, False])
def test_the_page_names_the_model_and_not_its_folder(
    is_folder: bool, tiny_checkpoint: Path, world_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of a folder the last part of its path; of the Hub's the id, which stands for the same model here."""
    shown: list[str] = []

    class ShownError(Exception):
        pass

    def launch(blocks: Any, host: str, port: int) -> str:
        (heading,) = [it for it in blocks.blocks.values() if "lede" in str(getattr(it, "value", ""))]
        shown.append(str(heading.value))
        raise ShownError

    monkeypatch.setattr(hub.app, "launch_page", launch)
    monkeypatch.setattr(hub.app, "load_model", lambda _: load_model(str(tiny_checkpoint)))
    name = str(tiny_checkpoint) if is_folder else "some-org/notes"
    with pytest.raises(ShownError):
        main([name, "--notes", str(world_folder / "notes.jsonl"), "--limit", "2", "--title", "Vases & co"])
    expected = tiny_checkpoint.name if is_folder else name
    assert f"{expected}: the first 2 of 96 notes of notes.jsonl" in shown[0] and "Vases &amp; co" in shown[0]
    assert str(tiny_checkpoint.parent) not in shown[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL", "--notes", "absent.csv"], "absent.csv"),
        (["MODEL", "--notes", "NOTES", "--port", "99999"], "--port=99999 of --host=127.0.0.1 cannot be had"),
        (["MODEL", "--notes", "NOTES", "--limit", "0"], "--limit=0 must be at least 1"),
        (["MODEL", "--notes", "NOTES", "--embeddings", "FOLDER"], "no manifest.json"),
        (["FOLDER", "--notes", "NOTES"], "config.json"),
        (["./nosuch", "--notes", "NOTES"], "model='./nosuch': no such folder"),
    ],
)
def test_command_ends_with_a_message_not_a_traceback(
    options: list[str],
    message: str,
    tiny_checkpoint: Path,
    world_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    places = {"MODEL": tiny_checkpoint, "NOTES": world_folder / "notes.jsonl", "FOLDER": tmp_path}
    with pytest.raises(SystemExit) as stopped:
        main([str(places.get(option, option)) for option in options])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("case", ["port", "embeddings"])
def test_what_can_be_refused_at_once_is(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Before the model is loaded and notes are encoded, which may take minutes."""
    loaded: list[str] = []
    monkeypatch.setattr(hub.app, "load_model", lambda name: loaded.append(name) or load_model(name))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = {"port": ["--port", str(port)], "embeddings": ["--embeddings", str(tmp_path / "absent")]}[case]
        with pytest.raises(SystemExit) as stopped:
            main([str(tmp_path / "model"), "--notes", str(tmp_path / "notes.csv"), *options])
    messages = {
        "port": f"--port={port} of --host=127.0.0.1 cannot be had ([Errno 98] Address already in use",
        "embeddings": f"{tmp_path / 'absent'} has no manifest.json",
    }
    assert stopped.value.code == 2 and messages[case] in capsys.readouterr().err and not loaded


@pytest.fixture
def address(page: NotePage) -> Iterator[str]:
    """The page, served by this process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    blocks = build_page(page, "Related notes", "twelve notes of a test")
    yield launch_page(blocks, port=port)
    blocks.close()


@pytest.mark.slow  # it starts a browser, which has to be installed: apt-get install chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_by_keyboard_and_offline(width: int, address: str, tmp_path: Path):
    from playwright.sync_api import expect, sync_playwright

    (tmp_path / "broken.txt").write_bytes(b"no picture")
    random_picture(3).save(tmp_path / "good.png")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 844})
        tab.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        asked, faults = [], []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda fault: faults.append(str(fault)))
        tab.goto(address)
        expect(tab.locator("#notes button.note")).to_have_count(12)
        is_whole = "images => images.every(image => image.complete && image.naturalWidth > 0 && image.alt)"
        assert tab.locator("#notes img").evaluate_all(is_whole)
        expect(tab.locator("#notes button.note").nth(8)).to_contain_text("${1+1} {{value}}")  # nothing runs

        # By keyboard alone: tab to the third note, enter, and what is found has the focus.
        tab.locator("input, textarea").first.focus()
        for _ in range(3):
            tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.dataset.note") == "2"
        tab.keyboard.press("Enter")
        heading = tab.locator("#related h2")
        expect(heading).to_have_text("Related to “blue hat”")
        expect(heading).to_be_focused()
        columns = tab.locator("#related section.column")
        if width == 390:  # one at a time, with all of the width
            for title in TITLES.values():
                tab.get_by_role("radio", name=title).check()
                (shown,) = [it for it in columns.all() if it.is_visible()]
                assert shown.get_attribute("aria-label") == f"Related by {title.lower()}"
                assert shown.bounding_box()["width"] > 300
        else:
            boxes = [it.bounding_box() for it in columns.all()]
            assert len({round(box["y"]) for box in boxes}) == 1 and boxes[0]["x"] < boxes[1]["x"] < boxes[2]["x"]
            assert boxes[2]["x"] + boxes[2]["width"] <= width and boxes[0]["width"] > 150
        assert heading.bounding_box()["y"] < 844  # on the screen
        assert tab.locator("#working").text_content() == ""
        lefts = [
            tab.locator(part).first.bounding_box()["x"]
            for part in ("h1", ".lede", "#notes .count", "#notes li", ".tabs")
        ]
        assert len({round(left) for left in lefts}) == 1  # one edge
        assert tab.evaluate("document.documentElement.scrollWidth") <= width  # nothing hangs over the edge
        assert tab.locator("#related img").evaluate_all(is_whole)
        tab.screenshot(path=tmp_path / "related.png", full_page=True)
        tab.get_by_role("button", name="Back to the notes").press("Enter")
        assert tab.evaluate("document.activeElement.dataset.note") == "2"

        # From one answer to its own, and a sign of work meanwhile.
        tab.evaluate("""() => {
            window.said = [];
            const sign = document.querySelector('#working');
            new MutationObserver(() => window.said.push(sign.textContent)).observe(sign, {childList: true});
        }""")
        other = columns.locator("button.note").locator("visible=true").first
        name = other.locator(".title").text_content()
        other.press("Enter")
        expect(heading).to_have_text(f"Related to “{name}”")
        expect(tab.locator("#working")).to_be_empty()
        assert tab.evaluate("window.said") == ["Working …", ""]

        # A new note: nothing, a file that is no picture, a good one, shown before it is encoded.
        is_wide = tab.locator(".gradio-container").bounding_box()["width"]
        tab.get_by_role("tab", name="A new note").click()
        assert not tab.locator("#related").is_visible()
        show = tab.get_by_role("button", name="Show where it lands")
        placed = tab.locator("#placed")
        show.click()
        expect(placed.get_by_role("alert")).to_contain_text("The note is empty")
        tab.get_by_label("Title").fill("garden tools")
        show.click()
        expect(placed.locator("h2")).to_have_text("Where the new note lands")
        tab.locator("input[type=file]").set_input_files(tmp_path / "broken.txt")
        expect(tab.locator("#preview").get_by_role("alert")).to_contain_text("The picture broken.txt cannot be read")
        expect(placed.locator("h2")).to_have_count(0)
        show.click()
        expect(placed.get_by_role("alert")).to_contain_text("The picture broken.txt cannot be read")
        tab.get_by_label("Remove this file").or_(tab.get_by_label("Clear")).first.click()
        expect(tab.locator("#preview img, #preview .message")).to_have_count(0)
        tab.locator("input[type=file]").set_input_files(tmp_path / "good.png")
        expect(tab.locator("#preview img")).to_be_visible()
        show.click()
        expect(placed.locator("h2")).to_be_focused()
        found_by_picture = placed.locator("section.column").nth(2).locator("button.note").first
        assert found_by_picture.get_attribute("data-note") == "3"
        assert tab.locator(".gradio-container").bounding_box()["width"] == is_wide
        tab.screenshot(path=tmp_path / "new.png", full_page=True)
        tab.get_by_role("button", name="Back to the new note").press("Enter")
        expect(tab.get_by_label("Title")).to_be_focused()
        # What is found opens among the notes.
        placed.locator("button.note").locator("visible=true").first.press("Enter")
        expect(heading).to_be_focused()
        assert not placed.is_visible() and "common." not in tab.locator("body").text_content()
        browser.close()
    with Image.open(tmp_path / "related.png") as picture:
        assert picture.width == width
    assert not faults and all(url.startswith((address, "data:", "blob:")) for url in asked), (faults, asked)
