"""The edit is part of the model's compiled graph: one graph for idle and for steered passes."""

import torch
from torch._dynamo.utils import counters
from torch.nn import Module

import sae_steer
from sae_steer.inprocess import Steer
from sae_steer.step import Span
from tests.sae_steer.helpers import HIDDEN, tiny_model

TOKENS = 7
EDITS = [
    {"site": "resid_post.0", "vector": "v", "op": "add", "value": 2.0},
    {"site": "resid_mid.1", "vector": "v", "op": "ablate"},
]


def steered_logits(steer: Steer, forward: Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a pass in which every token is steered."""
    program = steer.compile({"interventions": EDITS})
    assert program is not None
    slot = steer.runtime.acquire(program)
    assert slot is not None
    run = steer.runtime.start_run(program, slot, TOKENS)
    steer.runtime.begin_step([Span(run, 0, ids[0].tolist())])
    logits = forward(input_ids=ids, use_cache=False).logits
    steer.runtime.end_step()
    steer.runtime.release(program)
    assert steer.runtime.report(run)["fired"] == 2 * TOKENS
    return logits


@torch.no_grad()
def test_one_full_graph_serves_idle_and_steered_passes() -> None:
    model = tiny_model("llama")
    ids = torch.randint(0, model.config.vocab_size, (1, TOKENS))
    with sae_steer.attach(
        model, {}, vectors={"v": torch.randn(HIDDEN)}, sites=["resid_post.0", "resid_mid.1"]
    ) as steer:
        plain = model(input_ids=ids, use_cache=False).logits
        torch.compiler.reset()
        counters.clear()
        compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, plain)
        eager = steered_logits(steer, model, ids)
        assert not torch.allclose(eager, plain)
        torch.testing.assert_close(steered_logits(steer, compiled, ids), eager)
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, plain)
    assert counters["stats"]["unique_graphs"] == 1
