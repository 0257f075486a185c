"""langchain-openai as a client. It brings sixteen packages, so it is none of the development tools: where it is
installed (``pip install -c constraints.txt langchain-openai``; 1.7.3 was the latest that was tried), this runs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.teegpu.api.conftest import Endpoint
from tests.teegpu.api.test_endpoint import MODEL, SCHEMA, TEMPLATE, fits

langchain_openai = pytest.importorskip("langchain_openai")

pytestmark = [pytest.mark.extra, pytest.mark.filterwarnings("ignore")]


def chat(endpoint: Endpoint, **options: Any) -> Any:
    return langchain_openai.ChatOpenAI(
        base_url=endpoint.url + "/v1", api_key="x", model=MODEL, max_retries=0, timeout=30, **options
    )


def test_whole_and_in_pieces(endpoint: Endpoint) -> None:
    model = chat(endpoint, max_tokens=12, temperature=0)
    whole = model.invoke([("system", "Be brief."), ("human", "Hi")])
    assert whole.usage_metadata["output_tokens"] <= 12
    assert "".join(part.content for part in model.stream([("system", "Be brief."), ("human", "Hi")])) == whole.content
    assert [answer.content for answer in model.batch(["a", "b", "a"])][::2] == [model.invoke("a").content] * 2


def test_structured_output(endpoint: Endpoint) -> None:
    model = chat(endpoint, max_tokens=300, temperature=1.0, seed=3)
    schema = {"title": "answer", "description": "An answer.", **SCHEMA}
    assert fits(model.with_structured_output(schema, method="json_schema").invoke("Hi"))


def test_tools(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint.runner.tokenizer, "chat_template", TEMPLATE)
    schema = {"title": "look_up", "description": "Looks up.", **SCHEMA}
    model = chat(endpoint, max_tokens=300, temperature=1.0, seed=2).bind_tools([schema], tool_choice="look_up")
    (call,) = model.invoke("Hi").tool_calls
    assert call["name"] == "look_up"
    assert fits(call["args"])
