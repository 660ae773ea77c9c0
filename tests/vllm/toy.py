"""A decoder in the form of vLLM's own classes, without vLLM: what the plugin's parts beside the model can be held to.

Every token is computed by itself, so that a request's rows are the same in every batch, and the definition can be
applied to them one by one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sae_steer.catalog import Catalog
from sae_steer.limits import Limits
from sae_steer.program import Program
from sae_steer.reference import Token, edit_tokens
from sae_steer.schema import parse_steering
from sae_steer.sites import Place, Site
from sae_steer.slots import Slot
from sae_steer.wire import to_text
from sae_steer_vllm import op
from sae_steer_vllm.channel import PROGRAM, SLOT, Snapshot
from sae_steer_vllm.op import Editor
from sae_steer_vllm.worker import Carried, Shape, Worker
from tests.sae_steer.helpers import BOS, WIDTH, Json

LAYERS = 3
VOCABULARY = 24
LIMITS = Limits(max_programs=2, rows=3, wide_programs=1, wide_rows=6)
ROWS = 40
"""Most tokens of a step."""


@contextmanager
def editors(found: Mapping[str, Editor]) -> Iterator[None]:
    """Within the block, the op finds these."""
    before = op._find[:]
    op.found_by(lambda name: found[name])
    try:
        yield
    finally:
        op._find[:] = before


class Norm(nn.Module):
    """RMS norm with the residual added in place, as vLLM's fused kernels do."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return x / x.norm(dim=-1, keepdim=True)
        residual += x
        return residual / residual.norm(dim=-1, keepdim=True), residual


class Mix(nn.Module):
    """Stands for attention and for the MLP: one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(x).tanh() * 3


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        self.self_attn, self.mlp = Mix(), Mix()

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            whole = hidden_states.clone()
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, whole = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(hidden_states)
        hidden_states, whole = self.post_attention_layernorm(hidden_states, whole)
        return self.mlp(hidden_states), whole


class PPMissingLayer(nn.Identity):
    """A layer that another stage of a pipeline has, by vLLM's name for it."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))


