"""Train a sparse autoencoder on the residual stream of a model, in minutes on a CPU, without SAELens.

    python examples/train_sae.py --model MODEL --layer 3 --text texts.csv --text more.jsonl --out OUT

BatchTopK (Bussmann et al. 2024): over a batch of N tokens, the k N largest activations stay. Dead features are revived
by the auxiliary loss of Gao et al. (2024). What is written is its inference form, a JumpReLU with one threshold,
in the layout of SAELens: `cfg.json` and `sae_weights.safetensors`. Seeded; another processor rounds differently.
"""

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sae_steer.families import locate
from sae_steer.sites import Place


class BatchTopK(nn.Module):
    """A dictionary of F features over vectors of width D; decoder rows have length one."""

    def __init__(self, width: int, features: int, mean: Tensor) -> None:
        super().__init__()
        rows = nn.functional.normalize(torch.randn(features, width), dim=1)
        self.dec = nn.Parameter(rows)
        self.enc = nn.Parameter(rows.T.clone())
        self.b_enc = nn.Parameter(torch.zeros(features))
        self.b_dec = nn.Parameter(mean.clone())

    def pre(self, x: Tensor) -> Tensor:
        """Activations before the selection: `x [N, D]` to `[N, F]`."""
        return torch.relu((x - self.b_dec) @ self.enc + self.b_enc)


def texts(path: Path, split: str | None) -> Iterator[str]:
    """The column `text` of a CSV or JSONL file, rows of one split where it has a column of that name."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, file)
        for row in rows:
            if split is None or row.get("split", split) == split:
                yield row["text"]


@torch.no_grad()
def collect(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[str], place: Place, most: int
) -> Tensor:
    """The residual stream at every token of `documents`, at most `most` of them, `[N, D]`."""
    kept: list[Tensor] = []
    module, _ = locate(model, place)

    def keep(_module: nn.Module, _args: object, out: Any) -> None:
        kept.append(out[0] if isinstance(out, tuple) else out)

    hook = module.register_forward_hook(keep)
    found: list[Tensor] = []
    total = 0
    context = int(model.config.max_position_embeddings)
    order = sorted(documents, key=len)
    groups = [order[start : start + 32] for start in range(0, len(order), 32)]
    try:
        shuffled = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist()
        for number in (bar := tqdm(shuffled, desc="residuals", unit="batch")):
            batch = tokenizer(groups[number], return_tensors="pt", padding=True, truncation=True, max_length=context)
            kept.clear()
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            found.append(kept[0][batch["attention_mask"].bool()])
            total += found[-1].shape[0]
            bar.set_postfix(tokens=total)
            if total >= most:
                break
    finally:
        hook.remove()
    return torch.cat(found)


def loss_of(sae: BatchTopK, x: Tensor, k: float, dead: Tensor) -> tuple[Tensor, Tensor, float]:
    """The loss of a batch `x [N, D]`, which features fired `[F]`, and the least activation that stayed."""
    pre = sae.pre(x)
    least = pre.flatten().topk(int(k * x.shape[0])).values[-1]
    kept = torch.where(pre >= least, pre, 0.0)
    residual = x - (kept @ sae.dec + sae.b_dec)
    loss = residual.square().sum(dim=1).mean()
    if bool(dead.any()):
        revived = torch.where(dead, pre, 0.0)
        top = revived.topk(min(64, int(dead.sum())), dim=1)
        chosen = torch.zeros_like(revived).scatter(1, top.indices, top.values)
        loss = loss + (residual.detach() - chosen @ sae.dec).square().sum(dim=1).mean() / 32
    return loss, (kept > 0).any(dim=0), float(least.detach())


def train(x: Tensor, *, features: int, k: float, steps: int, batch: int, rate: float) -> tuple[BatchTopK, float]:
    """Trains on `x [N, D]`; the dictionary and its threshold, a running mean of the least activation that stayed."""
    sae = BatchTopK(x.shape[1], features, x.mean(dim=0))
    optimizer = torch.optim.Adam(sae.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 20 * (step + 1) / steps, 4 * (1 - step / steps))
    )
    silent = torch.zeros(features, dtype=torch.int64)
    threshold = 0.0
    for step in (bar := tqdm(range(steps), desc="training", unit="step")):
        rows = x[torch.randint(len(x), (batch,))]
        loss, fired, least = loss_of(sae, rows, k, silent > 100)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            sae.dec.div_(sae.dec.norm(dim=1, keepdim=True))
        silent = torch.where(fired, 0, silent + 1)
        threshold = least if step == 0 else 0.99 * threshold + 0.01 * least
        if step % 50 == 0:
            bar.set_postfix(loss=f"{float(loss):.3f}", dead=int((silent > 100).sum()))
    return sae, threshold


@torch.no_grad()
def quality(sae: BatchTopK, threshold: float, x: Tensor) -> dict[str, float]:
    """Variance explained, features per token and the share that never fires, on held-out `x [N, D]`."""
    pre = sae.pre(x)
    f = torch.where(pre > threshold, pre, 0.0)
    error = (x - f @ sae.dec - sae.b_dec).square().sum()
    return {
        "variance_explained": 1 - float(error / (x - x.mean(dim=0)).square().sum()),
        "l0": float((f > 0).sum(dim=1).float().mean()),
        "never_fires": float((f <= 0).all(dim=0).float().mean()),
    }


def write(folder: Path, sae: BatchTopK, threshold: float, layer: int, model: str) -> None:
    """Writes the inference form; `cfg.json` last, so that a folder that was interrupted is no SAE."""
    folder.mkdir(parents=True, exist_ok=True)
    features, width = sae.dec.shape
    tensors = {
        "W_enc": sae.enc.detach().contiguous(),
        "b_enc": sae.b_enc.detach(),
        "W_dec": sae.dec.detach().contiguous(),
        "b_dec": sae.b_dec.detach(),
        "threshold": torch.full((features,), threshold),
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "architecture": "jumprelu",
        "d_in": width,
        "d_sae": features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.54.12",  # the layout's, whose reader this file is for
            "model_name": model,
            "hook_name": f"blocks.{layer}.hook_resid_post",
            "prepend_bos": True,
        },
    }
    (folder / "cfg.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    """Collect, train, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--layer", type=int, required=True, help="block whose output is read, from 0")
    parser.add_argument("--text", type=Path, action="append", required=True, help="CSV or JSONL with a column `text`")
    parser.add_argument("--split", default="train", help="rows of this split, in files that have a column `split`")
    parser.add_argument("--out", type=Path, required=True, help="folder of the SAE")
    parser.add_argument("--features", type=int, default=1024, help="width of the dictionary")
    parser.add_argument("--k", type=float, default=16, help="active features per token, on average")
    parser.add_argument("--tokens", type=int, default=500_000, help="tokens to learn from")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=1024, help="tokens in a step")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    documents = [text for path in args.text for text in texts(path, args.split)]
    x = collect(model, tokenizer, documents, Place.parse(f"resid_post.{args.layer}"), args.tokens)
    x = x[torch.randperm(len(x))]
    held_out = min(20_000, len(x) // 10)
    sae, threshold = train(
        x[held_out:], features=args.features, k=args.k, steps=args.steps, batch=args.batch, rate=args.rate
    )
    write(args.out, sae, threshold, args.layer, Path(args.model).name)
    for name, value in quality(sae, threshold, x[:held_out]).items():
        print(f"{name:20} {value:.4f}")


if __name__ == "__main__":
    main()
