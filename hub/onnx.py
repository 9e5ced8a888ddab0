"""Export a checkpoint to ONNX, to serve it on processors through onnxruntime.

    python -m hub.onnx CHECKPOINT DIR [--quantize] [--splits SPLITS]

DIR holds `model.onnx` (LLM, late fusion, head), `vision.onnx` (tower and connector; not of a text-only model), the
processor, the configuration, the code of [`OnnxNoteEncoder`], which needs no other file, and a README.md with its use.
The graphs take any number of notes of any length, compute in float32, and are compared with the model before DIR
appears. Adapters are merged.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers.dynamic_module_utils import custom_object_save

from evaluation.checkpoints import load_model
from evaluation.metrics import retrieval_metrics
from evaluation.run import load_notes_and_related
from hub.private import PrivateError, refuse_private
from hub.verify import sample_notes
from modeling_notellm2 import NoteLLM2Model
from modeling_notellm2.modeling_notellm2 import NoteStates, last_token_states
from pairs.command import CommandParser, interruption_said
from pairs.disk import new_folder

try:
    import onnxscript  # noqa: F401  (torch.onnx.export needs it)
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxruntime.capi import (  # type: ignore[import-untyped]
        onnxruntime_pybind11_state as onnxruntime_errors,
    )
    from onnxruntime.quantization import quant_pre_process, quantize_dynamic  # type: ignore[import-untyped]

    from modeling_notellm2.onnx_notellm2 import MODEL_FILE, VISION_FILE, OnnxNoteEncoder
except ImportError as error:
    raise ImportError(f'the export to ONNX needs its extra ({error}): pip install "notellm2[onnx]".') from error

TOLERANCE = 1e-4
"""The largest difference allowed between a number of the model's embeddings and of the graphs', before quantisation."""

ONNXRUNTIME_REFUSALS = (
    onnxruntime_errors.Fail,
    onnxruntime_errors.InvalidGraph,
    onnxruntime_errors.NotImplemented,
    onnxruntime_errors.RuntimeException,
)
"""What onnxruntime raises for a graph that it cannot run."""

OPERATORS_TO_QUANTIZE = ["MatMul", "Gather"]
"""Linear layers and the matrix of token embeddings, which is often a quarter of a small LLM. Convolutions stay as they
are: for CNNs onnxruntime advises static quantisation, which needs notes to calibrate on."""


_README = """# Embeddings of notes, through onnxruntime

The graphs of a NoteLLM-2 model, {weights}, with the code that encodes notes by them. They need onnxruntime, torch,
transformers and Pillow (made with onnxruntime {onnxruntime} and transformers {transformers}), and no weights of torch:

```python
from transformers.dynamic_module_utils import get_class_from_dynamic_module

folder = "."  # where this file is
OnnxNoteEncoder = get_class_from_dynamic_module("onnx_notellm2.OnnxNoteEncoder", folder)  # runs code of the folder
encoder = OnnxNoteEncoder(folder)
embeddings = encoder.encode([{{"title": "Oak shelf", "topics": ["home"], "content": "…"}}, "just a text"])
```

