"""Positions: which tokens an edit holds on, however a request is cut into steps."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_steer.footprint import Footprint
from sae_steer.program import Phase, Program, Row, Selector, SiteProgram
from sae_steer.sites import Site
from sae_steer.step import Span, StepMap
from tests.sae_steer.test_report import make_run

SITE = Site.parse("resid_post.1")


def make_program(*selectors: Selector) -> Program:
    rows = tuple(Row("sha256:a", i, "ablate", scale=0.0, selector=i) for i in range(len(selectors)))
    return Program((SiteProgram(SITE, rows),), tuple(selectors))


def held(selector: Selector, tokens: Sequence[int], prompt_length: int, start: int = 0) -> list[int]:
    """The positions on which a selector holds."""
    positions = np.arange(start, start + len(tokens))
    bits = make_program(selector).bits(positions, np.array(tokens), prompt_length)
    return positions[bits != 0].tolist()


selectors = st.builds(
    Selector,
    st.sampled_from([Phase.ALL, Phase.PROMPT, Phase.COMPLETION]),
    skip_token=st.none() | st.integers(0, 3),
    token_in=st.none() | st.lists(st.integers(0, 3), min_size=1).map(tuple),
) | st.builds(
    Selector,
    st.just(Phase.RANGES),
    st.lists(st.tuples(st.integers(0, 15), st.integers(1, 8)).map(lambda r: (r[0], r[0] + r[1])), min_size=1).map(
        tuple
    ),
    skip_token=st.none() | st.integers(0, 3),
)
programs = st.lists(selectors, min_size=1, max_size=5).map(lambda found: make_program(*found))
token_lists = st.lists(st.integers(0, 3), min_size=1, max_size=24)


def literal(selector: Selector, position: int, token: int, prompt_length: int) -> bool:
    """Section 2.5 of the design, for one token."""
    match selector.phase:
        case Phase.ALL:
            at = True
        case Phase.PROMPT:
            at = position < prompt_length - 1
        case Phase.COMPLETION:
            at = position >= prompt_length - 1
        case _:
            at = any(start <= position < end for start, end in selector.ranges)
    return at and token != selector.skip_token and (selector.token_in is None or token in selector.token_in)


anywhere = st.builds(
    Selector,
    st.just(Phase.RANGES),
    st.lists(st.tuples(st.integers(-6, 30), st.integers(-6, 30)), max_size=5).map(tuple),
)


@given(selectors | anywhere, st.integers(0, 20), st.integers(0, 24))
def test_the_count_is_that_of_the_positions(selector: Selector, tokens: int, prompt_length: int) -> None:
    """Ranges that overlap, that begin before the first position or end behind the last, that hold nothing."""
    bare = replace(selector, skip_token=None, token_in=None)
    literally = sum(literal(bare, position, 0, prompt_length) for position in range(tokens))
    assert selector.count(tokens, prompt_length) == literally


def test_the_last_prompt_token_belongs_to_the_completion() -> None:
    tokens = [5] * 8
    assert held(Selector(Phase.PROMPT), tokens, 5) == [0, 1, 2, 3]
    assert held(Selector(Phase.COMPLETION), tokens, 5) == [4, 5, 6, 7]
    assert held(Selector(Phase.ALL), tokens, 5) == list(range(8))
    assert held(Selector(Phase.PROMPT), tokens, 1) == []
    assert held(Selector(Phase.COMPLETION), tokens, 1) == list(range(8))


def test_ranges_are_half_open_and_absolute() -> None:
    selector = Selector(Phase.RANGES, ((2, 4), (6, 7)))
    assert held(selector, [5] * 9, 3) == [2, 3, 6]
    assert held(selector, [5] * 3, 3, start=3) == [3]


def test_token_ids_are_looked_at_beside_positions() -> None:
    tokens = [1, 7, 8, 7, 1, 7]
    assert held(Selector(Phase.ALL, skip_token=1), tokens, 3) == [1, 2, 3, 5]
    assert held(Selector(Phase.COMPLETION, token_in=(7, 9)), tokens, 3) == [3, 5]
    assert held(Selector(Phase.ALL, skip_token=7, token_in=(7, 8)), tokens, 3) == [2]


@given(programs, token_lists, st.integers(1, 20))
def test_bits_are_the_definition_token_by_token(program: Program, tokens: list[int], prompt_length: int) -> None:
    bits = program.bits(np.arange(len(tokens)), np.array(tokens), prompt_length)
    assert bits.dtype == np.int32
    for position, token in enumerate(tokens):
        expected = sum(literal(s, position, token, prompt_length) << j for j, s in enumerate(program.selectors))
        assert bits[position] == expected


@given(programs, token_lists, st.integers(1, 20), st.data())
def test_bits_do_not_depend_on_how_a_request_is_cut(
    program: Program, tokens: list[int], prompt_length: int, data: st.DataObject
) -> None:
    """Chunked prefill, preemption and speculation: any stretch of a request gives the bits of the whole there."""
    whole = program.bits(np.arange(len(tokens)), np.array(tokens), prompt_length)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(tokens)))) | {0, len(tokens)})
    parts = [
        program.bits(np.arange(a, b), np.array(tokens[a:b], dtype=np.int64), prompt_length)
        for a, b in itertools.pairwise(cuts)
    ]
    assert np.concatenate(parts).tolist() == whole.tolist()


@given(programs, token_lists, st.integers(1, 20), st.data())
def test_the_step_map_does_not_depend_on_how_a_request_is_cut(
    program: Program, tokens: list[int], prompt_length: int, data: st.DataObject
) -> None:
    whole = program.bits(np.arange(len(tokens)), np.array(tokens), prompt_length)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(tokens)))) | {0, len(tokens)})
    run = make_run(program, prompt_length=prompt_length)
    step = StepMap(1, torch.device("cpu"), capacity=4)
    bits: list[int] = []
    for a, b in itertools.pairwise(cuts):
        step.fill([Span(run, a, tokens[a:b])])
        slots = step.slots[0][: b - a]  # without a slot, a token's bits mean nothing
        bits += torch.where(slots == run.slot.index, step.bits[: b - a], 0).tolist()
        step.clear()
    assert bits == whole.tolist()


@given(programs, token_lists, st.integers(1, 20))
def test_the_footprint_covers_every_edit_and_knows_no_tokens(
    program: Program, tokens: list[int], prompt_length: int
) -> None:
    positions = np.arange(len(tokens))
    covered = program.footprint(positions, prompt_length)
    bits = program.bits(positions, np.array(tokens), prompt_length)
    assert not (bits[~covered]).any()
    blind = make_program(*(Selector(s.phase, s.ranges) for s in program.selectors))
    assert (blind.bits(positions, np.array(tokens), prompt_length) != 0).tolist() == covered.tolist()


@given(programs, token_lists, st.integers(1, 20))
def test_the_pieces_and_the_token_table_say_what_the_selectors_say(
    program: Program, tokens: list[int], prompt_length: int
) -> None:
    starts, masks = zip(*program.pieces(prompt_length), strict=True)
    assert starts[0] == 0
    assert list(starts) == sorted(set(starts))
    assert all(a != b for a, b in itertools.pairwise(masks))
    positions = np.arange(len(tokens))
    held = np.array(masks)[np.searchsorted(starts, positions, side="right") - 1]
    allowed = program.by_token(max(tokens) + 1)[tokens]
    assert (held & allowed).tolist() == program.bits(positions, np.array(tokens), prompt_length).tolist()


def _keys(program: Program, prompt_length: int, size: int = 4, blocks: int = 6) -> list[str | None]:
    footprint = Footprint(program.digest, program.pieces(prompt_length))
    return [footprint.key(i * size, (i + 1) * size) for i in range(blocks)]


@given(programs, st.integers(1, 24), st.integers(1, 24))
def test_blocks_have_equal_keys_exactly_where_the_same_positions_are_edited(
    program: Program, one: int, two: int
) -> None:
    held = np.arange(24)
    masks = [program_masks(program, held, p).reshape(6, 4) for p in (one, two)]
    for a, b, x, y in zip(_keys(program, one), _keys(program, two), *masks, strict=True):
        assert (a == b) == (x.tolist() == y.tolist())
        assert (a is None) == (not x.any())


def program_masks(program: Program, positions: np.ndarray, prompt_length: int) -> np.ndarray:
    masks = [s.by_position(positions, prompt_length).astype(int) << i for i, s in enumerate(program.selectors)]
    return np.sum(masks, axis=0)


def test_a_program_alone_as_the_key_would_share_what_it_must_not() -> None:
    program = make_program(Selector(Phase.COMPLETION))
    short, long = _keys(program, 5), _keys(program, 13)
    assert short[1] is not None
    assert long[1] is None  # the same four tokens: generated and edited there, a prompt and left alone here
    assert _keys(program, 5)[2] != _keys(program, 12)[2]  # all four positions are edited here, one of them there
    assert short[4] == long[4]


def test_all_31_selectors_fit_the_mask() -> None:
    program = make_program(*(Selector(Phase.RANGES, ((i, i + 1),)) for i in range(31)))
    bits = program.bits(np.arange(32), np.zeros(32, dtype=np.int64), 1)
    assert bits.tolist() == [*(1 << i for i in range(31)), 0]
    assert (bits >= 0).all()


def test_describe_names_the_edits_and_not_the_gates() -> None:
    rows = (Row("sha256:a", 4, "clamp", selector=0), Row("sha256:a", 9))
    program = Program((SiteProgram(SITE, rows),), (Selector(Phase.ALL),))
    assert program.describe() == {"program": program.digest, "sites": {"resid_post.1": ["clamp 4"]}}
    assert program.rows == 2
