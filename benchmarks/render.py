"""Writes the numbers of the committed results into the README and the docs, between their markers, and draws plots.

python benchmarks/render.py            # rewrite README.md, docs/suppression.md and docs/plots
python benchmarks/render.py --check    # exit with 1 where they are out of date

A plot holds the digest of the result that it was drawn from: its bytes may differ from one matplotlib to the next.

Longer than 400 lines because every result has its one table here, and none of them knows another.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from sae_steer_bench.plots import forest, ratios_of
from sae_steer_bench.records import Interval, Result
from sae_steer_bench.table import baselines, ratio_text

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
PLOTS = ROOT / "docs" / "plots"
CONCEPTS = ("suppression", "suppression_topic", "suppression_sentiment", "suppression_emotion")


def attach_idle(result: dict[str, Any]) -> str:
    rows = [
        "| tokens in the pass | bare | attached, idle | ratio (95 % interval) | pairs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for run in result["runs"]:
        low, high = run["ratio_interval_95"]
        rows.append(
            f"| {run['tokens']} | {run['plain_ms_median']:.1f} ms | {run['attached_ms_median']:.1f} ms "
            f"| {run['ratio_median']:.4f} ({low:.4f} to {high:.4f}) | {run['pairs']} |"
        )
    machine = (
        f"{result['hardware']['cpu']}, {result['hardware']['threads']} threads, torch {result['versions']['torch']}"
    )
    layers = len(result["hooked_layers"])
    return "\n".join(
        [
            f"Forward pass of a random model of {result['parameters'] / 1e6:.0f} M parameters with {layers} hooked "
            f"layers and nobody steering, in pairs with the bare model ({machine}; `{result['command']}`):",
            "",
            *rows,
        ]
    )


def vllm_decode(result: dict[str, Any]) -> str:
    rows = ["| case | graph | decode step | ratio to plain vLLM (95 % interval) |", "| --- | --- | --- | --- |"]
    for case in result["cases"]:
        low, high = case["ratio_interval_95"]
        ratio = f"{case['ratio_median']:.4f} ({low:.4f} to {high:.4f})" if case["case"] != "plain" else ""
        graph = "compiled" if case["compiled"] else "eager"
        rows.append(f"| {case['case']} | {graph} | {case['step_ms_median']:.2f} ms | {ratio} |")
    versions = result["versions"]
    model = f"{result['parameters'] / 1e6:.0f} M parameters in {result['dtype']}"
    machine = (
        f"{result['hardware']['cpu']}, {result['hardware']['threads']} threads, torch {versions['torch']}; "
        f"`{result['command']}`"
    )
    return "\n".join(
        [
            f"A decode step of vLLM {versions['vllm']}: {result['sequences']} sequences of a random model of {model}, "
            f"{len(result['hooked_layers'])} hooked layers, {result['edited_features']} edited features a program, "
            f"{result['rounds']} rounds in {result['starts']} starts ({machine}):",
            "",
            *rows,
            "",
            _picture("vllm_decode", "a decode step of vLLM"),
        ]
    )


def readings(result: dict[str, Any] | None) -> str:
    if result is None:
        return "Readings were not measured here yet: `python benchmarks/readings.py` does it."
    products = result["encoder_products_ms_median"]
    lines = [
        f"Readings of every completion token in vLLM {result['versions']['vllm']}: {result['sequences']} requests at "
        f"once of {result['tokens']} tokens, a random model of {result['parameters'] / 1e6:.0f} M parameters in "
        f"{result['dtype']}, {result['rounds']} rounds in {result['starts']} starts ({result['hardware']['cpu']}, "
        f"{result['hardware']['threads']} threads, torch {result['versions']['torch']}; `{result['command']}`). The "
        f"product with the encoder that the largest features take is by itself "
        f"{'; '.join(f'{taken:.2f} ms ({name})' for name, taken in products.items())}. The fastest is "
        f"{result['encoder_product_share']:.1%} of a decode step:",
        "",
        "| case | tokens/s | time of the batch, ratio (95 % interval) | of a decode step | aim |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case in result["cases"]:
        ratios = [_ratio(case[kind]) if case["base"] else "" for kind in ("batch_ratio", "step_ratio")]
        base = f", to {case['base']}" if case["base"] else ""
        aim = f"{1 + case['bound']:.3f}" if case["bound"] is not None else ""
        lines.append(f"| {case['case']}{base} | {case['tokens_per_s']:.0f} | {ratios[0]} | {ratios[1]} | {aim} |")
    return "\n".join(lines)


def kernels(result: dict[str, Any] | None) -> str:
    if result is None:
        return "The Triton kernels were not measured: no GPU was at hand. `make gpu` measures them where there is one."
    versions, hardware = result["versions"], result["hardware"]
    lines = [
        f"The edit inside a CUDA graph ({hardware['gpu']}, torch {versions['torch']}, triton {versions['triton']}; "
        f"`{result['command']}`). The floor is bytes over the {result['copy_bandwidth_tb_s']:.2f} TB/s that a copy "
        f"reached; a graph node that stores one number took {result['graph_node_us']:.1f} µs:",
        "",
        "| tokens | width | features | regime | edit | idle | floor | the same hook in torch |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in result.get("edit", ()):
        if case["tokens"] not in (1, 32, 2048) or case["rows"] == 1:
            continue
        regime = case["regime"]
        floor = case["floor_us"]["rows for each slot" if regime == "grouped" else "rows for each token"]
        hook = f"{case['torch_hook_us']:.1f} µs" if case["torch_hook_us"] is not None else ""
        lines.append(
            f"| {case['tokens']} | {case['width']} | {case['rows']} | {regime} | {case['us'][regime]:.1f} µs "
            f"| {case['idle_us']:.1f} µs | {floor:.1f} µs | {hook} |"
        )
    lines += ["", "| model's shape | step | hooked layers | program | step | a hooked layer adds |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for case in result.get("stack", ()):
        lines.append(
            f"| {case['stack']} | {case['phase']}, {case['tokens']} tokens | {case['hooked']} | {case['program']} "
            f"| {case['us'] / 1e3:.2f} ms | {case['us_a_layer']:.1f} µs ({100 * case['share_a_layer']:.2f} %) |"
        )
    for case in result.get("rank", ()):
        lines += [
            "",
            f"Ranks of 8 of {case['features']} features, {case['tokens']} tokens of width {case['width']}: "
            f"{case['us']:.0f} µs; reading the encoder once takes {case['reading the encoder once us']:.0f} µs.",
        ]
    return "\n".join(lines)


def peers(result: dict[str, Any] | None) -> str:
    if result is None:
        return "The peers were not measured here yet: `make peers` does it."
    versions = result["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("vllm", "vllm-lens", "sae_lens", "transformers"))
    lines = [
        f"A batch of {result['sequences']} sequences ({result['prompt_tokens']} prompt and {result['output_tokens']} "
        f"completion tokens) of a random model of {result['parameters'] / 1e6:.0f} M parameters in {result['dtype']}, "
        f"plain and with a vector added at {len(result['hooked_layers'])} layers, {result['rounds']} rounds "
        f"({result['hardware']['cpu']}, {result['hardware']['threads']} threads, torch {versions['torch']}, {named}; "
        f"`{result['command']}`):",
        "",
        "| who | requests | graph | the batch | ratio to vLLM, compiled | to vLLM, eager | to itself, plain |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        ratios = (_ratio(row["ratios"].get(base)) for base in ("plain_compiled", "plain_eager", "itself"))
        lines.append(
            f"| {row['peer']} | {'a vector added' if row['steered'] else 'plain'} "
            f"| {'compiled' if row['compiled'] else 'eager'} | {row['seconds_median']:.2f} s | {' | '.join(ratios)} |"
        )
    return "\n".join([*lines, "", result["why_baselines_differ"], "", _picture("peers", "the batch of each peer")])


def peers_plot(result: dict[str, Any]) -> tuple[list[tuple[str, Interval]], str]:
    rows = [
        (f"{row['peer']}, {'vector' if row['steered'] else 'plain'}", Interval(**row["ratios"]["plain_compiled"]))
        for row in result["rows"]
        if "plain_compiled" in row["ratios"]
    ]
    return rows, "seconds of the batch, ratio to plain vLLM, compiled (less is better)"


def vllm_decode_plot(result: dict[str, Any]) -> tuple[list[tuple[str, Interval]], str]:
    rows = [
        (case["case"], Interval(median=case["ratio_median"], low=low, high=high))
        for case in result["cases"]
        for low, high in [case["ratio_interval_95"]]
        if case["case"] != "plain"
    ]
    return rows, "a decode step, ratio to plain vLLM (less is better)"


def served(name: str, what: str) -> Callable[[Any], str]:
    """Renders a result of ``sae-steer bench serve``."""

    def render(found: dict[str, Any] | None) -> str:
        if found is None:
            return f"{what[0].upper()}{what[1:]} was not measured here yet: `make bench` does it."
        result = Result.model_validate(found)
        plan, there = result.plan, baselines(result)
        lines = [
            f"Over HTTP, {what}: {plan.loads[0].concurrency} requests at once, {plan.prompt_tokens} prompt and "
            f"{plan.output_tokens} completion tokens each, {plan.requests} requests a measurement, {result.rounds} "
            f"rounds ({plan.machine.cpu}, {plan.machine.cores} cores, torch {plan.versions.get('torch')}; "
            "`make bench`):",
            "",
            f"| case | TTFT | TPOT | tokens/s | {' | '.join(f'TPOT, ratio to {each}' for each in there)} |",
            f"| --- | --- | --- | --- {'| --- ' * len(there)}|",
        ]
        load = plan.loads[0].name
        for case in result.cases:
            metrics = case.loads.get(load)
            if metrics is None:
                continue
            ratios = " | ".join(ratio_text(case, load, each) for each in there)
            lines.append(
                f"| {case.label} | {metrics['ttft_ms'].value:.0f} ms | {metrics['tpot_ms'].value:.1f} ms "
                f"| {metrics['output_tokens_per_s'].value:.0f} | {ratios} |"
            )
        missing = [f"{case.label} ({case.status}: {case.reason})" for case in result.cases if not case.loads]
        if missing:
            lines += ["", f"Not measured: {'; '.join(missing)}."]
        return "\n".join([*lines, "", _picture(name, what)])

    return render


def served_plot(found: dict[str, Any]) -> tuple[list[tuple[str, Interval]], str]:
    result = Result.model_validate(found)
    base = baselines(result)[0]
    rows = ratios_of(result, result.plan.loads[0].name, base, "tpot_ms")
    return rows, f"time per output token, ratio to {base} (less is better)"


def _ratio(found: dict[str, float] | None) -> str:
    return f"{found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f})" if found is not None else ""


def _picture(name: str, what: str) -> str:
    return f"![{what.replace('`', '')}](docs/plots/{name}.png)"


def suppression(result: dict[str, Any] | None) -> str:
    if result is None:
        return "This was not measured here yet: `benchmarks/suppression.sh` does it."
    material, claim = result["material"], result["claim"]
    matched = [row for row in result["matched"] if row["measures"] is not None]
    lines = [
        f"Suppressing {material['concept']!r} in {material['model']} with {material['features']} features of an SAE at "
        f"{material['site']}. What is found is by {material['readout']}, fitted on unedited runs; "
        f"{material['target_texts']} texts of the concept, {material['complement_texts']} others, "
        f"{material['plain_tokens']} tokens of plain text; 95 % intervals of {result['samples']} bootstrap samples.",
        "",
        "| method | setting | concept found (confidence) | others found (confidence) | perplexity | KL on others |",
        "| --- | --- | --- | --- | --- | --- |",
        suppression_row("none", "", result["unsteered"]),
    ]
    for row in result["defaults"]:
        lines.append(suppression_row(row["method"], f"{row['knob']} {row['setting']:.3g}", row["measures"]))
    lines += ["", "The rise of perplexity where all take the same share of what full masking takes away:", ""]
    levels = sorted({row["level"] for row in result["matched"]})
    lines.append("| method | " + " | ".join(f"{level:.0%}" for level in levels) + " |")
    lines.append("| --- |" + " --- |" * len(levels))
    for method in dict.fromkeys(row["method"] for row in result["matched"]):
        found = {row["level"]: row["measures"]["perplexity_rise"] for row in matched if row["method"] == method}
        cells = [suppression_rise(found[level]) if level in found else "does not get there" for level in levels]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"That APP's perplexity rises least at matched removal **{claim_words(claim)}** here: {claim['because']}",
    ]
    return "\n".join(lines)


def suppression_concepts(_: None) -> str:
    """One row a concept: what each method costs where all take half of what full masking takes away."""
    lines: list[str] = []
    for result in filter(None, (result_of(name)[0] for name in CONCEPTS)):
        matched = [row for row in result["matched"] if row["level"] == 0.5]
        if not lines:
            methods = [row["method"] for row in matched]
            lines = [
                f"| concept, labels | its confidence | {' | '.join(methods)} | APP's rises least |",
                f"| --- | --- | {'--- | ' * len(methods)}--- |",
            ]
        cells = [suppression_rise(row["measures"]["perplexity_rise"]) if row["measures"] else "" for row in matched]
        before = result["unsteered"]["target_confidence"]["value"]
        after = next(row["measures"]["target_confidence"]["value"] for row in matched if row["measures"])
        material = result["material"]
        lines.append(
            f"| {material['concept']}, {len(material['labels'])} | {before:.2f} to {after:.2f} "
            f"| {' | '.join(cells)} | {claim_words(result['claim'])} |"
        )
    return "\n".join(lines)


def claim_words(claim: dict[str, Any]) -> str:
    return "holds" if claim["claim"] == "holds" else "does not hold"


def suppression_rise(measure: dict[str, Any]) -> str:
    low, high = measure["interval"]
    return f"{measure['value']:+.1%} ({low:+.1%} to {high:+.1%})"


def suppression_row(method: str, setting: str, m: dict[str, Any]) -> str:
    found = f"{m['target_accuracy']['value']:.3f} ({m['target_confidence']['value']:.3f})"
    others = f"{m['complement_accuracy']['value']:.3f} ({m['complement_confidence']['value']:.3f})"
    rise = suppression_rise(m["perplexity_rise"]) if method != "none" else ""
    return f"| {method} | {setting} | {found} | {others} | {rise} | {m['divergence']['value']:.4f} |"


def calibrate(found: dict[str, Any] | None) -> str:
    if found is None:
        return "What a calibration costs was not measured here yet: `python benchmarks/calibrate.py` does it."
    paired, whole = found["paired"], found["whole_command"]
    low, high = paired["ratio_interval_95"]
    return (
        f"A calibration of {paired['tokens']:,} tokens with an SAE of {found['features']} features takes "
        f"{paired['ratio']:.3f} ({low:.3f} to {high:.3f}) of the time of the model's own forward passes and the "
        f"encoder products over them, in pairs of windows; the whole command {whole['seconds']:.0f} s and "
        f"{whole['peak_mb']:.0f} MB ({found['hardware']['threads']} threads, torch {found['versions']['torch']}; "
        f"`{found['command']}`)."
    )


# A section without a result says so: what takes a GPU, or an environment of its own, is not measured everywhere.
SECTIONS: dict[str, Callable[[Any], str]] = {
    "attach_idle": attach_idle,
    "vllm_decode": vllm_decode,
    "readings": readings,
    "peers": peers,
    "serve_vllm": served("serve_vllm", "`vllm serve` with the plugin"),
    "serve_demo": served("serve_demo", "the embedded server with the model that ships with the package"),
    "suppression": suppression,
    "suppression_concepts": suppression_concepts,
    "calibrate": calibrate,
    "kernels": kernels,
}
PAGES: dict[Path, dict[str, Callable[[Any], str]]] = {
    README: SECTIONS,
    ROOT / "docs" / "suppression.md": dict.fromkeys(CONCEPTS[1:], suppression),
}
DRAWN: dict[str, Callable[[Any], tuple[list[tuple[str, Interval]], str]]] = {
    "vllm_decode": vllm_decode_plot,
    "peers": peers_plot,
    "serve_vllm": served_plot,
    "serve_demo": served_plot,
}


def result_of(name: str) -> tuple[Any, str]:
    """A committed result and its digest; None and "" where there is none."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return None, ""
    data = path.read_bytes()
    return json.loads(data), hashlib.sha256(data).hexdigest()


