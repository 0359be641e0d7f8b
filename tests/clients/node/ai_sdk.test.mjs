// The AI SDK with @ai-sdk/openai-compatible, which checks every chunk against its schema.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, stepCountIs, streamText, tool } from "ai";
import assert from "node:assert/strict";
import { test } from "node:test";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "minisgl",
  baseURL: `${process.env.BASE_URL}/v1`,
  apiKey: "none",
  includeUsage: true,
});
const model = provider("scripted");
const THOUGHT = "<think>\nLet me 想想 🤔\n</think>\n\n";
const CALL =
  '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich 🏔"}}\n</tool_call>';
const cities = [];
const tools = {
  get_weather: tool({
    description: "Weather",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => {
      cities.push(city);
      return "21 °C";
    },
  }),
};
const failing = { onError: ({ error }) => assert.fail(error), maxRetries: 0 };

test("text and reasoning, whole", async () => {
  const prompt = `Say <<${THOUGHT}Grüezi 👋>>`;
  const result = await generateText({ model, prompt, maxRetries: 0 });
  assert.equal(result.text.trim(), "Grüezi 👋");
  assert.equal(result.reasoningText.trim(), "Let me 想想 🤔");
  assert.equal(result.finishReason, "stop");
  assert.ok(result.usage.inputTokens > 0);
  assert.ok(result.usage.outputTokens > 0);
});

test("text and reasoning, streamed", async () => {
  const prompt = `Say <<${THOUGHT}Grüezi 👋>>`;
  const result = streamText({ model, prompt, ...failing });
  let text = "";
  for await (const part of result.textStream) {
    text += part;
  }
  assert.equal(text.trim(), "Grüezi 👋");
  assert.equal((await result.reasoningText).trim(), "Let me 想想 🤔");
  assert.equal(await result.finishReason, "stop");
  assert.ok((await result.usage).outputTokens > 0);
});

test("a tool is called and its result goes back, whole and streamed", async () => {
  const options = { model, tools, stopWhen: stepCountIs(2), prompt: `Say <<${CALL}>>` };
  const whole = await generateText({ ...options, maxRetries: 0 });
  assert.equal(whole.text, "It is done.");
  const streamed = streamText({ ...options, ...failing });
  await streamed.consumeStream();
  assert.equal(await streamed.text, "It is done.");
  const [first] = await streamed.steps;
  assert.equal(first.finishReason, "tool-calls");
  assert.deepEqual(cities, ["Zürich 🏔", "Zürich 🏔"]);
});

test("an error is told", async () => {
  await assert.rejects(
    generateText({ model: provider("gpt-4"), prompt: "x", maxRetries: 0 }),
    (error) => error.statusCode === 404 && /does not exist/.test(error.message),
  );
});
