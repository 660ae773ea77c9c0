"""The table of places, family by family: where an edit lands, by what it does to models computed by other means."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import sae_steer
from sae_steer import families
from sae_steer.errors import SiteError
from sae_steer.reference import encode
from sae_steer.sae import open_sae
from sae_steer.sites import Kind, Place
from tests.sae_files import write_saelens
from tests.sae_steer.helpers import CONFIGS, HIDDEN, LAYERS, VOCABULARY, steering, tiny_model

NAMES = list(CONFIGS)
SERIAL = [name for name in NAMES if name != "gpt_neox"]  # attention first, then the MLP
LLAMAS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"]
IDS = torch.tensor([[1, 17, 33, 4, 9, 60], [1, 5, 41, 22, 8, 30]])
LAYER = 1


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


def direction(width: int = HIDDEN) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def forward(model: PreTrainedModel, **kwargs: Any) -> Any:
    arguments = {"input_ids": IDS} | kwargs
    if "inputs_embeds" in kwargs:
        del arguments["input_ids"]
    return model(**arguments, output_hidden_states=True)


def steered(model: PreTrainedModel, place: str, vector: Tensor, **kwargs: Any) -> Any:
    """A forward pass with ``vector`` added at a place on every token."""
    add = {"site": place, "vector": "v", "op": "add", "value": 1.0}
    with sae_steer.attach(model, {}, vectors={"v": vector}, sites=[place]) as steer:
        request = steering(add)
        with steer.rows([request, request]):
            return forward(model, **kwargs)


def layer_of(model: PreTrainedModel) -> Any:
    """The layer under test, found without the table."""
    (layers,) = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)
    return layers[LAYER]


def parts(model: PreTrainedModel) -> tuple[Any, list[Any], Any]:
    """The norm before the MLP, the modules of the MLP's branch behind it, and the attention's output projection."""
    layer = layer_of(model)
    match model.config.model_type:
        case "gpt2":
            return layer.ln_2, [layer.mlp], layer.attn.c_proj
        case "gpt_neox":
            return layer.post_attention_layernorm, [layer.mlp], layer.attention.dense
        case "gemma2" | "gemma3_text":
            branch = [layer.mlp, layer.post_feedforward_layernorm]
            return layer.pre_feedforward_layernorm, branch, layer.self_attn.o_proj
    return layer.post_attention_layernorm, [layer.mlp], layer.self_attn.o_proj


@contextmanager
def hooked(module: nn.Module, change: Callable[[Tensor], Tensor | None], *, side: str) -> Iterator[None]:
    """A hand-written intervention: ``change`` gives the new tensor, or None to look only."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        new = change(args[0])
        return None if new is None else (new, *args[1:])

    def after(_: nn.Module, __: object, output: Tensor) -> Tensor | None:
        return change(output)

    handle = module.register_forward_pre_hook(before) if side == "input" else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def same(one: Any, other: Any) -> bool:
    return torch.equal(one.logits, other.logits)


def close(one: Any, other: Any) -> None:
    """Equal up to the order of float32 additions, and the edit was large enough to see."""
    torch.testing.assert_close(one.logits, other.logits, atol=2e-4, rtol=1e-4)


def changed(model: PreTrainedModel, result: Any) -> None:
    assert float((result.logits - forward(model).logits).abs().max()) > 1e-2


# ------------------------------------------------------------------------------------------- the residual stream


def test_an_edit_after_a_layer_is_an_edit_before_the_next(model: PreTrainedModel) -> None:
    for layer in range(LAYERS - 1):
        after = steered(model, f"resid_post.{layer}", direction())
        before = steered(model, f"resid_pre.{layer + 1}", direction())
        assert same(after, before)
        changed(model, after)


def test_an_edit_after_a_layer_shifts_what_the_model_shows_there_and_nothing_before(model: PreTrainedModel) -> None:
    plain, edited = forward(model), steered(model, f"resid_post.{LAYER}", direction())
    assert torch.equal(edited.hidden_states[LAYER + 1], plain.hidden_states[LAYER + 1] + direction())
    for layer in range(LAYER + 1):
        assert torch.equal(edited.hidden_states[layer], plain.hidden_states[layer])


