"""Text in and out: tokenizer, chat template, incremental detokenization with stop strings."""
