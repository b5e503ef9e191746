"""The web page: rate clips, compare them, look at a set. Needs gradio, the extra `web`."""
