"""Ratings: what a row is, and the file of rows that resumes."""