`embeddings` is a float32 array (2, {dim}), a row a note, each of unit length. A note is a mapping with any of `title`,
`topics`, `content`{image}; a string is a note's content.
On sample notes the embeddings have a cosine of at least {cosine:.4f} to those of the model in torch.
"""


class OnnxExportError(RuntimeError):
    """The model cannot be exported, or its graphs compute something else."""


class VisionGraph(nn.Module):
    """What an image gives to the other graph: `forward` of the model up to the visual tokens.

    Args:
        model: has a vision tower.
    """

    def __init__(self, model: NoteLLM2Model) -> None:
        super().__init__()
        self.model = model
        uses = {"visual_tokens": model.connector, "pooled_embeds": model.late_fusion}
        self.output_names = [name for name, part in uses.items() if part is not None]

    def forward(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None, spatial_shapes: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """N images, as `NoteLLM2Model.get_image_features` takes them ─► `visual_tokens` (N, num_visual_tokens, d_llm)
        with a connector, `pooled_embeds` (N, d_v) with late fusion."""
        features = self.model.get_image_features(pixel_values, pixel_attention_mask, spatial_shapes)
        outputs = {"pooled_embeds": features.pooled_embeds}
        if self.model.connector is not None:
            outputs["visual_tokens"] = self.model.connector(features)
        return tuple(outputs[name] for name in self.output_names)


class NoteGraph(nn.Module):
    """`forward` of the model after the visual tokens, in a form whose shapes depend on no value.

    The model works on the N images of B notes, and takes these out of the B rows; here each of the B rows holds an
    image's numbers, and a row without image does not use them.

    Args:
        model: any.
    """

    def __init__(self, model: NoteLLM2Model) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        visual_tokens: Tensor | None = None,
        pooled_embeds: Tensor | None = None,
        has_image: Tensor | None = None,
    ) -> Tensor:
        """Embed B notes: (B, D) float32, L2-normalised.

        Args:
            input_ids, attention_mask: (B, T) int64.
            visual_tokens: (B, num_visual_tokens, d_llm), of a model with a connector.
            pooled_embeds, has_image: (B, d_v) and (B,) bool, of a model with late fusion.
        """
        model = self.model
        # Positions count real tokens only, so that left padding does not shift them.
        states = model.language_model(
            inputs_embeds=self._embed(input_ids, visual_tokens),
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        is_end = input_ids == model.config.image_embedding_token_id
        rows = torch.arange(states.shape[0])
        before_end = (is_end.int().argmax(-1) - 1).clamp(min=0)
        note_states, visual_states, has_visual, pooled_embeds, _ = model._standardized(
            NoteStates(
                note_states=last_token_states(states, attention_mask),
                visual_states=states[rows, before_end] if model.connector is not None else None,
                has_visual=is_end.any(-1),
                pooled_embeds=pooled_embeds,
                has_image=is_end.any(-1),
            )
        )
        if model.late_fusion is not None and pooled_embeds is not None and has_image is not None:
            gate_states = note_states
            if visual_states is not None:
                gate_states = torch.where(has_visual.unsqueeze(-1), visual_states, note_states)
            visual = model.late_fusion.project(pooled_embeds)
            fused = model.late_fusion.fuse(model.late_fusion.weight(visual, gate_states), visual, note_states)
            note_states = torch.where(has_image.unsqueeze(-1), fused, note_states)
        return model._to_embeds(note_states)

    def _embed(self, input_ids: Tensor, visual_tokens: Tensor | None) -> Tensor:
        """(B, T) ids ─► (B, T, d_llm): the k-th `<IMG>` of a row becomes its k-th visual token."""
        embed = self.model.get_input_embeddings()
        if visual_tokens is None:
            return embed(input_ids)
        is_image = input_ids == self.model.config.image_token_id
        is_end = input_ids == self.model.config.image_embedding_token_id
        embeds = embed(input_ids.masked_fill(is_image | is_end, 0))
        embeds = torch.where(is_end.unsqueeze(-1), self.model.image_embedding, embeds)
        place = (is_image.cumsum(1) - 1).clamp(0, visual_tokens.shape[1] - 1)
        visual = visual_tokens.gather(1, place.unsqueeze(-1).expand(-1, -1, visual_tokens.shape[-1]))
        return torch.where(is_image.unsqueeze(-1), visual, embeds)


@dataclass(frozen=True)
class Agreement:
    """How near the graphs' embeddings are to the model's.

    Attributes:
        difference: the largest absolute difference of two numbers.
        mean_cosine, least_cosine: over the notes, of a note's two embeddings.
        model_recall, onnx_recall: Recall@10 of related notes; None where none are known.
    """

    difference: float
    mean_cosine: float
    least_cosine: float
    model_recall: float | None = None
    onnx_recall: float | None = None


def compare(
    model: NoteLLM2Model,
    encoder: OnnxNoteEncoder,
    notes: Sequence[Mapping[str, Any]],
    related: Sequence[np.ndarray] | None = None,
) -> Agreement:
    """Encode notes both ways.

    Args:
        model: what was exported.
        encoder: the export.
        notes: N notes.
        related: for each note the positions of its related notes.
    """
    expected, found = np.asarray(model.encode(notes)), encoder.encode(notes)
    cosines = (expected * found).sum(1)
    recalls = []
    if related is not None:
        recalls = [retrieval_metrics(embeds, related, ks=(10,))["recall@10"] for embeds in (expected, found)]
    return Agreement(float(np.abs(expected - found).max()), float(cosines.mean()), float(cosines.min()), *recalls)


def load_for_export(checkpoint: str | os.PathLike) -> NoteLLM2Model:
    """A checkpoint in float32 on the processor, its adapters merged.

    Raises:
        OSError, ValueError: there is no such model: as `evaluation.checkpoints.load_model`.
        OnnxExportError: it is a fine-tuned multimodal LLM.
    """
    # Not "sdpa": exported, its mask makes rows of padding nan, which spreads to the others.
    model = load_model(checkpoint, device="cpu", attn_implementation="eager")
    if not isinstance(model, NoteLLM2Model):
        raise OnnxExportError(f"checkpoint={str(checkpoint)!r} is a {type(model).__name__}: give a NoteLLM-2 model.")
    if model.config.lora is not None:
        model.merge_lora()
    return model


def export_onnx(model: NoteLLM2Model, output: str | os.PathLike, quantize: bool = False) -> Agreement:
    """Write the folder that [`OnnxNoteEncoder`] reads. It appears when it is whole and right, or not at all.

    Args:
        model: from `load_for_export`.
        output: the folder, new or empty.
        quantize: round the weights of linear layers and token embeddings to int8 (dynamic quantisation: what they are
            multiplied with is rounded when it is known). A quarter of their size, and another embedding: measure its
            loss.

    Returns:
        How near the graphs are to the model on `hub.verify.sample_notes`, as they are written.

    Raises:
        FileExistsError: `output` holds files.
        BusyError: another run is writing it.
        DiskError: the disk is full.
        OnnxExportError: a backbone cannot be exported, or the graphs differ from the model by more than 1e-4 before
            they are quantised.
        PrivateError: a file would name a folder of a machine or hold a credential.
    """
    output = Path(output)
    with new_folder(output) as folder:
        notes = sample_notes(with_images=model.config.has_vision)
        model.config.save_pretrained(folder)
        model.processor.save_pretrained(folder)
        custom_object_save(OnnxNoteEncoder, folder)
        _write_graphs(model, notes, folder)
        try:
            agreement = compare(model, OnnxNoteEncoder(folder), notes)
        except ONNXRUNTIME_REFUSALS as error:
            raise OnnxExportError(
                f"onnxruntime cannot run the graphs of {_backbones(model)} ({_first_line(error)}): serve the "
                "checkpoint with torch, or choose another."
            ) from error
        if not agreement.difference <= TOLERANCE:  # also catches nan
            raise OnnxExportError(
                f"the graphs of {_backbones(model)} differ from the model by {agreement.difference:.1e} (allowed: "
                f"{TOLERANCE:.0e}): serve the checkpoint with torch."
            )
        if quantize:
            quantize_graphs(folder)
            agreement = compare(model, OnnxNoteEncoder(folder), notes)
        (folder / "README.md").write_text(_readme(model, quantize, agreement), encoding="utf-8")
        refuse_private(folder, [model.name_or_path or ".", output.parent, Path.cwd(), Path.home()])
    return agreement


def quantize_graphs(folder: str | os.PathLike) -> None:
    """Replace the graphs of a folder by ones whose linear layers, one scale a column, and token embeddings are int8."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for path in sorted(Path(folder).glob("*.onnx")):
            weights = path.with_name(f"{path.name}.data")
            inferred = Path(scratch) / "inferred" / path.name
            inferred.parent.mkdir(exist_ok=True)
            # What onnxruntime advises to do first, but for its optimizations: the graph is the one that was compared.
            quant_pre_process(
                path,
                inferred,
                skip_optimization=True,
                skip_symbolic_shape=True,
                save_as_external_data=weights.exists(),
            )
            quantize_dynamic(
                inferred,
                Path(scratch) / path.name,
                op_types_to_quantize=OPERATORS_TO_QUANTIZE,
                per_channel=True,
                # 7 bits: processors without VNNI (AMD before Zen 4) clip sums of two products of 8 bits, so that a note
                # encoded on one machine would not fit an index encoded on another.
                reduce_range=True,
                use_external_data_format=weights.exists(),
            )
            weights.unlink(missing_ok=True)
        shutil.rmtree(Path(scratch) / "inferred")
        for path in Path(scratch).iterdir():
            shutil.move(path, Path(folder) / path.name)