def test_an_edit_before_the_first_layer_is_an_edit_of_the_embeddings(model: PreTrainedModel) -> None:
    embeddings = forward(model).hidden_states[0] + direction()
    if model.config.model_type == "gpt2":  # adds the positions itself
        embeddings = embeddings - model.transformer.wpe.weight[: IDS.shape[1]]
    edited = steered(model, "resid_pre.0", direction())
    close(edited, forward(model, inputs_embeds=embeddings))
    changed(model, edited)


@pytest.mark.parametrize("place", ["resid_pre.0", "resid_post.0"])
def test_what_the_caller_hands_over_is_not_edited(model: PreTrainedModel, place: str) -> None:
    embeddings = model.get_input_embeddings()(IDS).detach()
    kept = embeddings.clone()
    with_ids, with_embeddings = (steered(model, place, direction(), **k) for k in ({}, {"inputs_embeds": embeddings}))
    assert torch.equal(embeddings, kept)
    close(with_embeddings, with_ids)


# ------------------------------------------------------------------------------------------- inside a layer


def test_an_edit_between_attention_and_mlp_is_seen_by_both(model: PreTrainedModel) -> None:
    """Computed anew from the tensor that enters the norm before the MLP."""
    place = f"resid_mid.{LAYER}"
    if model.config.model_type == "gpt_neox":
        with pytest.raises(SiteError, match=r"no place resid_mid\.1"):
            steered(model, place, direction())
        return
    norm, branch, _ = parts(model)
    kept: list[Tensor] = []
    with hooked(norm, lambda x: kept.append(x.clone()), side="input"):
        forward(model)
    middle = kept[0] + direction()
    with torch.no_grad():
        out = norm(middle)
        for module in branch:
            out = module(out)
    edited = steered(model, place, direction())
    torch.testing.assert_close(edited.hidden_states[LAYER + 1], middle + out, atol=1e-4, rtol=1e-5)
    changed(model, edited)


def test_what_attention_adds_lands_between_attention_and_mlp(model: PreTrainedModel) -> None:
    edited = steered(model, f"attn_out.{LAYER}", direction())
    other = "resid_post" if model.config.model_type == "gpt_neox" else "resid_mid"  # in parallel with the MLP
    close(edited, steered(model, f"{other}.{LAYER}", direction()))
    changed(model, edited)


def test_what_the_mlp_adds_lands_in_the_residual_stream(model: PreTrainedModel) -> None:
    edited = steered(model, f"mlp_out.{LAYER}", direction())
    close(edited, steered(model, f"resid_post.{LAYER}", direction()))
    changed(model, edited)


def test_the_input_of_the_mlp_is_what_its_norm_gives(model: PreTrainedModel) -> None:
    norm, _, _ = parts(model)
    edited = steered(model, f"mlp_in.{LAYER}", direction())
    with hooked(norm, lambda y: y + direction(), side="output"):
        by_hand = forward(model)
    assert same(edited, by_hand)
    changed(model, edited)


def test_heads_are_edited_before_the_output_projection(model: PreTrainedModel) -> None:
    _, _, projection = parts(model)
    conv = model.config.model_type == "gpt2"  # a Conv1D holds the transpose
    weight = projection.weight.T if conv else projection.weight
    vector = direction(weight.shape[1])
    assert families.width(model, Place(Kind.Z, LAYER)) == weight.shape[1]
    edited = steered(model, f"z.{LAYER}", vector)
    with hooked(projection, lambda x: x + vector, side="input"):
        assert same(edited, forward(model))
    with hooked(projection, lambda y: y + weight.detach() @ vector, side="output"):
        close(edited, forward(model))
    changed(model, edited)


def test_places_of_one_layer_are_all_different(model: PreTrainedModel) -> None:
    different = [Kind.RESID_PRE, Kind.Z, Kind.ATTN_OUT, Kind.MLP_IN, Kind.MLP_OUT]
    widths = {kind: families.width(model, Place(kind, LAYER)) for kind in different}
    results = {kind: steered(model, f"{kind}.{LAYER}", direction(widths[kind])).logits for kind in different}
    for i, one in enumerate(different):
        for other in different[:i]:
            if {one, other} == {Kind.ATTN_OUT, Kind.MLP_OUT} and model.config.model_type == "gpt_neox":
                continue
            assert not torch.allclose(results[one], results[other], atol=1e-3), (one, other)


# ------------------------------------------------------------------------------------------- nothing left behind


