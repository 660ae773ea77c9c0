"""A whole measurement, from the start of its servers to their end."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from sae_steer_bench.connect import Source, connect, generator
from sae_steer_bench.errors import LoadFailed
from sae_steer_bench.journal import Journal
from sae_steer_bench.launch import Launched
from sae_steer_bench.options import Options, Watch
from sae_steer_bench.planning import cases_again, make_plan, require_same_place
from sae_steer_bench.profiling import trace
from sae_steer_bench.records import Measurement, Plan
from sae_steer_bench.rounds import Bench
from sae_steer_http.client import Unreachable


class Run:
    """One measurement.

    Args:
        options: What is wanted. Of a run that is resumed, its plan says most of it: what counts here are the folder,
            keys and timeouts.
        watch: Is told how it goes.
    """

    def __init__(self, options: Options, watch: Watch) -> None:
        self.options = options
        self.watch = watch
        self.plan: Plan | None = None
        self.done: list[Measurement] = []

    def measure(self, *, resume: bool) -> None:
        """Measures until the rounds or the minutes are over; what is done stands in ``plan`` and ``done``.

        Raises:
            BenchError: It cannot be begun.
            Unreachable: The server is not there.
            LoadFailed: A server stopped answering; the rounds before it are kept.
        """
        options = self.options
        options.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            journal = stack.enter_context(Journal(options.folder))
            old = self._begun(journal, resume=resume)
            source = Source(old.url, old.launch, old.plain_url) if old is not None else Source.of(options)
            launched: list[Launched] = []
            try:
                model = old.server.model if old else options.model
                servers = connect(stack, options, source, model, launched, self.watch.say)
                wanted = replace(options, generator=old.generator, tokenizer=old.tokenizer) if old else options
                sender = stack.enter_context(generator(servers, wanted, self.watch.say))
                if old is not None:
                    self.plan, cases = old, cases_again(old, servers)
                else:
                    self.plan, cases = make_plan(options, source, servers, sender)
                    journal.append(self.plan)
                self.watch.plan(self.plan)
                addresses = {False: servers.steered, True: servers.plain or servers.steered}
                self._measure(Bench(self.plan, cases, addresses, sender, journal, self.watch.step))
                if options.profile:
                    self.watch.say(f"wrote {trace(options.folder / 'profile', self.plan, servers, sender, cases)}")
            except (LoadFailed, Unreachable) as error:
                raise _with_log(error, launched) from error

    def _begun(self, journal: Journal, *, resume: bool) -> Plan | None:
        """The plan of the run that is resumed, with what it has done; None = this is a new one."""
        if not resume:
            journal.require_new()
            return None
        plan, self.done = journal.resume()
        require_same_place(plan)
        return plan

    def _measure(self, bench: Bench) -> None:
        bench.warm_up()
        for measured in bench.rounds(self.done):
            self.done += measured
            self.watch.rounds(self.done)


def _with_log(error: LoadFailed | Unreachable, launched: Sequence[Launched]) -> LoadFailed | Unreachable:
    """The error, with what a launched server left where it has ended."""
    left = next((words for server in launched if (words := server.lost())), None)
    return error if left is None else type(error)(f"{error.message} {left}")
