"""The sentence templates and how they are filled.

A template is plain English with two kinds of holes: ``{a|b}`` picks one of the words and
``[slot]`` asks for something: ``[s]`` the subject, ``[did]`` what they did, ``[thing]`` a
thing of the topic. The templates are the TOML files in ``grammar/``.
"""

import random
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "grammar"
CHOICE = re.compile(r"\{([^{}]*)\}")
SLOT = re.compile(r"\[(\w+)\]")
TOPIC_SLOTS = {"about", "thing", "place", "goto", "do", "did"}


@dataclass
class Grammar:
    """The templates: shared frames, a table per topic and a table per tone."""

    shared: dict[str, list[str]]
    topics: dict[str, dict[str, Any]]
    tones: dict[str, dict[str, list[str]]]

    @classmethod
    def load(cls, folder: Path = FOLDER) -> "Grammar":
        """Read the TOML files below `folder`."""
        paths = sorted((folder / "topics").glob("*.toml"))
        return cls(
            shared=tomllib.loads((folder / "shared.toml").read_text()),
            topics={path.stem: tomllib.loads(path.read_text()) for path in paths},
            tones=tomllib.loads((folder / "tones.toml").read_text()),
        )

    @property
    def names(self) -> list[str]:
        """Every first name."""
        return self.shared["girls"] + self.shared["boys"]


@dataclass
class Hero:
    """Who a reply is about: a named girl or boy, or the speaker."""

    name: str
    he: str
    his: str
    obj: str
    introduced: bool = field(default=False)

    @classmethod
    def draw(cls, grammar: Grammar, rng: random.Random) -> "Hero":
        """The speaker in 45 of 100 cases, else a girl or a boy."""
        if rng.random() < 0.45:
            return cls("I", "I", "my", "me")
        if rng.random() < 0.5:
            return cls(rng.choice(grammar.shared["girls"]), "she", "her", "her")
        return cls(rng.choice(grammar.shared["boys"]), "he", "his", "him")

    def subject(self, rng: random.Random) -> str:
        """The name at first, afterwards mostly the pronoun."""
        use_name = not self.introduced or rng.random() < 0.25
        self.introduced = True
        return self.name if use_name else self.he


@dataclass
class Filler:
    """Fills templates with words of one topic, one tone and one hero."""

    grammar: Grammar
    rng: random.Random
    topic: str | None
    tone: str | None
    hero: Hero
    said: set[str] = field(default_factory=set)

    def fresh(self, options: list[str]) -> str:
        """One of `options` that was not used since `said` was last cleared, if there is one."""
        choice = self.rng.choice([option for option in options if option not in self.said] or options)
        self.said.add(choice)
        return choice

    def topic_of(self, frame: str) -> str | None:
        """The topic if `frame` asks for a word of it."""
        return self.topic if TOPIC_SLOTS & set(SLOT.findall(frame)) else None

    def fill(self, frame: str) -> str:
        """Replace every [slot] and {a|b} of `frame` and set a capital at the start."""
        text = self.choose(SLOT.sub(lambda match: self._slot(match[1]), frame))
        return text[0].upper() + text[1:]

    def choose(self, text: str) -> str:
        """Replace every {a|b} of `text` by one of its words."""
        return CHOICE.sub(lambda match: self.rng.choice(match[1].split("|")), text)

    def prefixed(self, text: str) -> str:
        """`text` opened with a phrase of the tone, its own capital lowered."""
        prefix = self.choose(self.rng.choice(self.grammar.tones[str(self.tone)]["prefix"]))
        proper = {"I", "Mars", "Jupiter", "Saturn", *self.grammar.names}
        keep = text.split()[0] in proper
        return prefix + (text if keep else text[0].lower() + text[1:])

    def _slot(self, name: str) -> str:
        key = name.lower()
        if key == "s":
            return self.hero.subject(self.rng)
        if key in {"he", "his", "obj"}:
            return str(getattr(self.hero, key))
        if key == "named":
            return self.hero.name
        if key == "friend":
            return self.rng.choice([n for n in self.grammar.names if n != self.hero.name])
        if key == "kin":
            return self.rng.choice(self.grammar.shared["kin"])
        if key == "ask":
            return self.rng.choice(self.grammar.tones[str(self.tone)]["ask"])
        table = self.grammar.topics[str(self.topic)]
        if key in {"do", "did"}:
            verb, rest = self.fresh(table["do"]).split(" ", 1)
            base, past = verb.split("/")
            return f"{base if key == 'do' else past} {rest}"
        return self.fresh(table[key]) if key == "thing" else str(self.rng.choice(table[key]))
