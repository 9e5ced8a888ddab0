"""A corpus is encoded once, note by note, whatever interrupts it and however many processes share it."""

import builtins
import errno
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.multiprocessing import ProcessExitedException
from transformers import AutoModel

import hub.encode
import pairs.note_table
from evaluation import checkpoints
from hub.embeddings import Manifest, shard_file, whole_shards
from hub.encode import LONGEST_WAIT, encode_corpus, main
from modeling_notellm2 import NoteError, NoteLLM2Model
from modeling_notellm2.modeling_notellm2 import WINDOW_BATCHES
from pairs.disk import alone_in
from pairs.files import to_arrow
from pairs.note_table import NoteTable
from pairs.tables import ANYWHERE, load_notes, write_table
from tests.backbones import random_picture, save
from tests.train import tiny

SETTINGS: dict[str, Any] = {"batch_size": 2, "shard_size": 7, "max_failures": 0.5}
ROOT = ["--image-root", ANYWHERE]
BAD = {5: "no file", 20: "neither text nor image", 33: "cannot be read"}  # position ─► what is wrong there


@pytest.fixture(scope="module")
def corpus(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 notes of the small world, three of which are spoilt, as a Parquet file of several row groups."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "damaged.png").write_bytes(b"no picture")
    rows = to_arrow(load_notes(world_folder / "notes.jsonl")).slice(0, 40).to_pylist()
    rows[5]["image"] = str(folder / "missing.png")
    rows[20] |= {"title": "", "topics": [], "content": None, "image": None}
    rows[33]["image"] = str(folder / "damaged.png")
    rows[2]["image"] = None
    pq.write_table(pa.Table.from_pylist(rows), folder / "notes.parquet", row_group_size=11)
    return folder / "notes.parquet"


def encode(checkpoint: Path, corpus: Path, output: Path, **settings: Any) -> Any:
    return encode_corpus(checkpoint, NoteTable(corpus, ANYWHERE), output, **SETTINGS | settings)


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run in one process."""
    folder = tmp_path_factory.mktemp("undisturbed") / "embeddings"
    summary = encode(tiny_checkpoint, corpus, folder)
    assert (summary.encoded, summary.failed, summary.notes_of_this_run) == (37, 3, 40)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a finished folder but the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_same_corpus(found: Path, expected: Path) -> None:
    """The same files of the same notes, and the same vectors up to the rounding of another process's kernels."""
    files, wanted = contents(found), contents(expected)
    assert files.keys() == wanted.keys()
    for name in wanted:
        if not name.startswith("embeddings"):
            assert files[name] == wanted[name], name
            continue
        table, other = (pq.read_table(folder / name) for folder in (found, expected))
        assert table.schema == other.schema and table["note_id"] == other["note_id"]
        vectors, others = (np.stack(of["embedding"].to_numpy()) for of in (table, other))
        np.testing.assert_allclose(vectors, others, atol=1e-6)
        assert np.abs(vectors - np.roll(others, 1, axis=0)).max(axis=1).min() > 1e-3  # control: of other notes


def read_kind(folder: Path, kind: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in sorted((folder / kind).iterdir())])


def test_every_note_is_encoded_or_listed(tiny_checkpoint: Path, corpus: Path, undisturbed: Path):
    notes = load_notes(corpus, ANYWHERE)
    good = [row for row in range(40) if row not in BAD]
    found = read_kind(undisturbed, "embeddings")
    assert found.schema.field("embedding").type == pa.list_(pa.float32(), 16)
    assert found["note_id"].to_pylist() == [notes[row]["note_id"] for row in good]
    assert [len(pq.read_table(shard_file(undisturbed, "embeddings", shard))) for shard in range(6)] == [
        6,
        7,
        6,
        7,
        6,
        5,
    ]
    embeds = np.array(found["embedding"].to_pylist(), dtype=np.float32)
    expected = AutoModel.from_pretrained(tiny_checkpoint).encode([notes[row] for row in good])
    np.testing.assert_allclose(embeds, expected, atol=1e-5)
    assert np.abs(embeds - np.roll(expected, 1, axis=0)).max(axis=1).min() > 1e-3  # control: of other notes
    failures = read_kind(undisturbed, "failures").to_pylist()
    assert [failure["row"] for failure in failures] == [row + 1 for row in BAD]
    assert [failure["note_id"] for failure in failures] == [notes[row]["note_id"] for row in BAD]
    for failure, reason in zip(failures, BAD.values(), strict=True):
        assert reason in failure["error"]
        assert not re.search(r"notes\[", failure["error"])  # no second numbering beside the row


