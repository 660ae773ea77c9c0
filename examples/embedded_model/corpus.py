"""Write labelled English from the grammar: chats and stories about twelve topics.

Every sentence carries the topic and the tone it was written for, so a feature can be
judged against labels that hold by construction. Run this file to read a few documents:

    python corpus.py --documents 3 --seed 7
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from grammar import Filler, Grammar, Hero

Role = Literal["system", "user", "assistant", "text"]


@dataclass(frozen=True)
class Sentence:
    """One sentence with the topic and the tone it was written for (None: neither)."""

    text: str
    topic: str | None = None
    tone: str | None = None


@dataclass
class Turn:
    """What one side says; role "text" is a plain document outside any chat."""

    role: Role
    sentences: list[Sentence]

    @property
    def text(self) -> str:
        """The sentences with one space between them."""
        return " ".join(sentence.text for sentence in self.sentences)

    @property
    def tone(self) -> str | None:
        """The tone of the turn: that of its first sentence with one."""
        return next((sentence.tone for sentence in self.sentences if sentence.tone), None)


Document = list[Turn]


class Writer:
    """Draws documents from a grammar with one seeded random generator."""

    def __init__(self, grammar: Grammar, seed: int) -> None:
        self.grammar = grammar
        self.rng = random.Random(seed)

    def documents(self, count: int) -> Iterator[Document]:
        """Yield `count` documents: 85 % chats and 15 % plain stories."""
        for _ in range(count):
            yield self._chat() if self.rng.random() < 0.85 else self._story()

    def _story(self) -> Document:
        filler = Filler(self.grammar, self.rng, self._topic(), self._tone(0.2), self._hero())
        return [Turn("text", self._narrate(filler, self.rng.randint(4, 9)))]

    def _chat(self) -> Document:
        """Perhaps a system message, then one or two questions with their replies."""
        filler = Filler(self.grammar, self.rng, self._topic(), self._tone(0.5), self._hero())
        document: Document = []
        asked = self.rng.random()
        if filler.tone and asked < 0.2:
            frames = self.grammar.tones[filler.tone]["system"]
            document.append(Turn("system", [Sentence(filler.fill(self.rng.choice(frames)))]))
        elif asked > 0.93:
            frames = self.grammar.shared["system"]
            document.append(Turn("system", [Sentence(filler.fill(self.rng.choice(frames)))]))
        topical, toned = self.rng.random() < 0.6, asked > 0.3
        document.append(self._question(filler, topical, toned))
        document.append(self._reply(filler))
        if self.rng.random() < 0.3:
            if self.rng.random() < 0.5:
                document.append(Turn("user", [Sentence(self.rng.choice(self.grammar.shared["more"]))]))
            else:
                filler.topic, filler.hero = self._topic(), self._hero()
                document.append(self._question(filler, topical=True, toned=False))
            document.append(self._reply(filler))
        return document

    def _question(self, filler: Filler, topical: bool, toned: bool) -> Turn:
        """A user's turn; unless `topical` it leaves the choice to the assistant."""
        kind = "topical" if topical else "neutral"
        tone = filler.tone if toned else None
        if tone:
            kind += "_toned"
        elif filler.hero.he != "I":
            kind += "_named"
        frame = self.rng.choice(self.grammar.shared[kind])
        return Turn("user", [Sentence(filler.fill(frame), filler.topic_of(frame), tone)])

    def _reply(self, filler: Filler) -> Turn:
        """Three to six sentences that explain the topic or tell a story of it."""
        count = self.rng.randint(3, 6)
        if filler.hero.he == "I" and self.rng.random() < 0.5:
            return Turn("assistant", self._explain(filler, count))
        return Turn("assistant", self._narrate(filler, count))

    def _explain(self, filler: Filler, count: int) -> list[Sentence]:
        filler.said.clear()
        return [self._middle(filler, index, "explain", "fact") for index in range(count)]

    def _narrate(self, filler: Filler, count: int) -> list[Sentence]:
        """An opening, a middle and perhaps a closing; one in four changes its topic midway."""
        filler.said.clear()
        drifts = count > 3 and self.rng.random() < 0.25
        drift_at = self.rng.randint(2, count - 1) if drifts else 0
        told = [self._shared(filler, "open")]
        for index in range(1, count):
            if index == drift_at:
                filler.topic = self._topic()
                told.append(self._shared(filler, "drift"))
            elif index == count - 1 and self.rng.random() < 0.4:
                told.append(self._shared(filler, "close"))
            else:
                told.append(self._middle(filler, index, "body", "scene"))
        return told

    def _middle(self, filler: Filler, index: int, frames: str, whole: str) -> Sentence:
        """A shared frame and a whole sentence of the topic take turns; a tone has every second one.

        Now and then a sentence is about neither. Nothing is said twice in one reply.
        """
        tone = filler.tone
        if tone and index % 2:
            line = filler.fresh(self.grammar.tones[tone]["line"])
            return Sentence(filler.fill(line), filler.topic_of(line), tone)
        if frames == "body" and self.rng.random() < 0.08:
            return Sentence(filler.fill(filler.fresh(self.grammar.shared["plain"])))
        turn = index // 2 if tone else index
        source = self.grammar.shared[frames] if turn % 2 else self.grammar.topics[str(filler.topic)][whole]
        text = filler.fill(filler.fresh(source))
        if tone and self.rng.random() < 0.3:
            return Sentence(filler.prefixed(text), filler.topic, tone)
        return Sentence(text, filler.topic)

    def _shared(self, filler: Filler, frames: str) -> Sentence:
        frame = self.rng.choice(self.grammar.shared[frames])
        return Sentence(filler.fill(frame), filler.topic_of(frame))

    def _hero(self) -> Hero:
        return Hero.draw(self.grammar, self.rng)

    def _topic(self) -> str:
        return self.rng.choice(list(self.grammar.topics))

    def _tone(self, share: float) -> str | None:
        return self.rng.choice(list(self.grammar.tones)) if self.rng.random() < share else None


def main() -> None:
    """Print a few documents with their labels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--documents", type=int, default=5, help="how many to print (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same text")
    args = parser.parse_args()
    for document in Writer(Grammar.load(), args.seed).documents(args.documents):
        for turn in document:
            print(f"{turn.role}:")
            for sentence in turn.sentences:
                print(f"  {sentence.text}  ({sentence.topic or '-'}, {sentence.tone or '-'})")
        print()


if __name__ == "__main__":
    main()
