"""Defects of a clip: their vocabulary, calibration, profile and explanation."""
