"""The service as its users meet it: real processes, the official client, the bundled model."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI, BadRequestError, InternalServerError, NotFoundError

from tests.e2e.processes import ROOT, Deployment, deployment, free_port, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

DEMO = ROOT / "deploy" / "demo_model"
END_OF_TURN = "3"
"""The id of `<|im_end|>`."""
STREAMS = 64
TOKENS = 24


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    # In bfloat16 a batch's shape can decide a near tie: equal tokens are promised in float32.
    flags = ("--max-num-batched-tokens", "128", "--kv-blocks", "1024", "--dtype", "float32")
    directory = tmp_path_factory.mktemp("service")
    with deployment(
        directory,
        DEMO,
        prefill=1,
        decode=2,
        flags=flags,
        proxy_flags=("--disaggregate-above", "0", "--max-body-bytes", "200000"),
    ) as running:
        yield running


async def one_stream(client: AsyncOpenAI, model: str, number: int) -> tuple[str, list[str], int]:
    """Text, finish reasons and the usage's completion tokens of one stream."""
    prompt = [65 + (number + i) % 26 for i in range(1 + 7 * (number % 40))]
    text, tokens = "", 0
    finishes: list[str] = []
    stream = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async for event in stream:
        if event.usage is not None:
            tokens = event.usage.completion_tokens
        for choice in event.choices:
            text += choice.text
            finishes += [choice.finish_reason] if choice.finish_reason else []
    return text, finishes, tokens


def test_64_streams_are_complete_and_leave_nothing_behind(service: Deployment) -> None:
    async def everything() -> list[tuple[str, list[str], int]]:
        async with AsyncOpenAI(base_url=f"{service.url}/v1", api_key="unused", max_retries=0) as client:
            return await asyncio.gather(*(one_stream(client, service.model_name, i) for i in range(STREAMS)))

    answers = asyncio.run(everything())
    assert all(finishes == ["length"] and tokens == TOKENS for _, finishes, tokens in answers)
    again = asyncio.run(everything())
    assert [text for text, _, _ in again] == [text for text, _, _ in answers]
    service.assert_quiet()


