// Vercel's AI SDK, unmodified. Fields that it does not know are passed as options of the provider.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const { url, key, model, images, question, steering } = JSON.parse(process.env.ASKED);
const provider = createOpenAICompatible({ name: "raysteer", baseURL: url, apiKey: key });
const picture = (url) => ({ type: "file", mediaType: "image/png", data: url.split(",")[1] });
const about = (...shown) => [{ role: "user", content: [...shown.map(picture), { type: "text", text: question }] }];
const asked = (rest) => ({ model: provider(model), temperature: 0, maxOutputTokens: 16, maxRetries: 0, ...rest });
const said = async (rest) => (await generateText(asked(rest))).text;

let streamed = "";
for await (const piece of streamText(asked({ messages: about(images[0]) })).textStream) streamed += piece;
const answers = {
  plain: await said({ messages: about(images[0]) }),
  streamed,
  several: await said({ messages: about(...images) }),
  text: await said({ instructions: "Be brief.", prompt: question }),
};
if (steering) answers.steered = await said({ messages: about(images[0]), providerOptions: { raysteer: { steering } } });
console.log(JSON.stringify(answers));
