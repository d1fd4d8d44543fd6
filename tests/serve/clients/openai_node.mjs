// The official client for Node, unmodified.
import OpenAI from "openai";

const { url, key, model, images, question, steering } = JSON.parse(process.env.ASKED);
const client = new OpenAI({ baseURL: url, apiKey: key, maxRetries: 0 });
const picture = (url) => ({ type: "image_url", image_url: { url, detail: "high" } });
const about = (...shown) => [{ role: "user", content: [...shown.map(picture), { type: "text", text: question }] }];
const ask = (messages, rest = {}) =>
  client.chat.completions.create({ model, messages, temperature: 0, max_completion_tokens: 16, ...rest });
const said = async (...asked) => (await ask(...asked)).choices[0].message.content;

let streamed = "";
for await (const event of await ask(about(images[0]), { stream: true })) streamed += event.choices[0].delta.content ?? "";
const answers = {
  plain: await said(about(images[0])),
  streamed,
  several: await said(about(...images)),
  text: await said([{ role: "developer", content: "Be brief." }, { role: "user", content: question }]),
};
if (steering) answers.steered = await said(about(images[0]), { steering });
console.log(JSON.stringify(answers));
