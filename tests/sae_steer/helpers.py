"""What the tests of the core share: a small catalog, tiny models, and strategies for ``steering`` documents."""

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import strategies as st
from transformers import PreTrainedModel

from sae_steer.capabilities import IN_PROCESS, Capabilities
from sae_steer.catalog import Catalog, CatalogSae, Vector
from sae_steer.compiler import compile_program
from sae_steer.errors import RequestError
from sae_steer.limits import Limits
from sae_steer.program import Program
from sae_steer.sae import open_sae
from sae_steer.schema import parse_steering
from sae_steer.sites import Site
from tests.calibrations import made_up, write_calibration
from tests.sae_files import write_labels, write_saelens

WIDTH = 16
FEATURES = 32
BOS = 1
CONCEPTS = ("rude", "sad", "calm")
MODEL = "sha256:the model"
SITES = tuple(Site.parse(s) for s in ("resid_post.0", "resid_mid.1", "resid_post.1", "mlp_in.2->mlp_out.2"))

Json = dict[str, Any]


def make_catalog(root: Path, *, width: int = WIDTH, profiles: bool = True) -> Catalog:
    """SAEs ``r0`` at resid_post.0; ``r1``, its twin, ``r1b``, ``tk`` and the whole ``tkw``, ``w1`` at resid_post.1;
    the transcoder ``tc``; vectors ``v`` and ``u``; calibrations ``cal`` and ``cal2`` of r1,
    ``cal0`` of r0."""
    here = "blocks.1.hook_resid_post"
    common: Json = {"d_in": width, "n_features": FEATURES}
    write_saelens(root / "r0", hook_name="blocks.0.hook_resid_post", seed=10, **common)
    write_saelens(root / "r1", hook_name=here, seed=11, **common)
    write_saelens(root / "r1b", hook_name=here, seed=12, architecture="gated", **common)
    write_saelens(root / "tk", hook_name=here, seed=13, architecture="topk", **common)
    write_saelens(root / "tkw", hook_name=here, seed=14, architecture="topk", **common)
    write_saelens(root / "w1", hook_name=here, seed=15, **common)
    write_saelens(root / "tc", architecture="transcoder", seed=16, **common)
    write_labels(root / "r1", {3: ("three", 5.0), 4: ("four", 2.5), 5: ("no maximum", None)})
    names = {"r0": "r0", "r1": "r1", "twin": "r1", "r1b": "r1b", "tk": "tk", "tkw": "tkw", "w1": "w1", "tc": "tc"}
    saes = [
        CatalogSae.make(name, open_sae(root / folder), whole=name in ("tkw", "w1")) for name, folder in names.items()
    ]
    generator = torch.Generator().manual_seed(3)
    vectors = [Vector.make(name, torch.randn(width, generator=generator)) for name in ("v", "u")]
    if not profiles:
        return Catalog(saes, vectors)
    by_name = {entry.name: entry for entry in saes}
    for name, sae, features in (("cal", "r1", range(3, 12)), ("cal2", "r1", range(3, 12)), ("cal0", "r0", range(6))):
        record = made_up(list(features), len(CONCEPTS), seed=sum(map(ord, name)))
        write_calibration(root / "profiles", name, by_name[sae], record, labels=CONCEPTS, model=MODEL)
    return Catalog(saes, vectors, root / "profiles", model=MODEL)


def compile_doc(
    document: Json,
    catalog: Catalog,
    *,
    capabilities: Capabilities = IN_PROCESS,
    limits: Limits | None = None,
    sites: Sequence[Site] = SITES,
    bos: int | None = BOS,
) -> Program | None:
    return compile_program(
        parse_steering(document), catalog, capabilities, limits or Limits(), sites=sites, bos_token_id=bos
    )


def refused_doc(document: Json, catalog: Catalog, **kwargs: Any) -> RequestError:
    """Why a document is refused; it must be."""
    with pytest.raises(RequestError) as caught:
        compile_doc(document, catalog, **kwargs)
    return caught.value


