"""Looks for an edit that changes answers: what all further checks work with."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from sae_steer_cli.checks.answers import Answer, compare, get
from sae_steer_cli.checks.subject import Edit, Failed, Subject
from sae_steer_http.client import Refused

_LABELLED = 12  # features of an SAE that are tried in turn
_UNLABELLED = 8
_MORE = 16  # edits that are tried for a better one after the first that changes answers
_CLEAR = 8  # how far beyond rounding a leak should be to be seen on any prompt


def find_edit(subject: Subject, given: Edit | None, sae: str | None) -> str:
    """Finds an edit that changes greedy answers, through edited prompt tokens alone if it can.

    Args:
        subject: The server; learns of the edit.
        given: The edit to use; None = it is looked for.
        sae: The SAE in which it is looked for; None = in all.
    """
    if not subject.saes:
        raise Failed("the server has no SAE, so there is nothing to steer with. Give it one when it starts")
    names = [entry["id"] for entry in subject.saes]
    if sae is not None and sae not in names:
        raise Failed(f"there is no SAE {sae!r}. SAEs: {', '.join(names)}")
    search = _Search(subject)
    left = _MORE
    for edit in [given] if given is not None else candidates(subject, sae):
        reach = search.attempt(edit, last=given is not None)
        left -= subject.edit is not None
        if left == 0 or reach > _CLEAR * subject.bound:
            break
    if subject.edit is None:
        hint = "Give a larger --value" if given is not None else "Give one that does with --sae, --feature and --value"
        raise Failed(f"no answer changed with an edit that fired, of {search.tried} tried{search.refused}. {hint}")
    prompt = search.prompts[0]
    subject.other = _another(subject, prompt)
    answer = subject.steered(prompt, cold=True)
    return (
        f"{subject.edit} changes the answer ({search.tried} tried): it fired {answer.fired} times, program "
        f"{answer.program}"
    )


class _Search:
    """Tries edits on two prompts, and remembers the best."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self.prompts = [subject.prompt(), subject.prompt()]
        # All of it cold: what leaks must not decide which edits are good to find leaks with.
        self._plain = [subject.ask(prompt, cold=True) for prompt in self.prompts]
        self._best = -1.0
        self.tried = 0
        self.refused = ""

    def attempt(self, edit: Edit, *, last: bool) -> float:
        """How far an edit of the prompt tokens alone moves answers; -1 where all of the edit does not change them.

        Raises:
            Failed: The server refuses it, and it is the ``last`` one, or failed over it.
        """
        subject = self._subject
        self.tried += 1
        subject.tell(f"trying {edit} ({self.tried})")
        try:
            answers = self._ask(edit, "all")
        except Refused as error:
            if last or error.status >= 500:
                raise Failed(f"{edit}: {error}") from None
            self.refused = f"; the last one refused: {edit}: {error}"
            return -1.0
        pairs = zip(answers, self._plain, strict=True)
        if not any(a.fired and a.text != b.text and not subject.same(a, b) for a, b in pairs):
            return -1.0
        through = self._ask(edit, "prompt")
        reach = min(compare(a, b).noise for a, b in zip(through, self._plain, strict=True))
        if reach > self._best:
            self._best = reach
            subject.edit, subject.reaches_cache = edit, reach > subject.bound
        return reach

    def _ask(self, edit: Edit, positions: str) -> list[Answer]:
        return [self._subject.ask(prompt, edit.steering(positions), cold=True) for prompt in self.prompts]


def _another(subject: Subject, prompt: str) -> Edit | None:
    """The same feature clamped to another value, which answers otherwise; None where no value does."""
    here, plain = subject.steered(prompt, cold=True), subject.ask(prompt, cold=True)
    for factor in (0.5, 2.0, 0.25, 4.0, -1.0):
        edit = replace(subject.chosen, value=subject.chosen.value * factor)
        try:
            answer = subject.ask(prompt, edit.steering(), cold=True)
        except Refused:
            continue  # a dose limit
        if not subject.same(answer, here) and not subject.same(answer, plain):
            return edit
    return None


def candidates(subject: Subject, sae: str | None) -> Iterator[Edit]:
    """Edits that may change answers: features with a recorded maximum first, then any, by growing values.

    Args:
        subject: The server.
        sae: Of this SAE alone; None = of all, those of early layers first, since later layers must see their effect.
    """
    entries = [entry for entry in subject.saes if sae in (None, entry["id"])]
    for entry in sorted(entries, key=_layer):
        name, count = str(entry["id"]), int(entry["features"])
        labelled = _recorded(subject, name)
        for value in (1.0, 2.0, 4.0):
            yield from (Edit(name, feature, value, "reference_max") for feature in labelled)
        step = max(1, count // _UNLABELLED)
        for value in (0.25, 0.5, 1.0, 2.0, 4.0):
            yield from (Edit(name, feature, value, "residual_norm") for feature in range(step // 2, count, step))


def _recorded(subject: Subject, sae: str) -> list[int]:
    """Some features with a recorded maximum, spread over the dictionary."""
    found = get(subject.server.get("/v1/steering/features", sae=sae, limit=1000), "data")
    numbers = [int(entry["feature"]) for entry in found if entry.get("label") and (entry["reference_max"] or 0) > 0]
    return numbers[:: max(1, len(numbers) // _LABELLED)][:_LABELLED]


def _layer(entry: dict[str, Any]) -> int:
    found = re.search(r"\d+", str(entry["site"]))
    return int(found[0]) if found else 0
