"""Text in and out: tokenizer and chat templates. Knows no model, no image and no torch."""
