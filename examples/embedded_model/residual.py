"""Read the residual stream of the embedded model, and tell which token is in which sentence."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from chat import render
from corpus import Document, Sentence, Turn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model in float32 (its bfloat16 weights widened, not changed) and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@dataclass
class Batch:
    """Some documents: ids [B, T], mask [B, T], offsets [B, T, 2] in the rendered text."""

    documents: list[Document]
    ids: torch.Tensor
    mask: torch.Tensor
    offsets: torch.Tensor


def batches(documents: list[Document], tokenizer: PreTrainedTokenizerFast, size: int = 64) -> Iterator[Batch]:
    """Tokenize `documents` in groups of similar length, padded on the right."""
    ordered = sorted(documents, key=lambda document: len(render(document)))
    for start in tqdm(range(0, len(ordered), size), desc="documents", unit="batch"):
        group = ordered[start : start + size]
        encoded = tokenizer(
            [render(document) for document in group],
            add_special_tokens=False,
            padding=True,
            padding_side="right",
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        yield Batch(group, encoded["input_ids"], encoded["attention_mask"].bool(), encoded["offset_mapping"])


@torch.no_grad()
def layer_output(model: LlamaForCausalLM, batch: Batch, layer: int) -> torch.Tensor:
    """The residual stream after block `layer` (from 0), [B, T, d]."""
    kept: list[torch.Tensor] = []
    hook = model.model.layers[layer].register_forward_hook(lambda _m, _i, out: kept.append(out))
    try:
        model.model(input_ids=batch.ids, attention_mask=batch.mask)
    finally:
        hook.remove()
    return kept[0]


def collect(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[Document], layer: int
) -> torch.Tensor:
    """The residual stream at every token of `documents`, [N, d]."""
    return torch.cat([layer_output(model, b, layer)[b.mask] for b in batches(documents, tokenizer)])


def sentence_spans(document: Document) -> Iterator[tuple[Turn, Sentence, int, int]]:
    """Each sentence with its turn and the characters [start, end) it takes in the rendered document."""
    text, position = render(document), 0
    for turn in document:
        for sentence in turn.sentences:
            start = text.index(sentence.text, position)
            position = start + len(sentence.text)
            yield turn, sentence, start, position
