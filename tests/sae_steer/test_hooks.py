"""Edit layers in a model's forward pass: what is read, what is written, in which order, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import sae_steer
from sae_steer.catalog import Catalog
from sae_steer.hooks import install
from sae_steer.limits import Limits
from sae_steer.reference import encode
from sae_steer.runtime import Runtime
from sae_steer.sae import Sae, open_sae
from sae_steer.sites import Site
from sae_steer.step import Span
from tests.sae_files import write_saelens
from tests.sae_steer.helpers import HIDDEN, LAYERS, Json, compile_doc, edit, steering, tiny_model, vector_edit

IDS = torch.tensor([[1, 17, 33, 4, 9]])
LENS = {"resid_post": "hook_resid_post", "resid_pre": "hook_resid_pre"}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


def make_sae(folder: Path, place: str = "resid_post.1", seed: int = 0, **fields: Any) -> Sae:
    kind, layer = place.split(".")
    write_saelens(folder, d_in=HIDDEN, hook_name=f"blocks.{layer}.{LENS[kind]}", seed=seed, **fields)
    return open_sae(folder)


@torch.no_grad()
def states(model: PreTrainedModel) -> list[Tensor]:
    return [state[0].double() for state in model(input_ids=IDS, output_hidden_states=True).hidden_states]


def clamped(sae: Sae, x: Tensor, feature: int, value: float) -> Tensor:
    """What a clamp adds to ``x [T, D]``."""
    before = torch.stack([encode(sae, row)[feature] for row in x])
    return (value - before)[:, None] * sae.raw()["W_dec"][feature]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


# ------------------------------------------------------------------------------------------- order


def test_all_edits_of_a_site_see_the_tensor_before_any_of_them(model: PreTrainedModel, tmp_path: Path) -> None:
    one, other = make_sae(tmp_path / "one", seed=1), make_sae(tmp_path / "other", seed=2, architecture="gated")
    x = states(model)[2]
    vector = torch.randn(HIDDEN)
    request = steering(
        edit(sae="one", value=6.0),
        edit(sae="other", value=4.0),
        vector_edit(value=3.0),
        vector_edit(vector="u", op="ablate", value=None),
    )
    vectors = {"v": vector, "u": torch.randn(HIDDEN)}
    with sae_steer.attach(model, {"one": one, "other": other}, vectors=vectors) as steer, steer.rows([request]):
        y = states(model)[2]
    unit = (vectors["u"] / vectors["u"].norm()).double()
    delta = clamped(one, x, 3, 6.0) + clamped(other, x, 3, 4.0) + 3 * vector.double() - (x @ unit)[:, None] * unit
    close(y, x + delta)


def test_later_sites_see_the_edits_of_earlier_ones(model: PreTrainedModel, tmp_path: Path) -> None:
    first, second = make_sae(tmp_path / "a", "resid_post.0", seed=1), make_sae(tmp_path / "b", "resid_pre.1", seed=2)
    x = states(model)[1]
    between = x + clamped(first, x, 3, 6.0)
    expected = between + clamped(second, between, 3, 4.0)
    vector = torch.randn(HIDDEN)
    by_hand = model.model.layers[1].register_forward_pre_hook(
        lambda _, args: (args[0] - x.float() + expected.float() + vector, *args[1:])
    )
    wanted = states(model)[2]
    by_hand.remove()
    request = steering(edit(sae="b", value=4.0), vector_edit(site="resid_pre.1", value=1.0), edit(sae="a", value=6.0))
    with (
        sae_steer.attach(model, {"b": second, "a": first}, vectors={"v": vector}) as steer,
        steer.rows([request]),
    ):
        found = states(model)
    close(found[1], between)
    torch.testing.assert_close(found[2], wanted, atol=1e-3, rtol=1e-4)


# ------------------------------------------------------------------------------------------- modules of any kind


class Layer(nn.Module):
    """A layer that gives a tensor, or a tuple with something beside it."""

    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Any:
        y = hidden_states * scale
        return (y, "beside") if self.as_tuple else y


class Toy(nn.Module):
    """Two layers that multiply, in the shape of a known family."""

    def __init__(self, *, as_tuple: bool, by_keyword: bool, transposed: bool) -> None:
        super().__init__()
        self.config = tiny_model("llama").config
        self.model: Any = nn.Module()
        self.model.layers = nn.ModuleList(Layer(as_tuple) for _ in range(2))
        self.by_keyword, self.transposed = by_keyword, transposed
        self.dtype, self.device = torch.float32, torch.device("cpu")

    @property
    def base_model(self) -> Any:
        return self.model

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model.layers:
            if self.transposed:  # the same values in an order of memory that no view flattens
                x = x.transpose(0, 1).contiguous().transpose(0, 1)
            found = layer(hidden_states=x, scale=2.0) if self.by_keyword else layer(x, 2.0)
            x = found[0] if layer.as_tuple else found
        return x


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog([], [sae_steer.catalog.Vector.make("v", torch.arange(float(HIDDEN)))])


def run(toy: Any, catalog: Catalog, site: str, x: Tensor) -> Tensor:
    """A step of ``x [B, T, D]`` in which every token is pushed along the vector."""
    runtime = Runtime.attach(toy, catalog, limits=Limits(), sites=[Site.parse(site)])
    program = compile_doc(steering(vector_edit(site=site, value=1.0)), catalog, sites=runtime.sites)
    assert program is not None
    slot = runtime.acquire(program)
    assert slot is not None
    tokens = x.shape[0] * x.shape[1]
    runtime.begin_step([Span(runtime.start_run(program, slot, 1), 0, [5] * tokens)])
    y = toy(x)
    assert runtime.end_step().tokens == tokens
    runtime.detach()
    return y


@pytest.mark.parametrize("transposed", [False, True], ids=["in order", "transposed"])
@pytest.mark.parametrize("by_keyword", [False, True], ids=["positional", "keyword"])
@pytest.mark.parametrize("as_tuple", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize(("site", "factor"), [("resid_pre.0", 4), ("resid_post.0", 2), ("resid_pre.1", 2)])
def test_hooks_take_modules_as_they_come(
    as_tuple: bool, by_keyword: bool, transposed: bool, site: str, factor: int, catalog: Catalog
) -> None:
    toy = Toy(as_tuple=as_tuple, by_keyword=by_keyword, transposed=transposed)
    x = torch.randn(2, 3, HIDDEN)
    kept = x.clone()
    y = run(toy, catalog, site, x)
    torch.testing.assert_close(y, 4 * kept + factor * catalog.vector("v").values)
    assert torch.equal(x, kept)


def test_a_transcoder_takes_the_tensor_of_the_same_pass(model: PreTrainedModel, tmp_path: Path) -> None:
    """Pass after pass, also where one before it was broken off between its two places."""
    write_saelens(
        tmp_path,
        architecture="transcoder",
        d_in=HIDDEN,
        hook_name="blocks.1.mlp.hook_in",
        hook_name_out="blocks.1.hook_mlp_out",
    )
    request = steering(edit(sae="tc", value=5.0))
    with sae_steer.attach(model, {"tc": open_sae(tmp_path)}) as steer:
        with steer.rows([request]):
            expected = states(model)[2]

        def explode(*_: object) -> None:
            raise RuntimeError("inside")

        handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(explode)
        with steer.rows([request]), pytest.raises(RuntimeError, match="inside"), torch.no_grad():
            model(input_ids=IDS.flip(1))
        handle.remove()
        for _ in range(2):
            with steer.rows([request]):
                assert torch.equal(states(model)[2], expected)


def test_a_pass_that_broke_off_is_not_counted(model: PreTrainedModel, catalog: Catalog) -> None:
    """What the buffers of its later layers hold is of the pass before."""

    def explode(*_: object) -> None:
        raise RuntimeError("inside")

    vectors = {"v": catalog.vector("v").values}
    with sae_steer.attach(model, {}, vectors=vectors, sites=["resid_post.1"]) as steer:
        with steer.rows([steering(vector_edit())]):
            states(model)
        handle = model.model.layers[0].register_forward_pre_hook(explode)
        with steer.rows([steering(vector_edit())]) as rows:
            with pytest.raises(RuntimeError, match="inside"):
                states(model)
            handle.remove()
            assert rows.reports()[0]["tokens"] == 0  # type: ignore[index]


def test_a_site_that_a_pass_does_not_reach_is_not_counted(model: PreTrainedModel, catalog: Catalog) -> None:
    """An early exit leaves later layers out, and with them their edits."""
    vectors = {"v": catalog.vector("v").values}
    with sae_steer.attach(model, {}, vectors=vectors, sites=["resid_post.1"]) as steer:
        with steer.rows([steering(vector_edit())]):
            states(model)
        with steer.rows([steering(vector_edit())]) as rows:
            model.config.num_hidden_layers = 1
            try:
                states(model)
            finally:
                model.config.num_hidden_layers = LAYERS
        assert rows.reports()[0]["tokens"] == 0  # type: ignore[index]


# ------------------------------------------------------------------------------------------- nothing else


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def runtime(catalog: Catalog) -> Runtime:
    toy: Any = Toy(as_tuple=False, by_keyword=False, transposed=False)
    return Runtime.attach(toy, catalog, limits=Limits(), sites=[Site.parse("resid_post.0")])


@pytest.mark.parametrize(("site", "hooks"), [("resid_post.0", 1), ("resid_pre.1", 1), ("resid_pre.0->resid_post.1", 2)])
def test_a_place_is_a_hook_that_comes_out_again(site: str, hooks: int, catalog: Catalog) -> None:
    toy: Any = Toy(as_tuple=False, by_keyword=False, transposed=False)
    runtime = Runtime.attach(toy, catalog, limits=Limits(), sites=[])
    layer = Runtime(toy, catalog, Limits(), [Site.parse(site)])._layers[Site.parse(site)]
    handles = install(toy, layer)
    assert _hooks(toy) == len(handles) == hooks
    for handle in handles:
        handle.remove()
    assert _hooks(toy) == 0
    runtime.detach()


def test_an_idle_pass_hands_on_the_very_tensors(catalog: Catalog) -> None:
    toy: Any = Toy(as_tuple=False, by_keyword=True, transposed=False)
    seen: list[Tensor] = []
    toy.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    runtime = Runtime.attach(toy, catalog, limits=Limits(), sites=[Site.parse("resid_pre.0")])
    x = torch.randn(1, 3, HIDDEN)
    toy(x)
    assert seen[0] is x
    runtime.detach()


def test_a_step_without_steered_tokens_tells_of_nothing(runtime: Runtime) -> None:
    runtime.begin_step([Span(None, 0, [1, 2, 3])])
    summary = runtime.end_step()
    assert (summary.tokens, summary.edits, summary.programs) == (0, 0, 0)


def test_a_step_is_summed_up(catalog: Catalog) -> None:
    toy: Any = Toy(as_tuple=False, by_keyword=False, transposed=False)
    sites = [Site.parse("resid_post.0"), Site.parse("resid_post.1")]
    runtime = Runtime.attach(toy, catalog, limits=Limits(), sites=sites)

    def start(*interventions: Json) -> Any:
        program = compile_doc(steering(*interventions), catalog, sites=sites)
        assert program is not None
        slot = runtime.acquire(program)
        assert slot is not None
        return runtime.start_run(program, slot, 2)

    both = start(vector_edit(site="resid_post.0"), vector_edit(site="resid_post.1"))
    last = start(vector_edit(positions="completion"))
    again = start(vector_edit(positions="completion"))
    runtime.begin_step([Span(both, 0, [5, 5]), Span(None, 0, [5]), Span(last, 0, [5, 5, 5]), Span(again, 1, [5])])
    toy(torch.randn(1, 7, HIDDEN))
    summary = runtime.end_step()
    assert (summary.tokens, summary.edits, summary.programs) == (2 + 2 + 1, 4 + 2 + 1, 2)
    runtime.detach()
