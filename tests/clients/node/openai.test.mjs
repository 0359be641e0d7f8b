// The openai package of npm against the scripted server, whose model says what stands between
// << and >>.

import assert from "node:assert/strict";
import { after, test } from "node:test";
import OpenAI from "openai";

const client = new OpenAI({
  baseURL: `${process.env.BASE_URL}/v1`,
  apiKey: "none",
  maxRetries: 0,
});
const model = "scripted";
const say = (text) => [{ role: "user", content: `Say <<${text}>>` }];
const THOUGHT = "<think>\nLet me 想想 🤔\n</think>\n\n";
const CALL =
  '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich 🏔"}}\n</tool_call>';
const parameters = { type: "object", properties: { city: { type: "string" } } };
const tools = [{ type: "function", function: { name: "get_weather", parameters } }];

test("a chat answers whole and streamed alike", async () => {
  const body = { model, messages: say("Grüezi 👋 你好"), temperature: 0 };
  const whole = await client.chat.completions.create(body);
  assert.equal(whole.choices[0].message.content, "Grüezi 👋 你好");
  const runner = client.chat.completions.stream({
    ...body,
    stream_options: { include_usage: true },
  });
  const final = await runner.finalChatCompletion();
  assert.equal(final.choices[0].message.content, "Grüezi 👋 你好");
  assert.equal(final.choices[0].finish_reason, "stop");
  const usage = await runner.totalUsage();
  assert.equal(usage.total_tokens, whole.usage.total_tokens);
});

test("calls and reasoning come apart in a stream", async () => {
  const messages = say(`${THOUGHT}Wait. ${CALL}`);
  const stream = await client.chat.completions.create({ model, messages, tools, stream: true });
  const found = { content: "", reasoning_content: "", arguments: "" };
  let reason = null;
  for await (const chunk of stream) {
    const { delta, finish_reason } = chunk.choices[0];
    found.content += delta.content ?? "";
    found.reasoning_content += delta.reasoning_content ?? "";
    found.arguments += delta.tool_calls?.[0]?.function?.arguments ?? "";
    reason = finish_reason ?? reason;
  }
  assert.equal(found.content.trim(), "Wait.");
  assert.equal(found.reasoning_content.trim(), "Let me 想想 🤔");
  assert.deepEqual(JSON.parse(found.arguments), { city: "Zürich 🏔" });
  assert.equal(reason, "tool_calls");
});

test("runTools calls a function and goes on", async () => {
  const cities = [];
  const runner = client.chat.completions.runTools({
    model,
    messages: say(CALL),
    tools: [
      {
        type: "function",
        function: {
          name: "get_weather",
          parameters,
          parse: JSON.parse,
          function: ({ city }) => {
            cities.push(city);
            return "21 °C";
          },
        },
      },
    ],
  });
  assert.equal(await runner.finalContent(), "It is done.");
  assert.deepEqual(cities, ["Zürich 🏔"]);
});

test("a stream can be left", async () => {
  const controller = new AbortController();
  const stream = await client.chat.completions.create(
    { model, messages: say("word ".repeat(500)), stream: true },
    { signal: controller.signal },
  );
  let count = 0;
  for await (const _ of stream) {
    count += 1;
    if (count === 3) {
      controller.abort();
    }
  }
  assert.ok(count < 500);
  const again = await client.chat.completions.create({ model, messages: say("still here") });
  assert.equal(again.choices[0].message.content, "still here");
});

test("responses build the same in a stream as whole", async () => {
  const tool = { type: "function", name: "get_weather", parameters, strict: false };
  const body = { model, input: say(`${THOUGHT}Hi${CALL}`), tools: [tool] };
  const whole = await client.responses.create(body);
  assert.equal(whole.output_text.trim(), "Hi");
  assert.deepEqual(
    whole.output.map((item) => item.type),
    ["reasoning", "message", "function_call"],
  );
  const stream = client.responses.stream(body);
  const types = new Set();
  for await (const event of stream) {
    types.add(event.type);
  }
  const final = await stream.finalResponse();
  assert.equal(final.output_text, whole.output_text);
  assert.equal(final.output[2].arguments, whole.output[2].arguments);
  assert.ok(types.has("response.reasoning_text.delta"));
  assert.ok(types.has("response.completed"));
});

test("completions, models and errors", async () => {
  const completion = await client.completions.create({ model, prompt: "x", max_tokens: 3 });
  assert.equal(completion.usage.completion_tokens, 3);
  const models = await client.models.list();
  assert.equal(models.data[0].id, model);
  await assert.rejects(
    client.chat.completions.create({ model: "gpt-4", messages: say("x") }),
    (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
  );
  await assert.rejects(
    client.chat.completions.create({ model, messages: say("x"), temperature: -1, stream: true }),
    (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
  );
});

after(() => client.close?.());
