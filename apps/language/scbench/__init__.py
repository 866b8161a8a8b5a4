"""SCBench: what a policy of the KV cache costs when one context is asked several times."""
