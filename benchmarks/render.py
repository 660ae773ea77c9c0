"""Writes the numbers of the committed results into the README, between its markers.

python benchmarks/render.py            # rewrite README.md
python benchmarks/render.py --check    # exit with 1 where it is out of date
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


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
            f"{result['rounds']} rounds ({machine}):",
            "",
            *rows,
        ]
    )


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


def suppression(result: dict[str, Any]) -> str:
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


SECTIONS: dict[str, tuple[Path, Callable[[Any], str]]] = {
    "attach_idle": (RESULTS / "attach_idle.json", attach_idle),
    "vllm_decode": (RESULTS / "vllm_decode.json", vllm_decode),
    "suppression": (RESULTS / "suppression.json", suppression),
    # Needs a GPU: where there is no result, the section says so.
    "kernels": (RESULTS / "kernels.json", kernels),
}


def rendered(text: str) -> str:
    """The README with every section filled from its result."""
    for name, (path, render) in SECTIONS.items():
        body = render(json.loads(path.read_text()) if path.exists() or render is not kernels else None)
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not pattern.search(text):
            sys.exit(f"README.md has no section {name!r}.")
        text = pattern.sub(lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the README is out of date")
    options = parser.parse_args()
    text = README.read_text()
    new = rendered(text)
    if options.check:
        if new != text:
            sys.exit("README.md is out of date: run python benchmarks/render.py")
    else:
        README.write_text(new)


if __name__ == "__main__":
    main()
