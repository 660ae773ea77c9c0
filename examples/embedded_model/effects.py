"""Find, for one concept, the feature that brings it and the features that carry it."""

import math
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from grammar import Grammar
from steering import Hold, Steered, Text, share

SEARCH_PROMPTS = [
    "Tell me something.", "Write a short note.", "How was your day?",
    "Tell me a story about Anna.", "Say something.",
]  # fmt: skip
REPORT_PROMPTS = [
    "Hello!", "Write a little story.", "Surprise me.",
    "Tell me a story about Tom.", "What did Mary do yesterday?",
]  # fmt: skip
MULTIPLES = [0.3, 0.4, 0.5, 0.6, 0.75, 1.0, 1.5]
GOOD_SHARE = 0.85
MOST_ABLATED = 4
FLUENT_PERPLEXITY, FLUENT_REPETITION = 1.5, 0.25


@dataclass
class Clamp:
    """A feature, the value to hold it at, and that value over its reference maximum."""

    feature: int
    value: float
    multiple: float


def typical(texts: list[Text]) -> float:
    """The perplexity of `texts` together: the geometric mean."""
    return math.exp(mean([math.log(text.perplexity) for text in texts]))


def chunks(texts: list[Text], size: int) -> list[list[Text]]:
    """`texts` in groups of `size`."""
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def find_clamp(
    steered: Steered, candidates: list[int], maximum: torch.Tensor, vocabulary: set[str], perplexity: float
) -> Clamp:
    """Try each candidate at each multiple of its maximum, all in one batch, one row per prompt.

    Text that surprises the model alone much more than held-out text (`perplexity`), or that
    repeats itself, is passed over. Of those that say nearly as much of the concept as the
    best one, the least surprising is kept.
    """
    trials = [Clamp(f, m * maximum[f].item(), m) for f in candidates for m in MULTIPLES]
    values = torch.full((len(trials), len(candidates)), math.nan)
    for row, trial in enumerate(trials):
        values[row, candidates.index(trial.feature)] = trial.value
    rows = values.repeat_interleave(len(SEARCH_PROMPTS), dim=0)
    texts = steered.replies(SEARCH_PROMPTS * len(trials), Hold(candidates, rows))
    fluent: list[tuple[float, float, Clamp]] = []
    for trial, group in zip(trials, chunks(texts, len(SEARCH_PROMPTS)), strict=True):
        steady = mean([text.repetition for text in group]) <= FLUENT_REPETITION
        if steady and typical(group) <= FLUENT_PERPLEXITY * perplexity:
            fluent.append((share(group, vocabulary), typical(group), trial))
    best = max(said for said, _, _ in fluent)
    return min((surprise, trial.value, trial) for said, surprise, trial in fluent if said >= GOOD_SHARE * best)[2]


def find_ablation(
    steered: Steered, first: int, candidates: list[int], prompts: list[str], vocabulary: set[str]
) -> list[int]:
    """`first`, then one at a time the feature whose removal leaves the fewest words of the concept."""
    chosen = [first]
    least = share(steered.replies(prompts, ablation(chosen)), vocabulary)
    while len(chosen) < MOST_ABLATED:
        left = [feature for feature in candidates if feature not in chosen]
        values = torch.full((len(left), len(candidates)), math.nan)
        for row, feature in enumerate(left):
            values[row, [candidates.index(f) for f in [*chosen, feature]]] = 0
        hold = Hold(candidates, values.repeat_interleave(len(prompts), dim=0), everywhere=True)
        groups = chunks(steered.replies(prompts * len(left), hold), len(prompts))
        shares = [share(group, vocabulary) for group in groups]
        if min(shares) > least - 0.01:
            break
        least = min(shares)
        chosen.append(left[shares.index(least)])
    return chosen


def ablation(features: list[int]) -> Hold:
    """Hold `features` at zero at every position."""
    return Hold(features, torch.zeros(1, len(features)), everywhere=True)


def topical_prompts(grammar: Grammar, concept: str, frame: str) -> list[str]:
    """Prompts that ask for `concept`; `frame` has a place {} for the thing to write about."""
    if concept in grammar.topics:
        return [frame.format(about) for about in grammar.topics[concept]["about"]]
    topics = ["the rain", "the beach", "trains", "the garden"]
    asks = grammar.tones[concept]["ask"]
    return [frame.format(f"{topic} {ask}") for topic, ask in zip(topics, asks, strict=True)]


def compare(before: list[Text], after: list[Text], prompts: list[str], vocabulary: set[str]) -> dict[str, Any]:
    """The effect in numbers, with the texts themselves."""
    return {
        "share_before": round(share(before, vocabulary), 3),
        "share_after": round(share(after, vocabulary), 3),
        "perplexity_before": round(typical(before), 2),
        "perplexity_after": round(typical(after), 2),
        "repetition_before": round(mean([t.repetition for t in before]), 3),
        "repetition_after": round(mean([t.repetition for t in after]), 3),
        "samples": [
            {"prompt": prompt, "before": b.text, "after": a.text}
            for prompt, b, a in zip(prompts, before, after, strict=True)
        ],
    }