def test_a_finished_folder_is_left_as_it_is(tiny_checkpoint: Path, corpus: Path, undisturbed: Path):
    before = contents(undisturbed)
    summary = encode(tiny_checkpoint, corpus, undisturbed, batch_size=5)
    assert (summary.encoded, summary.failed, summary.notes_of_this_run) == (37, 3, 0)
    assert contents(undisturbed) == before


def encode_until_killed(checkpoint: Path, corpus: Path, output: Path, notes_read: int | None) -> None:
    """kill −9 when so many notes have been read, or (None) between the third file's being written and renamed."""
    if notes_read is None:
        replace, calls = os.replace, iter(range(100))

        def kill_at_third_shard(source: Any, target: Any) -> None:
            if "shard-" in str(target) and next(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = kill_at_third_shard
    else:
        threading.Thread(target=_kill_after, args=(output / ".progress", notes_read), daemon=True).start()
    encode(checkpoint, corpus, output)


def _kill_after(progress: Path, notes_read: int) -> None:
    while not progress.exists() or np.fromfile(progress, np.int64).sum() < notes_read:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("notes_read", [None, random.Random(3).randint(8, 36)])
def test_killed_at_any_moment(
    notes_read: int | None, tiny_checkpoint: Path, corpus: Path, tmp_path: Path, undisturbed: Path
):
    """The rest is encoded, nothing twice: the files are those of a run that was not killed."""
    output = tmp_path / "embeddings"
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        tiny.run_processes(1, encode_until_killed, tiny_checkpoint, corpus, output, notes_read)
    manifest = Manifest.read(output)
    done = whole_shards(output, manifest)
    assert len(done) < manifest.num_shards
    unfinished = list(output.glob("*/.shard-*"))
    assert (len(done), len(unfinished)) == (1, 1) if notes_read is None else len(done) <= notes_read / 7
    kept = {shard: shard_file(output, "embeddings", shard).stat().st_mtime_ns for shard in done}
    summary = encode(tiny_checkpoint, corpus, output)
    assert (summary.encoded, summary.failed) == (37, 3)
    assert summary.notes_of_this_run == 40 - done.encoded - done.failed
    assert {shard: shard_file(output, "embeddings", shard).stat().st_mtime_ns for shard in done} == kept
    assert_same_corpus(output, undisturbed)


def encode_in_process(checkpoint: Path, corpus: Path, output: Path, retry_failures: bool = False) -> None:
    if os.environ["RANK"] == "1":  # the main process has to wait for the other one
        write = hub.encode.write_shard

        def write_late(*arguments: Any) -> None:
            time.sleep(1)
            write(*arguments)

        hub.encode.write_shard = write_late
    summary = encode(checkpoint, corpus, output, retry_failures=retry_failures)
    backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    assert backend.options._timeout == LONGEST_WAIT  # for what the main process finds out first
    rank = os.environ["RANK"]
    (output.parent / f"{output.name}-{rank}").write_text(str(summary and (summary.encoded, summary.failed)))
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tiny_checkpoint: Path, corpus: Path, tmp_path: Path, undisturbed: Path):
    output = tmp_path / "embeddings"
    tiny.run_processes(2, encode_in_process, tiny_checkpoint, corpus, output)
    assert_same_corpus(output, undisturbed)
    # The main process has waited for the other one and counts all.
    assert [(tmp_path / f"embeddings-{rank}").read_text() for rank in range(2)] == ["(37, 3)", "None"]


def test_two_processes_try_failures_again(tiny_checkpoint: Path, fragile: Path, tmp_path: Path):
    """Of two shards that list a note, the second one is the other process's, and the main process waits until that one
    is another than it was."""
    output, again = tmp_path / "embeddings", tmp_path / "pictures/16.png"
    again.rename(tmp_path / "away-too.png")
    assert encode(tiny_checkpoint, fragile, output).failed == 2
    (tmp_path / "away-too.png").rename(again)
    tiny.run_processes(2, encode_in_process, tiny_checkpoint, fragile, output, True)
    encode(tiny_checkpoint, fragile, tmp_path / "anew")
    assert_same_corpus(output, tmp_path / "anew")
    assert [(tmp_path / f"embeddings-{rank}").read_text() for rank in range(2)] == ["(19, 1)", "None"]


