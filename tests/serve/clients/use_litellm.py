"""LiteLLM, unmodified."""

import json
import os

import litellm

asked = json.loads(os.environ["ASKED"])


def about(*images):
    parts = [{"type": "image_url", "image_url": {"url": url, "format": "image/png"}} for url in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": asked["question"]}]}]


def ask(messages, **rest):
    return litellm.completion(
        model=f"openai/{asked['model']}",
        base_url=asked["url"],
        api_key=asked["key"],
        messages=messages,
        temperature=0,
        max_tokens=16,
        num_retries=0,
        **rest,
    )


def said(messages, **rest):
    return ask(messages, **rest).choices[0].message.content


one, *_ = images = asked["images"]
answers = {
    "plain": said(about(one)),
    "streamed": "".join(event.choices[0].delta.content or "" for event in ask(about(one), stream=True)),
    "several": said(about(*images)),
    "text": said([{"role": "system", "content": "Be brief."}, {"role": "user", "content": asked["question"]}]),
}
if asked["steering"]:
    answers["steered"] = said(about(one), extra_body={"steering": asked["steering"]})
print(json.dumps(answers))
