"""Plain and steered requests side by side: neither may notice the other."""

from collections.abc import Callable
from functools import partial

from sae_steer_cli.checks.answers import Answer, Difference
from sae_steer_cli.checks.subject import Subject


def plain_beside_steered(subject: Subject) -> str:
    """A plain answer is the same before steered requests, after them and beside them."""
    prompt = subject.prompt()
    before = subject.ask(prompt, cold=True)
    subject.steered(prompt)
    found = [subject.require_same(subject.ask(prompt), before, "a plain answer differs after a steered request")]
    what = "a plain answer differs in a batch with steered ones"
    for _ in range(2):
        subject.tell("asking plainly beside steered requests")
        plain, _ = _batch(subject, prompt)
        found += [subject.require_same(answer, before, what) for answer in plain]
    return f"{len(found)} answers after and beside steered ones: {_worst(found)}"


def steered_beside_others(subject: Subject) -> str:
    """A steered answer is the same alone and in a batch with plain ones and other programs."""
    prompt = subject.prompt()
    alone = [task() for task in _steered(subject, prompt)]
    _, steered = _batch(subject, prompt)
    what = "a steered answer differs in a batch with others"
    found = [subject.require_same(one, other, what) for one, other in zip(alone, steered, strict=True)]
    programs = len({answer.program for answer in alone})
    return f"{len(found)} answers of {programs} programs: {_worst(found)}"


def _steered(subject: Subject, prompt: str) -> list[Callable[[], Answer]]:
    edits = [subject.chosen, *([subject.other] if subject.other is not None else [])]
    whole = [partial(subject.ask, prompt, edit.steering()) for edit in edits]
    return [*whole, partial(subject.steered, prompt, "completion")]


def _batch(subject: Subject, prompt: str) -> tuple[list[Answer], list[Answer]]:
    """Plain and steered answers to one prompt, asked at once."""
    steered = _steered(subject, prompt)
    # Alternating, so that each is admitted beside the other kind.
    tasks = [task for one in steered for task in (partial(subject.ask, prompt), one)]
    answers = subject.server.together(tasks)
    return answers[::2], answers[1::2]


def _worst(found: list[Difference]) -> Difference:
    return max(found, key=lambda difference: difference.noise)
