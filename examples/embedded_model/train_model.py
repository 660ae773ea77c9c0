"""Train the embedded language model: a small Llama on the text of ``corpus.py``.

    python train_model.py --out ~/embedded-run

writes the tokenizer and the model to OUT/model. Stopped half way, the same command goes
on from the last checkpoint in OUT/checkpoints.
"""

import argparse
import shutil
from pathlib import Path

import torch
from chat import render, train_tokenizer
from corpus import Writer
from grammar import Grammar
from torch.utils.data import Dataset
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

TOKENIZER_SAMPLE = 40_000
HELD_OUT_SEED_OFFSET = 1_000_000


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Documents joined end to end and cut into rows of `length` tokens."""

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> None:
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        stream = torch.tensor([token for document in ids for token in document])
        count = len(stream) // length
        self.rows = stream[: count * length].view(count, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        return {"input_ids": row, "labels": row}


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 3.1 million parameters with tied embeddings and heads of 32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def arguments(out: Path, args: argparse.Namespace) -> TrainingArguments:
    """AdamW with a short warm-up and a cosine down to zero."""
    return TrainingArguments(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=args.batch,
        num_train_epochs=1,
        max_steps=args.max_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.05,
        adam_beta2=0.95,
        logging_steps=25,
        save_steps=500,
        save_total_limit=1,
        seed=args.seed,
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        report_to="none",
    )


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write bfloat16 weights with everything a server needs to load them, then move them to `folder`."""
    partial = folder.with_name(folder.name + ".part")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.config.use_cache = True  # the trainer had switched it off
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def main() -> None:
    """Generate the text, learn the tokenizer, train, measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path.home() / "embedded-run", help="where everything is written")
    parser.add_argument("--documents", type=int, default=80_000, help="documents to train on, each seen once")
    parser.add_argument("--vocabulary", type=int, default=2400, help="tokenizer entries, 256 of them bytes")
    parser.add_argument("--length", type=int, default=512, help="tokens per training row")
    parser.add_argument("--batch", type=int, default=4, help="rows per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak of the cosine schedule")
    parser.add_argument("--max-steps", type=int, default=-1, help="end the schedule after so many steps (-1: one pass)")
    parser.add_argument("--bf16", action="store_true", help="autocast; pays off only where the processor has it")
    parser.add_argument("--seed", type=int, default=0, help="seeds the text, the weights and the order")
    args = parser.parse_args()

    set_seed(args.seed)
    grammar = Grammar.load()
    texts = [render(document) for document in Writer(grammar, args.seed).documents(args.documents)]
    tokenizer = train_tokenizer(texts[:TOKENIZER_SAMPLE], args.vocabulary)
    rows = Rows(texts, tokenizer, args.length)
    held_out = Writer(grammar, args.seed + HELD_OUT_SEED_OFFSET).documents(1000)
    unseen = Rows([render(document) for document in held_out], tokenizer, args.length)
    print(f"{rows.rows.numel():,} tokens, vocabulary {len(tokenizer)}")

    model = new_model(tokenizer)
    trainer = Trainer(
        model=model,
        args=arguments(args.out, args),
        train_dataset=rows,
        eval_dataset=unseen,
    )
    checkpoints = args.out / "checkpoints"
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    save(model, tokenizer, args.out / "model")
    print(f"parameters {model.num_parameters():,}, held-out {trainer.evaluate()}")


if __name__ == "__main__":
    main()
