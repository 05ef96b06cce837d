"""Engines convert, call a potential and convert back; they never train."""
