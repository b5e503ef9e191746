"""Defects of a clip: their vocabulary, measured features, classifier, profile and explanation."""
