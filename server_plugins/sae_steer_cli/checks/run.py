"""The checks in their order."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from sae_steer_cli.checks import batch, cache, effect, first, forms
from sae_steer_cli.checks.subject import Edit, Failed, Skipped, Subject
from sae_steer_http.client import BadAnswer, Refused, Unreachable

Verdict = Literal["PASS", "FAIL", "SKIP"]


@dataclass(frozen=True, slots=True)
class Check:
    """One check.

    Args:
        key: Its name for programs.
        what: What it shows, for people.
        run: Does it: returns what was found, or raises.
        vital: Whether the checks after it need it.
    """

    key: str
    what: str
    run: Callable[[Subject], str]
    vital: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a check.

    Args:
        key: The check's name.
        what: What it shows.
        verdict: Whether it did.
        reason: What was found.
        seconds: How long it took.
    """

    key: str
    what: str
    verdict: Verdict
    reason: str
    seconds: float


def checks(given: Edit | None, sae: str | None) -> tuple[Check, ...]:
    """All checks.

    Args:
        given: The edit to work with; None = one is looked for.
        sae: The SAE in which it is looked for; None = in all.
    """
    return (
        Check("server", "the server runs sae-steer", first.serves_steering, vital=True),
        Check("refusals", "malformed steering is refused", first.refuses_nonsense, vital=True),
        Check("repeats", "plain answers repeat", first.repeats, vital=True),
        Check("effect", "steering changes answers", lambda s: effect.find_edit(s, given, sae), vital=True),
        Check("plain", "plain answers are untouched by steered ones", batch.plain_beside_steered),
        Check("batch", "steered answers are untouched by others", batch.steered_beside_others),
        Check("cache_steered_plain", "prefix cache: steered, then plain", cache.steered_then_plain),
        Check("cache_plain_steered", "prefix cache: plain, then steered", cache.plain_then_steered),
        Check("cache_steered_other", "prefix cache: steered, then otherwise", cache.steered_then_otherwise),
        Check("cache_equal", "prefix cache: equal programs", cache.steered_twice),
        Check("cache_completion", "prefix cache: completion-only", cache.completion_only),
        Check("cache_completion_shares", "prefix cache: completion-only shares prompts", cache.completion_only_shares),
        Check("cache_reply", "prefix cache: a steered reply in a plain prompt", cache.reply_as_prompt),
        Check("choices", "each choice has its block", forms.several_choices),
        Check("stream", "streams", forms.stream),
        Check("chat", "chats", forms.chat),
        Check("profile", "a profile is a model", forms.profile_as_model),
        Check("beam_search", "beam search is refused", forms.beam_search),
        Check("routes", "other routes are refused", forms.other_routes),
    )


def run(subject: Subject, todo: tuple[Check, ...]) -> Iterator[Outcome]:
    """Runs checks in order; after a vital one that failed, the others are skipped."""
    broken = ""
    for check in todo:
        subject.tell(check.what)
        start = time.monotonic()
        verdict: Verdict = "SKIP"
        reason = broken
        if not broken:
            try:
                verdict, reason = "PASS", check.run(subject)
            except Skipped as skipped:
                verdict, reason = "SKIP", str(skipped)
            except (Failed, BadAnswer, Refused, Unreachable) as fault:
                verdict, reason = "FAIL", str(fault)
                if isinstance(fault, Unreachable):
                    broken = "the server stopped answering"
                elif check.vital:
                    broken = f"needs: {check.what}"
        yield Outcome(check.key, check.what, verdict, reason, time.monotonic() - start)
