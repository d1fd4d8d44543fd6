"""LlamaIndex' OpenAILike, unmodified."""

import json
import os

from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.llms.openai_like import OpenAILike

asked = json.loads(os.environ["ASKED"])
options = {"model": asked["model"], "api_base": asked["url"], "api_key": asked["key"], "is_chat_model": True}
options |= {"temperature": 0, "max_tokens": 16, "max_retries": 0, "context_window": 512}
chat = OpenAILike(**options)


def about(*images):
    blocks = [ImageBlock(url=url) for url in images]
    return [ChatMessage(role="user", blocks=[*blocks, TextBlock(text=asked["question"])])]


def said(llm, messages):
    return llm.chat(messages).message.content


one, *_ = images = asked["images"]
in_text = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content=asked["question"])]
answers = {
    "plain": said(chat, about(one)),
    "streamed": "".join(piece.delta or "" for piece in chat.stream_chat(about(one))),
    "several": said(chat, about(*images)),
    "text": said(chat, in_text),
}
if asked["steering"]:
    steered = OpenAILike(**options, additional_kwargs={"extra_body": {"steering": asked["steering"]}})
    answers["steered"] = said(steered, about(one))
print(json.dumps(answers))
