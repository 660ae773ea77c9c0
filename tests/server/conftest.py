"""A real server: a tiny random Llama and a synthetic SAE, behind uvicorn on a free port of 127.0.0.1."""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import structlog
import torch
from openai import OpenAI
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sae_steer.limits import Limits
from sae_steer_server.load import load
from sae_steer_server.serve import make_server
from sae_steer_server.settings import SaeSource, Settings, VectorSource
from sae_steer_server.sockets import bind, url_of
from tests.sae_files import write_saelens

WIDTH = 64
CONTEXT = 512
FEATURES = 32
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'developer' %}{{ raise_exception('this model knows no developer') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and a beginning of sequence. No end: with a random model, lengths would mean nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0} | {symbol: i + 1 for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", chat_template=TEMPLATE, model_max_length=CONTEXT
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, with a byte tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic SAE of the model's last layer, with two labels."""
    folder = tmp_path_factory.mktemp("saes") / "relu"
    write_saelens(
        folder, architecture="standard", d_in=WIDTH, n_features=FEATURES, hook_name="blocks.1.hook_resid_post"
    )
    labels = {"3": {"label": "the sea", "reference_max": 2.0}, "5": {"label": "a ship", "reference_max": None}}
    (folder / "features.json").write_text(json.dumps({"features": labels}))
    return folder


@pytest.fixture(scope="session")
def vector_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain direction."""
    path = tmp_path_factory.mktemp("vectors") / "honest.safetensors"
    save_file({"direction": torch.linspace(-1, 1, WIDTH)}, path)
    return path


@pytest.fixture(scope="session")
def base_settings(model_folder: Path, sae_folder: Path, vector_file: Path) -> Settings:
    """Settings of a small server; tests replace what they are about."""
    return Settings(
        model=str(model_folder),
        saes=(SaeSource("last", str(sae_folder)),),
        vectors=(VectorSource("honest", vector_file),),
        device="cpu",
        port=0,
        limits=Limits(max_programs=2, rows=8, wide_programs=1, wide_rows=16, max_edits=12),
        max_running=4,
        max_concurrent=6,
        max_body_bytes=16384,
        kv_tokens=2048,
        shutdown_grace=0.2,
    )


# One line for each of thousands of requests would bury a failure's own output.
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))


class Served:
    """A server that runs in a thread of this process."""

    def __init__(self, settings: Settings) -> None:
        self.state = load(settings)
        self._socket = bind(settings.host, settings.port)
        self.url = url_of(self._socket)
        self.port = self._socket.getsockname()[1]
        self._ready = threading.Event()
        self._server = make_server(self.state, self._ready.set)
        self._thread = threading.Thread(target=lambda: self._server.run(sockets=[self._socket]), name="server")
        self._thread.start()
        assert self._ready.wait(60)

    def http(self, **options: object) -> httpx.Client:
        """A plain client of it."""
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def openai(self, api_key: str = "unused") -> OpenAI:
        """The official client of it."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, timeout=60, max_retries=0)

    def begin_to_stop(self) -> None:
        """What a signal does."""
        self._server.should_exit = True

    def stop(self) -> None:
        """Ends it and waits for its end."""
        self.begin_to_stop()
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._socket.close()


Serve = Callable[..., "contextmanager[Served]"]


@pytest.fixture(scope="session")
def serve(base_settings: Settings) -> Serve:
    """Starts a server with some settings replaced, for as long as a ``with`` block lasts."""

    @contextmanager
    def start(**changes: object) -> Iterator[Served]:
        served = Served(replace(base_settings, **changes))
        try:
            yield served
        finally:
            served.stop()

    return start


@pytest.fixture(scope="module")
def served(serve: Serve) -> Iterator[Served]:
    """One server for the tests of a module, without keys."""
    with serve() as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    """A plain client of the module's server."""
    with served.http() as http:
        yield http