class LlamaForCausalLM(nn.Module):
    """By vLLM's name for it.

    Args:
        layers: Which layers are here; the others are another stage's.
    """

    def __init__(self, layers: Sequence[int] = range(LAYERS), dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(5)  # the same weights in every stage
        self.model = Model()
        self.to(dtype)
        for i in range(LAYERS):
            if i not in layers:
                self.model.layers[i] = PPMissingLayer()

    @torch.no_grad()
    def forward(
        self, ids: Tensor, positions: Tensor, before: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """``hidden_states`` and ``residual`` of a step's tokens ``ids [T]``, behind the last layer that is here."""
        hidden, residual = before if before is not None else (self.model.embed_tokens(ids), None)
        for layer in self.model.layers:
            if isinstance(layer, Layer):
                hidden, residual = layer(positions, hidden, residual)
        assert residual is not None
        return hidden, residual


def shape(dtype: torch.dtype = torch.float32, **fields: Any) -> Shape:
    """The toy's."""
    known: Json = {"hidden": WIDTH, "heads": WIDTH, "vocabulary": VOCABULARY, "max_tokens": ROWS}
    return Shape(**known | {"dtype": dtype, "device": torch.device("cpu")} | fields)


@dataclass
class Stage:
    """A part of the model and the worker beside it."""

    model: LlamaForCausalLM
    worker: Worker


@dataclass
class Chunk:
    """What a step computes of a request: its tokens from a position on."""

    request: str
    start: int
    ids: Sequence[int]


@dataclass
class Engine:
    """Drives workers as the plugin does in an engine.

    Args:
        catalogs: One for each stage.
        sites: All sites.
        splits: Which layers each stage has.
        dtype: Of the model.
        agree: What the workers are told of processes like them.
    """

    catalogs: Sequence[Catalog]
    sites: Sequence[Site]
    splits: Sequence[Sequence[int]] = (range(LAYERS),)
    dtype: torch.dtype = torch.float32
    agree: Callable[[bool], bool] = bool
    stages: list[Stage] = field(init=False)
    snapshot: Snapshot | None = None

    def __post_init__(self) -> None:
        self.stages = []
        for catalog, layers in zip(self.catalogs, self.splits, strict=True):
            model = LlamaForCausalLM(layers, self.dtype)
            self.stages.append(Stage(model, Worker(model, catalog, LIMITS, self.sites, shape(self.dtype), self.agree)))

    def meet(self, request: str, program: Program | None, slot: Slot, prompt: int) -> None:
        """A new request enters."""
        extra = {PROGRAM: to_text(program), SLOT: [slot.bucket, slot.index]} if program is not None else None
        for stage in self.stages:
            stage.worker.meet(request, extra, prompt)

    def forget(self, *requests: str) -> None:
        for stage in self.stages:
            stage.worker.forget(requests)

    def step(self, chunks: Sequence[Chunk], *, padding: int = 0) -> dict[str, Tensor]:
        """One step; the residual stream ``[t, D]`` of each request's rows, behind the last layer."""
        lengths = [len(chunk.ids) for chunk in chunks]
        total = sum(lengths)
        ids = torch.randint(VOCABULARY, (total + padding,))
        positions = torch.randint(50, (total + padding,))
        ids[:total] = torch.tensor([token for chunk in chunks for token in chunk.ids])
        positions[:total] = torch.tensor([c.start + i for c in chunks for i in range(len(c.ids))])
        starts = torch.tensor([0, *lengths, 0]).cumsum(0).int()
        stream: tuple[Tensor, Tensor] | None = None
        done: Carried | None = None
        for stage in self.stages:
            worker = stage.worker
            worker.begin([chunk.request for chunk in chunks], starts, positions, ids, total)
            with editors(worker.editors):
                stream = stage.model(ids, positions, stream)
            done = worker.end(done)
        self.snapshot = self.stages[-1].worker.snapshot(done)
        assert stream is not None
        rows = (stream[0] + stream[1])[:total].split(lengths)
        return {chunk.request: row for chunk, row in zip(chunks, rows, strict=True)}

    def values(self, request: str) -> list[float]:
        """What the last step's snapshot says of a request."""
        assert self.snapshot is not None
        return self.snapshot.slices()[request].tolist()  # type: ignore[no-any-return]


def by_definition(
    catalog: Catalog, sites: Sequence[Site], document: Json | None, ids: Sequence[int], prompt: int
) -> Tensor:
    """The residual stream ``[T, D]`` of a request behind the last layer, by the definition, in float64."""
    model = LlamaForCausalLM(dtype=torch.float64)
    steering = parse_steering(document) if document is not None else None
    tokens = [Token(position, prompt, token, BOS) for position, token in enumerate(ids)]
    kept: dict[Site, Tensor] = {}

    def at(name: str, x: Tensor) -> Tensor:
        """The tensor at a place, edited in the order in which the hooks run."""
        place = Place.parse(name)
        for site in sites:
            if site.read == place and site.write != place:
                kept[site] = x
            if site.write == place and steering is not None:
                x = edit_tokens(kept.get(site, x), x, site, tokens, steering, catalog)
        return x

    with torch.no_grad():
        x = model.model.embed_tokens(torch.tensor(ids))
        for i, layer in enumerate(model.model.layers):
            x = at(f"resid_pre.{i}", x)
            x = at(f"resid_mid.{i}", x + at(f"attn_out.{i}", layer.self_attn(x / x.norm(dim=-1, keepdim=True))))
            inside = at(f"mlp_in.{i}", x / x.norm(dim=-1, keepdim=True))
            x = at(f"resid_post.{i}", x + at(f"mlp_out.{i}", layer.mlp(inside)))
    return x
