"""The bundled model through the whole service: what it was told survives the way from one worker to another."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from openai import AsyncOpenAI
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from deploy.demo_model.train.facts import filler
from deploy.demo_model.train.words import Split, Words
from mesh.modeldir import DEMO_MODEL
from tests.e2e.processes import Deployment, deployment, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

BLOCK = 16


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Every prompt is computed by the prefill worker and decoded by the other."""
    with deployment(
        tmp_path_factory.mktemp("demo"),
        DEMO_MODEL,
        prefill=1,
        decode=1,
        flags=("--max-num-batched-tokens", "256", "--kv-blocks", "1024"),
        proxy_flags=("--disaggregate-above", "0"),
    ) as running:
        yield running


def answer(service: Deployment, *messages: dict[str, str]) -> Any:
    """The completion; it must have gone through both workers."""
    raw = service.client.chat.completions.with_raw_response.create(
        model=service.model_name,
        messages=list(messages),  # type: ignore[arg-type]
        temperature=0,
        max_tokens=200,
    )
    assert (raw.headers["x-kvmesh-prefill"], raw.headers["x-kvmesh-decode"]) == ("prefill-0", "decode-0")
    completion = raw.parse()
    assert completion.choices[0].finish_reason == "stop"
    return completion


def said(completion: Any) -> str:
    text: str = completion.choices[0].message.content
    return text


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_fact_anywhere_in_a_long_prompt_crosses_the_hand_off(service: Deployment, depth: float) -> None:
    words = Words(random.Random(1), Split.HELD_OUT)
    sentences = [filler(words) for _ in range(50)]
    sentences.insert(int(depth * len(sentences)), "Mirel's door code is 70815.")

    completion = answer(service, user(" ".join(sentences) + " What is Mirel's door code?"))

    assert said(completion) == "Mirel's door code is 70815."
    assert completion.usage.prompt_tokens > 700


def test_a_second_turn_finds_the_first_ones_blocks(service: Deployment) -> None:
    words = Words(random.Random(2), Split.HELD_OUT)
    first = user("Please remember this. The code for the lamp is 70815. " + " ".join(filler(words) for _ in range(20)))
    told = answer(service, first)
    question = user("What is the code for the lamp?")

    def cached() -> bool:
        again = answer(service, first, assistant(said(told)), question)
        assert said(again) == "The code for the lamp is 70815."
        full = told.usage.total_tokens // BLOCK * BLOCK  # of the answer too
        return bool(again.usage.prompt_tokens_details.cached_tokens >= 0.95 * full)

    wait_until(cached, "the first turn's blocks are reused")


def test_json_has_the_asked_keys_and_values(service: Deployment) -> None:
    completion = answer(
        service,
        user("The owner is Mirel. The size is 42. The colour is red. Answer in JSON with the keys size and owner."),
    )

    assert json.loads(said(completion)) == {"size": 42, "owner": "Mirel"}


def test_text_is_copied_exactly(service: Deployment) -> None:
    text = "K7-QX2 plomber Tarven 4821, quindle dra-7"

    assert said(answer(service, user(f"Repeat: {text}"))) == text


def test_it_says_what_kvmesh_is(service: Deployment) -> None:
    assert "separate prefill and decode workers" in said(answer(service, user("What is kvmesh?")))


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
FINDINGS = {"Tarven": "sunny", "Oslo": "snowy"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("question", "cities", "expected"),
    [
        ("What is the weather in Tarven?", ["Tarven"], "The weather in Tarven is sunny."),
        (
            "What is the weather in Tarven and the weather in Oslo?",
            ["Tarven", "Oslo"],
            "The weather in Tarven is sunny. The weather in Oslo is snowy.",
        ),
    ],
    ids=["one call", "two calls"],
)
def test_an_agent_loop_ends_with_the_tools_answer(
    service: Deployment, question: str, cities: list[str], expected: str, stream: bool
) -> None:
    messages: list[Any] = [user(question)]

    def ask() -> Any:
        request: dict[str, Any] = {
            "model": service.model_name,
            "messages": messages,
            "tools": [WEATHER],
            "temperature": 0,
            "max_tokens": 200,
        }
        if not stream:
            return service.client.chat.completions.create(**request).choices[0]
        with service.client.chat.completions.stream(**request) as events:
            return events.get_final_completion().choices[0]

    asked = ask()
    assert asked.finish_reason == "tool_calls"
    calls = asked.message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": city} for city in cities]
    kept = {"id", "type", "function"}
    messages.append({"role": "assistant", "tool_calls": [call.model_dump(include=kept) for call in calls]})
    for call, city in zip(calls, cities, strict=True):
        result = json.dumps({"city": city, "weather": FINDINGS[city]})
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})

    answered = ask()
    assert (answered.message.content, answered.finish_reason) == (expected, "stop")


def test_no_tool_is_called_when_none_fits(service: Deployment) -> None:
    completion = service.client.chat.completions.create(
        model=service.model_name, messages=[{"role": "user", "content": "Hello!"}], tools=[WEATHER], temperature=0
    )
    assert completion.choices[0].message.tool_calls is None
    assert completion.choices[0].message.content == "Hello! How can I help you?"


def test_a_required_call_is_made_whatever_was_said(service: Deployment) -> None:
    mood = {"type": "object", "properties": {"mood": {"enum": ["good", "bad"]}}, "required": ["mood"]}
    tool: Any = {
        "type": "function",
        "function": {"name": "note", "parameters": {**mood, "additionalProperties": False}},
    }
    completion = service.client.chat.completions.create(
        model=service.model_name,
        messages=[{"role": "user", "content": "Hello!"}],
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=200,
    )
    choice = completion.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "note"
    assert json.loads(call.function.arguments)["mood"] in ("good", "bad")


def test_an_agent_framework_works_unmodified(service: Deployment) -> None:
    asked: list[str] = []

    def get_weather(city: str) -> dict[str, str]:
        """Get the weather in a city."""
        asked.append(city)
        return {"weather": FINDINGS[city]}

    async def run() -> str:
        async with AsyncOpenAI(base_url=f"{service.url}/v1", api_key="unused") as client:
            model = OpenAIChatModel(service.model_name, provider=OpenAIProvider(openai_client=client))
            agent = Agent(model, system_prompt="Be brief.", tools=[get_weather], model_settings={"temperature": 0})
            return (await agent.run("What is the weather in Tarven?")).output

    assert asyncio.run(run()) == "The weather in Tarven is sunny."
    assert asked == ["Tarven"]
