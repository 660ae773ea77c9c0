"""What the commands that run a model themselves have in common: the model, its SAEs, and the options that name them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_steer.errors import DataError, StartError
from sae_steer.sites import Site
from sae_steer_server.settings import DType

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sae_steer.calibration.data import Columns
    from sae_steer.sae import Sae

DEMO = "demo"


@dataclass(frozen=True, slots=True)
class NamedSae:
    """An opened SAE, its name in requests, and its place."""

    name: str
    sae: "Sae"
    site: Site


def location_of(model: str) -> str:
    """Where a model is: ``demo`` is the one that comes with the package."""
    if model != DEMO:
        return model
    from sae_steer import embedded

    return str(embedded.MODEL)


def load_model(
    model: str, dtype: DType = "auto", device: str = "auto"
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """A model in evaluation mode, and its tokenizer; raises :class:`StartError`."""
    import sys

    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from sae_steer.devices import named_device

    where = named_device(device)
    wanted: str | torch.dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    if not sys.stderr.isatty():
        disable_progress_bar()  # type: ignore[no-untyped-call]
    options: dict[str, Any] = {"trust_remote_code": False}
    try:
        place = location_of(model)
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        loaded = AutoModelForCausalLM.from_pretrained(place, dtype=wanted, use_safetensors=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StartError(f"The model {model!r} cannot be loaded: {reason}") from error
    loaded.to(where)  # type: ignore[arg-type]  # transformers' wrapper of Module.to hides its self
    loaded.train(False)
    return loaded, tokenizer


def load_sae(text: str | None, model: str) -> NamedSae:
    """An SAE by ``[NAME=]LOCATION[#REVISION][@SITE]``; None = the one of the embedded model.

    Raises:
        StartError: It cannot be opened, or nobody says where it belongs.
    """
    from sae_steer import embedded
    from sae_steer.sae.cached import open_served
    from sae_steer_server.settings import SaeSource

    if text is None:
        if model != DEMO:
            raise StartError("Name the SAE with --sae [NAME=]LOCATION[@SITE].")
        text = f"{embedded.SAE_NAME}={embedded.SAE}"
    named = "=" in text and not Path(text).exists()
    source = SaeSource.parse(text if named else f"sae={text}")
    sae = open_served(source.location, revision=source.revision)
    site = source.site or sae.spec.site
    if site is None:
        raise StartError(f"The files of SAE {text!r} do not say where it belongs. Give its site: {text}@resid_post.12.")
    return NamedSae(source.name, sae, site)


def columns_of(
    *,
    text: str,
    label: str | None,
    separator: str | None = None,
    names: Iterable[str] = (),
    only: Iterable[str] = (),
    span: str | None = None,
    word: str | None = None,
    constant: str = "",
) -> "Columns":
    """The columns that the options name; raises :class:`DataError` for one that is not of its form."""
    from sae_steer.calibration.data import Columns

    start, end = None, None
    if span is not None:
        start, comma, end = span.partition(",")
        if not (start and comma and end):
            raise DataError(f"--span-columns {span!r} is not START,END: the names of two columns.")
    if span is not None and word is not None:
        raise DataError("--span-columns and --word-column say the same thing twice. Give one.")
    return Columns(
        text=text,
        label=label,
        separator=separator,
        names=dict(_pair(item, "--label-name") for item in names),
        only=tuple(_pair(item, "--only") for item in only),
        start=start,
        end=end,
        word=word,
        constant=constant,
    )


def _pair(text: str, option: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not (left and equals and right):
        raise DataError(f"{option} {text!r} is not NAME=VALUE.")
    return left, right
