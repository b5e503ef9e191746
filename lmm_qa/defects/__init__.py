"""TODO-DOC defects."""
