"""The official client for Python, unmodified."""

from openai import OpenAI
from openai_style import asked, print_answers

client = OpenAI(base_url=asked["url"], api_key=asked["key"], max_retries=0)


def ask(messages, **fields):
    return client.chat.completions.create(
        model=asked["model"], messages=messages, temperature=0, max_tokens=16, **fields
    )


print_answers(ask, {"detail": "low"}, "developer")
