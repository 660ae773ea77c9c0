"""Generate with features of the autoencoder held at a value, and judge the text."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from sae_lens import SAE
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

NEW_TOKENS = 60


@dataclass
class Hold:
    """Hold `features` (n of them) at `values` [rows or 1, n], in the reply or everywhere.

    A value that is not a number leaves its feature alone in that row.
    In the reply means: from the last token of the prompt on, whose output is the first
    token of the reply.
    """

    features: list[int]
    values: torch.Tensor
    everywhere: bool = False


@dataclass
class Text:
    """A reply, how surprised the model alone is by it, and how much it repeats itself."""

    text: str
    perplexity: float
    repetition: float


class Steered:
    """The model and its autoencoder; generates greedily, with or without features held."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sae: SAE, layer: int) -> None:
        self.model, self.tokenizer, self.sae, self.layer = model, tokenizer, sae, layer

    @contextmanager
    def _held(self, hold: Hold) -> Iterator[None]:
        """Add (value - activation) * decoder row to the residual stream, [rows, T, d]."""
        rows = self.sae.W_dec[hold.features]

        def edit(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
            current = self.sae.encode(output)[..., hold.features]
            change = (hold.values[:, None, :] - current).nan_to_num(0) @ rows
            if not hold.everywhere:
                change[:, :-1] = 0
            return output + change

        handle = self.model.model.layers[self.layer].register_forward_hook(edit)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def replies(self, prompts: list[str], hold: Hold | None = None) -> list[Text]:
        """The greedy reply to each user prompt."""
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        inputs = self.tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
            tokenizer_kwargs={"padding_side": "left"},
        )
        if hold is None:
            ids = self._generate(inputs)
        else:
            with self._held(hold):
                ids = self._generate(inputs)
        return self._judge(inputs, ids)

    def _generate(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        ids: torch.Tensor = self.model.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        return ids

    def _judge(self, inputs: dict[str, torch.Tensor], ids: torch.Tensor) -> list[Text]:
        start = inputs["input_ids"].shape[1]
        written = ids[:, start:]
        counted = written != self.tokenizer.pad_token_id
        mask = torch.cat([inputs["attention_mask"], counted.long()], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self.model(ids, attention_mask=mask, position_ids=positions).logits[:, start - 1 : -1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), written, reduction="none")
        perplexity = ((losses * counted).sum(1) / counted.sum(1)).exp()
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [Text(t.strip(), p, repetition(t)) for t, p in zip(texts, perplexity.tolist(), strict=True)]


def words(text: str) -> list[str]:
    """The lower-case words of `text`."""
    return re.findall(r"[a-z]+", text.lower())


def repetition(text: str) -> float:
    """The share of three-word sequences that were already said."""
    said = words(text)
    triples = list(zip(said, said[1:], said[2:], strict=False))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


def share(texts: list[Text], vocabulary: set[str]) -> float:
    """The share of words in `texts` that belong to `vocabulary`."""
    said = [word for text in texts for word in words(text.text)]
    return sum(word in vocabulary for word in said) / max(1, len(said))
