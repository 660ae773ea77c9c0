"""What an engine's answer must be, by ``sae_steer.attach`` over the answer's own tokens (teacher forcing).

However a token was chosen (greedy, sampled, under a grammar), its log-probability and what was done to every position
follow from the tokens before it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae_steer import Steer
from tests.vllm.engine_script import Answer, Ask, Json

# Float32 against float32 by other kernels; the largest difference seen over all tests of this folder is 2e-5.
LOGPROB = 1e-3
ACTIVATION = 1e-3
CLOSE = 1e-3
"""Two best logits that are closer than this may change places."""


@dataclass(frozen=True)
class Teacher:
    """Judges answers.

    Args:
        steer: A model with the engine's SAEs attached.
    """

    steer: Steer

    @torch.no_grad()
    def expect(self, prompt: Sequence[int], steering: Json | None, completion: Sequence[int]) -> tuple[Tensor, Any]:
        """The block, and log-probabilities ``[P + n - 1, V]`` over a prompt of ``P`` tokens and ``n`` of an answer."""
        ids = torch.tensor([[*prompt, *completion[:-1]]])
        with self.steer.rows([steering], prompt_lengths=[len(prompt)]) as rows:
            logits = self.steer.model(ids).logits[0]
            return logits.log_softmax(-1), rows.reports()[0]

    def faults(
        self, ask: Ask, answer: Answer, *, greedy: bool = True, masked: bool = False, cached: bool = False
    ) -> list[str]:
        """All that is wrong with an answer; empty where it is right.

        Args:
            ask: What was asked.
            answer: What came.
            greedy: Whether each token must be the likeliest.
            masked: Whether a grammar took tokens out before the log-probabilities: then those of the tokens that are
                left keep their distances.
            cached: Whether a part of the prompt was not computed, so that the block says less.
        """
        logprobs, applied = self.expect(ask.prompt, ask.steering, answer.tokens)
        here = logprobs[len(ask.prompt) - 1 :]
        found = []
        for row, token, told in zip(here, answer.tokens, answer.likeliest, strict=True):
            shift = told[token] - float(row[token]) if masked else 0.0
            left = {other: value for other, value in told.items() if value > -1e30 or not masked}
            off = max(abs(value - shift - float(row[other])) for other, value in left.items())
            if off > LOGPROB:
                found.append(f"a log-probability is off by {off:.2g}")
            best = max(left, key=lambda other: float(row[other])) if masked else int(row.argmax())
            if greedy and float(row[best] - row[token]) > CLOSE:
                found.append(f"token {token} where {best} is the likeliest")
        return found + ([] if cached else differences("applied", answer.applied, applied))

    def prompt_logprobs(self, ask: Ask) -> list[float]:
        """Log-probabilities of the prompt's tokens from the second on."""
        logprobs, _ = self.expect(ask.prompt, ask.steering, [0])
        return logprobs[:-1].gather(1, torch.tensor(ask.prompt)[1:, None])[:, 0].tolist()


def differences(path: str, have: Any, want: Any) -> list[str]:
    """Where two blocks differ."""
    if isinstance(want, dict) and isinstance(have, dict) and want.keys() == have.keys():
        return [fault for key in want for fault in differences(f"{path}.{key}", have[key], want[key])]
    if isinstance(want, list) and isinstance(have, list) and len(want) == len(have):
        return [
            fault for i, pair in enumerate(zip(have, want, strict=True)) for fault in differences(f"{path}[{i}]", *pair)
        ]
    if isinstance(want, float) and isinstance(have, float):
        same = math.isclose(have, want, rel_tol=ACTIVATION, abs_tol=ACTIVATION)
    else:
        same = have == want and type(have) is type(want)
    return [] if same else [f"{path} is {have!r}, not {want!r}"]
