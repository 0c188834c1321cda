"""The semantic knowledge base: its store and exact search. Knows no model and no torch."""
