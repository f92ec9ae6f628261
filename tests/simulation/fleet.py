"""A whole fleet in one thread and virtual time: `Simulation(plan).run()` plays one seed and raises `Violation`."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from engine.sim_engine import SimRunner
from kvtransfer.transports.local import Exchange
from mesh import blockhash
from mesh.messages import WorkerInfo
from mesh.params import SamplingParams
from proxy.generation import GenerateRequest
from proxy.routing.place import Place
from tests.simulation.client import Client
from tests.simulation.faults import HORIZON_S, Blow, Faults
from tests.simulation.host import Host
from tests.simulation.network import Network
from tests.simulation.oracle import VOCAB, Oracle, Violation, answer
from tests.simulation.plan import BLOCK_TOKENS, MAX_MODEL_LEN, Plan, RequestPlan, WorkerPlan
from tests.simulation.proxy_host import ProxyHost
from tests.simulation.scale import tiny
from tests.simulation.timeline import Timeline
from tests.simulation.worker_host import WorkerHost

ANSWERED_S = 300.0
"""After the last fault every request ends within this."""
QUIET_S = 260.0
"""After the last request nothing is held any more within this: the longest hold, then the longest memory."""
CALM_QUIET_S = 1.5
"""The same where nothing goes wrong: what is over is said at once, no lease or memory need lapse."""
CALM_ABORT_S = 0.1
"""And a worker drops a request this soon after its client left."""
HEARTBEAT_S = 5.0
"""A connection of KV endpoints that carries nothing for so long is closed by ZeroMQ."""


@dataclass(frozen=True, slots=True)
class Report:
    """What one seed came to."""

    outcomes: dict[str, str]
    injected: tuple[str, ...]
    computed: int
    """Tokens that passed through a model."""
    seconds: float
    """Virtual."""
    events: int


class Simulation:
    """One seed. `only`: names of the faults that may be injected; None: all."""

    def __init__(self, plan: Plan, only: Collection[str] | None = None, history: list[str] | None = None) -> None:
        self.plan = plan
        self.timeline = Timeline()
        self.faults = Faults(plan.seed, plan.rates, only, once=plan.gentle)
        self.network = Network(self.timeline, self.faults, history=history)
        self.workers: dict[str, WorkerHost] = {}
        self.proxies: dict[str, ProxyHost] = {}
        self.clients: dict[str, Client] = {}
        self._computed = 0
        self._history = history
        self._lives: dict[str, int] = {}
        self._starting = 0
        self._exchange = Exchange("exchange")
        model = SimRunner(1, BLOCK_TOKENS, VOCAB)
        self._layout = model.layout
        self._oracle = Oracle(sorted({w.block_tokens for w in plan.workers}), blockhash.root(model.digest))

    def run(self) -> Report:
        with tiny(random.Random(self.plan.seed), self._layout.block_bytes, self.network.damaged):
            try:
                self._play()
            except Violation:
                raise
            except Exception as error:
                raise Violation(f"{type(error).__name__}: {error}") from error
        return Report(
            {name: client.outcome for name, client in self.clients.items()},
            tuple(self.faults.injected),
            sum((w.runner.computed for w in self.workers.values()), self._computed),
            self.timeline.now,
            self.timeline.num_events,
        )

    def _play(self) -> None:
        for name in self.plan.proxies:
            self._start_proxy(name)
        for worker in self.plan.workers:
            self._start_worker(worker)
        for request in self.plan.requests:
            self._plan_request(request)
        for blow in self.plan.blows:
            self.timeline.at(blow.at, lambda b=blow: self._strike(b))  # type: ignore[misc]
        self.timeline.run(HORIZON_S)
        self.faults.over = True
        self._until(self._answered, ANSWERED_S, 1.0)
        if self.plan.calm:
            self._until(self._left_over, CALM_QUIET_S, 0.1)
        self._until(self._left_over, QUIET_S, 1.0)
        self._check_work()

    def _until(self, problem: Callable[[], str], limit: float, step: float) -> None:
        """Lets time pass until `problem()` is the empty string."""
        end = self.timeline.now + limit
        while text := problem():
            if self.timeline.now >= end:
                raise Violation(f"still so after {limit:.0f} s: {text}")
            self.timeline.run(self.timeline.now + step)

    def _answered(self) -> str:
        waiting = [name for name, client in self.clients.items() if not client.outcome]
        return f"{', '.join(waiting)} without an end" if waiting or self._starting else ""

    def _left_over(self) -> str:
        hosts: list[WorkerHost | ProxyHost] = [*self.workers.values(), *self.proxies.values()]
        left = [f"{h.name}: {text}" for h in hosts if h.alive and (text := h.left_over())]
        places = [Place(w.name, w.incarnation) for w in self.workers.values() if w.alive]
        left += [f"{p.name} asks no {name}" for p in self.proxies.values() for name in p.unknown(places)]
        return "; ".join(left)

    def _check_work(self) -> None:
        """What was computed is what the attempts needed, once on each of the two workers of an attempt."""
        bound = preempted = 0
        smooth = self.plan.gentle and not any(w.watch.fell_short for w in self.workers.values())
        for client in self.clients.values():
            prompt, answer, n = len(client.request.tokens), len(client.expected), client.request.n
            once = prompt + n * (answer + 2 * BLOCK_TOKENS)
            bound += once if smooth else 2 * client.attempts * (prompt * n + once)
            if self.plan.gentle and client.outcome not in ("done", "cancelled"):
                raise Violation(f"{client.name} ends by {client.outcome}")
            if smooth and client.outcome == "done" and client.attempts != 1:
                raise Violation(f"{client.name} needs {client.attempts} attempts: {client.outcome}")
        preempted = sum(w.engine.num_preemptions for w in self.workers.values())
        computed = self._computed + sum(w.runner.computed for w in self.workers.values())
        if computed > bound and not preempted:
            raise Violation(f"{computed} tokens are computed where {bound} suffice")

    def note(self, text: str) -> None:
        if self._history is not None:
            self._history.append(f"{self.timeline.now:9.4f}  {text}")

    def _life(self, name: str) -> int:
        self._lives[name] = self._lives.get(name, 0) + 1
        return self._lives[name]

    def _start_proxy(self, name: str) -> None:
        life = self._life(name)
        self.note(f"{name} starts its life {life}")
        self.proxies[name] = ProxyHost(name, life, _address(name), self.network, self.plan.disaggregate_above)

    def _start_worker(self, plan: WorkerPlan) -> None:
        life = self._life(plan.name)
        self.note(f"{plan.name} starts its life {life}")
        before = self.workers.get(plan.name)
        if before is not None:
            self._computed += before.runner.computed
        shape = WorkerInfo(
            plan.name,
            0,
            plan.role,
            str(8000 + [w.name for w in self.plan.workers].index(plan.name)),
            "host",
            0,
            "sim",
            b"",
            replace(self._layout, block_tokens=plan.block_tokens),
            plan.blocks * BLOCK_TOKENS // plan.block_tokens,
            MAX_MODEL_LEN,
            plan.max_num_seqs,
            plan.max_batched_tokens,
            1.0,
        )
        self.workers[plan.name] = WorkerHost(
            plan.name,
            plan.role,
            life,
            self.network,
            self._oracle,
            shape,
            tuple(_address(p) for p in self.plan.proxies),
            self.plan.transports,
            self._exchange,
            plan.step_s,
            plan.clock_rate,
            self.plan,
        )

    def _plan_request(self, plan: RequestPlan) -> None:
        expected = answer(plan.prompt, plan.max_tokens, plan.stops)
        finish = "stop" if expected[-1] in plan.stops else "length"
        self._oracle.learn((*plan.prompt, *expected))
        params = SamplingParams(max_tokens=plan.max_tokens, stop_token_ids=plan.stops, priority=plan.priority)
        request = GenerateRequest(plan.name, plan.prompt, params, plan.n, plan.deadline_s)
        client = self.clients[plan.name] = Client(plan.name, request, expected, finish)
        self.timeline.at(plan.at, lambda: self._submit(plan, client))

    def _submit(self, plan: RequestPlan, client: Client) -> None:
        proxy = self.proxies[plan.proxy]
        self.note(f"{client.name} asks {plan.proxy}: {len(client.request.tokens)} tokens for {len(client.expected)}")
        if proxy.alive:
            proxy.ask(client)
        else:
            client.hung_up("its proxy was down")

    def _strike(self, blow: Blow) -> None:
        client = self.clients.get(blow.target)
        host: Host | None = self.workers.get(blow.target) or self.proxies.get(blow.target)
        there = client.waiting if client is not None else host is not None and host.alive
        if not there or not self.faults.strikes(blow):
            return
        self.note(str(blow))
        if client is not None:
            self._cancel(client)
        elif blow.kind == "cut":
            self.network.cut(blow.target, blow.other)
        elif blow.kind == "partition":
            self._partition(blow)
        elif isinstance(host, WorkerHost):
            self._strike_worker(host, blow)
        elif isinstance(host, ProxyHost):
            self._strike_proxy(host, blow)

    def _cancel(self, client: Client) -> None:
        for proxy in self.proxies.values():
            if client in proxy.clients:
                proxy.soon(client.cancel)
        if self.plan.calm:
            self.timeline.after(CALM_ABORT_S, lambda: self._is_aborted(client))

    def _is_aborted(self, client: Client) -> None:
        for worker in self.workers.values():
            for key in worker.engine._requests:
                if key.partition("#")[0].partition(".")[0] == client.name:
                    raise Violation(f"{worker.name} works on {key} though its client left")

    def _partition(self, blow: Blow) -> None:
        """Nothing gets from one process to another for a while; the other way is open."""
        now = self.timeline.now
        pair = (blow.target, blow.other)
        self.network.blocked[pair] = max(self.network.blocked.get(pair, 0.0), now + blow.seconds)
        if blow.seconds > HEARTBEAT_S:
            self.timeline.after(HEARTBEAT_S, lambda: self.network.cut(*pair, kind="kv"))

    def _strike_worker(self, host: WorkerHost, blow: Blow) -> None:
        plan = next(w for w in self.plan.workers if w.name == host.name)
        if blow.kind == "crash":
            host.crash(silent=blow.flag)
            if not blow.flag:
                for proxy in self.proxies.values():
                    if proxy.alive:
                        proxy.process_ended(host.name, host.incarnation)
            self._restart(lambda: self._start_worker(plan), blow.seconds)
        elif blow.kind == "drain":
            host.process.drain()
            self._restart_when_gone(host, plan, blow.seconds)
        elif blow.kind == "hang":
            host.hang(blow.seconds)
        else:
            self._strike_any(host, blow)

    def _strike_proxy(self, host: ProxyHost, blow: Blow) -> None:
        if blow.kind == "crash":
            host.crash()
            self._restart(lambda: self._start_proxy(host.name), blow.seconds)
        else:
            self._strike_any(host, blow)

    def _strike_any(self, host: Host, blow: Blow) -> None:
        if blow.kind == "pause":
            host.pause(blow.seconds)
        elif blow.kind == "jump":
            host.jump(blow.seconds)
        elif blow.kind == "slow":
            host.slow_s += 0.2
            self.timeline.after(blow.seconds, lambda: self._speed_up(host))

    def _speed_up(self, host: Host) -> None:
        host.slow_s -= 0.2

    def _restart(self, start: Callable[[], None], delay: float) -> None:
        self._starting += 1

        def run() -> None:
            self._starting -= 1
            start()

        self.timeline.after(delay, run)

    def _restart_when_gone(self, host: WorkerHost, plan: WorkerPlan, delay: float) -> None:
        def look() -> None:
            if self.workers[host.name] is not host:
                return  # it crashed meanwhile, and that restarts it
            if host.alive:
                self.timeline.after(0.1, look)
            else:
                self._restart(lambda: self._start_worker(plan), delay)

        look()


def _address(proxy: str) -> str:
    return f"tcp://127.0.0.1:{9000 + int(proxy.removeprefix('proxy-'))}"