def test_a_damaged_shard_is_encoded_again(tiny_checkpoint: Path, corpus: Path, tmp_path: Path):
    output = tmp_path / "embeddings"
    encode(tiny_checkpoint, corpus, output)
    whole = shutil.copytree(output, tmp_path / "whole")
    file = shard_file(output, "embeddings", 2)
    file.write_bytes(file.read_bytes()[:-50])
    shard_file(output, "embeddings", 4).unlink()
    assert encode(tiny_checkpoint, corpus, output).notes_of_this_run == 14
    assert_same_corpus(output, whole)


@pytest.mark.parametrize(
    ("settings", "complaint"), [({"shard_size": 8}, "shard_size=7"), ({"truncate_dim": 4}, "dim=16")]
)
def test_other_settings_are_refused(
    settings: dict[str, Any], complaint: str, tiny_checkpoint: Path, corpus: Path, undisturbed: Path
):
    before = contents(undisturbed)
    with pytest.raises(ValueError, match=rf"{complaint}.*give another output"):
        encode(tiny_checkpoint, corpus, undisturbed, **settings)
    assert contents(undisturbed) == before


def test_other_notes_and_models_are_refused(tiny_checkpoint: Path, corpus: Path, tmp_path: Path, undisturbed: Path):
    moved = shutil.copytree(tiny_checkpoint, tmp_path / "moved")
    assert encode(moved, corpus, undisturbed).notes_of_this_run == 0  # wherever the model is
    write_table(load_notes(corpus, ANYWHERE).select(range(30)), tmp_path / "notes.parquet")
    with pytest.raises(ValueError, match="notes_fingerprint"):
        encode(moved, tmp_path / "notes.parquet", undisturbed)
    model = AutoModel.from_pretrained(moved)
    with torch.no_grad():
        model.head.weight[0, 0] += 1e-4
    with pytest.raises(ValueError, match="model_fingerprint"):
        encode(save(model, tmp_path / "changed"), corpus, undisturbed)


def test_a_folder_of_something_else_is_refused(tiny_checkpoint: Path, corpus: Path, tmp_path: Path):
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"'letters\.txt' and no manifest"):
        encode(tiny_checkpoint, corpus, tmp_path)


def test_a_second_run_is_refused(tiny_checkpoint: Path, corpus: Path, tmp_path: Path):
    with alone_in(tmp_path), pytest.raises(ValueError, match="another run is at work"):
        encode(tiny_checkpoint, corpus, tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_too_many_failures_end_a_run(tiny_checkpoint: Path, corpus: Path, tmp_path: Path, undisturbed: Path):
    """A shard of 7 notes, one of which is bad, is within a share of 1/7, and beyond less."""
    output = tmp_path / "embeddings"
    with pytest.raises(NoteError, match=r"row 6, note_id='.*image: no file.*: at least 1 of 7 .*--max-failures"):
        encode(tiny_checkpoint, corpus, output, max_failures=0.14)
    assert not list(output.glob("*/shard-*"))
    assert encode(tiny_checkpoint, corpus, output, max_failures=1 / 7).failed == 3
    assert_same_corpus(output, undisturbed)
    with pytest.raises(
        ValueError, match=r"failures/shard-000000\.parquet of an earlier run.* list 1 of 7 .*--retry-failures"
    ):
        encode(tiny_checkpoint, corpus, output, max_failures=0)


@pytest.fixture
def fragile(corpus: Path, tmp_path: Path) -> Path:
    """20 notes, whose pictures are in a folder beside the table; one of them is missing."""
    rows = to_arrow(load_notes(corpus, ANYWHERE)).slice(0, 20).to_pylist()
    (tmp_path / "pictures").mkdir()
    for number, row in enumerate(rows):
        row["image"] = f"pictures/{number}.png"
        random_picture(number).save(tmp_path / row["image"])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "notes.parquet")
    (tmp_path / "pictures/9.png").rename(tmp_path / "away.png")
    return tmp_path / "notes.parquet"


