"""A video large multimodal model as a quality rater for talking-head video."""
