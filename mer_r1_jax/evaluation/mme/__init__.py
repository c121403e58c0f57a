"""MME-Emotion: reasoning about emotion, rated step by step by a judge."""
