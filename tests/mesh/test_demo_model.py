"""The bundled model: small, whole, described, and loadable by transformers as it is."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from mesh.modeldir import DEMO_MODEL
from mesh.tokenizer import Tokenizer

MAX_WEIGHTS_BYTES = 12_000_000
TEXT = "Héllo 🙂\n\x00\ttokens  and   spaces, codes K7-QX2 and getWeather()"
CALLS = (
    '<tool_call>{"name": "get_weather", "arguments": {"city": "Tarven"}}</tool_call>\n'
    '<tool_call>{"name": "get_time", "arguments": {"city": "Oslo"}}</tool_call>'
)
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the weather in Tarven and the time in Oslo?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Tarven"}}},
            {"type": "function", "function": {"name": "get_time", "arguments": {"city": "Oslo"}}},
        ],
    },
    {"role": "tool", "content": "sunny"},
    {"role": "tool", "content": "10:30"},
]
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "The city."}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "Get the weather.", "parameters": CITY}},
    {"type": "function", "function": {"name": "get_time", "description": "", "parameters": {"type": "object"}}},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    found = AutoTokenizer.from_pretrained(DEMO_MODEL)
    assert isinstance(found, PreTrainedTokenizerBase)
    return found


def test_it_is_small_and_its_card_states_each_figure_with_its_count() -> None:
    assert sum(p.stat().st_size for p in DEMO_MODEL.glob("*.safetensors")) <= MAX_WEIGHTS_BYTES
    assert json.loads((DEMO_MODEL / "config.json").read_text())["max_position_embeddings"] >= 4096
    card = (DEMO_MODEL / "README.md").read_text()
    for figure in (
        "recall at 3,500 tokens",
        "exact copy",
        "right tool",
        "no call",
        "tool's result",
        "JSON",
        "ends its",
    ):
        assert re.search(rf"\| [^|\n]*{figure}[^\n]* \d+ of \d+ \|", card), figure


def test_every_text_survives_its_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens) == TEXT
    assert Tokenizer.load(DEMO_MODEL).encode(TEXT, add_special_tokens=False) == tokens


def test_a_word_has_the_same_tokens_in_a_sentence_and_in_json(tokenizer: PreTrainedTokenizerBase) -> None:
    def tokens(text: str) -> str:
        return " ".join(map(str, tokenizer(text, add_special_tokens=False)["input_ids"]))

    for word in ("Tarven", "quindle", "K7-QX2", "70815"):
        assert tokens(word) in tokens(f"It is {word} here.")
        assert tokens(word) in tokens(json.dumps({"is": word}))


def test_the_template_shows_tools_calls_and_results(tokenizer: PreTrainedTokenizerBase) -> None:
    text = tokenizer.apply_chat_template(MESSAGES, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|im_start|>system\nBe brief.\n<tools>\nget_weather: Get the weather.\n- city (string): The city.\n"
        "get_time: \n</tools><|im_end|>\n"
        "<|im_start|>user\nWhat is the weather in Tarven and the time in Oslo?<|im_end|>\n"
        f"<|im_start|>assistant\n{CALLS}<|im_end|>\n"
        "<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>tool\n10:30<|im_end|>\n<|im_start|>assistant\n"
    )
    assert Tokenizer.load(DEMO_MODEL).render_chat(MESSAGES, TOOLS) == text


def test_transformers_parses_its_calls(tokenizer: Any) -> None:
    message = tokenizer.parse_response(CALLS + "<|im_end|>", prefix="")
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "get_weather", "arguments": {"city": "Tarven"}},
        {"name": "get_time", "arguments": {"city": "Oslo"}},
    ]
    assert tokenizer.parse_response("Hello!<|im_end|>", prefix="")["content"] == "Hello!"


def test_transformers_generates_with_it(tokenizer: PreTrainedTokenizerBase) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    question = [{"role": "user", "content": "My name is Mirel. What is my name?"}]
    prompt: Any = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert text == "Your name is Mirel.<|im_end|>"
