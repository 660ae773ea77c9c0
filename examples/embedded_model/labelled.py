"""Compare the features with the labels of held-out text."""

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from corpus import Document
from residual import batches, layer_output, sentence_spans
from sae_lens import SAE
from sklearn.metrics import precision_recall_curve, roc_auc_score
from steering import words
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

EXCLUSIVE = 0.97
LEAST_COUNT = 20


@dataclass
class Evidence:
    """What the features did on held-out sentences (S of them, F features, V tokens).

    `means` [S, F] is a sentence's mean activation, `mass` [F, V] the activation summed
    per token, `maximum` [F] the largest activation anywhere.
    """

    means: np.ndarray
    topics: list[str | None]
    tones: list[str | None]
    mass: torch.Tensor
    maximum: torch.Tensor

    def labels(self, concept: str) -> tuple[np.ndarray, np.ndarray]:
        """Which sentences count for `concept`, and which of those are of it.

        A sentence without a topic says nothing about topics and is left out there. A tone
        holds for the whole turn.
        """
        if concept in self.tones:
            return np.ones(len(self.tones), bool), np.array([tone == concept for tone in self.tones])
        counted = np.array([topic is not None for topic in self.topics])
        return counted, np.array([topic == concept for topic in self.topics])[counted]

    def auroc(self, concept: str) -> np.ndarray:
        """How well each feature's mean activation tells sentences of `concept`, [F]."""
        counted, truth = self.labels(concept)
        scores = self.means[counted]
        result = np.full(scores.shape[1], 0.5)
        for feature in np.flatnonzero(scores.any(0)):
            result[feature] = roc_auc_score(truth, scores[:, feature])
        return result

    def candidates(self, concept: str, auroc: np.ndarray, count: int) -> list[int]:
        """Features worth trying: the `count` best by AUROC, and by how much more they fire."""
        counted, truth = self.labels(concept)
        scores = self.means[counted]
        gain = scores[truth].mean(0) - scores[~truth].mean(0)
        ranked = [*np.argsort(-auroc)[:count].tolist(), *np.argsort(-gain)[:count].tolist()]
        return list(dict.fromkeys(ranked))

    def precision_recall(self, concept: str, feature: int) -> tuple[float, float]:
        """Precision and recall at the threshold with the best F1."""
        counted, truth = self.labels(concept)
        precision, recall, _ = precision_recall_curve(truth, self.means[counted, feature])
        best = int(np.argmax(2 * precision * recall / np.maximum(precision + recall, 1e-9)))
        return float(precision[best]), float(recall[best])


@torch.no_grad()
def gather(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sae: SAE,
    layer: int,
    documents: list[Document],
) -> Evidence:
    """Run the features over `documents`, sentence by sentence."""
    means, topics, tones = [], [], []
    mass = torch.zeros(sae.cfg.d_sae, len(tokenizer))
    maximum = torch.zeros(sae.cfg.d_sae)
    for batch in batches(documents, tokenizer):
        features = sae.encode(layer_output(model, batch, layer))
        flat = features[batch.mask]
        mass.T.index_add_(0, batch.ids[batch.mask], flat)
        maximum = torch.maximum(maximum, flat.amax(0))
        for row, document in enumerate(batch.documents):
            starts, ends = batch.offsets[row].unbind(-1)
            for turn, sentence, first, last in sentence_spans(document):
                inside = (ends > first) & (starts < last) & batch.mask[row]
                means.append(features[row, inside].mean(0))
                topics.append(sentence.topic)
                tones.append(turn.tone)
    return Evidence(torch.stack(means).numpy(), topics, tones, mass, maximum)


def concept_words(documents: list[Document]) -> dict[str, set[str]]:
    """For each topic and tone the words that hardly occur outside its sentences."""
    seen: Counter[str] = Counter()
    within: dict[str, Counter[str]] = defaultdict(Counter)
    for document in documents:
        for turn in document:
            for sentence in turn.sentences:
                said = words(sentence.text)
                seen.update(said)
                for concept in (sentence.topic, sentence.tone):
                    if concept:
                        within[concept].update(said)
    return {
        concept: {w for w, n in counts.items() if n >= LEAST_COUNT and n / seen[w] >= EXCLUSIVE}
        for concept, counts in sorted(within.items())
    }
