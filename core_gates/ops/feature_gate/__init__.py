"""Feature gates: inputs times factors that low-rank logits make."""
