"""Chat completions asked of a server in tests, whole and streamed."""

import json

from serving import ask, events

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>'
CODER = (
    "{{ '<function=' if false }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n{{ '<think>\n' if think }}"
)


def schema_form(schema):
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


def tool(name="f", kind="string"):
    properties = {"a": {"type": kind, "enum": ["x", "y"]} if kind == "string" else {"type": kind}}
    parameters = {"type": "object", "properties": properties, "required": ["a"]}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def chat(llm, **body):
    content = json.dumps({"messages": HI, **body})
    return ask(llm, "POST", CHAT, content=content, headers={"content-type": "application/json"})


def reply(llm, **body):
    response = chat(llm, **body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(llm, **body):
    response = chat(llm, **body)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def streamed(llm, **body):
    """(pieces, the message that they join to)."""
    found = events(chat(llm, stream=True, **body))
    assert found[-1] == "[DONE]"
    pieces = [json.loads(event) for event in found[:-1]]
    assert not [piece for piece in pieces if "error" in piece]
    message = {"content": "", "reasoning_content": "", "tool_calls": []}
    for piece in pieces:
        for choice in piece["choices"]:
            if choice["index"]:
                continue
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning_content"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(message["tool_calls"])
                    assert call["type"] == "function"
                    message["tool_calls"].append(dict(call["function"]))
                else:
                    assert "name" not in call["function"]
                    message["tool_calls"][-1]["arguments"] += call["function"]["arguments"]
            if choice["finish_reason"]:
                assert "finish" not in message, "one reason for the end"
                message["finish"] = choice["finish_reason"]
    return pieces, message
