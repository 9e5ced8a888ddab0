"""From notes and a log of views to a model, and what it finds on notes that it has not seen.

python examples/train_on_your_notes.py --notes notes.csv --views views.csv --llm LLM --vision TOWER --output DIR

notes: note_id, title, topics, content, image (a path, relative to the table). views: user_id, note_id, timestamp.
"""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train on your own notes.")
    parser.add_argument("--notes", required=True, help="table of notes: CSV, JSON lines or Parquet")
    parser.add_argument("--views", required=True, help="log of views")
    parser.add_argument("--llm", required=True, help="any decoder LLM: a folder or a Hub id")
    parser.add_argument("--vision", required=True, help="any vision tower: a folder or a Hub id")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model, and of the splits")
    parser.add_argument("--max-steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32, help="pairs: twice as many notes, each other's negatives")
    arguments = parser.parse_args(argv)

    # Imported here: they take seconds, which --help and a wrong option need not wait for.
    from evaluation.report import text_table
    from evaluation.run import evaluate_baselines, evaluate_model
    from hub.compose import CompositionArguments, compose
    from pairs.query import PairOptions
    from pairs.split import SplitOptions, load_split, make_splits
    from pairs.tables import load_notes
    from train.arguments import NoteLLM2TrainingArguments
    from train.data import NoteDataset, PairDataset
    from train.run import related_of
    from train.trainer import NoteLLM2Trainer

    # Two notes are related if the same users view them within a week. Test notes are new: training has none of them.
    splits = arguments.output / "splits"
    try:
        make_splits(load_notes(arguments.notes), arguments.views, PairOptions(score="cosine"), SplitOptions(), splits)
        training, validation, test = (load_split(splits, name) for name in ("train", "validation", "test"))
        model = compose(
            CompositionArguments(
                llm=arguments.llm,
                vision=arguments.vision,
                qformer_layers=2,  # six of width 768, the defaults, are the paper's, for large LLMs
                qformer_hidden_size=192,
                initial_temperature=0.3,
            )
        )
    except (OSError, ValueError) as error:  # a table or a backbone that cannot be read: the message says what to do
        sys.exit(f"error: {error}")
    trainer = NoteLLM2Trainer(
        model=model,
        args=NoteLLM2TrainingArguments(
            output_dir=str(arguments.output),
            max_steps=arguments.max_steps,
            per_device_train_batch_size=arguments.batch_size,
            llm_tuning="lora",
            learning_rate=1e-4,  # of the LLM; what feeds it and what reads it are new and learn faster
            connector_learning_rate=5e-4,
            head_learning_rate=1e-3,
            eval_strategy="steps",
            eval_steps=100,
            report_to="none",
        ),
        train_dataset=PairDataset(*training),
        eval_dataset=NoteDataset(validation.notes),
        eval_related=related_of(validation),
    )
    trainer.train()
    trainer.save_model()  # a folder for AutoModel.from_pretrained, with its code

    notes, related = list(test.notes), related_of(test)
    rows = evaluate_baselines(notes, related, ["chance", "bm25"]) + evaluate_model(
        model, notes, related, name="trained"
    )
    sys.stdout.write(text_table(rows))


if __name__ == "__main__":
    main()
