"""LangChain's ChatOpenAI, unmodified."""

import json
import os

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

asked = json.loads(os.environ["ASKED"])
options = {"model": asked["model"], "base_url": asked["url"], "api_key": asked["key"], "temperature": 0}
chat = ChatOpenAI(**options, max_tokens=16, max_retries=0)


def about(*images):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return [HumanMessage([*parts, {"type": "text", "text": asked["question"]}])]


one, *_ = images = asked["images"]
answers = {
    "plain": chat.invoke(about(one)).content,
    "streamed": "".join(piece.content for piece in chat.stream(about(one))),
    "several": chat.invoke(about(*images)).content,
    "text": chat.invoke([SystemMessage("Be brief."), HumanMessage(asked["question"])]).content,
}
if asked["steering"]:
    steered = ChatOpenAI(**options, max_tokens=16, max_retries=0, extra_body={"steering": asked["steering"]})
    answers["steered"] = steered.invoke(about(one)).content
print(json.dumps(answers))
