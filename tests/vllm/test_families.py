"""The table of places, family by family: engines with vLLM's own classes against transformers of equal weights."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from sae_steer import families as core_families
from sae_steer.errors import SiteError
from sae_steer.sites import Kind, Place, Site
from sae_steer_vllm import families
from sae_steer_vllm.hooks import install
from tests.sae_files import write_saelens
from tests.vllm.engine_script import Answer, Ask, EngineFailed, generate, hosted, start_llm
from tests.vllm.tiny_models import (
    CONFIGS,
    HIDDEN,
    LAYERS,
    VOCABULARY,
    Expected,
    Json,
    expected,
    graph_key,
    make_model,
    quantize,
    write_saes,
)

PROMPT = [1, 17, 133, 4, 9, 60, 201]
TOKENS = 8
FEATURES = [3, 4, 9]
SHAPES = ["LlamaForCausalLM", "GPT2LMHeadModel", "Gemma2ForCausalLM"]
"""The residual stream in two parts, in one, and norms behind attention and MLP."""
OPTIONS: Json = {"skip_tokenizer_init": True, "max_model_len": 64}


def ask(*interventions: Json) -> Json:
    return {"interventions": list(interventions)}


def clamp(sae: str) -> Json:
    return {"sae": sae, "features": FEATURES, "op": "clamp", "value": 8.0}


def requests_of(saes: dict[str, Path]) -> list[Json | None]:
    """One that asks nothing, one for each SAE alone, and one for all of them together."""
    together = [
        {"sae": sae, "features": FEATURES, "op": "add", "value": 2.0, "positions": "completion"} for sae in saes
    ]
    return [None, *(ask(clamp(sae)) for sae in saes), ask(*together)]


def answers(
    model: Path,
    saes: dict[str, Path],
    requests: list[Json | None],
    folder: Path,
    *,
    tokens: int = TOKENS,
    **options: Any,
) -> list[Answer]:
    """What an engine answers, all in one batch."""
    config = {"saes": [{"name": name, "location": str(path)} for name, path in saes.items()]}
    asked = [Ask(PROMPT, request, {"max_tokens": tokens, "detokenize": False}) for request in requests]
    with hosted(folder, start_llm, config, OPTIONS | {"model": str(model)} | options) as host:
        return [answer for (answer,) in host.run(generate, asked)]


def alike(have: Any, want: Any, tolerance: float) -> bool:
    """Whether two ``applied`` blocks are the same, numbers that are not whole up to a tolerance."""
    if isinstance(want, dict):
        return have.keys() == want.keys() and all(alike(have[key], want[key], tolerance) for key in want)
    if isinstance(want, list):
        return len(have) == len(want) and all(alike(a, b, tolerance) for a, b in zip(have, want, strict=True))
    if isinstance(want, float):
        return bool(have == pytest.approx(want, rel=tolerance, abs=tolerance))
    return bool(have == want)


def compare(have: list[Answer], want: list[Expected], tolerance: float = 1e-4) -> None:
    """The largest difference seen in float32 was 3e-5."""
    assert [answer.tokens for answer in have] == [answer.tokens for answer in want]
    for one, other in zip(have, want, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, rel=tolerance, abs=10 * tolerance)
        assert alike(one.applied, other.applied, tolerance), (one.applied, other.applied)
    plain, *steered = have
    assert plain.block is None
    assert all(answer.tokens != plain.tokens for answer in steered)


def check(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Every place of a family is edited in an engine as it is in transformers' model."""
    model = make_model(name)
    model.save_pretrained(folder / "model")
    saes = write_saes(folder / "saes", model)
    requests = requests_of(saes)
    have = answers(folder / "model", saes, requests, folder, **options)
    # The embedded server has no mixtures of experts; their places are where Llama's are.
    row = core_families.FAMILIES.get(model.config.model_type, core_families.FAMILIES["llama"])
    monkeypatch.setattr(core_families, "FAMILIES", {model.config.model_type: row})
    compare(have, expected(model, saes, requests, prompt=PROMPT, tokens=TOKENS))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SHAPES else [pytest.mark.slow]) for name in CONFIGS]
)
def test_every_place_is_edited_as_in_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(name, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_every_place_is_edited_in_compiled_graphs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(name, tmp_path, monkeypatch, enforce_eager=False)


@pytest.mark.slow
def test_quantized_weights_beside_a_residual_stream_in_full_precision(tmp_path: Path) -> None:
    model = make_model("LlamaForCausalLM", seed=7)
    quantize(model, tmp_path / "model")
    saes = write_saes(tmp_path / "saes", model)
    requests = requests_of(saes)
    have = answers(tmp_path / "model", saes, requests, tmp_path, tokens=4)
    # A number between two that 8 bits have may go either way, and did: 3e-3 of a log-probability.
    compare(have, expected(model, saes, requests, prompt=PROMPT, tokens=4, closest=2e-2), tolerance=1e-3)


@pytest.mark.slow
def test_graphs_of_other_sites_are_kept_under_another_key(tmp_path: Path) -> None:
    """Also where the configuration is the same, and the files that it names state another site."""
    make_model("LlamaForCausalLM").save_pretrained(tmp_path / "model")
    config = {"saes": [{"name": "sae", "location": str(tmp_path / "sae")}]}
    keys = []
    for layer in (0, 1, 1):
        write_saelens(tmp_path / "sae", d_in=HIDDEN, hook_name=f"blocks.{layer}.hook_resid_post")
        with hosted(tmp_path, start_llm, config, OPTIONS | {"model": str(tmp_path / "model")}) as host:
            keys.append(host.run(graph_key))
    assert keys[0] != keys[1] == keys[2]


# ------------------------------------------------------------------------------------------- refusals


class GPTNeoXForCausalLM(nn.Module):
    """Stands for a class that is not in the table."""


class Layer(nn.Module):
    """Has no submodules."""


class MistralForCausalLM(nn.Module):
    """Stands for a class of the table whose layers are not what they were."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer() for _ in range(LAYERS))


def test_a_class_that_is_not_in_the_table_is_refused_by_name() -> None:
    with pytest.raises(SiteError, match=r"vLLM's GPTNeoXForCausalLM has no table of places yet\. Known: Llama"):
        families.family_of(GPTNeoXForCausalLM())


def test_layers_and_places_that_a_model_does_not_have_are_refused() -> None:
    model = MistralForCausalLM()
    with pytest.raises(SiteError, match=r"no resid_post\.3: the model has layers 0 to 2"):
        families.locate(model, Place(Kind.RESID_POST, LAYERS))
    with pytest.raises(SiteError, match=r"mlp_out\.1: this layer of vLLM's MistralForCausalLM has no 'mlp'"):
        families.locate(model, Place(Kind.MLP_OUT, 1))
    with pytest.raises(SiteError, match="Layer has no argument 'hidden_states'"):
        install(model, Site.parse("resid_pre.1"), "name")


@pytest.mark.slow
def test_an_engine_of_an_unknown_architecture_does_not_start(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=HIDDEN,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path / "model")
    write_saelens(tmp_path / "sae", d_in=HIDDEN, hook_name="blocks.0.hook_resid_post")
    with pytest.raises(EngineFailed, match="SiteError: vLLM's OPTForCausalLM has no table of places yet"):
        answers(tmp_path / "model", {"sae": tmp_path / "sae"}, [], tmp_path)


def test_every_family_of_the_table_is_tried() -> None:
    assert set(families.FAMILIES) == set(CONFIGS)
