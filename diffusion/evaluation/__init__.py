"""What retrieval and fusion of adapters are judged by."""
