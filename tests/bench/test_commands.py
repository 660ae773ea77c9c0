"""The commands of ``--launch``, with the plugin and without it."""

import errno
import json
import os
import socket
import sys
import threading
from pathlib import Path

import pytest
from typer.core import TyperOption
from typer.main import get_command

from sae_steer import embedded
from sae_steer_bench.commands import DEMO_COMMAND, Command
from sae_steer_bench.errors import BenchError
from sae_steer_bench.launch import Launched, Port
from sae_steer_bench.run import Run
from sae_steer_cli.cli import app
from sae_steer_http.client import Unreachable
from tests.bench.conftest import options, silent


def test_vllm_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    command = Command.parse(
        "OMP_NUM_THREADS=1 vllm serve M --host 0.0.0.0 --port=8123 --additional-config '{\"a\": 1}'"
    )
    assert (command.host, command.port) == ("vllm", 8123)
    words, environment = command.with_plugin(8123, None)
    assert words[1:] == ["serve", "M", "--additional-config", '{"a": 1}', "--host", "127.0.0.1", "--port", "8123"]
    assert "sae_steer" in environment["VLLM_PLUGINS"].split(",")
    assert environment["OMP_NUM_THREADS"] == "1"
    words, environment = command.without_plugin(9000)
    assert words[-1] == "9000"
    assert "sae_steer" not in environment["VLLM_PLUGINS"].split(",")


def test_other_plugins_stay() -> None:
    command = Command.parse("VLLM_PLUGINS=mine,sae_steer vllm serve M")
    assert command.with_plugin(1, None)[1]["VLLM_PLUGINS"] == "mine,sae_steer"
    assert command.without_plugin(1)[1]["VLLM_PLUGINS"] == "mine"


def test_traces_are_asked_for(tmp_path: Path) -> None:
    words, _ = Command.parse("vllm serve M").with_plugin(1, tmp_path)
    config = json.loads(words[words.index("--profiler-config") + 1])
    assert (config["torch_profiler_dir"], config["max_iterations"]) == (str(tmp_path), 1)
    words, _ = Command.parse("sae-steer serve demo").with_plugin(1, tmp_path)
    assert words[words.index("--profile-dir") + 1] == str(tmp_path)


def test_the_embedded_server_without_is_the_model_alone() -> None:
    words, _ = Command.parse(f"{DEMO_COMMAND} --sae a=b --profiles=p --site resid_post.1").without_plugin(7)
    assert words[1:5] == ["serve", str(embedded.MODEL), "--served-model-name", "demo"]
    assert not [word for word in words if word.startswith(("--sae", "--profiles", "--site"))]
    assert words[words.index("--max-running") + 1] == "64"


def test_every_option_that_names_an_sae_is_taken_out() -> None:
    every = [option for option in get_command(app).commands["serve"].params if isinstance(option, TyperOption)]
    named = {option.opts[0] for option in every if "SAE" in f"{option.metavar} {option.help}"}
    assert named >= {"--sae", "--whole", "--topk-threshold", "--labels"}
    for option in named:
        words, _ = Command.parse(f"sae-steer serve demo --sae a=b {option} a=c").without_plugin(7)
        assert option not in words


@pytest.mark.parametrize(
    ("words", "share"),
    [
        ("", "no --gpu-memory-utilization"),
        ("--gpu-memory-utilization 0.92", "--gpu-memory-utilization 0.92"),
        ("--gpu_memory_utilization=0.51", "--gpu-memory-utilization 0.51"),
        ("--gpu-memory-utilization 0.4 --gpu-memory-utilization 0.9", "--gpu-memory-utilization 0.9"),
        ("--gpu-memory-utilization half", "--gpu-memory-utilization half"),
    ],
)
def test_two_servers_that_do_not_fit_on_a_gpu(words: str, share: str) -> None:
    command = Command.parse(f"vllm serve M {words}")
    command.require_room_for_two([])
    with pytest.raises(BenchError, match=r"fit on NVIDIA H200.*Add --gpu-memory-utilization 0\.45") as error:
        command.require_room_for_two(["NVIDIA H200, 143771 MiB"])
    assert f"the command names {share}. " in error.value.message


