"""Two requests with different programs in flight at once, with the official `openai` client.

Start a server first, then run this against it:

    sae-steer serve demo --port 8000
    python examples/openai_client.py --base-url http://127.0.0.1:8000/v1
"""

import argparse
import asyncio
import os
from typing import Any

from openai import AsyncOpenAI


async def ask(client: AsyncOpenAI, model: str, prompt: str, steering: dict[str, Any] | None) -> str:
    """One answer. `steering` rides in `extra_body`; everything else is an ordinary request."""
    reply = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=40,
        temperature=0,
        extra_body={"steering": steering} if steering else None,
    )
    return reply.choices[0].message.content or ""


async def feature(client: AsyncOpenAI, sae: str, label: str) -> int:
    """Finds a feature by its label, over the server's own search."""
    found = await client.get("/steering/features", cast_to=object, options={"params": {"sae": sae, "q": label}})
    return int(found["data"][0]["feature"])  # type: ignore[index]


async def run(base_url: str, prompt: str) -> None:
    client = AsyncOpenAI(base_url=base_url, api_key=os.environ.get("SAE_STEER_API_KEY", "none"))
    model = (await client.models.list()).data[0].id
    sea, music = await asyncio.gather(*(feature(client, "embedded", label) for label in ("the sea", "music")))
    programs = {
        name: {
            "interventions": [
                {"sae": "embedded", "features": [number], "op": "clamp", "value": 0.8, "units": "reference_max"}
            ]
        }
        for name, number in (("the sea", sea), ("music", music))
    }
    answers = await asyncio.gather(*(ask(client, model, prompt, program) for program in programs.values()))
    for name, answer in zip(programs, answers, strict=True):
        print(f"--- {name}\n{answer.strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--prompt", default="Tell me something.")
    options = parser.parse_args()
    asyncio.run(run(options.base_url, options.prompt))


if __name__ == "__main__":
    main()
