"""TODO-DOC degrade."""
