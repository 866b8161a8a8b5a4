"""What runs inside the models of Hugging Face transformers."""