def _readme(model: NoteLLM2Model, is_quantized: bool, agreement: Agreement) -> str:
    return _README.format(
        weights="their weights rounded to int8" if is_quantized else "in float32",
        onnxruntime=version("onnxruntime"),
        transformers=version("transformers"),
        dim=model.config.embedding_dim or model.config.hidden_size,
        image=", and `image` (a path, PIL image, bytes or array)" if model.config.has_vision else "",
        cosine=agreement.least_cosine,
    )


def _write_graphs(model: NoteLLM2Model, notes: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Trace both graphs with the inputs that these notes make."""
    batch = dict(model.processor(notes))
    inputs: dict[str, Tensor] = {name: batch.pop(name) for name in ("input_ids", "attention_mask")}
    has_image = batch.pop("has_image")
    if model.vision_tower is not None:
        graph = VisionGraph(model)
        dynamic = {name: {0: Dim.DYNAMIC} for name in batch}
        _write_graph(graph, batch, dynamic, graph.output_names, folder / VISION_FILE, _tower(model))
        with torch.no_grad():
            outputs = dict(zip(graph.output_names, graph(**batch), strict=True))
        for name, values in outputs.items():
            inputs[name] = values.new_zeros(len(notes), *values.shape[1:])
            inputs[name][has_image] = values
        if model.late_fusion is not None:
            inputs["has_image"] = has_image
    dynamic = {name: {0: Dim.DYNAMIC} for name in inputs}
    dynamic["input_ids"] = dynamic["attention_mask"] = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    _write_graph(NoteGraph(model), inputs, dynamic, ["note_embeds"], folder / MODEL_FILE, _llm(model))


def _write_graph(
    graph: nn.Module,
    inputs: Mapping[str, Tensor],
    dynamic: Mapping[str, dict[int, Any]],
    output_names: Sequence[str],
    path: Path,
    backbone: str,
) -> None:
    try:
        program = torch.onnx.export(
            graph.eval(),
            kwargs=dict(inputs),
            input_names=list(inputs),
            output_names=output_names,
            dynamic_shapes=dict(dynamic),
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise OnnxExportError(
            f"{backbone} cannot be exported to ONNX ({_first_line(error.__cause__ or error)}): serve the checkpoint "
            "with torch, or choose another."
        ) from error
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # it holds the exporter's stack, with this machine's paths
    program.save(path)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _llm(model: NoteLLM2Model) -> str:
    return f"the LLM of type {model.config.text_config.model_type!r}"


def _tower(model: NoteLLM2Model) -> str:
    config = model.config.vision_config
    return f"the vision tower of type {getattr(config, 'architecture', config.model_type)!r}"


def _backbones(model: NoteLLM2Model) -> str:
    return _llm(model) if model.vision_tower is None else f"{_llm(model)} and {_tower(model)}"


@interruption_said("the folder was not written, or is not whole; give the same command to begin again.")
def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = CommandParser(
        prog="python -m hub.onnx", description="Export a checkpoint to ONNX, to serve it through onnxruntime."
    )
    parser.add_argument("checkpoint", help="the checkpoint: a folder or a Hub id")
    parser.add_argument("output", type=Path, help="folder for the export, new or empty")
    parser.add_argument(
        "--quantize",
        action="store_true",
        help="round linear layers and token embeddings to int8: smaller, and a little off (measure it with --splits)",
    )
    parser.add_argument(
        "--splits", type=Path, help="folder of pairs.split: say Recall@10 of the model and of the export on its test"
    )
    arguments = parser.parse_args(argv)
    try:
        model = load_for_export(arguments.checkpoint)
        test = None if arguments.splits is None else load_notes_and_related(arguments.splits / "test")
        agreement = export_onnx(model, arguments.output, arguments.quantize)
    except (PrivateError, OSError, ValueError) as error:
        parser.error(str(error))
    except OnnxExportError as error:
        sys.exit(f"FAILED: {error}")
    for path in sorted(arguments.output.glob("*.onnx*")):
        sys.stdout.write(f"{path}: {path.stat().st_size / 1e6:.1f} MB\n")
    sys.stdout.write(_sentence("sample notes", agreement))
    if test is not None:
        encoder = OnnxNoteEncoder(arguments.output)
        sys.stdout.write(_sentence("test notes", compare(model, encoder, test.notes, test.related)))


def _sentence(what: str, agreement: Agreement) -> str:
    recall = ""
    if agreement.model_recall is not None:
        recall = f"; Recall@10 {agreement.onnx_recall:.4f}, the model's {agreement.model_recall:.4f}"
    return (
        f"{what}: cosine to the model's embeddings {agreement.mean_cosine:.6f} on average, "
        f"{agreement.least_cosine:.6f} at least, largest difference {agreement.difference:.1e}{recall}\n"
    )


if __name__ == "__main__":
    main()
