"""Items of a response's input: what is taken, how it is completed, and the chat messages it becomes."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.errors import RequestError
from proxy.api.responses_items import ItemIds, input_items, references, response_of
from proxy.api.responses_messages import chat_messages, turn_starts

RESPONSE = "resp_" + "ab" * 24
CALL: Any = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}'}
RESULT: Any = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}
THOUGHT: Any = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def items(given: Any, before: Any = (), found: Any = None) -> list[dict[str, Any]]:
    return input_items(given, ItemIds(RESPONSE), before=before, found=found or {})


def messages(given: Any, instructions: str | None = None) -> list[dict[str, Any]]:
    return chat_messages(instructions, items(given))


def test_a_text_is_a_users_message_with_an_id_of_the_response() -> None:
    (item,) = items("hi")
    assert item == {
        "id": item["id"],
        "type": "message",
        "role": "user",
        "content": [{"type": "input_text", "text": "hi"}],
        "status": "completed",
    }
    assert response_of(item["id"]) == RESPONSE


@pytest.mark.parametrize("id", ["msg_123", "", "resp_" + "ab" * 24, "msg_" + "AB" * 24 + "0001", "msg_" + "ab" * 24])
def test_other_ids_are_of_no_response(id: str) -> None:
    assert response_of(id) is None


def test_ids_are_distinct_and_a_clients_own_is_kept() -> None:
    found = items([user("a"), {**said("b"), "id": "msg_mine"}, user("c")])
    assert found[1]["id"] == "msg_mine"
    assert len({item["id"] for item in found}) == 3


def test_instructions_come_first() -> None:
    given = [{"role": "developer", "content": "Be brief."}, user("hi")]
    assert messages(given, "Be nice.") == [
        {"role": "system", "content": "Be nice."},
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]


def test_parts_become_lines() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages([{"role": "user", "content": parts}])[0]["content"] == "a\nb"
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    assert messages([user("hi"), refusal])[1]["content"] == "No."
    assert messages([{**user("hi"), "type": None, "id": None}]) == [{"role": "user", "content": "hi"}]


def test_a_turn_of_several_items_is_one_message() -> None:
    second = {**CALL, "call_id": "c2", "name": "time", "arguments": "{}"}
    given = [user("hi"), THOUGHT, said("Wait."), CALL, second, RESULT, {**RESULT, "call_id": "c2", "output": "noon"}]
    assert messages(given)[1:] == [
        {
            "role": "assistant",
            "content": "Wait.",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
                {"id": "c2", "type": "function", "function": {"name": "time", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "c2", "content": "noon"},
    ]


@pytest.mark.parametrize(
    ("given", "contents"),
    [
        ([said("a"), said("b")], ["a", "b"]),
        ([CALL, said("b")], ["", "b"]),
        ([THOUGHT, THOUGHT, said("a")], ["", "a"]),
        ([said("a"), THOUGHT, said("b")], ["a", "b"]),
    ],
)
def test_what_is_out_of_order_begins_another_message(given: Any, contents: list[str]) -> None:
    found = messages(given)
    assert [m["content"] for m in found] == contents
    assert {m["role"] for m in found} == {"assistant"}


def test_an_output_of_parts_is_their_text() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert messages([CALL, {**RESULT, "output": parts}])[1]["content"] == "a\nb"


def test_a_summary_stands_for_reasoning_without_content() -> None:
    summary = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Short."}]}
    assert messages([summary, said("a")])[0]["reasoning_content"] == "Short."


def test_an_output_needs_its_call_before_it() -> None:
    assert len(items([RESULT], before=[CALL])) == 1
    with pytest.raises(RequestError) as caught:
        items([user("hi"), RESULT, CALL])
    assert (caught.value.status, caught.value.param) == (400, "input.1.call_id")


def test_references_are_named_and_replaced() -> None:
    given = [{"type": "item_reference", "id": "a"}, user("hi"), {"id": "b"}]
    assert references(given) == {"a": "input.0.id", "b": "input.2.id"}
    found = items(given, found={"a": {**CALL, "id": "a"}, "b": {**RESULT, "id": "b"}})
    assert [item["id"] for item in found[::2]] == ["a", "b"]
    assert references("text") == {}


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (5, "input"),
        ({}, "input"),
        ([5], "input.0"),
        ([user("hi"), {}], "input.1.role"),
        ([{"type": 5}], "input.0.type"),
        ([{"type": "web_search_call"}], "input.0.type"),
        ([{"role": "tool", "content": "x"}], "input.0.role"),
        ([{"role": ["user"], "content": "x"}], "input.0.role"),
        ([{"role": "user"}], "input.0.content"),
        ([{"role": "user", "content": ["x"]}], "input.0.content.0.type"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "input.0.content.0.text"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "input.0.content.0.type"),
        ([{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}], "input.0.content.0.type"),
        ([{**user("x"), "id": 5}], "input.0.id"),
        ([{**user("x"), "id": "x" * 129}], "input.0.id"),
        ([{**CALL, "call_id": None}], "input.0.call_id"),
        ([{**CALL, "name": 5}], "input.0.name"),
        ([{**CALL, "arguments": {}}], "input.0.arguments"),
        ([CALL, {**RESULT, "output": None}], "input.1.output"),
        ([CALL, {**RESULT, "output": [{"type": "input_file"}]}], "input.1.output.0.type"),
        ([{**THOUGHT, "content": "Hm."}], "input.0.content"),
        ([{**THOUGHT, "content": [{"type": "summary_text", "text": "x"}]}], "input.0.content"),
        ([{**THOUGHT, "content": [{"type": "reasoning_text"}]}], "input.0.content.0.text"),
        ([{"type": "reasoning", "summary": [], "encrypted_content": "x"}], "input.0.encrypted_content"),
    ],
)
def test_a_wrong_item_is_named(given: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        items(given)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.message


@pytest.mark.parametrize("reference", [{"type": "item_reference"}, {"type": "item_reference", "id": 5}])
def test_a_reference_without_an_id_is_named(reference: Any) -> None:
    with pytest.raises(RequestError) as caught:
        references([user("hi"), reference])
    assert caught.value.param == "input.1.id"


def test_a_conversation_is_cut_at_the_users_messages() -> None:
    assert turn_starts(items([user("a"), said("b"), user("c"), CALL, RESULT, user("d")])) == [0, 2, 5]
