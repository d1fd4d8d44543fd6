"""LiteLLM, unmodified."""

import litellm
from openai_style import asked, print_answers


def ask(messages, **fields):
    return litellm.completion(
        model=f"openai/{asked['model']}",
        base_url=asked["url"],
        api_key=asked["key"],
        messages=messages,
        temperature=0,
        max_tokens=16,
        num_retries=0,
        **fields,
    )


print_answers(ask, {"format": "image/png"}, "system")
