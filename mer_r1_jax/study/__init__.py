"""The registered study: its hypotheses and what decides them, its two stages, its results."""
