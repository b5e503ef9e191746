"""The video language model: from views of clips and a prompt to the logits of the level words, and to a score."""
