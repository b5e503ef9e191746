"""Files that are complete or absent, and tables of rows."""
