"""Steering in the same process: one `model.generate`, another program for each row of the batch.

python examples/in_process.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sae_steer
from sae_steer import embedded
from sae_steer.sae import Labels


def feature(label: str) -> int:
    """The feature of that label."""
    return next(found.feature for found in Labels.load(embedded.SAE).search(label, limit=1))


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded.MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(embedded.MODEL)
    messages = [{"role": "user", "content": "Talk about food."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    food, sea = feature("food"), feature("the sea")
    requests = [
        None,
        {
            "interventions": [
                {"sae": "embedded", "features": [sea], "op": "clamp", "value": 0.8, "units": "reference_max"}
            ]
        },
        {"interventions": [{"sae": "embedded", "features": [food], "op": "ablate"}]},
    ]
    with sae_steer.attach(model, saes={"embedded": embedded.SAE}) as steer:
        batch = {name: tensor.repeat(len(requests), 1) for name, tensor in prompt.items()}
        with steer.rows(requests) as rows:
            out = model.generate(**batch, max_new_tokens=40, do_sample=False)
    for name, tokens, applied in zip(("plain", "the sea clamped", "food ablated"), out, rows.reports(), strict=True):
        print(f"--- {name}")
        print(tokenizer.decode(tokens[prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip())
        for entry in applied["features"] if applied else ():
            print(f"    feature {entry['feature']}: mean {entry['mean_before']:.2f} -> {entry['mean_after']:.2f}")


if __name__ == "__main__":
    main()
