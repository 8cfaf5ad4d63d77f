"""What sits on the encoders: zero-shot classifiers and captions."""