def test_idle_and_detached_models_are_as_before_to_the_bit(model: PreTrainedModel) -> None:
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    plain = forward(model)
    kinds = [kind for kind in families.FAMILIES[model.config.model_type].taps if kind is not Kind.Z]
    sites = [f"{kind}.{layer}" for kind in kinds for layer in range(LAYERS)]
    request = steering({"site": sites[0], "vector": "v", "op": "add", "value": 3.0})
    with sae_steer.attach(model, {}, vectors={"v": direction()}, sites=sites) as steer:
        assert same(forward(model), plain)
        with steer.rows([None, None]):
            assert same(forward(model), plain)
        with steer.rows([request, None]):
            edited = forward(model)
            assert not torch.equal(edited.logits[0], plain.logits[0])
            assert torch.equal(edited.logits[1], plain.logits[1])
        assert same(forward(model), plain)
    assert same(forward(model), plain)
    after = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    assert after == hooks


# ------------------------------------------------------------------------------------------- transcoders


def test_a_transcoder_reads_the_mlp_and_writes_what_it_adds(model: PreTrainedModel, tmp_path: Path) -> None:
    out = "blocks.1.hook_mlp_out"
    write_saelens(tmp_path, architecture="transcoder", d_in=HIDDEN, hook_name="blocks.1.mlp.hook_in", hook_name_out=out)
    sae = open_sae(tmp_path)
    norm, branch, _ = parts(model)
    plain_in, plain_out, now_in, now_out = [], [], [], []

    def watched(seen_in: list[Tensor]) -> Any:
        return hooked(norm, lambda y: seen_in.append(y.clone()), side="output")

    with watched(plain_in), hooked(branch[-1], lambda y: plain_out.append(y.clone()), side="output"):
        plain = forward(model)
    clamp = steering({"sae": "tc", "features": [3, 4], "op": "clamp", "value": [2.0, 5.0]})
    with (
        sae_steer.attach(model, {"tc": sae}) as steer,
        steer.rows([clamp, None]),
        watched(now_in),
        # Registered after the edit, so it sees what the edit leaves.
        hooked(branch[-1], lambda y: now_out.append(y.clone()), side="output"),
    ):
        edited = forward(model)
    assert torch.equal(now_in[0], plain_in[0])
    decoder = sae.raw()["W_dec"]
    for position in range(IDS.shape[1]):
        f = encode(sae, plain_in[0][0, position].double())
        shift = (2.0 - f[3]) * decoder[3] + (5.0 - f[4]) * decoder[4]
        expected = plain_out[0][0, position].double() + shift
        torch.testing.assert_close(now_out[0][0, position].double(), expected, atol=1e-3, rtol=1e-4)
    assert torch.equal(now_out[0][1], plain_out[0][1])
    assert torch.equal(edited.logits[1], plain.logits[1])
    changed(model, edited)


# ------------------------------------------------------------------------------------------- refusals


def test_models_of_unknown_families_are_refused_by_name() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, word_embed_proj_dim=16,
    )  # fmt: skip
    with pytest.raises(SiteError, match="'opt' have no table of places"):
        sae_steer.attach(OPTForCausalLM(config), {}, sites=["resid_post.0"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_without_its_head_is_steered_or_refused(family: str) -> None:
    model = tiny_model(family)
    with contextlib.suppress(SiteError):
        sae_steer.attach(model.base_model, {}, sites=["resid_post.0"]).close()


def test_layers_and_places_that_a_model_does_not_have(model: PreTrainedModel) -> None:
    for place in (f"resid_post.{LAYERS}", "z.99999"):
        with pytest.raises(SiteError, match=f"has layers 0 to {LAYERS - 1}"):
            sae_steer.attach(model, {}, sites=[place])
    for place in ("resid_post", "nowhere.1", "resid_post.01", "resid_post.-1", "resid_post.1.2", ""):
        with pytest.raises(SiteError):
            sae_steer.attach(model, {}, sites=[place])


def test_a_refused_start_leaves_no_hooks() -> None:
    model = tiny_model()
    before = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    with pytest.raises(SiteError):
        sae_steer.attach(model, {}, vectors={"v": direction()}, sites=["resid_post.0", f"resid_post.{LAYERS}"])
    after = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    assert after == before


def test_every_family_of_the_table_is_tried() -> None:
    assert set(families.FAMILIES) == set(NAMES)
