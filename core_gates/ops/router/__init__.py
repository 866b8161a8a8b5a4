"""From logits to choices in one pass: softmax, top-k, scaling, counts and the z-loss."""
