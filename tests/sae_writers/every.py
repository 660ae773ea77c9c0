"""Every family's synthetic checkpoint, at the width that a model has."""

from collections.abc import Callable
from pathlib import Path

from sae_steer.sae import open_sae
from sae_steer.sae.convert import convert
from tests.sae_files import write_saelens
from tests.sae_writers.deepseek_r1 import write_deepseek_r1
from tests.sae_writers.dictionary_learning import write_dictionary_learning
from tests.sae_writers.gemma import write_scope, write_scope_2
from tests.sae_writers.goodfire import write_goodfire
from tests.sae_writers.layer_transcoders import write_layer_transcoder
from tests.sae_writers.openai_gpt2 import write_openai
from tests.sae_writers.openmoss import write_llama_scope, write_openmoss
from tests.sae_writers.prisma import write_prisma
from tests.sae_writers.qwen_scope import write_qwen_scope
from tests.sae_writers.sdxl_unbox import write_sdxl_unbox
from tests.sae_writers.sparsify import write_sparsify

_SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")


def _canonical(folder: Path, width: int) -> None:
    write_saelens(folder / "source", d_in=width)
    convert(open_sae(folder / "source"), folder / "made")


def _by(write: Callable[..., object]) -> Callable[[Path, int], object]:
    return lambda folder, width: write(folder, d_in=width)


WRITERS: dict[str, Callable[[Path, int], object]] = {
    "canonical": _canonical,
    "deepseek_r1": _by(write_deepseek_r1),
    "dictionary_learning": _by(write_dictionary_learning),
    "gemma_scope": _by(write_scope),
    "gemma_scope_2": _by(write_scope_2),
    "goodfire": _by(write_goodfire),
    "layer_transcoders": lambda folder, width: write_layer_transcoder(folder, d_in=width, d_out=width),
    "llama_scope": _by(write_llama_scope),
    "openai_gpt2": _by(write_openai),
    "openmoss": _by(write_openmoss),
    "prisma": _by(write_prisma),
    "qwen_scope": _by(write_qwen_scope),
    "saelens": _by(write_saelens),
    "sdxl_unbox": _by(write_sdxl_unbox),
    "sparsify": _by(write_sparsify),
}


def written(folder: Path, family: str, width: int) -> Path:
    """Writes a family's checkpoint for a model of that width; returns what ``open_sae`` is to be given."""
    WRITERS[family](folder, width)
    if family == "canonical":
        return folder / "made"
    file = next(file for file in sorted(folder.rglob("*")) if file.suffix in _SUFFIXES)
    return file.parent.parent if family == "llama_scope" else file.parent
