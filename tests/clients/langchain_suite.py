"""LangChain's standard tests of a chat model, over chat completions and over responses of a running service
(`KVMESH_URL`). Run by `test_clients.py` with the interpreter that has LangChain."""

from __future__ import annotations

import os
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestKvmesh(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        url = os.environ["KVMESH_URL"]
        return {"base_url": f"{url}/v1", "api_key": "unused", "model": "tiny", "stream_usage": True}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "tiny"


class TestKvmeshResponses(TestKvmesh):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**super().chat_model_params, "use_responses_api": True}
