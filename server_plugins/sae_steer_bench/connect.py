"""The servers of a run: launched or there already, asked what they are, and given the key that they know."""

import secrets
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from sae_steer_bench import load_vllm
from sae_steer_bench.cases import Cases
from sae_steer_bench.commands import DEMO_COMMAND, Command
from sae_steer_bench.errors import BenchError
from sae_steer_bench.launch import Launched, Port
from sae_steer_bench.load import Address, Generator
from sae_steer_bench.load_openai import OpenAILoad
from sae_steer_bench.load_vllm import VllmLoad
from sae_steer_bench.machine import gpus
from sae_steer_bench.options import Options
from sae_steer_bench.records import Launch, ServerFacts
from sae_steer_bench.target import facts_of, model_of, require_plain
from sae_steer_http.client import Server


@dataclass(frozen=True, slots=True)
class Source:
    """Where servers come from.

    Args:
        url: One that is there.
        launch: A command that starts one.
        plain_url: One without the plugin that is there.
    """

    url: str | None
    launch: Launch | None
    plain_url: str | None

    @classmethod
    def of(cls, options: Options) -> "Source":
        """What the command line names; the demonstration where it names nothing."""
        if options.url is not None:
            return cls(options.url, None, options.plain_url)
        command = options.launch or DEMO_COMMAND
        return cls(None, Launch(command=command, plain=options.plain_url is None), options.plain_url)


@dataclass(frozen=True, slots=True)
class Servers:
    """The servers of a run.

    Args:
        steered: The server under test.
        plain: The same without the plugin; None = there is none.
        facts: What the first is.
        api_key: Their Bearer key.
        admin_key: Key of what changes their state.
        launched: Those that the run started.
        timeout: Seconds that an answer may take.
    """

    steered: Address
    plain: Address | None
    facts: ServerFacts
    api_key: str | None = field(repr=False)
    admin_key: str | None = field(repr=False)
    launched: Sequence[Launched]
    timeout: float

    def client(self) -> closing[Server]:
        """A client of the server under test."""
        return closing(Server(self.steered.url, self.api_key, self.timeout))


def connect(
    stack: ExitStack,
    options: Options,
    source: Source,
    model: str | None,
    launched: list[Launched],
    say: Callable[[str], None],
) -> Servers:
    """Starts what is to be started, ended with ``stack``, and asks the server what it is.

    Args:
        stack: Ends what is started.
        options: Of the run.
        source: Where servers come from.
        model: The model to ask; None = the first that is listed.
        launched: Gets those that are started, for whoever wants to know how one ended.
        say: Is told what is started.

    Raises:
        BenchError: A server does not start, or is none that can be measured.
        Unreachable: It is not there.
    """
    url, plain_url, admin_key = source.url, source.plain_url, options.admin_key
    if source.launch is not None:
        admin_key = admin_key or secrets.token_hex(16)
        _launch(stack, options, source.launch, admin_key, launched, say)
        url = launched[0].url
        plain_url = launched[1].url if source.launch.plain else plain_url
    assert url is not None  # a source has the one or the other
    key = options.api_key
    with closing(Server(url, key, options.timeout)) as server:
        facts = facts_of(server, model)
        steered = Address(server.url, facts.model)
    plain = None
    if plain_url is not None:
        with closing(Server(plain_url, key, options.timeout)) as server:
            plain = Address(server.url, model_of(server, facts.model))
            require_plain(server)
    return Servers(steered, plain, facts, key, admin_key, launched, options.timeout)


def _launch(
    stack: ExitStack,
    options: Options,
    launch: Launch,
    admin_key: str,
    launched: list[Launched],
    say: Callable[[str], None],
) -> None:
    """The server under test, and where it is wanted the one without the plugin; one after the other."""
    command = Command.parse(launch.command)
    if launch.plain:
        command.require_room_for_two(gpus())
    traces = (options.folder / "profile").resolve() if options.profile else None
    keys = {"SAE_STEER_ADMIN_KEY": admin_key}
    if options.api_key:
        keys["VLLM_API_KEY" if command.host == "vllm" else "SAE_STEER_API_KEY"] = options.api_key

    def start(argv: list[str], environment: dict[str, str], port: Port, log: Path, what: str) -> None:
        say(f"starting {what} (its log: {log})")
        server = Launched(argv, {**environment, **keys}, port=port, log=log, timeout=options.start_timeout)
        launched.append(stack.enter_context(server))

    port = Port(command.port)
    start(*command.with_plugin(port.number, traces), port, options.folder / "server.log", "the server")
    if launch.plain:
        port = Port(None)
        log = options.folder / "plain.log"
        start(*command.without_plugin(port.number), port, log, "the same without the plugin")


def generator(servers: Servers, options: Options, say: Callable[[str], None]) -> Generator:
    """Who sends requests: whom the options name, or for vLLM ``vllm`` where that is installed here, else ``openai``.

    Nobody who lets a server be launched has made a folder for profiles for this: where it stores none, ``openai``
    sends requests to it, unless ``vllm`` was named.

    Raises:
        BenchError: It cannot.
    """
    name = options.generator
    if name is None:
        name = "vllm" if servers.facts.host == "vllm" and load_vllm.command() is not None else "openai"
    if name == "openai":
        return OpenAILoad(servers.api_key, servers.timeout)
    if servers.facts.host != "vllm":
        raise BenchError(
            "vllm bench serve sends fields that only vLLM knows, and this server refuses them. Use --generator openai."
        )
    tokenizer = options.tokenizer or _tokenizer(servers)
    sender = VllmLoad(tokenizer, servers.api_key, servers.admin_key, servers.timeout)
    if options.generator is None and servers.launched:
        program = Cases(servers.facts, options.concurrency, options.value).program()
        obstacle = sender.obstacle(servers.steered, (None, program))
        if obstacle is not None:
            say(f"the openai client sends the requests: {obstacle}")
            return OpenAILoad(servers.api_key, servers.timeout)
    return sender


def _tokenizer(servers: Servers) -> str:
    """Where the model came from, as vLLM lists it: its tokenizer is there."""
    with servers.client() as client:
        entries = client.get("/v1/models")["data"]
    root = next((entry.get("root") for entry in entries if entry["id"] == servers.steered.model), None)
    if not root:
        raise BenchError(f"{servers.steered.url} does not say where its tokenizer is. Name it with --tokenizer.")
    return str(root)
