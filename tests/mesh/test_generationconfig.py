"""What a model's generation config says of sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mesh.generationconfig import SamplingDefaults, sampling_defaults
from mesh.tokenizer import Tokenizer
from tests.proxy.api_client import Api
from tests.proxy.tiny_tokenizer import model_dir


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, SamplingDefaults()),
        ({"do_sample": False, "top_k": 50}, SamplingDefaults(temperature=0.0)),
        (
            {
                "do_sample": True,
                "temperature": 0.6,
                "top_p": 0.9,
                "top_k": 20,
                "min_p": 0.1,
                "repetition_penalty": 1.05,
            },
            SamplingDefaults(0.6, 0.9, 20, 0.1, 1.05),
        ),
        ({"temperature": 0.6}, SamplingDefaults(temperature=0.6)),
        ({"temperature": "hot", "top_p": 0, "top_k": True, "min_p": 7, "repetition_penalty": None}, SamplingDefaults()),
    ],
)
def test_what_it_says_within_the_apis_limits(config: dict[str, Any], expected: SamplingDefaults) -> None:
    assert sampling_defaults(config) == expected


def test_a_request_gets_what_it_leaves_out(tmp_path: Path) -> None:
    folder = model_dir(tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": 3, "temperature": 0.5, "top_k": 7, "top_p": 0.8}')
    api = Api(tokenizer=Tokenizer.load(folder))

    api.chat()
    assert (api.sent.params.temperature, api.sent.params.top_k, api.sent.params.top_p) == (0.5, 7, 0.8)

    api.chat(temperature=1, top_k=0, top_p=1)
    assert (api.sent.params.temperature, api.sent.params.top_k, api.sent.params.top_p) == (1.0, 0, 1.0)
