"""A validated request handed to the dispatcher, and the answer that will follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import monotonic

from mesh.errors import RequestError
from mesh.params import SamplingParams
from proxy.api.answer import Answer, Job, Sink, Usage
from proxy.api.schemas import GenerationBody
from proxy.api.service import Service
from proxy.api.tenants import current
from proxy.generation import GenerateRequest, Generation
from proxy.metrics import RequestRecord
from proxy.text.choice import ChoiceText


def submit(
    service: Service,
    body: GenerationBody,
    api_id: str,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    budgets: Sequence[int],
) -> tuple[Generation, ...]:
    """One generation per prompt, with `budgets[p]` tokens each; all of them, or `RequestError` and none."""
    tenant = current.get()
    try:
        tenant.quota.begin(sum(map(len, prompts)), monotonic())
    except RequestError:
        service.metrics.count_rejection("quota")
        raise
    generations: list[Generation] = []
    for i, (tokens, budget) in enumerate(zip(prompts, budgets, strict=True)):
        request = GenerateRequest(
            request_id=api_id if len(prompts) == 1 else f"{api_id}-{i}",
            tokens=tuple(tokens),
            params=replace(params, max_tokens=budget, min_tokens=min(params.min_tokens, budget)),
            n=body.n or 1,
            deadline_s=service.settings.request_timeout,
            cache_salt=tenant.salt(body.cache_salt or ""),
        )
        try:
            generations.append(service.dispatcher.submit(request))
        except RequestError:
            service.metrics.count_rejection("no_capacity")
            tenant.quota.end(0, monotonic())
            for generation in generations:
                generation.abort("failed")
            raise
    return tuple(generations)


def answer(
    service: Service,
    body: GenerationBody,
    label: str,
    arrived: float,
    generations: tuple[Generation, ...],
    prompts: Sequence[Sequence[int]],
    choices: Sequence[ChoiceText],
    sink: Sink,
    usage: Usage,
    *,
    max_tokens: int,
    discard_output: bool = False,
) -> Answer:
    """The response that runs the generations. `arrived`: `perf_counter` at the request's arrival."""
    job = Job(
        label=label,
        generations=generations,
        prompt_lengths=tuple(map(len, prompts)),
        n=body.n or 1,
        choices=tuple(choices),
        sink=sink,
        usage=usage,
        tenant=current.get(),
        stream=bool(body.stream),
        discard_output=discard_output,
    )
    record = RequestRecord(arrived=arrived, n=body.n or 1, max_tokens=max_tokens)
    return Answer(job, service.metrics, record, service.keep_alive_s)
