"""A steered vLLM server and any OpenAI client: whole answers, streams, and a profile as a model.

The README has the line that starts the server. Then:

python examples/vllm_http.py --base-url http://127.0.0.1:8000/v1
"""

import argparse

from openai import OpenAI

MUSIC = 103  # a feature of the dictionary that ships with the package
CHAT = [{"role": "user", "content": "Tell me something."}]
CLAMP = {
    "interventions": [{"sae": "embedded", "features": [MUSIC], "op": "clamp", "value": 0.8, "units": "reference_max"}]
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    options = parser.parse_args()
    client = OpenAI(base_url=options.base_url, api_key=options.api_key)

    plain = client.chat.completions.create(model="demo", messages=CHAT, temperature=0, max_tokens=32)
    print("--- plain\n" + plain.choices[0].message.content.strip())

    print("--- more of music, as a stream")
    stream = client.chat.completions.create(
        model="demo", messages=CHAT, temperature=0, max_tokens=32, stream=True, extra_body={"steering": CLAMP}
    )
    for event in stream:
        choice = event.choices[0]
        print(choice.delta.content or "", end="", flush=True)
        if choice.finish_reason is not None:  # the last event of a choice says what was done to it
            print(f"\n    {choice.steering['applied']['fired']} tokens were edited")

    profile = client.chat.completions.create(model="demo:seaside", messages=CHAT, temperature=0, max_tokens=32)
    print("--- the profile 'seaside', as a model\n" + profile.choices[0].message.content.strip())


if __name__ == "__main__":
    main()
