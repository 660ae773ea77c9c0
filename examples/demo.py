"""The demonstration: a served model answers one prompt plain, with a feature clamped, and with a feature ablated.

Starts `sae-steer serve demo` on a free local port, asks over its OpenAI-compatible API with the official client, prints
the three answers side by side with the features' activations, and stops the server.

    python examples/demo.py
"""

import argparse
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from openai import OpenAI

COLUMN = 36
START_SECONDS = 120


@contextmanager
def server() -> Iterator[str]:
    """Runs the embedded server; yields its address."""
    command = [sys.executable, "-m", "sae_steer_cli", "serve", "demo", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield wait_for(process)
    finally:
        process.terminate()
        process.communicate(timeout=30)


def wait_for(process: "subprocess.Popen[str]") -> str:
    """The address that the server prints once it listens, after its health check turned green."""
    assert process.stdout is not None
    deadline = time.monotonic() + START_SECONDS
    for line in process.stdout:
        found = re.search(r"http://[0-9.]+:[0-9]+", line)
        if found:
            url = found[0]
            while time.monotonic() < deadline:
                try:
                    if httpx.get(f"{url}/health").status_code == 200:
                        return url
                except httpx.TransportError:
                    time.sleep(0.1)
            break
    process.terminate()
    sys.exit(f"The server did not start:\n{process.communicate(timeout=30)[1]}")


def find(client: OpenAI, label: str) -> dict[str, Any]:
    """The feature of a label, from the server's own search."""
    found = client.get("/steering/features", cast_to=object, options={"params": {"sae": "embedded", "q": label}})
    entries: list[dict[str, Any]] = found["data"]  # type: ignore[index]
    if not entries:
        sys.exit(f"No feature is labelled {label!r}.")
    return entries[0]


def edit(feature: int, op: str, **more: Any) -> dict[str, Any]:
    return {"sae": "embedded", "features": [feature], "op": op, **more}


def watch(feature: int) -> dict[str, Any]:
    """An edit that changes nothing (times one), so that the answer reports the feature's activation."""
    return edit(feature, "scale", value=1.0)


def ask(client: OpenAI, model: str, prompt: str, tokens: int, interventions: list[dict[str, Any]]) -> Any:
    return client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=tokens,
        temperature=0,
        extra_body={"steering": {"interventions": interventions}} if interventions else None,
    )


def side_by_side(columns: list[tuple[str, str]]) -> str:
    """Texts under their titles, next to each other."""
    blocks = [[title, "-" * COLUMN, *textwrap.wrap(text, COLUMN)] for title, text in columns]
    height = max(len(block) for block in blocks)
    rows = zip(*(block + [""] * (height - len(block)) for block in blocks), strict=True)
    return "\n".join("  ".join(cell.ljust(COLUMN) for cell in row).rstrip() for row in rows)


def activation_table(answers: dict[str, Any], features: dict[int, str]) -> str:
    """Mean activation of each feature over each answer, before and after its edit."""
    lines = ["mean activation over the tokens".ljust(COLUMN) + "".join(name.rjust(22) for name in answers)]
    for number, label in features.items():
        cells = []
        for answer in answers.values():
            applied = answer.choices[0].model_extra["steering"]["applied"]
            entry = next(e for e in applied["features"] if e["feature"] == number)
            before, after = entry["mean_before"], entry["mean_after"]
            cells.append(f"{before:.2f}" if before == after else f"{before:.2f} -> {after:.2f}")
        lines.append(f"{label} (feature {number})".ljust(COLUMN) + "".join(cell.rjust(22) for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="Talk about food.")
    parser.add_argument("--clamp", default="the sea", help="label of the feature to clamp")
    parser.add_argument("--value", type=float, default=0.8, help="what to clamp it to, in multiples of its maximum")
    parser.add_argument("--ablate", default="food", help="label of the feature to ablate")
    parser.add_argument("--tokens", type=int, default=48, help="the longest answer, in tokens")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    started = time.monotonic()
    with server() as url:
        print(f"serving the embedded model at {url} after {time.monotonic() - started:.1f} s\n")
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        model = client.models.list().data[0].id
        clamped, ablated = find(client, options.clamp), find(client, options.ablate)
        up, down = clamped["feature"], ablated["feature"]
        plain = ask(client, model, options.prompt, options.tokens, [])
        answers = {
            "plain": ask(client, model, options.prompt, options.tokens, [watch(up), watch(down)]),
            f"{clamped['label']} clamped": ask(
                client,
                model,
                options.prompt,
                options.tokens,
                [edit(up, "clamp", value=options.value, units="reference_max"), watch(down)],
            ),
            f"{ablated['label']} ablated": ask(
                client, model, options.prompt, options.tokens, [watch(up), edit(down, "ablate")]
            ),
        }
    texts = [answer.choices[0].message.content.strip() for answer in answers.values()]
    if texts[0] != plain.choices[0].message.content.strip():
        sys.exit("Watching a feature changed the plain answer: this must not happen.")
    if len(set(texts)) != len(texts):
        sys.exit("An edit did not change the answer: this must not happen.")
    print(f"prompt: {options.prompt}\n")
    print(side_by_side(list(zip(answers, texts, strict=True))))
    print()
    print(activation_table(answers, {up: clamped["label"], down: ablated["label"]}))


if __name__ == "__main__":
    main()