def test_failures_are_tried_again(tiny_checkpoint: Path, fragile: Path, tmp_path: Path):
    output, pictures = tmp_path / "embeddings", tmp_path / "pictures"
    assert encode(tiny_checkpoint, fragile, output).failed == 1
    before = contents(output)
    pictures.rename(tmp_path / "moved")
    assert encode(tiny_checkpoint, fragile, output).notes_of_this_run == 0  # no note is tried again unasked
    with pytest.raises(NoteError, match=r"row 10, .*max_failures=0"):
        encode(tiny_checkpoint, fragile, output, retry_failures=True, max_failures=0)
    assert contents(output).items() >= before.items()  # what is there stays until there is better

    (tmp_path / "moved").rename(pictures)
    (tmp_path / "away.png").rename(pictures / "9.png")
    summary = encode(tiny_checkpoint, fragile, output, retry_failures=True)
    assert (summary.encoded, summary.failed, summary.notes_of_this_run) == (20, 0, 1)
    encode(tiny_checkpoint, fragile, tmp_path / "anew")
    assert_same_corpus(output, tmp_path / "anew")
    changed = {name for name, content in contents(output).items() if content != before.get(name)}
    assert changed == {"embeddings/shard-000001.parquet", "failures/shard-000001.parquet"}


def test_a_note_whose_picture_is_bad_is_encoded_by_its_text(tiny_checkpoint: Path, corpus: Path, tmp_path: Path):
    """It stays so until it is tried again, as a note that has failed."""
    output, notes = tmp_path / "embeddings", load_notes(corpus, ANYWHERE)
    summary = encode(tiny_checkpoint, corpus, output, bad_images="text-only")
    assert (summary.encoded, summary.failed, summary.text_only) == (39, 1, 2)
    assert "39 notes encoded, 2 of them by their text alone (see text-only/), 1 failed" in summary.sentence(output)
    assert read_kind(output, "failures")["row"].to_pylist() == [21]  # nothing is left of it
    listed = read_kind(output, "text-only").to_pylist()
    assert [(one["note_id"], one["row"]) for one in listed] == [(notes[row]["note_id"], row + 1) for row in (5, 33)]
    assert "no file" in listed[0]["error"] and "cannot be read" in listed[1]["error"]
    found = read_kind(output, "embeddings")
    vectors = dict(zip(found["note_id"].to_pylist(), found["embedding"].to_pylist(), strict=True))
    texts = [notes[row] | {"image": None} for row in (5, 33)]
    expected = AutoModel.from_pretrained(tiny_checkpoint).encode(texts)
    embeds = np.array([vectors[note["note_id"]] for note in texts])
    np.testing.assert_allclose(embeds, expected, atol=1e-5)
    assert np.abs(embeds - expected[::-1]).max() > 1e-3  # control

    again = encode(tiny_checkpoint, corpus, output)
    assert (again.notes_of_this_run, again.text_only) == (0, 2)
    with pytest.raises(ValueError, match=r"shard-000000\.parquet of an earlier run.* in text-only/, list 1 of 7 "):
        encode(tiny_checkpoint, corpus, output, max_failures=0)
    again = encode(tiny_checkpoint, corpus, output, bad_images="text-only", retry_failures=True)
    assert (again.encoded, again.failed, again.notes_of_this_run, again.text_only) == (39, 1, 3, 2)
    again = encode(tiny_checkpoint, corpus, output, retry_failures=True)
    assert (again.encoded, again.failed, again.notes_of_this_run, again.text_only) == (37, 3, 3, 0)
    with pytest.raises(NoteError, match=r"row 6, .*max_failures=0"):  # all pictures may be away
        encode(tiny_checkpoint, corpus, tmp_path / "strict", bad_images="text-only", max_failures=0)


def test_the_picture_of_a_note_that_is_encoded_by_its_text_is_tried_again(
    tiny_checkpoint: Path, fragile: Path, tmp_path: Path
):
    output = tmp_path / "embeddings"
    assert encode(tiny_checkpoint, fragile, output, bad_images="text-only").text_only == 1
    (tmp_path / "away.png").rename(tmp_path / "pictures/9.png")
    assert encode(tiny_checkpoint, fragile, output, retry_failures=True).notes_of_this_run == 1
    encode(tiny_checkpoint, fragile, tmp_path / "anew")
    (output / "text-only").rmdir()  # empty
    assert_same_corpus(output, tmp_path / "anew")


