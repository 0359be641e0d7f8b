"""langchain-tests' integration tests of chat models, for ChatOpenAI before this server.

What a model would have to know or want to do, the scripted engine does; the tests are about
shapes: messages, streams, tool calls, structured output, usage.
"""

import pytest
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class _Chat(ChatModelIntegrationTests):
    responses_api = False

    @pytest.fixture(autouse=True)
    def _server(self, scripted):
        type(self).url = scripted

    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return {
            "base_url": f"{self.url}/v1",
            "api_key": "none",
            "model": "scripted",
            "max_retries": 0,
            "temperature": 0,
            "stream_usage": True,
            "use_responses_api": self.responses_api,
        }

    @property
    def supports_image_inputs(self):
        return False

    @property
    def supports_model_override(self):
        return False  # one model is served


class TestChatCompletions(_Chat):
    @property
    def supports_json_mode(self):
        return True


class TestResponses(_Chat):
    responses_api = True