def test_chat_answers_and_reports_its_usage(service: Deployment) -> None:
    answer = service.client.chat.completions.create(
        model=service.model_name, messages=[{"role": "user", "content": "Hello!"}], max_tokens=8, temperature=0
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_repeated_prompt_is_found_in_the_cache(service: Deployment) -> None:
    prompt = list(range(100, 227)) * 2
    request = {"model": service.model_name, "prompt": prompt, "max_tokens": 2, "temperature": 0}
    first = service.client.completions.create(**request)  # type: ignore[call-overload]
    wait_until(lambda: _cached(service, request) > 200, "the prompt is in some worker's cache")
    second = service.client.completions.create(**request)  # type: ignore[call-overload]
    assert second.choices[0].text == first.choices[0].text


def _cached(service: Deployment, request: dict[str, object]) -> int:
    usage = service.client.completions.create(**request).usage  # type: ignore[call-overload]
    cached: int = usage.prompt_tokens_details.cached_tokens
    return cached


def test_a_client_that_leaves_is_aborted_at_both_workers(service: Deployment) -> None:
    stream = service.client.completions.create(
        model=service.model_name,
        prompt=[70] * 40,
        max_tokens=3000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    service.assert_quiet()


def test_logprobs_and_echo_agree_with_each_other(service: Deployment) -> None:
    greedy = service.client.completions.create(
        model=service.model_name, prompt=[72, 101, 108], max_tokens=3, temperature=0, logprobs=2
    )
    echoed = service.client.completions.create(
        model=service.model_name, prompt=[72, 101, 108], max_tokens=3, temperature=0, logprobs=2, echo=True
    )
    assert greedy.choices[0].logprobs is not None
    assert echoed.choices[0].logprobs is not None
    assert echoed.choices[0].logprobs.token_logprobs is not None
    assert echoed.choices[0].logprobs.token_logprobs[0] is None
    assert echoed.choices[0].logprobs.token_logprobs[3:] == pytest.approx(greedy.choices[0].logprobs.token_logprobs)


@pytest.mark.parametrize("choices", [1, 3])
def test_a_first_token_that_stops_ends_the_request_everywhere(service: Deployment, choices: int) -> None:
    """The prefill worker has the whole answer; what the decode worker was to fetch is let go of."""
    answer = service.client.completions.create(
        model=service.model_name,
        prompt=[71] * 50,
        max_tokens=9,
        temperature=0,
        logit_bias={END_OF_TURN: 100},
        n=choices,
    )
    assert [(c.text, c.finish_reason) for c in answer.choices] == [("", "stop")] * choices
    assert answer.usage is not None
    assert answer.usage.completion_tokens == choices
    service.assert_quiet()


def test_a_seeded_stream_is_the_whole_answer(service: Deployment) -> None:
    request = {"model": service.model_name, "prompt": [80, 81] * 70, "max_tokens": 20, "seed": 7, "n": 3, "logprobs": 1}
    request["temperature"] = 2  # a trained model is sure of itself
    whole = service.client.completions.create(**request)  # type: ignore[call-overload]
    texts, offsets = [""] * 3, [list[int]() for _ in range(3)]
    for event in service.client.completions.create(**request, stream=True):  # type: ignore[call-overload]
        for choice in event.choices:
            texts[choice.index] += choice.text
            offsets[choice.index] += choice.logprobs.text_offset if choice.logprobs else []
    assert texts == [c.text for c in whole.choices]
    assert offsets == [c.logprobs.text_offset for c in whole.choices]
    assert len(set(texts)) == 3


@pytest.mark.parametrize(("length", "room"), [(8190, 2), (8191, 1)])
def test_a_prompt_up_to_the_context_gets_the_room_that_is_left(service: Deployment, length: int, room: int) -> None:
    answer = service.client.completions.create(
        model=service.model_name, prompt=[66] * length, max_tokens=5, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == room
    assert answer.choices[0].finish_reason == "length"
    with pytest.raises(BadRequestError):
        service.client.completions.create(model=service.model_name, prompt=[66] * 8192, max_tokens=1)


def test_a_conversations_next_turn_finds_the_last_one(service: Deployment) -> None:
    request = {"model": service.model_name, "max_tokens": 40, "temperature": 0, "extra_body": {"ignore_eos": True}}
    first = {"role": "user", "content": "Tell me about paged attention, please."}
    said = service.client.chat.completions.create(messages=[first], **request)  # type: ignore[call-overload]
    answer = {"role": "assistant", "content": said.choices[0].message.content}
    turn = {**request, "messages": [first, answer, {"role": "user", "content": "Go on."}]}
    again = service.client.chat.completions.create(**turn)  # type: ignore[call-overload]
    assert again.usage.prompt_tokens_details.cached_tokens >= said.usage.prompt_tokens // 16 * 16 - 16
    repeated = service.client.chat.completions.create(**turn)  # type: ignore[call-overload]
    assert repeated.choices[0].message.content == again.choices[0].message.content


def test_structured_output_is_one_of_what_was_asked_for(service: Deployment) -> None:
    answer = service.client.chat.completions.create(
        model=service.model_name,
        messages=[{"role": "user", "content": "Sun or rain?"}],
        n=4,
        temperature=2.0,
        extra_body={"structured_outputs": {"choice": ["sun", "rain", "日"]}, "ignore_eos": True},
    )
    assert {c.message.content for c in answer.choices} <= {"sun", "rain", "日"}
    assert {c.finish_reason for c in answer.choices} == {"stop"}
    with pytest.raises(BadRequestError) as wrong:
        service.client.completions.create(model=service.model_name, prompt="x", extra_body={"regex": "(?=a)"})
    assert wrong.value.code == "invalid_schema"
    service.assert_quiet()


def test_an_unknown_model_is_404(service: Deployment) -> None:
    with pytest.raises(NotFoundError) as error:
        service.client.completions.create(model="another", prompt="x")
    assert error.value.code == "model_not_found"


def test_a_prompt_over_the_context_is_400(service: Deployment) -> None:
    with pytest.raises(BadRequestError) as error:
        service.client.completions.create(model=service.model_name, prompt=[65] * 50_000)
    assert error.value.code == "context_length_exceeded"


def post(service: Deployment, body: bytes) -> tuple[int, dict[str, object]]:
    request = urllib.request.Request(
        f"{service.url}/v1/completions", data=body, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b'{"model": "demo_model", "prompt": 5}', 400),
        (b'{"model": "demo_model", "prompt": "x", "temperature": NaN}', 400),
        (b'{"model": "demo_model", "prompt": "x", "n": 0}', 400),
        (b'{"model": "demo_model", "prompt": "' + b"x" * 300_000 + b'"}', 413),
    ],
)
def test_a_bad_body_is_refused_with_an_error_object(service: Deployment, body: bytes, status: int) -> None:
    got, answer = post(service, body)
    assert got == status
    error = answer["error"]
    assert isinstance(error, dict)
    assert set(error) == {"message", "type", "param", "code"}


def test_without_workers_requests_are_503_with_retry_after(tmp_path: Path) -> None:
    running = Deployment(tmp_path, DEMO, free_port())
    running.start_proxy()
    try:
        wait_until(lambda: post_status(running) == 503, "the proxy answers", 60)
        with pytest.raises(InternalServerError) as error:
            running.client.completions.create(model="demo_model", prompt="x")
        assert error.value.code == "no_workers"
        assert int(error.value.response.headers["retry-after"]) >= 1
    finally:
        running.stop()


def post_status(service: Deployment) -> int:
    try:
        return post(service, b'{"model": "demo_model", "prompt": "x"}')[0]
    except OSError:
        return 0