def program(*interventions: Json, catalog: Catalog, limits: Limits | None = None, **fields: Any) -> Program:
    """The program of some interventions; there must be one."""
    compiled = compile_doc(steering(*interventions, **fields), catalog, limits=limits)
    assert compiled is not None
    return compiled


def steering(*interventions: Json, **fields: Any) -> Json:
    return {"interventions": list(interventions), **fields}


def edit(**fields: Any) -> Json:
    """A clamp of one feature, with some fields replaced; a value of None leaves the field out."""
    document: Json = {"sae": "r1", "features": [3], "op": "clamp", "value": 2.0} | fields
    return {key: value for key, value in document.items() if value is not None}


def vector_edit(**fields: Any) -> Json:
    document: Json = {"site": "resid_post.1", "vector": "v", "op": "add", "value": 2.0} | fields
    return {key: value for key, value in document.items() if value is not None}


# ------------------------------------------------------------------------------------------- documents

names = st.builds(
    str.__add__,
    st.sampled_from(string.ascii_letters + string.digits),
    st.text(string.ascii_letters + string.digits + "_.-", max_size=20),
)
concepts = st.tuples(names, names)
numbers = st.integers(-(10**12), 10**12) | st.floats(-1e12, 1e12)
indices = st.integers(0, 2**31 - 1)
site_names = st.sampled_from(["resid_post.1", "nowhere", "z.3"])


def _with_some(required: Json, optional: Json) -> st.SearchStrategy[Json]:
    return st.fixed_dictionaries(required, optional=optional)


def _ranges() -> st.SearchStrategy[Json]:
    pair = st.tuples(st.integers(0, 40), st.integers(1, 20)).map(lambda t: [t[0], t[0] + t[1]])
    return st.fixed_dictionaries({"ranges": st.lists(pair, min_size=1, max_size=4)})


positions = st.sampled_from(["all", "prompt", "completion"]) | _ranges()


@st.composite
def _when(draw: st.DrawFn, saes: st.SearchStrategy[str], features: st.SearchStrategy[int]) -> Json:
    gate: Json = {}
    by_feature = draw(st.booleans())
    if by_feature:
        gate |= {"sae": draw(saes), "feature": draw(features)}
        sides = draw(st.sampled_from([["above"], ["below"], ["above", "below"]]))
        gate |= {side: draw(numbers) for side in sides}
    if not by_feature or draw(st.booleans()):
        gate["token_in"] = draw(st.lists(indices, min_size=1, max_size=4))
    return gate


@st.composite
def interventions(
    draw: st.DrawFn,
    saes: st.SearchStrategy[str] = names,
    vectors: st.SearchStrategy[str] = names,
    sites: st.SearchStrategy[str] = site_names,
    features: st.SearchStrategy[int] = indices,
    calibrations: st.SearchStrategy[tuple[str, str]] = concepts,
) -> Json:
    """One well-formed intervention of any kind."""
    common: Json = {"when": _when(saes, features), "positions": positions, "skip_bos": st.booleans()}
    kinds = ["value", "scale", "ablate", "mask", "vector-value", "vector-scale", "vector-ablate"]
    kind = draw(st.sampled_from([*kinds, "app", "calibrated"]))
    many: Json = {"sae": saes, "features": st.lists(features, min_size=1, max_size=4)}
    calibration, concept = draw(calibrations)
    which: Json = {"sae": saes, "calibration": st.just(calibration), "concept": st.just(concept)}
    by: Json = {"top": st.integers(1, 4)}
    along: Json = {"site": sites, "vector": vectors}
    match kind:
        case "value":
            ops = st.sampled_from(["clamp", "add", "floor", "cap"])
            units = st.sampled_from(["raw", "reference_max", "residual_norm"])
            value = numbers | st.lists(numbers, min_size=1, max_size=4)
            return draw(_with_some({"op": ops, "value": value, **many}, {"units": units, **common}))
        case "scale":
            return draw(_with_some({"op": st.sampled_from(["scale", "gain"]), "value": numbers, **many}, common))
        case "ablate":
            return draw(_with_some({"op": st.just("ablate"), **many}, common))
        case "mask":
            lo, hi = sorted(draw(st.tuples(numbers, numbers)))
            return draw(_with_some({"op": st.just("mask_range"), "lo": st.just(lo), "hi": st.just(hi), **many}, common))
        case "app":
            strength = st.floats(0, 1000)
            prior = st.sampled_from(["uniform", "target", "empirical"])
            more: Json = {"strength": strength, "prior": prior, **by, **common}
            return draw(_with_some({"op": st.just("app"), **which}, more))
        case "calibrated":
            op, own = draw(
                st.sampled_from(
                    [("ablate", {}), ("gain", {"value": numbers}), ("mask_range", {"sigmas": st.floats(0, 9)})]
                )
            )
            return draw(_with_some({"op": st.just(op), **which}, {**own, **by, **common}))
        case "vector-value":
            ops = st.sampled_from(["add", "clamp", "floor", "cap"])
            units = st.sampled_from(["raw", "residual_norm"])
            return draw(_with_some({"op": ops, "value": numbers, **along}, {"units": units, **common}))
        case "vector-scale":
            return draw(_with_some({"op": st.just("scale"), "value": numbers, **along}, common))
        case _:
            return draw(_with_some({"op": st.just("ablate"), **along}, common))


