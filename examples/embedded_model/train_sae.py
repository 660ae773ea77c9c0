"""Train a sparse autoencoder on the residual stream of the embedded model with SAELens.

    python train_sae.py --out ~/embedded-run

reads OUT/model, reads the residual stream once (OUT/residual_L.safetensors, reused by
later runs), trains with batch top-k and writes OUT/sae in the layout of SAELens.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from corpus import Writer
from files import write_json
from grammar import Grammar
from residual import batches, collect, layer_output, load
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

ACTIVATION_SEED, HELD_OUT_SEED = 2_000_000, 3_000_000


def shuffled(activations: torch.Tensor, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches [batch, d] of `activations` [N, d] without end, in a new order each pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(activations), generator=generator).split(batch):
            if len(rows) == batch:
                yield activations[rows]


def cached_activations(args: argparse.Namespace) -> torch.Tensor:
    """The residual stream [N, d] of the training documents, from disk if it is there."""
    path = args.out / f"residual_{args.layer}.safetensors"
    if not path.exists():
        model, tokenizer = load(args.out / "model")
        documents = list(Writer(Grammar.load(), ACTIVATION_SEED).documents(args.documents))
        partial = path.with_suffix(".part")
        save_file({"residual": collect(model, tokenizer, documents, args.layer)}, partial)
        partial.rename(path)
    return load_file(path)["residual"]


def train(activations: torch.Tensor, args: argparse.Namespace) -> BatchTopKTrainingSAE:
    """Train on shuffled batches; SAELens keeps the loss, the schedule and the progress bar."""
    torch.manual_seed(args.seed)
    config = BatchTopKTrainingSAEConfig(
        d_in=activations.shape[1],
        d_sae=args.features,
        k=args.k,
        normalize_activations="none",
        apply_b_dec_to_input=True,
        metadata=SAEMetadata(
            model_name="sae-steer-embedded",
            hook_name=f"blocks.{args.layer}.hook_resid_post",
            hf_hook_name=f"model.layers.{args.layer}.output",
            context_size=512,
            prepend_bos=True,
        ),
    )
    sae = BatchTopKTrainingSAE(config)
    sae.b_dec.data.copy_(activations.mean(0))
    samples = args.steps * args.batch
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=samples,
            train_batch_size_samples=args.batch,
            lr=args.learning_rate,
            lr_end=args.learning_rate / 10,
            lr_warm_up_steps=args.steps // 20,
            lr_decay_steps=args.steps // 4,
            dead_feature_window=200,
        ),
        sae=sae,
        data_provider=shuffled(activations, args.batch, args.seed),
    )
    return trainer.fit()


@torch.no_grad()
def measure(sae: SAE, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, layer: int) -> dict[str, float]:
    """Quality on held-out text: variance explained, L0, dead features, loss with the SAE in place."""
    documents = list(Writer(Grammar.load(), HELD_OUT_SEED).documents(800))
    error = variance = active = tokens = loss = spliced = 0.0
    mean = collect(model, tokenizer, documents[:300], layer).mean(0)
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    for batch in batches(documents, tokenizer):
        residual = layer_output(model, batch, layer)
        features = sae.encode(residual)
        replaced = sae.decode(features)
        error += (residual - replaced)[batch.mask].square().sum().item()
        variance += (residual - mean)[batch.mask].square().sum().item()
        fired |= (features[batch.mask] > 0).any(0)
        active += (features[batch.mask] > 0).sum().item()
        labels = batch.ids.where(batch.mask, -100)
        count = int(batch.mask[:, 1:].sum())
        loss += count * model(batch.ids, attention_mask=batch.mask, labels=labels).loss.item()
        hook = model.model.layers[layer].register_forward_hook(lambda _m, _i, _out, new=replaced: new)
        spliced += count * model(batch.ids, attention_mask=batch.mask, labels=labels).loss.item()
        hook.remove()
        tokens += count
    positions = tokens + len(documents)
    return {
        "variance_explained": 1 - error / variance,
        "l0": active / positions,
        "dead_fraction": 1 - fired.float().mean().item(),
        "loss": loss / tokens,
        "loss_with_sae": spliced / tokens,
        "perplexity": math.exp(loss / tokens),
    }


def main() -> None:
    """Collect, train, measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path.home() / "embedded-run", help="folder of train_model.py")
    parser.add_argument("--layer", type=int, default=3, help="block whose output is read, from 0")
    parser.add_argument("--features", type=int, default=768, help="width of the dictionary")
    parser.add_argument("--k", type=float, default=16, help="active features per token, on average")
    parser.add_argument("--documents", type=int, default=12_000, help="documents whose residual stream is read")
    parser.add_argument("--steps", type=int, default=3000, help="training steps")
    parser.add_argument("--batch", type=int, default=2048, help="tokens per step")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="held, then decayed over the last quarter")
    parser.add_argument("--seed", type=int, default=0, help="seeds the weights and the order")
    args = parser.parse_args()

    train(cached_activations(args), args).save_inference_model(args.out / "sae")
    quality = measure(SAE.load_from_disk(args.out / "sae"), *load(args.out / "model"), args.layer)
    write_json(args.out / "sae_quality.json", quality)
    for name, value in quality.items():
        print(f"{name:20} {value:.4f}")


if __name__ == "__main__":
    main()
