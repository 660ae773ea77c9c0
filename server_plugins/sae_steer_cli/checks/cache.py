"""The prefix cache: what was computed under an edit is never found by a request with another one, or with none.

Each check asks for a new prompt in some order, and then for the same once more, cold. What a leak would answer is
known, too: a plain answer that reads keys and values of a steered prompt is that of an edit of the prompt tokens alone.
So a check also shows that it would have seen the leak, and works where nothing can be asked cold.
"""

from sae_steer_cli.checks.answers import Answer, Difference
from sae_steer_cli.checks.subject import ALIKE, TOKENS, Failed, Skipped, Subject

_UNSEEN = (
    "an edit of prompt tokens alone changes no answer here (its site is the last layer's, or --value is small), so a "
    "leak could not be seen in a text"
)


def steered_then_plain(subject: Subject) -> str:
    """Steered, then plain."""
    for prompt in subject.prompts():
        subject.steered(prompt)
        said = _judge(
            subject,
            "a plain answer after a steered one",
            warm=subject.ask(prompt),
            cold=subject.ask(prompt, cold=True) if subject.salts else None,
            leaked=subject.steered(prompt, "prompt", cold=True),
        )
        if said:
            return said
    return _undecided(subject, "a plain answer after a steered one")


def plain_then_steered(subject: Subject) -> str:
    """Plain, then steered."""
    for prompt in subject.prompts():
        subject.ask(prompt)
        said = _judge(
            subject,
            "a steered answer after a plain one",
            warm=subject.steered(prompt),
            cold=subject.steered(prompt, cold=True) if subject.salts else None,
            leaked=subject.steered(prompt, "completion", cold=True),
        )
        if said:
            return said
    return _undecided(subject, "a steered answer after a plain one")


def steered_then_otherwise(subject: Subject) -> str:
    """Steered, then steered otherwise."""
    other = subject.other
    if other is None:
        raise Skipped("no other value of the feature answers otherwise. Give one that may with --feature and --value")
    for prompt in subject.prompts():
        first = subject.steered(prompt)
        said = _judge(
            subject,
            "a steered answer after an otherwise steered one",
            warm=subject.ask(prompt, other.steering()),
            cold=subject.ask(prompt, other.steering(), cold=True) if subject.salts else None,
            leaked=first,
        )
        if said:
            return said
    return _undecided(subject, "a steered answer after an otherwise steered one")


def steered_twice(subject: Subject) -> str:
    """Equal programs."""
    prompt = subject.prompt()
    first = subject.steered(prompt)
    again = subject.steered(prompt)
    what = "the second of two equal requests differs"
    found = subject.require_same(again, first, what)
    if subject.salts:
        found = subject.require_same(again, subject.steered(prompt, cold=True), f"{what} from its cold answer")
    if first.program != again.program:
        raise Failed(f"two equal requests are told to have run two programs, {first.program} and {again.program}")
    shared = f"; {again.cached or 0} of {again.prompt_tokens} tokens were shared" if subject.reports_cached else ""
    return f"{found}{shared}"


def completion_only(subject: Subject) -> str:
    """An edit of the completion alone, between plain requests."""
    prompt = subject.prompt()
    subject.ask(prompt)
    steered = subject.steered(prompt, "completion")
    after = subject.ask(prompt)
    subject.tell("asking the same cold")
    cold_steered, cold = subject.steered(prompt, "completion", cold=True), subject.ask(prompt, cold=True)
    what = "differs from its cold answer"
    found = subject.require_same(steered, cold_steered, f"an answer steered from its first token on {what}")
    subject.require_same(after, cold, f"a plain answer after one steered from its first token on {what}")
    return str(found)


def completion_only_shares(subject: Subject) -> str:
    """An edit of the completion alone takes as much of the prompt from the cache as a plain request."""
    if not subject.reports_cached:
        raise Skipped(
            "the server does not say how much of a prompt it takes from its prefix cache (vLLM: "
            "--enable-prompt-tokens-details), or has none"
        )
    prompt = subject.prompt()
    subject.ask(prompt)
    plain, steered = subject.ask(prompt).cached or 0, subject.steered(prompt, "completion").cached or 0
    if steered != plain:
        raise Failed(f"a plain request takes {plain} tokens from the prefix cache, and one like it takes {steered}")
    return f"both take {plain} tokens from the prefix cache"


def reply_as_prompt(subject: Subject) -> str:
    """A steered reply comes back as a part of a plain prompt."""
    for prompt in subject.prompts():
        reply = subject.steered(prompt, max_tokens=3 * TOKENS)
        turn: str | list[int] = prompt + reply.text
        if reply.prompt_ids is not None and reply.ids is not None:
            turn = reply.prompt_ids + reply.ids  # the very tokens: text may be cut into others
        said = _judge(
            subject,
            "a plain answer to a prompt that ends with a steered reply",
            warm=subject.ask(turn),
            cold=subject.ask(turn, cold=True) if subject.salts else None,
            leaked=subject.steered(turn, "prompt", cold=True),
        )
        if said:
            return said
    return _undecided(subject, "a plain answer to a prompt that ends with a steered reply")


def _judge(subject: Subject, what: str, *, warm: Answer, cold: Answer | None, leaked: Answer) -> str | None:
    """Compares an answer with its cold one, and with what a leak would answer.

    Returns:
        What was found, or None where this prompt cannot tell.

    Raises:
        Failed: It is not its cold answer, or took tokens from the cache that it must not.
    """
    if subject.reports_cached and (warm.cached or 0) > ALIKE:
        raise Failed(f"{what} took {warm.cached} of {warm.prompt_tokens} prompt tokens from the other's cache")
    counted = "; no prompt token came from the other's cache" if subject.reports_cached else ""
    if cold is not None:
        found: Difference = subject.require_same(warm, cold, f"{what} differs from its cold answer")
        if not subject.same(cold, leaked):
            return f"{found}, compared with its cold answer{counted}"
        return f"{found}, compared with its cold answer{counted} ({_UNSEEN})" if counted else None
    # Nothing can be asked cold: it must not be what a leak would answer.
    return None if subject.same(warm, leaked) else f"not what a leak would answer{counted}"


def _undecided(subject: Subject, what: str) -> str:
    if not subject.reaches_cache:
        raise Skipped(_UNSEEN)
    if subject.salts:
        raise Skipped("on none of eight prompts would a leak have changed the answer")
    raise Failed(f"{what} is what a leak would answer, on each of eight prompts")