@st.composite
def documents(draw: st.DrawFn, **pools: Any) -> Json:
    """A well-formed ``steering`` field; ``pools`` are the arguments of :func:`interventions`."""
    saes: st.SearchStrategy[str] = pools.get("saes", names)
    features: st.SearchStrategy[int] = pools.get("features", indices)
    how: Json = {"positions": positions, "at": st.sampled_from(["before", "after"]), "per_token": st.booleans()}
    named = _with_some(
        {"sae": saes, "features": st.lists(features, min_size=1, max_size=3, unique=True)},
        how | {"top_k": st.integers(0, 128)},
    )
    largest = _with_some({"sae": saes, "top_k": st.integers(1, 128)}, how | {"features": st.just([])})
    reading = named | largest
    readings = reading | st.lists(reading, min_size=1, max_size=3)
    trigger = st.fixed_dictionaries(
        {"sae": saes, "feature": features, "above": numbers, "action": st.sampled_from(["stop", "flag"])}
    )
    dose = _with_some({"limit": st.floats(0, 1e6, exclude_min=True)}, {"on_dose": st.sampled_from(["fail", "scale"])})
    return draw(
        _with_some(
            {},
            {
                "profiles": st.lists(names, max_size=2),
                "interventions": st.lists(interventions(**pools), max_size=4),
                "override": st.booleans(),
                "error": st.sampled_from(["keep", "drop"]),
                "dose": dose,
                "readings": readings,
                "on": st.lists(trigger, max_size=2),
            },
        )
    )


def reversed_keys(value: Any) -> Any:
    """The same JSON value with the keys of every object in the opposite order."""
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return [reversed_keys(item) for item in value] if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------- models

HIDDEN = 32
LAYERS = 3
VOCABULARY = 64
_SIZES: Json = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": BOS,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WINDOW: Json = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# Heads wider than their share where the family allows it, so that z is not as wide as the residual stream.
CONFIGS: dict[str, tuple[str, Json]] = {
    "llama": ("LlamaConfig", _SIZES),
    "mistral": ("MistralConfig", _SIZES | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", _SIZES),
    "qwen3": ("Qwen3Config", _SIZES | {"head_dim": 16}),
    "gemma": ("GemmaConfig", _SIZES | {"head_dim": 16}),
    "gemma2": ("Gemma2Config", _SIZES | _WINDOW | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("Gemma3TextConfig", _SIZES | _WINDOW | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3Config", _SIZES),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": 128,
            "bos_token_id": BOS,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}),
}


def tiny_model(family: str = "llama", **fields: Any) -> PreTrainedModel:
    """A random model of a family, with weights large enough that every edit shows in its logits."""
    name, sizes = CONFIGS[family]
    torch.manual_seed(7)
    config = getattr(transformers, name)(**sizes, **fields)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
            elif "norm" in key or "ln_" in key:  # gains that are not all alike
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
