"""Fine-tune a published model with LoRA on your own related notes, and compare it with what it was.

python examples/finetune_published.py MODEL --notes notes.csv --views views.csv --output DIR
"""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a published model.")
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--notes", required=True, help="table of notes: note_id, title, topics, content, image")
    parser.add_argument("--views", required=True, help="log of views: user_id, note_id, timestamp")
    parser.add_argument("--output", type=Path, required=True, help="folder of the fine-tuned model, and of the splits")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32, help="pairs")
    arguments = parser.parse_args(argv)

    # Imported here: they take seconds, which --help and a wrong option need not wait for.
    from evaluation.checkpoints import load_model
    from evaluation.report import text_table
    from evaluation.run import evaluate_model
    from pairs.query import PairOptions
    from pairs.split import SplitOptions, load_split, make_splits
    from pairs.tables import load_notes
    from train.arguments import NoteLLM2TrainingArguments
    from train.data import PairDataset
    from train.run import related_of
    from train.trainer import NoteLLM2Trainer

    splits = arguments.output / "splits"
    try:
        make_splits(load_notes(arguments.notes), arguments.views, PairOptions(score="cosine"), SplitOptions(), splits)
        training, test = load_split(splits, "train"), load_split(splits, "test")
    except (OSError, ValueError) as error:  # a table that cannot be read: the message names it and the remedy
        sys.exit(f"error: {error}")
    try:
        model = load_model(arguments.model)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {str(error).partition(chr(10))[0]}")
    notes, related = list(test.notes), related_of(test)
    rows = evaluate_model(model, notes, related, name="published")
    trainer = NoteLLM2Trainer(
        model=model,
        args=NoteLLM2TrainingArguments(
            output_dir=str(arguments.output),
            max_steps=arguments.max_steps,
            per_device_train_batch_size=arguments.batch_size,
            mini_batch_size=arguments.batch_size,  # half of its notes at a time in memory, the same gradients
            llm_tuning="lora",  # adapters that the model has already go on training
            learning_rate=1e-4,
            image_dropout=0.1,  # a note may come without a picture: now and then the text has to do
            report_to="none",
        ),
        train_dataset=PairDataset(*training),
    )
    trainer.train()
    model.merge_lora()  # the saved folder then needs no peft
    trainer.save_model()
    rows += evaluate_model(model, notes, related, name="fine-tuned")
    sys.stdout.write(text_table(rows))


if __name__ == "__main__":
    main()