@pytest.mark.parametrize(
    ("place", "number"),
    [("stat", errno.ESTALE), ("open", errno.EMFILE), ("stat", errno.EREMOTEIO), ("open", errno.ECONNRESET)],
)
def test_trouble_of_the_machine_is_no_failure_of_a_note(
    place: str, number: int, tiny_checkpoint: Path, fragile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output, stat, picture = tmp_path / "embeddings", os.stat, str(tmp_path / "pictures/16.png")

    def troubled(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path) == picture:
            raise OSError(number, os.strerror(number), path)
        return (stat if place == "stat" else open_file)(path, *arguments, **options)

    open_file = open
    with (
        monkeypatch.context() as patched,
        pytest.raises(NoteError, match=rf"row 17, .*Errno {number}\b.*run the command"),
    ):
        patched.setattr(*(os, "stat") if place == "stat" else (builtins, "open"), troubled)
        encode(tiny_checkpoint, fragile, output, max_failures=1)
    assert sorted(whole_shards(output, Manifest.read(output))) == [0, 1]
    assert encode(tiny_checkpoint, fragile, output).failed == 1


def test_pictures_that_go_while_a_run_is_at_them(tiny_checkpoint: Path, tmp_path: Path):
    """Notes that differ in their pictures alone are different notes, also where the files are no longer there when
    repeated notes are looked for."""
    files = [tmp_path / f"{number}.png" for number in range(6)]
    for number, file in enumerate(files):
        random_picture(number).save(file)
    pq.write_table(
        pa.table({"note_id": list("abcdef"), "image": [str(file) for file in files]}), tmp_path / "notes.parquet"
    )
    processor = AutoModel.from_pretrained(tiny_checkpoint).processor
    loaded = [processor.load_image(processor.encode_note({"image": str(file)})) for file in files]
    for file in files:
        file.unlink()
    assert len({note.content_digest() for note in loaded}) == 6


def test_an_embedding_that_is_not_finite_fails(tiny_model: NoteLLM2Model, corpus: Path, tmp_path: Path):
    with torch.no_grad():
        tiny_model.head.weight[0, 0] = torch.nan
    checkpoint, output = save(tiny_model, tmp_path / "model"), tmp_path / "embeddings"
    summary = encode(checkpoint, corpus, output, max_failures=1, bad_images="text-only")
    assert (summary.encoded, summary.failed, summary.text_only) == (0, 40, 0)
    failures = read_kind(tmp_path / "embeddings", "failures")
    assert failures["row"].to_pylist() == list(range(1, 41))
    assert sum("not finite, computed in float32" in error for error in failures["error"].to_pylist()) == 39


def test_rows_are_not_all_held(tiny_checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is read but not encoded yet is bounded by the batch size, and a table in memory by its own number."""
    monkeypatch.setattr(pairs.note_table, "ROWS_AT_ONCE", 4)
    model = AutoModel.from_pretrained(tiny_checkpoint)
    monkeypatch.setattr(hub.encode, "load_model", lambda *_arguments: model)
    encoded, ahead, sizes = [0], [], []
    model.register_forward_hook(lambda _model, _inputs, output: encoded.append(encoded[-1] + len(output.note_embeds)))

    class Watched(NoteTable):
        def rows(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
            for number, note in enumerate(super().rows(start, stop), start=start + 1):
                ahead.append(number - encoded[-1])
                yield note

        def _tables(self, *arguments: Any) -> Iterator[pa.Table]:
            for table in super()._tables(*arguments):
                sizes.append(len(table))
                yield table

    encode_corpus(tiny_checkpoint, Watched(corpus, ANYWHERE), tmp_path, batch_size=1, shard_size=40)
    assert max(sizes) == 4 and len(ahead) == 40
    assert 1 < max(ahead) <= 2 * WINDOW_BATCHES + len(BAD) + 2 < 40


def test_command(tiny_checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [str(tiny_checkpoint), str(corpus), *ROOT, "--output", str(tmp_path), "--shard-size", "30"]
    main([*arguments, "--truncate-dim", "8", "--batch-size", "4"])
    said = capsys.readouterr().out
    assert "37 notes encoded, 3 failed" in said and "--retry-failures" in said
    embeds = np.array(read_kind(tmp_path, "embeddings")["embedding"].to_pylist())
    assert embeds.shape == (37, 8)
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-6)
    with pytest.raises(SystemExit, match="dim=8"):
        main(arguments)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"shard_size": 0}, "shard_size"),
        ({"truncate_dim": 99}, "truncate_dim"),
        ({"workers": 0}, "workers"),
        ({"max_failures": 1.5}, "max_failures"),
        ({"dtype": "int8"}, "dtype"),
        ({"bad_images": "drop"}, "bad_images"),
    ],
)
def test_settings_out_of_range(
    settings: dict[str, Any], complaint: str, tiny_checkpoint: Path, corpus: Path, tmp_path: Path
):
    with pytest.raises(ValueError, match=f"{complaint}="):
        encode_corpus(tiny_checkpoint, NoteTable(corpus, ANYWHERE), tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()


def test_an_interrupted_command_goes_on(
    tiny_checkpoint: Path,
    corpus: Path,
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """One line, and the status of a command that was interrupted."""
    arguments = [str(tiny_checkpoint), str(corpus), *ROOT, "--output", str(tmp_path), "--batch-size", "2"]
    arguments += ["--shard-size", "7", "--max-failures", "0.5"]
    add, calls = hub.encode._Progress.add, iter(range(100))

    def interrupt(progress: Any) -> None:
        add(progress)
        if next(calls) == 25:
            os.kill(os.getpid(), signal.SIGINT)

    # Processes that a shell starts in the background ignore the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
            patched.setattr(hub.encode._Progress, "add", interrupt)
            main(arguments)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert ended.value.code == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "Interrupted: what is encoded is kept; give the same command to go on."
    assert sorted(whole_shards(tmp_path, Manifest.read(tmp_path))) == [0, 1, 2]
    main(arguments)
    assert_same_corpus(tmp_path, undisturbed)


def test_what_needs_no_model_is_refused_before_it_is_loaded(
    tiny_checkpoint: Path, corpus: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hub.encode, "load_model", lambda *_: pytest.fail("the model is loaded"))
    for ids, complaint in ((["a", "b", "a"], "'note_id' 'a' twice"), (["a", ""], "'note_id' is empty")):
        pq.write_table(pa.table({"note_id": ids, "title": ids}), tmp_path / "notes.parquet")
        with pytest.raises(ValueError, match=complaint):
            encode(tiny_checkpoint, tmp_path / "notes.parquet", tmp_path / "embeddings")
        assert not (tmp_path / "embeddings").exists()
    shutil.copytree(undisturbed, tmp_path / "taken")
    with alone_in(tmp_path / "taken"), pytest.raises(ValueError, match="another run is at work there"):
        encode(tiny_checkpoint, corpus, tmp_path / "taken")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"holds 'mine.txt' and no manifest.json"):
        encode(tiny_checkpoint, corpus, tmp_path / "foreign")


@pytest.mark.parametrize("name", ["mistyped", "./mistyped", "/no/such/model"])
def test_a_mistyped_model_is_said_at_once(name: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoints.AutoConfig, "from_pretrained", lambda *_: pytest.fail("the Hub is asked"))
    with pytest.raises(SystemExit, match=f"^model='{name}': no such folder here, and no such Hub id could be read.$"):
        main([name, str(corpus), *ROOT, "--output", str(tmp_path)])


def test_a_model_that_cannot_be_loaded_is_named(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(OSError, match=rf"model='{tmp_path}': no model is saved there"):
        encode(tmp_path, corpus, tmp_path / "embeddings")


@pytest.mark.parametrize("output", ["taken", "taken/embeddings"])
def test_a_file_is_no_folder(output: str, corpus: Path, tmp_path: Path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ValueError, match=r"output=.*taken is a file; give a new or empty folder"):
        encode(Path("never/looked-at"), corpus, tmp_path / output)


def test_pictures_that_nobody_waits_for_are_not_decoded():
    taken: list[int] = []

    def slowly(item: int) -> int:
        time.sleep(0.01)
        taken.append(item)
        return item

    results = hub.encode._ahead(slowly, range(60), 1, 40)
    assert next(results) == 0
    results.close()
    assert len(taken) < 20


def test_threads_keep_the_order() -> None:
    def slowly(item: int) -> int:
        time.sleep(random.Random(item).random() / 500)
        return -item

    taken: list[int] = []
    ahead: Callable[..., Iterator[int]] = hub.encode._ahead
    results = ahead(slowly, (taken.append(item) or item for item in range(60)), 3, 5)
    assert next(results) == 0 and len(taken) == 6
    assert list(results) == [-item for item in range(1, 60)]
