"""What a client with the interface of OpenAI's own is asked, and the answers that it prints."""

import json
import os

asked = json.loads(os.environ["ASKED"])


def print_answers(ask, about_image, instructing):
    """Ask all questions.

    `ask`: takes messages and further fields of a request, returns the client's response.
    `about_image`: the fields of an image's part beside its URL. `instructing`: the role of instructions.
    """

    def about(*images):
        parts = [{"type": "image_url", "image_url": {"url": url, **about_image}} for url in images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": asked["question"]}]}]

    def said(messages, **fields):
        return ask(messages, **fields).choices[0].message.content

    one, *_ = images = asked["images"]
    in_text = [{"role": instructing, "content": "Be brief."}, {"role": "user", "content": asked["question"]}]
    answers = {
        "plain": said(about(one)),
        "streamed": "".join(event.choices[0].delta.content or "" for event in ask(about(one), stream=True)),
        "several": said(about(*images)),
        "text": said(in_text),
    }
    if asked["steering"]:
        answers["steered"] = said(about(one), extra_body={"steering": asked["steering"]})
    print(json.dumps(answers))
