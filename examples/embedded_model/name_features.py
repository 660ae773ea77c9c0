"""Name the features by labelled text and measure what holding them does.

    python name_features.py --out ~/embedded-run

reads OUT/model and OUT/sae and writes OUT/sae/features.json (a label and the largest
activation per live feature) and OUT/sae/concepts.json (per concept its feature, how well
it tells the concept, and the effect of clamping and of ablating, with sample texts).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import Writer
from effects import (
    REPORT_PROMPTS,
    ablation,
    compare,
    find_ablation,
    find_clamp,
    topical_prompts,
)
from files import write_json
from grammar import Grammar
from labelled import Evidence, concept_words, gather
from residual import load
from sae_lens import SAE
from steering import Hold, Steered
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

LABEL_SEED, WORD_SEED = 4_000_000, 0
NAMED_AUROC, RELATED_AUROC, WORD_MASS = 0.9, 0.7, 0.7
CANDIDATES = 5
MARKERS = {
    "<s>": "start of text", "</s>": "end of a reply", "<|user|>": "start of a question",
    "<|assistant|>": "start of a reply", "<|system|>": "start of a system message", ".": "end of a sentence",
}  # fmt: skip


def title(grammar: Grammar, concept: str) -> str:
    """The label of a concept: "the sea", "angry tone"."""
    return str(grammar.topics[concept]["label"]) if concept in grammar.topics else f"{concept} tone"


def word_label(mass: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """A name by the one to three tokens that get most of the activation; `mass` is [V]."""
    shares, ids = (mass / mass.sum()).topk(3)
    count = int((shares.cumsum(0) < WORD_MASS).sum()) + 1
    if count > 3:
        return None
    tokens = [str(tokenizer.decode([token])).strip() for token in ids[:count].tolist()]
    if count == 1 and tokens[0] in MARKERS:
        return MARKERS[tokens[0]]
    return " / ".join(f'"{token}"' for token in dict.fromkeys(tokens))


def name_all(
    evidence: Evidence,
    aurocs: dict[str, np.ndarray],
    chosen: dict[str, int],
    grammar: Grammar,
    tokenizer: PreTrainedTokenizerFast,
) -> dict[str, dict[str, Any]]:
    """A label and the reference maximum for every feature that ever fired.

    The feature `chosen` to bring a concept bears its plain name. Another is named after a
    concept, with a number, if its mean over a sentence tells that concept, else after the
    few tokens it fires on, else not at all.
    """
    concepts = list(aurocs)
    table = np.stack([aurocs[concept] for concept in concepts])
    plain = {feature: title(grammar, concept) for concept, feature in chosen.items()}
    features: dict[str, dict[str, Any]] = {}
    for feature in torch.nonzero(evidence.maximum > 0).flatten().tolist():
        best = int(table[:, feature].argmax())
        concept = title(grammar, concepts[best])
        label = plain.get(feature) or word_label(evidence.mass[feature], tokenizer)
        if feature not in plain and table[best, feature] >= NAMED_AUROC:
            others = [f for f in np.argsort(-table[best]).tolist() if f not in plain]
            label = f"{concept} ({others.index(feature) + 2})"
        elif label in MARKERS.values() and table[best, feature] >= RELATED_AUROC:
            label = f"{concept}, {label}"
        features[str(feature)] = {"label": label, "reference_max": round(evidence.maximum[feature].item(), 4)}
    return features


def measure_concept(
    concept: str,
    evidence: Evidence,
    auroc: np.ndarray,
    steered: Steered,
    grammar: Grammar,
    vocabulary: set[str],
    perplexity: float,
) -> dict[str, Any]:
    """Choose the features of one concept on some prompts and report them on others."""
    candidates = evidence.candidates(concept, auroc, CANDIDATES)
    clamp = find_clamp(steered, candidates, evidence.maximum, vocabulary, perplexity)
    hold = Hold([clamp.feature], torch.full((1, 1), clamp.value))
    ablated = find_ablation(
        steered, clamp.feature, candidates, topical_prompts(grammar, concept, "Tell me about {}."), vocabulary
    )
    asked = topical_prompts(grammar, concept, "Talk about {}.")
    precision, recall = evidence.precision_recall(concept, clamp.feature)
    return {
        "label": title(grammar, concept),
        "feature": clamp.feature,
        "auroc": round(float(auroc[clamp.feature]), 4),
        "precision": round(precision, 3),
        "recall": round(recall, 3),
        "candidates": {str(feature): round(float(auroc[feature]), 4) for feature in candidates},
        "clamp": {
            "value": round(clamp.value, 2),
            "multiple_of_reference": clamp.multiple,
            **compare(
                steered.replies(REPORT_PROMPTS), steered.replies(REPORT_PROMPTS, hold), REPORT_PROMPTS, vocabulary
            ),
        },
        "ablate": {
            "features": ablated,
            **compare(steered.replies(asked), steered.replies(asked, ablation(ablated)), asked, vocabulary),
        },
    }


def main() -> None:
    """Gather the evidence, name the features, measure the concepts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path.home() / "embedded-run", help="folder of train_sae.py")
    parser.add_argument("--documents", type=int, default=2000, help="labelled documents to judge by")
    parser.add_argument("--concepts", nargs="*", help="measure only these (default: all)")
    args = parser.parse_args()

    grammar = Grammar.load()
    model, tokenizer = load(args.out / "model")
    sae = SAE.load_from_disk(args.out / "sae")
    layer = int(sae.cfg.metadata.hook_name.split(".")[1])
    quality = json.loads((args.out / "sae_quality.json").read_text())
    evidence = gather(model, tokenizer, sae, layer, list(Writer(grammar, LABEL_SEED).documents(args.documents)))
    vocabularies = concept_words(list(Writer(grammar, WORD_SEED).documents(20_000)))
    concepts = [*grammar.topics, *grammar.tones]
    aurocs = {concept: evidence.auroc(concept) for concept in tqdm(concepts, desc="labels")}

    steered = Steered(model, tokenizer, sae, layer)
    report: dict[str, Any] = {"hook_name": sae.cfg.metadata.hook_name, "quality": quality, "concepts": {}}
    for concept in tqdm(args.concepts or concepts, desc="concepts"):
        found = measure_concept(
            concept, evidence, aurocs[concept], steered, grammar, vocabularies[concept], quality["perplexity"]
        )
        report["concepts"][concept] = found
        clamp, ablate = found["clamp"], found["ablate"]
        tqdm.write(
            f"{concept:9} feature {found['feature']:4} auroc {found['auroc']:.3f}"
            f"  clamp {clamp['value']:6.2f} ({clamp['multiple_of_reference']}x):"
            f" {clamp['share_before']:.2f} -> {clamp['share_after']:.2f} (perplexity {clamp['perplexity_after']:.1f})"
            f"  ablate {ablate['features']}: {ablate['share_before']:.2f} -> {ablate['share_after']:.2f}"
        )
    write_json(args.out / "sae" / "concepts.json", report)
    chosen = {concept: found["feature"] for concept, found in report["concepts"].items()}
    features = name_all(evidence, aurocs, chosen, grammar, tokenizer)
    write_json(args.out / "sae" / "features.json", {"features": features})


if __name__ == "__main__":
    main()
