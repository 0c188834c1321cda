"""An archive of embeddings of many scenes, and the search over it."""
