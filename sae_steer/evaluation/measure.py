"""One request measured on all texts: what a readout still finds, perplexity on plain text, distance on the rest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_steer.evaluation.readout import Floats, Pool, Readout, Seen
from sae_steer.evaluation.texts import Batch, Texts, batches
from sae_steer.inprocess import Request, Steer

_LOGIT_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class Measured:
    """Numbers of each text, from which samples of texts are summed up.

    Args:
        target: ``[S, n]`` probability of the concept on its own texts, by each of ``S`` readouts.
        target_right: ``[S, n]`` whether it is the likeliest label there.
        complement: ``[S, m]`` probability of a text's own label, on texts of the other labels.
        complement_right: ``[S, m]`` whether that is the likeliest.
        divergence: ``[m]`` sum over tokens of KL(unsteered || steered), in nats.
        divergence_tokens: ``[m]`` tokens in that sum.
        loss: ``[p]`` negative log-likelihood of plain texts, in nats.
        loss_tokens: ``[p]`` tokens in that sum.
    """

    target: Floats
    target_right: Floats
    complement: Floats
    complement_right: Floats
    divergence: Floats
    divergence_tokens: Floats
    loss: Floats
    loss_tokens: Floats

    def to_json(self) -> dict[str, Any]:
        """As plain lists, rounded to nine digits."""
        return {
            name: np.vectorize(lambda v: float(f"{v:.9g}"))(getattr(self, name)).tolist()
            for name in self.__dataclass_fields__
        }

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> "Measured":
        """Back from :meth:`to_json`."""
        return cls(**{name: np.asarray(value[name], dtype=np.float64) for name in cls.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class Bench:
    """The texts and the model that every request is measured on.

    Args:
        steer: The model, with the SAE attached.
        target: Texts of the concept.
        complement: Texts of the other labels.
        plain: Text without labels.
        concept: Number of the concept.
        words: First token of each label's word, for :class:`~sae_steer.evaluation.readout.Words`; None = not told.
        pool: What the probes see of a text.
        batch_tokens: Most tokens in a forward pass.
    """

    steer: Steer
    target: Texts
    complement: Texts
    plain: Texts
    concept: int
    words: tuple[int, ...] | None = None
    pool: Pool = "mean"
    batch_tokens: int = 4096

    @property
    def tokens(self) -> int:
        """Tokens of one measurement, for progress."""
        return sum(len(ids) for texts in (self.target, self.complement, self.plain) for ids in texts.ids)

    def see(self, texts: Texts, request: Request = None) -> Seen:
        """What the readouts are given of texts, under a request."""
        seen = _Gathering.of(texts)
        for batch in self._batches(texts):
            hidden, logits = self._forward(batch, [request] * len(batch.rows))
            seen.add(batch, hidden, logits, self)
        return seen.done()

    def measure(
        self, request: Request, readouts: Sequence[Readout], progress: Callable[[int], object] | None = None
    ) -> Measured:
        """Measures a request.

        Args:
            request: What is asked for every text; None = nothing.
            readouts: Fixed before.
            progress: Told how many tokens were done since it was last called.

        Raises:
            RequestError: The request cannot be honoured.
            RunFailed: A forward pass produced a value that is not finite, or passed a dose limit.
        """
        done = progress or (lambda _: None)
        program = self.steer.compile(request)
        target = _Gathering.of(self.target)
        for batch in self._batches(self.target):
            target.add(batch, *self._forward(batch, [program] * len(batch.rows)), self)
            done(int(batch.mask.sum()))
        rest, divergence = _Gathering.of(self.complement), np.zeros(len(self.complement))
        for batch in self._batches(self.complement, rows=2):
            divergence[list(batch.rows)] = self._against_unsteered(batch, program, rest)
            done(int(batch.mask.sum()))
        loss = np.zeros(len(self.plain))
        for batch in self._batches(self.plain):
            loss[list(batch.rows)] = _loss(self._forward(batch, [program] * len(batch.rows))[1], batch)
            done(int(batch.mask.sum()))
        own, right = _judge(readouts, target.done(), np.full(len(self.target), self.concept))
        kept, kept_right = _judge(readouts, rest.done(), np.asarray(self.complement.labels))
        return Measured(
            target=own,
            target_right=right,
            complement=kept,
            complement_right=kept_right,
            divergence=divergence,
            divergence_tokens=_lengths(self.complement),
            loss=loss,
            loss_tokens=_lengths(self.plain) - 1,
        )

    def _against_unsteered(self, batch: Batch, program: Request, into: "_Gathering") -> Floats:
        """KL(unsteered || steered) summed over each text's tokens; both in one pass, where the first is untouched."""
        count = len(batch.rows)
        twice = Batch(batch.rows * 2, batch.ids.repeat(2, 1), batch.mask.repeat(2, 1))
        hidden, logits = self._forward(twice, [None] * count + [program] * count)
        into.add(batch, hidden[count:], logits[count:], self)
        plain, steered = logits.log_softmax(dim=-1).chunk(2)
        each = (plain.exp() * (plain - steered)).sum(dim=-1) * batch.mask
        return _numpy(each.double().sum(dim=1))

    @torch.inference_mode()
    def _forward(self, batch: Batch, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
        """Final hidden states ``[B, T, D]`` and logits ``[B, T, V]`` in float32."""
        kept: list[Tensor] = []
        model = self.steer.model
        inner = model.base_model.register_forward_hook(lambda _m, _a, out: kept.append(out.last_hidden_state))
        try:
            with self.steer.rows(requests, prompt_lengths=batch.mask.sum(dim=1).tolist()):
                logits = model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
        finally:
            inner.remove()
        return kept[0].float(), logits.float()

    def _batches(self, texts: Texts, rows: int = 1) -> list[Batch]:
        model = self.steer.model
        config = model.config.get_text_config()
        vocabulary = int(config.vocab_size)
        tokens = max(1, min(self.batch_tokens, _LOGIT_BYTES // (4 * vocabulary)) // rows)
        pad = config.pad_token_id if isinstance(config.pad_token_id, int) else 0
        return list(batches(texts, tokens=tokens, pad=pad, device=model.device))


@dataclass(slots=True)
class _Gathering:
    """What was seen of texts, while batches come in another order."""

    pooled: list[NDArray[np.float64] | None]
    words: list[NDArray[np.float64] | None]

    @classmethod
    def of(cls, texts: Texts) -> "_Gathering":
        return cls([None] * len(texts), [None] * len(texts))

    def add(self, batch: Batch, hidden: Tensor, logits: Tensor, bench: Bench) -> None:
        last = batch.mask.sum(dim=1) - 1
        every = torch.arange(len(batch.rows), device=last.device)
        if bench.pool == "last":
            pooled = hidden[every, last]
        else:
            mask = batch.mask[:, :, None]
            pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        words = logits[every, last].softmax(dim=-1)[:, list(bench.words)] if bench.words is not None else None
        for at, row in enumerate(batch.rows):
            self.pooled[row] = _numpy(pooled[at])
            self.words[row] = _numpy(words[at]) if words is not None else None

    def done(self) -> Seen:
        pooled = np.stack([row for row in self.pooled if row is not None])
        words = [row for row in self.words if row is not None]
        return Seen(pooled, np.stack(words) if words else None)


def _judge(readouts: Sequence[Readout], seen: Seen, truth: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """``[S, n]`` probability of the true label, and whether it is the likeliest."""
    found = [readout.probabilities(seen) for readout in readouts]
    rows = np.arange(truth.size)
    own = np.stack([p[rows, truth] for p in found])
    right = np.stack([p.argmax(axis=1) == truth for p in found])
    return own, right.astype(np.float64)


def _loss(logits: Tensor, batch: Batch) -> Floats:
    """Negative log-likelihood of each text, given its first token."""
    scores = logits[:, :-1].log_softmax(dim=-1).gather(2, batch.ids[:, 1:, None])[:, :, 0]
    return _numpy(-(scores.double() * batch.mask[:, 1:]).sum(dim=1))


def _lengths(texts: Texts) -> Floats:
    return np.array([len(ids) for ids in texts.ids], dtype=np.float64)


def _numpy(tensor: Tensor) -> Floats:
    return tensor.detach().cpu().double().numpy()
