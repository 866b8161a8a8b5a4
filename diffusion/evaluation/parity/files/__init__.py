"""Files of adapters by an independent writer, and what is made of them."""
