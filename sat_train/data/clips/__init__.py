"""One clip: its file, wherever it is, its times, and its frames at the training size."""
