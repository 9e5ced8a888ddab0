"""What a batch of connected neighbourhoods teaches per encoded note, beside a batch of pairs drawn at random.

    python -m benchmarks.graph_batches configs/rooms.yaml [--encodings 4000 8000 16000] [--neighborhoods 2 4 8]

What comes after the LLM is trained on the untrained backbones' states, which are computed once: so a step costs
nothing, and many runs with several seeds can be compared. A note counts as encoded whenever it stands in a batch. Each
run has a schedule of its own that ends with its encodings, and is measured on the test notes, without any choice among
runs.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import set_seed

from evaluation.metrics import retrieval_metrics
from evaluation.report import collect_facts
from hub.compose import compose
from modeling_notellm2 import NoteLLM2Model
from pairs.split import load_split
from pairs.tables import related_indices
from train.arguments import parse_arguments
from train.batches import BatchKind, BatchOptions, BatchPlan, BatchPlanner
from train.data import NoteReader, PairDataset
from train.features import VisionFeatureStore
from train.losses import ContrastiveTargets, joint_loss
from train.run import prepare_data
from train.states import NoteStateTable


class Study:
    """A recipe's data, and the states of its model's backbones, untrained."""

    def __init__(self, config: str, options: list[str], splits: str | None) -> None:
        composition, data, training = parse_arguments([config, *options])
        set_seed(0)
        self.rate, self.alpha = training.head_learning_rate or training.learning_rate, training.visual_loss_weight
        with tempfile.TemporaryDirectory(prefix="notellm2-graph-batches-") as folder:
            if splits is None:
                prepare_data(data, Path(folder))
            train, test = (load_split(splits or f"{folder}/data", name) for name in ("train", "test"))
            model = compose(composition)
            assert isinstance(model, NoteLLM2Model)
            self.model = model
            self.dataset = PairDataset(*train)
            self.states = {
                name: self._states(split.notes, folder) for name, split in (("train", train), ("test", test))
            }
            self.model.fit_standardizers(self.states["train"].select(torch.arange(len(train.notes))))
            self.related = related_indices(list(test.notes["note_id"]), test.pairs)
        self.start = copy.deepcopy(self.model.state_dict())

    def _states(self, notes: Any, folder: str) -> NoteStateTable:
        table = None
        if self.model.config.has_vision:
            table = VisionFeatureStore(f"{folder}/store", self.model).table(notes)
        reader = NoteReader(notes, self.model.processor, table)
        return NoteStateTable(self.model, reader, torch.arange(len(notes)))

    def run(self, options: BatchOptions, encodings: int) -> tuple[float, float]:
        """Train anew until so many notes are encoded; Recall@10 on the test notes and pairs learned a note."""
        model = self.model
        model.load_state_dict(self.start)
        parts = ("head.", "late_fusion.", "logit_scale")
        parameters = [p for name, p in model.named_parameters() if name.startswith(parts)]
        optimizer = torch.optim.AdamW(parameters, lr=self.rate)
        seen = pairs = 0
        for plan in _plans(BatchPlanner(self.dataset.pairs, self.dataset.related, options)):
            for group in optimizer.param_groups:
                group["lr"] = self.rate * (1 + np.cos(np.pi * seen / encodings)) / 2
            states = self.states["train"].select(torch.from_numpy(plan.notes))
            output = model.embed_states(states)
            assert output.note_embeds is not None and output.logit_scale is not None
            targets = ContrastiveTargets.of_plan(plan.positives, self.dataset.related.among(plan.notes), plan.notes)
            loss, _parts = joint_loss(
                output.note_embeds, output.visual_embeds, output.logit_scale, states.has_image, targets, self.alpha
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(plan.notes)
            pairs += len(plan.positives) // 2
            if seen >= encodings:
                break
        with torch.no_grad():
            embeds = model.embed_states(self.states["test"].select(torch.arange(len(self.related)))).note_embeds
        assert embeds is not None
        return retrieval_metrics(embeds.numpy(), self.related, (10,))["recall@10"], pairs / seen


def _plans(planner: BatchPlanner) -> Iterator[BatchPlan]:
    epoch = 0
    while True:
        planner.set_epoch(epoch)
        yield from planner.plans()
        epoch += 1


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.graph_batches",
        description="Recall@10 after the same number of encoded notes: pairs drawn at random beside graph batches. "
        "Further options are those of train/run.py.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("config", help="recipe, such as configs/rooms.yaml")
    parser.add_argument("--encodings", type=int, nargs="+", default=[4000, 8000, 16000], help="notes encoded in a run")
    parser.add_argument("--neighborhoods", type=int, nargs="+", default=[2, 4, 8, 16], help="sizes to try")
    parser.add_argument("--pairs", type=int, default=64, help="pairs of a batch; graph: half as many as notes")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each")
    parser.add_argument("--splits", help="folder of python -m pairs.split (default: the recipe's own splits)")
    args, options = parser.parse_known_args(argv)
    study = Study(args.config, options, args.splits)
    kinds: list[tuple[BatchKind, int]] = [("pairs", 0), *(("graph", size) for size in args.neighborhoods)]
    heads = ["Batches", "Pairs a note", *(f"{count:,} encoded" for count in args.encodings)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    with tqdm(total=len(kinds) * len(args.encodings) * args.seeds, desc="runs", unit="run") as progress:
        for kind, size in kinds:
            cells, density = [], 0.0
            for encodings in args.encodings:
                found = []
                for seed in range(args.seeds):
                    batch = BatchOptions(kind=kind, pairs=args.pairs, neighborhood=max(size, 2), seed=seed)
                    recall, density = study.run(batch, encodings)
                    found.append(recall)
                    progress.update()
                cells.append(f"{np.mean(found):.4f} ± {np.std(found, ddof=1) if len(found) > 1 else 0:.4f}")
            name = kind if kind == "pairs" else f"graph, neighbourhoods of {size}"
            lines.append("| " + " | ".join([name, f"{density:.2f}", *cells]) + " |")
    facts = collect_facts(config=args.config, options=options, seeds=args.seeds, queries=len(study.related))
    sys.stdout.write("\n".join([*lines, "", *(f"- {name}: {value}" for name, value in facts.items())]) + "\n")


if __name__ == "__main__":
    main()
