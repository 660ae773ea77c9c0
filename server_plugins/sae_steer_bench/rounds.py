"""Rounds: each measures every case once, in a new order, so that the machine's drift meets all alike."""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sae_steer_bench.cases import Case
from sae_steer_bench.errors import LoadFailed
from sae_steer_bench.journal import Journal
from sae_steer_bench.load import Address, Generator, Work
from sae_steer_bench.records import LoadPlan, Measurement, Plan, RoundEnd
from sae_steer_bench.samples import Batch

LEAST_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Bench:
    """What measures the cases of a plan.

    Args:
        plan: The plan.
        cases: Those of it that are measured.
        addresses: The server under test, and (where there is one) that without the plugin, by ``Case.plain``.
        generator: Sends the requests.
        journal: Keeps what was measured.
        tell: Is told what is done, before it is done: the round (0 = warm-up), how many measurements were made in
            it, how many there are in it, and a label.
    """

    plan: Plan
    cases: Sequence[Case]
    addresses: Mapping[bool, Address]
    generator: Generator
    journal: Journal
    tell: Callable[[int, int, int, str], None]

    def warm_up(self) -> None:
        """Every case once, and what it takes is thrown away: slots are filled, code is compiled, caches are warm."""
        load = self.plan.loads[0].model_copy(update={"rate": None})
        for number, case in enumerate(self.cases):
            self.tell(0, number, len(self.cases), case.label)
            self._send(case, load, "warm-up", requests=min(load.concurrency, self.plan.requests))

    def rounds(self, done: Sequence[Measurement]) -> Iterator[list[Measurement]]:
        """Measures round after round, and yields each once the disk has it.

        Args:
            done: Of the rounds that an earlier process completed.

        Raises:
            LoadFailed: A server stopped answering, or answers otherwise than it was asked.
        """
        first = max((each.round for each in done), default=0) + 1
        # What an earlier process took counts: the budget is the run's.
        end = time.monotonic() + 60 * self.plan.minutes - sum(each.seconds for each in done)
        for number in range(first, self.plan.rounds + 1):
            if number > LEAST_ROUNDS and time.monotonic() > end:
                return
            yield self._round(number)

    def _round(self, number: int) -> list[Measurement]:
        todo = [(load, case) for load in self.plan.loads for case in self.cases]
        random.Random(f"{self.plan.seed} {number}").shuffle(todo)
        measured: list[Measurement] = []
        for place, (load, case) in enumerate(todo):
            self.tell(number, place, len(todo), f"{case.label}, {load.name}")
            batch = self._send(case, load, f"{number}", requests=self.plan.requests)
            measurement = Measurement(
                round=number,
                load=load.name,
                case=case.key,
                at=now(),
                seconds=batch.seconds,
                requests=len(batch.samples),
                output_tokens=batch.tokens,
                metrics=batch.metrics(),
            )
            self.journal.append(measurement)
            measured.append(measurement)
        self.journal.append(RoundEnd(round=number))
        return measured

    def _send(self, case: Case, load: LoadPlan, label: str, *, requests: int) -> Batch:
        plan = self.plan
        work = Work(
            bodies=case.bodies,
            requests=requests,
            prompt_tokens=plan.prompt_tokens,
            output_tokens=plan.output_tokens,
            vocabulary=plan.server.vocabulary,
            seed=f"{plan.seed} {plan.started} {label} {load.name} {case.key}",
            arrivals=f"{plan.seed} {plan.started} {label} {load.name}",
        )
        batch = self.generator.run(self.addresses[case.plain], work, load)
        lengths = {sample.tokens for sample in batch.samples}
        if len(batch.samples) != requests or lengths != {plan.output_tokens}:
            raise LoadFailed(
                f"{case.label}: {len(batch.samples)} of {requests} requests were answered, with {sorted(lengths)} "
                f"tokens where {plan.output_tokens} were asked for. Answers of other lengths are no pairs: does the "
                "server know ignore_eos?"
            )
        return batch


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
