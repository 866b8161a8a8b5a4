"""Language: experts and gates of language models, exchanged with transformers."""
