"""The official `openai` client against the server: models, completions, a stream, chat.

python serve/clients/openai_client.py          pip install openai
CRYSTALLM_KIT_URL (default http://127.0.0.1:8000) says where; CRYSTALLM_KIT_KEY holds the key, if needed.
"""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("CRYSTALLM_KIT_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("CRYSTALLM_KIT_KEY", "none-is-asked-for"),
)
model = client.models.list().data[0].id
print("model:", model)

# Two texts of the model's own format. `conditions` is the server's own field: every token is drawn so that
# they hold; the prompt is then the server's to write.
answer = client.completions.create(
    model=model, prompt=None, n=2, seed=1, logprobs=1, extra_body={"conditions": {"formula": "NaCl"}}
)
for choice in answer.choices:
    print("completion:", choice.text.replace("\n", " / "), choice.finish_reason)
print("tokens:", answer.usage.completion_tokens)

# The same, token by token.
stream = client.completions.create(
    model=model, prompt=None, seed=1, stream=True, extra_body={"conditions": {"formula": "NaCl"}}
)
print("stream:", " | ".join(chunk.choices[0].text.strip() for chunk in stream if chunk.choices))

# Plain words. The message holds each crystal as a CIF block, and in its field `crystals` as data.
chat = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "two perovskites of Ba, Ti and O"}], seed=1
)
message = chat.choices[0].message
print("chat:", message.content.splitlines()[0])
for crystal in message.model_extra["crystals"]:
    print("crystal:", crystal["formula"], crystal["spacegroup_number"])
