"""The op in vLLM's graph: it holds a site's name, changes what it is given, and is where the hook has put it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sae_steer.sites import Site
from sae_steer_vllm.hooks import install
from sae_steer_vllm.op import edit_site
from tests.sae_steer.helpers import WIDTH
from tests.vllm.toy import VOCABULARY, LlamaForCausalLM, editors


class Adder:
    """An edit that can be seen: twice the residual, three times what is read, and a number of its own."""

    def __init__(self, number: float = 1.0) -> None:
        self.number = number
        self.calls: list[tuple[bool, bool]] = []

    def edit(self, y: Tensor, read: Tensor | None, residual: Tensor | None) -> None:
        self.calls.append((read is not None, residual is not None))
        y += self.number
        if read is not None:
            y += 3 * read
        if residual is not None:
            y += 2 * residual


@pytest.fixture
def adder() -> Iterator[Adder]:
    found = Adder()
    with editors({"here": found}):
        yield found


def test_what_is_edited_is_what_was_given(adder: Adder) -> None:
    y, read, residual = (torch.full((3, 4), value) for value in (1.0, 2.0, 5.0))
    edit_site(y, "here")
    assert y.tolist() == torch.full((3, 4), 2.0).tolist()
    edit_site(y, "here", read=read)
    assert y.tolist() == torch.full((3, 4), 9.0).tolist()
    edit_site(y, "here", residual=residual)
    assert y.tolist() == torch.full((3, 4), 20.0).tolist()
    assert adder.calls == [(False, False), (True, False), (False, True)]
    assert read.eq(2).all()
    assert residual.eq(5).all()


def test_the_editor_is_found_when_it_runs(adder: Adder) -> None:
    y = torch.zeros(1, 2)
    with editors({"here": Adder(5.0)}):
        edit_site(y, "here")
    edit_site(y, "here")
    assert y.tolist() == [[6.0, 6.0]]


def test_an_unknown_site_is_an_error_and_not_an_idle_one(adder: Adder) -> None:
    with pytest.raises(KeyError, match="nowhere"):
        edit_site(torch.zeros(1, 2), "nowhere")


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_is_what_it_says_to_the_compiler(read: bool, residual: bool, dtype: torch.dtype, adder: Adder) -> None:
    """Its schema, its fake kernel and what the compiler makes of its mutation."""
    y = torch.randn(5, 4).to(dtype)
    extra = [torch.randn(5, 4).to(dtype) if wanted else None for wanted in (read, residual)]
    torch.library.opcheck(torch.ops.sae_steer.edit_site.default, (y, *extra, "here"))


def test_its_schema_says_what_it_changes() -> None:
    schema = torch.ops.sae_steer.edit_site.default._schema
    assert [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write] == ["y"]
    assert schema.returns == []


# ------------------------------------------------------------------------------------------- in a graph


class Recorder:
    """A compiler's back end that keeps the graphs, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward

    @property
    def sites(self) -> list[str]:
        """The names with which the op is called, in the graph's order."""
        nodes = [node for graph in self.graphs for node in graph.graph.nodes]
        called = [
            n for n in nodes if n.target in (torch.ops.sae_steer.edit_site, torch.ops.sae_steer.edit_site.default)
        ]
        return [str(node.args[3] if len(node.args) > 3 else node.kwargs["site"]) for node in called]


SITES = ("resid_pre.0", "resid_mid.0", "attn_out.1", "resid_post.1", "mlp_in.1->mlp_out.2", "resid_pre.2", "z.2")


def hooked() -> LlamaForCausalLM:
    model = LlamaForCausalLM()
    for name in SITES:
        assert install(model, Site.parse(name), name)
    return model


def inputs(tokens: int = 6) -> tuple[Tensor, Tensor]:
    return torch.arange(tokens) % VOCABULARY, torch.arange(tokens)


def test_hooks_are_traced_into_one_graph() -> None:
    """No break, and the same numbers as without the compiler, for steps of other sizes and other edits too."""
    torch.compiler.reset()
    model, recorder = hooked(), Recorder()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=recorder)
    for number in (0.5, 0.0, -2.0):
        for tokens in (6, 9):
            found = {name: Adder(number + i) for i, name in enumerate(SITES)}
            with editors(found):
                expected = model(*inputs(tokens))
                got = compiled(*inputs(tokens))
            torch.testing.assert_close(got, expected)
            plain = LlamaForCausalLM()(*inputs(tokens))
            assert not torch.allclose(got[0] + got[1], plain[0] + plain[1])
            for name, editor in found.items():
                assert len(editor.calls) == 2
                first, second = editor.calls
                assert first == second == ("->" in name, "resid" in name and name != "resid_pre.0")
    assert len(recorder.graphs) == 1
    assert sorted(recorder.sites) == sorted(SITES)


def test_an_idle_site_changes_nothing() -> None:
    class Idle:
        def edit(self, y: Tensor, read: Tensor | None, residual: Tensor | None) -> None:
            """Nothing is asked."""

    with editors(dict.fromkeys(SITES, Idle())):
        found = hooked()(*inputs())
    expected = LlamaForCausalLM()(*inputs())
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.slow
def test_the_compiler_s_own_back_end_sees_the_edit() -> None:
    """Inductor turns mutations into functions and back: what is edited in place must reach what is read later."""
    torch.compiler.reset()
    model = hooked()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for number in (0.5, -2.0):
        with editors({name: Adder(number) for name in SITES}):
            torch.testing.assert_close(compiled(*inputs()), model(*inputs()), rtol=1e-5, atol=1e-5)


class View(nn.Module):
    """Edits part of a tensor, as a layer's output may be."""

    def forward(self, x: Tensor) -> Tensor:
        whole = x * 2
        edit_site(whole[:, :WIDTH], "here")
        return whole + 1


def test_an_edit_of_a_view_is_seen_in_the_whole(adder: Adder) -> None:
    torch.compiler.reset()
    x = torch.randn(3, 2 * WIDTH)
    compiled = torch.compile(View(), fullgraph=True, backend="aot_eager")
    expected = x * 2 + 1
    expected[:, :WIDTH] += 1
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(View()(x), expected)
