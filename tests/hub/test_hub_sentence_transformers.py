"""NoteLLM-2 in sentence-transformers: the same embeddings, and every part of that library that takes a model."""

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import mine_hard_negatives
from transformers import AutoModel

from hub.export import export
from modeling_notellm2 import sentence_transformer_notellm2
from modeling_notellm2.sentence_transformer_notellm2 import NoteLLM2Module
from tests.backbones import random_picture

Notes = list[dict[str, Any]]


@pytest.fixture(scope="module")
def published(tiny_export: Path) -> SentenceTransformer:
    """Loaded from the folder's own code. Not to be changed by a test."""
    return SentenceTransformer(str(tiny_export), trust_remote_code=True, device="cpu")


@pytest.fixture
def trained(tiny_export: Path) -> SentenceTransformer:
    """Loaded from the folder's own code, to be changed."""
    return SentenceTransformer(str(tiny_export), trust_remote_code=True, device="cpu")


@pytest.fixture
def inputs(notes: Notes) -> list[Any]:
    """Mappings, a string and a picture."""
    return [*notes, "just a text", random_picture(7), {"text": "garlic and a wok", "image": random_picture(8)}]


def expected_embeds(folder: Path, inputs: list[Any], **settings: Any) -> np.ndarray:
    """What `AutoModel` makes of the inputs; "text" is sentence-transformers' word for "content"."""
    notes = [{**it, "content": it["text"]} if isinstance(it, dict) and "text" in it else it for it in inputs]
    return AutoModel.from_pretrained(folder, trust_remote_code=True).encode(notes, **settings)


def test_the_same_embeddings_as_auto_model(
    published: SentenceTransformer, tiny_export: Path, inputs: list[Any]
) -> None:
    assert type(published[0]).__module__.startswith("transformers_modules.")
    embeds = published.encode(inputs, batch_size=4)
    expected = expected_embeds(tiny_export, inputs)
    assert embeds.dtype == np.float32
    np.testing.assert_allclose(embeds, expected, atol=1e-5)
    blank = [{**it, "image": None} if isinstance(it, dict) and "title" in it else it for it in inputs]
    assert np.abs(published.encode(blank, batch_size=4)[0] - expected[0]).max() > 1e-2  # the picture counts
    for single, row in ((inputs[0], 0), ("just a text", 6), (inputs[7], 7)):
        np.testing.assert_allclose(published.encode(single), expected[row], atol=1e-5)
    assert published.get_embedding_dimension() == embeds.shape[1] and published.supports("image")


def test_without_code_of_the_folder(published: SentenceTransformer, tiny_export: Path, inputs: list[Any]) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(tiny_export))
    model = SentenceTransformer(modules=[NoteLLM2Module.load(str(tiny_export))], device="cpu")
    assert type(model[0]) is NoteLLM2Module and type(published[0]) is not NoteLLM2Module
    np.testing.assert_allclose(model.encode(inputs), published.encode(inputs), atol=1e-5)


def test_releases_that_know_texts_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.metadata.version
    found = {"sentence-transformers": "5.3.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found.get(name) or installed(name))
    spec = importlib.util.spec_from_file_location("modeling_notellm2.again", sentence_transformer_notellm2.__file__)
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match="sentence-transformers>=5.4 is required .* found sentence-transformers==5.3"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    found.clear()  # the control
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_queries_and_documents_are_alike_and_similarity_is_cosine(
    published: SentenceTransformer, inputs: list[Any]
) -> None:
    embeds = published.encode(inputs)
    np.testing.assert_array_equal(published.encode_query(inputs), embeds)
    np.testing.assert_array_equal(published.encode_document(inputs), embeds)
    assert published.similarity_fn_name == "cosine"
    np.testing.assert_allclose(published.similarity(embeds, embeds), embeds @ embeds.T, atol=1e-5)
    assert published.similarity(embeds[:1], embeds[1:]).max() < 1 - 1e-3
    with pytest.raises(ValueError, match="belongs to the model's processor"):
        published.encode(["a text"], prompt="query: ")


def test_truncated_dimensions(published: SentenceTransformer, tiny_export: Path, inputs: list[Any]) -> None:
    expected = expected_embeds(tiny_export, inputs, truncate_dim=4)
    embeds = published.encode(inputs, truncate_dim=4, normalize_embeddings=True)
    assert embeds.shape == (len(inputs), 4)
    np.testing.assert_allclose(embeds, expected, atol=1e-5)
    assert np.abs(published.encode(inputs, truncate_dim=4) - expected).max() > 1e-2  # not of unit length


def test_precisions(published: SentenceTransformer, inputs: list[Any]) -> None:
    embeds = published.encode(inputs)
    binary = published.encode(inputs, precision="ubinary")
    np.testing.assert_array_equal(np.unpackbits(binary, axis=1), embeds > 0)
    assert np.unpackbits(binary, axis=1).std(0).max() > 0
    quantised = published.encode(inputs, precision="int8")
    assert quantised.dtype == np.int8 and quantised.shape == embeds.shape
    scale = np.ptp(embeds, axis=0) / 255
    np.testing.assert_allclose((quantised.astype(float) + 128) * scale + embeds.min(0), embeds, atol=1.01 * scale.max())


@pytest.mark.slow
def test_many_processes(published: SentenceTransformer, inputs: list[Any]) -> None:
    pool = published.start_multi_process_pool(["cpu", "cpu"])
    try:
        embeds = published.encode(inputs, pool=pool, chunk_size=2)
    finally:
        published.stop_multi_process_pool(pool)
    expected = published.encode(inputs)
    np.testing.assert_allclose(embeds, expected, atol=1e-5)
    assert np.abs(embeds[::-1] - expected).max() > 1e-2  # the order counts


def test_information_retrieval_evaluator(published: SentenceTransformer, notes: Notes) -> None:
    corpus = {note["note_id"]: {**note, "title": note.get("title", "") + "!"} for note in notes}
    queries = {f"q-{note['note_id']}": note for note in notes}
    embeds = published.encode(list(queries.values())) @ published.encode(list(corpus.values())).T
    nearest = {f"q-{note['note_id']}": {list(corpus)[row.argmax()]} for note, row in zip(notes, embeds, strict=True)}
    farthest = {f"q-{note['note_id']}": {list(corpus)[row.argmin()]} for note, row in zip(notes, embeds, strict=True)}
    for relevant, accuracy in ((nearest, 1.0), (farthest, 0.0)):
        evaluator = InformationRetrievalEvaluator(
            queries, corpus, relevant, accuracy_at_k=[1], show_progress_bar=False, name="notes", write_csv=False
        )
        assert evaluator(published)["notes_cosine_accuracy@1"] == accuracy


def test_mined_negatives_of_notes_with_pictures(trained: SentenceTransformer) -> None:
    notes = {f"n{i}": {"title": f"title {i}", "image": random_picture(i)} for i in range(12)}
    pairs = Dataset.from_dict({"anchor": ["n0", "n1", "n2"], "positive": ["n3", "n4", "n5"]})
    trained[0].notes_by_id = notes
    mined = mine_hard_negatives(pairs, trained, corpus=list(notes), num_negatives=2, range_min=1, verbose=False)
    # range_min=1: the nearest note of all is the query itself.
    embeds = AutoModel.from_pretrained(trained[0].model.name_or_path).encode(list(notes.values()))
    assert len(mined) == 6
    for row in mined:
        query = list(notes).index(row["anchor"])
        order = [list(notes)[i] for i in np.argsort(-embeds @ embeds[query])]
        order.remove(row["positive"])
        assert row["negative"] in order[1:4] and row["negative"] != row["positive"]
    with pytest.raises(ValueError, match="'n99' is no id of notes_by_id"):
        trained.encode(["n99"])


def train_one_step(model: SentenceTransformer, notes: Notes, loss: torch.nn.Module, folder: Path) -> None:
    model[0].notes_by_id = {note["note_id"]: note for note in notes}
    pairs = Dataset.from_dict({"anchor": ["both", "text", "image"], "positive": ["long", "hostile", "array"]})
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=3,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=pairs, loss=loss).train()
    model[0].notes_by_id = None


