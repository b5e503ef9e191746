"""TODO-DOC video."""
