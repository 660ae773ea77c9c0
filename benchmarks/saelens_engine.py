"""transformers with a hook that adds decoder rows of SAEs that SAELens loads; runs where SAELens is installed.

The way of SAELens' own steering tutorial: a forward hook a layer, and `generate`. It knows one batch at a time, all of
which is steered alike.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, __version__
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.folder / "model", dtype=getattr(torch, options.dtype))
    prompts = torch.tensor(json.loads(options.prompts))
    rows = {layer: SAE.load_from_disk(options.folder / f"l{layer}").W_dec[0] for layer in json.loads(options.layers)}

    def add(row: torch.Tensor) -> Any:
        row = row.to(model.dtype)

        def hook(_: object, __: object, output: Any) -> Any:
            return (output[0] + row, *output[1:]) if isinstance(output, tuple) else output + row

        return hook

    print("RESULT", json.dumps({"sae_lens": __version__, "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        steered = line.strip() == "vector"
        handles = [model.model.layers[n].register_forward_hook(add(row)) for n, row in rows.items() if steered]
        start = time.perf_counter()
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=options.tokens,
            min_new_tokens=options.tokens, pad_token_id=0,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        for handle in handles:
            handle.remove()
        tokens = out[:, prompts.shape[1] :].tolist()
        print("RESULT", json.dumps({"seconds": seconds, "step_ms": None, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
