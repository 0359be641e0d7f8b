"""Log-likelihoods by transformers, as lm-eval has them; runs in the server's environment.

The argument is a model's folder, the input a JSON list of (context, continuation); the output one
of (log-likelihood, whether the continuation is greedy).
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM

from minisgl_fast.text.tokenizer import Tokenizer


@torch.inference_mode()
def main(folder):
    tokenizer = Tokenizer.load(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for context, continuation in json.load(sys.stdin):
        first = len(tokenizer.encode(context))
        ids = tokenizer.encode(context + continuation)
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        places = range(first, len(ids))
        total = sum(float(logprobs[i - 1, ids[i]]) for i in places)
        is_greedy = all(int(logprobs[i - 1].argmax()) == ids[i] for i in places)
        answers.append((total, is_greedy))
    print(json.dumps(answers))


main(sys.argv[1])
