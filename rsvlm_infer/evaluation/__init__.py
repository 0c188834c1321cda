"""How right the answers are: metrics on strings and arrays, and readers of labelled sets. Knows no model, no engine, no clock."""