@pytest.mark.parametrize(
    "share",
    [
        "--gpu-memory-utilization 0.45",
        "--gpu-memory-utilization=.5",
        "--gpu_memory_utilization 0.3",
        "--gpu_memory_utilization=0.3",
    ],
)
def test_two_servers_that_fit_on_a_gpu(share: str) -> None:
    Command.parse(f"vllm serve M {share}").require_room_for_two(["NVIDIA H200, 143771 MiB"])
    Command.parse("sae-steer serve demo").require_room_for_two(["NVIDIA H200, 143771 MiB"])


def test_nothing_is_started_where_two_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    said: list[str] = []
    run = Run(options(tmp_path / "run", launch="vllm serve M"), silent(say=said.append))
    with pytest.raises(BenchError, match="do not both fit on NVIDIA H200, 143771 MiB"):
        run.measure(resume=False)
    assert said == []


def test_a_module_is_a_command_too() -> None:
    assert Command.parse(f"{sys.executable} -m sae_steer_cli serve demo").host == "transformers"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("docker run x", "--plain-url"),
        ("", "--plain-url"),
        ("vllm serve 'M", "No closing quotation"),
        ("/no/such/vllm serve M", "no program"),
        ("vllm serve M --port many", "not a number"),
        ("vllm serve M --api-key=sesame", "it may hold no key"),
        ("vllm serve M --api_key sesame", "it may hold no key"),
        ("vllm serve M --hf-token=sesame", "it may hold no key"),
        ("SAE_STEER_ADMIN_KEY=sesame sae-steer serve demo", "it may hold no key"),
        ("HF_TOKEN=sesame vllm serve M", "it may hold no key"),
    ],
)
def test_what_cannot_be_launched(text: str, said: str) -> None:
    with pytest.raises(BenchError) as error:
        Command.parse(text)
    assert said in error.value.message


def test_a_taken_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BenchError, match=f"port {port} of 127.0.0.1 is taken"):
            Port(port)


def test_a_port_is_kept_until_its_server_listens(tmp_path: Path) -> None:
    """Who asks for the port while the server is loading does not get it, and the server does."""
    go = tmp_path / "go"
    program = (
        "import http.server, pathlib, sys, time\n"
        "while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.02)\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200)\n"
        "        self.end_headers()\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()\n"
    )
    port = Port(None)
    argv = [sys.executable, "-c", program, str(port.number), str(go)]
    tried: list[OSError] = []

    def intrude() -> None:
        with socket.socket() as other:
            try:
                other.bind(("127.0.0.1", port.number))
            except OSError as error:
                tried.append(error)
        go.touch()

    timer = threading.Timer(0.2, intrude)
    timer.start()
    with Launched(argv, {}, port=port, log=tmp_path / "log", timeout=60) as server:
        timer.join()
        assert [error.errno for error in tried] == [errno.EADDRINUSE]
        assert server.ended() is None


DYING = """#!{python}
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler)
server.handle_request()
sys.exit("no memory is left")
"""


def test_a_server_that_is_ready_and_ends_says_why(tmp_path: Path) -> None:
    (tmp_path / "vllm").write_text(DYING.format(python=sys.executable))
    (tmp_path / "vllm").chmod(0o755)
    run = Run(options(tmp_path / "run", launch=f"{tmp_path}/vllm serve M", plain_url="http://127.0.0.1:9"), silent())
    with pytest.raises(Unreachable, match=r"(?s)cannot be reached.* ended with 1; its log, .*no memory is left"):
        run.measure(resume=False)


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "import sys; sys.exit('the model is not there')"]
    with pytest.raises(BenchError, match=r"ended with 1.*the model is not there"):
        Launched(program, {}, port=Port(None), log=tmp_path / "log", timeout=60)


def test_a_server_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(600)"]
    with pytest.raises(BenchError, match=r"not ready after 1 s.*loading"):
        Launched(program, {}, port=Port(None), log=tmp_path / "log", timeout=1)
