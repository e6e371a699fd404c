"""Stream a chat, then get JSON of a schema, from a server that runs already.

``vllm serve CHECKPOINT --attention-backend recalkv`` starts one; then
``python examples/openai_client.py http://localhost:8000``.
"""

import json
import sys

import openai

CITY = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "capital": {"type": "boolean"}},
    "required": ["name", "capital"],
    "additionalProperties": False,
}


def main(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id

    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is photosynthesis?"}],
        max_completion_tokens=48,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    completion = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Name a city in France, in JSON."}],
        max_completion_tokens=64,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}},
    )
    print(json.loads(completion.choices[0].message.content))


if __name__ == "__main__":
    main(sys.argv[1])
