"""Synthetic degradations of clean clips, with reference labels."""
