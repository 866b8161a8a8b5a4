"""Block gates of trained models: distilling them, calibrating budgets, and what they cost."""
