"""SeerAttention: a small gate predicts which blocks of keys attention needs."""
