"""Offline vLLM: one batch in which every prompt asks for something else. Run it in a checkout, no GPU needed:

python examples/vllm_offline.py
"""

import os
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; read where vLLM runs on a CPU

from vllm import LLM, SamplingParams

from sae_steer import embedded
from sae_steer_vllm.offline import additional_config, reports, steered

ROOT = Path(__file__).resolve().parents[1]
SEA, MUSIC = 551, 103  # features of the dictionary that ships with the package
ASKED = {
    "plain": None,
    "more of music": {
        "interventions": [
            {"sae": "embedded", "features": [MUSIC], "op": "clamp", "value": 0.8, "units": "reference_max"}
        ]
    },
    "no sea, in what is generated": {
        "interventions": [{"sae": "embedded", "features": [SEA], "op": "ablate", "positions": "completion"}]
    },
}


def main() -> None:
    os.chdir(ROOT)  # the paths in the configuration are relative to the checkout
    llm = LLM(
        str(embedded.MODEL),
        max_model_len=256,
        max_num_seqs=8,
        enforce_eager=True,  # starts sooner; leave it out to serve
        disable_log_stats=True,
        additional_config=additional_config("examples/vllm_steer.json"),
    )
    chat = [{"role": "user", "content": "Tell me about the sea."}]
    params = [
        SamplingParams(temperature=0, max_tokens=32, extra_args=steered(ask) if ask else None) for ask in ASKED.values()
    ]
    outputs = llm.chat([chat] * len(params), params, use_tqdm=False)
    for name, output in zip(ASKED, outputs, strict=True):
        print(f"--- {name}\n{output.outputs[0].text.strip()}")
        [report] = reports(output)
        for feature in report["applied"]["features"] if report else ():
            before, after = feature["mean_before"], feature["mean_after"]
            print(f"    feature {feature['feature']}: {before:.2f} -> {after:.2f} on {feature['tokens']} tokens")


if __name__ == "__main__":
    main()
