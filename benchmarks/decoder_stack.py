"""A decoder stack in the shape of a real model, with random weights, and what edits add to a step of it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timing import graphed
from torch import Tensor, nn

CONTEXT = 512  # tokens that each sequence of a decode step has behind it


@dataclass(frozen=True)
class Stack:
    """Sizes of a model."""

    name: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp: int


STACKS = [
    Stack("Gemma-2-2B", 2304, 26, 8, 4, 256, 9216),
    Stack("Llama-3-8B", 4096, 32, 32, 8, 128, 14336),
]


class Layer(nn.Module):
    """Attention and a gated MLP, each behind a norm; positions are left out, which costs no time worth counting."""

    def __init__(self, s: Stack, sequences: int) -> None:
        super().__init__()
        self.s = s
        self.qkv = nn.Linear(s.width, (s.heads + 2 * s.kv_heads) * s.head_width, bias=False)
        self.out = nn.Linear(s.heads * s.head_width, s.width, bias=False)
        self.gate_up = nn.Linear(s.width, 2 * s.mlp, bias=False)
        self.down = nn.Linear(s.mlp, s.width, bias=False)
        self.norms = nn.ParameterList([torch.ones(s.width) for _ in range(2)])
        self.register_buffer("cache", torch.randn(2, sequences, s.kv_heads, CONTEXT, s.head_width))

    def forward(self, h: Tensor, prefill: bool) -> Tensor:
        s = self.s
        x = F.rms_norm(h, (s.width,), self.norms[0])
        q, k, v = self.qkv(x).split([n * s.head_width for n in (s.heads, s.kv_heads, s.kv_heads)], dim=-1)
        if prefill:
            q, k, v = (t.view(1, -1, t.shape[-1] // s.head_width, s.head_width).transpose(1, 2) for t in (q, k, v))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        else:
            self.cache[:, :, :, -1] = torch.stack([k, v]).view(2, -1, s.kv_heads, s.head_width)
            q = q.view(-1, s.heads, 1, s.head_width)
            attended = F.scaled_dot_product_attention(q, self.cache[0], self.cache[1], enable_gqa=True)
        h = h + self.out(attended.reshape(h.shape[0], -1))
        gate, up = self.gate_up(F.rms_norm(h, (s.width,), self.norms[1])).chunk(2, dim=-1)
        return h + self.down(F.silu(gate) * up)


def stack_times(
    stack: Stack,
    device: torch.device,
    make_call: Callable[[int, int, int], dict[str, Any]],
    feature_edit: Callable[..., None],
) -> list[dict[str, Any]]:
    """One decode step of 32 sequences with 8 edited features, and a prefill of 2048 tokens with 64."""
    cases = []
    for phase, tokens, rows in (("decode", 32, 8), ("prefill", 2048, 64)):
        # Every layer has tables of its own; the map of tokens and the report are shared, as in a server.
        calls = [make_call(tokens, stack.width, rows) for _ in range(stack.layers)]
        for case in _phase_times(stack, phase, tokens, calls, device, feature_edit):
            cases.append({"stack": stack.name, "phase": phase, "tokens": tokens, "rows": rows, **case})
        torch.cuda.empty_cache()
    return cases


@torch.no_grad()
def _phase_times(
    stack: Stack,
    phase: str,
    tokens: int,
    calls: Sequence[dict[str, Any]],
    device: torch.device,
    feature_edit: Callable[..., None],
) -> Iterator[dict[str, Any]]:
    with torch.device(device):
        layers = [Layer(stack, tokens if phase == "decode" else 1).to(torch.bfloat16) for _ in range(stack.layers)]
    h0 = torch.randn(tokens, stack.width, device=device, dtype=torch.bfloat16)
    shared = {name: calls[0][name] for name in ("slots", "bits", "buffers", "groups")}
    own_slots = shared["slots"].clone()
    active = torch.tensor(True)

    def step(hooked: range) -> None:
        h = h0
        for number, layer in enumerate(layers):
            h = layer(h, phase == "prefill")
            if number in hooked:
                feature_edit(h, active=active, table=calls[number]["table"], **shared)

    plain = graphed([lambda: step(range(0))])
    programs = {
        "idle": torch.zeros_like(own_slots),
        "one program": torch.ones_like(own_slots),
        "a program a row" if phase == "decode" else "four programs": own_slots,
    }
    for hooked in (range(stack.layers // 2, stack.layers // 2 + 1), range(stack.layers)):
        for program, slots in programs.items():
            shared["slots"].copy_(slots)
            shared["groups"].fill(slots, calls[0]["table"].enc.shape[0])
            us = graphed([lambda hooked=hooked: step(hooked)])
            a_layer = (us - plain) / len(hooked)
            yield {
                "hooked": len(hooked), "program": program, "us": us, "plain_us": plain,
                "us_a_layer": a_layer, "share_a_layer": a_layer / plain,
            }  # fmt: skip