def rendered(page: Path) -> str:
    """A page with every section filled from its result."""
    text = page.read_text()
    for name, render in PAGES[page].items():
        body = render(result_of(name)[0])
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not pattern.search(text):
            sys.exit(f"{page.name} has no section {name!r}.")
        text = pattern.sub(lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text)
    return text


def stale() -> list[str]:
    """Plots that were not drawn from the committed results, or have none."""
    found = {path.stem for path in PLOTS.glob("*.png")} - set(DRAWN)
    for name in DRAWN:
        path, (result, digest) = PLOTS / f"{name}.png", result_of(name)
        if _source(path) != (digest if result is not None else None):
            found.add(name)
    return sorted(found)


def _source(path: Path) -> str | None:
    """Digest of what a plot was drawn from; None where there is none."""
    if not path.exists():
        return None
    with Image.open(path) as picture:
        return str(picture.info.get("Source"))


def draw() -> None:
    """Draws the plots that are stale."""
    for name in stale():
        path, (result, digest) = PLOTS / f"{name}.png", result_of(name)
        path.unlink(missing_ok=True)
        if name in DRAWN and result is not None:
            PLOTS.mkdir(parents=True, exist_ok=True)
            rows, label = DRAWN[name](result)
            path.write_bytes(forest(rows, label, source=digest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where anything is out of date")
    options = parser.parse_args()
    pages = {page: rendered(page) for page in PAGES}
    if not options.check:
        for page, text in pages.items():
            page.write_text(text)
        draw()
        return
    for page, text in pages.items():
        if text != page.read_text():
            sys.exit(f"{page.name} is out of date: run make docs")
    if stale():
        sys.exit(f"docs/plots is out of date ({', '.join(stale())}): run make docs")


if __name__ == "__main__":
    main()
