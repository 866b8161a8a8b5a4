"""FengWu: a forecast model with an encoder and a decoder for every kind of field."""