def test_a_step_of_the_trainer_and_saving(
    trained: SentenceTransformer, published: SentenceTransformer, notes: Notes, tmp_path: Path
) -> None:
    tower = {name: value.clone() for name, value in trained[0].model.vision_tower.state_dict().items()}
    before = published.encode(notes)
    train_one_step(trained, notes, MultipleNegativesRankingLoss(trained), tmp_path / "run")
    after = trained.encode(notes)
    assert np.abs(after - before).max() > 1e-4
    for name, value in trained[0].model.vision_tower.state_dict().items():
        torch.testing.assert_close(value, tower[name], rtol=0, atol=0)  # frozen

    trained.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    loaded = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(loaded.encode(notes), after, atol=1e-5)
    export(tmp_path / "saved", tmp_path / "exported")  # what it saved can be published
    exported = SentenceTransformer(str(tmp_path / "exported"), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(exported.encode(notes), after, atol=1e-5)


def test_cached_gradients_are_those_of_the_whole_batch(
    tiny_export: Path, published: SentenceTransformer, notes: Notes
) -> None:
    """The library cuts a batch by rows, of which some have an image and some have none."""
    features = [published.preprocess(notes[:3]), published.preprocess(notes[3:])]
    assert len(features[0]["pixel_values"]) == 3 and not features[0]["has_image"].all()

    def gradient(loss_class: type, **settings: Any) -> torch.Tensor:
        module = NoteLLM2Module.load(str(tiny_export))
        model = SentenceTransformer(modules=[module], device="cpu").eval()
        loss = loss_class(model, **settings)([dict(feature) for feature in features], None)
        loss.backward()
        return module.model.late_fusion.projection.weight.grad

    whole = gradient(MultipleNegativesRankingLoss)
    torch.testing.assert_close(
        gradient(CachedMultipleNegativesRankingLoss, mini_batch_size=2), whole, atol=1e-5, rtol=1e-4
    )
    assert (gradient(MultipleNegativesRankingLoss, scale=1.0) - whole).abs().max() > 1e-4


def test_lengths_are_the_processors(tiny_export: Path, published: SentenceTransformer) -> None:
    """A number that was stored, and cut nothing, would be believed."""
    with pytest.raises(ValueError, match="max_seq_length=8: .*max_content_tokens"):
        published.max_seq_length = 8
    published.max_seq_length = None  # what it is
    assert published.max_seq_length is None
    settings = {"max_content_tokens": 3}
    shorter = SentenceTransformer(str(tiny_export), trust_remote_code=True, device="cpu", processor_kwargs=settings)
    text, cut = "blue hat red shoes", "blue hat red"
    assert np.abs(shorter.encode([text]) - published.encode([text])).max() > 1e-3
    np.testing.assert_allclose(shorter.encode([text]), shorter.encode([cut]), atol=1e-6)


def test_bad_inputs_are_named(published: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match="has neither text nor image"):
        published.encode([{"title": ""}])
    with pytest.raises(ValueError, match="is a int"):
        published.encode(["text", 7])
    with pytest.raises(ValueError, match="backend='onnx' is not supported"):
        NoteLLM2Module.load("anywhere", backend="onnx")
    assert isinstance(random_picture(0), Image.Image)
