"""Per-request steering inside stock vLLM: a plugin that vLLM finds by itself.

:mod:`.compat` is the only part that imports vllm. What it patches calls into the rest, which knows nothing of vLLM:
:mod:`.frontend` (from a request to a program, and from sums to a report), :mod:`.gate` (slots, beside the scheduler),
:mod:`.worker` (tables and hooks, beside the model) and :mod:`.middleware` (the HTTP field).
"""
